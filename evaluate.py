"""Score a checkpoint: pooled DSC / IoU / accuracy (section 2.3), the mean per slide, pictures.

    python evaluate.py --ckpt runs/x/last.pt                # repeats the figures of training
    python evaluate.py --ckpt runs/x/last.pt --data OTHER --split all       # on other slides

Counts are integers over the whole split and are divided once, so batches do not matter. In every
row of the paper but one IoU = DSC / (2 - DSC): true of pooled counts, not of means over images.
"""

import argparse
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

import data
from model import Network


def load_checkpoint(path):
    """last.pt -> dict, on the CPU. DataError for a file that is not a checkpoint of train.py."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["model"], checkpoint["args"]["width"]
    except Exception as error:  # torch raises many types on files that are not its own
        said = (str(error).splitlines() or [""])[0]
        cure = "give a last.pt that train.py wrote"
        raise data.DataError(f"{path}: not a checkpoint ({said}); {cure}") from None
    return checkpoint


def load_weights(model, checkpoint, path):
    """Fill `model`; DataError where the checkpoint's network is another one."""
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError:
        width = checkpoint["args"]["width"]
        raise data.DataError(f"{path}: no weights of width {width}; train again") from None


def load(path, **given):
    """last.pt -> its model; the arguments of its training, those `given` and not None instead."""
    checkpoint = load_checkpoint(path)
    given = {name: value for name, value in given.items() if value is not None}
    args = SimpleNamespace(**checkpoint["args"] | given)
    model = Network(args.width).to(args.device)
    load_weights(model, checkpoint, path)
    return model.eval(), args


