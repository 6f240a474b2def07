"""Masks to outlines and back: against floods, loops over pixels, all pairs."""

import functools

import numpy as np
import pytest

from extras import outline
from slide import Annotation, read_annotation


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
        polygons = outline.to_shapes(outline.trace(strips(mask, 1 + n % 9)), downsample)
        outline.write_annotation(tmp_path / "a.xml", polygons)
        again = read_annotation(tmp_path / "a.xml")
        assert sum(map(len, again.rings.values())) == len(polygons)
        assert np.array_equal(again.mask(0, 0, *mask.shape[::-1], downsample), mask), mask
        level_0 = np.kron(mask, np.ones((downsample, downsample)))
        assert np.array_equal(again.mask(0, 0, *level_0.shape[::-1]), level_0)


def test_rings_are_the_lesions_and_their_holes():
    for n, mask in list(enumerate(MASKS))[::3]:
        rings, slow = outline.trace(strips(mask)), regions(n)
        assert sorted(r.area for r in rings) == sorted(int(r.sum()) for r in slow)
        lesions = list(components(mask, corners=True))
        assert sum(not ring.is_hole for ring in rings) == len(lesions)
        assert outline.area(rings) == mask.sum()


def test_specks_and_small_holes_go_with_all_that_is_in_them():
    for n, mask in list(enumerate(MASKS))[::3]:
        least, inside = n % 7 + 2, np.zeros(mask.shape, int)
        for region in regions(n):
            inside += region if region.sum() >= least else 0
        rings = outline.trace(strips(mask), least)
        again = Annotation(outline.to_shapes(rings, 1)).mask(0, 0, *mask.shape[::-1])
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
    for ring in rings:
        slow = max(np.hypot(*(a - b)) for a in ring.xy for b in ring.xy[::7])
        assert outline.diameter(ring) > slow * (1 - 4e-4)
        if len(ring.xy) < 30:
            slow = max(np.hypot(*(a - b)) for a in ring.xy for b in ring.xy)
            assert slow * (1 - 4e-4) < outline.diameter(ring) < slow * (1 + 1e-9)
