"""Run and write every table and figure of the paper, published beside measured.

    python -m extras.reproduce all --list           # the runs of each name, and about how long
    python -m extras.reproduce table4 strip --data CAMELYON16       # goes on where it was stopped
    python -m extras.reproduce table4 --data ebhi --fractions .01 .1 1 --mpp 2 --tile 112

Names come first; flags that are not known here go to train.py, for all runs. A finished run is a
row of runs.csv in --out, and tables are made of these rows alone: with that file they are printed
again anywhere. Writes tableN.md, fig6.md and, of the checkpoints of seed 0, pictures. The paper's
figures are of CAMELYON: other data can only agree in which row is ahead.
"""

import argparse
import csv
import json
import multiprocessing
import os
import signal
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from functools import lru_cache
from itertools import islice, product
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image, ImageDraw

import data
import evaluate
import train
from extras import baselines
from extras.tables import PICTURES, markdown, tables

OWN = "seed pixel-frac image-frac beta alpha cls-loss seg-loss label-unit out resume".split()
DEFAULTS = {name.replace("_", "-"): value for name, value in vars(train.parse_args([])[0]).items()}
FIGURES = "dsc", "iou", "accuracy", "dsc_cancer_tiles", "slide_dsc", "seconds"
PANEL, PITCH, MARGIN, HEAD = 224, 230, 170, 30  # px of a picture
GREEN, YELLOW = (0, 200, 0), (255, 230, 0)  # truth, prediction


def text(value):
    return value if isinstance(value, str) else f"{value:g}"


def name_of(flags):
    """The name of a run: its flags, those that say a default of train.py left out."""
    said = sorted(k for k, v in flags.items() if k == "pixel-frac" or v != DEFAULTS.get(k))
    return ",".join(f"{k}={text(flags[k])}" for k in said)


def settings(run):
    """What all runs of a sweep share: arguments of train.py -> flags; of --data the last name."""
    said = {name.replace("_", "-"): value for name, value in run.items()}
    said["data"] = said["data"] and Path(said["data"]).resolve().name
    said = {k: str(v) for k, v in said.items() if k not in (*OWN, "device", "workers")}
    said = [f"--{k} {v}" for k, v in said.items() if v not in ("None", "False")]
    return " ".join(said).replace(" True", "")


def runs_of(name, args):
    """What a table or picture shows: {(name of a run, seed): flags}."""
    table, seeds = tables(args.fractions)[name], range(1 if name in PICTURES else args.seeds)
    runs = [table.run(row, column) for row in table.rows for column in table.columns]
    return {(name_of(flags), seed): flags for seed in seeds for flags in runs}


def folder(args, run, seed):
    return Path(args.out, "runs", f"{run},seed={seed}")


def missing(name, args, rows):
    """Those of `runs_of` without a row in runs.csv, or of a picture without its checkpoint."""

    def done(run):
        files = [folder(args, *run) / file for file in ("last.pt", "results.json")]
        return run in rows and (name not in PICTURES or all(file.exists() for file in files))

    return {run: flags for run, flags in runs_of(name, args).items() if not done(run)}


def command(args, flags, seed):
    """Arguments of train.main for a run or, with a method first, of baselines.main."""
    out, own = folder(args, name_of(flags), seed), flags | {"seed": seed}
    method = [own.pop("method")] if "method" in own else []
    if method == ["mil"]:
        own["lr"] = args.common.lr * baselines.MIL_LR
    if not method and (out / "last.pt").exists():
        own["resume"] = str(out / "last.pt")
    return [*method, *args.rest, *(f"--{k}={text(v)}" for k, v in own.items()), f"--out={out}"]


def start_worker():
    """In a worker: slides are opened once, not for every run."""
    kept = lru_cache(2)(data.tile_slides)  # where the split is drawn, each seed has its own slides
    data.tile_slides = lambda sources, *scale: kept(tuple(sources), *scale)


def carry_out(argv, out, flags):
    """One run, in a worker -> its FIGURES; where it failed, what was said."""
    compared, last = argv[0] in baselines.METHODS, out / "last.pt"
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").unlink(missing_ok=True)
    with open(out / "train.log", "a") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            if compared:  # these start anew
                last.unlink(missing_ok=True)
            elif last.exists() and settings(evaluate.load_checkpoint(last)["args"]) != flags:
                raise data.DataError(f"{last} is not of {flags}; remove it, or give another --out")
            (baselines if compared else train).main(argv)
            found = json.loads((out / "results.json").read_text())
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            return f"{error}; see {log.name}"
    found["slide_dsc"] = found["dsc_mean_of_slides"]
    return {name: found[name] for name in FIGURES}


