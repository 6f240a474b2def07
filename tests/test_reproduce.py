"""The sweep: what it runs, that a killed one goes on, and the arithmetic of its tables."""
import csv
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import reproduce
import train
from jobs import TINY, call, ok, one_line_of



def arguments(**changes):
    return SimpleNamespace(**{"out": "results", "budget": "quick", "data": None, "rest": [],
                              "seeds": 1} | changes)


@pytest.mark.parametrize("budget", ["quick", "full"])
def test_every_run_of_every_table_is_a_command_of_train(tmp_path, budget):
    args = arguments(out=tmp_path, budget=budget)
    names = [*reproduce.tables(budget), *reproduce.PICTURES]
    runs = reproduce.runs_of(names, budget)
    assert len({reproduce.folder(args, flags, 0) for flags in runs}) == len(runs)
    for flags in runs:
        parsed, _ = train.parse(reproduce.command(args, flags, 3))
        assert parsed.seed == 3 and parsed.pixel_frac == flags["pixel-frac"]
        assert parsed.method == flags.get("method", "ours")
    lrs = {train.parse(reproduce.command(args, flags, 0))[0].lr / 1e-3 for flags in runs}
    assert lrs == {1, 5}
    for table in reproduce.tables(budget).values():
        for line in table.lines:
            assert len(line.paper) == len(line.runs) == len(table.columns)


def test_defaults_said_aloud_are_the_same_run():
    runs = reproduce.runs_of(["table1", "table2", "table3"], "quick")
    assert len(runs) == 6 + 4 + 4
    four, five = (reproduce.runs_of([name], "quick") for name in ("table4", "table5"))
    assert four == five and {"image-frac": 0, "pixel-frac": 1} in four
    assert {"image-frac": 0, "pixel-frac": 1, "label-unit": "slide"} not in four


def test_the_papers_figures_agree_with_each_other():
    """IoU = DSC / (2 - DSC) in every row but the headline; a wrong digit would show."""
    tables = reproduce.tables("full")
    for one, two in (("table1",) * 2, ("table2",) * 2, ("table3",) * 2, ("table4", "table5"),
                     ("table6", "table7")):
        dsc = [line for line in tables[one].lines if line.metric == "dsc"]
        iou = [line for line in tables[two].lines if line.metric == "iou"]
        for a, b in zip(dsc, iou):
            for d, i, column in zip(a.paper, b.paper, tables[one].columns):
                if d is not None and (a.name, column) not in (("S+C", "10 %"),
                                                              ("this method", "10 %")):
                    near = 0.00015 if one == two else 0.002      # 4 digits there, 3 here
                    assert abs(d / (2 - d) - i) < near, (a.name, column, d, i)
    six, four = tables["table6"].lines[-1], tables["table4"].lines[1]
    assert six.paper == [.685, .722, .731, .831, .835, .855, .871]
    assert six.runs[0] == four.runs[0]
    assert tables["table6"].lines[0].paper == [.596, .641, .648, .728, .803, .853, .868]


def test_means_deviations_and_gaps_of_made_up_results(tmp_path):
    assert reproduce.mean_sd([]) == "" and reproduce.mean_sd([0.5]) == "0.500"
    assert reproduce.mean_sd([0.5, 0.6]) == "0.550 +- 0.071"
    closed = reproduce.gaps({"S": [0.4, 0.6, 0.79, 0.8], "S+C": [0.6, 0.55, 0.9, None],
                             "N": [None, 0.8, 0.8, 0.8]})
    assert closed == {"S+C": [pytest.approx(0.5), pytest.approx(-0.25), None, None],
                      "N": [None, pytest.approx(1.0), None, None]}
    made_up = {0: 0.4, 0.01: 0.5, 0.1: 0.6, 0.5: 0.7, 1: 0.8}

    def results(flags):
        gain = 0 if "image-frac" in flags else 0.1 * (1 - flags["pixel-frac"])
        return [{"dsc": made_up[flags["pixel-frac"]] + gain + seed, "iou": None}
                for seed in (-0.01, 0.01)] + [None]

    table = reproduce.tables("quick")["table4"]
    measured = reproduce.measure(table, results)
    assert measured["S"][2] == [pytest.approx(0.59), pytest.approx(0.61)]
    reproduce.write_table(tmp_path / "table4", table, measured, "A caption.")
    text = (tmp_path / "table4.md").read_text()
    assert "| DSC at pixel labels on | 0 % | 1 % | 10 % | 50 % | 100 % |" in text
    assert "| S, paper | 0.596 | 0.641 | 0.728 | 0.853 | 0.868 |" in text
    assert "| S, here | 0.400 +- 0.014 | 0.500 +- 0.014 |" in text
    assert "| S+C closes, here | 25% | 33% | 45% | 50% |  |" in text
    assert "| S+C closes, paper | 33% | 36% | 74% |  |  |" in text and "A caption." in text
    rows = list(csv.DictReader((tmp_path / "table4.csv").open()))
    assert rows[0] == {"row": "S", "column": "0 %", "metric": "dsc", "paper": "0.596",
                       "mean": "0.4", "sd": rows[0]["sd"], "n": "2", "values": "0.39 0.41"}
    assert not any(reproduce.measure(reproduce.tables("quick")["table5"], results)["S"])
    figure = reproduce.tables("quick")["fig6"]
    reproduce.write_table(tmp_path / "fig6", figure, {line.name: [[0.5]] * 4 for line in
                                                      figure.lines}, "")
    assert "closes" not in (tmp_path / "fig6.md").read_text()


