"""The jobs as users run them: train, resume, evaluate, bad input; and one run that must learn."""

import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from jobs import (
    QUICK,
    ROOT,
    assert_equal_runs,
    call,
    checkpoint_of,
    log_of,
    ok,
    one_line_of,
    start,
)
from PIL import Image

import data
import evaluate
import loss
import train
from extras import synthetic
from model import Network
from slide import Slide

SMALL = QUICK[: QUICK.index("--epochs")] + QUICK[QUICK.index("--device") :]  # epochs as they come


def after(count, function, surprise):
    """`function`, but behind its call number `count` there is a `surprise`."""
    calls = []

    def wrapped(*args, **kwargs):
        result = function(*args, **kwargs)
        calls.append(1)
        if len(calls) == count:
            surprise()
        return result

    return wrapped


def test_tiles(folder):
    """The test tiles of a folder and all that `evaluate.count` needs beside a model."""
    tiles = data.tile_slides(data.find_slides(folder), 64, 1.0)
    args = SimpleNamespace(batch_size=8, device="cpu", workers=0, amp=False)
    return tiles, np.flatnonzero(~tiles.table["train"]), args


test_tiles.__test__ = False


# ------------------------------------------------------------------------------------ a whole run


def test_the_whole_job_learns(run, slides):
    """Better than an answer that needs no eyes (all tumour), and than the net before training."""
    results = json.loads((run[0] / "results.json").read_text())
    tiles, rows, args = test_tiles(slides)
    share = tiles.table["tumour"][rows].mean()
    torch.manual_seed(0)
    counts = evaluate.count(Network(8), tiles, rows, args)
    untrained = evaluate.summarise(tiles, rows, counts)["dsc"]
    floor = max(2 * share / (1 + share), untrained)
    assert results["dsc"] > max(0.9, floor + 0.2), (results["dsc"], floor)
    assert results["accuracy"] > 0.85


def test_a_run_leaves_what_the_readme_says(run):
    folder, out = run
    names = {"last.pt", "log.jsonl", "tiles.csv", "results.json", "pictures"}
    assert {p.name for p in folder.iterdir()} == names
    checkpoint = checkpoint_of(folder)
    assert set(checkpoint) == {"model", "optimizer", "iteration", "fingerprint", "args"}
    lines = log_of(folder)
    assert [line["epoch"] for line in lines] == [1, 2]
    assert "loss_cls" not in lines[0] and "loss_cls" in lines[1]  # pre-training, then both
    printed = [line for line in out.splitlines() if line.startswith("epoch ")]
    for line, text in zip(lines, printed, strict=True):  # one line of the screen is one of the log
        assert [pair.split() for pair in text.split("  ")] == [
            [k, f"{v:g}"] for k, v in line.items()
        ]
    results = json.loads((folder / "results.json").read_text())
    assert results["arguments"]["width"] == 8 and 0 < results["iou"] < results["dsc"] < 1
    assert f"python evaluate.py --ckpt {folder / 'last.pt'}" in out and "\r" not in out


def test_pictures_show_tile_truth_in_green_and_prediction_in_yellow(run, slides):
    """Masks beside tiles need matching by eye: outlines lie on the tissue itself."""
    pictures = {p.name: np.asarray(Image.open(p)) for p in (run[0] / "pictures").iterdir()}
    assert set(pictures) == {"best.png", "median.png", "worst.png"}
    side, (left, top, right, bottom) = evaluate.SIDE, evaluate.BORDER
    height, width = top + side + bottom, left + side + right
    assert pictures["best.png"].shape == (4 * height, 3 * width, 3)
    first = pictures["best.png"][:height].reshape(height, 3, width, 3).transpose(1, 0, 2, 3)
    assert (first[:, :top].min((1, 2, 3)) < 128).all()  # texts
    tile, truth, found = first[:, top : top + side]
    tiles, rows, _ = test_tiles(slides)
    masks = [tiles[row, 0][1] == 1 for row in rows.tolist()]
    masks = [evaluate.panel(tiles[0, 0][0] * 0, m, (255,) * 3, " ") for m in masks]
    masks = [m[top : top + side, left:-right].any(2) for m in masks]
    changed = (truth != tile).any(2)[:, left:-right]
    assert any((changed == m).all() for m in masks)  # it is the truth of a test tile
    for panel, colour in ((truth, evaluate.GREEN), (found, evaluate.YELLOW)):
        assert (panel == colour).all(2).any()


