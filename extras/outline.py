"""Outlines of a mask: the inverse of data.Annotation.mask, exact to the pixel; ASAP's XML of them.

    rings = trace(strips)                   # a mask in strips of rows, (h, W) bool, top to bottom
    polygons = to_polygons(rings, 4)        # [(xy, is_tumour)] in level-0 pixels, downsample 4

A ring runs between the pixels. Its corner (x, y) is the upper left one of pixel (x, y), so it lies
at (x - .5, y - .5) of the mask's level. Tumour pixels that touch at a corner are of one lesion, as
in CAMELYON's own scoring; holes are the other way round. numpy alone: copy this file.
"""

from collections import defaultdict
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

# The 2 x 2 pixels around a corner as bits: 1, 2 above; 4, 8 below. A ring turns there where an odd
# number is set, and two rings touch there (or one touches itself) where two are, diagonally.
TURNS = np.isin(np.arange(16), (1, 2, 4, 8, 7, 11, 13, 14, 6, 9))


class Ring(NamedTuple):
    """One closed outline of a lesion or of a hole in a lesion."""

    xy: np.ndarray  # (n, 2) int corners, clockwise from the first by (y, x)
    is_hole: bool
    area: int  # pixels inside, holes and islands in them included
    parent: int  # the ring around it, of the other kind: a number, or -1


def trace(strips, min_area=0):
    """Mask -> [Ring] of at least `min_area` pixels, ordered by their first corner (y, x).

    What is smaller is left out with all that lies in it: specks go, small holes are filled.
    Memory grows with the outlines alone, not with the mask.
    """
    x, y, code = corners(strips)
    # Corners come row by row. Along a row, the first is joined to the second, the third to the
    # fourth; likewise along a column: a ring goes by row, by column, by row... to where it began.
    touch = (code == 6) | (code == 9)
    x, y, code = (np.repeat(a, 1 + touch) for a in (x, y, code))
    right = np.arange(len(x)) % 2 == 0  # this corner is the left end of its edge
    # Where rings touch, the end of one edge and the start of the next share a place. Which of them
    # goes up decides what is joined there: tumour is.
    down = np.where(code == 9, ~right, right)
    by_column = np.lexsort((down, y, x))
    mate = np.empty(len(x), int)
    mate[by_column[::2]], mate[by_column[1::2]] = by_column[1::2], by_column[::2]
    xy, mate, seen, rings = np.stack([x, y], 1), mate.tolist(), bytearray(len(x)), []
    for first in range(0, len(x), 2):
        if seen[first]:
            continue
        n, order = first, []
        while not seen[n]:
            seen[n] = 1
            order += n, n ^ 1
            n = mate[n ^ 1]
        ring = xy[order]
        area = int(((ring[::2, 0] - ring[1::2, 0]) * ring[::2, 1]).sum())
        if area >= min_area:
            rings.append(Ring(ring, not code[first] & 8, area, -1))
    # To the left of a ring's first corner is the ring around it, or one beside it, seen before.
    for n, left in enumerate(left_of(rings, np.array([ring.xy[0] for ring in rings])).tolist()):
        if left >= 0:
            same = rings[left].is_hole == rings[n].is_hole
            rings[n] = rings[n]._replace(parent=rings[left].parent if same else left)
    return rings


def corners(strips):
    """Places where outlines turn -> x, y, code (see TURNS), row by row."""
    found, top, above = [], 0, None
    for strip in chain(strips, [None]):
        if above is None:
            above = np.zeros_like(strip[:1])
        if strip is None:
            strip = np.zeros_like(above)  # below the last row
        if above.any() or strip.any():
            a = np.pad(np.concatenate([above, strip]), ((0, 0), (1, 1))).view(np.uint8)
            code = a[:-1, :-1] | a[:-1, 1:] << 1 | a[1:, :-1] << 2 | a[1:, 1:] << 3
            y, x = np.nonzero(TURNS[code])
            found.append((x, y + top, code[y, x]))
        top, above = top + len(strip), strip[-1:]
    return [np.concatenate(a) for a in zip(*found)] or [np.zeros(0, int)] * 3


