"""Score a checkpoint: pooled DSC / IoU / accuracy (section 2.3), the mean per slide, pictures.

    python evaluate.py --ckpt runs/x/last.pt                    # repeats the figures of training
    python evaluate.py --ckpt runs/x/last.pt --data OTHER       # on other slides

Counts are integers over the whole split and are divided once, so batches do not matter; in every row of
the paper but one IoU = DSC / (2 - DSC), which holds for pooled counts and not for means over images.
"""
import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

import data
import synthetic
from model import Network


def load_index(args):
    """The tiles that `args` (the arguments of train.py) describe -> Index, rows of the training pool."""
    sources = data.find_slides(args.data or synthetic.cached(), args.seed, args.unlabelled_is_normal)
    index = data.index_tiles(sources, args.tile, args.mpp, args.level, args.cancer_share)
    pool = data.choose_labels(index, args.pixel_frac, args.image_frac, args.label_unit,
                              args.normal_per_cancer, args.seed)
    return index, pool


@torch.no_grad()
def predict(model, images, device, amp=False):
    """uint8 tiles (B, 3, T, T) -> tumour masks (B, T, T) bool and labels (B,) bool, by argmax."""
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        logits, scores = model(images.to(device, non_blocking=True))
    return logits[:, 1] > logits[:, 0], scores[:, 1] > scores[:, 0]


def count_tiles(model, index, rows, device, batch_size=8, workers=0, amp=False):
    """Predict tiles `rows` -> counts (len(rows), 4) int64: TP, FP, FN pixels, predicted label."""
    loader = torch.utils.data.DataLoader(data.Tiles(index), batch_size, sampler=rows.tolist(),
                                         num_workers=workers, pin_memory=device.type == "cuda")
    model.eval()
    counts = []
    for images, masks, _, _ in data.progress(loader, "evaluating"):
        masks = masks.to(device).bool()
        predicted, label = predict(model, images, device, amp)
        counts.append(torch.stack([(predicted & masks).sum((1, 2)), (predicted & ~masks).sum((1, 2)),
                                   (~predicted & masks).sum((1, 2)), label.long()], 1).cpu())
    return torch.cat(counts).numpy()


def dsc_iou(counts):
    """Rows of TP, FP, FN -> pooled DSC and IoU; None where there is neither tumour nor prediction."""
    tp, fp, fn = (int(n) for n in counts[:, :3].sum(0))
    return (2 * tp / (2 * tp + fp + fn), tp / (tp + fp + fn)) if tp + fp + fn else (None, None)


def accuracy(counts, label):
    """Share of tiles with the right image label, of those that have one; None if there are none."""
    known = label != data.BETWEEN
    return float((counts[known, 3] == label[known]).mean()) if known.any() else None


def summarise(index, rows, counts, classes=True):
    """Counts of tiles -> the figures of results.json. `classes` False: the class branch is untrained."""
    # Deviation: the paper does not say how it averages; here pooled over all test tiles, as its
    # IoU = DSC / (2 - DSC) implies, and beside it over cancer tiles alone and as the mean over slides.
    tiles = index.tiles[rows]
    cancer = tiles["label"] == data.CANCER
    slides = []
    for n in np.unique(tiles["slide"]):
        of = tiles["slide"] == n
        dsc, iou = dsc_iou(counts[of])
        slides.append({"slide": index.sources[n].name, "tiles": int(of.sum()), "dsc": dsc, "iou": iou,
                       "accuracy": accuracy(counts[of], tiles["label"][of]) if classes else None,
                       "tumour_share": float(tiles["tumour"][of].mean())})
    with_tumour = [s for s in slides if s["tumour_share"] > 0]
    (dsc, iou), (dsc_cancer, iou_cancer) = dsc_iou(counts), dsc_iou(counts[cancer])
    return {"dsc": dsc, "iou": iou, "accuracy": accuracy(counts, tiles["label"]) if classes else None,
            "dsc_cancer_tiles": dsc_cancer, "iou_cancer_tiles": iou_cancer,
            "per_slide": {"slides_with_tumour": len(with_tumour),
                          "dsc": float(np.mean([s["dsc"] for s in with_tumour])),
                          "iou": float(np.mean([s["iou"] for s in with_tumour])), "list": slides},
            "counts": dict(zip(("tp", "fp", "fn"), counts[:, :3].sum(0).tolist())) | {
                "tiles": len(rows), "cancer_tiles": int(cancer.sum())}}


def show(results):
    """The headline in one line."""
    figures = [(name, results[name]) for name in ("dsc", "iou", "accuracy", "dsc_cancer_tiles")]
    figures.append(("dsc per slide", results["per_slide"]["dsc"]))
    return "  ".join(f"{name} {'not trained' if v is None else f'{v:.4f}'}" for name, v in figures)


def write_pictures(folder, model, index, rows, counts, device, each=4):
    """Strips tile | truth | prediction of the best, median and worst cancer tiles by DSC."""
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    rows, counts = (a[index.tiles["label"][rows] == data.CANCER] for a in (rows, counts))
    order = np.argsort([-(dsc_iou(c[None])[0] or 0) for c in counts], kind="stable")
    middle = max(0, len(order) // 2 - each // 2)
    tiles, side = data.Tiles(index), index.tile
    model.eval()
    for name, which in (("best", order[:each]), ("median", order[middle:middle + each]),
                        ("worst", order[::-1][:each])):
        picture = np.full((len(which) * (side + 8) - 8, 3 * (side + 8) - 8, 3), 128, np.uint8)
        for n, row in enumerate(rows[which].tolist()):
            image, mask, _, _ = tiles[row]
            predicted, _ = predict(model, image[None], device)
            for m, panel in enumerate((image.permute(1, 2, 0), mask[..., None] * 255,
                                       predicted[0, ..., None].cpu() * 255)):
                y, x = n * (side + 8), m * (side + 8)
                picture[y:y + side, x:x + side] = panel.numpy()
        Image.fromarray(picture).save(folder / f"{name}.png")


def load_checkpoint(path, device):
    """A checkpoint of train.py -> dict. Raises DataError for a file that is not one."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:          # torch raises many types on files that are not its own
        raise data.DataError(f"{path}: not a checkpoint of train.py ({str(error).splitlines()[0]})"
                             ) from error


def load_weights(model, state, path):
    """Fill `model`; DataError where the checkpoint's network is another one."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise data.DataError(f"{path}: weights of another network or width; train it again or pass the "
                             "--width it was trained with") from error


def device(name):
    """The type of --device: a torch.device that works here."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{name} cannot be used here: {str(error).splitlines()[0]}"
                                         ) from error


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="last.pt of a run")
    parser.add_argument("--data", help="folder of slides (default: the one it was trained with)")
    parser.add_argument("--split", choices=("test", "train"), default="test")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    checkpoint = load_checkpoint(options.ckpt, options.device)
    args = SimpleNamespace(**checkpoint["args"])
    args.data = options.data or args.data
    model = Network(args.width).to(options.device)
    load_weights(model, checkpoint["model"], options.ckpt)
    index, _ = load_index(args)
    if not options.data and index.fingerprint() != checkpoint["fingerprint"]:
        data.warn("the slides or annotations have changed since training: other figures than then")
    rows = np.flatnonzero(index.tiles["train"] == (options.split == "train"))
    counts = count_tiles(model, index, rows, options.device, args.batch_size, options.workers, args.amp)
    print(show(summarise(index, rows, counts, args.image_frac > 0)))


if __name__ == "__main__":
    data.run(main)
