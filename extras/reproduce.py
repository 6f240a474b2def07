"""Every table and figure of the paper, published beside measured.

    python reproduce.py --list                      # what there is, its runs, what they would take
    python reproduce.py all --jobs 2                # --budget quick, for two CPU cores
    python reproduce.py table4 fig7 --budget full --seeds 3 --data CAMELYON16      # on a GPU

Runs train.py where --out has no result of the same arguments, goes on with runs that were stopped,
and writes tableN.md and .csv, fig6.md, .csv (and .png where matplotlib is), fig5, 7, 8.png there.
Flags that are not known here go to train.py. The paper's figures are of CAMELYON: other data can
only agree in which row is ahead.
"""
import argparse
import csv
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

import data
import evaluate
import outline
import predict
import train

BASE = {"quick": {"tile": 128, "mpp": 1.0, "width": 16, "lr": 1e-3, "epochs": 3,
                  "pretrain-epochs": 1}, "full": {}}
SECONDS = {"quick": 60, "full": 600}            # of a run, until one is done
QUICK = 0, 0.01, 0.1, 0.5, 1                    # of the paper's fractions


class Line(NamedTuple):
    """A row of a table: for every column what the paper has, and the run that measures it."""
    name: str
    metric: str                 # of results.json
    paper: list                 # of float or None
    runs: list                  # of flags of train.py, or None


class Table(NamedTuple):
    title: str
    columns: list
    lines: list


# ----------------------------------------------------------------------------------- what is run

S, SC = {"image-frac": 0}, {}
PICTURES = {"fig5": "table3", "fig7": "table6", "fig8": "table6"}       # and whose runs they show
DEFAULTS = {"beta": 3, "alpha": 1.0, "cls-loss": "dwce", "seg-loss": "dwce", "image-frac": 1}
LOSS_PAIRS = {"CE + CE": ("ce", "ce"), "CE + FW": ("ce", "fw"), "FW + FW": ("fw", "fw"),
              "FW + DWF": ("fw", "dwce"), "DWF + DWF": ("dwce", "dwce")}
METHODS = {"transfer learning": "transfer", "multi-task": "multitask", "multiple-instance": "mil",
           "this method": "ours"}
# Tables 4 to 7 as printed; the others have one pixel fraction, which the paper does not give.
FRACTIONS = 0, 0.01, 0.05, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1
S_DSC = .596, .641, .648, .728, .803, .836, .841, .849, .853, .859, .868
SC_DSC = .685, .722, .731, .831, .835, .839, .844, .854, .855, .860, .871
S_IOU = .425, .472, .480, .573, .671, .719, .727, .739, .745, .753, .767
SC_IOU = .522, .566, .578, .692, .718, .724, .731, .746, .748, .755, .773
COMPARED = 0, 0.01, 0.05, 0.1, 0.2, 0.5, 1
METHOD_DSC = {"transfer": (.619, .626, .674, .724, .803, .839, .866),
              "multitask": (.626, .634, .654, .751, .812, .829, .853),
              "mil": (.583, .611, .636, .712, .800, .834, .857)}
METHOD_IOU = {"transfer": (.449, .456, .509, .568, .671, .723, .764),
              "multitask": (.456, .464, .487, .601, .683, .708, .743),
              "mil": (.412, .440, .467, .553, .667, .716, .751)}


