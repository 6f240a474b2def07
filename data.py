"""Slides and annotations in, tiles out: slide -> tissue -> tile -> (image, mask, label).

    slide = Slide("tumor_001.tif")                              # a tiled JPEG pyramid TIFF
    image = slide.read(1, x=0, y=0, w=512, h=512)               # level 1: (512, 512, 3) uint8
    outlines = read_annotation("tumor_001.xml")                 # ASAP polygons
    mask = outlines.mask(0, 0, 512, 512, downsample=2)          # (512, 512) uint8, 1 = tumour

Annotations and tiles.csv are in level-0 pixels, `Slide.read` and masks in pixels of the level read.
tifffile gives the index of a file, Pillow decodes its JPEG tiles; nothing else touches the pixels.
"""
import argparse
import contextlib
import csv
import ctypes
import functools
import hashlib
import io
import itertools
import logging
import math
import os
import re
import signal
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile
import torch
from PIL import Image

# Deviation: the paper names CAMELYON17; here its slides are taken for CAMELYON16's training set and
# both releases are read, because 210 slides, 110 with tumour, from two hospitals are that set.
TUMOUR_GROUPS = {"_0", "_1", "tumor", "metastases"}     # CAMELYON16, its test set, CAMELYON17
EXCLUSION_GROUPS = {"_2", "exclusion", "normal"}
AREA_TYPES = {"Polygon", "Spline", "Rectangle"}         # not Dot, PointSet, None (rulers)
NO_SLIDES = "_mask", "_prob"             # ends of stems: CAMELYON16's masks, predictions
# First line of an annotation by predict.py. ASAP does not keep it: a person has saved the others.
PREDICTED = "<!-- predicted, not looked at yet -->"
TISSUE_DOWNSAMPLE = 32      # tissue is found on the coarsest level up to this, about 8 um/px
TISSUE_SHARE = 0.1          # a tile with less tissue is dropped
MAX_TILE = 2048             # px, the side of a TIFF's tile: a damaged file may say anything
TEST_SHARE = 20 / 110       # the paper holds out 20 of 110 slides
CANCER, NORMAL, BETWEEN = 1, 0, -1                      # image labels; BETWEEN is used for none
LABELS = {CANCER: "cancer", NORMAL: "normal", BETWEEN: "between"}
# CAMELYON16 slides on which not every metastasis is outlined, as its authors list them.
NOT_EXHAUSTIVE = {f"tumor_{n:03}" for n in (10, 15, 18, 20, 25, 29, 33, 34, 44, 46, 51, 54, 55, 56,
                                            67, 79, 85, 92, 95, 110)} | {"test_114"}

logging.getLogger("tifffile").setLevel(logging.CRITICAL)        # what it would log, Slide raises
# glibc hands freed blocks back to the system, and the page faults of getting them again cost as
# much as decoding a tile. Freeing one large block raises that limit: 1.8 -> 0.9 ms per 512 px tile.
np.empty(1 << 24, np.uint8)


class DataError(Exception):
    """Bad input, said in one line: the file, what was found, the cure."""


