"""The sweep: what it runs, that it goes on where it was stopped, and the arithmetic of its tables.

Training is made up, but for one run in a worker of its own.
"""

import csv
import json
import re
import shutil
import sys
from math import isnan, log10
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import QUICK, TINY, call, ok, one_line_of
from PIL import Image

import data
import evaluate
import train
from extras import baselines, plots, reproduce, tables
from slide import DataError


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
            raise DataError("seven")
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
    return reproduce.parse_args([str(a) for a in argv])


@pytest.mark.parametrize("fractions", [[], ["--fractions", 0, 0.02, 1]])
def test_every_run_of_every_table_is_a_command_of_train(tmp_path, monkeypatch, fractions):
    """Those of a method are of baselines, which multiplies only an lr that it is not given."""
    args = arguments("all", "--out", tmp_path, "--lr", 2e-3, *fractions)
    runs = set().union(*(reproduce.runs_of(name, args) for name in args.names))
    commands, seen = [], set()

    def keep(argv, method=None):
        commands.append((method, train.parse_args(argv)[0]))
        raise DataError("enough")

    monkeypatch.setattr(train, "main", keep)
    monkeypatch.setattr(baselines, "main", lambda argv: keep(argv[1:], argv[0]))
    for name, seed in runs:
        reproduce.carry_out(args, name, seed)
        method, parsed = commands.pop()
        assert parsed.lr == pytest.approx(2e-3 * (baselines.MIL_LR if method == "mil" else 1))
        seen.add((method, *(vars(parsed)[k] for k in reproduce.VARIED)))
        assert parsed.seed == seed and f"pixel-frac={parsed.pixel_frac:g}" in name.split(",")
    assert len(seen) == len(runs)  # no run under two names
    assert not fractions or ("image-frac=0,pixel-frac=0.02", 0) in runs


def test_the_same_settings_are_one_run():
    args = arguments("all", "--seeds", 1)
    one, two, three, four, five, strip = (
        reproduce.runs_of(name, args)
        for name in ("table1", "table2", "table3", "table4", "table5", "strip")
    )
    assert len(one | two | three) == 6 + 4 + 4  # beta 3, alpha 1, DWCE + DWCE are one
    assert four == five and len(four) == 6 * 11 - 3  # all masks, by tile or by slide: one
    assert ("image-frac=0,label-unit=slide,pixel-frac=0", 0) in four
    assert strip < four and len(strip) == 3 and ("pixel-frac=0.1", 0) in four & one
    flags = [f"--{name}={value}" for name, value in tables.DEFAULTS.items()]
    said, unsaid = (vars(train.parse_args(argv)[0]) for argv in (flags, []))
    assert said | {"out": ""} == unsaid | {"out": ""}  # a name leaves out what train.py does


def test_the_papers_figures_agree_with_each_other():
    """IoU = DSC / (2 - DSC) in every row but the headline; a wrong digit would show."""
    columns = {"beta": 6, "alpha": 5, "class + segmentation loss": 5}
    for (title, row), dsc in tables.PUBLISHED.items():
        if "IoU" not in title + row:
            iou = tables.PUBLISHED[title.replace("DSC", "IoU"), row.replace("DSC", "IoU")]
            dsc, iou = dsc.split(), iou.split()
            assert len(dsc) == len(iou) == columns.get(title, len(tables.FRACTIONS))
            for n, (one, two) in enumerate(zip(dsc, iou)):
                if "-" in (one, two):
                    assert one == two and tables.FRACTIONS[n] not in tables.COMPARED
                elif row != "S+C" or tables.FRACTIONS[n] != 0.1:
                    near = 0.00015 if title in columns else 0.002  # 4 digits there, 3 here
                    assert abs(float(one) / (2 - float(one)) - float(two)) < near, (row, n)


