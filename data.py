"""Slides and annotations in, tiles out: slide -> tissue -> tile -> image, mask, label.

    slide = Slide("tumor_001.tif")                              # a tiled JPEG pyramid TIFF
    image = slide.read(1, x=0, y=0, w=512, h=512)               # level 1: (512, 512, 3) uint8
    mask = read_annotation("tumor_001.xml").mask(0, 0, 512, 512, downsample=2)      # 1 = tumour
    tiles = tile_slides(find_slides("CAMELYON16"))              # all tissue tiles
    image, mask, label = tiles[0, 0]                            # row 0, turn 0: as it is

Annotations and tables are in level-0 pixels, `Slide.read` and masks in pixels of the level read.
"""

import csv
import io
import logging
import math
import os
import re
import signal
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import tifffile
import torch
from PIL import Image

# Deviation: the paper names CAMELYON17; here it is 16, because only 16 has 110 tumour slides.
GROUPS = dict.fromkeys(("_0", "_1", "tumor", "metastases"), True)  # of CAMELYON16, 16's test, 17
GROUPS |= dict.fromkeys(("_2", "exclusion", "normal"), False)  # cleared from those
AREAS = {"Polygon", "Spline", "Rectangle"}  # not Dot, PointSet, None (a ruler)
NO_SLIDES = "_mask", "_likelihood_map"  # ends of stems: CAMELYON16's masks, predictions
TISSUE_SHARE, CANCER_SHARE = 0.1, 0.05  # less tissue: dropped; more tumour: labelled cancer
CANCER, NORMAL, AMBIGUOUS = 1, 0, -1  # image-level labels; AMBIGUOUS never trains the head
# CAMELYON16 slides on which not every metastasis is outlined, as its authors list them.
PARTLY = (10, 15, 18, 20, 25, 29, 33, 34, 44, 46, 51, 54, 55, 56, 67, 79, 85, 92, 95, 110)
PARTLY = {f"tumor_{n:03}" for n in PARTLY} | {"test_114"}
# A slide to use: its path below the data folder and in full, its XML or None, "train" or "test".
Source = namedtuple("Source", "name path xml split")
# A resolution of a slide: size in px, level-0 px per px (a power of two), size of its JPEG blocks,
# where they lie in the file and their bytes (0 = absent, background), shared JPEG tables, colours.
Level = namedtuple("Level", "width height downsample block_w block_h offsets counts tables space")
# A tile: number of its slide, x and y in level-0 px, level, whether it is to train on, share of
# tumour px, image-level label.
TILE = "slide int, x int, y int, level int, train bool, tumour float, label int"
TILE = np.dtype([tuple(field.split()) for field in TILE.split(", ")])

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it would log, Slide raises
# Having freed one large block, glibc keeps memory: 0.9 instead of 1.8 ms per 512 px tile.
np.empty(1 << 24, np.uint8)


class DataError(SystemExit, Exception):
    """Bad input: the file, what was found, the cure. Uncaught, it ends the program in one line."""

    def __init__(self, message):
        line = message.strip().split("\n")[-1]  # a worker's comes at the end of its traceback
        super().__init__("error: " + line.removeprefix("data.DataError: ").removeprefix("error: "))


def warn(message, names=None):
    """Print a warning; with `names`, their number and them, and nothing where there are none."""
    if names is not None:
        message = f"{len(names)} {message}: {', '.join(names)}"
    if names is None or names:
        print(f"warning: {message}", file=sys.stderr)


def progress(items, what, total=None):
    """Yield from `items` with a line of rate and time left on a terminal; quiet elsewhere."""
    total, start = len(items) if total is None else total, time.time()
    for n, item in enumerate(items, 1):
        yield item
        if sys.stderr.isatty():
            rate = n / (time.time() - start + 1e-9)
            line = f"\r{what} {n}/{total}  {rate:.1f}/s  {(total - n) / rate:.0f} s left \033[K"
            print(line, end="\n" if n == total else "", file=sys.stderr, flush=True)


