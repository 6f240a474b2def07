"""Hard to break: kill -9, Ctrl-C, damaged files, odd names. Slow, so not in the default run.

python -m pytest tests/torture.py -s    # ten minutes on 2 CPU cores; prints what it counted
TORTURE=0.1 python -m pytest ...        # a tenth of it
"""

import itertools
import os
import random
import re
import shutil
import signal
import struct
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from jobs import TINY, assert_equal_runs, checkpoint_of, start

import data
import evaluate
from extras import synthetic
from slide import DataError, Slide, read_annotation

pytestmark = pytest.mark.slow
SHARE = float(os.environ.get("TORTURE", 1))
KILLS, TIFFS, XMLS, CHECKPOINTS = (max(2, round(n * SHARE)) for n in (10, 500, 500, 300))
SECONDS, MEGABYTES, EPOCHS = 2, 600, 12  # of a damaged file, the parent's memory included


def finish(process, status=0):
    """Wait -> lines of stderr without warnings."""
    _, err = process.communicate(timeout=600)
    assert process.returncode == status, (process.returncode, err)
    return [line for line in err.splitlines() if not line.startswith("warning: ")]


@pytest.fixture(scope="module")
def whole(few, tmp_path_factory):
    """A run that nothing interrupts -> its folder and the flags that it had."""
    flags = ["--data", few, *TINY, "--epochs", EPOCHS]
    folder = tmp_path_factory.mktemp("whole") / "r"
    finish(start("train.py", *flags, "--out", folder))
    return folder, flags


def killed_again_and_again(command, moments, check):
    """Kill the job of `command()` at KILLS `moments`, `check` what there is; then finish."""
    rng, killed = random.Random(0), 0
    while killed < KILLS:
        process = start(*command())
        time.sleep(rng.uniform(*moments))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        killed += process.returncode != 0
        assert process.returncode in (0, -signal.SIGKILL)
        check(process.returncode == 0)
    finish(start(*command()))
    check(True)


def test_training_survives_kill_9_at_any_moment(whole, tmp_path):
    folder, flags = whole
    runs, at = [tmp_path / "0"], []

    def command():
        done = (runs[-1] / "last.pt").exists()
        where = ["--resume", runs[-1] / "last.pt"] if done else [*flags, "--out", runs[-1]]
        # Checkpoints within an epoch too, as every 10 minutes of a long one.
        return "-c", "import train; train.SAVE_EVERY = 0.2; train.main()", *where

    def check(all_done):
        if (runs[-1] / "last.pt").exists():
            at.append(checkpoint_of(runs[-1])["iteration"])
        if all_done:
            assert_equal_runs(folder, runs[-1], logs=False)  # more lines
            runs.append(tmp_path / str(len(runs)))

    killed_again_and_again(command, (2, 6), check)
    print(f"\ntraining: {KILLS} kills, iterations done at each: {at}")


def test_predicting_survives_kill_9_at_any_moment(whole, few, tmp_path):
    job = ["-m", "extras.predict", "--ckpt", whole[0] / "last.pt", "--device", "cpu"]
    job += [*sorted(few.rglob("*.tif")), "--out"]
    began = time.time()
    finish(start(*job, tmp_path / "whole"))
    took = time.time() - began
    wanted = {p.name: p.read_bytes() for p in (tmp_path / "whole").glob("[!.]*")}
    assert len(wanted) == 4 * 3 + 1
    outs, at = [tmp_path / "0"], []

    def check(all_done):
        files = {p.name: p.read_bytes() for p in outs[-1].glob("[!.]*") if p.suffix != ".part"}
        at.append(len(files))
        for name in files.keys() - {"slides.csv"}:  # which has seconds in it
            assert files[name] == wanted[name], name
        if all_done:
            assert files.keys() == wanted.keys()
            outs.append(tmp_path / str(len(outs)))

    killed_again_and_again(lambda: [*job, outs[-1]], (took / 2, took), check)
    print(f"\npredicting: {KILLS} kills, files done at each: {at}")


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_interruptions_with_workers_end_soon_in_a_line_and_go_on(whole, tmp_path, method):
    """Ctrl-C to all, as of a terminal, while workers start and later; SIGTERM, of a scheduler."""
    (folder, flags), last = whole, tmp_path / "r/last.pt"
    job = f"import multiprocessing as m, train; m.set_start_method({method!r}); train.main()"
    argv = [*flags, "--out", last.parent, "--workers", 2]
    for number, delay in ((2, 0.1), (2, 0.2), (2, 0.4), (signal.SIGTERM, 0.1)):
        process = start("-c", job, *argv)
        while not (process.stdout.readline().startswith("epoch ") and last.exists()):
            pass
        time.sleep(delay)
        os.killpg(process.pid, number)
        began, err = time.time(), finish(process, 1 if number == signal.SIGINT else -number)
        assert time.time() - began < 15  # spawned workers import torch first
        if number == signal.SIGINT:
            assert len(err) == 1 and err[0].endswith(f": python train.py --resume {last}"), err
        argv = ["--resume", last]
    finish(start("-c", job, *argv))
    assert_equal_runs(folder, last.parent)