def read_rows(path, flags):
    """runs.csv -> {(name of the run, seed): FIGURES}; DataError for rows of other settings."""
    rows = {}
    for row in csv.DictReader(path.read_text().splitlines() if path.exists() else []):
        if row["flags"] != flags:
            raise data.DataError(f"{path} is of {row['flags']}, not {flags}; give another --out")
        figures = {name: float(row[name]) if row[name] else None for name in FIGURES}
        rows[row["run"], int(row["seed"])] = figures
    return rows


def add_row(path, run, figures, flags):
    lines = [] if path.exists() else [["run", "seed", *FIGURES, "flags"]]
    values = ["" if figures[k] is None else f"{figures[k]:.6g}" for k in FIGURES]
    with open(path, "a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([*lines, [*run, *values, flags]])


def carry_out_all(args, todo):
    """Carry out {(name, seed): flags} in --jobs processes, seed after seed -> how many failed."""
    os.environ.setdefault("OMP_NUM_THREADS", f"{max(1, os.cpu_count() // args.jobs)}")
    spawn, runs, failed = multiprocessing.get_context("spawn"), {}, 0
    with ProcessPoolExecutor(args.jobs, spawn, start_worker) as pool:
        try:
            for run in sorted(todo, key=lambda run: run[1]):
                what = command(args, todo[run], run[1]), folder(args, *run), args.flags
                runs[pool.submit(carry_out, *what)] = run
            for n, future in enumerate(as_completed(runs), 1):
                run, found = runs[future], future.result()
                if isinstance(found, dict):
                    add_row(args.rows, run, found, args.flags)
                    found = "  ".join(f"{k} {v:.4g}" for k, v in found.items() if v is not None)
                else:
                    failed += 1
                print(f"{n}/{len(runs)} {run[0]},seed={run[1]}: {found}", flush=True)
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a second Ctrl-C
            for worker in multiprocessing.active_children():
                worker.terminate()  # a checkpoint is whole at any moment
            sys.exit("interrupted; the same command goes on")
    return failed


def write_table(name, args, rows):
    """NAME.md of the rows of runs.csv -> its text."""

    def measured(flags, metric):
        found = {k: rows.get((name_of(flags), k), {}).get(metric) for k in range(args.seeds)}
        return {seed: value for seed, value in found.items() if value is not None}

    here = Path(args.data).resolve().name if args.data else "synthetic slides"
    caption = f"Paper: CAMELYON. Here: {here}, `python -m extras.reproduce {name} {args.flags}`."
    content = markdown(tables(args.fractions)[name], measured, caption)
    Path(args.out, f"{name}.md").write_text(content, encoding="utf-8")
    return content


def choose(name, tiles, rows, score):
    """Which of the cancer tiles `rows` a picture shows, by a rule: no one has looked at them.

    fig7, small lesions: least tumour, wholly inside its tile where there is such; fig8, large: most
    below 90 %; else at the 25th, 50th and 75th percentile. `score`: share of tumour; strip: DSC.
    """
    order = np.argsort(score, kind="stable").tolist()
    if name == "fig7":
        edges = ((n, tiles[rows[n], 0][1]) for n in order)
        inside = (n for n, m in edges if not (m[[0, -1]].any() or m[:, [0, -1]].any()))
        order = [*islice(inside, 3)] or order[:3]
    elif name == "fig8":
        order = [n for n in order if score[n] < 0.9][:-4:-1] or order[:3]
    else:
        order = [order[round(q * (len(order) - 1))] for q in (0.25, 0.5, 0.75)]
    return rows[order]


def write_picture(name, args):
    """NAME.png: tile | truth | prediction of every column, seed 0, for three test tiles."""
    table, common = tables(args.fractions)[name], args.common
    sources = data.find_slides(args.data, seed=0)
    tiles = data.tile_slides(sources, common.tile, common.mpp, common.level)
    rows = np.flatnonzero(~tiles.table["train"] & (tiles.table["label"] == data.CANCER))
    score, models = tiles.table["tumour"][rows], {}
    for cell in product(table.rows, table.columns):
        flags = table.run(*cell)
        load = baselines.load if "method" in flags else evaluate.load
        models[cell] = model, run = load(folder(args, name_of(flags), seed=0) / "last.pt")
    if name == "strip":  # the last is S+C
        score = [evaluate.dsc_iou(c[None])[0] for c in evaluate.count(model, tiles, rows, run)]

    lines = []
    for n, row in product(choose(name, tiles, rows, score), table.rows):
        (image, mask, _), where = tiles[n, 0], tiles.table[n]
        panels = [panel(image, mask * 0, GREEN), panel(image, mask, GREEN)]
        for model, run in (models[row, column] for column in table.columns):
            found = evaluate.predict(model, image[None].to(run.device), run.amp)[0][0] > 0.5
            panels.append(panel(image, found.cpu(), YELLOW))
        slide = Path(tiles.sources[where["slide"]].name).stem
        lines.append((f"{row}\n{slide}\nx {where['x']}, y {where['y']}".strip(), panels))
    path = Path(args.out, f"{name}.png")
    draw(["tile", "truth", *table.columns], lines).save(path)
    return path


def panel(image, mask, colour):
    """A tile (3, T, T) with the border of a mask (T, T) -> a picture of PANEL x PANEL px."""
    image = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((PANEL, PANEL))
    mask = Image.fromarray(mask.numpy().astype(np.uint8)).resize((PANEL, PANEL), Image.NEAREST)
    return Image.fromarray(evaluate.draw_outline(np.asarray(image), mask, colour))


def draw(heads, lines):
    """A picture of `lines` [(text, panels)], with `heads` over the panels."""
    width, height = MARGIN + PITCH * len(heads), HEAD + PITCH * len(lines)
    picture = Image.new("RGB", (width, height), "white")
    for column, head in enumerate(heads):
        ImageDraw.Draw(picture).text((MARGIN + column * PITCH, 6), head, "black", font_size=16)
    for line, (said, panels) in enumerate(lines):
        ImageDraw.Draw(picture).text((6, HEAD + line * PITCH), said, "black", font_size=14)
        for column, one in enumerate(panels):
            picture.paste(one, (MARGIN + column * PITCH, HEAD + line * PITCH))
    return picture


def parse_args(argv, names):
    """Command line -> arguments; `rest` is train.py's, `common` how it reads them."""
    said = {"description": __doc__, "usage": "python -m extras.reproduce NAME... [flags]"}
    said["formatter_class"] = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(**said, allow_abbrev=False)
    add = parser.add_argument
    add("names", nargs="+", metavar="NAME", help=f"{', '.join(names)}, or all")
    add("--data", help="folder of slides (default: synthetic slides)")
    add("--out", default="results", help="folder of runs.csv, tables, pictures, runs (results)")
    add("--seeds", type=int, default=3, help="seeds 0, 1, ..., at most 10 (3)")
    add("--fractions", type=float, nargs="+", help="shares of masks, in place of the paper's")
    add("--jobs", type=int, default=1, help="runs at a time; 0 writes what runs.csv has (1)")
    add("--list", action="store_true", help="print the runs of each name, and run nothing")
    args, args.rest = parser.parse_known_args(argv)
    unknown = [name for name in args.names if name not in (*names, "all")]
    if unknown:
        parser.error(f"{', '.join(unknown)}: give some of {', '.join(names)}, or all, first")
    if clash := {flag[2:].split("=")[0] for flag in args.rest} & set(OWN):
        parser.error(f"--{sorted(clash)[0]} is what the runs differ in; leave it out")
    fractions = sorted(set(args.fractions or [1]))
    if not (0 <= fractions[0] and 0 < fractions[-1] <= 1 <= args.seeds <= 10):
        parser.error("--fractions are shares, one above 0; --seeds 1 to 10")
    args.fractions = args.fractions and fractions
    args.names = names if "all" in args.names else args.names
    args.rest += ["--data", args.data] if args.data else []
    args.common, _ = train.parse_args(args.rest)
    args.flags = settings(vars(args.common))
    args.rows = Path(args.out, "runs.csv")
    return args


def main(argv=None):
    args = parse_args(argv, [*tables()])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else workers go on alone
    rows = read_rows(args.rows, args.flags)
    lacking = {name: missing(name, args, rows) for name in args.names}
    if args.list:
        minutes = median([row["seconds"] for row in rows.values()] or [0]) / 60
        for name, runs in lacking.items():
            about = f", about {len(runs) * minutes / max(1, args.jobs):.0f} minutes" * bool(rows)
            print(f"{name}: {len(runs_of(name, args))} runs, {len(runs)} missing{about}")
        return
    args.rows.parent.mkdir(parents=True, exist_ok=True)
    todo = {run: flags for runs in lacking.values() for run, flags in runs.items()}
    failed = carry_out_all(args, todo) if todo and args.jobs else 0
    rows = read_rows(args.rows, args.flags)
    for name in args.names:
        if name not in PICTURES:
            print(write_table(name, args, rows))
        elif not missing(name, args, rows):
            print(write_picture(name, args))
    if failed:
        raise data.DataError(f"{failed} of {len(todo)} runs failed; give the same command again")


if __name__ == "__main__":
    main()