class Slide:
    """A tiled JPEG pyramid TIFF. Only its index is held: it pickles, and workers share no handle.

    `levels` is finest first; `mpp` is um per level-0 pixel, or None where the file does not tell.
    DataError where the file is unreadable, truncated, striped or not 8-bit RGB JPEG.
    """

    def __init__(self, path):
        self.path, self.levels = str(path), []
        try:
            # Closed at once: a TiffFile opened before a fork gives wrong blocks in the workers.
            with tifffile.TiffFile(self.path) as tif:
                # Not `for page in tif.pages`, which never ends on a cyclic chain of pages.
                pages = [tif.pages[k] for k in range(len(tif.pages))]
                tif.filehandle.seek(tif.pages.next_page_offset)
                if not pages or any(tif.filehandle.read(tif.tiff.offsetsize)):  # 0 ends a chain
                    self.fail("truncated, pages of its index are missing", "download it again")
                # OME-TIFF keeps the levels of a page in its SubIFDs.
                pages += [p.pages[k] for p in pages for k in range(len(p.subifds or ()))]
                self._add_levels(sorted(pages, key=lambda p: -p.imagewidth * p.imagelength))
        except DataError:
            raise
        except Exception as error:  # tifffile raises many types on damaged files
            self.fail(f"not a readable TIFF ({error!r})", "check the path, or download it again")

    def fail(self, found, cure="convert it to a tiled JPEG pyramid TIFF"):
        raise DataError(f"{self.path}: {found}; {cure}")

    def _add_levels(self, pages):
        base, text = pages[0], pages[0].description or ""
        self.mpp = um_per_px(text, base.tags)
        if not base.is_tiled:
            self.fail("striped, not tiled")
        tiled = [page for page in pages if page.is_tiled]  # not thumbnail, label, macro
        for page in tiled:
            width, height = page.imagewidth, page.imagelength
            down = 2 ** max(0, round(math.log2(base.imagewidth / width)))
            off = width * down - base.imagewidth, height * down - base.imagelength
            if "DPUfsImport" in text:  # Philips pads to whole blocks: widths have no ratio
                down = 2 ** len(self.levels)
                width, height = base.imagewidth // down, base.imagelength // down
            elif max(map(abs, off)) >= 2 * down:
                continue  # another picture
            if down in [level.downsample for level in self.levels]:
                self.fail(f"two pages of {width} x {height} px", "keep one image in the file")
            self.levels.append(self._level(page, width, height, down))
        if 2 * len(self.levels) <= len(tiled) > 1:
            found = f"{len(self.levels)} of its {len(tiled)} tiled pages"
            self.fail(f"only {found} are the largest, {base.imagewidth} px wide, and its halves")

    def _level(self, page, width, height, down):
        w, h = page.tilewidth, page.tilelength
        kind = page.samplesperpixel, page.bitspersample, page.planarconfig
        if page.compression != 7 or page.photometric not in (2, 6) or kind != (3, 8, 1):
            codec = getattr(page.compression, "name", page.compression)
            self.fail(f"compression {codec} of {kind[0]} x {kind[1]} bits, not JPEG of 8-bit RGB")
        if not 0 < min(w, h, width, height) or max(w, h) > 2048:
            self.fail(f"{width} x {height} px in blocks of {w} x {h}")
        offsets, counts = (np.array(n, np.int64) for n in (page.dataoffsets, page.databytecounts))
        beyond = (offsets + counts.astype(float) > os.path.getsize(self.path)) & (counts > 0)
        if len(offsets) < -(-width // w) * -(-height // h) or beyond.any() or counts.min() < 0:
            self.fail("truncated, blocks are missing or lie beyond its end", "download it again")
        space = "RGB" if page.photometric == 2 else "YCbCr"
        return Level(width, height, down, w, h, offsets, counts, page.jpegtables or b"", space)

    def nearest_level(self, mpp, fallback=None):
        """The level nearest to `mpp` um/px, or `fallback` where the file has no resolution."""
        if not self.mpp:
            if fallback not in range(len(self.levels)):
                self.fail("no um/px in the file", f"give --level, 0 to {len(self.levels) - 1}")
            return fallback
        found = np.array([self.mpp * level.downsample for level in self.levels])
        k = int(np.abs(np.log(found / mpp)).argmin())
        if not 2 / 3 < found[k] / mpp < 3 / 2:
            warn(f"{self.path}: its nearest level has {found[k]:.2f} um/px, not {mpp:g}")
        return k

    def read(self, level, x, y, w, h):
        """Region (x, y, w, h), in px of `level` -> (h, w, 3) uint8 RGB, white beyond the edge."""
        lv = self.levels[level]
        across = -(-lv.width // lv.block_w)
        x1, y1 = min(x + w, lv.width), min(y + h, lv.height)
        region = Image.new("RGB", (w, h), "white")
        with open(self.path, "rb", buffering=0) as file:  # takes 10 us; no handle to share
            for row in range(max(y, 0) // lv.block_h, -(-y1 // lv.block_h)):
                for col in range(max(x, 0) // lv.block_w, -(-x1 // lv.block_w)):
                    if lv.counts[row * across + col]:
                        block = self._block(file, lv, row * across + col)
                        region.paste(block, (col * lv.block_w - x, row * lv.block_h - y))
        region = np.array(region)
        region[max(y1 - y, 0) :] = region[:, max(x1 - x, 0) :] = 255  # blocks reach over the edge
        return region

    def _block(self, file, lv, n):
        file.seek(lv.offsets[n])
        raw = file.read(lv.counts[n])
        try:
            image = Image.open(io.BytesIO(lv.tables + raw), formats=("JPEG",))
            if (image.size, image.mode) != ((lv.block_w, lv.block_h), "RGB"):
                raise OSError(f"a {image.mode} picture of {image.size}")
            # libjpeg guesses YCbCr for Aperio's RGB blocks without an APP14 marker: the tag knows.
            image.tile = [image.tile[0]._replace(args=("RGB", lv.space))]
            image.load()
            return image
        except Exception as error:  # Pillow raises many types on damaged blocks
            cure = "compare the file with the data set's checksums.md5"
            self.fail(f"block {n} at 1/{lv.downsample} is damaged ({error})", cure)


def um_per_px(text, tags):
    """A TIFF page's description and tags -> um per px, as OpenSlide has it; None if not told."""
    unit, resolution = tags.get("ResolutionUnit"), tags.get("XResolution")
    um = {2: 25400, 3: 10000}.get(unit.value if unit else 2)  # inch where missing, TIFF 6.0; cm
    number, mpp = r"\+?([\d.,]+(?:[eE][+-]?\d+)?)", 0
    if aperio := re.search(r"\bMPP\s*=\s*" + number, text):
        mpp = float(aperio[1].replace(",", "."))
    elif philips := re.search(r'"DICOM_PIXEL_SPACING"[^>]*>[^\d.,<]*' + number, text):
        mpp = 1000 * float(philips[1].replace(",", "."))
    elif um and resolution:
        value, count = (*np.atleast_1d(resolution.value).tolist(), 1)[:2]  # a float, or a ratio
        mpp = um * count / value if value else 0
    return mpp if 0.05 < mpp < 20 else None  # 72 dpi and the like are placeholders


def tissue_share(slide, level, tile):
    """Share of tissue in the squares of `tile` px of `level`, side by side -> (rows, columns).

    Squares over the edge count their part inside. Tissue is chroma (max - min of RGB) above Otsu's
    threshold, held in [8, 30]: lower, and an empty slide becomes tissue; higher, and a slide
    without background loses half of it.
    """
    # Deviation: the paper names no way to find tissue; here chroma above Otsu's threshold, because
    # HSV saturation breaks on near-black noise. Fixed thresholds break across centres.
    side = tile * slide.levels[level].downsample
    coarsest = min(32, max(1, side // 8))  # 8 um/px, or 8 px in a square
    fits = [lv.downsample <= coarsest and side % lv.downsample == 0 for lv in slide.levels]
    k = max(np.flatnonzero(fits).tolist())
    low = slide.levels[k]
    if low.width * low.height > 1 << 27:
        slide.fail(f"its smallest level up to 1/{coarsest} is too large to look at")
    colours = slide.read(k, 0, 0, low.width, low.height).transpose(2, 0, 1)
    chroma = colours.max(0) - colours.min(0)
    mask = Image.fromarray((chroma > np.clip(otsu(chroma), 8, 30)).astype(np.float32))
    return np.asarray(mask.reduce(side // low.downsample))  # box means


def otsu(values):
    """Otsu's threshold of a uint8 array: the value that best splits it in two, <= it and > it."""
    count = np.bincount(values.ravel(), minlength=256).astype(float)
    below, moment = count.cumsum(), (count * np.arange(256)).cumsum()
    spread = (moment[-1] * below - moment * below[-1]) ** 2
    return int((spread / np.maximum(below * (below[-1] - below), 1)).argmax())


class Annotation:
    """Outlines of a slide: `polygons` [(xy, is_tumour)], xy (n, 2) float in level-0 pixels."""

    def __init__(self, polygons=()):
        # Exclusions last, whatever the file's order, which would fill them again.
        self.polygons = sorted(polygons, key=lambda polygon: not polygon[1])
        boxes = [(*xy.min(0), *xy.max(0)) for xy, _ in self.polygons]
        self.boxes = np.array(boxes, float).reshape(-1, 4)

    def mask(self, x, y, w, h, downsample=1):
        """The w x h px at (x, y) of the level `downsample` -> (h, w) uint8, 1 where tumour."""
        # A pixel counts if its centre is inside: x of level 0 is (x + .5) / downsample - .5 here.
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
    falls. On a row the crossings of a closed ring sum to 0, so those right of x are minus those
    left of it: one cumulative sum along x, not n * w * h tests.
    """
    x1, y1 = xy.T
    x2, y2 = np.roll(xy, -1, axis=0).T
    top, bottom = (np.clip(np.ceil(f(y1, y2)), 0, h).astype(int) for f in (np.minimum, np.maximum))
    rows = bottom - top  # how many the edge crosses inside the tile
    edge = np.repeat(np.arange(len(xy)), rows)
    y = np.arange(len(edge)) - np.repeat(rows.cumsum() - rows, rows) + top[edge]
    x = x1[edge] + (y - y1[edge]) * (x2 - x1)[edge] / (y2 - y1)[edge]
    x = np.clip(np.ceil(x), 0, w).astype(int)
    turns = np.bincount(y * (w + 1) + x, np.where(y2 > y1, -1, 1)[edge], h * (w + 1))
    return turns.reshape(h, w + 1)[:, :w].astype(np.int32).cumsum(1, np.int32)


def read_annotation(path, size=(1e7, 1e7)):
    """ASAP XML -> Annotation; a file without any shape is that of a normal slide.

    Shapes that are no areas, in no group, or off a slide of `size` level-0 px are skipped with a
    warning. DataError where no outline of tumour remains, for broken XML and unknown groups.
    """
    polygons, skipped = [], Counter()

    def group_of(node, key="PartOfGroup"):
        return node.get(key, "").strip().lower() or "none"

    try:
        root = ElementTree.parse(path).getroot()
        if root.tag != "ASAP_Annotations":
            raise ValueError(f"its root is {root.tag}")
        parents = {group_of(node, "Name"): group_of(node) for node in root.iter("Group")}
        for node in root.iter("Annotation"):
            kind, xy, group = node.get("Type"), coordinates(node), group_of(node)
            for _ in parents:  # groups may be nested: climb to a known one
                if group not in GROUPS and parents.get(group, "none") != "none":
                    group = parents[group]
            if kind not in AREAS or len(xy) < 3 or np.linalg.matrix_rank(xy - xy[0]) < 2:
                skipped[f"{kind} of {len(xy)} points"] += 1  # as in CAMELYON's own files
            elif group == "none":
                skipped[f"{kind} without a group"] += 1
            elif (xy.min(0) >= size).any() or (xy.max(0) < 0).any():
                skipped[f"{kind} off the slide"] += 1
            elif group in GROUPS:
                polygons.append((xy, GROUPS[group]))
            else:
                raise ValueError(f"group {group!r} is neither tumour nor exclusion")
    except (OSError, ElementTree.ParseError, LookupError, TypeError, ValueError) as error:
        cure = "mend or remove it"
        raise DataError(f"{path}: not a usable ASAP annotation ({error}); {cure}") from None
    found = ", ".join(f"{count} {kind}" for kind, count in skipped.items())
    if skipped and not any(is_tumour for _, is_tumour in polygons):
        cure = "give outlines a group in ASAP, or delete all shapes if the slide is normal"
        raise DataError(f"{path}: no outline of tumour can be used ({found}); {cure}")
    if skipped:
        warn(f"{path}: skipped {found}; mend them in ASAP if they are outlines")
    return Annotation(polygons)


def coordinates(node):
    """The points of an XML Annotation, put by their Order as in ASAP -> (n, 2) float."""
    points = list(node.iterfind("Coordinates/Coordinate"))  # iter() is quadratic on nested ones
    if any("Order" in point.keys() for point in points):
        points.sort(key=lambda point: float(point.get("Order")))
    xy = np.array([(float(p.get("X")), float(p.get("Y"))) for p in points]).reshape(-1, 2)
    if not (np.abs(xy) < 1e7).all():  # False for nan too
        raise ValueError(f"coordinates of {node.get('Name')!r} are not finite pixels")
    return xy


def find_slides(root=None, seed=0):
    """Slides below `root` with annotation and split -> [Source]; names those left out.

    A slide is used if it has an XML of its stem, is called normal*, is negative in stage_labels.csv
    or stages.csv, or Normal in reference.csv. Folders train* and test* are the split where both
    hold such slides, else it is drawn with `seed`. Without `root`: synthetic slides.
    """
    if root is None:
        from extras import synthetic  # the only import of extras/ in these five files

        root = synthetic.cached()
    try:
        files = sorted(walk(Path(root), set()))
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}; give a folder to read") from None
    slides = [f for f in files if f.suffix.lower() in (".tif", ".tiff", ".svs")]
    slides = [f for f in slides if not f.stem.lower().endswith(NO_SLIDES)]
    if not slides:
        raise DataError(f"{root}: no .tif, .tiff or .svs slides; give the folder that holds them")
    normal, xmls = normal_slides(files), match_annotations(slides, files)
    shared, sources, left_out = os.path.commonpath([f.parent for f in slides]), [], []
    for path in slides:
        name, stem = path.relative_to(root).as_posix(), path.stem.lower()
        split = re.search("(^|/)(train|test)[^/]*/", path.relative_to(shared).as_posix().lower())
        if path in xmls or stem in normal or stem.startswith("normal"):
            sources.append(Source(name, path, xmls.get(path), split[2] if split else ""))
        else:
            left_out.append(name)
    given = {"train", "test"} <= {s.split for s in sources}
    print("split:", "the folders train* and test*" if given else f"drawn with seed {seed}")
    left_out += [s.name for s in sources if given and not s.split]
    sources = [s for s in sources if s.split] if given else seeded_split(sources, seed)
    train, test = ({patient(s) for s in sources if s.split == side} for side in ("train", "test"))
    partly = [s.name for s in sources if s.path.stem.lower() in PARTLY]
    warn("slides left out: no XML and not known as normal, or outside train and test", left_out)
    warn("patients are both in train and in test", sorted(train & test))
    warn("slides are not outlined in full, 'normal' tiles of theirs may be tumour", partly)
    return sources


def walk(folder, seen):
    """Yield the files below `folder` but hidden ones; links are followed, no folder comes twice."""
    if folder.resolve() not in seen:
        seen.add(folder.resolve())
        inside = [path for path in folder.iterdir() if path.name[0] != "."]
        for path in sorted(inside, key=lambda path: (path.is_symlink(), path)):
            yield from walk(path, seen) if path.is_dir() else [path]


def normal_slides(files):
    """Stems that the label tables of CAMELYON16 and 17 call normal or negative, lower case."""
    stems = set()
    for file in files:
        if file.name.lower() in ("stage_labels.csv", "stages.csv", "reference.csv"):
            text = file.read_text("utf-8-sig", "replace").lower()
            for row in csv.reader(re.sub("[;\t]", ",", text).splitlines(), skipinitialspace=True):
                if len(row) > 1 and row[1].strip() in ("negative", "normal"):
                    stems.add(re.sub(r"\.(tiff?|svs)$", "", row[0].strip()))
    return stems


def match_annotations(slides, files):
    """{slide: XML of its stem}: the one beside it, else one that lies beside no such slide.

    Names those that another is preferred to. DataError, naming all, where an XML may be of two
    slides, or two of one.
    """
    xmls, owner = [f for f in files if f.suffix.lower() == ".xml"], {}
    homes = {(f.parent, f.stem.lower()) for f in slides}
    for slide in slides:
        own = [f for f in xmls if f.stem.lower() == slide.stem.lower()]
        near = [f for f in own if f.parent == slide.parent]
        near = near or [f for f in own if (f.parent, f.stem.lower()) not in homes]
        several = [*near, *(owner[f] for f in near if f in owner)]
        if len(several) > 1:
            several = ", ".join(map(str, [slide, *several]))
            raise DataError(f"{several}: which belongs to which? put each XML by its slide")
        owner |= dict.fromkeys(near, slide)
    unused = [str(f) for f in xmls if f not in owner and f.stem.lower() in {s for _, s in homes}]
    warn("XML are not read, another lies beside the slide of that name", unused)
    return {slide: xml for xml, slide in owner.items()}


def patient(source):
    """What stays on one side of the split: the patient where the name tells, else the slide."""
    return re.sub(r".*(patient_\d+)_node_\d.*", r"\1", source.path.stem.lower())


def seeded_split(sources, seed):
    """Section 2.2: hold out 20 of 110 patients, of those with tumour and of those without."""
    # Deviation: the paper trains on 90 tumour slides and tests on 20, unnamed; here normal slides
    # are in both, split by the folders train* and test*, else 20 in 110 patients are held out,
    # because most slides in use are normal.
    tumour = {patient(s) for s in sources if s.xml}
    test, rng = set(), np.random.default_rng((seed, 0))
    for patients in (tumour, {patient(s) for s in sources} - tumour):
        count = max(1, round(len(patients) * 20 / 110)) if len(patients) > 1 else 0
        test.update(rng.permutation(sorted(patients))[:count].tolist())
    return [s._replace(split="test" if patient(s) in test else "train") for s in sources]


class Tiles(torch.utils.data.Dataset):
    """All tissue tiles of all slides; `table` (TILE) has a row for each, `side` px of its level.

    tiles[row, turn] -> image (3, T, T) uint8, mask (T, T) uint8, label; `turn` 1 to 7 flips and
    turns both. Workers send uint8: float32 would cost up to twice the CPU.
    """

    def __init__(self, sources, slides, annotations, side, table):
        self.sources, self.slides, self.annotations = sources, slides, annotations  # one per slide
        self.side, self.table = side, table

    def __getitem__(self, key):
        row, turn = key
        n, x, y, level, _, _, label = self.table[row].item()
        down = self.slides[n].levels[level].downsample
        box = x // down, y // down, self.side, self.side
        image, mask = self.slides[n].read(level, *box), self.annotations[n].mask(*box, down)
        # Deviation: the paper has no augmentation; here flips and turns, because tissue has no up.
        image, mask = (np.rot90(a[:, ::-1] if turn % 2 else a, turn // 2) for a in (image, mask))
        image = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return image, torch.from_numpy(np.ascontiguousarray(mask)), label


def tile_slides(sources, tile=512, mpp=0.5, level=None):
    """Open every slide and lay a grid of `tile` px at `mpp` um/px over its tissue -> Tiles.

    `level` is for slides that do not tell their um/px.
    """
    slides = [Slide(source.path) for source in progress(sources, "slides")]
    annotations, table = [], []
    for n, source in enumerate(progress(sources, "tissue")):
        size, k = slides[n].levels[0][:2], slides[n].nearest_level(mpp, level)
        annotation = read_annotation(source.xml, size) if source.xml else Annotation()
        down, rows = slides[n].levels[k].downsample, []
        # From (0, 0): tiles of 512 or 256 px are aligned with the JPEG blocks, 3 x less CPU.
        squares = np.argwhere(tissue_share(slides[n], k, tile) >= TISSUE_SHARE) * tile
        for y, x in squares.tolist():
            # Deviation: the paper has no rule for a tile's label; here cancer above 5 % tumour,
            # normal at none, because tiles between are neither. Their masks are used.
            tumour = float(annotation.mask(x, y, tile, tile, down).mean())
            label = CANCER if tumour > CANCER_SHARE else AMBIGUOUS if tumour > 0 else NORMAL
            rows.append((n, x * down, y * down, k, source.split == "train", tumour, label))
        if not rows:
            warn(f"{source.path}: no tissue was found, nothing is looked at")
        elif any(t for _, t in annotation.polygons) and not any(row[5] for row in rows):
            warn(f"{source.xml}: no outline of tumour lies on tissue; is it of this slide?")
        annotations.append(annotation)
        table += rows
    return Tiles(sources, slides, annotations, tile, np.array(table, TILE))


def choose_labels(tiles, pixel_frac, image_frac, label_unit="tile", seed=0):
    """Whose labels training may use -> rows of `tiles.table`: the pool, masks, image labels.

    The pool is what 100 % stands for: all training tiles with tumour, and as many normal ones.
    image_frac 0 is the S group, 1 is S+C. `label_unit`: masks are of single tiles or of whole
    slides. DataError if a class is missing.
    """
    train, label = tiles.table["train"], tiles.table["label"]
    cancer, normal = (np.flatnonzero(train & (label == kind)) for kind in (CANCER, NORMAL))
    if not (len(cancer) and len(normal) and (~train & (label == CANCER)).any()):
        found = f"{len(cancer)} cancer, {len(normal)} normal tiles of {tiles.side} px to train on"
        cure = "training needs both, testing cancer: change --tile, --mpp, --level or --data"
        raise DataError(f"{found}; {cure}")
    # Deviation: the paper counts no normal tiles; here as many as cancer, because tumour is rare.
    normal = np.random.default_rng((seed, 1)).permutation(normal)[: len(cancer)]
    pool = np.sort(np.r_[np.flatnonzero(train & (label != NORMAL)), normal])
    # Deviation: the paper does not say what 0 % of the masks is; here it keeps the mask of one tile
    # of each class, because its [20] does. 0 % of image labels is none.
    masks = nested(tiles.table, pool, label_unit, pixel_frac, (seed, 2))
    labels = nested(tiles.table, pool[label[pool] != AMBIGUOUS], "tile", image_frac, (seed, 3))
    return pool, masks, labels if image_frac else labels[:0]


def nested(table, rows, unit, fraction, seed):
    """Those of `rows` whose label may be used: a share of the units, "tile" or "slide".

    A unit's random score in (0, 1) does not depend on `fraction`, so 10 % is inside 20 %. Units
    with and without cancer are ranked apart, so both keep their share, and the lowest-scored tile
    of each class is always used.
    """
    # The paper gives masks to a share of the tiles; a pathologist outlines slides.
    label, units = table["label"][rows], rows if unit == "tile" else table["slide"][rows]
    with_cancer = np.isin(units, units[label == CANCER])
    rng, score = np.random.default_rng(seed), np.empty(len(rows))
    for kind in (with_cancer, ~with_cancer):
        which, place = np.unique(units[kind], return_inverse=True)
        score[kind] = ((rng.permutation(len(which)) + 0.5) / max(len(which), 1))[place]
    used = score < fraction
    for value in (CANCER, NORMAL):
        used[np.where(label == value, score, np.inf).argmin()] = True
    return rows[used]


def describe(tiles, mask_rows, label_rows):
    """Lines to print: slides and tiles of each split, what training may use."""
    for split in ("train", "test"):
        rows = np.flatnonzero(tiles.table["train"] == (split == "train"))
        slides = len(np.unique(tiles.table["slide"][rows]))
        kinds = [(tiles.table["label"][rows] == kind).sum() for kind in (CANCER, NORMAL, AMBIGUOUS)]
        found = f"{kinds[0]} cancer, {kinds[1]} normal, {kinds[2]} ambiguous"
        yield f"{split}: {slides} slides; {len(rows)} tiles: {found}"
    yield f"to learn from: the masks of {len(mask_rows)} tiles, the labels of {len(label_rows)}"


def write_tiles(path, tiles, mask_rows, label_rows):
    """tiles.csv: what every tile is (TILE), whether training used its mask and its image label."""
    used = np.stack([np.isin(range(len(tiles.table)), rows) for rows in (mask_rows, label_rows)], 1)
    with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        out = csv.writer(file)
        out.writerow([*TILE.names, "mask_used", "label_used"])
        for (n, *tile), flags in zip(tiles.table.tolist(), used.tolist()):
            out.writerow([tiles.sources[n].name, *tile, *flags])


def batches(rows, batch_size, seed, first, last):
    """Full batches of keys (row, turn): numbers `first` to `last` - 1 of an endless sequence.

    The sequence is pass after shuffled pass over `rows`, each tile turned at random: `seed` and a
    batch's number alone decide it, so a resumed run sees what an uninterrupted one would have.
    """
    assert len(rows), "no tiles to draw batches from"
    rng, keys = np.random.default_rng(seed), []
    for n in range(last):
        while len(keys) < batch_size:
            turns = rng.integers(8, size=len(rows)).tolist()
            keys += zip(rng.permutation(rows).tolist(), turns)
        batch, keys = keys[:batch_size], keys[batch_size:]
        if n >= first:
            yield batch


def load(tiles, batches, device, workers=0):
    """Batches of keys -> images (B, 3, T, T) uint8, masks (B, T, T) uint8, labels (B,) on `device`.

    `tiles` is any Dataset; DataError where its workers lack shared memory.
    """
    options = {"num_workers": workers, "worker_init_fn": hush, "pin_memory": device.type == "cuda"}
    # Workers inherit the block: Ctrl-C is for the process that they work for, which ends them.
    block = getattr(signal, "pthread_sigmask", lambda *_: None)  # there is none on Windows
    try:
        block(signal.SIG_BLOCK, {signal.SIGINT})
        loader = iter(torch.utils.data.DataLoader(tiles, batch_sampler=batches, **options))
        block(signal.SIG_UNBLOCK, {signal.SIGINT})
        for batch in loader:
            yield [t.to(device, non_blocking=True) for t in batch]
    except RuntimeError as error:
        if not re.search("shared memory|worker.* (killed|exited)", str(error)):
            raise
        cure = "give --workers 0, or a larger /dev/shm (docker run --shm-size 8g)"
        raise DataError(f"a worker died, most likely for lack of shared memory; {cure}") from None


def hush(_):  # in a worker: its threads complain when the job has ended before it
    sys.excepthook = sys.unraisablehook = lambda *_: None
