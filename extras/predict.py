"""Predict whole slides: probability, outlines for ASAP and QuPath, a picture, a line of figures.

    python -m extras.predict --ckpt runs/x/last.pt slides/*.tif      # into runs/x/predictions

For every slide: NAME_likelihood_map.tif, the tumour probability, 0 to 255; NAME_pred.xml for ASAP
and NAME.geojson for QuPath, outlines of the pixels at --threshold, without specks; NAME.png, slide
and probability, small; a line of slides.csv. How to correct and train on them: docs/whole_slides.md
"""

import argparse
import contextlib
import csv
import hashlib
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import tifffile
import torch
from PIL import Image, ImageDraw

import data
import evaluate
from extras import geojson, outline, pyramid
from extras.simplify import simplify

PICTURE = 1000  # px, the longer side of the slide in NAME.png at most
# The smallest lesions outlined in CAMELYON are single cells of 140 um^2; .9 of them exceed 350.
DEFAULTS = {"overlap": 0.5, "threshold": 0.5, "min_area": 200.0, "simplify": 0.0}
FIGURES = "tumour_mm2", "score", "lesions", "diameter_mm"
FIELDS = "slide", "bytes", "width", "height", "level", "um_per_px", "windows", "seconds"
FIELDS = *FIELDS, *FIGURES, *DEFAULTS, "amp", "weights"
ENDS = "_likelihood_map.tif", ".png", ".geojson", "_pred.xml"


class Windows(torch.utils.data.Dataset):
    """Squares of a slide's level at `places` (n, 2), x and y: image (3, tile, tile), x, y."""

    def __init__(self, slide, level, tile, places):
        self.slide, self.level, self.tile, self.places = slide, level, tile, places

    def __getitem__(self, n):
        x, y = self.places[n].tolist()
        image = self.slide.read(self.level, x, y, self.tile, self.tile)
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))), x, y


