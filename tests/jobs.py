"""Calling the jobs as a user does, in this process or in one of their own; what they leave."""

import contextlib
import io
import json
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
TINY = "--tile 64 --mpp 1 --width 8 --lr 3e-3 --epochs 2 --pretrain-epochs 1 --device cpu".split()
QUICK = ["--tile", "32", "--mpp", "2", *TINY[4:]]  # the same tiles in a quarter of the pixels
NOISE = ("usage: ", "warning: ", "Downloading: ")  # beside an error: argparse's, ours, torch's


def call(main, *argv):
    """Run a job -> exit status, stdout, stderr, as `python` would have them."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # train.main sets its own
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(a) for a in argv])
        except SystemExit as stop:  # DataError too: its code is a text, which Python prints
            status = stop.code or 0
            # A cycle of error and frames would keep the workers until they are in the way.
            traceback.clear_frames(stop.__traceback__)
        finally:
            signal.signal(signal.SIGINT, before)
    if isinstance(status, str):
        print(status, file=err)
        status = 1
    return status, out.getvalue(), err.getvalue()


def ok(main, *argv):
    """Run a job that must succeed -> stdout."""
    status, out, err = call(main, *argv)
    assert status == 0, err
    return out


def one_line_of(status, out, err):
    """The line of an error, which is all that a job that fails may print beside warnings."""
    lines = [line for line in err.splitlines() if line.strip() and not line.startswith(NOISE)]
    lines = [line for line in lines if not line.startswith(" ")]  # usage: goes over many lines
    assert status != 0 and len(lines) == 1, (status, err)
    return lines[0]


def start(*command, **options):
    """`python command`, from the root, in a process group of its own, as a terminal gives it."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, *map(str, command)]
    return subprocess.Popen(command, start_new_session=True, cwd=ROOT, **pipes | options)


def checkpoint_of(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_equal_runs(a, b, logs=True):
    """Weights, Adam's state, counts, tiles and, unless `logs` is False, log but for times."""
    one, two = checkpoint_of(a), checkpoint_of(b)
    assert one["iteration"] == two["iteration"] and one["fingerprint"] == two["fingerprint"]
    assert all(torch.equal(one["model"][k], two["model"][k]) for k in one["model"])
    for n, state in one["optimizer"]["state"].items():
        assert all(torch.equal(v, two["optimizer"]["state"][n][k]) for k, v in state.items())
    figures = [json.loads((f / "results.json").read_text()) for f in (a, b)]
    assert figures[0]["counts"] == figures[1]["counts"]
    assert (a / "tiles.csv").read_text() == (b / "tiles.csv").read_text()
    if not logs:
        return
    times = ("seconds", "iterations_per_s")
    logs = [[{k: v for k, v in x.items() if k not in times} for x in log_of(f)] for f in (a, b)]
    assert logs[0] == logs[1]