def test_a_sweep_that_is_killed_goes_on_and_gives_the_same_files(run, slides, tmp_path,
                                                                 monkeypatch):
    """Training is made up here; one run dies half-way, with its checkpoint left."""
    started, kill = [], []

    def made_up(line, stdout, stderr):
        started.append(line)
        parsed, _ = train.parse([str(a) for a in line[2:]])
        checkpoint = torch.load(run[0] / "last.pt", weights_only=True)
        torch.save(checkpoint, Path(parsed.out, "last.pt"))
        if len(started) in kill:
            raise KeyboardInterrupt
        value = len(Path(parsed.out).name) / 100
        results = json.loads((run[0] / "results.json").read_text())
        Path(parsed.out, "results.json").write_text(json.dumps(results | {"dsc": value}))
        return SimpleNamespace(wait=lambda: 0, terminate=lambda: None)

    monkeypatch.setattr(subprocess, "Popen", made_up)
    argv = ["table6", "fig5", "fig7", "fig8", "--data", slides, *TINY]
    ok(reproduce.main, *argv, "--out", tmp_path / "whole")
    count = len(started)
    assert count == 5 * 5 + 4                   # S and four methods, five fractions; loss pairs
    kill.append(count + 3)
    assert call(reproduce.main, *argv, "--out", tmp_path / "killed")[0] == 130
    kill.clear()
    before = len(started)
    ok(reproduce.main, *argv, "--out", tmp_path / "killed")
    assert len(started) - before <= count - 2 and "--resume" in started[before]
    for name in ("table6.md", "table6.csv", "fig5.png", "fig7.png", "fig8.png"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    text = (tmp_path / "whole/table6.md").read_text()
    assert "| this method, here | 0.190 | 0.220 | 0.210 |" in text
    before = len(started)
    assert " 0 missing" in ok(reproduce.main, *argv, "--out", tmp_path / "killed", "--list")
    ok(reproduce.main, *argv, "--out", tmp_path / "killed")
    assert len(started) == before
    picture = np.asarray(Image.open(tmp_path / "whole/fig7.png"))
    assert picture.shape == (3 * (4 * 72 + 24), 110 + 7 * 72, 3)


def test_a_run_that_fails_is_named_and_the_others_are_done(slides, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "runs_of", lambda *args: [{"beta": 9}, {"tile": 4096}])
    argv = ["--data", slides, "--out", tmp_path, *TINY[4:], "--epochs", 1, "--pretrain-epochs", 0]
    status, out, err = call(reproduce.main, "table1", *argv)
    assert status == 2 and "1 of 2 runs failed" in err
    assert "1/2 beta=9,seed=0: DSC" in out and "2/2 error" in out and "no cancer tile" in out
    assert not (tmp_path / "table1.md").exists()


def test_names_that_are_none_are_refused():
    for argv in (["table9"], []):
        assert "table1, table2" in one_line_of(*call(reproduce.main, *argv))
    assert "together: 59 runs" in ok(reproduce.main, "--list")
    for flags, said in ((["--pixel-frac", 1], "leave it out"), (["--seed", 3], "leave it out"),
                        (["--width", 7], "not a multiple of 4")):
        assert said in one_line_of(*call(reproduce.main, "table1", *flags))
