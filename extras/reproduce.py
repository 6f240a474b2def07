"""Run and write every table and figure of the paper, published beside measured.

    python -m extras.reproduce all --list           # how many runs each has, how many are missing
    python -m extras.reproduce table4 strip --data CAMELYON16 --fractions .01 .1 1 --jobs 2
    python -m extras.reproduce curve runs/x runs/y    # losses and DSC by epoch: curve.png in --out

Names come first; flags that are not known here go to train.py, for all runs. A finished run is a
row of runs.csv in --out: the same command goes on where it was stopped, and tables are made of
these rows alone. Writes tableN.md, masks.svg with table4, fig6.md and fig6.svg, pictures of the
checkpoints of seed 0. The paper is of CAMELYON: other data can only agree in which row is ahead.
"""

import argparse
import csv
import hashlib
import json
import multiprocessing
import os
import re
import signal
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

import data
import evaluate
import train
from evaluate import GREEN, YELLOW, panel
from extras import baselines, plots
from extras.tables import markdown, tables
from slide import DataError

VARIED = "seed pixel_frac image_frac label_unit alpha beta cls_loss seg_loss pretrain".split()
FIGURES = "dsc", "iou", "accuracy", "dsc_cancer_tiles", "slide_dsc", "seconds"
PICTURES = {"fig5": 0.5, "fig7": 0, "fig8": 0.75, "strip": None}  # share of tumour in the tiles


def settings(run):
    """Arguments of train.py -> flags that all runs share; for --data the name of its folder."""
    shared = run | {"data": run["data"] and Path(run["data"]).resolve().name}
    own = *VARIED, "resume", "out", "device", "workers"
    shared = {k: str(v) for k, v in shared.items() if k not in own}
    shared = {k.replace("_", "-"): v for k, v in shared.items() if v not in ("None", "False")}
    return " ".join(f"--{k} {v}".removesuffix(" True") for k, v in shared.items())


def slides_key(folder):
    """A hash of a folder's slides and annotations: names, sizes, text of XML and label tables."""
    key = hashlib.sha256()
    for path in sorted(data.walk(Path(folder), set())):
        text = path.suffix.lower() == ".xml" or path.name.lower() in data.LABEL_TABLES
        if text or path.suffix.lower() in (".tif", ".tiff", ".svs"):
            key.update(f"{path.relative_to(folder)} {path.stat().st_size}".encode())
            key.update(path.read_bytes() if text else b"")
    return key.hexdigest()[:12]


def runs_of(name, args):
    """What a table or picture shows: {(run, seed)}."""
    table, seeds = args.tables[name], range(1 if name in PICTURES else args.seeds)
    runs = (table.run(*cell) for cell in product(table.rows, table.columns))
    return {*product(runs, seeds)}


def start_worker():
    """In a worker: slides are opened once, not for every run."""
    kept = lru_cache(2)(data.tile_slides)  # where the split is drawn, each seed has its own slides
    data.tile_slides = lambda sources, *scale: kept(tuple(sources), *scale)


def carry_out(args, run, seed):
    """One run, in a worker -> its FIGURES as text; the error message if it failed."""
    out = Path(args.out, "runs", f"{run},seed={seed}")
    flags = dict(flag.split("=") for flag in run.split(",")) | {"seed": seed, "out": out}
    method, last = flags.pop("method", None), out / "last.pt"
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "train.log", "a") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            if method:
                last.unlink(missing_ok=True)  # these start anew
                flags["lr"] = args.common.lr * (baselines.MIL_LR if method == "mil" else 1)
            elif last.exists():
                if settings(evaluate.load_checkpoint(last)["args"]) != args.flags:
                    raise DataError(f"{last} is not of {args.flags}; give another --out")
                flags["resume"] = last
            argv = [*args.rest, *(f"--{name}={value}" for name, value in flags.items())]
            if method:
                baselines.main([method, *argv])
            else:
                train.main(argv)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            return f"{error}; see {log.name}"
    results = json.loads((out / "results.json").read_text())
    results["slide_dsc"] = results["dsc_mean_of_slides"]
    return {name: "" if results[name] is None else f"{results[name]:.6g}" for name in FIGURES}