def test_a_mask_is_tinted_and_outlined_on_the_edge_of_its_tile_too():
    """The best tile, all tumour, had no outline: as if nothing had been found."""
    image, mask = torch.full((3, 256, 256), 100, dtype=torch.uint8), torch.ones(256, 256) > 0
    mask[100, 100] = False
    left, top, right, bottom = evaluate.BORDER
    for text in ("x", "TCGA-BH-A0B3-01Z-00-DX1, x 102400, y 76800"):  # it is not cut off
        panel = evaluate.panel(image, mask, evaluate.GREEN, text)
        assert (panel[:, -right:] == 255).all() and panel[:top].min() < 128
    tile = panel[top:-bottom, left:-right]
    border = (tile == evaluate.GREEN).all(2)
    for edge in (border[:2], border[-2:], border[:, :2], border[:, -2:]):
        assert edge.all()
    assert border.sum() == 256**2 - 252**2 + 5**2 - 1  # the hole has a border of 2 px, too
    assert (tile[100, 100] == 100).all()  # what is not in the mask is as it was
    inside = tile[50, 50].astype(int)
    assert inside[1] > 100 > inside[0] == inside[2] > 60  # tissue stays readable
    clear = evaluate.panel(image, mask & False, evaluate.GREEN, "x")
    assert (clear[top:-bottom, left:-right] == 100).all()


def test_each_part_is_moved_by_its_own_step_alone(run):
    """Adam counts the updates of every parameter; a gradient of 0, not None, would count too."""
    state = checkpoint_of(run[0])["optimizer"]["state"]
    names = [name.split(".")[0] for name, _ in Network(8).named_parameters()]
    steps = {name: int(state[n]["step"]) for n, name in enumerate(names)}
    once = checkpoint_of(run[0])["iteration"] // 2
    assert steps == {"classifier": once, "convs": 3 * once, "esps": 3 * once} | {
        name: 2 * once for name in ("psps", "ups", "fuses", "head")
    }


