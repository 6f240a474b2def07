"""The paper's tables and figures as data, and their Markdown, published beside measured.

    table = tables()["table4"]              # its rows and columns, and the run of every cell
    markdown(table, measured, caption)      # what extras/reproduce.py writes

Needs nothing of the project: a run is but its flags of train.py, {"pixel-frac": 0.1}.
"""

from itertools import product
from statistics import mean, stdev
from typing import NamedTuple

FRACTIONS = 0, 0.01, 0.05, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1  # Tables 4, 5
COMPARED = 0, 0.01, 0.05, 0.1, 0.2, 0.5, 1  # Tables 6, 7
PUBLISHED = {  # (metric, title of a table of one row, or name of a row): values
    ("dsc", "beta"): (0.8431, 0.8437, 0.8479, 0.8450, 0.8423, 0.8419),
    ("iou", "beta"): (0.7288, 0.7296, 0.7360, 0.7316, 0.7276, 0.7269),
    ("dsc", "alpha"): (0.8445, 0.8473, 0.8469, 0.8471, 0.8479),
    ("iou", "alpha"): (0.7309, 0.7351, 0.7344, 0.7347, 0.7360),
    ("dsc", "class + segmentation loss"): (0.8411, 0.8415, 0.8425, 0.8438, 0.8479),
    ("iou", "class + segmentation loss"): (0.7258, 0.7263, 0.7279, 0.7298, 0.7360),
    ("dsc", "S"): (0.596, 0.641, 0.648, 0.728, 0.803, 0.836, 0.841, 0.849, 0.853, 0.859, 0.868),
    ("dsc", "S+C"): (0.685, 0.722, 0.731, 0.831, 0.835, 0.839, 0.844, 0.854, 0.855, 0.860, 0.871),
    ("iou", "S"): (0.425, 0.472, 0.480, 0.573, 0.671, 0.719, 0.727, 0.739, 0.745, 0.753, 0.767),
    ("iou", "S+C"): (0.522, 0.566, 0.578, 0.692, 0.718, 0.724, 0.731, 0.746, 0.748, 0.755, 0.773),
    ("dsc", "transfer learning"): (0.619, 0.626, 0.674, 0.724, 0.803, 0.839, 0.866),
    ("iou", "transfer learning"): (0.449, 0.456, 0.509, 0.568, 0.671, 0.723, 0.764),
    ("dsc", "multi-task"): (0.626, 0.634, 0.654, 0.751, 0.812, 0.829, 0.853),
    ("iou", "multi-task"): (0.456, 0.464, 0.487, 0.601, 0.683, 0.708, 0.743),
    ("dsc", "multiple-instance"): (0.583, 0.611, 0.636, 0.712, 0.800, 0.834, 0.857),
    ("iou", "multiple-instance"): (0.412, 0.440, 0.467, 0.553, 0.667, 0.716, 0.751),
    ("dsc", "this method"): (0.685, 0.722, 0.731, 0.831, 0.835, 0.855, 0.871),
    ("iou", "this method"): (0.522, 0.566, 0.578, 0.692, 0.718, 0.748, 0.773),
}
S, BY_SLIDE = {"image-frac": 0}, {"label-unit": "slide"}  # flags of train.py
GROUPS = {"S": S, "S+C": {}, "S, masks by slide": S | BY_SLIDE, "S+C, masks by slide": BY_SLIDE}
METHODS = {  # "method" is a compared method of extras/baselines.py
    "transfer learning": {"method": "transfer"},
    "multi-task": {"method": "multitask"},
    "multiple-instance": {"method": "mil"},
    "this method": {},
}
LOSSES = {  # DWCE is the paper's DWF
    "CE + CE": {"cls-loss": "ce", "seg-loss": "ce"},
    "CE + FW": {"cls-loss": "ce", "seg-loss": "fw"},
    "FW + FW": {"cls-loss": "fw", "seg-loss": "fw"},
    "FW + DWCE": {"cls-loss": "fw", "seg-loss": "dwce"},
    "DWCE + DWCE": {"cls-loss": "dwce", "seg-loss": "dwce"},
}
T = 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262  # Student's .975, n = 2 to 10
NOTES = {  # for the captions
    "rows": "Paired: the mean difference over seeds, its 95 % interval (Student's t). Gap closed: "
    "(S+C - S) / (S with all masks - S), where that gap is .05 or more and above two standard "
    "errors.",
    "columns": "Paired: the mean difference over seeds, its 95 % interval (Student's t).",
}
PICTURES = "fig5", "fig7", "fig8", "strip"


