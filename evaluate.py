"""Score a checkpoint: pooled DSC / IoU / accuracy (section 2.3), the mean per slide, pictures.

    python evaluate.py --ckpt runs/x/last.pt                # repeats the figures of training
    python evaluate.py --ckpt runs/x/last.pt --data OTHER   # on other slides
    python evaluate.py --ckpt runs/x/last.pt --whole-slides # every pixel, lesion by lesion

Counts are integers over the whole split and are divided once, so batches do not matter. In every
row of the paper but one IoU = DSC / (2 - DSC): true of pooled counts, not of means over images.
"""
import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
import outline
import predict
import synthetic

# Metastases by their largest diameter in mm; ITC is isolated tumour cells.
SIZE_CLASSES = ("macro", 2.0), ("micro", 0.2), ("ITC", 0.0)


def load_index(args):
    """The tiles that train.py's `args` describe -> Index; known already where `args.out` has it."""
    sources = data.find_slides(args.data or synthetic.cached(), args.seed,
                               args.unlabelled_is_normal)
    return data.index_tiles(sources, args.tile, args.mpp, args.level, args.cancer_share,
                            Path(args.out, "index.npz"))


def choose_labels(index, args):
    """Set the labels that `args` let training use -> rows of the training pool."""
    return data.choose_labels(index, args.pixel_frac, args.image_frac, args.label_unit,
                              args.normal_per_cancer, args.seed)


def batches(index, rows, args, what):
    """Batches of tiles `rows` as they are; `args` has batch_size, workers, device."""
    return data.progress(torch.utils.data.DataLoader(
        data.Tiles(index), args.batch_size, sampler=rows.tolist(), num_workers=args.workers,
        worker_init_fn=data.of_a_worker, pin_memory=args.device.type == "cuda"), what)


