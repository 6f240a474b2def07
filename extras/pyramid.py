"""Probability of a whole slide in strips of rows: windows -> strips -> pyramid TIFF -> strips.

    write("NAME_likelihood_map.tif", blend(windows, tile, width, height), width, height, mpp)
    mask = np.concatenate([strip >= 128 for strip in read_strips("NAME_likelihood_map.tif")])

A strip has 256 rows and all columns, and a few are held at a time, so memory stays flat.
"""

from itertools import chain

import numpy as np
import tifffile
from PIL import Image

SIDE = 256  # of the TIFF's blocks; a strip has as many rows
DEFLATE = 32946  # the same bytes as 8, which ASAP's own reader does not take


def blend(windows, tile, width, height):
    """Windows (x, y, p (tile, tile) float32), by rows -> strips (SIDE, width) uint8 of 255 p.

    Where windows overlap, p is their mean, weighted with a pyramid that falls to 0 at the window's
    edge, so no seam is left. Where none was, it is 0.
    """
    # Deviation: the paper predicts tiles; here windows of whole slides overlap, because a
    # network is worst at a tile's edge.
    ramp = np.minimum(np.arange(tile) + 0.5, np.arange(tile, 0, -1) - 0.5).astype(np.float32)
    weight = np.outer(ramp, ramp)
    # Sums of weight * p and of weight: row y is held in row y % (SIDE + tile), until it is whole.
    sums, top = np.zeros((2, SIDE + tile, width + tile), np.float32), 0
    for x, y, p in chain(windows, [(0, height + SIDE - 1, None)]):  # beyond the end: all is whole
        while top + SIDE <= y:
            rows = np.arange(top, min(top + SIDE, height)) % (SIDE + tile)
            total, weights = sums[:, rows, :width]
            sums[:, rows], top = 0, top + SIDE
            yield np.rint(255 * total / np.maximum(weights, 1e-9)).astype(np.uint8)
        if p is not None:
            rows = np.arange(y, y + tile) % (SIDE + tile)
            sums[:, rows, x : x + tile] += np.stack([weight * p, weight])


def write(path, strips, width, height, mpp, level=0):
    """Strips (SIDE, width) uint8 -> a deflate pyramid TIFF, halved until one block is left."""
    kind = {"dtype": np.uint8, "tile": (SIDE, SIDE), "compression": DEFLATE, "metadata": None}
    kind |= {"photometric": "minisblack", "subfiletype": int(level > 0)}  # 1: a smaller level
    kind |= {"resolutionunit": "CENTIMETER", "resolution": (1e4 / mpp,) * 2}
    blocks = (strip[:, x : x + SIDE] for strip in strips for x in range(0, width, SIDE))
    with tifffile.TiffWriter(path, bigtiff=True, append=level > 0) as tif:
        tif.write(blocks, shape=(height, width), maxworkers=1, **kind)
    if max(width, height) > SIDE:
        half = halve(read_strips(path, level))
        write(path, half, -(-width // 2), -(-height // 2), 2 * mpp, level + 1)


def read_strips(path, level=0):
    """A level of a TIFF of `write` -> its strips again, one held at a time."""
    with tifffile.TiffFile(path) as tif:
        page = tif.pages[level]
        # One worker: several would decode far ahead of who takes the strips, and fill the memory.
        blocks = (block for block, _, _ in page.segments(maxworkers=1, buffersize=1 << 24))
        across = -(-page.imagewidth // SIDE)
        for y in range(0, page.imagelength, SIDE):
            strip = np.concatenate([next(blocks)[0, :, :, 0] for _ in range(across)], 1)
            yield strip[: page.imagelength - y, : page.imagewidth]


def halve(strips):
    """Strips -> strips of the 2 x 2 means; at an odd edge, of the pixels there are."""
    halves = (np.asarray(Image.fromarray(strip).reduce(2)) for strip in strips)
    for upper in halves:
        yield np.concatenate([upper, next(halves, upper[:0])])