def run(main):
    """Call `main`; bad input, or a file that cannot be used, ends it with one line and status 2.

    So does an interruption, with status 130 and what there is to say of it.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")   # names that a terminal cannot show
    # glibc gives large blocks back to the system at once, and a step on a CPU spends half its time
    # on getting them again: of 512 px tiles, 29 -> 16 s. Elsewhere than on glibc nothing is done.
    if mallopt := getattr(ctypes.CDLL(None) if os.name == "posix" else None, "mallopt", None):
        mallopt(-4, 0)                                      # M_MMAP_MAX
        mallopt(-1, -1)                                     # M_TRIM_THRESHOLD: never
    try:
        main()
    except (DataError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        said = str(stop) or "what was written is complete; the same command goes on, or says how"
        print("\r\033[K" * sys.stderr.isatty() + f"interrupted; {said}", file=sys.stderr)
        sys.exit(130)


def one_line(error):
    """What a DataError or OSError says; of a worker, it is the last line of a traceback."""
    return str(error).strip().split("\n")[-1].removeprefix("data.DataError: ")


def number(kind, low, high=math.inf, multiple=None):
    """The type of a flag: an int or a float (`kind`) in [low, high]."""
    def check(text):
        value = kind(text)
        if not low <= value <= high or multiple and value % multiple:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high}]" + (
                f" or not a multiple of {multiple}" if multiple else ""))
        return value
    check.__name__ = kind.__name__              # argparse says "invalid float value"
    return check


def warn(message):
    print(f"warning: {message}", file=sys.stderr)


@contextlib.contextmanager
def atomic(path, mode):
    """Open a temporary file that takes the name `path` once it is written in full, and on disk."""
    part = Path(f"{path}.part")
    try:
        with part.open(mode, encoding="utf-8" if mode == "w" else None) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def progress(items, what, total=None):
    """Yield from `items` with a line of rate and time left on a terminal; quiet elsewhere."""
    total, start, shown = len(items) if total is None else total, time.time(), 0.0
    for n, item in enumerate(items, 1):
        yield item
        now = time.time()
        if sys.stderr.isatty() and (now - shown > 0.2 or n == total):
            shown, rate = now, n / (now - start + 1e-9)
            print(f"\r{what} {n}/{total}  {rate:.1f}/s  {(total - n) / rate:.0f} s left \033[K",
                  end="\n" if n == total else "", file=sys.stderr, flush=True)


def of_a_worker(_):
    """worker_init_fn of the loaders: where a job is interrupted, its workers end without a word."""
    # Schedulers send SIGTERM to all; a worker that it kills, not one that exits, has torch raise.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    # multiprocessing reports, from a thread, the batch at hand that nobody takes any more.
    sys.excepthook = lambda kind, *error: (
        issubclass(kind, (OSError, EOFError)) or sys.__excepthook__(kind, *error))


# ------------------------------------------------------------------------------------------- slide

class Level(NamedTuple):
    """One resolution of a slide: its size in pixels, and where its JPEG tiles lie in the file."""
    width: int
    height: int
    downsample: int             # level-0 pixels per pixel of this level, a power of two
    tile_w: int
    tile_h: int
    offsets: np.ndarray         # (tiles,) bytes, row by row
    counts: np.ndarray          # (tiles,) bytes; 0 = an absent tile, which is background
    tables: bytes               # the JPEG tables that all tiles share
    space: str                  # colour space of the JPEG, from the TIFF's photometric tag


class Slide:
    """A tiled JPEG pyramid TIFF. Only its index is held: it pickles, and workers share no handle.

    `levels` is finest first; `mpp` is um per level-0 pixel, or None where the file does not tell.
    Raises DataError where the file is unreadable, truncated, striped or not 8-bit RGB JPEG, and
    when a tile is read after the file has changed.
    """

    def __init__(self, path):
        self.path = str(path)
        try:
            self.path.encode()          # it will stand in tables
            self.stamp = stamp(os.stat(path))
            # Closed at once: a TiffFile opened before a fork gives wrong tiles in the workers.
            with tifffile.TiffFile(self.path) as tif:
                # Not `for page in tif.pages`, which never ends on a cyclic chain of pages.
                pages = [tif.pages[k] for k in range(len(tif.pages))]
                tif.filehandle.seek(tif.pages.next_page_offset)
                if any(tif.filehandle.read(tif.tiff.offsetsize)):       # 0 ends a whole chain
                    pages = []
                self.levels, self.mpp = self._levels(pages), self._mpp(pages)
        except DataError:
            raise
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the path"
                            ) from error
        except UnicodeEncodeError as error:
            raise DataError(f"{self.path!a}: its name is not UTF-8; rename it") from error
        except Exception as error:      # tifffile raises many types on damaged files
            raise DataError(f"{path}: not a readable TIFF ({error}); download or convert it again"
                            ) from error

    def _levels(self, pages):
        def fail(found, cure="convert it to a tiled JPEG pyramid TIFF"):
            raise DataError(f"{self.path}: {found}; {cure}")

        if not pages:
            fail("truncated, pages of its index are missing", "download it again")
        if not pages[0].is_tiled:
            fail("striped, not tiled")
        levels, end = [], os.path.getsize(self.path)
        width0, height0 = pages[0].imagewidth, pages[0].imagelength
        for page in pages:
            if not page.is_tiled:       # thumbnail, label, macro
                continue
            width, height = page.imagewidth, page.imagelength
            tile_w, tile_h = page.tilewidth, page.tilelength
            if not 0 < min(tile_w, tile_h, width, height):
                fail(f"{width} x {height} px in tiles of {tile_w} x {tile_h}")
            down = 2 ** round(math.log2(width0 / width))
            if "DPUfsImport" in (pages[0].description or ""):
                # Philips pads every level to whole tiles: the ratio of two widths means nothing.
                down = 2 ** len(levels)
                width, height = width0 // down, height0 // down
            elif max(abs(width * down - width0), abs(height * down - height0)) >= 2 * down:
                continue                # a tiled label or macro
            if max(tile_w, tile_h) > MAX_TILE:
                fail(f"tiles of {tile_w} x {tile_h} px")
            if page.compression != 7:
                fail(f"compression is {getattr(page.compression, 'name', page.compression)}")
            if (page.samplesperpixel, page.bitspersample, page.planarconfig) != (3, 8, 1):
                fail(f"{page.samplesperpixel} samples of {page.bitspersample} bits, not RGB")
            if page.photometric not in (2, 6):
                fail(f"colour is {page.photometric}, not RGB or YCbCr")
            offsets, counts = (np.fromiter(numbers, np.int64, len(numbers))
                               for numbers in (page.dataoffsets, page.databytecounts))
            if not len(offsets) == len(counts) >= -(-width // tile_w) * -(-height // tile_h):
                fail(f"only {len(offsets)} tiles listed", "download it again")
            beyond = (offsets + counts > end) & (counts > 0)            # absent tiles lie nowhere
            if beyond.any() or min(offsets.min(), counts.min()) < 0:
                fail("truncated, tiles lie beyond its end", "download it again")
            levels.append(Level(width, height, down, tile_w, tile_h, offsets, counts,
                                page.jpegtables or b"",
                                "RGB" if page.photometric == 2 else "YCbCr"))
        return levels

    @staticmethod
    def _mpp(pages):
        text, tags = pages[0].description or "", pages[0].tags
        unit, resolution = tags.get("ResolutionUnit"), tags.get("XResolution")
        um = {2: 25400, 3: 10000}.get(unit and int(unit.value))
        if aperio := re.search(r"MPP = (\d+\.?\d*)", text):
            mpp = float(aperio[1])
        elif philips := re.search(r'"DICOM_PIXEL_SPACING"[^>]*>\D*(\d+\.?\d*)', text):
            mpp = 1000 * float(philips[1])
        elif um and resolution and 0 not in resolution.value:
            mpp = um * resolution.value[1] / resolution.value[0]
        else:
            return None
        return mpp if 0.05 < mpp < 20 else None         # 72 dpi and the like are placeholders

    def nearest_level(self, mpp, fallback=None):
        """The level nearest to `mpp` um/px, or `fallback` where the file has no resolution."""
        if self.mpp is None:
            if fallback is None:
                raise DataError(f"{self.path}: no resolution in the file; say which with --level")
            if not 0 <= fallback < len(self.levels):
                raise DataError(f"{self.path}: --level {fallback}, it has {len(self.levels)}")
            return fallback
        return min(range(len(self.levels)),
                   key=lambda k: abs(math.log(self.mpp * self.levels[k].downsample / mpp)))

    def read(self, level, x, y, w, h):
        """Region (x, y, w, h), in px of `level` -> (h, w, 3) uint8 RGB, white beyond the edge."""
        lv = self.levels[level]
        across = -(-lv.width // lv.tile_w)
        x1, y1 = min(x + w, lv.width), min(y + h, lv.height)
        region = Image.new("RGB", (w, h), "white")
        with open(self.path, "rb", buffering=0) as file:    # 10 us, and safe in any process
            if stamp(os.fstat(file.fileno())) != self.stamp:
                raise DataError(f"{self.path}: changed since it was opened; start again")
            for row in range(max(y, 0) // lv.tile_h, -(-y1 // lv.tile_h)):
                for col in range(max(x, 0) // lv.tile_w, -(-x1 // lv.tile_w)):
                    if lv.counts[row * across + col]:
                        region.paste(self._tile(file, lv, row * across + col),
                                     (col * lv.tile_w - x, row * lv.tile_h - y))
        region = np.array(region)
        region[max(y1 - y, 0):] = region[:, max(x1 - x, 0):] = 255      # tiles reach over the edge
        return region

    def _tile(self, file, lv, n):
        """Tile `n` of a level, which is not absent, as an RGB picture."""
        file.seek(lv.offsets[n])
        data = file.read(lv.counts[n])
        try:
            image = Image.open(io.BytesIO(lv.tables + data), formats=("JPEG",))
            if (image.size, image.mode) != ((lv.tile_w, lv.tile_h), "RGB"):
                raise OSError(f"a {image.mode} picture of {image.size}")
            # libjpeg guesses YCbCr for Aperio's RGB tiles without an APP14 marker: the tag knows.
            image.tile = [image.tile[0]._replace(args=("RGB", lv.space))]
            image.load()
            return image
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{self.path}: tile {n} at 1/{lv.downsample} is damaged ({error}); "
                            "compare the file with the data set's checksums.md5") from error


def stamp(stat):
    """What tells that a file is another one, or was written to."""
    return stat.st_size, stat.st_mtime_ns


def tissue_share(slide, level, tile, stride=None):
    """Share of tissue in the squares of `tile` px of `level`, one every `stride`: (rows, columns).

    They lie side by side where no `stride` is given; the last ones may reach over the edge. Tissue
    is chroma (max - min of RGB) above Otsu's threshold, held in [8, 30]: below, an empty slide
    turns into tissue; above, one without background is split in two kinds of tissue.
    """
    # Deviation: the paper does not say how tiles were found; here tissue by chroma, because
    # HSV saturation breaks on near-black noise and a fixed value breaks across centres.
    fine = slide.levels[level]
    coarsest = min(TISSUE_DOWNSAMPLE, max(1, tile * fine.downsample // 8))      # tiles stay 8 px
    k = max(n for n, lv in enumerate(slide.levels) if lv.downsample <= coarsest)
    low = slide.levels[k]
    # A file without a pyramid may be huge here: read it by TIFF tile, keep every step-th pixel.
    step = next(step for step in itertools.count(max(1, math.isqrt(low.width * low.height >> 24)))
                if -(-low.height // step) * -(-low.width // step) <= 1 << 24)
    chroma = np.zeros((-(-low.height // step), -(-low.width // step)), np.uint8)
    across = -(-low.width // low.tile_w)
    for n in np.flatnonzero(low.counts[:across * -(-low.height // low.tile_h)]).tolist():
        y, x = n // across * low.tile_h, n % across * low.tile_w
        w, h = min(low.tile_w, low.width - x), min(low.tile_h, low.height - y)
        colours = slide.read(k, x, y, w, h)[-y % step::step, -x % step::step].transpose(2, 0, 1)
        if colours.size:
            chroma[-(-y // step):-(-(y + h) // step), -(-x // step):-(-(x + w) // step)] = (
                colours.max(0) - colours.min(0))
    mask = chroma > np.clip(otsu(chroma), 8, 30)
    total = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.int32)          # integral image
    mask.cumsum(0, out=total[1:, 1:]).cumsum(1, out=total[1:, 1:])
    scale = fine.downsample / (low.downsample * step)               # mask pixels per pixel of level
    stride = stride or tile
    for axis, size in enumerate((fine.height, fine.width)):
        first = stride * np.arange(1 - (tile - size) // stride if size > tile else 1)
        first, last = (np.minimum(np.round(edge * scale).astype(int), mask.shape[axis])
                       for edge in (first, first + tile))
        total = total.take(last, axis) - total.take(first, axis)
    return total / (tile * scale) ** 2


def otsu(values):
    """Otsu's threshold of a uint8 array: the value that best splits it in two, <= it and > it."""
    count = np.bincount(values.ravel(), minlength=256).astype(float)
    below, moment = count.cumsum(), (count * np.arange(256)).cumsum()
    spread = (moment[-1] * below - moment * below[-1]) ** 2 / np.maximum(
        below * (below[-1] - below), 1)
    return int(spread.argmax())


