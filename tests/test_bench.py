"""The measurements run, and every way and reader has its row or column; times are not tested."""

import shutil

import pytest
from jobs import ok

from extras import bench
from slide import Slide


def test_the_steps_are_timed(monkeypatch):
    monkeypatch.setattr(bench.Timer, "blocked_autorange", lambda timer, **_: timer.timeit(1))
    lines = ok(bench.main, "steps", "--width", 4, "--tile", 16).splitlines()
    assert lines[2].startswith("| width 4, 8 tiles of 16 px |")
    assert [line.split(" | ")[0] for line in lines[4:]] == [
        "| as it is",
        "| NCHW, not channels_last",
        "| --amp",
    ]


def test_the_readers_are_timed_and_give_the_same_pixels(monkeypatch, tmp_path):
    pytest.importorskip("imagecodecs")
    monkeypatch.setattr(bench, "SIDE", 2048)
    monkeypatch.setattr(bench, "ROUNDS", 1)
    lines = ok(bench.main, "reads").splitlines()
    assert "| limit | ours |" in lines[2] and len(lines) == 4 + 4
    bench.draw(tmp_path / "s.tif")
    readers = bench.readers_of(tmp_path / "s.tif")
    ours = readers["ours"](300, 500, 600).astype(int)
    for name in readers.keys() - {"ours", "limit"}:
        assert abs(readers[name](300, 500, 600) - ours).max() <= 2, name


def test_the_index_of_a_large_slide_is_timed_on_blocks_that_share_their_bytes(
    monkeypatch, tmp_path
):
    bench.draw_large(tmp_path / "a.tif", 4096, 8192, 3)
    slide = Slide(tmp_path / "a.tif")
    assert (tmp_path / "a.tif").stat().st_size < 200_000 and len(slide.levels) == 3
    used = slide.levels[0].counts > 0
    assert 0.1 < used.mean() < 0.3 and len(set(slide.levels[0].offsets[used].tolist())) == 1
    monkeypatch.setattr(bench, "draw_large", lambda path: shutil.copy(tmp_path / "a.tif", path))
    (line,) = (x for x in ok(bench.main, "index").splitlines() if "tiles of 512 px" in x)
    assert int(line.split()[0]) == 4
