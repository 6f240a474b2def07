"""The paper's tables and figures as data, and their Markdown, published beside measured.

    table = tables()["table4"]
    table.run("S", "10 %")              # the run of a cell: "image-frac=0,pixel-frac=0.1"
    markdown(table, rows, caption)      # what extras/reproduce.py writes

Needs nothing of the project: a run is named by its flags of train.py, but for defaults.
"""

import re
from statistics import mean, stdev, variance
from typing import NamedTuple

FRACTIONS = 0, 0.01, 0.05, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1  # Tables 4, 5
COMPARED = 0, 0.01, 0.05, 0.1, 0.2, 0.5, 1  # Tables 6, 7
PUBLISHED = {  # (title of a table, name of a row): values, "-" where a compared method has none
    ("beta", "DSC"): ".8431 .8437 .8479 .8450 .8423 .8419",
    ("beta", "IoU"): ".7288 .7296 .7360 .7316 .7276 .7269",
    ("alpha", "DSC"): ".8445 .8473 .8469 .8471 .8479",
    ("alpha", "IoU"): ".7309 .7351 .7344 .7347 .7360",
    ("class + segmentation loss", "DSC"): ".8411 .8415 .8425 .8438 .8479",
    ("class + segmentation loss", "IoU"): ".7258 .7263 .7279 .7298 .7360",
    ("DSC, masks on", "S"): ".596 .641 .648 .728 .803 .836 .841 .849 .853 .859 .868",
    ("DSC, masks on", "S+C"): ".685 .722 .731 .831 .835 .839 .844 .854 .855 .860 .871",
    ("DSC, masks on", "transfer"): ".619 .626 .674 .724 .803 - - - .839 - .866",
    ("DSC, masks on", "multitask"): ".626 .634 .654 .751 .812 - - - .829 - .853",
    ("DSC, masks on", "mil"): ".583 .611 .636 .712 .800 - - - .834 - .857",
    ("IoU, masks on", "S"): ".425 .472 .480 .573 .671 .719 .727 .739 .745 .753 .767",
    ("IoU, masks on", "S+C"): ".522 .566 .578 .692 .718 .724 .731 .746 .748 .755 .773",
    ("IoU, masks on", "transfer"): ".449 .456 .509 .568 .671 - - - .723 - .764",
    ("IoU, masks on", "multitask"): ".456 .464 .487 .601 .683 - - - .708 - .743",
    ("IoU, masks on", "mil"): ".412 .440 .467 .553 .667 - - - .716 - .751",
}
S, BY_SLIDE = {"image-frac": "0"}, {"label-unit": "slide"}  # flags of train.py
FIRST = {"pretrain": "labels"}  # step 2 alone first, then both in turn
BY_TILE = {"S": S, "S+C": {}, "S+C labels first": FIRST}
GROUPS = BY_TILE | {f"{name}, masks by slide": f | BY_SLIDE for name, f in BY_TILE.items()}
# Methods of extras/baselines.py: transfer learning, multi-task, multiple-instance learning.
METHODS = {name: {"method": name} for name in ("transfer", "multitask", "mil")} | {"S+C": {}}
# Which step comes first: none, masks, all of step 2 before all of step 1, labels.
ORDER = {"S": S, "S+C": {}, "transfer": {"method": "transfer"}, "S+C labels first": FIRST}
ORDER |= {f"{name}, masks by slide": flags | BY_SLIDE for name, flags in ORDER.items()}
# Losses of the class and of the masks; dwce is the paper's DWF.
LOSSES = ("ce", "ce"), ("ce", "fw"), ("fw", "fw"), ("fw", "dwce"), ("dwce", "dwce")
DEFAULTS = {"beta": "3", "alpha": "1", "cls-loss": "dwce", "seg-loss": "dwce"}  # of train.py
BOTH, ONE = {"DSC": {}, "IoU": {}}, {"": {}}  # rows that differ in no flag
T = 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262  # Student's .975, n = 2 to 10
NOTE = (
    "Mean ± sd, n as in the cells. Paired: the mean difference over seeds, its 95 % interval "
    "(Student's t). Gap closed: (S+C - S) / (S with all masks - S), of the seeds that all three "
    "have, where that gap is .05 or more and above two standard errors."
)


class Table(NamedTuple):
    """A table or picture; the run of a cell has the flags of its row and of its column."""

    title: str
    columns: dict  # name: flags
    rows: dict  # name: flags
    metric: str = ""  # "dsc", "iou", "accuracy"; "" for that of the row's name

    def run(self, row, column):
        """The name of a cell's run. The same settings have the same name: they are run once."""
        flags = self.columns[column] | self.rows[row]
        if flags["pixel-frac"] == "1":  # all masks, by tile or by slide
            flags.pop("label-unit", None)
        return ",".join(sorted(f"{k}={v}" for k, v in flags.items() if v != DEFAULTS.get(k)))


def masks_on(fractions):
    """Columns of a table: {"10 %": flags}."""
    return {f"{100 * f:g} %": {"pixel-frac": f"{f:g}"} for f in fractions}


