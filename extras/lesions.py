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

import data
import evaluate
from extras import outline, predict

SIZES = ("macro", 2.0), ("micro", 0.2), ("ITC", 0.0)  # mm at least; isolated tumour cells


def strips(lv, *annotations):
    """The masks of a whole level, 256 rows at a time: [(h, W) bool for each annotation]."""
    for y in range(0, lv.height, 256):
        box = 0, y, lv.width, min(256, lv.height - y), lv.downsample
        yield [annotation.mask(*box) == 1 for annotation in annotations]


def compare(truth, found, level, min_area):
    """An Annotation and the Rings found -> TP, FP, FN; [(diameter in px, was found)]; false ones.

    Glass counts too: what is outlined there is missed. A lesion is a patch of touching pixels of
    `min_area` px or more. One pixel of both: it was found; a patch that has none is a false one.
    """
    answer = data.Annotation(outline.to_polygons(found, level.downsample))
    counts = [[t & f, f & ~t, t & ~f] for t, f in strips(level, truth, answer)]
    counts = np.sum([[mask.sum() for mask in masks] for masks in counts], 0)
    true = outline.trace((t for (t,) in strips(level, truth)), min_area)
    truth = data.Annotation(outline.to_polygons(true, level.downsample))
    both = outline.trace(t & f for t, f in strips(level, truth, answer))
    met = np.array([ring.xy[0] for ring in both if not ring.is_hole], int).reshape(-1, 2)
    hit, right = (set(outline.lesion_at(rings, met).tolist()) for rings in (true, found))
    lesions = [(d, n in hit) for n, d in enumerate(outline.diameters(true)) if not true[n].is_hole]
    return counts, lesions, sum(not ring.is_hole for ring in found) - len(right)


def score(model, tiles, out, args):
    """Predict the slides of `tiles` into `out`, compare with their annotation -> the figures."""
    counts, slides, recall = [], [], {size: {"lesions": 0, "found": 0} for size, _ in SIZES}
    everything = zip(tiles.sources, tiles.slides, tiles.annotations)
    for n, (source, slide, truth) in enumerate(everything):
        folder = out / Path(source.name).parent
        predict.predict_slide(model, source.path, folder, args)
        k, mpp = predict.working_level(slide, args)
        rings = predict.outlines(folder / f"{source.path.stem}_likelihood_map.tif", mpp, args)
        count, lesions, false = compare(truth, rings, slide.levels[k], args.min_area / mpp**2)
        for diameter, was_found in lesions:
            size = next(size for size, least in SIZES if diameter * mpp / 1000 >= least)
            recall[size]["lesions"] += 1
            recall[size]["found"] += was_found
        counts.append(count)
        false = false if n in tiles.table["slide"] else None  # without tissue: not looked at
        slides.append({"slide": source.name, **dsc_iou(count[None]), "false_positives": false})
    scored = [slide for slide in slides if slide["dsc"] is not None]
    means = {k: float(np.mean([s[k] for s in scored])) if scored else None for k in ("dsc", "iou")}
    false = [slide["false_positives"] for slide in slides if slide["false_positives"] is not None]
    false = float(np.mean(false)) if false else None
    results = {"lesion_recall": recall, "false_positives_per_slide": false}
    return dsc_iou(np.array(counts)) | results | {"per_slide": means | {"list": slides}}


def dsc_iou(counts):
    """Rows of TP, FP, FN -> pooled DSC and IoU, a dict; None where there is no tumour."""
    return dict(zip(("dsc", "iou"), evaluate.dsc_iou(counts)))


def headline(results):
    """The figures that matter, in one line; null where there is nothing to score."""
    dsc = results["dsc"], results["iou"], results["per_slide"]["dsc"]
    dsc, iou, mean = ("null" if value is None else f"{value:.4f}" for value in dsc)
    sizes = [f"{n['found']} of {n['lesions']} {k}" for k, n in results["lesion_recall"].items()]
    text = f"whole slides: DSC {dsc}  IoU {iou}  mean of slides: DSC {mean}  lesion recall: "
    false = results["false_positives_per_slide"]
    false = "null" if false is None else f"{false:.2f}"
    return f"{text}{', '.join(sizes)}  false positives per slide: {false}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--ckpt", required=True, help="last.pt of a run; what is not given is as it was there")
    add("--data", help="folder of slides")
    add("--split", choices=("test", "train", "all"), default="test")
    add("--level", type=int, help="level to read where a file does not tell its um/px")
    add("--overwrite", action="store_true", help="predict slides anew that are done")
    add("--device", help="cpu, cuda")
    add("--workers", type=int, help="processes that read windows")
    given = parser.parse_args(argv)
    model, args = evaluate.load(given.ckpt, **predict.DEFAULTS | vars(given))
    sources = data.find_slides(args.data, args.seed)
    sources = [source for source in sources if args.split in ("all", source.split)]
    if not sources:
        raise data.DataError(f"{args.data}: no slide in --split {args.split}; try --split all")
    tiles = data.tile_slides(sources, args.tile, args.mpp, args.level)
    out = Path(args.ckpt).parent / "whole_slides"
    results = score(model, tiles, out, args) | {"arguments": vars(args)}
    (out / "results.json").write_text(json.dumps(results, indent=1))
    print(headline(results))


if __name__ == "__main__":
    main()
