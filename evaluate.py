"""Score a checkpoint: pooled DSC / IoU / accuracy (section 2.3), the mean per slide.

    python evaluate.py --ckpt runs/x/last.pt                # scores the test slides again
    python evaluate.py --ckpt runs/x/last.pt --data OTHER --split all       # on other slides

Counts are integers over the whole split and are divided once: the batch size changes no score.
train.py scores its test slides and draws its pictures with the same functions.
"""

import argparse
import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps

import data
from model import Network
from slide import DataError, warn

DEVICES = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
# Not of a run but of the machine: a run of a GPU is resumed and scored on a laptop too.
MACHINE = {"device": DEVICES[0], "workers": 8 if DEVICES[0] == "cuda" else 0}
SIDE, BORDER = 224, (3, 20, 3, 6)  # px of a panel: its tile (or more), left, top, right, bottom
GREEN, YELLOW, TINT = (0, 200, 0), (255, 230, 0), 32  # truth, prediction; opacity of 255
AS_WRITTEN = argparse.RawDescriptionHelpFormatter  # --help shows the docstring with its lines


def find_tiles(args, split="all"):
    """Tissue tiles of --data (default: synthetic slides), at --tile, --mpp, --level -> Tiles."""
    folder = args.data
    if folder is None:
        from extras import synthetic  # the only import of extras/ in these six files

        folder = synthetic.cached()
    sources = [s for s in data.find_slides(folder, args.seed) if split in ("all", s.split)]
    if not sources:
        raise DataError(f"{folder}: no slide in --split {split}; try --split all")
    return data.tile_slides(sources, args.tile, args.mpp, args.level)


def load_checkpoint(path):
    """last.pt -> dict, on the CPU. DataError for a file that is not a checkpoint of train.py."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        Network(checkpoint["args"]["width"]).load_state_dict(checkpoint["model"])
    except Exception as error:  # torch raises many types on files that are not its own
        finding = f"not a checkpoint of train.py ({type(error).__name__})"
        raise DataError(f"{path}: {finding}; give the last.pt of a run") from None
    return checkpoint


def load_model(path, **override):
    """last.pt -> model, the run's arguments; keyword arguments that are not None override these."""
    checkpoint = load_checkpoint(path)
    args = SimpleNamespace(**checkpoint["args"] | MACHINE)
    vars(args).update({name: value for name, value in override.items() if value is not None})
    model = Network(args.width).to(args.device)
    model.load_state_dict(checkpoint["model"])
    return model.eval(), args