# -------------------------------------------------------------------------------------- annotation

class Annotation:
    """Outlines of a slide: `polygons` [(xy, is_tumour)], xy (n, 2) float in level-0 pixels."""

    def __init__(self, polygons=()):
        # Tumour first, then exclusions are cleared: file order gives +4.6 % tumour on test_113.
        self.polygons = sorted(polygons, key=lambda polygon: not polygon[1])
        self.boxes = np.array([(*xy.min(0), *xy.max(0)) for xy, _ in self.polygons]).reshape(-1, 4)

    def mask(self, x, y, w, h, downsample=1):
        """The w x h px at (x, y) of the level `downsample` -> (h, w) uint8, 1 where tumour."""
        boxes = (self.boxes + 0.5) / downsample - 0.5 - (x, y, x, y)
        boxes = np.clip(np.ceil(boxes), 0, (w, h, w, h)).astype(int)
        mask = np.zeros((h, w), np.uint8)
        for n in np.flatnonzero((boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3])):
            (a, b, c, d), (xy, is_tumour) = boxes[n], self.polygons[n]
            inside = winding((xy + 0.5) / downsample - 0.5 - (x + a, y + b), c - a, d - b) != 0
            mask[b:d, a:c][inside] = is_tumour
        return mask


def winding(xy, w, h):
    """Winding number of the closed ring `xy` (n, 2) at the integer points of w x h: (h, w) int.

    ASAP's rule: an edge counts for the points to its left, +1 where y grows along it, -1 where it
    falls. A ring crosses a row as often down as up, so what lies to the left of x, with the other
    sign, is what lies to its right: one entry per crossing and a sum along x, not n * w * h tests.
    """
    x1, y1 = xy.T
    x2, y2 = np.roll(xy, -1, axis=0).T
    top, bottom = (np.clip(np.ceil(f(y1, y2)), 0, h).astype(int) for f in (np.minimum, np.maximum))
    rows = bottom - top                             # how many the edge crosses inside the tile
    edge = np.repeat(np.arange(len(xy)), rows)
    y = np.arange(len(edge)) - np.repeat(rows.cumsum() - rows, rows) + top[edge]
    x = x1[edge] + (y - y1[edge]) * (x2 - x1)[edge] / (y2 - y1)[edge]
    x = np.clip(np.ceil(x), 0, w).astype(int)
    turns = np.bincount(y * (w + 1) + x, np.where(y2 > y1, -1, 1)[edge], h * (w + 1))
    return turns.reshape(h, w + 1)[:, :w].astype(np.int32).cumsum(1, np.int32)