def tables(budget):
    """Name -> Table, of the fractions that `budget` runs."""
    # Deviation: the paper does not give the pixel fraction of its Tables 1 to 3; here 10 %, its
    # headline row.
    def both(title, columns, dsc, iou, runs):
        return Table(title, columns, [Line("DSC", "dsc", dsc, runs), Line("IoU", "iou", iou, runs)])

    def at(fractions, flags, values=None):
        chosen = [f for f in fractions if budget == "full" or f in QUICK]
        # All masks are all masks, by tile or by slide: one run.
        runs = [{k: v for k, v in flags.items() if (k, f) != ("label-unit", 1)}
                | {"pixel-frac": f} for f in chosen]
        paper = [values[fractions.index(f)] if values else None for f in chosen]
        return paper, runs

    def percent(fractions):
        return [f"{100 * f:g} %" for f in fractions if budget == "full" or f in QUICK]

    def groups(metric, s, sc):
        return [Line("S", metric, *at(FRACTIONS, S, s)),
                Line("S+C", metric, *at(FRACTIONS, SC, sc)),
                Line("S+C, normal masks", metric, *at(FRACTIONS, {"normal-masks": True})),
                Line("S, masks by slide", metric, *at(FRACTIONS, S | {"label-unit": "slide"})),
                Line("S+C, masks by slide", metric, *at(FRACTIONS, {"label-unit": "slide"}))]

    def methods(metric, s, sc, values):         # S and this method are of Tables 4 and 5
        s, sc = ([row[FRACTIONS.index(f)] for f in COMPARED] for row in (s, sc))
        values = values | {"ours": sc}
        return [Line("S, of Table 4 or 5", metric, *at(COMPARED, S, s))] + [
            Line(name, metric, *at(COMPARED, {"method": method} if method != "ours" else {},
                                   values[method])) for name, method in METHODS.items()]

    betas, alphas, base = [1, 2, 3, 4, 5, 6], [0.1, 0.2, 0.5, 0.8, 1.0], {"pixel-frac": 0.1}
    n = [0, 0.1, 0.25, 0.5] if budget == "quick" else [0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5]
    return {
        "table1": both("at beta", betas, [.8431, .8437, .8479, .8450, .8423, .8419],
                       [.7288, .7296, .7360, .7316, .7276, .7269],
                       [base | {"beta": b} for b in betas]),
        "table2": both("at alpha", alphas, [.8445, .8473, .8469, .8471, .8479],
                       [.7309, .7351, .7344, .7347, .7360], [base | {"alpha": a} for a in alphas]),
        "table3": both("with class + segmentation loss", list(LOSS_PAIRS),
                       [.8411, .8415, .8425, .8438, .8479], [.7258, .7263, .7279, .7298, .7360],
                       [base | {"cls-loss": c, "seg-loss": s} for c, s in LOSS_PAIRS.values()]),
        "table4": Table("DSC at pixel labels on", percent(FRACTIONS), groups("dsc", S_DSC, SC_DSC)),
        "table5": Table("IoU at pixel labels on", percent(FRACTIONS), groups("iou", S_IOU, SC_IOU)),
        "table6": Table("DSC at pixel labels on", percent(COMPARED),
                        methods("dsc", S_DSC, SC_DSC, METHOD_DSC)),
        "table7": Table("IoU at pixel labels on", percent(COMPARED),
                        methods("iou", S_IOU, SC_IOU, METHOD_IOU)),
        "fig6": Table("accuracy at N", [f"{100 * i:g} %" for i in n], [
            Line("S+C", "accuracy", [None] * len(n),
                 [{"pixel-frac": round(1 - 2 * i, 4), "image-frac": i} if i else None for i in n]),
            Line("S+C'", "accuracy", [None] * len(n),
                 [{"pixel-frac": round(1 - 2 * i, 4), "image-frac": 0.5} for i in n]),
            Line("S'+C", "accuracy", [None] * len(n),
                 [{"pixel-frac": 1, "image-frac": i} if i else None for i in n])])}


# ----------------------------------------------------------------------------------- running it

def runs_of(names, budget):
    """The runs that these tables and figures need, each once: [flags]."""
    needed = {}
    for name in names:
        for line in tables(budget)[PICTURES.get(name, name)].lines:
            needed |= {run_name(flags): flags for flags in line.runs if flags is not None}
    return list(needed.values())


def run_name(flags):
    """A run in words; flags that say a default of train.py are left out."""
    return ",".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}"
                    for k, v in sorted(flags.items()) if DEFAULTS.get(k) != v)


def folder(args, flags, seed):
    """The folder of a run. Other budgets, data or flags of train.py have other folders."""
    base = BASE[args.budget] | {"data": args.data and os.path.abspath(args.data)}
    key = hashlib.sha256(json.dumps([base, args.rest], sort_keys=True).encode()).hexdigest()[:8]
    return Path(args.out, "runs", f"{args.budget}-{key}", f"{run_name(flags)},seed={seed}")


def command(args, flags, seed):
    """train.py's command line for a run; on, where a checkpoint of it is there."""
    out = folder(args, flags, seed)
    if (out / "last.pt").exists():
        return ["--resume", str(out / "last.pt")]
    flags = BASE[args.budget] | {"data": args.data, "out": out, "seed": seed} | flags
    if flags.get("method") == "mil" and "lr" in flags:
        flags["lr"] *= 5                                # as in its paper: 5e-4, ours has 1e-4
    line = []
    for name, value in flags.items():
        if value is not None:
            line += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return line + args.rest


