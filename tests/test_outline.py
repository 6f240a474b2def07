"""Masks to outlines and back, and fewer corners: against floods, loops over pixels, all pairs."""

import functools

import numpy as np
import pytest

import data
from extras import outline
from extras.simplify import simplify


def random_mask(rng):
    """Noise of any density, blocks of it, or blocks upon blocks: lesions in holes in lesions."""
    h, w = rng.integers(1, 16, 2)
    mask = rng.random((h, w)) < rng.choice([0.1, 0.3, 0.5, 0.7, 0.9])
    for _ in range(rng.integers(3)):
        mask = np.kron(mask, np.ones((2, 2), bool)) ^ (rng.random((2 * h, 2 * w)) < 0.03)
        h, w = mask.shape
    return mask


NESTED = np.pad(np.pad(np.pad(np.ones((1, 2), bool), 1), 1, constant_values=True), 1)
MASKS = [random_mask(np.random.default_rng(seed)) for seed in range(120)] + [NESTED]


def strips(mask, rows=7):
    return [mask[y : y + rows] for y in range(0, len(mask), rows)]


def flood(mask, start, corners):
    """Pixels of `mask` that `start` touches, over edges or also over corners."""
    seen, todo = np.zeros_like(mask), [start]
    while todo:
        y, x = todo.pop()
        inside = 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1]
        if not inside or seen[y, x] or not mask[y, x]:
            continue
        seen[y, x] = True
        steps = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if corners or not dy * dx]
        todo += [(y + dy, x + dx) for dy, dx in steps]
    return seen


def components(mask, corners):
    left = mask.copy()
    while left.any():
        yield (one := flood(mask, tuple(np.argwhere(left)[0]), corners))
        left &= ~one


@functools.cache
def regions(n):
    """What each ring of mask `n` should hold: a lesion with its holes filled, or a hole's all."""
    found = []
    for lesion in components(MASKS[n], corners=True):
        outside = flood(np.pad(~lesion, 1, constant_values=True), (0, 0), False)[1:-1, 1:-1]
        found += ~outside, *components(~outside & ~lesion, corners=False)
    return found


@pytest.mark.parametrize("downsample", [1, 4])
def test_outline_to_xml_to_mask_is_the_identity(tmp_path, downsample):
    for n, mask in enumerate([*MASKS, np.ones((3, 5), bool), np.zeros((4, 4), bool)]):
        polygons = outline.to_polygons(outline.trace(strips(mask, 1 + n % 9)), downsample)
        outline.write_annotation(tmp_path / "a.xml", polygons)
        again = data.read_annotation(tmp_path / "a.xml")
        assert len(again.polygons) == len(polygons)
        assert np.array_equal(again.mask(0, 0, *mask.shape[::-1], downsample), mask), mask
        level_0 = np.kron(mask, np.ones((downsample, downsample)))
        assert np.array_equal(again.mask(0, 0, *level_0.shape[::-1]), level_0)


def test_rings_are_the_lesions_and_their_holes():
    for n, mask in list(enumerate(MASKS))[::3]:
        rings, slow = outline.trace(strips(mask)), regions(n)
        assert sorted(r.area for r in rings) == sorted(int(r.sum()) for r in slow)
        lesions = list(components(mask, corners=True))
        assert sum(not ring.is_hole for ring in rings) == len(lesions)
        assert sum(-r.area if r.is_hole else r.area for r in rings) == mask.sum()


def test_specks_and_small_holes_go_with_all_that_is_in_them():
    for n, mask in list(enumerate(MASKS))[::3]:
        least, inside = n % 7 + 2, np.zeros(mask.shape, int)
        for region in regions(n):
            inside += region if region.sum() >= least else 0
        rings = outline.trace(strips(mask), least)
        again = data.Annotation(outline.to_polygons(rings, 1)).mask(0, 0, *mask.shape[::-1])
        assert np.array_equal(again, inside % 2)


def test_every_pixel_is_of_the_lesion_that_holds_it():
    for mask in MASKS[::3]:
        rings = outline.trace(strips(mask))
        for lesion in components(mask, corners=True):
            numbers = outline.lesion_at(rings, np.argwhere(lesion)[:, ::-1])
            assert len(set(numbers.tolist())) == 1 and not rings[numbers[0]].is_hole
            y, x = np.argwhere(lesion)[0]
            assert rings[numbers[0]].xy[0].tolist() == [x, y]


def test_a_lesion_in_a_hole_knows_its_hole_and_a_hole_its_lesion():
    outer, hole, inner = outline.trace(strips(NESTED))
    assert (outer.is_hole, hole.is_hole, inner.is_hole) == (False, True, False)
    assert (outer.parent, hole.parent, inner.parent) == (-1, 0, 1)


def test_diameter_is_the_largest_distance_between_corners():
    rings = [ring for mask in MASKS for ring in outline.trace(strips(mask))]
    for ring, fast in zip(rings, outline.diameters(rings)):
        slow = max(np.hypot(*(a - b)) for a in ring.xy for b in ring.xy[::7])
        assert fast > slow * (1 - 1e-4)
        if len(ring.xy) < 30:
            slow = max(np.hypot(*(a - b)) for a in ring.xy for b in ring.xy)
            assert slow * (1 - 1e-4) < fast < slow * (1 + 1e-9)
    assert len(outline.diameters([])) == 0


# ------------------------------------------------------------------------------------ fewer corners

SIMPLIFIED = [(n, px) for n in range(0, len(MASKS), 3) for px in (1, 2, 4)]  # NESTED is the last


