"""Predict whole slides: probability, outlines for ASAP and QuPath, a picture, a line of figures.

    python -m extras.predict --ckpt runs/x/last.pt slides/*.tif      # into runs/x/predictions

For every slide: NAME_likelihood_map.tif, the tumour probability, 0 to 255; NAME_pred.xml for ASAP
and NAME.geojson for QuPath, outlines of the pixels at --threshold, without specks; NAME.png, a
small slide with them; a line of slides.csv. How to correct them and train: docs/whole_slides.md
"""

import argparse
import csv
import hashlib
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import data
import evaluate
from extras import convert, outline, pyramid
from slide import DataError, Slide, warn

PICTURE = 1000  # px, the longer side of NAME.png at most
COLOURS = {"roi": (0, 90, 255), "cancer region": (220, 0, 0), "normal region": (0, 150, 60)}
# The smallest lesions outlined in CAMELYON are single cells of 140 um^2; .9 of them exceed 350.
DEFAULTS = {"overlap": 0.5, "threshold": 0.5, "min_area": 200.0, "simplify": 0}
FIELDS = "slide", "windows", "tumour_mm2", "lesions", "diameter_mm", "score"
FIELDS = *FIELDS, "bytes", "level", "um_per_px", "weights", *DEFAULTS


class Windows(torch.utils.data.Dataset):
    """windows[x, y]: the square of `tile` px there, in px of `level` -> (3, tile, tile), x, y."""

    def __init__(self, slide, level, tile):
        self.slide, self.level, self.tile = slide, level, tile

    def __getitem__(self, place):
        image = self.slide.read(self.level, *place, self.tile, self.tile)
        return torch.from_numpy(image.transpose(2, 0, 1).copy()), *place


