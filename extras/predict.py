"""Predict whole slides: a slide -> probability TIFF, ASAP annotation, picture, a line of figures.

    python predict.py --ckpt runs/x/last.pt slides/*.tif    # into runs/x/predictions
    python train.py --data slides                           # once NAME.xml are corrected and there

For every slide: NAME_prob.tif, the tumour probability, 0..255; NAME.xml, outlines to look at and
correct in ASAP; NAME.png, both, small; a line of slides.csv. Slides that are done are not done
again. Outlines, areas and lesions are of the pixels at --threshold, without specks.
"""
import argparse
import contextlib
import csv
import hashlib
import io
import sys
import time
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tifffile
import torch
from PIL import Image, ImageDraw

import data
import outline
from model import Network

SIDE = 256                      # of the TIFF's tiles; a strip has as many rows
EMPTY = zlib.compress(bytes(SIDE * SIDE))
PICTURE = 2000                  # px, the longer side of NAME.png at most
# The smallest lesions outlined in CAMELYON are single cells of 140 um^2; .9 of them exceed 350.
DEFAULTS = {"overlap": 0.5, "threshold": 0.5, "min_area": 200.0}
FIELDS = ("slide", "bytes", "width", "height", "level", "um_per_px", "tissue_tiles", "seconds",
          "tumour_mm2", "score", "lesions", "diameter_mm", *DEFAULTS, "amp", "weights")


# --------------------------------------------------------------------------------------- the model

def usable(name):
    """The type of --device: a torch.device that works here."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise data.DataError(f"--device {name} cannot be used: {str(error).splitlines()[0]}")


def load_checkpoint(path):
    """last.pt -> dict, on the CPU. Raises DataError for a file that is not a checkpoint."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["model"], checkpoint["args"]["method"], checkpoint["fingerprint"]
    except Exception as error:          # torch raises many types on files that are not its own
        raise data.DataError(f"{path}: not a checkpoint of train.py ({type(error).__name__}: "
                             f"{(str(error).splitlines() or [''])[0]})") from error
    return checkpoint


def load_weights(model, checkpoint, path):
    """Fill `model`; DataError where the checkpoint's network is another one."""
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise data.DataError(f"{path}: its weights are of another network than its --method "
                             f"{checkpoint['args']['method']} and --width "
                             f"{checkpoint['args']['width']} say; train again") from error


def network(args):
    """The network of --method, with random weights."""
    if args.method in ("multitask", "mil"):
        import baselines                    # here, so that predict.py can be copied without it
        return baselines.MultiTask() if args.method == "multitask" else baselines.MIL()
    return Network(args.width)


def load(path, given):
    """last.pt -> its model; arguments, those `given` or of its training where None; fingerprint."""
    checkpoint = load_checkpoint(path)
    args = SimpleNamespace(**DEFAULTS | checkpoint["args"] | {"out": str(Path(path).parent)} | {
        name: value for name, value in vars(given).items() if value is not None})
    args.device = usable(args.device)
    args.weights = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
    model = network(args).to(args.device)
    load_weights(model, checkpoint, path)
    return model, args, checkpoint["fingerprint"]


def classifies(args):
    """Whether training ended with a class branch that fits the encoder."""
    return args.image_frac > 0 and args.method != "transfer"


@torch.no_grad()
def probabilities(model, images, args):
    """uint8 tiles (B, 3, T, T) -> probability of tumour (B, T, T), of cancer (B,); float32."""
    if len(images) == 1:                # torch takes other kernels for one: the last bit differs
        return [p[:1] for p in probabilities(model, torch.cat([images, images]), args)]
    with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
        logits, scores = model(images.to(args.device, non_blocking=True))
    return logits.float().softmax(1)[:, 1], scores.float().softmax(1)[:, 1]


# ------------------------------------------------------------------- windows -> strips of the slide

class Windows(torch.utils.data.Dataset):
    """Squares of a slide's level at `places` (n, 2), x and y: image (3, tile, tile), x, y."""

    def __init__(self, slide, level, tile, places):
        self.slide, self.level, self.tile, self.places = slide, level, tile, places

    def __len__(self):
        return len(self.places)

    def __getitem__(self, n):
        x, y = self.places[n].tolist()
        image = self.slide.read(self.level, x, y, self.tile, self.tile)
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))), x, y