def tables(fractions=None):
    """Name -> Table; `fractions`: shares of masks in place of the paper's, fewer N of Fig. 6."""
    # Deviation: the paper gives no share of masks for Tables 1 to 3; here 10 %, because that is its
    # headline row.
    tenth = {"pixel-frac": "0.1"}
    betas = {f"{beta}": tenth | {"beta": f"{beta}"} for beta in range(1, 7)}
    alphas = {f"{alpha}": tenth | {"alpha": f"{alpha}"} for alpha in (0.1, 0.2, 0.5, 0.8, 1)}
    losses = {f"{c} + {s}".upper(): tenth | {"cls-loss": c, "seg-loss": s} for c, s in LOSSES}
    masks, compared = masks_on(fractions or FRACTIONS), masks_on(fractions or COMPARED)
    # N of Fig. 6: image labels on N %, masks on (100 - 2N) %, but for what a row says.
    shares = (0, 0.1, 0.25, 0.5) if fractions else (0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
    n = {f"{100 * i:g} %": {"pixel-frac": f"{1 - 2 * i:g}", "image-frac": f"{i}"} for i in shares}
    all_methods = {"S": S} | METHODS | {"S+C labels first": FIRST}
    fig6 = {"S+C": {}, "S+C'": {"image-frac": "0.5"}, "S'+C": {"pixel-frac": "1"}}
    strip = {f"{name} at 1 %": flags | {"pixel-frac": "0.01"} for name, flags in BY_TILE.items()}
    return {
        "table1": Table("beta", betas, BOTH),
        "table2": Table("alpha", alphas, BOTH),
        "table3": Table("class + segmentation loss", losses, BOTH),
        "table4": Table("DSC, masks on", masks, GROUPS, "dsc"),
        "table5": Table("IoU, masks on", masks, GROUPS, "iou"),
        "table6": Table("DSC, masks on", compared, all_methods, "dsc"),
        "table7": Table("IoU, masks on", compared, all_methods, "iou"),
        "order": Table("DSC, masks on", masks, ORDER, "dsc"),
        "fig6": Table("accuracy, N =", n, fig6, "accuracy"),
        "fig5": Table("", losses, ONE),
        "fig7": Table("", compared, METHODS),
        "fig8": Table("", compared, METHODS),
        "strip": Table("", strip, ONE),
    }


def cell_of(table, rows, row, column):
    """What a cell shows: {seed: value}."""
    run, metric = table.run(row, column), table.metric or row.lower()
    return {seed: f[metric] for (name, seed), f in rows.items() if name == run and metric in f}


def mean_sd(cell):
    """{seed: value} -> "0.550 ± 0.071 (n = 2)": the sample's deviation; "" without values."""
    sd = f" ± {stdev(cell.values()):.3f}" if len(cell) > 1 else ""
    return f"{mean(cell.values()):.3f}{sd} (n = {len(cell)})" if cell else ""


def paired(cell, other):
    """Mean difference over the seeds that both have, 95 % interval by Student's t of n - 1."""
    differences = [cell[seed] - other[seed] for seed in cell if seed in other]
    n = len(differences)
    if n < 2:
        return f"{differences[0]:+.3f} (n = 1)" if n else ""
    middle, half = mean(differences), T[n - 2] * stdev(differences) / n**0.5
    return f"{middle:+.3f} [{middle - half:.3f}, {middle + half:.3f}] (n = {n})"


def gap_closed(sc, s, full):
    """Cells -> of the gap from S to S with all masks, what image labels close: see NOTE."""
    seeds = sc.keys() & s.keys() & full.keys()
    if len(seeds) < 2:
        return ""
    sc, s, full = ([cell[seed] for seed in seeds] for cell in (sc, s, full))
    gap = mean(full) - mean(s)
    error = (variance(full) / len(full) + variance(s) / len(s)) ** 0.5
    return f"{100 * (mean(sc) - mean(s)) / gap:.0f} %" if gap >= max(0.05, 2 * error) else "no gap"


def markdown(table, rows, caption):
    """A table in Markdown and its caption. `rows`: {(run, seed): {"dsc": value, ...}}."""
    columns, body = [*table.columns], []
    papers = columns if table.rows == BOTH else masks_on(FRACTIONS)
    measured = {row: [cell_of(table, rows, row, c) for c in columns] for row in table.rows}
    for row, cells in measured.items():
        if published := dict(zip(papers, PUBLISHED.get((table.title, row), "").split())):
            body.append([f"{row}, paper", *(published.get(column, "") for column in columns)])
        body.append([f"{row}, here", *map(mean_sd, cells)])
        s = measured.get(re.sub(r"S\+C( labels first)?", "S", row), cells)
        if table.rows == BOTH:
            against = [paired(cell, cells[0]) for cell in cells[1:]]
            body.append([f"{row} against {columns[0]}, paired", "", *against])
        elif s is not cells:
            full = dict(zip(columns, s)).get("100 %", {})
            body.append([f"{row.split(',')[0]} - S, paired", *map(paired, cells, s)])
            body.append(["gap closed", *(gap_closed(a, b, full) for a, b in zip(cells, s))])
            for other in ("S+C", "transfer") if "first" in row else ():
                if others := measured.get(row.replace("S+C labels first", other)):
                    difference = [paired(a, b) for a, b in zip(cells, others)]
                    body.append([f"labels first - {other}, paired", *difference])
    body = [[re.sub(r"\b0\.", ".", text) for text in line] for line in body]  # 0.831 is .831
    lines = [[table.title, *columns], ["---"] * (1 + len(columns)), *body]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", f"{caption} {NOTE}", ""])