class Table(NamedTuple):
    """A table or picture; the run of a cell has the flags of its row and of its column."""

    title: str
    columns: dict  # name: flags
    rows: dict  # name: flags
    metrics: tuple = ()  # "dsc", "iou", "accuracy"; none for a picture
    compare: str = ""  # "rows": S+C with S; "columns": with the first; "spread" over columns

    def run(self, row, column):
        """The flags that make the run of a cell."""
        flags = self.columns[column] | self.rows[row]
        if flags["pixel-frac"] == 1:  # all masks, by tile or by slide: one run
            flags.pop("label-unit", None)
        return flags

    def published(self, row, metric):
        """What the paper has in a row: {column: value}."""
        values = PUBLISHED.get((metric, row or self.title), ())
        if self.rows == ONE:
            return dict(zip(self.columns, values))
        return dict(zip(masks_on(FRACTIONS if len(values) == len(FRACTIONS) else COMPARED), values))


ONE = {"": {}}  # the rows of a table that has one


def masks_on(fractions):
    """Columns of a table: {"10 %": flags}."""
    return {f"{100 * f:g} %": {"pixel-frac": f} for f in fractions}


def tables(given=None):
    """Name -> Table; `given` are fractions in place of the paper's."""
    # Deviation: the paper does not give the share of masks of its Tables 1 to 3; here 10 %, because
    # that is its headline row.
    tenth = {"pixel-frac": 0.1}
    betas = {f"{beta}": tenth | {"beta": beta} for beta in (1, 2, 3, 4, 5, 6)}
    alphas = {f"{alpha}": tenth | {"alpha": alpha} for alpha in (0.1, 0.2, 0.5, 0.8, 1)}
    losses = {name: tenth | flags for name, flags in LOSSES.items()}
    masks, compared = masks_on(given or FRACTIONS), masks_on(given or COMPARED)
    # N of Fig. 6: image labels on N %, masks on (100 - 2N) %, but for what a row says.
    n = (0, 0.1, 0.25, 0.5) if given else (0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
    n = {f"{100 * i:g} %": {"pixel-frac": round(1 - 2 * i, 4), "image-frac": i} for i in n}
    fig6 = {"S+C": {}, "S+C'": {"image-frac": 0.5}, "S'+C": {"pixel-frac": 1}}
    few = min((f for f in given if f), default=0.1) if given and 0.1 not in given else 0.1
    pair = {f"{g} at {100 * few:g} %": {"pixel-frac": few} | GROUPS[g] for g in ("S", "S+C")}
    both, methods = ("dsc", "iou"), {"S": S} | METHODS
    return {
        "table1": Table("beta", betas, ONE, both, "spread"),
        "table2": Table("alpha", alphas, ONE, both, "spread"),
        "table3": Table("class + segmentation loss", losses, ONE, both, "columns"),
        "table4": Table("DSC, masks on", masks, GROUPS, ("dsc",), "rows"),
        "table5": Table("IoU, masks on", masks, GROUPS, ("iou",), "rows"),
        "table6": Table("DSC, masks on", compared, methods, ("dsc",)),
        "table7": Table("IoU, masks on", compared, methods, ("iou",)),
        "fig6": Table("accuracy, N =", n, fig6, ("accuracy",)),
        "fig5": Table("", losses, ONE),
        "fig7": Table("", compared, METHODS),
        "fig8": Table("", compared, METHODS),
        "strip": Table("", pair, ONE),
    }


def short(value, digits=3, sign=""):
    """0.5 -> ".500"."""
    said = f"{value:{sign}.{digits}f}"
    return said.replace("0.", ".", 1) if abs(value) < 0.9999 else said


def mean_sd(values, digits=3):
    """[.5, .6] -> ".550 ± .071": the sample's deviation; "" without values."""
    sd = f" ± {short(stdev(values), digits)}" if len(values) > 1 else ""
    return short(mean(values), digits) + sd if values else ""


def paired(differences, digits=3):
    """[.1, .2] -> "+.150 [-.485, .785]": their mean, 95 % interval by Student's t of n - 1."""
    n = len(differences)
    if n < 2:
        return short(*differences, digits, "+") if n else ""
    middle, half = mean(differences), T[n - 2] * stdev(differences) / n**0.5
    low, high = short(middle - half, digits), short(middle + half, digits)
    return f"{short(middle, digits, '+')} [{low}, {high}]"


def gap_closed(sc, s, full):
    """Of the gap from S to S with all masks, the share that image labels close.

    "no gap" below .05, and within two standard errors of the difference of the means.
    """
    if not sc or min(len(s), len(full)) < 2:
        return ""
    gap = mean(full) - mean(s)
    error = (stdev(full) ** 2 / len(full) + stdev(s) ** 2 / len(s)) ** 0.5
    clear = gap >= 0.05 and gap > 2 * error
    return f"{100 * (mean(sc) - mean(s)) / gap:.0f} %" if clear else "no gap"


def lines_of(table, measured):
    """Lines of a table: lists of cells. `measured` {(row, metric): [{seed: value} per column]}."""
    digits = 4 if table.compare in ("columns", "spread") else 3
    columns, differ = [*table.columns], len(sizes_of(measured)) > 1

    def line(name, write, lists):
        n = [f" (n = {len(v)})" if v and differ else "" for v in lists]
        return [name, *(write(v, digits) + n for v, n in zip(lists, n))]

    def differences(cells, others):
        return [[a[seed] - b[seed] for seed in a if seed in b] for a, b in zip(cells, others)]

    for (row, metric), cells in measured.items():
        name, lists = row or {"dsc": "DSC", "iou": "IoU"}[metric], values_of(cells)
        published = table.published(row, metric)
        if published:
            paper = [published.get(column) for column in columns]
            yield [f"{name}, paper", *("" if v is None else short(v, digits) for v in paper)]
        yield line(f"{name}, here", mean_sd, lists)
        if table.compare == "columns":
            against = differences(cells, cells[:1] * len(cells))
            yield line(f"{name} - {columns[0]}, paired", paired, [[], *against[1:]])
        if table.compare == "spread":
            means, sds = [mean(v) for v in lists if v], [stdev(v) for v in lists if len(v) > 1]
            spread = short(max(means) - min(means), digits) if means else ""
            yield [f"{name}, max - min of means", spread]
            yield [f"{name}, mean sd", short(mean(sds), digits) if sds else ""]
        if table.compare == "rows" and row.startswith("S+C"):
            s = measured[row.replace("S+C", "S"), metric]
            full = dict(zip(columns, values_of(s))).get("100 %", [])
            yield line("S+C - S, paired", paired, differences(cells, s))
            yield ["gap closed", *(gap_closed(a, b, full) for a, b in zip(lists, values_of(s)))]


def values_of(cells):
    return [[*cell.values()] for cell in cells]


def sizes_of(measured):
    """How many seeds its cells have, those without any left out."""
    return sorted({len(cell) for cells in measured.values() for cell in cells if cell})


def markdown(table, measured, caption):
    """A table in Markdown, the caption below. `measured(flags, metric)` -> {seed: value}.

    n is told in the caption, or in the cells where it differs.
    """
    cells = {
        (row, metric): [measured(table.run(row, column), metric) for column in table.columns]
        for row, metric in product(table.rows, table.metrics)
    }
    width, sizes = 1 + len(table.columns), sizes_of(cells)
    lines = [[table.title, *table.columns], ["---"] * width, *lines_of(table, cells)]
    lines = ["| " + " | ".join(line + [""] * (width - len(line))) + " |" for line in lines]
    n = "n as in the cells" if len(sizes) > 1 else f"n = {sum(sizes)} seed{'s' * (sizes != [1])}"
    caption = f"{caption} Mean ± sd, {n}. {NOTES.get(table.compare, '')}"
    return "\n".join([*lines, "", caption.strip(), ""])