def settle_batch_norm(model, index, rows, args):
    """Estimate BN's statistics anew: plain means over whole batches of the tiles `rows`."""
    # Filled up with the first ones again: else one tile alone would count like a batch of eight.
    rows = np.random.default_rng(0).permutation(rows)
    rows = np.resize(rows, -(-len(rows) // args.batch_size) * args.batch_size)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum, usual = None, norm.momentum      # None: the mean of all batches
    model.train()
    for images, _, _, _ in batches(index, rows, args, "BN"):
        predict.probabilities(model, images, args)
    for norm in norms:
        norm.momentum = usual


def count_tiles(model, index, rows, args):
    """Predict tiles `rows` -> (len(rows), 4) int64: TP, FP, FN pixels, predicted label."""
    model.eval()
    counts = []
    for images, masks, _, _ in batches(index, rows, args, "evaluating"):
        masks = masks.to(args.device).bool()
        found, label = (p > 0.5 for p in predict.probabilities(model, images, args))
        pixels = (n.sum((1, 2)) for n in (found & masks, found & ~masks, ~found & masks))
        counts.append(torch.stack([*pixels, label.long()], 1).cpu())
    return torch.cat(counts).numpy()


def dsc_iou(counts):
    """Rows of TP, FP, FN -> pooled DSC, IoU; None where neither tumour is nor was found."""
    tp, fp, fn = (int(n) for n in counts[:, :3].sum(0))
    return (2 * tp / (2 * tp + fp + fn), tp / (tp + fp + fn)) if tp + fp + fn else (None, None)


def accuracy(counts, label):
    """Share of tiles with the right image label, of those that have one; None without any."""
    known = label != data.BETWEEN
    return float((counts[known, 3] == label[known]).mean()) if known.any() else None


def summarise(index, rows, counts, classes=True):
    """Counts of tiles `rows` -> the figures of results.json; no accuracy without `classes`."""
    # Deviation: the paper does not say how it averages; here pooled over all test tiles, because
    # its IoU = DSC / (2 - DSC) implies that; also over cancer tiles alone and as mean of slides.
    tiles = index.tiles[rows]

    def figures(of):
        dsc, iou = dsc_iou(counts[of])
        return {"dsc": dsc, "iou": iou,
                "accuracy": accuracy(counts[of], tiles["label"][of]) if classes else None}

    slides = []
    for n in np.unique(tiles["slide"]):
        of = tiles["slide"] == n
        slides.append({"slide": index.sources[n].name, "tiles": int(of.sum()), **figures(of),
                       "tumour_share": float(tiles["tumour"][of].mean())})
    cancer = tiles["label"] == data.CANCER
    with_tumour = [s for s in slides if s["tumour_share"] > 0]
    per_slide = {name: float(np.mean([s[name] for s in with_tumour])) for name in ("dsc", "iou")}
    return {**figures(slice(None)),
            **{f"{k}_cancer_tiles": v for k, v in figures(cancer).items() if k != "accuracy"},
            "per_slide": per_slide | {"slides_with_tumour": len(with_tumour), "list": slides},
            "counts": dict(zip(("tp", "fp", "fn"), counts[:, :3].sum(0).tolist())) | {
                "tiles": len(rows), "cancer_tiles": int(cancer.sum())}}


def headline(results):
    """The figures that matter, in one line."""
    accuracy = results["accuracy"]
    return (f"DSC {results['dsc']:.4f}  IoU {results['iou']:.4f}  accuracy "
            f"{'of an untrained branch, left out' if accuracy is None else f'{accuracy:.4f}'}  "
            f"cancer tiles: DSC {results['dsc_cancer_tiles'] or 0:.4f}  "
            f"mean of slides: DSC {results['per_slide']['dsc']:.4f}")


def write_pictures(folder, model, index, rows, counts, args, each=4):
    """Strips tile | truth | prediction of the best, median and worst cancer tiles by DSC."""
    folder.mkdir(exist_ok=True)
    cancer = index.tiles["label"][rows] == data.CANCER
    rows, dsc = rows[cancer], [dsc_iou(c[None])[0] for c in counts[cancer]]
    order, side, pitch = np.argsort(dsc, kind="stable")[::-1], index.tile, index.tile + 8
    middle = max(0, len(order) - each) // 2
    model.eval()
    for name, which in (("best", order[:each]), ("median", order[middle:middle + each]),
                        ("worst", order[::-1][:each])):
        picture = np.full((len(which) * pitch - 8, 3 * pitch - 8, 3), 128, np.uint8)
        for n, row in enumerate(rows[which].tolist()):
            image, mask, _, _ = data.Tiles(index)[row]
            found = predict.probabilities(model, image[None], args)[0][0].cpu() > 0.5
            panels = image.permute(1, 2, 0), mask[..., None] * 255, found[..., None] * 255
            for m, panel in enumerate(panels):
                picture[n * pitch:n * pitch + side, m * pitch:m * pitch + side] = panel.numpy()
        with data.atomic(folder / f"{name}.png", "wb") as file:
            Image.fromarray(picture).save(file, "PNG")


def whole_slides(model, index, which, out, args):
    """Predict the slides `which` (numbers) into `out`, compare with their annotation -> figures."""
    counts, slides, sizes = [], [], {size: {"lesions": 0, "hit": 0} for size, _ in SIZE_CLASSES}
    for n in which:
        source, slide = index.sources[n], index.slides[n]
        folder = out / Path(source.name).parent
        if predict.finished(source.path, folder, args) != "":
            print(predict.describe(predict.predict_slide(model, source.path, folder, args)),
                  flush=True)
        k, mpp = predict.working_level(slide, args)
        rings = predict.outlines(predict.files(source.path, folder)[0], mpp, args)
        count, lesions, false = compare(index.annotations[n], rings, slide.levels[k],
                                        args.min_area / mpp ** 2)
        for diameter, hit in lesions:
            size = next(size for size, least in SIZE_CLASSES if diameter * mpp / 1000 >= least)
            sizes[size]["lesions"] += 1
            sizes[size]["hit"] += hit
        counts.append(count)
        dsc, iou = dsc_iou(count[None])
        slides.append({"slide": source.name, "dsc": dsc, "iou": iou, "false_lesions": false,
                       "tumour_mm2": float((count[0] + count[2]) * mpp ** 2 / 1e6)})
    dsc, iou = dsc_iou(np.array(counts))
    with_tumour = [s for s in slides if s["tumour_mm2"] > 0]
    return {"dsc": dsc, "iou": iou, "lesions": sizes,
            "false_lesions_per_slide": float(np.mean([s["false_lesions"] for s in slides])),
            "per_slide": {name: float(np.mean([s[name] for s in with_tumour]))
                          for name in ("dsc", "iou")} | {"list": slides}}


def strips(level, *annotations):
    """The masks of a whole level, strip by strip: [(h, W) bool for each annotation]."""
    for y in range(0, level.height, predict.SIDE):
        box = 0, y, level.width, min(predict.SIDE, level.height - y), level.downsample
        yield [annotation.mask(*box) == 1 for annotation in annotations]


def compare(truth, found, level, min_area):
    """An Annotation and the Rings found -> TP, FP, FN; [(diameter in px, hit)] of lesions; false.

    Pixels are those of the whole level: nothing is found on glass, so what is outlined there is
    missed. A lesion is a patch of touching pixels, outlined or found, of `min_area` px or more; it
    is hit where at least one pixel is of both, and false where none is.
    """
    answer = data.Annotation(outline.to_polygons(found, level.downsample))
    count = np.sum([[(t & f).sum(), (~t & f).sum(), (t & ~f).sum()]
                    for t, f in strips(level, truth, answer)], 0)
    true = outline.trace((t for t, in strips(level, truth)), min_area)
    truth = data.Annotation(outline.to_polygons(true, level.downsample))
    both = outline.trace(t & f for t, f in strips(level, truth, answer))
    pixels = np.array([ring.xy[0] for ring in both if not ring.is_hole]).reshape(-1, 2)
    hit, right = (set(outline.lesion_at(rings, pixels).tolist()) for rings in (true, found))
    lesions = [(diameter, n in hit) for n, diameter in enumerate(outline.diameters(true))
               if not true[n].is_hole]
    return count, lesions, sum(not ring.is_hole for ring in found) - len(right)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, usage="evaluate.py --ckpt F [flags]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", required=True, help="last.pt of a run; what is not given here is as it was there")
    add("--data", help="folder of slides")
    add("--split", choices=("test", "train", "all"), default="test")
    add("--whole-slides", action="store_true", help="predict whole slides as predict.py does, "
        "into whole_slides/ beside the checkpoint; score their pixels and lesions")
    add("--unlabelled-is-normal", action="store_true", default=None, help="slides without XML have "
        "no tumour")
    add("--level", type=data.number(int, 0), help="level to read where a file does not tell its "
        "um/px")
    add("--device", type=predict.usable)
    add("--workers", type=data.number(int, 0), help="processes that read tiles")
    given = parser.parse_args(argv)
    model, args, fingerprint = predict.load(given.ckpt, given)
    index = load_index(args)
    if not given.data:
        choose_labels(index, args)
        if index.fingerprint() != fingerprint:
            data.warn("slides or annotations have changed since training: other figures")
    train = index.tiles["train"]
    rows = np.flatnonzero({"test": ~train, "train": train, "all": train | ~train}[args.split])
    if not index.tiles["tumour"][rows].any():
        raise data.DataError(f"{args.data}: no tumour on the {len(rows)} tiles of --split "
                             f"{args.split}; other slides, or --split all")
    if not args.whole_slides:
        counts = count_tiles(model, index, rows, args)
        print(headline(summarise(index, rows, counts, classes=predict.classifies(args))))
        return
    out = Path(args.ckpt).parent / "whole_slides"
    which = [n for n, source in enumerate(index.sources) if args.split in ("all", source.split)]
    results = whole_slides(model, index, which, out, args)
    with data.atomic(out / "results.json", "w") as file:
        json.dump(results | {"arguments": vars(args) | {"device": str(args.device)}}, file,
                  indent=1)
    print(f"whole slides: DSC {results['dsc']:.4f}  IoU {results['iou']:.4f}  "
          f"mean of slides: DSC {results['per_slide']['dsc']:.4f}  lesions hit: "
          + ", ".join(f"{n['hit']} of {n['lesions']} {size}"
                      for size, n in results["lesions"].items())
          + f"  false lesions per slide: {results['false_lesions_per_slide']:.2f}")


if __name__ == "__main__":
    data.run(main)