@functools.cache
def both(n, px):
    rings = outline.trace(strips(MASKS[n]))
    return rings, simplify(rings, px)


def edges(rings):
    """All edges -> their ends (n, 2), (n, 2), and the ring of each."""
    start = np.concatenate([ring.xy for ring in rings])
    end = np.concatenate([np.roll(ring.xy, -1, 0) for ring in rings])
    return start, end, np.repeat(np.arange(len(rings)), [len(ring.xy) for ring in rings])


def side(a, b, p):
    """Of which side of a b is p: > 0, 0, < 0, exact for sixteenths of pixels."""
    u, v = b - a, p - a
    return np.sign(u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0])


def meet(a, b, c, d):
    """Whether the closed segments a b and c d have a point in common."""
    boxes = (np.maximum(a, b) >= np.minimum(c, d)) & (np.maximum(c, d) >= np.minimum(a, b))
    across = side(a, b, c) * side(a, b, d) <= 0
    return across & (side(c, d, a) * side(c, d, b) <= 0) & boxes.all(-1)


def apart(p, a, b):
    """Distances (n, m) of the points p (n, 2) to the segments a b (m, 2)."""
    p, edge = p[:, None], (b - a)[None]
    along = ((p - a) * edge).sum(2) / np.maximum((edge**2).sum(2), 1e-9)
    return np.linalg.norm(p - a - along.clip(0, 1)[..., None] * edge, axis=2)


def inside(p, xy):
    """Whether p lies in the ring, by the edges that a ray to the right crosses."""
    (x1, y1), (x2, y2) = xy.T, np.roll(xy, -1, 0).T
    crossed = (y1 > p[1]) != (y2 > p[1])
    height = np.where(y2 == y1, 1, y2 - y1)
    return bool((crossed & (x1 + (p[1] - y1) * (x2 - x1) / height > p[0])).sum() % 2)


def test_no_two_simplified_edges_meet_but_at_a_corner_that_they_share():
    """So no ring crosses or touches itself or another: Douglas-Peucker alone gives knots."""
    for n, px in SIMPLIFIED:
        _, rings = both(n, px)
        if not rings:
            continue
        a, b, _ = edges(rings)
        found = meet(a[:, None], b[:, None], a[None], b[None])
        shared = (a[:, None] == b[None]).all(2) | (b[:, None] == a[None]).all(2)
        assert not (found & ~shared & ~np.eye(len(a), dtype=bool)).any(), (n, px)
        for ring in rings:  # an edge that goes back on the one before it
            a, b, c = (np.roll(ring.xy, -k, 0) for k in range(3))
            assert not ((side(a, b, c) == 0) & (((b - a) * (c - b)).sum(1) < 0)).any(), (n, px)


def test_simplified_and_exact_outlines_are_nowhere_farther_apart_than_asked():
    for n, px in SIMPLIFIED:
        for exact, ring in zip(*both(n, px)):
            a, b, _ = edges([ring])
            assert apart(exact.xy, a, b).min(1).max() <= px + 1e-9
            along = np.linspace(0, 1, 9)[:, None, None]
            points = (a + along * (b - a)).reshape(-1, 2)
            assert apart(points, *edges([exact])[:2]).min(1).max() <= px + 1e-9


def test_no_ring_vanishes_turns_over_or_goes_into_another():
    for n, px in SIMPLIFIED:
        before, after = both(n, px)
        assert len(after) == len(before)
        for k, (exact, ring) in enumerate(zip(before, after)):
            (x, y), (u, v) = ring.xy.T, np.roll(ring.xy, -1, 0).T
            assert len(ring.xy) >= 3 and (x * v - y * u).sum() > 0
            pixel = exact.xy[0] + 0.5  # in the ring, as that begins at its upper left corner
            others = [m for m in range(len(before)) if m != k]
            expected = [inside(pixel, before[m].xy) for m in others]
            assert [inside(ring.xy[0], after[m].xy) for m in others] == expected, (n, px)


def test_a_lesion_in_a_bay_of_another_is_not_swallowed():
    mask = np.ones((12, 24), bool)
    mask[:3, 8:13] = False
    mask[0, 10] = True
    big, small = sorted(simplify(outline.trace([mask]), 4), key=lambda ring: -ring.area)
    assert len(big.xy) < 8 + 4 and not inside(small.xy.mean(0), big.xy)


def test_the_annotation_of_simplified_outlines_fills_lesions_and_clears_holes():
    for n, px in SIMPLIFIED:
        _, rings = both(n, px)
        shape, depth = MASKS[n].shape[::-1], 0
        for ring in rings:
            filled = data.winding(ring.xy - 0.5, *shape) != 0
            depth = depth + (-1 if ring.is_hole else 1) * filled
        found = data.Annotation(outline.to_polygons(rings, 1)).mask(0, 0, *shape)
        assert np.array_equal(found, np.broadcast_to(depth, found.shape))


def test_simplifying_leaves_few_corners_of_a_ragged_outline_and_all_where_it_is_off():
    yy, xx = np.mgrid[:400, :400]
    ragged = np.random.default_rng(0).normal(0, 3, (400, 400))
    rings = outline.trace([np.hypot(xx - 200, yy - 200) + ragged < 150], 50)
    corners = [sum(len(ring.xy) for ring in simplify(rings, px)) for px in (0, 1, 2, 4)]
    assert corners[0] == sum(len(ring.xy) for ring in rings)
    assert corners[1] < corners[0] / 2 and corners[2] < corners[0] / 4
    assert corners[3] < corners[0] / 8
    assert simplify([], 2) == []