def test_differences_intervals_and_gaps_by_hand():
    def cell(*values):
        return dict(enumerate(values))

    def gap_closed(sc, s, full):
        return tables.gap_closed(cell(*sc), cell(*s), cell(*full))

    assert tables.mean_sd({}) == "" and tables.mean_sd({2: 1.0}) == "1.000 (n = 1)"
    assert tables.mean_sd(cell(0.5, 0.6)) == "0.550 ± 0.071 (n = 2)"
    # Mean .2, sd .1: half an interval is 4.303 * .1 / sqrt(3).
    found = tables.paired(cell(0.2, 0.4, 0.6), cell(0.1, 0.2, 0.3) | {7: 1})
    assert found == "+0.200 [-0.048, 0.448] (n = 3)"
    # sd .1 sqrt(2): 12.706 * .1 = 1.2706.
    found = tables.paired(cell(-10, -9.8), cell(0, 0))
    assert found == "-9.900 [-11.171, -8.629] (n = 2)"
    assert tables.paired(cell(0.1), cell(0.2)) == "-0.100 (n = 1)"
    assert tables.paired(cell(0.1), {}) == tables.paired({}, cell(0.1)) == ""
    assert gap_closed([0.7, 0.7], [0.59, 0.61], [0.79, 0.81]) == "50 %"
    assert gap_closed([0.7, 0.7], [0.59, 0.61], [0.63, 0.65]) == "no gap"  # below .05
    assert gap_closed([0.7, 0.7], [0.4, 0.8], [0.79, 0.81]) == "no gap"  # .2 < 2 * .2
    assert gap_closed([0.7], [0.6], [0.79, 0.81]) == ""  # no error from one seed
    same = gap_closed([0.7, 0.7], [0.59, 0.61, 0.1], [0.79, 0.81, 0.9])  # of seeds 0 and 1
    assert same == "50 %"


def test_tables_as_text():
    table, rows = tables.tables([0.02, 0.1, 1])["table4"], {}
    for group, column in ((g, c) for g in table.rows for c in table.columns):
        dsc = {"2 %": 0.6, "10 %": 0.7, "100 %": 0.8}[column] + 0.05 * group.startswith("S+C")
        by_slide = "slide" in group and column != "100 %"  # all masks are all masks
        if not by_slide or group == "S, masks by slide" and column == "10 %":
            for seed in (0, 1, 2):
                found = dsc - 0.3 * by_slide + seed / 100
                rows[table.run(group, column), seed] = {"dsc": found, "iou": 0.0}
    lines = tables.markdown(table, rows, "A.").split("\n")
    assert lines[:13] == [
        "| DSC, masks on | 2 % | 10 % | 100 % |",
        "| --- | --- | --- | --- |",
        "| S, paper |  | .728 | .868 |",
        "| S, here | .610 ± .010 (n = 3) | .710 ± .010 (n = 3) | .810 ± .010 (n = 3) |",
        "| S+C, paper |  | .831 | .871 |",
        "| S+C, here | .660 ± .010 (n = 3) | .760 ± .010 (n = 3) | .860 ± .010 (n = 3) |",
        f"| S+C - S, paired |{3 * ' +.050 [.050, .050] (n = 3) |'}",
        "| gap closed | 25 % | 50 % | no gap |",
        lines[5].replace("S+C", "S+C labels first"),
        lines[6].replace("S+C", "S+C labels first"),
        "| gap closed | 25 % | 50 % | no gap |",
        f"| labels first - S+C, paired |{3 * ' +.000 [.000, .000] (n = 3) |'}",
        "| S, masks by slide, here |  | .410 ± .010 (n = 3) | .810 ± .010 (n = 3) |",
    ]
    assert lines[-2].startswith("A. Mean ± sd, n as in the cells. Paired: ")

    rows = {("beta=1,pixel-frac=0.1", 0): {"dsc": 0.7}, ("beta=2,pixel-frac=0.1", 0): {"dsc": 0.65}}
    rows |= {("beta=2,pixel-frac=0.1", 1): {"dsc": 12.75}, ("pixel-frac=0.1", 0): {}}
    text = tables.markdown(tables.tables()["table1"], rows, "")
    assert "| DSC, paper | .8431 | .8437 | .8479 | .8450 | .8423 | .8419 |" in text
    assert "| DSC, here | .700 (n = 1) | 6.700 ± 8.556 (n = 2) |  |  |  |  |" in text
    assert "| DSC against 1, paired |  | -.050 (n = 1) |  |  |  |  |" in text
    assert "| IoU, here |  |  |  |  |  |  |" in text
    assert "10.25" in tables.markdown(table, {("pixel-frac=1", 0): {"dsc": 10.25}}, "")