def carry_out_all(args, todo):
    """Carry out [(run, seed)] in --jobs processes; each that ends well is a row of runs.csv."""
    os.environ.setdefault("OMP_NUM_THREADS", f"{max(1, os.cpu_count() // args.jobs)}")
    pool = ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"), start_worker)
    with pool, open(args.rows, "a", buffering=1, newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        if not file.tell():
            rows.writerow(["run", "seed", *FIGURES, "flags", "slides"])
        try:
            jobs = {pool.submit(carry_out, args, *run): run for run in todo}
            for n, job in enumerate(as_completed(jobs), 1):
                run, figures = jobs[job], job.result()
                if isinstance(figures, dict):
                    rows.writerow([*run, *figures.values(), args.flags, args.slides])
                    figures = "  ".join(f"{k} {value}" for k, value in figures.items() if value)
                print(f"{n}/{len(jobs)} {run[0]},seed={run[1]}: {figures}", flush=True)
        except KeyboardInterrupt:
            for worker in multiprocessing.active_children():
                worker.terminate()  # a checkpoint is whole at any moment
            raise SystemExit("interrupted; the same command goes on") from None


def read_rows(args):
    """runs*.csv -> {(run, seed): figures that it has}; DataError for rows of other settings.

    A folder of the same name is not the same data: rows know their slides, but those of docs/.
    """
    rows = {}
    for path in sorted(Path(args.out).glob("runs*.csv")):  # of all shards
        for row in csv.DictReader(path.read_text().splitlines()):
            if row["flags"] != args.flags:
                raise DataError(f"{path} is of {row['flags']}; give another --out")
            if args.slides and row.get("slides") and row["slides"] != args.slides:
                raise DataError(f"{path} is of other slides or annotations; give another --out")
            rows[row["run"], int(row["seed"])] = {k: float(row[k]) for k in FIGURES if row[k]}
    return rows


def draw(name, args):
    """A picture: tile, truth and the predictions of seed 0 for three tiles that a rule chooses.

    Those nearest to a share of tumour; for strip, the quartiles of the DSC of its last column.
    """
    table, models, lines = args.tables[name], {}, []
    for cell in product(table.rows, table.columns):
        run = table.run(*cell)
        load = baselines.load_method if "method" in run else evaluate.load_model
        models[cell] = model, trained = load(Path(args.out, "runs", f"{run},seed=0", "last.pt"))
    trained.data, trained.seed = args.common.data, 0
    tiles = evaluate.find_tiles(trained)
    cancer = tiles.has_mask & (tiles.table["label"] == data.CANCER)
    rows = np.flatnonzero(~tiles.table["train"] & cancer)
    if name == "strip":
        counts = evaluate.count(model, tiles, rows, trained)  # of the last model
        order = np.argsort([evaluate.dsc_iou(c[None])[0] for c in counts], kind="stable")
        order = [order[round(q * (len(order) - 1))] for q in (0.25, 0.5, 0.75)]
    else:
        order = np.abs(tiles.table["tumour"][rows] - PICTURES[name]).argsort(kind="stable")[:3]

    for n, row in product(rows[order].tolist(), table.rows):
        (image, mask, _), (slide, x, y, *_) = tiles[n, 0], tiles.table[n]
        where = f"{Path(tiles.sources[slide].name).stem}, x {x}, y {y}"
        panels = [panel(image, mask < -1, GREEN, where), panel(image, mask == 1, GREEN, "truth")]
        for column in table.columns:
            model, trained = models[row, column]
            p = evaluate.predict(model, image[None].to(trained.device), trained.amp)[0][0]
            panels.append(panel(image, p.cpu() > 0.5, YELLOW, f"{row} {column}".strip()))
        lines.append(np.concatenate(panels, 1))
    return Image.fromarray(np.concatenate(lines))


def parse_args(argv=None):
    """Command line -> arguments; `rest` is train.py's, `common` how it reads them."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = evaluate.AS_WRITTEN
    add = parser.add_argument
    add("names", nargs="+", choices=[*tables(), "all"], help="before all flags")
    add("--out", default="results", help="folder of runs.csv, tables, pictures, runs (results)")
    add("--seeds", type=int, default=3, choices=range(1, 11), help="0, 1, ... (3)")
    add("--fractions", type=float, nargs="+", help="shares of masks, in place of the paper's")
    add("--jobs", type=int, default=1, help="runs at a time; 0 writes what runs.csv has (1)")
    add("--shard", help="I/N: every N-th run from the I-th, its rows in runs-I.csv: many machines")
    add("--list", action="store_true", help="print how many runs each name has, and run nothing")
    args, args.rest = parser.parse_known_args(argv)
    args.common, plain = train.parse_args(args.rest)[0], train.parse_args([])[0]
    own = [*VARIED, "resume"]
    if varied := [name for name in own if vars(args.common)[name] != vars(plain)[name]]:
        parser.error(f"runs differ in {', '.join(varied)}; leave it out")
    if not all(0 <= fraction <= 1 for fraction in args.fractions or []):
        parser.error("--fractions are shares, 0 to 1")
    args.tables, args.rows = tables(sorted(args.fractions or [])), Path(args.out, "runs.csv")
    if args.shard:
        if not re.fullmatch(r"[1-9]\d*/[1-9]\d*", args.shard):
            parser.error("--shard is I/N, as 1/4, 2/4, 3/4, 4/4")
        args.shard = [int(number) for number in args.shard.split("/")]
        args.rows = args.rows.with_stem(f"runs-{args.shard[0]}")
    args.names = [*args.tables] if "all" in args.names else args.names
    args.flags, folder = settings(vars(args.common)), args.common.data
    args.slides = slides_key(folder) if folder and Path(folder).is_dir() else ""
    return args


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["curve"]:
        return plots.curve(argv[1:])
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else workers go on alone
    rows, runs = read_rows(args), {name: runs_of(name, args) for name in args.names}
    if args.list:
        for name in args.names:
            print(f"{name}: {len(runs[name])} runs, {len(runs[name] - rows.keys())} missing")
        return
    args.rows.parent.mkdir(parents=True, exist_ok=True)
    todo = sorted(set().union(*runs.values()), key=lambda run: run[::-1])  # seed after seed
    if args.shard:
        todo = todo[args.shard[0] - 1 :: args.shard[1]]
    todo = [run for run in todo if run not in rows]
    if args.jobs:
        carry_out_all(args, todo)
    rows = read_rows(args)
    here = Path(args.common.data or "synthetic slides").resolve().name
    for name in args.names:
        if name not in PICTURES:
            how = f"`python -m extras.reproduce {name} {args.flags}`"
            text = markdown(args.tables[name], rows, f"Paper: CAMELYON. Here: {here}, {how}.")
            Path(args.out, f"{name}.md").write_text(text, encoding="utf-8")
            print(text)
            plots.write(name, args.out, args.tables[name], rows)
        elif runs[name] <= rows.keys():
            draw(name, args).save(Path(args.out, f"{name}.png"))
    if args.jobs and (failed := {*todo} - rows.keys()):
        raise DataError(f"{len(failed)} of {len(todo)} runs failed; run the command again")


if __name__ == "__main__":
    main()