def left_of(rings, xy):
    """For each (x, y): the number of the ring whose upright edge in pixel row y is next below x."""
    if not rings:
        return np.full(len(xy), -1)
    start = np.concatenate([ring.xy[1::2] for ring in rings])
    end = np.concatenate([np.roll(ring.xy, -1, 0)[1::2] for ring in rings])
    top, bottom = np.minimum(start[:, 1], end[:, 1]), np.maximum(start[:, 1], end[:, 1])
    rows = bottom - top
    y = np.arange(rows.sum()) - np.repeat(rows.cumsum() - rows, rows) + np.repeat(top, rows)
    place = y << 32 | np.repeat(start[:, 0], rows)
    ring = np.repeat(np.repeat(np.arange(len(rings)), [len(r.xy) // 2 for r in rings]), rows)
    order = place.argsort()
    place, ring = place[order], ring[order]
    n = np.searchsorted(place, xy[:, 1] << 32 | xy[:, 0]) - 1
    return np.where((n >= 0) & (place[n] >> 32 == xy[:, 1]), ring[n], -1)


def lesion_at(rings, pixels):
    """Tumour pixels (n, 2) x, y -> the number of the lesion's outer ring, for each."""
    rings_left = left_of(rings, pixels + (1, 0))
    return np.array([rings[n].parent if rings[n].is_hole else n for n in rings_left], int)


def to_polygons(rings, downsample):
    """Rings at 1 / `downsample` -> [(xy, is_tumour)] for an annotation, in level-0 pixels.

    Lesions are filled and holes cleared after them, so the outline of a hole goes around the
    lesions inside it: they are left as they are.
    """
    islands = defaultdict(list)
    for ring in rings:
        if not ring.is_hole and ring.parent >= 0:
            islands[ring.parent].append(ring.xy)
    return [
        (around(ring.xy, islands[n]) * downsample - 0.5, not ring.is_hole)
        for n, ring in enumerate(rings)
    ]


def around(ring, inner):
    """The ring (n, 2) with detours, the other way around each of `inner` [(m, 2)] -> one ring.

    All are clockwise. A detour starts where `ring` is near.
    """
    detours = []
    for xy in inner:
        n = int(np.abs(ring - xy[0]).sum(1).argmin())
        # There and back along one row and one column. Other slopes would not cancel out exactly:
        # where such an edge meets a row depends, in its last bit, on its direction.
        bridge = np.array([ring[n], (xy[0, 0], ring[n, 1]), xy[0]])
        detours.append((n, np.concatenate([bridge, xy[:0:-1], bridge[::-1]])))
    detours.sort(key=lambda detour: detour[0])
    pieces = np.split(ring, [n + 1 for n, _ in detours])
    for n, (_, detour) in enumerate(detours):
        pieces.insert(2 * n + 1, detour)
    return np.concatenate(pieces)


def diameters(rings):
    """Largest extent of each ring in any direction, in pixels: (len(rings),), exact to .004 %."""
    if not rings:
        return np.zeros(0)
    xy = np.concatenate([ring.xy for ring in rings])
    first = np.cumsum([0] + [len(ring.xy) for ring in rings[:-1]])
    longest = np.zeros(len(rings))
    for angle in np.radians(np.arange(180)):
        along = xy @ (np.cos(angle), np.sin(angle))
        extent = np.maximum.reduceat(along, first) - np.minimum.reduceat(along, first)
        longest = np.maximum(longest, extent)
    return longest


def write_annotation(path, polygons):
    """[(xy, is_tumour)] -> ASAP XML, groups `metastases` and `normal` as in CAMELYON17."""
    groups = {True: "metastases", False: "normal"}
    lines = ['<?xml version="1.0"?>', "<ASAP_Annotations>", "<Annotations>"]
    for n, (xy, is_tumour) in enumerate(polygons):
        lines.append(
            f'<Annotation Name="{n}" Type="Polygon" PartOfGroup="{groups[is_tumour]}" '
            'Color="#F4FA58">\n<Coordinates>'
        )
        lines += [
            f'<Coordinate Order="{k}" X="{x}" Y="{y}" />' for k, (x, y) in enumerate(xy.tolist())
        ]
        lines.append("</Coordinates>\n</Annotation>")
    lines += ["</Annotations>", "<AnnotationGroups>"]
    for name, colour in zip(groups.values(), ("#ff0000", "#00ff00")):
        lines.append(
            f'<Group Name="{name}" PartOfGroup="None" Color="{colour}"><Attributes /></Group>'
        )
    lines += ["</AnnotationGroups>", "</ASAP_Annotations>"]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
