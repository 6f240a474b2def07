"""Slides and annotations in, tiles out: slide -> tissue -> tile -> (image, mask, label).

    slide = Slide("tumor_001.tif")                      # a tiled JPEG pyramid TIFF (CAMELYON, Aperio)
    image = slide.read(level=1, x=0, y=0, w=512, h=512)             # (512, 512, 3) uint8, absent = white
    mask = read_annotation("tumor_001.xml").mask(0, 0, 512, 512, downsample=2)     # (512, 512) uint8

Coordinates: annotations and tiles.csv are in level-0 pixels, `Slide.read` in pixels of the level read.
tifffile gives the index of a file, Pillow decodes its JPEG tiles; nothing else touches the pixels.
"""
import contextlib
import csv
import hashlib
import io
import logging
import math
import os
import re
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile
import torch
from PIL import Image

TUMOUR_GROUPS = {"_0", "_1", "tumor", "metastases"}             # CAMELYON16, its test set, CAMELYON17
EXCLUSION_GROUPS = {"_2", "exclusion", "normal"}
AREA_TYPES = {"Polygon", "Spline", "Rectangle"}                 # Dot, PointSet and None (rulers) have none
TISSUE_DOWNSAMPLE = 32          # tissue is found on the level nearest to this (level 5: 8 um/px)
TISSUE_SHARE = 0.1              # a tile is kept if at least this share of it is tissue
TEST_SHARE = 20 / 110           # of the slides; the paper holds out 20 of 110
CANCER, NORMAL, BETWEEN = 1, 0, -1                              # image labels; BETWEEN is not used
# CAMELYON16 slides on which not every metastasis is outlined, as its authors list them.
NOT_EXHAUSTIVE = {f"tumor_{n:03}" for n in (10, 15, 18, 20, 25, 29, 33, 34, 44, 46, 51, 54, 55, 56,
                                            67, 79, 85, 92, 95, 110)} | {"test_114"}

logging.getLogger("tifffile").setLevel(logging.CRITICAL)        # what it would log, Slide raises
# glibc hands freed blocks back to the system, and the page faults of getting them again cost as much
# as decoding a tile. Freeing one large block raises that limit: 1.8 -> 0.9 ms per 512 px tile.
np.empty(1 << 24, np.uint8)


class DataError(Exception):
    """Bad input, said in one line: the file, what was found, the cure."""


def run(main):
    """Call `main`; bad input ends it with one line and exit status 2."""
    try:
        main()
    except DataError as error:      # raised in a worker, it is the last line of a traceback
        print("error:", str(error).strip().splitlines()[-1].removeprefix("data.DataError: "), file=sys.stderr)
        sys.exit(2)


def warn(message):
    print(f"warning: {message}", file=sys.stderr)