def test_a_sweep_that_is_stopped_goes_on_and_gives_the_same_files(started, slides, tmp_path):
    argv = ["table6", "strip", "--data", slides, *TINY, "--fractions", 1, 0.01]
    whole, stopped = (["--seeds", 2, "--out", tmp_path / name] for name in ("whole", "stopped"))
    out = ok(reproduce.main, *argv, *whole)
    assert len(started) == 6 * 2 * 2  # S and five methods, two fractions, two seeds
    assert "| S, here | .506 ± .007 (n = 2) | .605 ± .007 (n = 2) |" in out
    for number in (2, 5):  # S, and multi-task
        started.kill = {len(started) + number}
        status, _, err = call(reproduce.main, *argv, *stopped)
        assert status == 1 and "the same command goes on" in err
    listed = ok(reproduce.main, *argv, *stopped, "--list").splitlines()
    assert listed[0] == "table6: 24 runs, 19 missing"
    ok(reproduce.main, *argv, *stopped)
    assert len(started) == 24 + 2 + 5 + 19
    assert [name for name, resumed in started if resumed] == ["image-frac=0,pixel-frac=1,seed=0"]
    for name in ("table6.md", "strip.png"):
        one, two = ((tmp_path / folder / name).read_bytes() for folder in ("whole", "stopped"))
        assert one == two
    one, two = ((tmp_path / f / "runs.csv").read_text() for f in ("whole", "stopped"))
    assert one == two and len(one.splitlines()) == 25


def test_tables_need_the_rows_alone_and_pictures_the_checkpoints(started, slides, tmp_path):
    argv = ["--data", slides, *TINY, "--fractions", 0.01, "--seeds", 1, "--out", tmp_path]
    out = ok(reproduce.main, "table4", *argv)
    assert len(started) == 6 and out.count("| S, here | .501 (n = 1) |") == 1
    ok(reproduce.main, "strip", *argv)
    assert len(started) == 6 and (tmp_path / "strip.png").exists()
    (tmp_path / "runs").rename(tmp_path / "gone")
    assert ok(reproduce.main, "table4", *argv) == out[out.index("| DSC") :]
    assert "not a checkpoint" in one_line_of(*call(reproduce.main, "strip", *argv))
    assert ok(reproduce.main, "fig8", *argv, "--jobs", 0) == "" and len(started) == 6


def test_the_rows_of_the_docs_give_the_tables_of_the_docs(tmp_path):
    docs, out = Path(reproduce.__file__).parents[1] / "docs", ""
    text = (docs / "results.md").read_text()
    commands = re.findall(r"^python -m extras.reproduce (\w.*) --out (\w+)", text, re.M)
    for argv, folder in commands:
        (rows,) = re.findall(rf"cp docs/(\w+.csv) {folder}/runs.csv", text)
        (tmp_path / folder).mkdir(exist_ok=True)
        shutil.copy(docs / rows, tmp_path / folder / "runs.csv")
        out += ok(reproduce.main, *argv.split(), "--out", tmp_path / folder, "--jobs", 0)
    published = re.findall(r"^\| .*(?:, here|paired|gap closed) \| .* \|$", text, re.M)
    assert len(published) > 20 and {*published} <= {*out.splitlines()}


