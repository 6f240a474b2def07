"""Outlines of a mask: the inverse of slide.Annotation.mask, exact to the pixel; ASAP's XML of them.

    rings = trace(strips)                   # a mask in strips of rows, (h, W) bool, top to bottom
    polygons = to_shapes(rings, 4)        # [(xy, kind)] in level-0 pixels, downsample 4

A ring runs between the pixels. Its corner (x, y) is the upper left one of pixel (x, y), so it lies
at (x - .5, y - .5) of the mask's level. Tumour pixels that touch at a corner are of one lesion, as
in CAMELYON's own scoring; holes are the other way round. numpy alone: copy this file.
"""

import xml.etree.ElementTree as ElementTree
from itertools import chain
from typing import NamedTuple
from xml.etree.ElementTree import SubElement

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
        pixels = int(((ring[::2, 0] - ring[1::2, 0]) * ring[::2, 1]).sum())
        if pixels >= min_area:
            rings.append(Ring(ring, not code[first] & 8, pixels, -1))
    # To the left of a ring's first corner is the ring around it, or one beside it, seen before.
    for n, left in enumerate(left_of(rings, np.array([ring.xy[0] for ring in rings])).tolist()):
        if left >= 0:
            same = rings[left].is_hole == rings[n].is_hole
            rings[n] = rings[n]._replace(parent=rings[left].parent if same else left)
    return rings


def corners(strips):
    """Places where outlines turn -> x, y, code (see TURNS), row by row."""
    strips = iter(strips)
    first = next(strips)
    parts, top, above = [np.zeros((3, 0), int)], 0, np.zeros_like(first[:1])
    for strip in chain([first], strips, [above]):  # background above, and below
        if above.any() or strip.any():
            a = np.pad(np.concatenate([above, strip]), ((0, 0), (1, 1))).view(np.uint8)
            code = a[:-1, :-1] | a[:-1, 1:] << 1 | a[1:, :-1] << 2 | a[1:, 1:] << 3
            y, x = np.nonzero(TURNS[code])
            parts.append(np.stack([x, y + top, code[y, x]]))
        top, above = top + len(strip), strip[-1:]
    return np.concatenate(parts, 1)