def result(args, flags, seed):
    """results.json of a run, or None."""
    path = folder(args, flags, seed) / "results.json"
    return json.loads(path.read_text()) if path.exists() else None


def carry_out(args, flags, seed):
    """Run train.py unless it is done -> what to print."""
    out, known = folder(args, flags, seed), result(args, flags, seed)
    if known is None:
        out.mkdir(parents=True, exist_ok=True)
        script = Path(__file__).resolve().parent / "train.py"
        with open(out / "train.log", "a") as log:
            process = subprocess.Popen([sys.executable, script, *command(args, flags, seed)],
                                       stdout=log, stderr=log)
            args.running.append(process)
            code = process.wait()
        if code:
            said = (out / "train.log").read_text().strip().split("\n")[-1]
            return f"error: {out}: exit status {code}: {said}"
        known = result(args, flags, seed)
    return f"{out.name}: {evaluate.headline(known)}, {known['seconds']:.0f} s"


# ------------------------------------------------------------------------------ tables and figures

def measure(table, results):
    """The metric of every run: {line: [[a value per seed] per column]}; `results(flags)` -> [dict].

    Runs that are missing, and accuracies of branches that nothing trained, are left out.
    """
    def values(line, flags):
        found = results(flags) if flags is not None else []
        return [r[line.metric] for r in found if r and r[line.metric] is not None]

    return {line.name: [values(line, flags) for flags in line.runs] for line in table.lines}


def mean_sd(values):
    """[] -> "", [.5] -> "0.500", [.5, .6] -> "0.550 +- 0.071": the sample's deviation."""
    if not values:
        return ""
    text = f"{statistics.mean(values):.3f}"
    return text + (f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def gaps(lines):
    """Of the gap between S at a fraction and S at 100 %, the share that image labels close.

    {name: [value or None per column]}, S first -> the same without S. None where there is no gap
    worth the name, below .02.
    """
    if not lines:
        return {}
    (_, s), *others = lines.items()

    def share(x, low):
        return None if None in (x, low, s[-1]) or s[-1] - low < 0.02 else (x - low) / (s[-1] - low)

    return {name: [share(x, low) for x, low in zip(values, s)] for name, values in others}


def write_table(path, table, measured, caption):
    """`path`.md and .csv: the paper's row above ours; in Tables 4 to 7 the gap that is closed."""
    means = {name: [statistics.mean(v) if v else None for v in values]
             for name, values in measured.items()}
    rows = []
    for line in table.lines:
        if any(value is not None for value in line.paper):
            rows.append([f"{line.name}, paper", *line.paper])
        rows.append([f"{line.name}, here", *map(mean_sd, measured[line.name])])
    if table.lines[0].runs[0] == S | {"pixel-frac": 0}:
        paper = {line.name: line.paper for line in table.lines if line.paper[0] is not None}
        tile = {name: values for name, values in means.items() if "slide" not in name}
        slide = {name: values for name, values in means.items() if "slide" in name}
        for whose, lines in (("paper", paper), ("here", tile), ("here", slide)):
            rows += [[f"{name} closes, {whose}", *shares] for name, shares in gaps(lines).items()]
    rows = [[cell if isinstance(cell, str) else "" if cell is None
             else f"{cell:.0%}" if "closes" in row[0] else f"{cell:.4f}".removesuffix("0")
             for cell in row] for row in rows]
    head = [table.title, *map(str, table.columns)]
    text = ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]
    with data.atomic(f"{path}.md", "w") as file:
        file.write("\n".join([*text, "", caption, ""]))
    with data.atomic(f"{path}.csv", "w") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["row", "column", "metric", "paper", "mean", "sd", "n", "values"])
        for line in table.lines:
            for column, paper, values in zip(table.columns, line.paper, measured[line.name]):
                sd = statistics.stdev(values) if len(values) > 1 else None
                mean = statistics.mean(values) if values else None
                out.writerow([line.name, column, line.metric, paper, mean, sd, len(values),
                              " ".join(f"{value:.6g}" for value in values)])


