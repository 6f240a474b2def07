"""Plots of extras/reproduce.py: masks.svg (Table 4), fig6.svg, curve.png. They need matplotlib.

    pip install -r extras/requirements.txt
    python -m extras.reproduce table4 fig6 --jobs 0     # beside the tables, from the same rows
    python -m extras.reproduce curve runs/x runs/y      # losses and DSC by epoch

The same rows give the same file. A point is a mean, its bar the sd, each small dot a seed.
"""

import argparse
import json
from math import log10, nan
from pathlib import Path
from statistics import mean, stdev

import numpy as np

from extras.tables import BY_TILE, FRACTIONS, PUBLISHED, cell_of
from slide import DataError

COLOURS, MARKERS = ("#d55e00", "#0072b2", "#009e73"), "os^"  # Okabe, Ito: for all eyes
TICKS = 0, 0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1  # shares of masks
STYLE = {  # rcParams
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "plots",  # else ids are random
    "font.sans-serif": "DejaVu Sans",
    "font.size": 9,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e5e5e5",
    "ytick.left": False,
    "figure.facecolor": "white",
}
MISSING = "matplotlib is missing; pip install -r extras/requirements.txt"


def save(path, draw, panels, *data):
    """Write a figure that `draw` makes of its axes and of `data`; the same data, the same file."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure((1 + 3.7 * panels, 3.5), dpi=120, layout="constrained")
        draw(figure.subplots(1, panels, sharex=True, squeeze=False)[0], *data)
        lines = {}
        for axis in figure.axes:
            handles, labels = axis.get_legend_handles_labels()
            lines |= dict(zip(labels, handles))
        figure.legend(lines.values(), lines, loc="outside lower center", ncols=6, frameon=False)
        plain = {"Date": None, "Creator": None} if path.suffix == ".svg" else None
        figure.savefig(path, metadata=plain)


def points(axis, n, cells, label):
    """Mean, sd and each seed of {x: {seed: value}} in the n-th colour; empty cells are skipped."""
    cells = {x: [*cell.values()] for x, cell in cells.items() if cell}
    x, means = [*cells], [mean(values) for values in cells.values()]
    sds = [stdev(values) if len(values) > 1 else 0 for values in cells.values()]
    axis.errorbar(x, means, sds, fmt="none", ecolor=COLOURS[n], elinewidth=1)
    axis.plot(x, means, marker=MARKERS[n], markersize=5, color=COLOURS[n], label=label)
    seeds = [(x, value) for x, values in cells.items() for value in values]
    axis.scatter(*np.reshape(seeds, (-1, 2)).T, s=7, color=COLOURS[n], alpha=0.5, lw=0)


def draw_masks(axes, table, rows):
    """DSC by share of masks, log axis, 0 set apart; masks by tile, beside the paper's; by slide."""
    shares = {column: float(flags["pixel-frac"]) for column, flags in table.columns.items()}
    least = min(share for share in (*shares.values(), *FRACTIONS) if share)

    def place(share):
        return log10(share or least / 4)

    for axis, units in zip(axes, ("tile", "slide")):
        for n, name in enumerate(BY_TILE):
            row, cells = name if units == "tile" else f"{name}, masks by slide", {}
            for column, share in shares.items():
                cells[place(share) + (n - 1) / 40] = cell_of(table, rows, row, column)
                if not share:
                    cells[nan] = {0: nan}  # a line breaks at nan
            points(axis, n, cells, name)
        if full := "100 %" in shares and cell_of(table, rows, "S", "100 %"):
            dashed = {"color": COLOURS[0], "linestyle": "--", "linewidth": 1}
            axis.axhline(mean(full.values()), label="S, all masks", **dashed)
        ticks = [share for share in TICKS if not 0 < share < least]
        axis.set_xticks([*map(place, ticks)], [f"{100 * share:g}" for share in ticks])
        axis.set(title=f"masks by {units}", xlabel="share of masks, %", ylabel="DSC")
    for name, style in (("S", ":"), ("S+C", "-")):
        zero, *dsc = map(float, PUBLISHED["DSC, masks on", name].split())
        x = [place(0), nan, *map(place, FRACTIONS[1:])]
        grey = {"color": "#999999", "marker": ".", "zorder": 1, "label": f"{name}, paper"}
        axes[0].plot(x, [zero, nan, *dsc], style, **grey)
    axes[1].sharey(axes[0])
    axes[1].label_outer()


def draw_fig6(axes, table, rows):
    """Accuracy of the classification head by N."""
    for n, row in enumerate(table.rows):
        cells = {column: cell_of(table, rows, row, column) for column in table.columns}
        cells = {float(column.split()[0]) + (n - 1) / 2: cell for column, cell in cells.items()}
        points(axes[0], n, cells, row)
    axes[0].set(xlabel="N, %", ylabel="accuracy")


def draw_curve(axes, logs):
    """Losses and training DSC by epoch; a line of a log has what was measured since the last."""
    for axis, name in zip(axes, ("loss_seg", "loss_cls", "train_dsc")):
        for run, lines in logs.items():
            lines = [(line["epoch"], line[name]) for line in lines if name in line]
            axis.plot(*np.reshape(lines, (-1, 2)).T, marker=".", label=run)
        axis.set(title=name, xlabel="epoch")
        axis.locator_params(axis="x", integer=True)


PLOTS = {"table4": ("masks.svg", draw_masks, 2), "fig6": ("fig6.svg", draw_fig6, 1)}


def write(name, out, table, rows):
    """The plot of a table, if it has one, into folder `out`; without matplotlib a line says so."""
    if name in PLOTS:
        file, draw, panels = PLOTS[name]
        try:
            save(Path(out, file), draw, panels, table, rows)
        except ImportError:
            print(f"no {file}: {MISSING}")


def curve(argv):
    """curve.png of one or more runs."""
    parser = argparse.ArgumentParser(prog="python -m extras.reproduce curve")
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, with log.jsonl")
    parser.add_argument("--out", default="results", help="folder of curve.png (results)")
    args, logs = parser.parse_args(argv), {}
    for run in args.runs:
        try:
            lines = Path(run, "log.jsonl").read_text().splitlines()
            logs[f"{run}"] = [json.loads(line) for line in lines]
        except (OSError, ValueError):
            raise DataError(f"{run}: no log.jsonl of train.py; give the folder of a run") from None
    path = Path(args.out, "curve.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save(path, draw_curve, 3, logs)
    except ImportError:
        raise DataError(MISSING) from None
    print(path)
