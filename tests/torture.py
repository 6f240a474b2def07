"""Hard to break: kill -9, full disks, damaged files, odd names. Slow, so not in the default run.

    python -m pytest tests/torture.py -s    # a quarter of an hour on 2 CPU cores; prints counts
"""
import csv
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import data
import predict
import synthetic
from jobs import TINY

pytestmark = pytest.mark.slow
ROOT = Path(data.__file__).resolve().parent
XML = Path(__file__).parent / "data"
KILLS, MUTANTS, SECONDS, MEGABYTES = 20, 1000, 2, 500       # mutants of each kind, TIFF and XML
EPOCHS = 12

# A shell's & has a job ignore Ctrl-C, and what it starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def start(script, *argv, **options):
    """A job in a process group of its own, as a terminal gives it."""
    return subprocess.Popen([sys.executable, ROOT / script, *map(str, argv)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                            **options)


def finish(process, *status):
    """Wait -> stderr without warnings, a list of lines."""
    _, err = process.communicate(timeout=600)
    assert process.returncode in (status or (0,)), err
    return [line for line in err.splitlines() if not line.startswith("warning: ")]


def assert_readable(folder):
    """Every file that has its name can be read to its end."""
    for path in folder.rglob("*"):
        if path.suffix == ".pt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            [json.loads(line) for line in path.read_text().splitlines()]
        elif path.suffix == ".csv":
            assert len({len(row) for row in csv.reader(path.read_text().splitlines())}) <= 1
        elif path.suffix == ".npz":
            with np.load(path) as saved:
                [saved[name] for name in saved]
        elif path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".xml":
            data.read_annotation(path)
        elif path.suffix == ".tif":
            with tifffile.TiffFile(path) as tif:
                pages = len(tif.pages)
            for page in range(pages):
                list(predict.read_strips(path, page))
        else:
            assert path.suffix == ".part" or path.is_dir(), path


def assert_equal_runs(a, b):
    one, two = (torch.load(f / "last.pt", weights_only=True) for f in (a, b))
    assert all(torch.equal(one["model"][k], two["model"][k]) for k in one["model"])
    for n, state in one["optimizer"]["state"].items():
        assert all(torch.equal(v, two["optimizer"]["state"][n][k]) for k, v in state.items())
    one, two = (json.loads((f / "results.json").read_text())["counts"] for f in (a, b))
    assert one == two


@pytest.fixture(scope="module")
def whole(slides, tmp_path_factory):
    """A run that nothing interrupts -> its folder and the flags that it had."""
    flags = ["--data", slides, *TINY, "--epochs", EPOCHS]
    folder = tmp_path_factory.mktemp("whole") / "r"
    finish(start("train.py", *flags, "--out", folder))
    return folder, flags


# ----------------------------------------------------------------------------- kills, interruptions

def test_training_survives_kill_9_at_any_moment(whole, tmp_path):
    folder, flags = whole
    rng, out, killed, at = random.Random(0), tmp_path / "0", 0, []

    def go_on():
        begun = (out / "last.pt").exists()
        return start("train.py", *(["--resume", out / "last.pt"] if begun
                                   else [*flags, "--out", out]))

    while killed < KILLS:
        process = go_on()
        time.sleep(rng.uniform(2, 9))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
        process.communicate()
        assert process.returncode in (0, -signal.SIGKILL)
        if out.exists():
            assert_readable(out)
        if (out / "last.pt").exists():
            at.append(torch.load(out / "last.pt", weights_only=True)["epoch"])
        if process.returncode == 0:                     # all is done: once more
            assert_equal_runs(folder, out)
            out = tmp_path / str(killed)
    finish(go_on())
    assert_readable(out)
    assert_equal_runs(folder, out)
    print(f"\ntraining: {killed} kills, epochs done at each: {at}")


def test_predicting_survives_kill_9_at_any_moment(whole, slides, tmp_path):
    argv = ["--ckpt", whole[0] / "last.pt", "--device", "cpu", *sorted(slides.rglob("*.tif"))]
    finish(start("predict.py", *argv, "--out", tmp_path / "whole"))
    rng, killed, done, out = random.Random(1), 0, [], tmp_path / "0"

    def assert_same():
        names = {path.name for path in (tmp_path / "whole").iterdir()}
        assert {p.name for p in out.iterdir()} == names
        for name in names - {"slides.csv"}:             # which has seconds in it
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name

    while killed < KILLS:
        process = start("predict.py", *argv, "--out", out)
        time.sleep(rng.uniform(1.5, 7))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
        process.communicate()
        if out.exists():
            assert_readable(out)
            done.append(len(list(out.glob("*.xml"))))
        if process.returncode == 0:                     # all is done: once more
            assert_same()
            out = tmp_path / str(killed)
    finish(start("predict.py", *argv, "--out", out))
    assert_same()
    print(f"\npredicting: {killed} kills, slides done at each: {done}")


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_ctrl_c_ends_soon_saves_and_says_how_to_go_on(whole, tmp_path, method):
    """With workers, however they are started."""
    folder, flags = whole
    script = tmp_path / "job.py"
    script.write_text(f"import multiprocessing, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
                      "import data, train\nif __name__ == '__main__':\n"
                      f"    multiprocessing.set_start_method({method!r})\n"
                      "    data.run(train.main)\n")
    out, took = tmp_path / "r", []
    process = start(script, *flags, "--out", out, "--workers", 2)
    for signals in ((signal.SIGINT,), (signal.SIGTERM,), (signal.SIGINT, signal.SIGINT)):
        for line in process.stdout:                     # soon after an epoch
            if line.startswith("epoch "):
                break
        time.sleep(0.5)
        began = time.time()
        for number in signals:          # a terminal sends to all, kill to one
            (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
            time.sleep(0.2)
        err = finish(process, 130, -signal.SIGINT)      # the second one may meet Python's own end
        took.append(time.time() - began)
        assert err[0].startswith("interrupted; "), err
        assert_readable(out)
        if len(signals) == 1:
            assert len(err) == 1 and f"python train.py --resume {out / 'last.pt'}" in err[0], err
        process = start(script, "--resume", out / "last.pt")
    finish(process)
    assert_equal_runs(folder, out)
    print(f"\nCtrl-C, SIGTERM, Ctrl-C twice with {method}: {', '.join(f'{t:.1f} s' for t in took)}")
    assert max(took) < 4


def test_sigterm_to_the_workers_too_ends_in_a_line(whole, tmp_path):
    """As schedulers send it: torch raises an error of its own where a worker ends first."""
    (folder, flags), out, took = whole, tmp_path / "r", []
    argv = [*flags, "--out", out, "--workers", 2]
    for _ in range(3):
        process = start("train.py", *argv)
        for line in process.stdout:
            if line.startswith("epoch "):
                break
        time.sleep(0.5)
        began = time.time()
        os.killpg(process.pid, signal.SIGTERM)
        err = finish(process, 130)
        took.append(time.time() - began)
        assert len(err) == 1 and err[0].startswith("interrupted; saved in epoch"), err
        assert_readable(out)
        argv = ["--resume", out / "last.pt"]
    finish(start("train.py", *argv))
    assert_equal_runs(folder, out)
    print(f"\nSIGTERM to all: {', '.join(f'{t:.1f} s' for t in took)}")
    assert max(took) < 4


def test_ctrl_c_while_predicting_ends_in_a_line(whole, slides, tmp_path):
    process = start("predict.py", "--ckpt", whole[0] / "last.pt", "--out", tmp_path / "p",
                    *sorted(slides.rglob("*.tif")))
    process.stdout.readline()                           # the first slide is done
    began = time.time()
    os.killpg(process.pid, signal.SIGINT)
    err = finish(process, 130)
    assert len(err) == 1 and err[0].startswith("interrupted; ") and time.time() - began < 4
    assert_readable(tmp_path / "p")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_slide_replaced_during_a_run_is_named(slides, tmp_path, workers):
    """And the process ends: workers that were deaf to SIGTERM once kept it for ever."""
    shutil.copytree(slides, tmp_path / "slides")
    out, (one, two) = tmp_path / "r", sorted((tmp_path / "slides/train").glob("synthetic*.tif"))[:2]
    process = start("train.py", "--data", tmp_path / "slides", *TINY, "--epochs", EPOCHS,
                    "--out", out, "--workers", workers)
    for line in process.stdout:
        if line.startswith("epoch 1 "):
            break
    shutil.copy(two, tmp_path / "new")
    (tmp_path / "new").replace(one)
    err = finish(process, 2)
    assert len(err) == 1 and one.name in err[0] and "changed since" in err[0]
    assert_readable(out)


# ------------------------------------------------------------------------------------ disks, names

@pytest.fixture
def disk(tmp_path):
    """A small file system of its own -> its folder, and a function to mount it anew."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options):
        subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", folder],
                       check=True, capture_output=True)

    try:
        mount("size=4k")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here ({error})")
    yield folder, lambda *options: mount("remount", *options)
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_one_line_and_what_was_saved_stays(whole, slides, disk):
    (folder, mount), (wanted, flags) = disk, whole
    err = finish(start("train.py", *flags, "--out", folder / "r"), 2)
    assert len(err) == 1 and "No space left" in err[0], err
    size = (wanted / "last.pt").stat().st_size + (wanted / "tiles.csv").stat().st_size + (
        wanted / "index.npz").stat().st_size
    mount(f"size={(size + size // 3) // 1024}k")        # one checkpoint, not two
    err = finish(start("train.py", *flags, "--out", folder / "r"), 2)
    assert len(err) == 1 and "No space left" in err[0], err
    assert torch.load(folder / "r/last.pt", weights_only=True)["epoch"] == 1
    err = finish(start("predict.py", "--ckpt", folder / "r/last.pt", *slides.glob("test/*.tif")), 1)
    assert len(err) == 4 and all("No space left" in line for line in err[:3]), err
    assert not list(folder.rglob("*.part"))
    assert_readable(folder)
    mount("size=100m")
    finish(start("train.py", "--resume", folder / "r/last.pt"))
    assert_equal_runs(wanted, folder / "r")


def test_a_folder_that_cannot_be_written_is_one_line(whole, slides, disk):
    (folder, mount), (_, flags) = disk, whole
    mount("size=100m")
    finish(start("train.py", *flags, "--epochs", 2, "--out", folder / "r"))
    mount("ro")
    before = (folder / "r/last.pt").read_bytes()
    for argv, status in ((["train.py", *flags, "--out", folder / "new"], 2),
                         (["train.py", "--resume", folder / "r/last.pt", "--epochs", 3], 2),
                         (["predict.py", "--ckpt", folder / "r/last.pt",
                           next(slides.glob("test/*.tif"))], 1)):
        err = finish(start(*argv), status)
        assert "Read-only" in err[0] and len(err) == status % 2 + 1, err
    assert (folder / "r/last.pt").read_bytes() == before


def test_odd_names_go_all_the_way(slides, tmp_path):
    folder = tmp_path / "it's a \"folder\" ü"
    shutil.copytree(slides, folder)
    for split in ("train", "test"):
        for n, path in enumerate(sorted((folder / split).glob("synthetic*.tif"))):
            name = f"tumör {n} \"a\" it's, 中; $(x)%"
            path.with_suffix(".xml").rename(path.with_name(f"{name}.xml"))
            path.rename(path.with_name(f"{name}.tif"))
    ascii_only = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    out = tmp_path / "a run's ü"
    finish(start("train.py", "--data", folder, *TINY, "--out", out, env=ascii_only))
    finish(start("evaluate.py", "--ckpt", out / "last.pt", env=ascii_only))
    tests = sorted((folder / "test").glob("*.tif"))
    finish(start("predict.py", "--ckpt", out / "last.pt", "--out", tmp_path / "p", *tests,
                 env=ascii_only))
    with open(tmp_path / "p/slides.csv", encoding="utf-8", newline="") as file:
        assert {row["slide"] for row in csv.DictReader(file)} == {path.stem for path in tests}
    process = start("predict.py", "--ckpt", out / "last.pt", "--out", tmp_path / "p", *tests)
    assert process.communicate()[0].count("done before") == len(tests)


def test_a_name_that_is_no_text_is_refused(slides, tmp_path):
    shutil.copytree(slides, tmp_path / "slides")
    os.rename(next((tmp_path / "slides/test").glob("*.tif")),
              os.fsencode(tmp_path / "slides/test/normal") + b"\xff.tif")
    err = finish(start("train.py", "--data", tmp_path / "slides", *TINY, "--out", tmp_path / "r"),
                 2)
    assert len(err) == 1 and "UTF-8" in err[0]


# --------------------------------------------------------------------------------- damaged files

def in_a_fork(function, path):
    """"read" or "refused", whatever else it is in words; seconds; MB, torch's own included."""
    result, began = path.with_suffix(".result"), time.perf_counter()
    if not (child := os.fork()):
        signal.alarm(3 * SECONDS)                       # ends the child
        try:
            function(path)
            said = "read"
        except data.DataError as error:
            said = "refused" if path.name in str(error) and "\n" not in str(error) else repr(error)
        except BaseException as error:
            said = repr(error)
        result.write_text(said)
        os._exit(0)
    _, status, usage = os.wait4(child, 0)
    said = f"status {status}" if status else result.read_text()
    return said, time.perf_counter() - began, usage.ru_maxrss / 1024


def check_mutants(tmp_path, kinds, function, suffix):
    """Every mutant of `kinds` {name: function of random -> bytes} is read or refused, and soon."""
    tally, worst, wrong = Counter(), [0, 0], []
    for n, (name, make) in zip(range(MUTANTS), itertools.cycle(kinds.items())):
        path = tmp_path / f"mutant{suffix}"
        path.write_bytes(make(random.Random(n)))
        said, seconds, megabytes = in_a_fork(function, path)
        worst = [max(a, b) for a, b in zip(worst, (seconds, megabytes))]
        tally[name, said] += 1
        if said not in ("read", "refused") or seconds > SECONDS or megabytes > MEGABYTES:
            wrong.append((n, name, said, round(seconds, 2), round(megabytes)))
    count = Counter(said for _, said in tally.elements())
    print(f"\n{MUTANTS} mutants{suffix}: {count['read']} read, {count['refused']} refused; at most "
          f"{worst[0]:.2f} s, {worst[1]:.0f} MB", *map(str, sorted(tally.items())), sep="\n  ")
    assert not wrong, wrong


def read_slide(path):
    """What train.py does with a slide: open, look for tissue, read."""
    slide = data.Slide(path)
    data.tiles_of(slide, data.Annotation(), 0, 512, 0.05)
    for k, lv in enumerate(slide.levels):
        for x, y in ((0, 0), (lv.width - 70, lv.height - 70), (lv.width // 2, lv.height // 2)):
            slide.read(k, x, y, 100, 100)


NUMBERS = (0, 1, 2, 7, 255, 65535, 10 ** 9, 2 ** 31 - 1, 2 ** 31, 2 ** 32 - 1, 2 ** 63 - 1,
           2 ** 64 - 1)


def flipped(raw, rng, places):
    raw = bytearray(raw)
    for _ in range(rng.choice((1, 3, 20))):
        raw[rng.choice(places)] = rng.randrange(256)
    return bytes(raw)


def spliced(raw, rng):
    size = rng.randrange(1, 2000)
    a, b = (rng.randrange(len(raw)) for _ in range(2))
    return raw[:a] + raw[b:b + size] + raw[a + rng.choice((0, size)):]


def test_damaged_slides_are_read_or_refused(tmp_path):
    synthetic.write_slide(tmp_path / "good", *synthetic.draw_slide(np.random.default_rng(1), 768))
    raw = (tmp_path / "good.tif").read_bytes()
    with tifffile.TiffFile(tmp_path / "good.tif") as tif:
        pages = [tif.pages[k].offset for k in range(len(tif.pages))]
        counts = [struct.unpack_from("<Q", raw, page)[0] for page in pages]
        tags = [page + 8 + 20 * n for page, count in zip(pages, counts) for n in range(count)]
        nexts = [page + 8 + 20 * count for page, count in zip(pages, counts)]
        named = {code: [tag for tag in tags if struct.unpack_from("<H", raw, tag)[0] == code]
                 for code in (256, 257, 322, 323)}      # width, length, of the image and its tiles
    index = [place for tag in tags for place in range(tag, tag + 20)] + list(range(16))

    def put(at, form, value):
        return raw[:at] + struct.pack(form, value) + raw[at + struct.calcsize(form):]

    def field(rng):
        tag = rng.choice(tags)
        offset, form = rng.choice(((0, "<H"), (2, "<H"), (4, "<Q"), (12, "<Q"), (12, "<I")))
        return put(tag + offset, form, rng.choice(NUMBERS) % 2 ** (8 * struct.calcsize(form)))

    def huge(rng):
        changed = raw
        for code in rng.sample(sorted(named), rng.randint(1, 4)):
            for tag in named[code][:rng.choice((1, 9))]:
                entry = struct.pack("<HHQQ", code, 4, 1, rng.choice((10 ** 9, 2 ** 32 - 1)))
                changed = changed[:tag] + entry + changed[tag + 20:]
        return changed

    def glass(width, height, side):
        """A slide of 10^9 px, along one side or in all, with one tile that is not absent."""
        path = tmp_path / "glass.tif"
        synthetic.TIFF_TILE, before = side, synthetic.TIFF_TILE
        tables, tiles = synthetic.jpeg_tiles(Image.new("RGB", (side, side), "red"))
        n = -(-width // side) * -(-height // side)
        synthetic.write_pages(path, [(width, height, tables, [b""] * (n - 1) + tiles)], 0.5)
        synthetic.TIFF_TILE = before
        return path.read_bytes()

    glasses = [glass(10 ** 9, 1, 2048), glass(1, 10 ** 9, 2048), glass(31_623, 31_623, 256),
               glass(10 ** 9, 512, 1024)]
    check_mutants(tmp_path, {
        "bytes": lambda rng: flipped(raw, rng, range(len(raw))),
        "bytes of the index": lambda rng: flipped(raw, rng, index),
        "cut": lambda rng: raw[:rng.randrange(len(raw))],
        "field": field, "sizes of 10^9": huge,
        "cyclic": lambda rng: put(rng.choice(nexts), "<Q", rng.choice(pages)),
        "zeros": lambda rng: (lambda a, b: raw[:a] + bytes(b) + raw[a + b:])(
            rng.randrange(len(raw)), rng.randrange(5000)),
        "spliced": lambda rng: spliced(raw, rng),
        "glass of 10^9 px": lambda rng: rng.choice(glasses)}, read_slide, ".tif")


def read_outlines(path):
    annotation = data.read_annotation(path)
    for xy, _ in annotation.polygons[:3]:
        annotation.mask(*(xy.min(0) // 2).astype(int), 512, 512, 2)


def test_damaged_annotations_are_read_or_refused(tmp_path):
    files = [path.read_bytes() for path in sorted(XML.glob("*.xml"))]

    def number(rng):
        raw = rng.choice(files)
        found = rng.choice(list(re.finditer(rb'[XY]="([^"]*)"', raw)))
        value = rng.choice(["nan", "inf", "1e400", "-1e18", "1e7", "9" * 5000, "", "0x10", "1,5",
                            "9999999", "-9999999.5", "1e-400", "٣"])
        return raw[:found.start(1)] + value.encode() + raw[found.end(1):]

    def bomb(rng):
        inside = rng.choice(("&a9;", "&a5;", "<!-- &a9; -->"))
        lines = "".join(f'<!ENTITY a{k} "{f"&a{k - 1};" * 10 if k else "tumour" * 10}">'
                        for k in range(10))
        quadratic = f'<!ENTITY q "{"a" * 100_000}">'
        outside = '<!ENTITY x SYSTEM "file:///etc/passwd">'
        body = rng.choice((inside, "&q;" * 5000, "&x;", "&unknown;"))
        return (f"<!DOCTYPE ASAP_Annotations [{lines}{quadratic}{outside}]>"
                f"<ASAP_Annotations>{body}</ASAP_Annotations>").encode()

    def deep(rng):
        return b"<ASAP_Annotations>" + b"<Annotation>" * rng.choice((10, 10 ** 5)) + (
            rng.choice((b"", b"</Annotation>" * 10, b"</Annotation>" * 10 ** 5))
            + b"</ASAP_Annotations>")

    def field(rng):
        raw = rng.choice(files)
        name = rng.choice((b"Type", b"PartOfGroup", b"Order", b"Name", b"Coordinate", b"X"))
        value = rng.choice((b"", b'="', b"<", b"&", b"Zzz", b"\xff\xfe", b"a" * 10 ** 6))
        found = rng.choice(list(re.finditer(name, raw)))
        return raw[:found.start()] + value + raw[found.end():]

    check_mutants(tmp_path, {
        "bytes": lambda rng: (lambda raw: flipped(raw, rng, range(len(raw))))(rng.choice(files)),
        "cut": lambda rng: (lambda raw: raw[:rng.randrange(len(raw))])(rng.choice(files)),
        "number": number, "field": field, "entities": bomb, "deep": deep,
        "spliced": lambda rng: spliced(rng.choice(files), rng),
        "encoding": lambda rng: rng.choice(files).decode().encode(rng.choice(
            ("utf-16", "utf-16-le", "utf-32", "cp037")))}, read_outlines, ".xml")


def test_damaged_checkpoints_are_read_or_refused_and_never_run(whole, tmp_path):
    raw = (whole[0] / "last.pt").read_bytes()

    class Stranger:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    def stranger(rng):
        path = tmp_path / "stranger.pt"
        torch.save(torch.load(whole[0] / "last.pt", weights_only=True) | {
            rng.choice(("model", "args", "sums", "new")): Stranger()}, path)
        return path.read_bytes()

    check_mutants(tmp_path, {
        "bytes": lambda rng: flipped(raw, rng, range(len(raw))),
        "cut": lambda rng: raw[:rng.randrange(len(raw))],
        "spliced": lambda rng: spliced(raw, rng), "stranger's": stranger},
        lambda path: predict.load(path, type("Given", (), {})()), ".pt")
    assert not (tmp_path / "ran").exists()