def places_with_tissue(slide, level, tile, overlap):
    """Where windows of `tile` px of `level` with tissue begin: (n, 2) x, y, row by row."""
    steps = round(1 / (1 - overlap))  # a window is steps x steps squares of one stride
    share = data.tissue_share(slide, level, tile // steps)
    share = np.pad(share, [(0, max(0, steps - side)) for side in share.shape])
    share = np.lib.stride_tricks.sliding_window_view(share, (steps, steps)).mean((2, 3))
    return np.argwhere(share >= data.TISSUE_SHARE)[:, ::-1] * (tile // steps)


def predict_windows(model, windows, places, args, scores):
    """Yield x, y, probability (tile, tile) at all `places`; their cancer scores go to `scores`."""
    batches = [places[n : n + args.batch_size] for n in range(0, len(places), args.batch_size)]
    loader = data.load_batches(windows, batches, torch.device(args.device), args.workers)
    for images, xs, ys in data.progress(loader, Path(windows.slide.path).name, len(batches)):
        p, cancer = evaluate.predict(model, images, args.amp)
        scores += cancer.tolist()
        yield from zip(xs.tolist(), ys.tolist(), p.cpu().numpy())


def outlines(probability, mpp, args):
    """NAME_likelihood_map.tif -> rings, and the side of their pixels in px of it (--simplify)."""
    strips = pyramid.read_strips(probability)
    block = max(1, args.simplify)
    for _ in range(block.bit_length() - 1):
        strips = pyramid.halve(strips)
    masks = (strip >= 255 * args.threshold for strip in strips)
    return outline.trace(masks, args.min_area / (mpp * block) ** 2), block


def write_picture(path, slide, shapes):
    """The slide with its outlines in yellow, regions in COLOURS, PICTURE px at most."""
    k = max(k for k, lv in enumerate(slide.levels) if not k or max(lv[:2]) >= PICTURE)
    view = Image.fromarray(slide.read(k, 0, 0, *slide.levels[k][:2]))
    view.thumbnail((PICTURE, PICTURE))
    pen, scale = ImageDraw.Draw(view), view.width / slide.levels[0].width
    for xy, kind in shapes:
        colour = COLOURS.get(kind, (255, 230, 0))
        pen.polygon((xy * scale).ravel().tolist(), outline=colour, width=2)
    view.save(path)


def is_done(path, out, settings):
    """Whether the files of a slide are in `out`; DataError if made with other settings."""
    table, done = out / "slides.csv", None
    if table.exists() and (out / f"{path.stem}_pred.xml").exists():
        with open(table, encoding="utf-8", newline="") as file:
            done = {row["slide"]: row for row in csv.DictReader(file)}.get(path.stem)  # the last
    for name, value in settings.items() if done else ():
        if done[name] != str(value):
            finding = f"done with {name} {done[name]}, not {value}"
            raise DataError(f"{path}: {finding}; --overwrite to redo it, or another --out")
    return bool(done)


def figures(rings, mpp):
    """What slides.csv says of the tumour on a slide."""
    sizes = [outline.diameter(ring) * mpp / 1000 for ring in rings if not ring.is_hole]
    tumour = {"tumour_mm2": round(outline.area(rings) * mpp**2 / 1e6, 6), "lesions": len(sizes)}
    return tumour | {"diameter_mm": round(max(sizes, default=0), 4)}


def predict_slide(model, path, out, args):
    """Write the files of a slide into `out`, unless they are there -> the level read, its um/px."""
    slide = Slide(path)
    k = slide.nearest_level(args.mpp, args.level)
    lv = slide.levels[k]
    mpp = slide.mpp * lv.downsample if slide.mpp else args.mpp
    weights = hashlib.sha256(Path(args.ckpt).read_bytes()).hexdigest()[:12]
    settings = {"bytes": path.stat().st_size, "level": k, "um_per_px": round(mpp, 4)}
    settings |= {"weights": weights} | {name: getattr(args, name) for name in DEFAULTS}
    if not args.overwrite and is_done(path, out, settings):
        print(f"{path}: done before; --overwrite to redo it", flush=True)
        return k, mpp
    if not slide.mpp:
        warn(f"{path}: um/px unknown, taken for the {mpp:g} of training at level {k}")
    places, scores = places_with_tissue(slide, k, args.tile, args.overlap).tolist(), []
    if not places:
        warn(f"{path}: no tissue found; nothing predicted")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=f".{path.stem}.") as part:
        ends = "_likelihood_map.tif", ".png", ".geojson", "_pred.xml"
        files = tif, png, qupath, xml = [Path(part, path.stem + end) for end in ends]
        predicted = predict_windows(model, Windows(slide, k, args.tile), places, args, scores)
        # ASAP compares the sides of slide and map by integer division: a level that was rounded up
        # is a pixel too wide, and its map would not be shown.
        size = [max(1, side // lv.downsample) for side in slide.levels[0][:2]]
        strips = pyramid.blend(predicted, args.tile, *size)
        pyramid.write(tif, strips, *size, mpp)
        rings, block = outlines(tif, mpp, args)
        shapes = outline.to_shapes(rings, lv.downsample * block)
        write_picture(png, slide, shapes)
        convert.write(qupath, rings, lv.downsample * block)
        outline.write_annotation(xml, shapes)
        row = {"slide": path.stem, "windows": len(places)}
        if places:
            row |= figures(rings, mpp * block)
        if places and args.image_frac:  # else nothing taught the classification head
            row["score"] = round(max(scores), 4)
        # A slide is done where its XML is, which comes last, so all files are of one time.
        (out / xml.name).unlink(missing_ok=True)
        for file in files[:-1]:
            os.replace(file, out / file.name)
        with open(out / "slides.csv", "a", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, FIELDS, lineterminator="\n")
            if not file.tell():
                table.writeheader()
            table.writerow(row | settings)
        os.replace(xml, out / xml.name)
    print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return k, mpp


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("slides", nargs="+", type=Path, metavar="SLIDE", help="a .tif, .tiff or .svs")
    add("--ckpt", required=True, help="last.pt of a run; other options default to the run's")
    add("--out", type=Path, help="folder (predictions, beside the checkpoint)")
    add("--overlap", type=float, help="of windows, as 1/2, 2/3; 0 is 4 times faster, with seams")
    add("--threshold", type=float, help="probability from which a pixel is tumour (0.5)")
    add("--min-area", type=float, help="um^2; smaller lesions and holes are left out (200, a cell)")
    add("--simplify", type=int, choices=(0, 2, 4, 8), help="outline blocks of PX x PX (0: exact)")
    add("--level", type=int, help="level to read where a file has no resolution (um/px)")
    add("--overwrite", action="store_true", help="redo slides that are done")
    add("--workers", type=int, help="processes that read windows (as in training)")
    add("--device", choices=evaluate.DEVICES, help="default: the GPU if there is one")
    parser.set_defaults(**DEFAULTS)
    options = parser.parse_args(argv)
    if not (0 <= options.overlap <= 0.9 and 0 < options.threshold <= 1 and options.min_area >= 0):
        parser.error("--overlap is 0 to 0.9, --threshold above 0, to 1, --min-area 0 or more")
    model, args = evaluate.load_model(options.ckpt, **vars(options))
    out, failed = options.out or Path(options.ckpt).parent / "predictions", 0
    # slides/*.tif also finds what an earlier call has put beside the slides.
    slides = [p for p in options.slides if not p.stem.lower().endswith(data.NO_SLIDES)]
    if not slides:
        raise DataError(f"{options.slides[0]}: masks or predictions alone; give the slides")
    name, count = Counter(path.stem for path in slides).most_common(1)[0]
    if count > 1:
        raise DataError(f"{name}: {count} slides of that name; predict each into another --out")
    table = out / "slides.csv"
    if table.exists() and table.read_text("utf-8").split("\n")[0] != ",".join(FIELDS):
        raise DataError(f"{table}: has columns of another version; give another --out")
    for path in slides:
        try:
            predict_slide(model, path, out, args)
        except Exception as error:  # of any type: the other slides are still predicted
            message = error if isinstance(error, DataError) else f"error: {path}: {error!r}"
            print(message, file=sys.stderr)
            failed += 1
    if failed:
        sys.exit(f"{failed} of {len(slides)} slides failed")


if __name__ == "__main__":
    main()
