"""The measurements run, and every way and reader has its row or column; times are not tested."""

import pytest
from jobs import ok

from extras import bench


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