def test_odd_names_go_all_the_way(slides, tmp_path):
    folder, out = tmp_path / 'it\'s a "folder" ü', tmp_path / "a run's ü"
    shutil.copytree(slides, folder)
    for split in ("train", "test"):
        for n, path in enumerate(sorted((folder / split).glob("synthetic*.tif"))):
            name = f'tumör {n} "a" it\'s, 中; $(x)%'
            path.with_suffix(".xml").rename(path.with_name(f"{name}.xml"))
            path.rename(path.with_name(f"{name}.tif"))
    env = {"env": os.environ | {"LC_ALL": "C"}}
    finish(start("train.py", "--data", folder, *TINY, "--out", out, **env))
    finish(start("evaluate.py", "--ckpt", out / "last.pt", **env))
    tests = sorted((folder / "test").glob("*.tif"))
    job = ["-m", "extras.predict", "--ckpt", out / "last.pt", "--out", tmp_path / "p", *tests]
    finish(start(*job, **env))
    names = {path.name for path in (tmp_path / "p").iterdir()}
    assert names > {f"{path.stem}_pred.xml" for path in tests}


def in_a_fork(function, path):
    """ "read" or "refused", whatever else it is in words; seconds; MB, torch's own included."""
    result, began = path.with_suffix(".result"), time.perf_counter()
    if not (child := os.fork()):
        signal.alarm(3 * SECONDS)  # ends the child
        try:
            function(path)
            said = "read"
        except DataError as error:
            said = "refused" if path.name in str(error) and "\n" not in str(error) else repr(error)
        except BaseException as error:
            said = repr(error)
        result.write_text(said)
        os._exit(0)
    _, status, usage = os.wait4(child, 0)
    said = f"status {status}" if status else result.read_text()
    return said, time.perf_counter() - began, usage.ru_maxrss / 1024


def check_mutants(tmp_path, count, files, kinds, function, suffix):
    """Files are damaged, each by the next of `kinds`: all must be read or refused, and soon."""

    def flip(raw, rng):
        raw = bytearray(raw)
        for _ in range(rng.choice((1, 3, 20))):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        return bytes(raw)

    def splice(raw, rng):
        size, a, b = rng.randrange(1, 2000), rng.randrange(len(raw)), rng.randrange(len(raw))
        return raw[:a] + raw[b : b + size] + raw[a + rng.choice((0, size)) :]

    def cut(raw, rng):
        return raw[: rng.randrange(len(raw))]

    path, tally, worst, wrong = tmp_path / f"mutant{suffix}", Counter(), [0, 0], []
    for n, damage in zip(range(count), itertools.cycle((flip, splice, cut, *kinds)), strict=False):
        rng = random.Random(n)
        path.write_bytes(damage(rng.choice(files), rng))
        said, *cost = in_a_fork(function, path)
        worst = [max(a, b) for a, b in zip(worst, cost, strict=True)]
        tally[said] += 1
        if said not in ("read", "refused") or cost[0] > SECONDS or cost[1] > MEGABYTES:
            wrong.append((n, damage.__name__, said, *cost))
    print(f"\n{count} mutants{suffix}: {dict(tally)}; {worst[0]:.2f} s, {worst[1]:.0f} MB at most")
    assert not wrong, wrong


