"""Score whole slides: every pixel, and lesion by lesion.

    python -m extras.lesions --ckpt runs/x/last.pt                   # the test slides of training
    python -m extras.lesions --ckpt runs/x/last.pt --data OTHER --split all

Predicts them as extras/predict.py does, into whole_slides/ beside the checkpoint; gives DSC and
IoU, pooled and per slide, lesion recall (sensitivity) by size, false positives per slide.
"""

import argparse
import json
from pathlib import Path

import numpy as np

import evaluate
from extras import outline, predict
from slide import DataError, read_annotation, warn

# Largest diameter in mm, as CAMELYON has them; ITC: isolated tumour cells.
SIZES = {"macro": (2.0, np.inf), "micro": (0.2, 2.0), "ITC": (0.0, 0.2)}


def compare(truth, found, level, min_area):
    """Two Annotations -> TP, FP, FN px; [(diameter in px, was found)] of lesions; false positives.

    Only what a roi holds is compared, on a slide that has one. Glass counts too: what is outlined
    there is missed. A lesion is a patch of touching pixels of `min_area` px or more. One pixel of
    both: it was found. A predicted patch that touches no lesion is a false positive.
    """
    boxes = [(0, y, level.width, min(256, level.height - y)) for y in range(0, level.height, 256)]

    def rings_of(select):
        masks = ([a.mask(*box, level.downsample) for a in (truth, found)] for box in boxes)
        return outline.trace(select(*pair) for pair in masks)

    true, answer = rings_of(lambda t, f: t == 1), rings_of(lambda t, f: (t >= 0) & (f == 1))
    both = rings_of(lambda t, f: (t == 1) & (f == 1))
    tp, outlined, drawn = (outline.area(rings) for rings in (both, true, answer))
    met = np.array([ring.xy[0] for ring in both if not ring.is_hole], int).reshape(-1, 2)
    hit, right = outline.lesion_at(true, met), outline.lesion_at(answer, met)
    big = [n for n, ring in enumerate(true) if not ring.is_hole and ring.area >= min_area]
    lesions = [(outline.diameter(true[n]), n in hit) for n in big]
    false = sum(not ring.is_hole for ring in answer) - len(np.unique(right[np.isin(hit, big)]))
    return (tp, drawn - tp, outlined - tp), lesions, false


def score(model, tiles, out, args):
    """Predict the slides of `tiles` and compare with their annotation -> figures, None for none."""
    counts, lesions, slides, no_mask = [], [], [], []
    for n, (source, slide, truth) in enumerate(zip(tiles.sources, tiles.slides, tiles.annotations)):
        if truth.has_regions and "roi" not in truth.rings:
            no_mask.append(source.name)
            continue
        folder = out / Path(source.name).parent
        k, mpp = predict.predict_slide(model, source.path, folder, args)
        found = read_annotation(folder / f"{source.path.stem}_pred.xml")
        pixels, sizes, false = compare(truth, found, slide.levels[k], args.min_area / mpp**2)
        counts.append(pixels)
        lesions += [(diameter * mpp / 1000, was_found) for diameter, was_found in sizes]
        dsc, iou = evaluate.dsc_iou(np.array([pixels]))
        false = false if n in tiles.table["slide"] else None  # without tissue: not looked at
        slides.append({"slide": source.name, "dsc": dsc, "iou": iou, "false_positives": false})
    warn("slides have label regions alone, no mask: left out", no_mask)
    if not counts:
        raise DataError("no slide has a mask to score; outline tumour in a roi")
    recall = {}
    for size, (least, most) in SIZES.items():
        hits = [was_found for diameter, was_found in lesions if least <= diameter < most]
        recall[size] = {"lesions": len(hits), "found": sum(hits)}
    dsc, iou = evaluate.dsc_iou(np.array(counts))
    results = {"dsc": dsc, "iou": iou, "dsc_mean_of_slides": mean(s["dsc"] for s in slides)}
    false = mean(slide["false_positives"] for slide in slides)
    return results | {"lesion_recall": recall, "false_positives_per_slide": false, "slides": slides}


def mean(values):
    """Of those that are not None; None if there are none."""
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--ckpt", required=True, help="last.pt of a run; other options default to the run's")
    add("--data", help="folder of slides")
    add("--split", choices=("test", "train", "all"), default="test")
    add("--level", type=int, help="level to read where a file has no resolution (um/px)")
    add("--overwrite", action="store_true", help="predict slides anew that are done")
    add("--device", choices=evaluate.DEVICES, help="default: the GPU if there is one")
    add("--workers", type=int, help="processes that read windows")
    options = parser.parse_args(argv)
    model, args = evaluate.load_model(options.ckpt, **predict.DEFAULTS | vars(options))
    tiles = evaluate.find_tiles(args, args.split)
    out = Path(args.ckpt).parent / "whole_slides"
    results = score(model, tiles, out, args)
    (out / "results.json").write_text(json.dumps(results | {"arguments": vars(args)}, indent=1))
    del results["slides"]
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in results.items()}))


if __name__ == "__main__":
    main()