def read_annotation(path):
    """ASAP XML -> Annotation. DataError for broken XML, odd coordinates, unknown groups."""
    polygons = []
    try:
        root = ElementTree.parse(path).getroot()
        if root.tag != "ASAP_Annotations":
            raise ValueError(f"its root is {root.tag}")
        for node in root.iter("Annotation"):
            group, kind = node.get("PartOfGroup", "None").strip().lower(), node.get("Type")
            points = node.iterfind("Coordinates/Coordinate")    # iter: n^2 where they are nested
            xy = np.array([(float(p.get("X")), float(p.get("Y"))) for p in points]).reshape(-1, 2)
            if not (np.abs(xy) < 1e7).all():                    # False for nan too
                raise ValueError(f"coordinates of {node.get('Name')!r} are not finite pixels")
            if group == "none" or kind not in AREA_TYPES or len(xy) < 3:
                continue
            if group not in TUMOUR_GROUPS | EXCLUSION_GROUPS:
                raise ValueError(f"group {group!r} is neither tumour nor exclusion")
            polygons.append((xy, group in TUMOUR_GROUPS))
    except (ElementTree.ParseError, LookupError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not a usable ASAP annotation ({error}); mend or remove it"
                        ) from error
    return Annotation(polygons)


def write_annotation(path, polygons, comment=""):
    """[(xy, is_tumour)] -> ASAP XML, groups `metastases` and `normal` as in CAMELYON17."""
    groups = {True: "metastases", False: "normal"}
    with atomic(path, "w") as file:
        write = functools.partial(print, file=file)
        write(f'<?xml version="1.0"?>{comment}\n<ASAP_Annotations>\n<Annotations>')
        for n, (xy, is_tumour) in enumerate(polygons):
            write(f'<Annotation Name="{n}" Type="Polygon" PartOfGroup="{groups[is_tumour]}" '
                  'Color="#F4FA58">\n<Coordinates>')
            for k, (x, y) in enumerate(xy.tolist()):
                write(f'<Coordinate Order="{k}" X="{x}" Y="{y}" />')
            write("</Coordinates>\n</Annotation>")
        write("</Annotations>\n<AnnotationGroups>")
        for name, colour in zip(groups.values(), ("#ff0000", "#00ff00")):
            write(f'<Group Name="{name}" PartOfGroup="None" Color="{colour}">'
                  '<Attributes /></Group>')
        write("</AnnotationGroups>\n</ASAP_Annotations>")