@torch.no_grad()
def predict(model, images, amp=False):
    """uint8 tiles (B, 3, T, T) -> probability of tumour (B, T, T), of cancer (B,); float32."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        return [logits.float().softmax(1)[:, 1] for logits in model(images)]


def count(model, tiles, rows, args):
    """Predict tiles `rows` -> (len(rows), 4) int64: TP, FP, FN pixels, predicted label."""
    model.eval()
    keys, counts = [(row, 0) for row in rows.tolist()], []  # turn 0: as it is
    keys = [keys[n : n + args.batch_size] for n in range(0, len(keys), args.batch_size)]
    batches = data.load_batches(tiles, keys, torch.device(args.device), args.workers)
    for images, masks, _ in data.progress(batches, "evaluating", len(keys)):
        tumour, cancer = (p > 0.5 for p in predict(model, images, args.amp))
        truth, tumour = masks == 1, tumour & (masks >= 0)  # unknown pixels count nowhere
        pixels = [n.sum((1, 2)) for n in (tumour & truth, tumour & ~truth, ~tumour & truth)]
        counts.append(torch.stack([*pixels, cancer.long()], 1).cpu())
    return torch.cat(counts).numpy()


def dsc_iou(counts):
    """Rows of TP, FP, FN -> pooled DSC, IoU; None where the truth has no tumour."""
    tp, fp, fn = (int(n) for n in counts[:, :3].sum(0))
    return (2 * tp / (2 * tp + fp + fn), tp / (tp + fp + fn)) if tp + fn else (None, None)


def summarise(tiles, rows, counts, classes=True):
    """Counts of tiles `rows` -> the figures of results.json; None where there is nothing to score.

    `classes` is False where no image label trained the classification head.
    """
    # Deviation: the paper does not say how it averages; here pooled over all test tiles, because
    # its IoU = DSC / (2 - DSC) holds for pooled counts alone.
    table, label = tiles.table[rows], tiles.table["label"][rows]

    def figures(chosen):
        dsc, iou = dsc_iou(counts[chosen])
        known = chosen & (label != data.AMBIGUOUS)
        accuracy = (counts[known, 3] == label[known]).mean() if classes and known.any() else None
        return {"dsc": dsc, "iou": iou, "accuracy": accuracy}

    slides = []
    for n in np.unique(table["slide"]):
        here = table["slide"] == n
        wrong = int(counts[here, 1].sum()) if tiles.has_mask[rows][here].any() else None
        line = {"slide": tiles.sources[n].name, "tiles": int(here.sum()), **figures(here)}
        slides.append(line | {"false_positive_px": wrong})
    dsc, wrong = ([s[k] for s in slides if s[k] is not None] for k in ("dsc", "false_positive_px"))
    return {
        **figures(np.full(len(rows), True)),
        "dsc_cancer_tiles": figures(label == data.CANCER)["dsc"],
        "dsc_mean_of_slides": np.mean(dsc) if dsc else None,
        "false_positive_px_per_slide": np.mean(wrong) if wrong else None,
        "counts": dict(zip(("tp", "fp", "fn"), counts[:, :3].sum(0).tolist())),
        "slides": slides,
    }


def headline(results):
    """The figures that matter, in one line; null where there is nothing to score."""
    names = {"dsc": "DSC", "iou": "IoU", "accuracy": "accuracy"}
    names |= {"dsc_cancer_tiles": "DSC of cancer tiles", "dsc_mean_of_slides": "mean of slides"}
    figures = {key: "null" if results[key] is None else f"{results[key]:.4f}" for key in names}
    figures = [f"{names[key]} {figure}" for key, figure in figures.items()]
    wrong = results["false_positive_px_per_slide"]
    wrong = "null" if wrong is None else f"{wrong:.0f}"
    return "  ".join([*figures, f"false positives {wrong} px per slide"])


def write_results(out, model, tiles, args, began, classes=True):
    """Score the test tiles at the end of a run: results.json, pictures/, a line on the screen."""
    rows = np.flatnonzero(~tiles.table["train"])
    counts = count(model, tiles, rows, args)
    results = summarise(tiles, rows, counts, classes)
    results |= {"arguments": vars(args), "seconds": time.time() - began, "torch": torch.__version__}
    Path(out, "results.json").write_text(json.dumps(results, indent=1))
    write_pictures(Path(out, "pictures"), model, tiles, rows, counts, args)
    print(headline(results))


def panel(image, mask, colour, text):
    """A tile (3, T, T), a mask (T, T) tinted and outlined on it, text above -> (h, w, 3) uint8."""
    side = max(SIDE, len(mask))
    image = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side, side))
    mask = Image.fromarray(mask.numpy()).convert("L").resize((side, side), Image.NEAREST)
    image = ImageOps.expand(image, BORDER, "white")
    mask = ImageOps.expand(mask, BORDER)  # 0 around it: outlined on the edge of the tile, too
    inner = mask.filter(ImageFilter.MinFilter(5))
    image.paste(colour, mask=Image.fromarray(np.where(inner, TINT, mask).astype(np.uint8)))
    size = min(14, 1.8 * side / len(text))  # a long text fits, too
    ImageDraw.Draw(image).text((BORDER[0], 2), text, "black", font_size=size)
    return np.asarray(image)


def write_pictures(folder, model, tiles, rows, counts, args, each=4):
    """Tile | truth | prediction and its DSC, of the best, median and worst cancer tiles."""
    folder.mkdir(exist_ok=True)
    cancer = (tiles.table["label"][rows] == data.CANCER) & tiles.has_mask[rows]
    rows, dsc = rows[cancer].tolist(), [dsc_iou(c[None])[0] for c in counts[cancer]]
    order = np.argsort(dsc, kind="stable")[::-1]
    starts = {"best": 0, "median": (len(order) - each) // 2, "worst": len(order) - each}
    for name, start in starts.items() if rows else ():
        lines = []
        for n in order[max(start, 0) :][:each]:
            (image, mask, _), (slide, x, y, *_) = tiles[rows[n], 0], tiles.table[rows[n]]
            tumour = predict(model, image[None].to(args.device), args.amp)[0][0].cpu() > 0.5
            where = f"{Path(tiles.sources[slide].name).stem}, x {x}, y {y}"
            line = [panel(image, mask < -1, GREEN, where), panel(image, mask == 1, GREEN, "truth")]
            line.append(panel(image, tumour, YELLOW, f"prediction, DSC {dsc[n]:.3f}"))
            lines.append(np.concatenate(line, 1))
        Image.fromarray(np.concatenate(lines)).save(folder / f"{name}.png")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=AS_WRITTEN)
    add = parser.add_argument
    add("--ckpt", required=True, help="last.pt of a run; other options default to the run's")
    add("--data", help="folder of slides")
    add("--split", choices=("test", "train", "all"), default="test")
    add("--level", type=int, help="level to read where a file has no resolution (um/px)")
    add("--device", choices=DEVICES, help="default: the GPU if there is one")
    add("--workers", type=int, help="processes that read tiles (default: 8 with a GPU, else 0)")
    options = parser.parse_args(argv)
    model, args = load_model(options.ckpt, **vars(options))
    tiles = find_tiles(args, args.split)
    rows = np.arange(len(tiles.table))
    if not len(rows):
        raise DataError(f"{args.data}: no tissue in --split {args.split}; try --split all")
    results = summarise(tiles, rows, count(model, tiles, rows, args), classes=args.image_frac > 0)
    saved = Path(options.ckpt).with_name("results.json")
    if options.data is None and options.split == "test" and saved.exists():
        then, now = json.loads(saved.read_text())["slides"], results["slides"]
        if [(s["slide"], s["tiles"]) for s in then] != [(s["slide"], s["tiles"]) for s in now]:
            warn(f"{saved}: the run scored other test slides or tiles; figures cannot be compared")
    print(headline(results))


if __name__ == "__main__":
    main()
