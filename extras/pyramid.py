"""Probability of a whole slide in strips of rows: windows -> strips -> pyramid TIFF -> strips.

    write("NAME_likelihood_map.tif", blend(windows, tile, width, height), width, height, mpp)
    mask = np.concatenate([strip >= 128 for strip in read_strips("NAME_likelihood_map.tif", 0)])

A strip has 256 rows and all columns, and a few are held at a time, so memory stays flat.
"""

import zlib

import numpy as np
import tifffile
from PIL import Image

SIDE = 256  # of the TIFF's blocks; a strip has as many rows
EMPTY = zlib.compress(bytes(SIDE * SIDE))
DEFLATE = 32946  # the same bytes as 8, which ASAP's own reader does not take


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
            here = np.s_[top - row * SIDE : bottom - row * SIDE, x : x + tile]
            strips[row][0][here] += (weight * p)[top - y : bottom - y]
            strips[row][1][here] += weight[top - y : bottom - y]
    for row in range(done, -(-height // SIDE)):
        yield finish(row)


def write(path, strips, width, height, mpp):
    """Strips (SIDE, width) uint8 -> a deflate pyramid TIFF, halved until one block is left."""
    kind = {"dtype": np.uint8, "tile": (SIDE, SIDE), "compression": DEFLATE, "metadata": None}
    kind |= {"photometric": "minisblack", "resolutionunit": "CENTIMETER", "subfiletype": 0}
    while True:
        kind |= {"shape": (height, width), "resolution": (1e4 / mpp,) * 2}
        with tifffile.TiffWriter(path, bigtiff=True, append=kind["subfiletype"]) as tif:
            tif.write(blocks(strips), **kind)
        if max(width, height) <= SIDE:
            return
        strips, kind["subfiletype"] = halve(read_strips(path, -1)), 1
        width, height, mpp = -(-width // 2), -(-height // 2), mpp * 2


def blocks(strips):
    """Strips -> the TIFF's blocks, deflated."""
    for strip in strips:
        for x in range(0, strip.shape[1], SIDE):
            block = strip[:, x : x + SIDE]
            missing = [(0, SIDE - side) for side in block.shape]
            yield zlib.compress(np.pad(block, missing).tobytes()) if block.any() else EMPTY


def read_strips(path, page):
    """A page of a TIFF of `write` -> its strips again, one held at a time."""
    with tifffile.TiffFile(path) as tif:
        page = tif.pages[page]
        places = list(zip(page.dataoffsets, page.databytecounts))
    across = -(-page.imagewidth // SIDE)
    with open(path, "rb") as file:
        for first in range(0, len(places), across):
            strip = np.zeros((SIDE, across, SIDE), np.uint8)
            for n, (offset, count) in enumerate(places[first : first + across]):
                file.seek(offset)
                block = file.read(count)
                if block != EMPTY:  # most of a slide: glass
                    block = np.frombuffer(zlib.decompress(block), np.uint8)
                    strip[:, n] = block.reshape(SIDE, SIDE)
            rows = page.imagelength - first // across * SIDE
            yield strip.reshape(SIDE, -1)[:rows, : page.imagewidth]


def halve(strips):
    """Strips -> strips of the 2 x 2 means; at an odd edge, of what is there."""
    halves = (np.asarray(Image.fromarray(strip).reduce(2)) for strip in strips)
    for upper in halves:
        yield np.concatenate([upper, next(halves, upper[:0])])