@torch.no_grad()
def predict(model, images, amp=False):
    """uint8 tiles (B, 3, T, T) -> probability of tumour (B, T, T), of cancer (B,); float32."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        return [logits.float().softmax(1)[:, 1] for logits in model(images)]


def count(model, tiles, rows, args):
    """Predict tiles `rows` -> (len(rows), 4) int64: TP, FP, FN pixels, predicted label."""
    model.eval()
    keys, size, counts = [(row, 0) for row in rows.tolist()], args.batch_size, []
    batches = [keys[n : n + size] for n in range(0, len(keys), size)]
    loader = data.load(tiles, batches, torch.device(args.device), args.workers)
    for images, masks, _ in data.progress(loader, "evaluating", len(batches)):
        found, label = (p > 0.5 for p in predict(model, images, args.amp))
        pixels = [n.sum((1, 2)) for n in (found & (masks == 1), found & (masks == 0))]
        missed = (masks * ~found).sum((1, 2))
        counts.append(torch.stack([*pixels, missed, label.long()], 1).cpu())
    return torch.cat(counts).numpy()


def dsc_iou(counts):
    """Rows of TP, FP, FN -> pooled DSC, IoU; None where neither tumour is nor was found."""
    tp, fp, fn = (int(n) for n in counts[:, :3].sum(0))
    return (2 * tp / (2 * tp + fp + fn), tp / (tp + fp + fn)) if tp + fp + fn else (None, None)


def accuracy(counts, label):
    """Share of tiles with the right image label, of those that have one; None without any."""
    known = label != data.AMBIGUOUS
    return float((counts[known, 3] == label[known]).mean()) if known.any() else None


def summarise(tiles, rows, counts, classes=True):
    """Counts of tiles `rows` -> the figures of results.json; no accuracy without `classes`."""
    # Deviation: the paper does not say how it averages; here pooled over all test tiles, because
    # its IoU = DSC / (2 - DSC) implies that; also over cancer tiles alone and as mean of slides.
    table = tiles.table[rows]

    def figures(of):
        dsc, iou = dsc_iou(counts[of]) if table["tumour"][of].any() else (None, None)
        right = accuracy(counts[of], table["label"][of]) if classes else None
        return {"dsc": dsc, "iou": iou, "accuracy": right}

    slides = []
    for n in np.unique(table["slide"]):
        of = table["slide"] == n
        line = {"slide": tiles.sources[n].name, "tiles": int(of.sum()), **figures(of)}
        slides.append(line | {"false_positive_px": int(counts[of, 1].sum())})
    cancer = table["label"] == data.CANCER
    totals = dict(zip(("tp", "fp", "fn"), counts[:, :3].sum(0).tolist()))
    means = {name: [s[name] for s in slides if s["dsc"] is not None] for name in ("dsc", "iou")}
    means = {name: float(np.mean(values)) if values else None for name, values in means.items()}
    return {
        **figures(slice(None)),
        **{f"{name}_cancer_tiles": figures(cancer)[name] for name in ("dsc", "iou")},
        "false_positive_px_per_slide": float(np.mean([s["false_positive_px"] for s in slides])),
        "per_slide": means | {"list": slides},
        "counts": totals | {"tiles": len(rows), "cancer_tiles": int(cancer.sum())},
    }


def headline(results):
    """The figures that matter, in one line; null where there is nothing to score."""
    figures = {
        "DSC": results["dsc"],
        "IoU": results["iou"],
        "accuracy": results["accuracy"],
        "cancer tiles: DSC": results["dsc_cancer_tiles"],
        "mean of slides: DSC": results["per_slide"]["dsc"],
    }
    text = [f"{k} {'null' if v is None else f'{v:.4f}'}" for k, v in figures.items()]
    fp = results["false_positive_px_per_slide"]
    return "  ".join([*text, f"false positives per slide: {fp:.0f} px"])


def draw_outline(image, mask, colour):
    """The (h, w, 3) uint8 `image` with the border pixels of `mask` (h, w) in `colour`."""
    m = np.pad(np.asarray(mask) > 0, 1, mode="edge")
    inner = m[:-2, 1:-1] & m[2:, 1:-1] & m[1:-1, :-2] & m[1:-1, 2:]
    return np.where((m[1:-1, 1:-1] & ~inner)[..., None], np.uint8(colour), image)


def write_pictures(folder, model, tiles, rows, counts, args, each=4):
    """Tile | truth (green) | prediction (yellow) of the best, median and worst cancer tiles."""
    folder.mkdir(exist_ok=True)
    cancer = tiles.table["label"][rows] == data.CANCER
    rows, dsc = rows[cancer], [dsc_iou(c[None])[0] for c in counts[cancer]]
    order, middle = np.argsort(dsc, kind="stable")[::-1], max(0, len(dsc) - each) // 2
    worst = order[::-1][:each]
    for name, which in ("best", order[:each]), ("median", order[middle:][:each]), ("worst", worst):
        lines = []
        for row in rows[which].tolist():
            image, mask, _ = tiles[row, 0]
            found = predict(model, image[None].to(args.device), args.amp)[0][0].cpu() > 0.5
            image = image.permute(1, 2, 0).numpy()
            panels = image, draw_outline(image, mask, (0, 200, 0))
            panels = *panels, draw_outline(image, found, (255, 230, 0))
            lines.append(np.concatenate([np.pad(p, ((4, 4), (4, 4), (0, 0))) for p in panels], 1))
        Image.fromarray(np.concatenate(lines)).save(folder / f"{name}.png")


def main(argv=None):
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("--ckpt", required=True, help="last.pt of a run; what is not given is as it was there")
    add("--data", help="folder of slides")
    add("--split", choices=("test", "train", "all"), default="test")
    add("--level", type=int, help="level to read where a file does not tell its um/px")
    add("--device", help="cpu, cuda")
    add("--workers", type=int, help="processes that read tiles")
    given = parser.parse_args(argv)
    model, args = load(given.ckpt, **vars(given))
    sources = data.find_slides(args.data, args.seed)
    tiles = data.tile_slides(sources, args.tile, args.mpp, args.level)
    train = tiles.table["train"]
    rows = np.flatnonzero({"test": ~train, "train": train, "all": train | ~train}[args.split])
    if not len(rows):
        raise data.DataError(f"{args.data}: no tile in --split {args.split}; try --split all")
    counts = count(model, tiles, rows, args)
    print(headline(summarise(tiles, rows, counts, classes=args.image_frac > 0)))


if __name__ == "__main__":
    main()