def as_predicted(xml):
    """Whether an annotation is just as predict.py wrote it."""
    with open(xml, errors="replace") as file:
        return PREDICTED in file.readline(200)


# ------------------------------------------------------------------------ slides, tiles, fractions

class Source(NamedTuple):
    """A slide to use: `name` is its path below the data folder, `xml` is None without tumour."""
    name: str
    path: Path
    xml: Path | None
    split: str                  # "train" or "test"


def find_slides(root, seed=0, unlabelled_is_normal=False):
    """Slides below `root` with annotation and split -> [Source]; warns of those left out."""
    root = Path(root)
    files = sorted(Path(folder, name) for folder, _, names in os.walk(root, followlinks=True)
                   for name in names if name[0] != ".")
    slides = [f for f in files if f.suffix.lower() in (".tif", ".tiff", ".svs")
              and not f.stem.endswith(NO_SLIDES)]
    if not slides:
        raise DataError(f"{root}: no .tif, .tiff or .svs slides; give the folder that holds them")
    given = (root / "train").is_dir() and (root / "test").is_dir()
    stages = [f for f in files if f.name in ("stage_labels.csv", "stages.csv")]
    lines = [line for f in stages for line in f.read_text(errors="replace").splitlines()]
    normal = {row[0].rsplit(".", 1)[0] for row in csv.reader(lines) if row[1:2] == ["negative"]}
    outlines = {}
    for f in files:
        if f.suffix.lower() == ".xml":
            outlines.setdefault(f.stem.lower(), []).append(f)
    sources, left_out = [], []
    for path in slides:
        name = path.relative_to(root).as_posix()
        xmls = outlines.get(path.stem.lower(), [])
        xmls = [f for f in xmls if not as_predicted(f)] or xmls
        xmls = [f for f in xmls if f.parent == path.parent] or xmls
        if len(xmls) > 1:
            raise DataError(f"{path}: two annotations, {xmls[0]} and {xmls[1]}; keep one")
        split = name.split("/")[0] if given else ""
        known = (xmls or unlabelled_is_normal or path.stem in normal
                 or path.stem.lower().startswith("normal"))
        if known and split in ("", "train", "test"):
            sources.append(Source(name, path, xmls[0] if xmls else None, split))
        else:
            left_out.append(name)
    if left_out:
        warn(f"{len(left_out)} slides left out, not annotated nor known to be normal (take them "
             f"with --unlabelled-is-normal) or outside train/ and test/: {', '.join(left_out)}")
    unseen = [s.xml.name for s in sources if s.xml and as_predicted(s.xml)]
    if unseen:
        warn("predicted, and nobody has saved them since; look at them in ASAP, or remove them: "
             + ", ".join(unseen))
    partly = [s.name for s in sources if s.path.stem.lower() in NOT_EXHAUSTIVE]
    if partly:
        warn(f"'normal' tiles may be tumour, not all is outlined on {', '.join(partly)}")
    sources = sources if given else seeded_split(sources, seed)
    train, test = ({group(s) for s in sources if s.split == split} for split in ("train", "test"))
    if train & test:                    # only where the folders say so
        warn(f"both in train/ and in test/: {', '.join(sorted(train & test))}")
    return sources