def test_bn_statistics_are_means_over_batches_of_the_mask_tiles(run, slides):
    """With running means, DSC after alternation was up to .39 lower than with these."""
    tiles, _, _ = test_tiles(slides)
    _, rows, _ = data.choose_labels(tiles, 1, 1)
    model, count = Network(8), -(-len(rows) // 8)
    model.load_state_dict(checkpoint_of(run[0])["model"])
    means, variances = [], []
    for keys in data.batches(rows, 8, (0, 13), 0, count):
        images = torch.stack([tiles[key][0] for key in keys])
        pixels = model.convs[0][0](images / 127.5 - 1).detach().movedim(1, 0).flatten(1)
        means.append(pixels.mean(1)), variances.append(pixels.var(1))
    bn = model.convs[0][1]
    torch.testing.assert_close(bn.running_mean, torch.stack(means).mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bn.running_var, torch.stack(variances).mean(0), rtol=1e-3, atol=1e-5)
    for name, value in model.named_buffers():  # the classifier's too: it is not in the mask's way
        assert not name.endswith("tracked") or value == count, name


def test_no_number_is_waited_for_but_where_a_line_is_logged(few, tmp_path, monkeypatch):
    """`.item()` in the loop makes a GPU stand still until the CPU has seen the number."""
    at, ours = [], {str(ROOT / f"{name}.py") for name in ("train", "loss", "model")}

    def watched(name):
        original = getattr(torch.Tensor, name)

        def wrapper(*args, **kwargs):
            frame = sys._getframe(1)
            if frame.f_code.co_filename in ours:  # Adam and autograd have their own, for a CPU
                stack = []
                while frame:
                    stack.append(frame.f_code.co_name)
                    frame = frame.f_back
                at.append((name, "log_line" in stack))
            return original(*args, **kwargs)

        return wrapper

    names = ("item", "tolist", "cpu", "numpy", "nonzero")
    for name in (*names, "__float__", "__int__", "__bool__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, watched(name))
    ok(train.main, "--data", few, "--out", tmp_path / "r", *QUICK)
    assert {logged for _, logged in at} == {True}, at
    assert len(at) == 3 + 5  # sums of an epoch of step 1, of one of both


FLAGS = [
    "--epochs 2",
    "--epochs 1 --amp",
    "--epochs 2 --image-frac 0",
    "--epochs 1 --label-unit slide --pixel-frac 0 --alpha 0.5 --beta 1",
    "--epochs 1 --seg-loss ce --cls-loss fw",
    "--epochs 1 --seg-loss fw --cls-loss ce",
]


@pytest.mark.parametrize("flags", FLAGS)
def test_every_kind_of_run_ends(few, tmp_path, flags):
    """`--epochs 2` alone once was an error: five epochs of pre-training were more than it."""
    out = ok(train.main, "--data", few, "--out", tmp_path / "r", *SMALL, *flags.split())
    both = ["loss_cls" in line for line in log_of(tmp_path / "r")]
    results = json.loads((tmp_path / "r/results.json").read_text())
    if "--image-frac 0" in flags:  # S: step 1 keeps off the classification head
        torch.manual_seed(0)
        weights = checkpoint_of(tmp_path / "r")["model"]
        same = {n for n, p in Network(8).named_parameters() if torch.equal(p, weights[n])}
        assert {name.split(".")[0] for name in same} == {"classifier"} and len(same) == 5
        assert both == [False, False] and results["accuracy"] is None and "accuracy null" in out
    else:
        assert both == ([False, True] if "--epochs 2" in flags else [True])
        assert 0 <= results["accuracy"] <= 1


@pytest.mark.parametrize("epochs, pretraining", [(1, 0), (2, 1), (9, 1), (20, 2), (50, 5)])
def test_a_tenth_of_the_epochs_is_pretraining_and_half_where_labels_come_first(epochs, pretraining):
    args, _ = train.parse_args(["--data", "x", "--epochs", str(epochs)])
    assert train.pretrain_epochs(args) == pretraining
    args.pretrain = "labels"
    assert train.pretrain_epochs(args) == epochs // 2


def test_the_command_of_the_readme_runs(slides, tmp_path, monkeypatch):
    """With smaller slides and fewer epochs than the reader's."""
    readme = (ROOT / "README.md").read_text()
    command = re.search(r"python train\.py (--pixel-frac 0\.1)\s*(#.*)?$", readme, re.M)[1]
    monkeypatch.setattr(synthetic, "cached", lambda: slides)
    monkeypatch.setitem(train.DEMO, "epochs", 1)
    monkeypatch.setitem(train.DEMO, "width", 4)
    monkeypatch.chdir(tmp_path)
    out = ok(train.main, *shlex.split(command), "--device", "cpu")
    (folder,) = (path.parent for path in tmp_path.glob("runs/*/results.json"))
    assert f"python evaluate.py --ckpt {folder.relative_to(tmp_path) / 'last.pt'}" in out


# ------------------------------------------------------------------------------- interrupt, resume


@pytest.fixture(scope="module")
def whole(few, tmp_path_factory):
    """Three epochs without an interruption -> folder."""
    folder = tmp_path_factory.mktemp("whole") / "r"
    ok(train.main, "--data", few, "--out", folder, *QUICK, "--epochs", 3)
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_resumed_at_an_epochs_end_equals_an_uninterrupted_one(few, whole, tmp_path, workers):
    """Bit for bit, in pre-training and behind it, whoever reads the tiles."""
    half, save = tmp_path / "half", train.save
    argv = ["--data", few, "--out", half, *QUICK, "--epochs", 3, "--workers", workers]
    done = 0
    for epoch in (2,) if workers else (1, 2):
        with pytest.MonkeyPatch.context() as patch:
            stop = after(1 + epoch - done, save, lambda: sys.exit("stopped"))
            patch.setattr(train, "save", stop)
            assert one_line_of(*call(train.main, *argv)) == "stopped"
        assert checkpoint_of(half)["iteration"] * 3 == checkpoint_of(whole)["iteration"] * epoch
        assert not (half / "results.json").exists()
        argv, done = ["--resume", half / "last.pt", "--workers", workers], epoch
    assert "going on after epoch 2 of 3" in ok(train.main, *argv)
    assert_equal_runs(whole, half)
    if not workers:
        ok(train.main, *argv)  # once more: all is done, and the same comes out
        assert_equal_runs(whole, half)


def test_a_run_with_labels_first_resumes_bit_for_bit_and_each_step_takes_its_batches(
    few, tmp_path, monkeypatch
):
    """Step 2 alone for the first epoch of three, then both; the log has what a step did."""
    drawn, read = [], data.batches

    def watched(rows, batch_size, seed, first, last):
        drawn.append((seed[1], first, last))
        return read(rows, batch_size, seed, first, last)

    monkeypatch.setattr(data, "batches", watched)
    argv = ["--data", few, *QUICK[: QUICK.index("--epochs")], "--epochs", 3, "--device", "cpu"]
    argv += ["--pretrain", "labels", "--out"]
    ok(train.main, *argv, tmp_path / "whole")
    once = checkpoint_of(tmp_path / "whole")["iteration"] // 3
    assert drawn[:2] == [(11, once, 3 * once), (12, 0, 3 * once)]
    kinds = [(("loss_seg" in line), ("loss_cls" in line)) for line in log_of(tmp_path / "whole")]
    assert kinds == [(False, True), (True, True), (True, True)]
    for stop in (2, 3):  # after the first epoch, after the second
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "save", after(2, train.save, lambda: sys.exit("stopped")))
            call(train.main, *argv, tmp_path / "half")
        argv = ["--resume", tmp_path / "half/last.pt", "--out"]
        assert checkpoint_of(tmp_path / "half")["iteration"] == (stop - 1) * once
    ok(train.main, *argv, tmp_path / "half")
    assert_equal_runs(tmp_path / "whole", tmp_path / "half")


def test_a_run_killed_within_a_long_epoch_goes_on_from_there(few, whole, tmp_path, monkeypatch):
    """An epoch of CAMELYON takes an hour on a GPU: a preempted job lost it."""
    once = checkpoint_of(whole)["iteration"] // 3
    monkeypatch.setattr(train, "SAVE_EVERY", 0)
    stop = after(once + 4, train.save, lambda: sys.exit("stopped"))  # the first is at iteration 0
    monkeypatch.setattr(train, "save", stop)
    argv = ["--data", few, "--out", tmp_path / "r", *QUICK, "--epochs", 3]
    assert one_line_of(*call(train.main, *argv)) == "stopped"
    monkeypatch.undo()
    assert checkpoint_of(tmp_path / "r")["iteration"] == once + 3
    lines = [line["epoch"] for line in log_of(tmp_path / "r")]
    assert lines == pytest.approx([n / once for n in range(1, once + 4)])
    ok(train.main, "--resume", tmp_path / "r/last.pt")
    one, two = checkpoint_of(whole), checkpoint_of(tmp_path / "r")
    assert all(torch.equal(one["model"][k], two["model"][k]) for k in one["model"])
    assert [line["epoch"] for line in log_of(tmp_path / "r")] == [*lines, 2, 3]


def test_a_checkpoint_goes_on_in_another_folder_and_without_its_log(few, whole, tmp_path):
    """A traceback in place of this: last.pt was copied alone, or --out was another folder."""
    (tmp_path / "a").mkdir()
    shutil.copy(whole / "last.pt", tmp_path / "a")
    ok(train.main, "--resume", tmp_path / "a/last.pt", "--epochs", 4)
    assert [line["epoch"] for line in log_of(tmp_path / "a")] == [4]
    ok(train.main, "--resume", whole / "last.pt", "--epochs", 4, "--out", tmp_path / "b")
    assert [line["epoch"] for line in log_of(tmp_path / "b")] == [1, 2, 3, 4]
    assert checkpoint_of(whole)["iteration"] * 4 == checkpoint_of(tmp_path / "b")["iteration"] * 3


def test_a_run_of_another_machine_goes_on_on_the_device_of_this_one(whole, tmp_path):
    """A checkpoint of a GPU ended in a traceback on a laptop, one of a laptop kept off the GPU."""
    checkpoint = checkpoint_of(whole)
    checkpoint["args"] |= {"device": "mps", "workers": 99}
    torch.save(checkpoint, tmp_path / "last.pt")
    args, _ = train.parse_args(["--resume", str(tmp_path / "last.pt")])
    assert (args.device, args.workers) == tuple(evaluate.MACHINE.values())


def test_the_loops_workers_end_before_tiles_are_scored(few, tmp_path, monkeypatch):
    """On a GPU machine 16 of them stayed while others read the test tiles."""
    alive = []
    count = evaluate.count

    def watched(*args):
        alive.append(len(multiprocessing.active_children()))
        return count(*args)

    monkeypatch.setattr(evaluate, "count", watched)
    ok(train.main, "--data", few, "--out", tmp_path / "r", *QUICK, "--workers", 1)
    assert alive == [0]


def test_a_full_disk_leaves_the_last_good_checkpoint(whole, tmp_path, monkeypatch):
    """The half that could be written must not have the name of the whole."""
    shutil.copytree(whole, tmp_path / "r")
    before = (tmp_path / "r/last.pt").read_bytes()

    def full(content, path):
        Path(path).write_bytes(before[:1000])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        call(train.main, "--resume", tmp_path / "r/last.pt", "--epochs", 4)
    assert (tmp_path / "r/last.pt").read_bytes() == before


def test_ctrl_c_says_how_to_go_on_and_that_command_goes_on(few, whole, tmp_path, monkeypatch):
    """In the middle of the second epoch: a part of it is lost, and the log has no line twice."""
    half, read = tmp_path / "half", data.Tiles.__getitem__
    epoch = checkpoint_of(whole)["iteration"] // 3 * 8  # tiles of step 1
    press = after(epoch + 30, read, lambda: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(data.Tiles, "__getitem__", press)
    argv = ["--data", few, "--out", half, *QUICK, "--epochs", 3]
    line = one_line_of(*call(train.main, *argv))
    monkeypatch.undo()
    _, command = line.split(": python train.py ")
    assert shlex.split(command) == ["--resume", str(half / "last.pt")]
    ok(train.main, *shlex.split(command))
    assert_equal_runs(whole, half)


def test_ctrl_c_in_the_first_epoch_can_be_resumed_too(few, whole, tmp_path, monkeypatch):
    """The checkpoint of iteration 0 is written before the first one."""
    press = after(9, data.Tiles.__getitem__, lambda: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(data.Tiles, "__getitem__", press)
    argv = ["--data", few, "--out", tmp_path / "r", *QUICK, "--epochs", 3]
    line = one_line_of(*call(train.main, *argv))
    monkeypatch.undo()
    ok(train.main, *shlex.split(line.split(": python train.py ")[1]))
    assert_equal_runs(whole, tmp_path / "r")


def test_ctrl_c_of_a_terminal_ends_workers_too_and_leaves_one_line(few, tmp_path):
    """It goes to all processes of the job: each worker once left a traceback of its own."""
    flags = ["--data", few, "--out", tmp_path / "r", *QUICK, "--epochs", 500, "--workers", 2]
    process = start("train.py", *flags, "--pretrain-epochs", 0)
    for line in process.stdout:
        if line.startswith("epoch "):  # the workers of both loaders are at work
            break
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert len(err.splitlines()) == 1 and err.startswith("interrupted"), err
    assert f"python train.py --resume {tmp_path / 'r/last.pt'}" in err
    assert checkpoint_of(tmp_path / "r")["iteration"] > 0


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--pixel-frac 10", "0 to 1"),
        ("--image-frac -0.1", "0 to 1"),
        ("--pixel-frac nan", "0 to 1"),
        ("--tile 100", "multiple of 8"),
        ("--tile 0", "multiple of 8"),
        ("--width 6", "of 4"),
        ("--width 0", "of 4"),
        ("--epochs 0", "at least 1"),
        ("--pretrain-epochs 2", "no epoch is left"),
        ("--pretrain labels --image-frac 0", "--image-frac"),
        ("--batch-size 0", "--batch-size"),
        ("--device gpu", "--device"),
        ("--device cuda:99", "--device"),
        ("--lr x", "invalid float value"),
        ("--tile 4096", "4096"),
        ("--data {tmp}/empty", "{tmp}/empty"),
        ("--data {tmp}/no", "{tmp}/no"),
        ("--data {tmp}/text", "text.tif"),
        ("--out {run}", "--resume {run}/last.pt"),
        ("--resume {tmp}/text/text.tif", "text.tif"),
        ("--resume {tmp}/no.pt", "no.pt"),
        ("--resume {tmp}/foreign.pt", "foreign.pt"),
        ("--resume {run}/last.pt --width 16", "{run}/last.pt"),
        ("--resume {run}/last.pt --batch-size 4", "--batch-size"),
        ("--resume {run}/last.pt --pixel-frac 0.5", "{run}/last.pt"),
        ("--resume {run}/last.pt --data {tmp}/changed", "{run}/last.pt"),
        ("--resume {run}/last.pt --data {tmp}/fewer", "{run}/last.pt"),
    ],
)
def test_bad_input_to_train_gets_a_line_and_changes_nothing(whole, few, tmp_path, flags, said):
    for name in ("empty", "text"):
        (tmp_path / name).mkdir()
    (tmp_path / "text/normal.tif").write_text("no picture")
    (tmp_path / "text/normal.tif").rename(tmp_path / "text/normal_text.tif")
    torch.save({"state": torch.zeros(1)}, tmp_path / "foreign.pt")
    (tmp_path / "text/text.tif").write_text("no checkpoint") if "--resume" in flags else None
    for name in ("changed", "fewer"):
        if name in flags:
            shutil.copytree(few, tmp_path / name)
    if "changed" in flags:
        xml = tmp_path / "changed/train/synthetic_001.xml"
        xml.write_text(xml.read_text().replace("metastases", "exclusion", 2))
    if "fewer" in flags:
        (tmp_path / "fewer/train/synthetic_003.tif").unlink()
    before = {path: path.read_bytes() for path in whole.iterdir() if path.is_file()}
    names = {"run": whole, "tmp": tmp_path}
    argv = [] if "--resume" in flags else ["--data", few, "--out", tmp_path / "new", *QUICK]
    line = one_line_of(*call(train.main, *argv, *flags.format(**names).split()))
    assert said.format(**names) in line
    assert not (tmp_path / "new").exists()
    assert before == {path: path.read_bytes() for path in whole.iterdir() if path.is_file()}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_block_damaged_in_the_file_is_named_in_one_line(few, tmp_path, workers):
    shutil.copytree(few, tmp_path / "slides")
    path = tmp_path / "slides/train/synthetic_003.tif"
    lv = Slide(path).levels[2]
    with path.open("r+b") as file:
        for offset, count in zip(lv.offsets, lv.counts, strict=True):
            file.seek(offset)
            file.write(bytes(min(count, 60)))
    flags = ["--data", tmp_path / "slides", "--out", tmp_path / "r", *QUICK, "--workers", workers]
    line = one_line_of(*call(train.main, *flags))
    assert line.startswith(f"error: {path}: block ") and "damaged" in line


@pytest.mark.parametrize("name, flags", [("dwce", "--image-frac 0"), ("ce", "--cls-loss ce")])
def test_a_loss_that_is_not_finite_stops_and_leaves_the_good_checkpoint(
    few, tmp_path, monkeypatch, name, flags
):
    """A checkpoint of NaN over the last good one is all that a night leaves."""
    good, log = getattr(loss, name), tmp_path / "r/log.jsonl"

    def breaks(*args, **options):
        return good(*args, **options) * (float("nan") if log.read_text().count("\n") > 1 else 1)

    monkeypatch.setattr(loss, name, breaks)
    argv = ["--data", few, "--out", tmp_path / "r", *QUICK, "--epochs", 4, *flags.split()]
    line = one_line_of(*call(train.main, *argv))
    assert "not finite" in line and "epoch 3" in line and "--lr" in line
    checkpoint = checkpoint_of(tmp_path / "r")
    assert all(value.isfinite().all() for value in checkpoint["model"].values())
    assert len(log_of(tmp_path / "r")) == 2 and checkpoint["iteration"] > 0


# ---------------------------------------------------------------------------------------- evaluate


def test_evaluate_repeats_the_figures_of_training_exactly(run):
    folder, out = run
    again = ok(evaluate.main, "--ckpt", folder / "last.pt", "--device", "cpu")
    (headline,) = (line for line in again.splitlines() if line.startswith("DSC 0."))
    assert headline in out.splitlines()


def test_evaluate_says_that_the_test_slides_are_others_now(run, tmp_path):
    """A test slide was moved to training: three were scored in place of four, without a word."""
    (tmp_path / "last.pt").write_bytes((run[0] / "last.pt").read_bytes())
    argv = evaluate.main, "--ckpt", tmp_path / "last.pt", "--device", "cpu"
    results, told = json.loads((run[0] / "results.json").read_text()), tmp_path / "results.json"
    told.write_text(json.dumps(results))
    assert "other test slides" not in call(*argv)[2]
    results["slides"].append({"slide": "test/moved.tif", "tiles": 9})
    told.write_text(json.dumps(results))
    assert f"{told}: the run scored other test slides" in call(*argv)[2]


def test_a_relative_data_folder_is_that_of_the_training(few, run, tmp_path, monkeypatch):
    """Called elsewhere, evaluate scored another folder of that name as the run's own."""
    monkeypatch.chdir(few.parent)
    args, _ = train.parse_args(["--data", few.name])
    assert args.data == str(few)


def test_the_device_is_the_machines_not_that_of_training(run, tmp_path):
    """A checkpoint from a GPU could not be scored on a laptop without --device cpu."""
    checkpoint = checkpoint_of(run[0])
    checkpoint["args"]["device"] = "mps"
    torch.save(checkpoint, tmp_path / "last.pt")
    assert evaluate.load_model(tmp_path / "last.pt")[1].device == evaluate.MACHINE["device"]


def test_counts_are_those_of_a_loop_over_pixels_whatever_the_batch(run, slides):
    """Dice averaged over batches gives .35 where the pooled one is .71."""
    tiles, rows, args = test_tiles(slides)
    model, counts = Network(8), []
    model.load_state_dict(checkpoint_of(run[0])["model"])
    for args.batch_size in (2, 5, 8):
        counts.append(evaluate.count(model, tiles, rows, args))
        assert np.array_equal(counts[0], counts[-1])
    for n in np.argsort(tiles.table["tumour"][rows])[-3:]:
        image, mask, _ = tiles[int(rows[n]), 0]
        predicted = evaluate.predict(model, torch.stack([image, image]))[0][0] > 0.5
        slow = [0, 0, 0]
        for p, t in zip(predicted.flatten().tolist(), mask.flatten().tolist(), strict=True):
            slow[0] += p and t
            slow[1] += p and not t
            slow[2] += (not p) and t
        assert counts[0][n, :3].tolist() == slow
    results = evaluate.summarise(tiles, rows, counts[0])
    tp, fp, fn = (int(sum(row[k] for row in counts[0])) for k in range(3))
    assert results["counts"] == {"tp": tp, "fp": fp, "fn": fn}
    assert results["dsc"] == 2 * tp / (2 * tp + fp + fn)
    for one in (results, *(s for s in results["slides"] if s["dsc"])):
        assert one["iou"] == pytest.approx(one["dsc"] / (2 - one["dsc"]))
    label = tiles.table["label"][rows]
    right = [c[3] == want for c, want in zip(counts[0], label, strict=True) if want >= 0]
    assert results["accuracy"] == pytest.approx(sum(right) / len(right))


def test_dsc_of_known_counts():
    counts = np.array([[3, 1, 2, 0], [1, 0, 1, 1]])
    assert evaluate.dsc_iou(counts) == (8 / 12, 4 / 8)
    assert evaluate.dsc_iou(np.zeros((2, 4), int)) == (None, None)
    assert evaluate.dsc_iou(counts[:0]) == (None, None)


def test_normal_slides_alone_have_an_accuracy_and_false_positives_but_no_dsc(run, slides, tmp_path):
    """DSC of a slide without tumour is 0 for one wrong pixel: null, not a number."""
    for name in ("normal_1.tif", "normal_2.tif"):
        (tmp_path / name).symlink_to(slides / "train/normal_005.tif")
    argv = ["--ckpt", run[0] / "last.pt", "--data", tmp_path, "--split", "all"]
    line = ok(evaluate.main, *argv).splitlines()[-1]
    assert re.search(r"^DSC null  IoU null  accuracy (0\.\d+|1\.0+)  ", line)
    assert re.search(r"false positives.* \d+ px", line)


def test_other_slides_are_scored_by_the_checkpoint_of_a_run(run, slides):
    """slides/test is the run's test split; of it alone, a part is drawn to test."""
    argv = ["--ckpt", run[0] / "last.pt", "--data", slides / "test", "--split"]
    one, every = (ok(evaluate.main, *argv, split).splitlines()[-1] for split in ("test", "all"))
    assert every in run[1].splitlines() and one != every


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--ckpt {tmp}/no.pt", "no.pt"),
        ("--ckpt {tmp}/foreign.pt", "foreign.pt"),
        ("--ckpt {tmp}/text.pt", "text.pt"),
        ("--ckpt {tmp}/other.pt", "other.pt"),  # of another width than its arguments say
        ("--ckpt {run}/last.pt --data {tmp}", "{tmp}"),  # no slides
        ("--ckpt {run}/last.pt --data {tmp}/one --split test", "--split"),  # no tile in it
        ("", "--ckpt"),
    ],
)
def test_bad_input_to_evaluate_gets_a_line(run, slides, tmp_path, flags, said):
    torch.save({"state": torch.zeros(1)}, tmp_path / "foreign.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    checkpoint = checkpoint_of(run[0])
    checkpoint["args"]["width"] = 12
    torch.save(checkpoint, tmp_path / "other.pt")
    if "/one" in flags:
        (tmp_path / "one").mkdir()
        (tmp_path / "one/normal.tif").symlink_to(slides / "train/normal_005.tif")
    names = {"run": run[0], "tmp": tmp_path}
    line = one_line_of(*call(evaluate.main, *flags.format(**names).split()))
    assert said.format(**names) in line