def progress(items, what, total=None):
    """Yield from `items` with a line of rate and time left on a terminal; quiet elsewhere."""
    total, start, shown = total or len(items), time.time(), 0.0
    for n, item in enumerate(items, 1):
        yield item
        now = time.time()
        if sys.stderr.isatty() and (now - shown > 0.2 or n == total):
            shown, rate = now, n / (now - start + 1e-9)
            print(f"\r{what} {n}/{total}  {rate:.1f}/s  {(total - n) / rate:.0f} s left \033[K",
                  end="\n" if n == total else "", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------- slide

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
    Raises DataError where the file is unreadable, truncated, striped or not 8-bit RGB JPEG.
    """

    def __init__(self, path):
        self.path = str(path)
        try:
            # Closed again at once: a TiffFile opened before a fork returns wrong tiles in the workers.
            with tifffile.TiffFile(self.path) as tif:
                # Not `for page in tif.pages`, which never ends on a cyclic chain of pages.
                pages = [tif.pages[k] for k in range(len(tif.pages))]
                self.levels, self.mpp = self._levels(pages), self._mpp(pages)
        except DataError:
            raise
        except Exception as error:      # tifffile raises many types on damaged files
            raise DataError(f"{path}: not a readable TIFF ({error}); download or convert it again"
                            ) from error

    def _levels(self, pages):
        def fail(found, cure="convert it to a tiled JPEG pyramid TIFF"):
            raise DataError(f"{self.path}: {found}; {cure}")

        if not pages:
            fail("truncated, its index of pages is missing", "download it again")
        if not pages[0].is_tiled:
            fail("striped, not tiled")
        philips = "DPUfsImport" in (pages[0].description or "")
        size, levels = os.path.getsize(self.path), []
        for page in pages:
            if not page.is_tiled:       # thumbnail, label, macro
                continue
            width, height = page.imagewidth, page.imagelength
            # Philips pads every level to whole tiles, so there the ratio of two widths means nothing.
            down = 2 ** len(levels) if philips else 2 ** round(math.log2(pages[0].imagewidth / width))
            if philips:
                width, height = pages[0].imagewidth // down, pages[0].imagelength // down
            elif (abs(width * down - pages[0].imagewidth) >= 2 * down
                  or abs(height * down - pages[0].imagelength) >= 2 * down):
                continue                # a tiled label or macro picture
            if page.compression != 7:
                fail(f"compression is {getattr(page.compression, 'name', page.compression)}, not JPEG")
            if (page.samplesperpixel, page.bitspersample, page.planarconfig) != (3, 8, 1):
                fail(f"{page.samplesperpixel} samples of {page.bitspersample} bits, not 8-bit RGB")
            if page.photometric not in (2, 6):
                fail(f"colour is {page.photometric}, not RGB or YCbCr")
            offsets = np.asarray(page.dataoffsets, np.int64)
            counts = np.asarray(page.databytecounts, np.int64)
            across, down_ = -(-width // page.tilewidth), -(-height // page.tilelength)
            if not len(offsets) == len(counts) >= across * down_:
                fail(f"{len(offsets)} tiles listed where {across * down_} are needed", "download it again")
            if (offsets + counts).max(initial=0) > size or min(offsets.min(), counts.min()) < 0:
                fail("truncated, tiles lie beyond the end of the file", "download it again")
            levels.append(Level(width, height, down, page.tilewidth, page.tilelength, offsets, counts,
                                page.jpegtables or b"", "RGB" if page.photometric == 2 else "YCbCr"))
        return levels

    @staticmethod
    def _mpp(pages):
        aperio = re.search(r"MPP = ([\d.]+)", pages[0].description or "")
        if aperio:
            return float(aperio[1])
        unit, resolution = (pages[0].tags.get(name) for name in ("ResolutionUnit", "XResolution"))
        um = {2: 25400, 3: 10000}.get(unit and int(unit.value))
        if not um or not resolution or 0 in resolution.value:
            return None
        mpp = um * resolution.value[1] / resolution.value[0]
        return mpp if 0.05 < mpp < 20 else None         # 72 dpi and the like are placeholders

    def nearest_level(self, mpp, fallback=None):
        """The level nearest to `mpp` um/px; where the file tells no resolution, level `fallback`."""
        if self.mpp is None:
            if fallback is None:
                raise DataError(f"{self.path}: no resolution in the file; say which with --level")
            if not 0 <= fallback < len(self.levels):
                raise DataError(f"{self.path}: no level {fallback}; --level 0 to {len(self.levels) - 1}")
            return fallback
        return min(range(len(self.levels)),
                   key=lambda k: abs(math.log(self.mpp * self.levels[k].downsample / mpp)))

    def read(self, level, x, y, w, h):
        """The region (x, y, w, h), in pixels of `level`, as (h, w, 3) uint8 RGB; white beyond the edge."""
        lv = self.levels[level]
        across = -(-lv.width // lv.tile_w)
        region = np.full((h, w, 3), 255, np.uint8)
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, lv.width), min(y + h, lv.height)
        if x0 >= x1 or y0 >= y1:
            return region
        with open(self.path, "rb", buffering=0) as file:        # 10 us, and safe in any process
            for row in range(y0 // lv.tile_h, (y1 - 1) // lv.tile_h + 1):
                for col in range(x0 // lv.tile_w, (x1 - 1) // lv.tile_w + 1):
                    tile = self._tile(file, lv, row * across + col)
                    if tile is None:
                        continue
                    tx, ty = col * lv.tile_w, row * lv.tile_h
                    a, b = max(tx, x0), min(tx + lv.tile_w, x1)
                    c, d = max(ty, y0), min(ty + lv.tile_h, y1)
                    region[c - y:d - y, a - x:b - x] = tile[c - ty:d - ty, a - tx:b - tx]
        return region

    def _tile(self, file, lv, n):
        """Tile `n` of a level as (tile_h, tile_w, 3) uint8, None where absent."""
        if lv.counts[n] == 0:
            return None
        file.seek(lv.offsets[n])
        data = file.read(lv.counts[n])
        try:
            image = Image.open(io.BytesIO(lv.tables + data), formats=("JPEG",))
            if (image.size, image.mode) != ((lv.tile_w, lv.tile_h), "RGB"):
                raise OSError(f"a {image.mode} picture of {image.size}")
            # libjpeg guesses YCbCr for RGB tiles without an APP14 marker (Aperio): the TIFF tag knows.
            image.tile = [image.tile[0]._replace(args=("RGB", lv.space))]
            return np.asarray(image)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{self.path}: tile {n} at 1/{lv.downsample} is damaged ({error}); "
                            "compare the file with the data set's checksums.md5") from error


def tissue_share(slide, level, tile):
    """Share of tissue in each `tile` x `tile` px square of `level`'s grid: (rows, columns) float.

    Tissue is chroma (max - min of RGB) above Otsu's threshold, held in [8, 30]: below, an
    empty slide turns into tissue; above, one without background is split in two kinds of tissue.
    """
    # Deviation: the paper does not say how tiles were found; here tissue by chroma, because
    # HSV saturation breaks on near-black noise and a fixed value breaks across centres.
    k = max(n for n, lv in enumerate(slide.levels) if lv.downsample <= TISSUE_DOWNSAMPLE)
    low, fine = slide.levels[k], slide.levels[level]
    # A file without a pyramid may be huge here: read it in bands, keep every step-th pixel.
    step = max(1, math.isqrt(low.width * low.height >> 24))
    bands = [slide.read(k, 0, y, low.width, min(step * 256, low.height - y))[::step, ::step]
             for y in range(0, low.height, step * 256)]
    chroma = np.concatenate([np.ptp(band, axis=2) for band in bands])           # (h, w) uint8
    mask = chroma > np.clip(otsu(chroma), 8, 30)
    total = np.pad(mask.cumsum(0).cumsum(1), ((1, 0), (1, 0)))                  # integral image
    side = tile * fine.downsample / (low.downsample * step)                     # of a tile, in mask px
    ys, xs = (np.minimum(np.round(np.arange(-(-size // tile) + 1) * side).astype(int), length)
              for size, length in zip((fine.height, fine.width), mask.shape))
    inside = total[np.ix_(ys, xs)]
    return np.diff(np.diff(inside, axis=0), axis=1) / side ** 2


def otsu(values):
    """Otsu's threshold of a uint8 array: the value that best splits it in two, <= it and > it."""
    count = np.bincount(values.ravel(), minlength=256).astype(float)
    below, moment = count.cumsum(), (count * np.arange(256)).cumsum()
    spread = (moment[-1] * below - moment * below[-1]) ** 2 / np.maximum(
        below * (below[-1] - below), 1)
    return int(spread.argmax())


# ----------------------------------------------------------------------------------------- annotation

class Annotation:
    """The outlines of one slide: `polygons` is a list of (xy, is_tumour), xy (n, 2) level-0 pixels."""

    def __init__(self, polygons=()):
        # All tumour first, then exclusions are cleared: file order gives another mask (test_113: +4.6 %).
        self.polygons = sorted(polygons, key=lambda polygon: not polygon[1])
        self.boxes = np.array([(*xy.min(0), *xy.max(0)) for xy, _ in self.polygons]).reshape(-1, 4)

    def mask(self, x, y, w, h, downsample=1):
        """1 where tumour, of the region at (x, y) of w x h px of the level `downsample`: (h, w) uint8."""
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

    ASAP's rule: an edge counts, +1 down and -1 up, for the points of its rows to the left of it. Here it
    is added where that stops, and summed along x: as many operations as crossings, not n * w * h.
    """
    x1, y1 = xy.T
    x2, y2 = np.roll(xy, -1, axis=0).T
    top, bottom = (np.clip(np.ceil(f(y1, y2)), 0, h).astype(int) for f in (np.minimum, np.maximum))
    rows = bottom - top                                         # that the edge crosses inside the tile
    edge = np.repeat(np.arange(len(xy)), rows)
    y = np.arange(len(edge)) - np.repeat(rows.cumsum() - rows, rows) + top[edge]
    x = x1[edge] + (y - y1[edge]) * (x2 - x1)[edge] / (y2 - y1)[edge]
    x = np.clip(np.ceil(x), 0, w).astype(int)
    turns = np.bincount(y * (w + 1) + x, np.where(y2 > y1, 1, -1)[edge], h * (w + 1))
    return turns.reshape(h, w + 1)[:, :w].astype(np.int32).cumsum(1, np.int32)


def read_annotation(path):
    """ASAP XML -> Annotation. Raises DataError for broken XML, odd coordinates or unknown groups."""
    polygons = []
    try:
        root = ElementTree.parse(path).getroot()
        if root.tag != "ASAP_Annotations":
            raise ValueError(f"its root is {root.tag}")
        for node in root.iter("Annotation"):
            group, kind = node.get("PartOfGroup", "None").strip().lower(), node.get("Type")
            points = node.iter("Coordinate")
            xy = np.array([(float(p.get("X")), float(p.get("Y"))) for p in points]).reshape(-1, 2)
            if not (np.abs(xy) < 1e7).all():                    # False for nan too
                raise ValueError(f"coordinates of {node.get('Name')!r} are not finite pixels")
            if group == "none" or kind not in AREA_TYPES or len(xy) < 3:
                continue
            if group not in TUMOUR_GROUPS | EXCLUSION_GROUPS:
                raise ValueError(f"group {group!r} is neither tumour nor exclusion")
            polygons.append((xy, group in TUMOUR_GROUPS))
    except (ElementTree.ParseError, ValueError, TypeError) as error:
        raise DataError(f"{path}: not a usable ASAP annotation ({error}); mend or remove it") from error
    return Annotation(polygons)


# ---------------------------------------------------------------------------- slides, tiles, fractions

class Source(NamedTuple):
    """A slide to use: `name` is its path below the data folder, `xml` None where it has no tumour."""
    name: str
    path: Path
    xml: Path | None
    split: str                  # "train" or "test"


def find_slides(root, seed=0, unlabelled_is_normal=False):
    """Slides below `root` with their annotations and split -> [Source]; warns of those left out."""
    root = Path(root)
    files = sorted(f for f in root.rglob("*") if f.is_file() and f.name[0] != ".")
    slides = [f for f in files if f.suffix.lower() in (".tif", ".tiff", ".svs")
              and not f.stem.endswith(("_mask", "_prob"))]      # CAMELYON16's masks, predictions
    if not slides:
        raise DataError(f"{root}: no .tif, .tiff or .svs slides; give the folder that holds them")
    given = (root / "train").is_dir() and (root / "test").is_dir()
    negative = {row[0].rsplit(".", 1)[0] for f in files if f.name in ("stage_labels.csv", "stages.csv")
                for row in csv.reader(f.open()) if row[1:2] == ["negative"]}
    sources, left_out = [], []
    for path in slides:
        name = path.relative_to(root).as_posix()
        xmls = [f for f in files if f.stem == path.stem and f.suffix.lower() == ".xml"]
        xmls = [f for f in xmls if f.parent == path.parent] or xmls
        if len(xmls) > 1:
            raise DataError(f"{path}: {len(xmls)} annotations ({xmls[0]}, {xmls[1]}); keep one")
        split = name.split("/")[0] if given else ""
        known = xmls or unlabelled_is_normal or path.stem in negative or path.stem.startswith("normal")
        if known and split in ("", "train", "test"):
            sources.append(Source(name, path, xmls[0] if xmls else None, split))
        else:
            left_out.append(name)
    if left_out:
        warn(f"{len(left_out)} slides left out, without annotation and not known to be normal "
             f"(--unlabelled-is-normal takes them) or outside train/ and test/: {', '.join(left_out)}")
    partial = [s.name for s in sources if s.path.stem.lower() in NOT_EXHAUSTIVE]
    if partial:
        warn(f"not every metastasis is outlined on {', '.join(partial)}: 'normal' tiles there may be tumour")
    return sources if given else seeded_split(sources, seed)


def seeded_split(sources, seed):
    """Hold out 20 of every 110 slides, patients where names tell, with and without tumour alike."""
    # Deviation: the paper holds out 20 tumour slides, not named; here 20 in 110, drawn with the seed, a
    # patient's slides on one side, because the list is not public and slides of one patient are alike.
    def group(s):
        patient = re.search(r"patient_\d+(?=_node_\d+)", s.name)
        return patient[0] if patient else s.name

    tumour = {group(s) for s in sources if s.xml}
    test, rng = set(), np.random.default_rng((seed, 0))
    for groups in (tumour, {group(s) for s in sources} - tumour):
        count = max(1, round(len(groups) * TEST_SHARE)) if len(groups) > 1 else 0
        test.update(rng.permutation(sorted(groups))[:count].tolist())
    return [s._replace(split="test" if group(s) in test else "train") for s in sources]


class Index(NamedTuple):
    """All tissue tiles of all slides; `tiles` has one row each, with these fields."""
    sources: list
    slides: list
    annotations: list
    squares: np.ndarray         # (slides,) squares of each slide's grid, tissue or not
    tile: int                   # side in pixels of the level
    tiles: np.ndarray           # (tiles,) TILE

    def fingerprint(self):
        """Changes when slides, tiles, annotation or the use of labels do."""
        sizes = [(s.name, s.path.stat().st_size) for s in self.sources]
        return hashlib.sha256(repr(sizes).encode() + self.tiles.tobytes()).hexdigest()


TILE = np.dtype([("slide", int), ("x", int), ("y", int), ("level", int),     # x, y: level-0 pixels
                 ("train", bool), ("tumour", float), ("label", int),         # tumour: share of pixels
                 ("pixel", bool), ("image", bool)])                          # labels that training uses


def index_tiles(sources, tile=512, mpp=0.5, level=None, cancer_share=0.05):
    """Open every slide and lay a grid of `tile` px at `mpp` um/px over its tissue -> Index."""
    # Deviation: the paper gives no rule for the label of a tile; here cancer above 5 % tumour pixels,
    # normal at none, and tiles between are not used by the class branch, because they are neither.
    slides, annotations, squares, tiles = [], [], [], []
    for n, source in enumerate(progress(sources, "slides")):
        slide = Slide(source.path)
        annotation = read_annotation(source.xml) if source.xml else Annotation()
        k = slide.nearest_level(mpp, level)
        down, share = slide.levels[k].downsample, tissue_share(slide, k, tile)
        # The grid starts at (0, 0): tiles of 512 or 256 then are aligned with the TIFF's, 3 x less CPU.
        for y, x in np.argwhere(share >= TISSUE_SHARE) * tile:
            tumour = annotation.mask(x, y, tile, tile, down).mean()
            label = CANCER if tumour > cancer_share else BETWEEN if tumour > 0 else NORMAL
            tiles.append((n, x * down, y * down, k, source.split == "train", tumour, label, False, False))
        slides.append(slide), annotations.append(annotation), squares.append(share.size)
    index = Index(sources, slides, annotations, np.array(squares), tile, np.array(tiles, TILE))
    train, label = index.tiles["train"], index.tiles["label"]
    for where, rows, wanted in (("training", train, (CANCER, NORMAL)), ("test", ~train, (CANCER,))):
        for kind in wanted:
            if not (rows & (label == kind)).any():
                raise DataError(f"no {'cancer' if kind else 'normal'} tile among the {rows.sum()} {where} "
                                f"tiles of {tile} px at {mpp} um/px; try another --tile or --mpp, or more slides")
    return index


def choose_labels(index, pixel_frac, image_frac, label_unit="tile", normal_per_cancer=1.0, seed=0):
    """Set tiles["pixel"] and tiles["image"]: the training tiles whose mask / image label may be used.

    Fractions are nested: every unit (tile or slide) has a score in (0, 1) that depends on the seed alone,
    and is used where its score is below the fraction. Cancer and normal are ranked apart, so that both
    keep their share, and one tile of each is always used. Returns the training pool, rows of tiles.
    """
    tiles = index.tiles
    # Deviation: the paper does not say which normal tiles it takes; here all cancer tiles, and as many
    # normal ones drawn with the seed, because tumour is a few per cent of the tissue.
    order = np.random.default_rng((seed, 1)).permutation(len(tiles))
    normal = order[(tiles["train"] & (tiles["label"] == NORMAL))[order]]
    cancer = (tiles["train"] & (tiles["label"] == CANCER)).sum()
    pool = np.sort(np.r_[np.flatnonzero(tiles["train"] & (tiles["label"] != NORMAL)),
                         normal[:math.ceil(cancer * normal_per_cancer)]])
    label, slide = tiles["label"][pool], tiles["slide"][pool]
    has_cancer = np.isin(slide, slide[label == CANCER])
    # Deviation: the paper's 0 % row scores .596 with nothing to learn from; here 0 % of the masks
    # keeps one tile of each class, as the code of its reference [20] does. 0 % of image labels is none.
    pixel = (label_score(np.arange(len(pool)), label == CANCER, seed, 2) if label_unit == "tile"
             else label_score(slide, has_cancer, seed, 2))
    tiles["pixel"][pool] = below(pixel, pixel_frac, label)
    image = np.where(label == BETWEEN, 2, label_score(np.arange(len(pool)), label == CANCER, seed, 3))
    tiles["image"][pool] = below(image, image_frac, label) if image_frac > 0 else False
    return pool


def label_score(unit, kind, seed, stream):
    """A score in (0, 1) for each tile's `unit`, evenly spread over the units of each `kind`."""
    rng, score = np.random.default_rng((seed, stream)), np.empty(len(unit))
    for value in (True, False):
        units, which = np.unique(unit[kind == value], return_inverse=True)
        score[kind == value] = ((rng.permutation(len(units)) + 0.5) / max(len(units), 1))[which]
    return score


def below(score, fraction, label):
    """Tiles with a score below `fraction`, and the first of each class in any case."""
    used = score < fraction
    for kind in (CANCER, NORMAL):
        used[np.argmin(np.where(label == kind, score, np.inf))] = True
    return used


def describe(index):
    """A line per split: slides, tiles, labels, resolution."""
    for split in ("train", "test"):
        of = np.array([s.split == split for s in index.sources])
        t = index.tiles[index.tiles["train"] == (split == "train")]
        grids = sorted({(level, f"{(index.slides[s].mpp or math.nan) * 2 ** 0 * index.slides[s].levels[level].downsample:.2f}")
                        for s, level in set(zip(t["slide"].tolist(), t["level"].tolist()))})
        yield (f"{split:5}  {of.sum()} slides, {len(t)} tiles of {index.tile} px kept, "
               f"{index.squares[of].sum() - len(t)} without tissue dropped: {(t['label'] == CANCER).sum()} cancer, "
               f"{(t['label'] == NORMAL).sum()} normal, {(t['label'] == BETWEEN).sum()} between; "
               f"{t['pixel'].sum()} with pixel labels, {t['image'].sum()} with image labels; "
               + ", ".join(f"level {level} = {mpp} um/px" for level, mpp in grids))


def write_tiles(index, path):
    """tiles.csv: what every tile is and which of its labels training used; x and y in level-0 pixels."""
    with atomic(path, "w") as file:
        out = csv.writer(file)
        out.writerow("slide x y level split tumour_share image_label pixel_label_used "
                     "image_label_used".split())
        for t in index.tiles.tolist():
            out.writerow([index.sources[t[0]].name, *t[1:4], "train" if t[4] else "test", f"{t[5]:.6f}",
                          {CANCER: "cancer", NORMAL: "normal", BETWEEN: "between"}[t[6]], *map(int, t[7:])])


class Tiles(torch.utils.data.Dataset):
    """Rows of an Index as tensors: image (3, T, T) uint8, mask (T, T) uint8, label, row.

    A key (position, row) asks for a random flip and quarter turn, a function of (seed, position, row);
    a key row asks for the tile as it is. uint8 leaves the workers: float32 costs them twice the CPU.
    """

    def __init__(self, index, seed=0):
        self.index, self.seed = index, seed

    def __getitem__(self, key):
        position, row = key if isinstance(key, tuple) else (None, key)
        n, x, y, level, _, _, label, _, _ = self.index.tiles[row].item()
        down, side = self.index.slides[n].levels[level].downsample, self.index.tile
        image = self.index.slides[n].read(level, x // down, y // down, side, side)
        mask = self.index.annotations[n].mask(x // down, y // down, side, side, down)
        if position is not None:
            # Deviation: the paper names no augmentation; here flips and quarter turns, because tissue has
            # no up or down.
            turns, flip = divmod(int(np.random.default_rng((self.seed, position, row)).integers(8)), 2)
            image, mask = (np.rot90(a[:, ::-1] if flip else a, turns) for a in (image, mask))
        return (torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
                torch.from_numpy(np.ascontiguousarray(mask)), label, int(row))


class Batches:
    """Batch sampler: `iterations` full batches of keys (position, row) for epoch `epoch`.

    They are a stretch of one endless sequence, shuffled pass after shuffled pass over `rows`: nothing but
    (seed, position) decides a batch, so that a resumed run sees what an uninterrupted one would have.
    """

    def __init__(self, rows, batch_size, iterations, seed):
        self.rows, self.batch_size, self.iterations, self.seed = rows, batch_size, iterations, seed
        self.epoch = 0

    def __len__(self):
        return self.iterations

    def __iter__(self):
        size, batch, order = self.iterations * self.batch_size, [], None
        for position in range(self.epoch * size, (self.epoch + 1) * size):
            turn, k = divmod(position, len(self.rows))
            if order is None or k == 0:
                order = np.random.default_rng((*self.seed, turn)).permutation(self.rows)
            batch.append((position, int(order[k])))
            if len(batch) == self.batch_size:
                yield batch
                batch = []


@contextlib.contextmanager
def atomic(path, mode):
    """Open a temporary file that takes the name `path` once it is written in full."""
    part = Path(f"{path}.part")
    with part.open(mode, newline="" if mode == "w" else None) as file:
        yield file
    part.replace(path)