def group(source):
    """What stays on one side of the split: the patient where the name tells, else the slide."""
    patient = re.search(r"patient_\d+(?=_node_\d+)", source.path.stem.lower())
    return patient[0] if patient else source.path.stem.lower()


def seeded_split(sources, seed):
    """Hold out 20 of 110 slides, with and without tumour alike, a patient's on one side."""
    # Deviation: the paper holds out 20 tumour slides, not named; here 20 in 110, drawn with the
    # seed, by patient where names tell, because slides of one patient are alike.
    tumour = {group(s) for s in sources if s.xml}
    test, rng = set(), np.random.default_rng((seed, 0))
    for groups in (tumour, {group(s) for s in sources} - tumour):
        count = max(1, round(len(groups) * TEST_SHARE)) if len(groups) > 1 else 0
        test.update(rng.permutation(sorted(groups))[:count].tolist())
    return [s._replace(split="test" if group(s) in test else "train") for s in sources]


TILE = np.dtype([("slide", int), ("x", int), ("y", int), ("level", int),    # level-0 pixels
                 ("train", bool), ("tumour", float), ("label", int),        # share of pixels
                 ("pixel", bool), ("image", bool)])                         # labels training uses


class Index(NamedTuple):
    """All tissue tiles of all slides."""
    sources: list               # of Source, and for each its
    slides: list                # Slide,
    annotations: list           # Annotation
    dropped: list               # and squares without tissue: (how many, of them with tumour)
    tile: int                   # side in pixels of the level
    tiles: np.ndarray           # (tiles,) TILE
    key: str                    # changes with slides, annotations, split, arguments, this file

    def fingerprint(self):
        """Changes when the size of a slide, an annotation, a tile or a label used does."""
        files = repr([(source.name, source.path.stat().st_size, source.xml and
                       source.xml.read_bytes()) for source in self.sources])
        return hashlib.sha256(files.encode() + self.tiles.tobytes()).hexdigest()


def index_tiles(sources, tile=512, mpp=0.5, level=None, cancer_share=0.05, cache=None):
    """Open every slide and lay a grid of `tile` px at `mpp` um/px over its tissue -> Index.

    `cache` is of `write_index`; its tiles are taken if all that they depend on is the same.
    """
    slides = [Slide(source.path) for source in progress(sources, "slides")]
    annotations = [read_annotation(s.xml) if s.xml else Annotation() for s in sources]
    levels = [slide.nearest_level(mpp, level) for slide in slides]
    far = [slide.path for slide, k in zip(slides, levels) if slide.mpp
           and not 2 / 3 < slide.mpp * slide.levels[k].downsample / mpp < 3 / 2]
    if far:
        warn(f"the nearest level is far from {mpp} um/px on {len(far)} slides: {', '.join(far)}")
    files = [(source.name, source.split, slide.stamp, source.xml and stamp(source.xml.stat()))
             for source, slide in zip(sources, slides)]
    key = repr((files, tile, mpp, level, cancer_share)).encode() + Path(__file__).read_bytes()
    key = hashlib.sha256(key).hexdigest()
    dropped, tiles = read_index(cache, key) or ([], [])
    if not dropped:
        for n, k in enumerate(progress(levels, "tissue")):
            of_slide, lost = tiles_of(slides[n], annotations[n], k, tile, cancer_share)
            dropped.append(lost)
            tiles += [(n, x, y, k, sources[n].split == "train", tumour, label, 0, 0)
                      for x, y, tumour, label in of_slide]
    return Index(sources, slides, annotations, dropped, tile, np.array(tiles, TILE), key)


