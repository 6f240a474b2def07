"""A TIFF slide and its ASAP annotation: read a region, draw its mask, refuse what is unusable.

    slide = Slide("tumor_001.tif")                              # a tiled JPEG pyramid
    image = slide.read(1, x=0, y=0, w=512, h=512)               # level 1: (512, 512, 3) uint8
    mask = read_annotation("tumor_001.xml").mask(0, 0, 512, 512, downsample=2)      # 1 = tumour

Annotations are in level-0 pixels; `Slide.read` and masks are in pixels of the level that is read.
Needs numpy, tifffile and Pillow alone, so it can be copied alone.
"""

import io
import logging
import math
import os
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter, namedtuple

import numpy as np
import tifffile
from PIL import Image

# Groups of an annotation, in lower case -> the kind of their shapes. "normal" is CAMELYON17's name
# for holes in tumour; an image-level label for normal tissue is "normal region".
KINDS = dict.fromkeys(("_0", "_1", "tumor", "tumour", "metastases"), "tumour")
KINDS |= dict.fromkeys(("_2", "exclusion", "normal"), "exclusion")
REGIONS = "roi", "cancer region", "normal region"  # outlined in full inside; image-level labels
KINDS |= {name: name for name in REGIONS}
AREAS, POINTS = {"Polygon", "Spline", "Rectangle"}, {"Dot", "PointSet", "Measurement", "None"}
# One level of a slide: sizes in its px, level-0 px per px (a power of two), where each JPEG block
# is in the file (0 bytes = absent, background), JPEG tables that all share, "RGB" or "YCbCr".
Level = namedtuple("Level", "width height downsample block_w block_h offsets counts tables colours")

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # Slide raises its own errors
# glibc reuses freed memory only after one large block was freed: 0.9 instead of 1.8 ms for a tile.
np.empty(1 << 24, np.uint8)


class DataError(SystemExit, Exception):
    """Bad input: the file, the finding, the cure. If nobody catches it, it prints one line."""

    def __init__(self, message):
        # From a worker process the message is a traceback, and its last line is ours.
        line = message.strip().split("\n")[-1]
        super().__init__("error: " + line.removeprefix("slide.DataError: ").removeprefix("error: "))


def warn(message, names=None):
    """Print a warning. With `names`: the message, their number, the names; nothing without any."""
    if names is not None:
        message = f"{message} ({len(names)}): {', '.join(names)}"
    if names is None or names:
        print(f"warning: {message}", file=sys.stderr)