def blend(windows, tile, width, height):
    """Windows (x, y, p (tile, tile) float32), by rows -> strips (SIDE, width) uint8 of 255 p.

    Where windows overlap, p is their mean, weighted with a pyramid that falls to 0 at the window's
    edge, so no seam is left. Where none was, it is 0. Only strips still being filled are held.
    """
    # Deviation: the paper predicts tiles; here whole slides, in windows that overlap, because a
    # network sees least at the edge of its tile.
    ramp = np.minimum(np.arange(tile) + 0.5, np.arange(tile, 0, -1) - 0.5).astype(np.float32)
    weight, strips, done = ramp[:, None] * ramp, {}, 0

    def finish(row):
        rows = min(SIDE, height - row * SIDE)
        if row not in strips:
            return np.zeros((rows, width), np.uint8)
        total, weights = strips.pop(row)[:, :rows, :width]
        return np.rint(255 * total / np.maximum(weights, 1e-9)).astype(np.uint8)

    for x, y, p in windows:
        while done < y // SIDE:
            yield finish(done)
            done += 1
        for row in range(y // SIDE, (y + tile - 1) // SIDE + 1):
            if row not in strips:
                strips[row] = np.zeros((2, SIDE, width + tile), np.float32)
            top, bottom = max(row * SIDE, y), min((row + 1) * SIDE, y + tile)
            here = np.s_[top - row * SIDE:bottom - row * SIDE, x:x + tile]
            strips[row][0][here] += (weight * p)[top - y:bottom - y]
            strips[row][1][here] += weight[top - y:bottom - y]
    for row in range(done, -(-height // SIDE)):
        yield finish(row)


# ---------------------------------------------------------------------------- strips <-> TIFF, PNG

def write_pyramid(path, strips, width, height, mpp):
    """Strips (SIDE, width) uint8 -> a tiled deflate pyramid TIFF, halved until one tile is left."""
    um, reduced = mpp, False
    while True:
        with tifffile.TiffWriter(path, bigtiff=True, append=reduced) as tif:
            tif.write(tiles(strips), shape=(height, width), dtype=np.uint8, tile=(SIDE, SIDE),
                      compression="zlib", photometric="minisblack", subfiletype=int(reduced),
                      resolution=(1e4 / um,) * 2, resolutionunit="CENTIMETER", metadata=None)
        if max(width, height) <= SIDE:
            return
        strips = halve(read_strips(path, -1))
        width, height, um, reduced = -(-width // 2), -(-height // 2), um * 2, True


def tiles(strips):
    """Strips -> TIFF tiles, deflated."""
    for strip in strips:
        for x in range(0, strip.shape[1], SIDE):
            tile = strip[:, x:x + SIDE]
            if tile.any():
                tile = np.pad(tile, ((0, SIDE - tile.shape[0]), (0, SIDE - tile.shape[1])))
                yield zlib.compress(tile.tobytes())
            else:
                yield EMPTY


def read_strips(path, page):
    """A page of a TIFF of `write_pyramid` -> its strips again, one held at a time."""
    with tifffile.TiffFile(path) as tif:
        page = tif.pages[page]
        width, height, places = page.imagewidth, page.imagelength, page.dataoffsets
        counts = page.databytecounts
    across = -(-width // SIDE)
    with open(path, "rb") as file:
        for first in range(0, len(places), across):
            strip = np.zeros((SIDE, across * SIDE), np.uint8)
            for n in range(across):
                file.seek(places[first + n])
                content = file.read(counts[first + n])
                if content != EMPTY:
                    strip[:, n * SIDE:(n + 1) * SIDE] = np.frombuffer(
                        zlib.decompress(content), np.uint8).reshape(SIDE, SIDE)
            yield strip[:height - first // across * SIDE, :width]


def halve(strips):
    """Strips -> strips of the 2 x 2 means; at an odd edge, of what is there."""
    halves = (np.asarray(Image.fromarray(strip).reduce(2)) for strip in strips)
    for upper in halves:
        yield np.concatenate([upper, next(halves, upper[:0])])


def write_picture(path, slide, probability, rings, level):
    """The slide with outlines beside the probabilities, PICTURE px at most."""
    full = slide.levels[0]
    scale = max(full.width / (PICTURE // 2 - 4), full.height / PICTURE, 1)
    width, height = (max(1, int(side / scale)) for side in (full.width, full.height))
    fits = [k for k, lv in enumerate(slide.levels) if lv.width >= width]
    coarse = slide.levels[fits[-1]]
    step, rows = coarse.width // width, []
    high = step * max(1, SIDE // step)                  # in bands: without a pyramid it may be huge
    for y in range(0, coarse.height, high):
        band = slide.read(fits[-1], 0, y, coarse.width, min(high, coarse.height - y))
        rows.append(np.asarray(Image.fromarray(band).reduce(step)))
    view = Image.fromarray(np.concatenate(rows)).resize((width, height), Image.BOX)
    pen, scale = ImageDraw.Draw(view), width / slide.levels[level].width
    for ring in rings:
        xy = [tuple(point) for point in (ring.xy * scale).tolist()]
        pen.line([*xy, xy[0]], fill=(0, 130, 0) if ring.is_hole else (0, 220, 0), width=2)
    with tifffile.TiffFile(probability) as tif:
        page = max(k for k, page in enumerate(tif.pages) if not k or page.imagewidth >= width)
    low = np.concatenate(list(read_strips(probability, page)))
    picture = Image.new("RGB", (2 * width + 8, height), (128,) * 3)
    picture.paste(view, (0, 0))
    picture.paste(Image.fromarray(low).resize((width, height), Image.BOX), (width + 8, 0))
    with data.atomic(path, "wb") as file:
        picture.save(file, "PNG")


# -------------------------------------------------------------------------------------- one slide

def working_level(slide, args):
    """The level to predict, and its um/px: that of training where the file has none."""
    k = slide.nearest_level(args.mpp, args.level)
    return k, slide.mpp * slide.levels[k].downsample if slide.mpp else args.mpp


def predict_slide(model, path, out, args):
    """Write NAME_prob.tif, .png, .xml and a line of slides.csv into `out` -> that line, a dict.

    `args` has tile, mpp, level, image_frac, method of training; overlap, threshold, min_area,
    weights; device, amp, batch_size, workers. DataError where the slide cannot be read, or where a
    person has worked on NAME.xml.
    """
    start, path, out = time.time(), Path(path), Path(out)
    probability, png, xml = files(path, out)
    refuse_by_hand(xml)
    slide = data.Slide(path)
    k, mpp = working_level(slide, args)
    lv = slide.levels[k]
    if not slide.mpp:
        data.warn(f"{path}: um/px unknown, taken for the {mpp:g} of training at level {k}")
    if not 2 / 3 < mpp / args.mpp < 3 / 2:
        data.warn(f"{path}: the nearest level has {mpp:.2f} um/px, training had {args.mpp:g}")
    stride = max(1, round(args.tile * (1 - args.overlap)))
    share = data.tissue_share(slide, k, args.tile, stride)
    places = np.argwhere(share >= data.TISSUE_SHARE)[:, ::-1] * stride      # (n, 2) x, y, by rows
    score = 0.0

    def windows():
        nonlocal score
        for images, xs, ys in data.progress(torch.utils.data.DataLoader(
                Windows(slide, k, args.tile, places), args.batch_size, num_workers=args.workers,
                worker_init_fn=data.of_a_worker, pin_memory=args.device.type == "cuda"),
                path.name):
            p, cancer = probabilities(model, images, args)
            score = max(score, cancer.max().item())
            yield from zip(xs.tolist(), ys.tolist(), p.cpu().numpy())

    out.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError), open(out / "slides.csv", "x") as file:
        file.write(",".join(FIELDS) + "\n")     # long before any process has a line for it
    model.eval()
    with data.atomic(probability, "wb") as file:
        write_pyramid(file.name, blend(windows(), args.tile, lv.width, lv.height), lv.width,
                      lv.height, mpp)
        refuse_by_hand(xml)                     # it may have been corrected in the meantime
        xml.unlink(missing_ok=True)             # it comes last: where it is, all is of one time
    rings = outlines(probability, mpp, args)
    write_picture(png, slide, probability, rings, k)
    lesions = [ring for ring in rings if not ring.is_hole]
    area = sum(-ring.area if ring.is_hole else ring.area for ring in rings)
    row = dict(zip(FIELDS, (
        path.stem, path.stat().st_size, slide.levels[0].width, slide.levels[0].height, k,
        round(mpp, 4), len(places), round(time.time() - start, 2), round(area * mpp ** 2 / 1e6, 6),
        round(score, 4) if classifies(args) else "", len(lesions),
        round(outline.diameters(lesions).max(initial=0) * mpp / 1e3, 4),
        *(getattr(args, name) for name in DEFAULTS), args.amp, args.weights)))
    line = io.StringIO()
    csv.DictWriter(line, FIELDS, lineterminator="\n").writerow(row)
    with open(out / "slides.csv", "a", encoding="utf-8") as file:   # one write: others may append
        file.write(line.getvalue())
    data.write_annotation(xml, outline.to_polygons(rings, lv.downsample), data.PREDICTED)
    return row


def refuse_by_hand(xml):
    """DataError where a person has drawn or corrected the annotation."""
    if xml.exists() and not data.as_predicted(xml):
        raise data.DataError(f"{xml}: drawn or corrected by hand; move it, or choose another --out")


def files(path, out):
    """What a slide's prediction consists of."""
    return [Path(out, Path(path).stem + end) for end in ("_prob.tif", ".png", ".xml")]


def outlines(probability, mpp, args):
    """NAME_prob.tif -> rings around the pixels at --threshold, without specks."""
    strips = read_strips(probability, 0)
    return outline.trace((strip >= 255 * args.threshold for strip in strips),
                         args.min_area / mpp ** 2)


def describe(row):
    """A line of slides.csv in words."""
    score = "of an untrained branch, left out" if row["score"] == "" else row["score"]
    return (f"{row['slide']}: {row['width']} x {row['height']} px, level {row['level']}, "
            f"{row['um_per_px']:g} um/px, {row['tissue_tiles']} tissue tiles, "
            f"{row['seconds']:.1f} s; tumour {row['tumour_mm2']:.3f} mm^2, score {score}, "
            f"{row['lesions']} lesions, the largest {row['diameter_mm']:.2f} mm")


def finished(path, out, args):
    """None, or why not again: "" for a prediction that stands, else what was different for it."""
    table, rows = Path(out, "slides.csv"), []
    if table.exists() and all(file.exists() for file in files(path, out)):
        with open(table, encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["slide"] == Path(path).stem]
    if not rows:
        return None
    now = {name: getattr(args, name) for name in (*DEFAULTS, "amp", "weights")}
    now |= {"bytes": Path(path).stat().st_size, "level": working_level(data.Slide(path), args)[0]}
    return ", ".join(f"{name} {rows[-1][name]}, not {value}" for name, value in now.items()
                     if rows[-1][name] != str(value))


def main(argv=None):
    number = data.number
    parser = argparse.ArgumentParser(description=__doc__, usage="predict.py --ckpt F SLIDE...",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("slides", nargs="+", metavar="SLIDE", help="a .tif, .tiff or .svs")
    add("--ckpt", required=True, help="last.pt of a run of train.py")
    add("--out", help="folder (default: predictions, beside the checkpoint)")
    add("--overlap", type=number(float, 0, 0.9), help="of windows, as a share of their side; 0 "
        "needs a quarter of the windows of 0.5, but leaves seams (default 0.5)")
    add("--threshold", type=number(float, 0.002, 1), help="probability from which a pixel is "
        "tumour (default 0.5)")
    add("--min-area", type=number(float, 0), help="um^2; smaller lesions and holes are left out "
        "(default 200, a cell)")
    add("--level", type=number(int, 0), help="level to read where a file does not tell its um/px")
    add("--overwrite", action="store_true", help="redo slides that are done")
    add("--batch-size", type=number(int, 1), default=8, help="windows at a time (default 8)")
    add("--workers", type=number(int, 0), help="processes that read windows (default: as in "
        "training)")
    add("--device", type=usable, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--amp", action="store_true", help="bfloat16 autocast")
    given = parser.parse_args(argv)
    model, args, _ = load(given.ckpt, given)
    out = Path(given.out or Path(given.ckpt).parent / "predictions")
    # slides/*.tif also finds what an earlier call has put beside the slides.
    args.slides = [path for path in map(Path, args.slides)
                   if not path.stem.endswith(data.NO_SLIDES)]
    if not args.slides:
        raise data.DataError(f"{given.slides[0]}: masks or predictions alone; give the slides")
    twice = [stem for stem, n in Counter(path.stem for path in args.slides).items() if n > 1]
    if twice:
        raise data.DataError(f"{twice[0]}: two slides of that name; give each an --out of its own")
    failed = 0
    for path in args.slides:
        try:
            other = None if args.overwrite else finished(path, out, args)
            if other:
                raise data.DataError(f"{path}: done with {other}; --overwrite to redo it, or "
                                     "another --out")
            if other == "":
                print(f"{path}: done before; --overwrite to redo it", flush=True)
                continue
            print(describe(predict_slide(model, path, out, args)), flush=True)
        except Exception as error:      # whatever it is, the other slides shall finish
            failed, line = failed + 1, data.one_line(error)
            if not isinstance(error, (data.DataError, OSError)):
                line = f"{type(error).__name__}: {line}"
            print(f"error: {line if str(path) in line else f'{path}: {line}'}", file=sys.stderr)
    if failed:
        print(f"{failed} of {len(args.slides)} slides failed", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    data.run(main)