def tiles_of(slide, annotation, level, tile, cancer_share):
    """[(x, y, tumour share, label)] of the squares with tissue, x and y in level-0 pixels; of the
    others how many there are, and how many have tumour."""
    # Deviation: the paper gives no rule for a tile's label; here cancer above 5 % tumour pixels,
    # normal at none, and no label between, because those tiles are neither.
    down, tiles, lost = slide.levels[level].downsample, [], 0
    # From (0, 0), so that tiles of 512 or 256 px are aligned with the TIFF's: 3 x less CPU.
    tissue = tissue_share(slide, level, tile)
    outlined = np.zeros(tissue.shape, bool)         # or nearly: masks elsewhere are empty
    for x0, y0, x1, y1 in (annotation.boxes / (down * tile)).clip(0).tolist():
        outlined[int(y0):int(y1) + 2, int(x0):int(x1) + 2] = True
    for row, col in np.argwhere((tissue >= TISSUE_SHARE) | outlined).tolist():
        x, y, tumour = col * tile, row * tile, 0.0
        if outlined[row, col]:
            tumour = float(annotation.mask(x, y, tile, tile, down).mean())
        if tissue[row, col] < TISSUE_SHARE:
            lost += tumour > 0
            continue
        label = CANCER if tumour > cancer_share else BETWEEN if tumour > 0 else NORMAL
        tiles.append((x * down, y * down, tumour, label))
    return tiles, (tissue.size - len(tiles), lost)


def write_index(index, path):
    """What takes long to find of an Index, for `index_tiles`, as a NumPy archive."""
    with atomic(path, "wb") as file:
        np.savez(file, key=index.key, dropped=index.dropped, tiles=index.tiles)


def read_index(path, key):
    """`write_index` undone -> dropped, tiles; None where there is no file or another key."""
    if path is None or not Path(path).exists():
        return None
    try:
        with np.load(path) as saved:
            if saved["key"] == key:
                return saved["dropped"].tolist(), saved["tiles"].astype(TILE)
    except Exception as error:          # numpy raises many types on files that are not its own
        raise DataError(f"{path}: not an index of tiles ({error}); remove it") from error


def choose_labels(index, pixel_frac, image_frac, label_unit="tile", normal_per_cancer=1.0, seed=0):
    """Set tiles["pixel"], tiles["image"]: whose mask, whose image label training may use.

    Returns the training pool, rows of tiles that 100 % stands for. DataError if a class is missing.
    """
    tiles = index.tiles
    tiles["pixel"] = tiles["image"] = False
    train, label = tiles["train"], tiles["label"]
    for split, rows, kind in (("training", train, CANCER), ("training", train, NORMAL),
                              ("test", ~train, CANCER)):
        if not (rows & (label == kind)).any():
            raise DataError(f"no {LABELS[kind]} tile among {rows.sum()} {split} tiles of "
                            f"{index.tile} px; change --tile, --mpp, --level or --data")
    # Deviation: the paper does not say which normal tiles it takes; here all tiles with tumour and
    # as many normal ones as cancer, drawn with the seed, because tumour is rare.
    normal = np.random.default_rng((seed, 1)).permutation(np.flatnonzero(train & (label == NORMAL)))
    count = math.ceil((train & (label == CANCER)).sum() * normal_per_cancer)
    pool = np.sort(np.r_[np.flatnonzero(train & (label != NORMAL)), normal[:count]])
    # Deviation: the paper's 0 % row scores .596 with nothing to learn from; here 0 % of the masks
    # keeps one tile of each class, as its reference [20] does. 0 % of the image labels is none.
    tiles["pixel"][nested(tiles, pool, label_unit, pixel_frac, (seed, 2))] = True
    if image_frac > 0:
        known = pool[label[pool] != BETWEEN]
        tiles["image"][nested(tiles, known, "tile", image_frac, (seed, 3))] = True
    return pool