def test_plots_show_the_rows_and_the_same_rows_give_the_same_file(tmp_path):
    """A cell without rows is skipped; 0 % is no point of the log axis: no line leads to it."""
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes, every = figure.subplots(1, 2), tables.tables()
    dsc, rows = {"0 %": 0.2, "1 %": 0.4, "10 %": 0.6, "100 %": 0.8}, {}
    for column, seed in ((c, seed) for c in dsc for seed in (0, 1, 2)):
        run = every["table4"].run("S, masks by slide", column)
        rows[run, seed] = {"dsc": dsc[column] + (seed - 1) / 10}
    plots.draw_masks(axes, every["table4"], rows)
    by_tile, by_slide = ({line.get_label(): line for line in axis.lines} for axis in axes)
    (zero, gap, *x), (first, _, *y) = by_slide["S"].get_data()
    assert zero < -2.4 and isnan(gap) and np.allclose(x, [-2.025, -1.025, -0.025])
    assert np.allclose([first, *y], [*dsc.values()])
    assert np.allclose(by_tile["S"].get_ydata(), [np.nan, 0.8], equal_nan=True)  # all: of both
    assert np.allclose(by_slide["S, all masks"].get_ydata(), 0.8)
    sd = axes[1].containers[0].lines[2][0].get_segments()[0]
    assert np.allclose(sd[:, 1], [0.1, 0.3])
    assert by_tile["S+C, paper"].get_xdata()[-1] == 0 and "S+C, paper" not in by_slide
    assert by_tile["S+C, paper"].get_ydata()[-1] == 0.871
    ticks = dict(zip((t.get_text() for t in axes[0].get_xticklabels()), axes[0].get_xticks()))
    assert ticks["0"] == by_tile["S, paper"].get_xdata()[0] and ticks["10"] == log10(0.1)

    run = every["fig6"].run("S+C", "10 %")
    plots.write("fig6", tmp_path, every["fig6"], {(run, 0): {"accuracy": 0.9}})
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        plots.write("table4", folder, every["table4"], rows)
    one, two = ((tmp_path / folder / "masks.svg").read_text() for folder in "ab")
    assert one == two and "<dc:date>" not in one and len(one) < 60_000
    for text in ("S+C labels first", "masks by slide", "S, paper", "share of masks, %"):
        assert f">{text}</text>" in one
    assert ">S'+C</text>" in (tmp_path / "fig6.svg").read_text()


def test_curves_of_runs(tmp_path):
    """Lines of a log may lack a loss, and end amid an epoch."""
    figure = pytest.importorskip("matplotlib.figure").Figure()
    lines = [{"epoch": 1, "loss_seg": 0.5, "train_dsc": 0.1}, {"epoch": 1.5, "loss_cls": 0.4}]
    axes = figure.subplots(1, 3)
    plots.draw_curve(axes, {"x": lines, "y": []})
    found = [axis.lines[0].get_xydata().tolist() for axis in axes]
    assert found == [[[1, 0.5]], [[1.5, 0.4]], [[1, 0.1]]]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    ok(reproduce.main, "curve", tmp_path, "--out", tmp_path / "new")
    assert Image.open(tmp_path / "new/curve.png").width > 1000
    line = one_line_of(*call(reproduce.main, "curve", tmp_path, tmp_path / "new"))
    assert "no log.jsonl" in line