class Slide:
    """A tiled JPEG pyramid TIFF. It holds the index alone, so it can be sent to worker processes.

    `levels` is finest first; `mpp` is um per level-0 pixel, or None where the file has no
    resolution. DataError where the file is unreadable, truncated, striped or not 8-bit RGB JPEG.
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

    def fail(self, finding, cure="convert it to a tiled JPEG pyramid TIFF"):
        raise DataError(f"{self.path}: {finding}; {cure}")

    def _add_levels(self, pages):
        base = pages[0]
        text = base.tags.valueof("ImageDescription", default="")  # bytes where it is not ASCII
        text = text.decode("latin-1") if isinstance(text, bytes) else str(text)
        self.mpp, other = um_per_px(base, text)
        if self.mpp and other and not 0.9 < self.mpp / other < 1.1:
            warn(f"{self.path}: {self.mpp:g} um/px is used; its index also says {other:g}")
        if not base.is_tiled:
            self.fail("striped, not tiled")
        tiled = [page for page in pages if page.is_tiled]  # not thumbnail, label, macro
        for page in tiled:
            width, height = page.imagewidth, page.imagelength
            down = 2 ** max(0, round(math.log2(base.imagewidth / width)))
            error = width * down - base.imagewidth, height * down - base.imagelength
            if "DPUfsImport" in text:
                # Philips (CAMELYON16) pads every level to whole blocks: widths have no ratio of 2.
                down = 2 ** len(self.levels)
                width, height = base.imagewidth // down, base.imagelength // down
            elif max(map(abs, error)) >= 2 * down:
                continue  # another picture: no half, quarter ... but for rounding
            if down in [level.downsample for level in self.levels]:
                self.fail(f"two pages of {width} x {height} px", "keep one image in the file")
            self.levels.append(self._level(page, width, height, down))
        if 2 * len(self.levels) <= len(tiled) > 1:
            finding = f"{len(self.levels)} of its {len(tiled)} tiled pages"
            self.fail(f"only {finding} are the largest, {base.imagewidth} px wide, and its halves")

    def _level(self, page, width, height, down):
        w, h = page.tilewidth, page.tilelength
        layout = page.samplesperpixel, page.bitspersample, page.planarconfig
        # 7: JPEG; 2, 6: RGB, YCbCr; 1: the three colours of a pixel side by side.
        if page.compression != 7 or page.photometric not in (2, 6) or layout != (3, 8, 1):
            codec = getattr(page.compression, "name", page.compression)
            finding = f"compression {codec} of {layout[0]} x {layout[1]} bits"
            self.fail(f"{finding}, not JPEG of 8-bit RGB")
        if not 0 < min(w, h, width, height) or max(w, h) > 2048:
            self.fail(f"{width} x {height} px in blocks of {w} x {h}")
        offsets, counts = (np.array(n, np.int64) for n in (page.dataoffsets, page.databytecounts))
        beyond = (offsets + counts.astype(float) > os.path.getsize(self.path)) & (counts > 0)
        if len(offsets) < -(-width // w) * -(-height // h) or beyond.any() or counts.min() < 0:
            self.fail("truncated, blocks are missing or lie beyond its end", "download it again")
        colours = "RGB" if page.photometric == 2 else "YCbCr"
        return Level(width, height, down, w, h, offsets, counts, page.jpegtables or b"", colours)

    def nearest_level(self, mpp, fallback=None):
        """The level nearest to `mpp` um/px, or `fallback` where the file has no resolution."""
        if not self.mpp:
            if fallback not in range(len(self.levels)):
                self.fail("no um/px in the file", f"give --level, 0 to {len(self.levels) - 1}")
            return fallback
        ratio = np.array([self.mpp * level.downsample for level in self.levels]) / mpp
        k = int(np.abs(np.log(ratio)).argmin())
        if not 2 / 3 < ratio[k] < 3 / 2:
            warn(f"{self.path}: its nearest level has {ratio[k] * mpp:.2f} um/px, not {mpp:g}")
        return k

    def read(self, level, x, y, w, h):
        """Region (x, y, w, h), in px of `level` -> (h, w, 3) uint8 RGB, white beyond the edge."""
        return np.array(self.image(level, x, y, w, h))

    def image(self, level, x, y, w, h):
        """As `read`, but a Pillow image."""
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
        for box in (max(x1 - x, 0), 0, w, h), (0, max(y1 - y, 0), w, h):
            if box[0] < w and box[1] < h:
                region.paste("white", box)  # blocks reach over the edge
        return region

    def _block(self, file, lv, n):
        file.seek(lv.offsets[n])
        raw = file.read(lv.counts[n])
        try:
            image = Image.open(io.BytesIO(lv.tables + raw), formats=("JPEG",))
            if (image.size, image.mode) != ((lv.block_w, lv.block_h), "RGB"):
                raise OSError(f"a {image.mode} picture of {image.size}")
            # A JPEG's own markers say what its colours are. Aperio's RGB blocks have none, and
            # libjpeg takes them for YCbCr: then the TIFF's tag decides.
            if not re.search(rb"(?s)\xff\xe0..JFIF|\xff\xee..Adobe", raw[: raw.find(b"\xff\xda")]):
                image.tile = [image.tile[0]._replace(args=("RGB", lv.colours))]
            image.load()
            return image
        except Exception as error:  # Pillow raises many types on damaged blocks
            self.fail(f"block {n} at 1/{lv.downsample} is damaged ({error})", "download it again")


def um_per_px(page, text):
    """um/px of a TIFF page as OpenSlide reads it, and a second value to compare; None without."""
    number, values = r"\+?(\d*[.,]?\d+(?:[eE][+-]?\d+)?)(?![\d.,])", []
    if aperio := re.findall(r"(?:^|\|)\s*MPP\s*=\s*" + number, text):
        values = [float(aperio[-1].replace(",", "."))]
    elif philips := re.search(r'"DICOM_PIXEL_SPACING"[^>]*>[^\d.,<]*' + number, text):
        values = [1000 * float(philips[1].replace(",", "."))]
    if page.tags.valueof("ResolutionUnit", default=2) in (2, 3):  # inch, also if missing; cm
        values += [1 / px if px else 0 for px in page.get_resolution("MICROMETER")]
    # 72 dpi and the like are placeholders. The last value is y's, if there is more than one.
    values = [mpp if 0.05 < mpp < 20 else None for mpp in values] or [None]
    return values[0], values[-1]


class Annotation:
    """What is known of a slide, from shapes [(xy, kind)]; xy (n, 2) float in level-0 pixels.

    "tumour" and "exclusion" (a hole in it) are outlines. Inside a "roi" all tumour is outlined;
    inside a "cancer region" or "normal region" an image-level label is known, and no mask. A slide
    without any of these three is outlined in full; with one, nothing is known outside of them.
    `rings` holds the shapes by kind, `boxes` the corners around each.
    """

    def __init__(self, shapes=()):
        kinds = dict.fromkeys(kind for _, kind in shapes)  # each once
        self.rings = {kind: [xy for xy, other in shapes if other == kind] for kind in kinds}
        self.has_regions, self.boxes = any(kind in REGIONS for kind in self.rings), {}
        for kind, rings in self.rings.items():
            self.boxes[kind] = np.array([(*xy.min(0), *xy.max(0)) for xy in rings])

    def near(self, x, y, w, h, downsample=1):
        """Whether the box of any shape meets these w x h px."""
        low, high = (np.array(xy) * downsample for xy in ((x - 1, y - 1), (x + w + 1, y + h + 1)))
        return any(((b[:, :2] < high) & (b[:, 2:] > low)).all(1).any() for b in self.boxes.values())

    def inside(self, kind, x, y, w, h, downsample=1):
        """The w x h px at (x, y) of the level `downsample` -> (h, w) bool, in a shape of `kind`."""
        inside = np.zeros((h, w), bool)
        if kind in self.rings:
            # A pixel counts if its centre is inside: x of level 0 is (x + .5) / downsample - .5.
            boxes = (self.boxes[kind] + 0.5) / downsample - 0.5 - (x, y, x, y)
            boxes = np.clip(np.ceil(boxes), 0, (w, h, w, h)).astype(int)
            for n in np.flatnonzero((boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3])):
                left, top, right, bottom = boxes[n]
                xy = (self.rings[kind][n] + 0.5) / downsample - 0.5 - (x + left, y + top)
                inside[top:bottom, left:right] |= winding(xy, right - left, bottom - top) != 0
        return inside

    def mask(self, x, y, w, h, downsample=1):
        """As `inside` -> (h, w) int8: 1 tumour, 0 not tumour, -1 unknown (outside every roi)."""
        box = x, y, w, h, downsample
        # Exclusions are cleared last, whatever the file's order: tumour would fill them again.
        mask = (self.inside("tumour", *box) & ~self.inside("exclusion", *box)).astype(np.int8)
        if self.has_regions:
            mask[~self.inside("roi", *box)] = -1
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


def read_shapes(path):
    """ASAP XML -> [(xy, kind, type)], kind None without a group. DataError for any other file."""

    def group_of(node, key="PartOfGroup"):
        return node.get(key, "").strip().lower() or "none"

    try:
        root, shapes = ElementTree.parse(path).getroot(), []
        if root.tag != "ASAP_Annotations":
            raise ValueError(f"its root is {root.tag}; extras.convert reads ImageScope's")
        parents = {group_of(node, "Name"): group_of(node) for node in root.iter("Group")}
        for node in root.iter("Annotation"):
            group, shape = group_of(node), node.get("Type")
            for _ in parents:  # groups may be nested: climb to a known one
                if group not in KINDS and parents.get(group, "none") != "none":
                    group = parents[group]
            if shape not in AREAS | POINTS:
                raise ValueError(f"type {shape!r} is none of ASAP's")
            if shape in AREAS and group not in (*KINDS, "none"):
                raise ValueError(f"group {group!r} is none of {', '.join(KINDS)}")
            shapes.append((coordinates(node), KINDS.get(group), shape))
        return shapes
    except (OSError, ElementTree.ParseError, LookupError, TypeError, ValueError) as error:
        raise DataError(f"{path}: no usable ASAP annotation ({error}); mend or remove it") from None


def read_annotation(path, size=(1e7, 1e7)):
    """ASAP XML -> Annotation; a file without any shape is that of a normal slide.

    Shapes that are no areas, in no group, or off a slide of `size` level-0 px are skipped with a
    warning; DataError where no outline of tumour or no region is left. Tumour in no roi is named.
    """
    shapes, skipped, regions, dots = [], Counter(), 0, 0
    for xy, kind, shape in read_shapes(path):
        regions += kind in REGIONS
        dots += shape in POINTS and kind is None
        if shape not in AREAS or len(xy) < 3 or np.linalg.matrix_rank(xy - xy[0]) < 2:
            skipped[f"{shape} of {len(xy)} points without area"] += 1  # in CAMELYON's files too
        elif kind is None:
            skipped[f"{shape} without a group"] += 1
        elif (xy.min(0) >= size).any() or (xy.max(0) < 0).any():
            skipped[f"{shape} off the slide"] += 1
        else:
            shapes.append((xy, kind))
    annotation = Annotation(shapes)
    listed = ", ".join(f"{count} {shape}" for shape, count in skipped.items())
    if regions and not annotation.has_regions:
        raise DataError(f"{path}: no region can be used ({listed}); draw it on the slide again")
    # Where all is outlined, the rest would be normal tissue. Dots beside a region are none.
    lost = skipped.total() - (dots if regions else 0)
    if lost and "tumour" not in annotation.rings and ("roi" in annotation.rings or not regions):
        cure = "give outlines a group in ASAP, or delete all shapes if the slide is normal"
        raise DataError(f"{path}: no outline of tumour can be used ({listed}); {cure}")
    if [*annotation.rings] == ["exclusion"]:
        cure = "a box of normal tissue is a 'normal region'; of a normal slide delete all shapes"
        raise DataError(f"{path}: holes (group normal, exclusion or _2) but no tumour; {cure}")
    if skipped:
        warn(f"{path}: skipped {listed}; mend them in ASAP if they are outlines")
    unused = 0
    for xy in annotation.rings.get("tumour", ()) if regions else ():
        down = max(1, np.ptp(xy, 0).max() / 256)  # at most 256 x 256 places are tested
        box = *(xy.min(0) // down).astype(int), *(np.ptp(xy, 0) // down + 2).astype(int), down
        outline = Annotation([(xy, "tumour")]).inside("tumour", *box)
        unused += outline.any() and not (outline & annotation.inside("roi", *box)).any()
    if unused:
        warn(f"{path}: {unused} outlines of tumour are in no roi, not used; draw one around them")
    return annotation


def coordinates(node):
    """The points of an XML Annotation, sorted by their Order as in ASAP -> (n, 2) float."""
    points = list(node.iterfind("Coordinates/Coordinate"))  # iter() is quadratic on nested ones
    if any("Order" in point.keys() for point in points):
        points.sort(key=lambda point: float(point.get("Order")))
    xy = np.array([(float(p.get("X")), float(p.get("Y"))) for p in points]).reshape(-1, 2)
    if not (np.abs(xy) < 1e7).all():  # False for nan too
        raise ValueError(f"coordinates of {node.get('Name')!r} are not finite pixels")
    return xy
