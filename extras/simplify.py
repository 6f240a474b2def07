"""Fewer corners for outlines, near the exact ones and never across each other.

    rings = simplify(outline.trace(strips), 2)      # every outline within 2 pixels of the exact one

Corners go one by one, as in Visvalingam's method, not by chords as in Douglas and Peucker's, since
then a look at one triangle tells whether an outline would cross another.
"""

import numpy as np

UNIT = 16  # coordinates are whole sixteenths of a pixel: tests of what lies where are exact


def simplify(rings, px):
    """[Ring] -> the same rings with fewer corners, float, none farther off than `px` pixels.

    A corner goes only if it and all that went between its neighbours stay within `px` of the new
    edge: .71 or less changes nothing. A ring keeps its first corner, and 3 at least.
    """
    # Rings that are disjoint stay so, none vanishes and none is jumped over: a corner b between a
    # and c goes only if no other corner lies in the triangle abc. Then no edge does either, since
    # it would have to end there or cross ab or bc. Those that go at once are never neighbours.
    if not rings or not px:
        return rings
    exact = np.concatenate([ring.xy for ring in rings]) * UNIT
    ring_of = np.repeat(np.arange(len(rings)), [len(ring.xy) for ring in rings])
    xy = apart(rings)
    order = np.random.default_rng(0).permutation(len(exact))  # breaks ties on stairs
    at = np.arange(len(exact))  # the corners that are left
    blocked = np.zeros(len(exact), bool)  # by another corner, as long as a and c stay
    while True:
        before, after, count = neighbours(ring_of[at])
        error = errors(exact, xy, at, before, after)
        may_go = (error <= px * UNIT) & (count > 4) & (before < np.arange(len(at))) & ~blocked[at]
        # Of two neighbours one goes at a time, that of the smaller error.
        place = np.empty(len(at), int)
        place[np.lexsort((order[at], error, ~may_go))] = np.arange(len(at))
        tried = np.flatnonzero(may_go & (place < np.minimum(place[before], place[after])))
        if not len(tried):
            break
        free = clear(xy[at], before[tried], tried, after[tried])
        blocked[at[tried[~free]]] = True
        gone = tried[free]
        blocked[at[before[gone]]] = blocked[at[after[gone]]] = False
        at = np.delete(at, gone)
    left = np.split(xy[at] / UNIT, np.flatnonzero(np.diff(ring_of[at])) + 1)
    return [ring._replace(xy=corners) for ring, corners in zip(rings, left)]


def apart(rings):
    """Corners of all rings (n, 2) in UNITs, moved so that no two rings, or parts of one, touch.

    They touch where two tumour pixels meet at a corner only: each goes 1/16 px into its background.
    """
    exact, left = np.concatenate([ring.xy for ring in rings]), []
    for xy, is_hole, *_ in rings:  # clockwise: background is to the left of a lesion's outline
        turn = np.sign(xy - np.roll(xy, 1, 0)) + np.sign(np.roll(xy, -1, 0) - xy)
        left.append(turn[:, ::-1] * ((-1, 1) if is_hole else (1, -1)))
    _, place, count = np.unique(exact @ (1, 1 << 32), return_inverse=True, return_counts=True)
    return exact * UNIT + np.concatenate(left) * (count[place] == 2)[:, None]


def neighbours(ring):
    """Ring numbers of corners, sorted -> places of the corners before and after, corners in it."""
    n = np.arange(len(ring))
    first = np.flatnonzero(np.diff(ring, prepend=-1))
    count = np.diff(first, append=len(ring))
    before, after = n - 1, n + 1
    before[first], after[first + count - 1] = first + count - 1, first
    return before, after, np.repeat(count, count)


def errors(exact, xy, at, before, after):
    """How far the exact outline would be from the edge that is left if a corner went, for each."""
    n = np.repeat(np.arange(len(at)), np.diff(at, append=len(exact)))  # last corner before a point
    mine = distance(exact, xy[at[before]][n], xy[at[after]][n])
    next_ones = distance(exact, xy[at][n], xy[at[after[after]]][n])
    mine, next_ones = (np.maximum.reduceat(d, at) for d in (mine, next_ones))
    return np.maximum(mine, next_ones[before])


def distance(p, a, b):
    """Of points to the segments a b, all (n, 2)."""
    edge, to = b - a, p - a
    length = np.maximum((edge * edge).sum(1), 1)
    to = to - edge * np.clip((edge * to).sum(1) / length, 0, 1)[:, None]
    return np.hypot(*to.T)


def clear(xy, a, b, c):
    """Whether no corner of `xy` but its own lies in or on the triangle of places a, b, c."""
    row = (xy[:, 1] + UNIT // 2) // UNIT
    order = np.lexsort((xy[:, 0], row))
    key = ((row << 32) + xy[:, 0])[order]
    box = row[[a, b, c]], xy[[a, b, c], 0]
    top, left = (side.min(0) for side in box)
    bottom, right = (side.max(0) for side in box)
    triangle, n = spread(bottom - top + 1)
    rows = top[triangle] + n << 32
    start = np.searchsorted(key, rows + left[triangle])
    stop = np.searchsorted(key, rows + right[triangle], "right")
    which, n = spread(stop - start)
    triangle, point = triangle[which], order[start[which] + n]
    a, b, c = a[triangle], b[triangle], c[triangle]
    other = (point != a) & (point != b) & (point != c)
    triangle, point, a, b, c = (v[other] for v in (triangle, point, a, b, c))
    sides = [cross(xy[p], xy[q], xy[point]) for p, q in ((a, b), (b, c), (c, a))]
    inside = (np.min(sides, 0) >= 0) | (np.max(sides, 0) <= 0)
    return np.bincount(triangle[inside], minlength=len(top)) == 0


def spread(count):
    """Counts -> for each of their sum: the number of the count, and 0, 1, ... within it."""
    which = np.repeat(np.arange(len(count)), count)
    return which, np.arange(len(which)) - (count.cumsum() - count)[which]


def cross(a, b, p):
    """> 0 where p is to the right of a b, y downwards; 0 on the line."""
    (x, y), (u, v) = (b - a).T, (p - a).T
    return x * v - y * u