def plot(path, table, measured):
    """A line plot, where matplotlib happens to be installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    pyplot.figure(figsize=(6, 4))
    for name, values in measured.items():
        points = [(float(column.split()[0]), statistics.mean(v))
                  for column, v in zip(table.columns, values) if v]
        pyplot.plot(*zip(*points), marker="o", label=name)
    pyplot.xlabel("N, %"), pyplot.ylabel("accuracy"), pyplot.legend()
    pyplot.savefig(path, dpi=120)
    pyplot.close()


def lesion_tiles(index):
    """Test tiles with lesions, by the lesion's area, smallest first: [row of index.tiles].

    A lesion is shown by the tile that has most of it, or of its border where it fills tiles.
    """
    found = {}
    for n, (source, slide) in enumerate(zip(index.sources, index.slides)):
        rows = np.flatnonzero(index.tiles["slide"] == n)
        if source.split != "test" or not source.xml or not len(rows):
            continue
        level, side = slide.levels[index.tiles["level"][rows[0]]], index.tile
        xy = np.stack([index.tiles[axis][rows] // level.downsample for axis in "xy"], 1)
        for ring in outline.trace(t for t, in evaluate.strips(level, index.annotations[n])):
            lesion = data.Annotation(outline.to_polygons([ring._replace(parent=-1)],
                                                         level.downsample))
            near = ((xy < ring.xy.max(0)) & (xy + side > ring.xy.min(0))).all(1)
            shown = [(lesion.mask(x, y, side, side, level.downsample).sum(), row)
                     for (x, y), row in zip(xy[near].tolist(), rows[near].tolist())]
            if shown and not ring.is_hole:
                _, row = max((min(m, side * side - m), row) for m, row in shown)
                found[row] = max(ring.area, found.get(row, 0))
    return sorted(found, key=found.get)


def write_pictures(path, blocks, index):
    """Lines of tile | truth | predictions. `blocks` has a tile's row of index.tiles, and its lines:

    [(row, [(name of the line, [(name of the panel, checkpoint), ...]), ...]), ...]
    """
    side, pitch, left = index.tile, index.tile + 8, 110
    across = max(len(panels) for _, lines in blocks for _, panels in lines)
    high = sum(len(lines) * pitch + 24 for _, lines in blocks)
    picture = Image.new("RGB", (left + (across + 2) * pitch, high), "white")
    pen, y, models = ImageDraw.Draw(picture), 0, {}
    for row, lines in blocks:
        image, mask, _, _ = data.Tiles(index)[row]
        for n, (name, panels) in enumerate(lines):
            pen.text((4, y + 24 + side // 2), name, fill="black")
            cells = [("tile", image.permute(1, 2, 0).numpy()), ("truth", mask.numpy() * 255)]
            for above, checkpoint in panels:
                if checkpoint not in models:
                    models[checkpoint] = predict.load(checkpoint, SimpleNamespace(device="cpu"))[:2]
                    models[checkpoint][0].eval()
                p = predict.probabilities(models[checkpoint][0], image[None], models[checkpoint][1])
                cells.append((above, (p[0][0].numpy() > 0.5) * np.uint8(255)))
            for m, (above, cell) in enumerate(cells):
                if n == 0:
                    pen.text((left + m * pitch + 4, y + 6), above, fill="black")
                x = left + m * pitch
                picture.paste(Image.fromarray(cell), (x, y + 24))
                pen.rectangle((x - 1, y + 23, x + side, y + 24 + side), outline=(128,) * 3)
            y += pitch
        y += 24
    with data.atomic(path, "wb") as file:
        picture.save(file, "PNG")


def blocks_of(name, args, index):
    """What `write_pictures` shows for fig5, fig7, fig8, of seed 0."""
    table = tables(args.budget)[PICTURES[name]]
    rows = lesion_tiles(index)
    small, large = rows[:(len(rows) + 1) // 2], rows[-3:]
    chosen = {"fig5": rows[len(rows) // 8::max(1, len(rows) // 4)][:4],         # of all sizes
              "fig7": small[::max(1, len(small) // 3)][:3], "fig8": large}[name]

    def panels(line):
        return [(str(column), folder(args, flags, 0) / "last.pt")
                for column, flags in zip(table.columns, line.runs)]

    lines = table.lines[:1] if name == "fig5" else table.lines[1:]      # without S
    return [(row, [("" if name == "fig5" else line.name, panels(line)) for line in lines])
            for row in chosen]


def write(name, args):
    """The files of a table or figure."""
    path = Path(args.out) / name
    if name in PICTURES:
        first = runs_of([name], args.budget)[0]
        _, run, _ = predict.load(folder(args, first, 0) / "last.pt", SimpleNamespace(device="cpu"))
        index = evaluate.load_index(run)
        write_pictures(f"{path}.png", blocks_of(name, args, index), index)
        return [f"{path}.png"]
    table = tables(args.budget)[name]
    measured = measure(table, lambda flags: [result(args, flags, k) for k in range(args.seeds)])
    caption = (f"Paper: CAMELYON16. Here: {args.data or 'synthetic slides'}, --budget {args.budget}"
               f"{''.join(f' {flag}' for flag in args.rest)}, n = {args.seeds} seed"
               f"{'s, mean +- sd' if args.seeds > 1 else ''}.")
    write_table(path, table, measured, caption)
    if name == "fig6":
        plot(f"{path}.png", table, measured)
    return [f"{path}.md", f"{path}.csv"]


def main(argv=None):
    names = [*tables("quick"), *PICTURES]
    parser = argparse.ArgumentParser(description=__doc__, usage="reproduce.py NAME... [flags]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"{', '.join(names)}, or all")
    add("--budget", choices=tuple(BASE), default="quick", help="quick is for 2 CPU cores; full has "
        "all fractions of the paper and train.py's own settings, for a GPU (default quick)")
    add("--data", help="folder of slides (default: synthetic slides)")
    add("--seeds", type=data.number(int, 1), default=1, help="seeds 0, 1, ... (default 1)")
    add("--out", default="results", help="folder of tables, figures and runs (default results)")
    add("--jobs", type=data.number(int, 1), default=1, help="runs at a time; on a CPU each has its "
        "share of the cores (default 1)")
    add("--list", action="store_true", help="print what each costs, and run nothing")
    args, args.rest = parser.parse_known_args(argv)
    unknown = [name for name in args.names if name not in [*names, "all"]]
    if unknown or not args.names and not args.list:
        parser.error(f"{', '.join(unknown) or 'no name'}: give some of {', '.join(names)}, or all")
    chosen = names if "all" in args.names or not args.names else list(dict.fromkeys(args.names))
    seeds = range(args.seeds)
    jobs = [(args, flags, seed) for seed in seeds for flags in runs_of(chosen, args.budget)]
    own = {name for flags in runs_of(names, "full") for name in flags} | {"seed", "out", "resume"}
    if clash := own & {flag[2:].split("=")[0] for flag in args.rest}:
        parser.error(f"--{sorted(clash)[0]} is what the runs differ in; leave it out")
    fresh = [job for job in jobs if not (folder(*job) / "last.pt").exists()]
    if fresh:
        train.parse(command(*fresh[0]))                 # flags that are wrong are wrong for all
    done = [known["seconds"] for job in jobs if (known := result(*job))]
    each = (statistics.median(done) if done else SECONDS[args.budget]) / args.jobs
    if args.list:
        for name in [*chosen, *["together"] * (len(chosen) > 1)]:
            runs = [(args, flags, seed) for seed in seeds
                    for flags in runs_of([name] if name in names else chosen, args.budget)]
            missing = sum(result(*run) is None for run in runs)
            print(f"{name}: {len(runs)} runs, {missing} missing, about {missing * each / 60:.0f} "
                  f"minutes ({'median of those done' if done else 'a guess, none is done yet'})")
        return
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // args.jobs)))
    failed, args.running = 0, []
    pool = ThreadPoolExecutor(args.jobs)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for n, line in enumerate(pool.map(lambda job: carry_out(*job), jobs), 1):
            failed += line.startswith("error: ")
            print(f"{n}/{len(jobs)} {line}", flush=True)
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)          # no further run starts
        for process in args.running if os.name == "posix" else []:      # else it would kill them
            process.terminate()                 # they save and end; those that have do not mind
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    for name in chosen:
        if all(result(args, flags, k) for flags in runs_of([name], args.budget) for k in seeds):
            print(*write(name, args), sep="\n", flush=True)
    if failed:
        raise data.DataError(f"{failed} of {len(jobs)} runs failed, and what shows them was not "
                             "written; mend what is said above and give the same command: what is "
                             "done is not done again")


if __name__ == "__main__":
    data.run(main)