def read_slide(path):
    """What train.py does with a slide: open, look for tissue, read."""
    slide = Slide(path)
    data.tissue_share(slide, 0, 512)
    for k, lv in enumerate(slide.levels):
        for x, y in ((0, 0), (lv.width - 70, lv.height - 70), (lv.width // 2, lv.height // 2)):
            slide.read(k, x, y, 100, 100)


def test_damaged_slides_are_read_or_refused(tmp_path):
    synthetic.write_slide(tmp_path / "good", *synthetic.draw_slide(np.random.default_rng(1), 768))
    whole, tags = (tmp_path / "good.tif").read_bytes(), []
    with tifffile.TiffFile(tmp_path / "good.tif") as tif:
        pages = [tif.pages[k].offset for k in range(len(tif.pages))]
    for page in pages:
        (count,) = struct.unpack_from("<Q", whole, page)
        tags.append([page + 8 + 20 * n for n in range(count + 1)])  # the last: the next page
    numbers = 0, 1, 2, 7, 255, 65535, 10**9, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1

    def field(raw, rng):
        """Another code, type, count or value of a tag, or of all tags at this place."""
        n, all_pages = rng.randrange(len(tags[0]) - 1), rng.random() < 0.3
        at, form = rng.choice(((0, "<H"), (2, "<H"), (4, "<Q"), (12, "<Q"), (12, "<I")))
        value = struct.pack(form, rng.choice(numbers) % 2 ** (8 * struct.calcsize(form)))
        for places in tags if all_pages else [rng.choice(tags)]:
            raw = raw[: places[n] + at] + value + raw[places[n] + at + len(value) :]
        return raw

    check_mutants(tmp_path, TIFFS, [whole], [field] * 4, read_slide, ".tif")


def test_damaged_annotations_are_read_or_refused(tmp_path):
    numbers = b"nan inf 1e400 -1e18 1e7 0x10 1,5 9999999 -9999999.5 1e-400 -1".split()
    numbers += [b"", b"9" * 5000, "٣".encode()]
    names = b"", b'="', b"<", b"&", b"Zzz", b"\xff\xfe", b"a" * 10**6

    def number(raw, rng, pattern=rb'(?:X|Y|Order)="([^"]*)"', values=numbers):
        found = rng.choice(list(re.finditer(pattern, raw)))
        return raw[: found.start(1)] + rng.choice(values) + raw[found.end(1) :]

    def name(raw, rng):
        return number(raw, rng, rb"(Type|PartOfGroup|Order|Name|Coordinate|X)", names)

    def bomb(_, rng):
        lines = "".join(f'<!ENTITY a{k} "{f"&a{k - 1};" * 10}">' for k in range(1, 10))
        lines += f'<!ENTITY a0 "{"t" * 50}"><!ENTITY q "{"a" * 100_000}">'
        lines += '<!ENTITY x SYSTEM "file:///etc/passwd">'
        body = rng.choice(("&a9;", "&a5;", "<!-- &a9; -->", "&q;" * 5000, "&x;", "&unknown;"))
        text = f"<!DOCTYPE ASAP_Annotations [{lines}]><ASAP_Annotations>{body}"
        return (text + "</ASAP_Annotations>").encode()

    def read_outlines(path):
        annotation = read_annotation(path)
        for xy in sum(annotation.rings.values(), [])[:3]:
            annotation.mask(*(xy.min(0) // 2).astype(int), 512, 512, 2)

    files = [p.read_bytes() for p in sorted((Path(__file__).parent / "data").glob("*.xml"))]
    check_mutants(tmp_path, XMLS, files, [number, name, bomb], read_outlines, ".xml")


def test_damaged_checkpoints_are_read_or_refused_and_never_run(whole, tmp_path):
    class Stranger:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    def strange(_, rng):
        name = rng.choice(("model", "args", "fingerprint", "new"))
        torch.save(checkpoint_of(whole[0]) | {name: Stranger()}, tmp_path / "stranger.pt")
        return (tmp_path / "stranger.pt").read_bytes()

    files = [(whole[0] / "last.pt").read_bytes()]
    check_mutants(tmp_path, CHECKPOINTS, files, [strange], evaluate.load, ".pt")
    assert not (tmp_path / "ran").exists()
