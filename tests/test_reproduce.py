"""The sweep: what it runs, that it goes on where it was stopped, and the arithmetic of its tables.

Training is made up, but for one run in a worker of its own.
"""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import TINY, call, ok, one_line_of
from PIL import Image

import data
import evaluate
import train
from extras import baselines, reproduce, tables


class Here:
    """A pool that carries out its jobs in this process, each when its result is asked for."""

    def __init__(self, *_):
        self.result = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, job, *args):
        later = Here()
        later.result = lambda: job(*args)
        return later


class Started(list):
    """Runs started: (folder's name, whether it was resumed); those numbered in `kill` stop."""

    kill = ()


@pytest.fixture
def started(monkeypatch):
    """Training made up: DSC is .5 + pixel fraction / 10 + seed / 100, the network untrained."""
    torch.manual_seed(0)
    weights = {name: baselines.network(name, 8).state_dict() for name in baselines.METHODS}
    started = Started()

    def made_up(argv, method=None):
        args, checkpoint = train.parse_args(argv)
        out = Path(args.out)
        started.append((out.name, bool(checkpoint)))
        run = vars(args) | ({"method": method} if method else {})
        content = {"model": weights[method or "transfer"], "args": run, "iteration": 1}
        torch.save(content, out / "last.pt")
        if len(started) in started.kill:
            raise KeyboardInterrupt
        if args.epochs == 7:
            raise data.DataError("seven")
        found = dict.fromkeys(("iou", "dsc_cancer_tiles", "dsc_mean_of_slides"), 0.123456789)
        found["dsc"] = 0.5 + args.pixel_frac / 10 + args.seed / 100
        found |= {"seconds": 60, "accuracy": None}
        (out / "results.json").write_text(json.dumps(found))

    monkeypatch.setattr(train, "main", made_up)
    monkeypatch.setattr(baselines, "main", lambda argv: made_up(argv[1:], argv[0]))
    monkeypatch.setattr(reproduce, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(reproduce, "as_completed", list)
    return started


def arguments(*argv):
    return reproduce.parse_args([str(a) for a in argv], [*tables.tables()])


@pytest.mark.parametrize("fractions", [[], ["--fractions", 0, 0.02, 1]])
def test_every_run_of_every_table_is_a_command_of_train(tmp_path, fractions):
    args = arguments("all", "--out", tmp_path, "--lr", 2e-3, *fractions)
    runs = {k: v for name in args.names for k, v in reproduce.runs_of(name, args).items()}
    seen = set()
    for (name, seed), flags in runs.items():
        argv = reproduce.command(args, flags, seed)
        method = argv.pop(0) if argv[0] in baselines.METHODS else None
        parsed, _ = train.parse_args(argv)
        assert parsed.lr == pytest.approx(2e-3 * (baselines.MIL_LR if method == "mil" else 1))
        seen.add((method, *(vars(parsed)[k.replace("-", "_")] for k in reproduce.OWN[:8])))
        assert parsed.seed == seed and parsed.pixel_frac == flags["pixel-frac"], name
    assert len(seen) == len(runs)  # no run under two names
    assert "image-frac=0,pixel-frac=0.02" * bool(fractions) in {name for name, _ in runs} | {""}


def test_the_same_settings_are_one_run():
    args = arguments("all", "--seeds", 1)
    one, two, three, four, five, strip = (
        reproduce.runs_of(name, args)
        for name in ("table1", "table2", "table3", "table4", "table5", "strip")
    )
    assert len(one | two | three) == 6 + 4 + 4  # beta 3, alpha 1, DWCE + DWCE are one
    assert four == five and len(four) == 4 * 11 - 2  # all masks, by tile or by slide: one
    assert "image-frac=0,label-unit=slide,pixel-frac=0" in {name for name, _ in four}
    assert strip.items() <= four.items() and ("pixel-frac=0.1", 0) in strip.keys() & one.keys()
    few = arguments("strip", "--fractions", 0, 0.2, 0.05)
    assert {name for name, _ in reproduce.runs_of("strip", few)} == {
        "image-frac=0,pixel-frac=0.05",
        "pixel-frac=0.05",
    }


def test_the_papers_figures_agree_with_each_other():
    """IoU = DSC / (2 - DSC) in every row but the headline; a wrong digit would show."""
    pairs = ("table1",) * 2, ("table2",) * 2, ("table3",) * 2, ("table4", "table5")
    for one, two in (*pairs, ("table6", "table7")):
        a, b = (tables.tables()[name] for name in (one, two))
        for row in a.rows:
            dsc, iou = a.published(row, "dsc"), b.published(row, "iou")
            assert list(dsc) == list(iou) and (not dsc or set(a.columns) <= set(dsc))
            for column, value in dsc.items():
                if row not in ("S+C", "this method") or column != "10 %":
                    near = 0.00015 if one == two else 0.002  # 4 digits there, 3 here
                    assert abs(value / (2 - value) - iou[column]) < near, (row, column)
    sc = tables.tables()["table4"].published("S+C", "dsc")
    assert tables.tables()["table6"].published("this method", "dsc").items() <= sc.items()


def test_differences_intervals_and_gaps_by_hand():
    assert tables.mean_sd([]) == "" and tables.mean_sd([1.0]) == "1.000"
    assert tables.mean_sd([0.5, 0.6]) == ".550 ± .071"
    # Mean .2, sd .1: half an interval is 4.303 * .1 / sqrt(3).
    assert tables.paired([0.1, 0.2, 0.3]) == "+.200 [-.048, .448]"
    # sd .1 sqrt(2): 12.706 * .1 = 1.2706, and no digit before the point may be lost.
    assert tables.paired([-10, -9.8]) == "-9.900 [-11.171, -8.629]"
    assert tables.paired([-0.1]) == "-.100" and tables.paired([]) == ""
    assert tables.gap_closed([0.7], [0.59, 0.61], [0.79, 0.81]) == "50 %"
    assert tables.gap_closed([0.7], [0.59, 0.61], [0.63, 0.65]) == "no gap"  # below .05
    assert tables.gap_closed([0.7], [0.4, 0.8], [0.79, 0.81]) == "no gap"  # .2 < 2 * .2
    assert tables.gap_closed([0.7], [0.6], [0.79, 0.81]) == ""  # no error from one seed


def test_tables_as_text():
    def measured(flags, metric):
        dsc = {0.02: 0.6, 0.1: 0.7, 1: 0.8}[flags["pixel-frac"]]
        dsc += 0.05 * ("image-frac" not in flags) - 0.3 * ("label-unit" in flags)
        return {} if dsc < 0.31 else {seed: dsc + seed / 100 for seed in (0, 1, 2)}

    lines = tables.markdown(tables.tables([0.02, 0.1, 1])["table4"], measured, "A.").split("\n")
    assert lines[:9] == [
        "| DSC, masks on | 2 % | 10 % | 100 % |",
        "| --- | --- | --- | --- |",
        "| S, paper |  | .728 | .868 |",
        "| S, here | .610 ± .010 | .710 ± .010 | .810 ± .010 |",
        "| S+C, paper |  | .831 | .871 |",
        "| S+C, here | .660 ± .010 | .760 ± .010 | .860 ± .010 |",
        "| S+C - S, paired | +.050 [.050, .050] | +.050 [.050, .050] | +.050 [.050, .050] |",
        "| gap closed | 25 % | 50 % | no gap |",
        "| S, masks by slide, here |  | .410 ± .010 | .810 ± .010 |",
    ]
    assert lines[-2].startswith("A. Mean ± sd, n = 3 seeds. Paired: ")

    def uneven(flags, metric):
        return {seed: flags.get("beta", 3) / 10 + seed / 10 for seed in range(flags["beta"] % 3)}

    text = tables.markdown(tables.tables()["table1"], uneven, "")
    assert "| DSC, paper | .8431 | .8437 | .8479 | .8450 | .8423 | .8419 |" in text
    assert "| DSC, here | .1000 (n = 1) | .2500 ± .0707 (n = 2) |  | .4000 (n = 1) |" in text
    assert "| DSC, max - min of means | .4500 |" in text and "| IoU, mean sd | .0707 |" in text
    assert "n as in the cells" in text
    losses = tables.tables()["table3"]
    text = tables.markdown(losses, lambda f, _: {0: 0.1 * (f["seg-loss"] == "ce") + 0.7}, "")
    assert "| DSC - CE + CE, paired |  | -.1000 | -.1000 | -.1000 | -.1000 |" in text
    assert "n = 1 seed." in text


def test_a_sweep_that_is_stopped_goes_on_and_gives_the_same_files(started, slides, tmp_path):
    argv = ["table6", "strip", "--data", slides, *TINY, "--fractions", 1, 0.1]
    whole, stopped = (["--seeds", 2, "--out", tmp_path / name] for name in ("whole", "stopped"))
    out = ok(reproduce.main, *argv, *whole)
    assert len(started) == 5 * 2 * 2  # S and four methods, two fractions, two seeds
    assert "| S, here | .515 ± .007 | .605 ± .007 |" in out
    for number in (2, 5):  # S, and transfer learning
        started.kill = {len(started) + number}
        status, _, err = call(reproduce.main, *argv, *stopped)
        assert status == 1 and "the same command goes on" in err
    listed = ok(reproduce.main, *argv, *stopped, "--list").splitlines()
    assert listed[0] == "table6: 20 runs, 15 missing, about 15 minutes"
    ok(reproduce.main, *argv, *stopped)
    assert len(started) == 20 + 2 + 5 + 15
    assert [name for name, resumed in started if resumed] == ["image-frac=0,pixel-frac=1,seed=0"]
    for name in ("table6.md", "strip.png"):
        one, two = ((tmp_path / folder / name).read_bytes() for folder in ("whole", "stopped"))
        assert one == two
    one, two = ((tmp_path / f / "runs.csv").read_text() for f in ("whole", "stopped"))
    assert one == two and len(one.splitlines()) == 21


def test_tables_need_the_rows_alone_and_pictures_the_checkpoints(started, slides, tmp_path):
    argv = ["--data", slides, *TINY, "--fractions", 0.1, "--seeds", 1, "--out", tmp_path]
    out = ok(reproduce.main, "table4", *argv)
    assert len(started) == 4 and out.count("| S, here | .510 |") == 1
    (tmp_path / "runs").rename(tmp_path / "gone")
    assert ok(reproduce.main, "table4", *argv) == out[out.index("| DSC") :]
    assert ok(reproduce.main, "strip", *argv, "--jobs", 0) == "" and len(started) == 4
    assert "strip.png" in ok(reproduce.main, "strip", *argv)
    assert len(started) == 6 and (tmp_path / "strip.png").exists()


def test_runs_of_other_settings_do_not_mix(started, slides, tmp_path):
    argv = ["strip", "--data", slides, *TINY, "--out", tmp_path]
    started.kill = {1}
    assert call(reproduce.main, *argv)[0] == 1
    status, out, err = call(reproduce.main, *argv, "--epochs", 3)  # a checkpoint, no row yet
    assert status == 1 and "1 of 2 runs failed" in err and "give another --out" in out
    assert "runs.csv" in one_line_of(*call(reproduce.main, *argv))  # is of 3 epochs now
    argv = [*argv[:-1], tmp_path / "new"]
    ok(reproduce.main, *argv)
    for flags in (["--epochs", 3], ["--batch-size", 4]):
        line = one_line_of(*call(reproduce.main, *argv, *flags))
        assert "runs.csv" in line and "give another --out" in line
    ok(reproduce.main, *argv, "--device", "cpu", "--workers", 1)  # the machine is no setting
    (row, *_) = csv.DictReader((tmp_path / "new/runs.csv").open())
    assert row["flags"] == (
        "--data slides --tile 64 --mpp 1.0 --width 8 --lr 0.003 --epochs 2 --pretrain-epochs 1 "
        "--batch-size 8"
    )
    assert row["accuracy"] == "" and row["seconds"] == "60" and row["slide_dsc"] == "0.123457"


def test_a_run_that_fails_is_named_and_the_tables_have_the_others(started, slides, tmp_path):
    argv = ["table4", "--data", slides, "--out", tmp_path, "--fractions", 1, "--seeds", 1]
    status, out, err = call(reproduce.main, *argv, "--epochs", 7)
    assert status == 1 and "2 of 2 runs failed" in err
    assert "1/2 image-frac=0,pixel-frac=1,seed=0: error: seven; see " in out
    assert "| S, here |  |" in out and "seven" in next(tmp_path.rglob("train.log")).read_text()


def test_pictures_show_tissue_with_outlines(started, slides, tmp_path, monkeypatch):
    found = torch.zeros(64, 64)
    found[20:40, 20:40] = 1
    monkeypatch.setattr(evaluate, "predict", lambda _, x, amp: [found.expand(len(x), -1, -1)] * 2)
    monkeypatch.setattr(evaluate, "count", lambda _, tiles, rows, run: np.ones((len(rows), 4)))
    argv = ["fig8", "strip", "--data", slides, *TINY, "--fractions", 0.1, "--seeds", 1]
    ok(reproduce.main, *argv, "--out", tmp_path)
    side, left, top = reproduce.PITCH, reproduce.MARGIN, reproduce.HEAD
    for name, columns, lines in (("fig8", 3, 12), ("strip", 4, 3)):
        picture = np.asarray(Image.open(tmp_path / f"{name}.png"))
        assert picture.shape == (top + lines * side, left + columns * side, 3)
        panels = picture[top : top + side, left:].reshape(side, columns, side, 3)
        tile, truth, *predicted = panels.transpose(1, 0, 2, 3)
        green = (truth == reproduce.GREEN).all(2)
        assert green.any() and (tile == truth)[~green].all() and tile[:200, :200].std() > 5
        for panel in predicted:
            yellow = (panel == reproduce.YELLOW).all(2)
            assert yellow.sum() == 4 * (20 * 224 // 64 - 1) and (tile == panel)[~yellow].all()
        assert (picture[:top, left:] < 128).any() and (picture[top:, :left] < 128).any()  # texts


def test_tiles_are_chosen_by_rule():
    class Tiles:  # tile n has n pixels of tumour, of which odd ones touch the edge
        def __getitem__(self, key):
            mask = torch.zeros(9, 9)
            mask[1 : 1 + key[0] % 7, 1] = 1
            mask[0, 0] = key[0] % 2
            return None, mask, 1

    rows, share = np.arange(20), np.linspace(0.06, 1, 20)
    assert reproduce.choose("fig7", Tiles(), rows, share).tolist() == [0, 2, 4]
    assert reproduce.choose("fig7", Tiles(), rows[1::2], share[1::2]).tolist() == [1, 3, 5]
    assert reproduce.choose("fig8", Tiles(), rows, share).tolist() == [16, 15, 14]
    assert reproduce.choose("strip", Tiles(), rows[:5], [5, 4, 3, 2, 1]).tolist() == [3, 2, 1]


def test_a_worker_trains(slides, tmp_path):
    argv = ["table4", "--data", slides, *TINY[:4], "--width", 4, "--epochs", 1]
    args = arguments(*argv, "--out", tmp_path)
    run = "image-frac=0,pixel-frac=1", 0
    assert reproduce.carry_out_all(args, {run: {"image-frac": 0, "pixel-frac": 1}}) == 0
    (row,) = reproduce.read_rows(args.rows, args.flags).items()
    results = json.loads((reproduce.folder(args, *run) / "results.json").read_text())
    assert row[0] == run and row[1]["dsc"] == pytest.approx(results["dsc"], rel=1e-5)
    assert "train: 8 slides" in (reproduce.folder(args, *run) / "train.log").read_text()
    evaluate.load(reproduce.folder(args, *run) / "last.pt")


def test_what_is_not_known_is_refused():
    for argv in (["table9"], ["--mpp", 2, "table4"], ["table4", "--seeds", 11]):
        one_line_of(*call(reproduce.main, *argv))
    for flag in reproduce.OWN[:-2] + ["resume"]:
        assert "leave it out" in one_line_of(*call(reproduce.main, "table1", f"--{flag}", 1))
    assert "multiple of 8" in one_line_of(*call(reproduce.main, "table1", "--tile", 60))
    assert "shares" in one_line_of(*call(reproduce.main, "table4", "--fractions", 0))