def places_with_tissue(slide, level, tile, overlap):
    """Where windows of `tile` px of `level` with tissue begin: (n, 2) x, y, row by row."""
    steps = round(1 / (1 - overlap))  # a window is steps x steps squares of one stride
    share = data.tissue_share(slide, level, tile // steps)
    share = np.pad(share, [(0, max(0, steps - side)) for side in share.shape])
    share = np.lib.stride_tricks.sliding_window_view(share, (steps, steps)).mean((2, 3))
    return np.argwhere(share >= data.TISSUE_SHARE)[:, ::-1] * (tile // steps)


def predict_windows(model, windows, args, scores):
    """Yield x, y, probability (tile, tile) of all `windows`; their cancer scores go to `scores`."""
    n, size, device = len(windows.places), args.batch_size, torch.device(args.device)
    batches = [list(range(first, min(first + size, n))) for first in range(0, n, size)]
    loader = data.load(windows, batches, device, args.workers)
    for images, xs, ys in data.progress(loader, Path(windows.slide.path).name, len(batches) or 1):
        p, cancer = evaluate.predict(model, images, args.amp)
        scores += cancer.tolist()
        yield from zip(xs.tolist(), ys.tolist(), p.cpu().numpy())


def write_picture(path, slide, probability, rings, level):
    """The slide with outlines beside the probabilities, each PICTURE px at most."""
    full = slide.levels[0][:2]
    size = width, height = [max(1, side * PICTURE // max(*full, PICTURE)) for side in full]
    k = max(k for k, lv in enumerate(slide.levels) if lv.width >= width)
    view = slide.read(k, 0, 0, slide.levels[k].width, slide.levels[k].height)
    view = Image.fromarray(view).resize(size, Image.BOX)
    pen = ImageDraw.Draw(view)
    for ring in rings:
        xy = np.concatenate([ring.xy, ring.xy[:1]]) * (width / slide.levels[level].width)
        pen.line(xy.ravel().tolist(), fill=(0, 130, 0) if ring.is_hole else (0, 220, 0), width=2)
    with tifffile.TiffFile(probability) as tif:
        page = max(k for k, page in enumerate(tif.pages) if not k or page.imagewidth >= width)
    low = Image.fromarray(np.concatenate(list(pyramid.read_strips(probability, page))))
    picture = Image.new("RGB", (2 * width + 8, height), (128,) * 3)
    picture.paste(view, (0, 0))
    picture.paste(low.resize(size, Image.BOX), (width + 8, 0))
    picture.save(path)


def working_level(slide, args):
    """The level to predict, and its um/px: that of training where the file has none."""
    k = slide.nearest_level(args.mpp, args.level)
    return k, slide.mpp * slide.levels[k].downsample if slide.mpp else args.mpp


def outlines(probability, mpp, args):
    """NAME_likelihood_map.tif -> rings around the pixels at --threshold, without specks."""
    found = (strip >= 255 * args.threshold for strip in pyramid.read_strips(probability, 0))
    return outline.trace(found, args.min_area / mpp**2)


def is_done(path, out, settings):
    """Whether the files of a slide are in `out`; DataError if made with other settings."""
    table, rows = out / "slides.csv", []
    if table.exists() and (out / f"{path.stem}_pred.xml").exists():
        with open(table, encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["slide"] == path.stem]
    for name, value in settings.items() if rows else ():
        if rows[-1].get(name) != str(value):
            found = f"done with {name} {rows[-1].get(name)}, not {value}"
            raise data.DataError(f"{path}: {found}; --overwrite to redo it, or another --out")
    return bool(rows)


def figures(rings, mpp, score):
    """What slides.csv says of the tumour on a slide."""
    lesions = [ring for ring in rings if not ring.is_hole]
    area = sum(-ring.area if ring.is_hole else ring.area for ring in rings) * mpp**2 / 1e6
    diameter = outline.diameters(lesions).max(initial=0) * mpp / 1e3
    return dict(zip(FIGURES, (round(area, 6), score, len(lesions), round(diameter, 4))))


def describe(row):
    """A line of slides.csv in words."""
    text = "{slide}: {width} x {height} px, level {level}, {um_per_px:g} um/px, {windows} windows"
    if not row["windows"]:
        return text.format(**row) + " with tissue: nothing was looked at"
    text += ", {seconds:.1f} s; tumour {tumour_mm2:.3f} mm^2, {lesions} lesions, the largest "
    score = row["score"] or "of an untrained classification head, left out"
    return (text + "{diameter_mm:.2f} mm; score ").format(**row) + str(score)


def predict_slide(model, path, out, args):
    """Write the files of a slide into `out` and print its line; skip it where that is done."""
    start, path, out = time.time(), Path(path), Path(out)
    slide = data.Slide(path)
    k, mpp = working_level(slide, args)
    weights = hashlib.sha256(Path(args.ckpt).read_bytes()).hexdigest()[:12]
    settings = {"bytes": path.stat().st_size, "level": k, "amp": args.amp, "weights": weights}
    settings |= {name: getattr(args, name) for name in DEFAULTS}
    if not args.overwrite and is_done(path, out, settings):
        return print(f"{path}: done before; --overwrite to redo it", flush=True)
    if not slide.mpp:
        data.warn(f"{path}: um/px unknown, taken for the {mpp:g} of training at level {k}")
    lv, scores = slide.levels[k], []
    places = places_with_tissue(slide, k, args.tile, args.overlap)
    if not len(places):
        data.warn(f"{path}: no tissue was found, nothing was looked at")
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError), open(out / "slides.csv", "x") as file:
        file.write(",".join(FIELDS) + "\n")  # long before any process has a line for it
    # A slide is done where its XML is, which comes last, so all files are of one time.
    with tempfile.TemporaryDirectory(dir=out, prefix=f".{path.stem}.") as part:
        files = [Path(part, path.stem + end) for end in ENDS]
        found = predict_windows(model, Windows(slide, k, args.tile, places), args, scores)
        strips = pyramid.blend(found, args.tile, lv.width, lv.height)
        pyramid.write(files[0], strips, lv.width, lv.height, mpp)
        rings = outlines(files[0], mpp, args)
        drawn = simplify(rings, args.simplify)
        write_picture(files[1], slide, files[0], drawn, k)
        geojson.write(files[2], drawn, lv.downsample)
        outline.write_annotation(files[3], outline.to_polygons(drawn, lv.downsample))
        row = {"slide": path.stem, "width": slide.levels[0].width, "height": slide.levels[0].height}
        row |= {"um_per_px": round(mpp, 4), "windows": len(places), **settings}
        row["seconds"] = round(time.time() - start, 2)
        if scores:
            row |= figures(rings, mpp, round(max(scores), 4) if args.image_frac else "")
        (out / files[3].name).unlink(missing_ok=True)
        for file in files[:3]:
            os.replace(file, out / file.name)
        with open(out / "slides.csv", "a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, FIELDS, lineterminator="\n").writerow(row)
        os.replace(files[3], out / files[3].name)
    print(describe(row), flush=True)


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("slides", nargs="+", type=Path, metavar="SLIDE", help="a .tif, .tiff or .svs")
    add("--ckpt", required=True, help="last.pt of a run; what is not given is as it was there")
    add("--out", type=Path, help="folder (predictions, beside the checkpoint)")
    add("--overlap", type=float, help="of windows, 0, 1/2, 2/3, 3/4 ... of their side; 0 needs a "
        "quarter of the windows of 0.5, but leaves seams (0.5)")  # fmt: skip
    add("--threshold", type=float, help="probability from which a pixel is tumour (0.5)")
    add("--min-area", type=float, help="um^2; smaller lesions and holes are left out (200, a cell)")
    add("--simplify", type=float, help="fewer corners: outlines may be off by as many px of the "
        "level (0, exact)")  # fmt: skip
    add("--level", type=int, help="level to read where a file does not tell its um/px")
    add("--overwrite", action="store_true", help="redo slides that are done")
    add("--batch-size", type=int, default=8, help="windows at a time (8)")
    add("--workers", type=int, help="processes that read windows (as in training)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--amp", action="store_true", help="bfloat16 autocast")
    parser.set_defaults(**DEFAULTS)
    args = parser.parse_args(argv)
    if not (0 <= args.overlap <= 0.9 and 0 < args.threshold <= 1 and args.batch_size > 0):
        parser.error("--overlap is 0 to 0.9, --threshold above 0, to 1, --batch-size 1 or more")
    if not (args.min_area >= 0 and args.simplify >= 0):
        parser.error("--min-area and --simplify are 0 or more")
    return args


def main(argv=None):
    given = parse_args(argv)
    model, args = evaluate.load(given.ckpt, **vars(given))
    out, failed = given.out or Path(given.ckpt).parent / "predictions", 0
    # slides/*.tif also finds what an earlier call has put beside the slides.
    slides = [p for p in given.slides if not p.stem.lower().endswith(data.NO_SLIDES)]
    twice = [stem for stem, n in Counter(path.stem for path in slides).items() if n > 1]
    if twice:
        raise data.DataError(f"{twice[0]}: two slides of that name; give each an --out of its own")
    if not slides:
        raise data.DataError(f"{given.slides[0]}: masks or predictions alone; give the slides")
    for path in slides:
        try:
            predict_slide(model, path, out, args)
        except Exception as error:  # whatever it is, the other slides shall finish
            failed, said = failed + 1, str(error).removeprefix("error: ")
            if not isinstance(error, data.DataError):
                said = f"{type(error).__name__}: {said}"
            print(f"error: {said if str(path) in said else f'{path}: {said}'}", file=sys.stderr)
    if failed:
        sys.exit(f"{failed} of {len(slides)} slides failed")


if __name__ == "__main__":
    main()