def test_without_matplotlib_there_are_tables(started, slides, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    argv = ["table4", "--data", slides, *TINY, "--fractions", 1, "--seeds", 1, "--out", tmp_path]
    *_, last = ok(reproduce.main, *argv).splitlines()
    assert last == "no masks.svg: matplotlib is missing; pip install -r extras/requirements.txt"
    assert {p.name for p in tmp_path.iterdir()} == {"runs", "runs.csv", "table4.md"}
    (tmp_path / "log.jsonl").write_text("")
    line = one_line_of(*call(reproduce.main, "curve", tmp_path, "--out", tmp_path))
    assert "matplotlib is missing" in line


def test_runs_of_other_settings_do_not_mix(started, slides, tmp_path):
    argv = ["strip", "--data", slides, *TINY, "--out", tmp_path]
    started.kill = {1}
    assert call(reproduce.main, *argv)[0] == 1
    status, out, err = call(reproduce.main, *argv, "--epochs", 3)  # a checkpoint, no row yet
    assert status == 1 and "1 of 3 runs failed" in err and "give another --out" in out
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


def test_shards_share_the_runs_and_tables_read_all_of_them(started, slides, tmp_path):
    argv = ["table4", "--data", slides, *TINY, "--fractions", 1, "--seeds", 2, "--out", tmp_path]
    for shard in ("1/2", "2/2"):
        out = ok(reproduce.main, *argv, "--shard", shard)
    runs = [name for name, _ in started]
    assert len(runs) == len({*runs}) == 3 * 2
    assert sorted(p.name for p in tmp_path.glob("*.csv")) == ["runs-1.csv", "runs-2.csv"]
    assert "| S, here | .605 ± .007 (n = 2) |" in out
    assert ok(reproduce.main, *argv, "--jobs", 0) == out[out.index("| DSC") :]
    for bad in ("0/2", "2", "a/b"):
        assert "--shard" in one_line_of(*call(reproduce.main, *argv, "--shard", bad))


def test_another_folder_of_the_same_name_is_other_data(started, few, tmp_path):
    """Its table was the first one's, with status 0."""
    for place in ("a", "b"):
        shutil.copytree(few, tmp_path / place / "slides")
    argv = ["table4", *TINY, "--fractions", 1, "--seeds", 1, "--out", tmp_path / "r", "--data"]
    ok(reproduce.main, *argv, tmp_path / "a/slides")
    count = len(started)
    ok(reproduce.main, *argv, tmp_path / "b/slides")  # a copy is the same data
    xml = tmp_path / "b/slides/train/synthetic_001.xml"
    xml.write_text(xml.read_text().replace("metastases", "exclusion", 1))
    line = one_line_of(*call(reproduce.main, *argv, tmp_path / "b/slides"))
    assert "runs.csv is of other slides" in line and len(started) == count
    (tmp_path / "a/slides/train/reference.csv").write_text("u,Normal\n")
    line = one_line_of(*call(reproduce.main, *argv, tmp_path / "a/slides"))
    assert "runs.csv is of other slides" in line and len(started) == count


def test_a_run_that_fails_is_named_and_the_tables_have_the_others(started, slides, tmp_path):
    argv = ["table4", "--data", slides, "--out", tmp_path, "--fractions", 1, "--seeds", 1]
    status, out, err = call(reproduce.main, *argv, "--epochs", 7)
    assert status == 1 and "3 of 3 runs failed" in err
    assert "1/3 image-frac=0,pixel-frac=1,seed=0: error: seven; see " in out
    assert "| S, here |  |" in out and "seven" in next(tmp_path.rglob("train.log")).read_text()


def test_pictures_show_tissue_with_outlines(started, slides, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "SIDE", 224)  # as users see them
    found = torch.zeros(64, 64)
    found[20:40, 20:40] = 1
    monkeypatch.setattr(evaluate, "predict", lambda _, x, amp: [found.expand(len(x), -1, -1)] * 2)
    monkeypatch.setattr(evaluate, "count", lambda _, tiles, rows, run: np.ones((len(rows), 4)))
    argv = ["fig8", "strip", "--data", slides, *TINY, "--fractions", 0.1, "--seeds", 1]
    ok(reproduce.main, *argv, "--out", tmp_path)
    side, (left, top, right, bottom) = evaluate.SIDE, evaluate.BORDER
    height, width = top + side + bottom, left + side + right
    for name, columns, lines in (("fig8", 3, 12), ("strip", 5, 3)):
        picture = np.asarray(Image.open(tmp_path / f"{name}.png"))
        assert picture.shape == (height * lines, width * columns, 3)
        panels = picture[:height].reshape(height, columns, width, 3).transpose(1, 0, 2, 3)
        assert all((panel[:top] < 128).any() for panel in panels)  # texts
        tile, truth, *predicted = panels[:, top:-bottom, left:-right]
        assert tile[:200, :200].std() > 5 and (truth == reproduce.GREEN).all(2).any()
        for panel in predicted:
            changed = (tile != panel).any(2)
            assert changed[70:140, 70:140].all() and changed.sum() == 70**2
            assert (panel == reproduce.YELLOW).all(2).sum() == 70**2 - 66**2


def test_the_tiles_of_a_picture_are_chosen_by_rule(started, slides, tmp_path, monkeypatch):
    """Least tumour, about three quarters of it, and at the quartiles of the last column's DSC."""

    def count(model, tiles, rows, run):  # the first tile is the best
        return np.array([(n, 0, 1, 1) for n in range(len(rows), 0, -1)])

    tiles = data.tile_slides(data.find_slides(slides), tile=64, mpp=1)
    cancer = tiles.table[~tiles.table["train"] & (tiles.table["label"] == data.CANCER)]
    share, last = cancer["tumour"], len(cancer) - 1
    expected = {
        "fig7": np.argsort(share, kind="stable")[:3],
        "fig8": np.argsort(abs(share - 0.75), kind="stable")[:3],
        "strip": [last - round(q * last) for q in (0.25, 0.5, 0.75)],
    }
    texts, panel = [], reproduce.panel
    monkeypatch.setattr(evaluate, "count", count)
    monkeypatch.setattr(reproduce, "panel", lambda *x: texts.append(x[3]) or panel(*x))
    argv = ["--data", slides, *TINY, "--fractions", 0.1, "--seeds", 1, "--out", tmp_path]
    for name, chosen in expected.items():
        ok(reproduce.main, name, *argv)
        found = list(dict.fromkeys(text for text in texts if ", x " in text))
        assert [text.split(", ", 1)[1] for text in found] == [
            f"x {tile['x']}, y {tile['y']}" for tile in cancer[chosen]
        ]
        texts.clear()


def test_a_worker_trains(few, tmp_path):
    argv = ["table4", "--data", few, *QUICK[:4], "--width", 4, "--epochs", 1]
    args, run = arguments(*argv, "--out", tmp_path), ("image-frac=0,pixel-frac=1", 0)
    assert reproduce.carry_out_all(args, [run]) is None
    (row,) = reproduce.read_rows(args).items()
    out = tmp_path / "runs/image-frac=0,pixel-frac=1,seed=0"
    results = json.loads((out / "results.json").read_text())
    assert row[0] == run and row[1]["dsc"] == pytest.approx(results["dsc"], rel=1e-5)
    assert "train: 2 slides" in (out / "train.log").read_text()
    evaluate.load_model(out / "last.pt")


def test_what_is_not_known_is_refused():
    for argv in (["table9"], ["--mpp", 2, "table4"], ["table4", "--seeds", 11]):
        one_line_of(*call(reproduce.main, *argv))
    values = dict(zip(reproduce.VARIED, (1, 0.2, 0.3, "slide", 2, 2, "ce", "fw", "labels")))
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        part = "--seg" if name == "seg_loss" else flag  # argparse takes parts of flags, too
        for said in ([flag, value], [f"{flag}={value}"], [part, value]):
            assert "leave it out" in one_line_of(*call(reproduce.main, "table1", *said))
    assert "multiple of 8" in one_line_of(*call(reproduce.main, "table1", "--tile", 60))
    assert "shares" in one_line_of(*call(reproduce.main, "table4", "--fractions", 10))