def left_of(rings, xy):
    """For each (x, y): the number of the ring whose upright edge in pixel row y is next below x."""
    if not rings:
        return np.full(len(xy), -1)
    x = np.concatenate([ring.xy[1::2, 0] for ring in rings])
    ends = [(ring.xy[1::2, 1], np.roll(ring.xy[::2, 1], -1)) for ring in rings]
    top, bottom = np.sort(np.concatenate(ends, 1), 0)
    ring = np.repeat(np.arange(len(rings)), [len(ring.xy) // 2 for ring in rings])
    # Every pixel row of every edge, by row and x.
    rows = bottom - top
    edge = np.repeat(np.arange(len(x)), rows)
    place = (np.arange(len(edge)) - (rows.cumsum() - rows - top)[edge]) << 32 | x[edge]
    order = place.argsort()
    n = np.searchsorted(place[order], xy[:, 1] << 32 | xy[:, 0]) - 1
    edge_left = order[n]
    return np.where((n >= 0) & (place[edge_left] >> 32 == xy[:, 1]), ring[edge[edge_left]], -1)


def lesion_at(rings, pixels):
    """Tumour pixels (n, 2) x, y -> the number of the lesion's outer ring, for each."""
    rings_left = left_of(rings, pixels + (1, 0))
    return np.array([rings[n].parent if rings[n].is_hole else n for n in rings_left], int)


def area(rings):
    """Tumour pixels of all lesions."""
    return sum(-ring.area if ring.is_hole else ring.area for ring in rings)


def diameter(ring):
    """Largest extent in any direction, in pixels, exact to .04 %."""
    angle = np.radians(np.arange(0, 180, 3))
    return np.ptp(ring.xy @ (np.cos(angle), np.sin(angle)), axis=0).max()


def to_shapes(rings, downsample):
    """Rings at 1 / `downsample` -> [(xy, kind)] for an Annotation, in level-0 pixels.

    Lesions are filled and holes cleared after them, so the outline of a hole goes around the
    lesions inside it: they are left as they are.
    """
    islands = [[] for _ in rings]
    for ring in rings:
        if ring.parent >= 0:
            islands[ring.parent].append(ring.xy)
    shapes = []
    for ring, inner in zip(rings, islands):
        kind, detours = ("exclusion", inner) if ring.is_hole else ("tumour", [])
        shapes.append((around(ring.xy, detours) * downsample - 0.5, kind))
    return shapes


def around(ring, inner):
    """The ring (n, 2) with detours, the other way around each of `inner` [(m, 2)] -> one ring.

    All are clockwise. A detour starts where `ring` is near.
    """
    for xy in inner:
        n = int(np.abs(ring - xy[0]).sum(1).argmin())
        # There and back along one row and one column. Other slopes would not cancel out exactly:
        # where such an edge meets a row depends, in its last bit, on its direction.
        bend = [(xy[0, 0], ring[n, 1])]
        ring = np.concatenate([ring[: n + 1], bend, xy[:1], xy[::-1], bend, ring[n:]])
    return ring


def cut_holes(polygons):
    """[(kind, [outer ring, *holes])] -> [(xy, kind)]: a hole takes away exactly its own area.

    All rings are clockwise. ValueError for holes that cannot be cut out of their outline alone.
    """
    shapes = []
    for n, (kind, (ring, *holes)) in enumerate(polygons):
        if not holes:
            shapes.append((ring, kind))
        elif is_valid(ring, holes):
            # Not exclusions: they would also clear a lesion that lies in a hole.
            shapes.append((around_all(ring, holes), kind))
        else:
            cut, others = np.concatenate(holes), polygons[:n] + polygons[n + 1 :]
            lesions = [rings[0] for other, rings in others if other == "tumour"]
            apart = [(cut.max(0) < xy.min(0)) | (xy.max(0) < cut.min(0)) for xy in lesions]
            if kind != "tumour" or not all(beside.any() for beside in apart):
                raise ValueError(f"a hole in {kind} crosses its outline or another hole")
            shapes += [(ring, kind), *((hole, "exclusion") for hole in holes)]
    return shapes


def is_valid(ring, holes):
    """Whether the holes lie in the ring and apart, and none of all crosses itself.

    Then along every row of pixels the winding number of each, and that of `ring` less those of
    the holes, is 0 or 1.
    """
    rings = [ring, *holes]
    x1, y1 = np.concatenate(rings).T
    x2, y2 = np.concatenate([np.roll(ring, -1, axis=0) for ring in rings]).T
    n = np.repeat(np.arange(len(rings)), [len(ring) for ring in rings])
    top, bottom = (np.ceil(f(y1, y2)).astype(int) for f in (np.minimum, np.maximum))
    rows = bottom - top
    edge = np.repeat(np.arange(len(n)), rows)
    y = np.arange(len(edge)) - np.repeat(rows.cumsum() - rows, rows) + top[edge]
    x = x1[edge] + (y - y1[edge]) * (x2 - x1)[edge] / (y2 - y1)[edge]
    turn, n = np.where(y2 > y1, -1, 1)[edge], n[edge]
    for keys, turns in ((x, y, n), turn), ((x, y), np.where(n > 0, -turn, turn)):
        order = np.lexsort(keys)
        winding = turns[order].cumsum()[:-1]  # 0 after the last crossing of a row
        apart = np.diff(x[order]) > 0.01  # px: exports are rounded
        if not np.isin(winding[apart], (0, 1)).all():
            return False
    return True


def around_all(ring, holes):
    """As `around`, but one detour goes from hole to hole and back: for any number of holes.

    From top to bottom its columns add up to one height, and masks take time for columns alone.
    """
    way, parts = [ring[0]], [ring, ring[:1]]
    for hole in sorted(holes, key=lambda hole: hole[0, 1]):
        bend = np.array([way[-1][0], hole[0, 1]])
        parts += [[bend], hole[:1], hole[::-1]]
        way += [bend, hole[0]]
    return np.concatenate([*parts, way[-2::-1]])


def write_annotation(path, shapes):
    """[(xy, kind)] as in slide.Annotation -> ASAP XML; outlines in CAMELYON17's groups."""
    group_of = {"tumour": "metastases", "exclusion": "normal"}  # a region's group is its kind
    colours = {"metastases": "#ff0000", "normal": "#00ff00"}
    colours |= {kind: "#0000ff" for _, kind in shapes if kind not in group_of}
    root = ElementTree.Element("ASAP_Annotations")
    nodes, groups = SubElement(root, "Annotations"), SubElement(root, "AnnotationGroups")
    for n, (xy, kind) in enumerate(shapes):
        about = {"PartOfGroup": group_of.get(kind, kind), "Color": "#F4FA58"}
        node = SubElement(nodes, "Annotation", about, Name=str(n), Type="Polygon")
        points = SubElement(node, "Coordinates")
        for k, (x, y) in enumerate(xy.tolist()):
            SubElement(points, "Coordinate", Order=str(k), X=str(x), Y=str(y))
    for name, colour in colours.items():
        group = SubElement(groups, "Group", Name=name, PartOfGroup="None", Color=colour)
        SubElement(group, "Attributes")
    ElementTree.indent(root, "")  # a line for each
    ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)