def nested(tiles, rows, unit, fraction, seed):
    """Those of `rows` whose label may be used: a share of the units, "tile" or "slide".

    A unit's score in (0, 1) depends on the seed alone and is compared with the fraction, so 10 % is
    inside 20 %. Units with and without cancer are ranked apart, so both keep their share, and the
    first tile of each class is always used.
    """
    # Deviation: the paper gives masks to a share of the tiles; here, on demand, to all tiles of a
    # share of the slides, because a pathologist outlines slides.
    label = tiles["label"][rows]
    units = rows if unit == "tile" else tiles["slide"][rows]
    with_cancer = np.isin(units, units[label == CANCER])
    rng, score = np.random.default_rng(seed), np.empty(len(rows))
    for kind in (with_cancer, ~with_cancer):
        names, which = np.unique(units[kind], return_inverse=True)
        score[kind] = ((rng.permutation(len(names)) + 0.5) / max(len(names), 1))[which]
    used = score < fraction
    for value in (CANCER, NORMAL):
        used[np.where(label == value, score, np.inf).argmin()] = True
    return rows[used]


def describe(index):
    """Lines to print: per split slides, tiles, labels and resolution."""
    for split in ("train", "test"):
        slides = [n for n, source in enumerate(index.sources) if source.split == split]
        t = index.tiles[index.tiles["train"] == (split == "train")]
        kinds = ", ".join(f"{(t['label'] == value).sum()} {name}" for value, name in LABELS.items())
        scales = sorted({f"level {k}, " + (f"{mpp * index.slides[n].levels[k].downsample:.2f} um/px"
                                           if (mpp := index.slides[n].mpp) else "um/px unknown")
                         for n, k in t[["slide", "level"]].tolist()})
        empty, lost = np.sum([index.dropped[n] for n in slides], axis=0)
        yield (f"{split}: {len(slides)} slides; {'; '.join(scales)}; {len(t)} tiles kept, {empty} "
               f"without tissue dropped ({lost} with outlined tumour); {kinds}; "
               f"{t['pixel'].sum()} with pixel labels, {t['image'].sum()} with image labels")


def write_tiles(index, path):
    """tiles.csv: what every tile is, which of its labels training used; x, y in level-0 pixels."""
    with atomic(path, "w") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["slide", "x", "y", "level", "split", "tumour_share", "image_label",
                      "pixel_label_used", "image_label_used"])
        for slide, x, y, level, train, tumour, label, *used in index.tiles.tolist():
            out.writerow([index.sources[slide].name, x, y, level, "train" if train else "test",
                          f"{tumour:.6f}", LABELS[label], *map(int, used)])


class Tiles(torch.utils.data.Dataset):
    """Rows of an Index as image (3, T, T) uint8, mask (T, T) uint8, label, row.

    Key (position, row): with a random flip and quarter turn, a function of (seed, position, row).
    Key row: as it is. uint8 leaves the workers: float32 would cost them up to twice the CPU.
    """

    def __init__(self, index, seed=0):
        self.index, self.seed = index, seed

    def __getitem__(self, key):
        position, row = key if isinstance(key, tuple) else (None, key)
        n, x, y, level, _, _, label, _, _ = self.index.tiles[row].item()
        slide, side = self.index.slides[n], self.index.tile
        down = slide.levels[level].downsample
        image = slide.read(level, x // down, y // down, side, side)
        mask = self.index.annotations[n].mask(x // down, y // down, side, side, down)
        if position is not None:
            # Deviation: the paper names no augmentation; here flips and quarter turns, because
            # tissue has no up or down.
            random = np.random.default_rng((self.seed, 9, position, row))
            turns, flip = divmod(int(random.integers(8)), 2)
            image, mask = (np.rot90(a[:, ::-1] if flip else a, turns) for a in (image, mask))
        return (torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
                torch.from_numpy(np.ascontiguousarray(mask)), label, int(row))


class Batches:
    """Batch sampler: full batches of keys (position, row), those whose numbers are in `numbers`.

    They are a stretch of one endless sequence, pass after shuffled pass over `rows`: (seed,
    position) alone decides a batch, so a resumed run sees what an uninterrupted one would have.
    """

    def __init__(self, rows, batch_size, seed, numbers=()):
        self.rows, self.batch_size, self.seed, self.numbers = rows, batch_size, seed, numbers

    def __iter__(self):
        @functools.lru_cache(1)
        def shuffled(turn):
            return np.random.default_rng((*self.seed, turn)).permutation(self.rows)

        n = len(self.rows)
        for batch in self.numbers:
            positions = range(batch * self.batch_size, (batch + 1) * self.batch_size)
            yield [(p, int(shuffled(p // n)[p % n])) for p in positions]
