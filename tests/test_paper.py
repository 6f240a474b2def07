"""docs/paper.md and paper.zh.md against the code: names, quotes, the network's table, drawings.

python -m tests.test_paper                      # prints the table of the network
"""

import ast
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from loss import ce, dwce
from model import Network, conv_bn_relu

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "docs/paper.md", ROOT / "docs/paper.zh.md"]
DRAWINGS = ["network.svg", "steps.svg", "weights.svg"]
# The stages of the table, as the modules of Network and of the plain U-Net.
STAGES = [*((f"convs.{k}", f"esps.{k}") for k in range(4)), *((f"psps.{k}",) for k in range(4))]
STAGES += [*((f"ups.{k}", f"fuses.{k}") for k in (2, 1, 0)), ("head",), ("classifier",)]


class UNet(nn.Module):
    """A plain U-Net of the same widths, for its size alone."""

    def __init__(self, width=32):
        super().__init__()
        c = [width * 2**k for k in range(4)]
        twice = [(conv_bn_relu(i, o, 3), conv_bn_relu(o, o, 3)) for i, o in zip([3, *c], c)]
        self.convs = nn.ModuleList(nn.Sequential(*pair) for pair in twice)
        self.ups = nn.ModuleList(nn.ConvTranspose2d(2 * o, o, 2, stride=2) for o in c[:3])
        twice = [(conv_bn_relu(2 * o, o, 3), conv_bn_relu(o, o, 3)) for o in c[:3]]
        self.fuses = nn.ModuleList(nn.Sequential(*pair) for pair in twice)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, tiles):
        x, maps = tiles.float(), []
        for k in range(4):
            x = self.convs[k](nn.functional.max_pool2d(x, 2) if k else x)
            maps.append(x)
        for k in (2, 1, 0):
            x = self.fuses[k](torch.cat([self.ups[k](x), maps[k]], 1))
        return self.head(x)


def measure(model):
    """Output (channels, side), parameters and multiply-adds of each stage, for a tile of 512 px.

    Measured at 64 px, for speed: at 512 sides are 8 times as long and convolutions take 64 times
    the multiply-adds; but not those of PSP, which see its bins alone.
    """
    parts, shapes = dict(model.named_modules()), {}
    stages = [[name for name in stage if name in parts] for stage in STAGES]
    names = {parts[name]: name for stage in stages for name in stage}
    for part in names:
        part.register_forward_hook(lambda part, _, out: shapes.update({names[part]: out.shape}))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, 64, 64))
    flops, found = counter.get_flop_counts(), []  # of convolutions; 2 for a multiply-add
    for stage in stages:
        parameters = sum(p.numel() for name in stage for p in parts[name].parameters())
        adds = sum(sum(flops[f"{type(model).__name__}.{name}"].values()) // 2 for name in stage)
        scale = 1 if stage and stage[0].startswith("psps") else 64
        output = (shapes[stage[-1]][1], 8 * shapes[stage[-1]][2]) if stage else None
        found.append((output, parameters, adds * scale))
    return found


def table():
    """The cells of the table but the first: output, then parameters and multiply-adds of both."""

    def cells(parameters, adds):
        millions = adds / 1e6
        shown = f"{millions:,.0f}" if millions > 10 else f"{millions:.2f}"
        return [f"{parameters:,}", shown] if parameters else ["", ""]

    ours, theirs = measure(Network(32)), measure(UNet(32))
    rows = []
    for (output, *mine), (_, *other) in zip(ours, theirs, strict=True):
        rows.append([f"{output[0]} × {output[1]}²", *cells(*mine), *cells(*other)])
    totals = [cells(sum(f[1] for f in found), sum(f[2] for f in found)) for found in (ours, theirs)]
    return [*rows, ["", *totals[0], *totals[1]]]


def place(path, name):
    """The source of `name` in a file: a function, a class, Class.method or a constant."""
    text = (ROOT / path).read_text()
    node = ast.parse(text)
    for part in name.split("."):
        found = [n for n in node.body if part in names_of(n)]
        assert len(found) == 1, f"{path} has no {name}"
        node = found[0]
    return ast.get_source_segment(text, node)


def names_of(node):
    """The names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and hasattr(node, "targets")}


def references(page):
    """`file.py: name` and `file.py: name "quote"` of a page -> [(file, name, quote or "")]."""
    found = re.findall(r'`([\w/]+\.py): ([^`"]+?)(?: "([^`]+)")?`', page.read_text())
    assert len(found) > 30
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_name_and_quote_is_in_the_code(page):
    """A page that says where a thing is done is worse than none when the code has moved."""
    for path, name, quote in references(page):
        assert quote in place(path, name), (path, name, quote)


def test_both_languages_point_at_the_same_code():
    assert references(PAGES[0]) == references(PAGES[1])


@pytest.fixture(scope="module")
def rows():
    return table()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_table_of_the_network_is_measured(page, rows):
    text = page.read_text()
    lines = re.findall(r"^\| [^|]* \|([^|]*\|[^|]*\|[\d., ]+\|[^|]*\|[^|]*)\|$", text, re.M)
    assert [[cell.strip() for cell in line.split("|")] for line in lines] == rows
    parameters, adds, *other = (float(cell.replace(",", "")) for cell in rows[-1][1:])
    assert {f"{other[0] / parameters:.1f}", f"{other[1] / adds:.1f}"} == {"1.8", "3.3"}
    assert re.search(r"1\.8 (times|倍)[^|]*3\.3 (times|倍)", text)


def test_the_drawing_has_the_shapes_of_the_network():
    """Every map that goes from one box of network.svg to another, at 512 px: 8 times 64 px."""
    model, shapes = Network(32), Counter({(3, 512): 1})
    made = [*model.esps, *model.psps, *model.fuses, *model.classifier, model.head]
    for part in made:
        part.register_forward_hook(
            lambda *args: shapes.update([(args[2].shape[1], args[2].shape[2] * 8)])
        )
    with torch.no_grad():
        maps = model.eval().encode(torch.zeros(1, 3, 64, 64))
        model.decode(maps), model.classify(maps)
    shapes.update((m.shape[1], m.shape[2] * 4) for m in maps[:3])  # pooled
    shapes.update([(256, 64)])  # the deepest goes to the classification head too
    drawn = re.findall(r">(\d+) × (\d+)²<", (ROOT / "docs/network.svg").read_text())
    assert Counter((int(c), int(side)) for c, side in drawn) == shapes


def test_the_plotted_weights_are_those_of_the_loss():
    text = (ROOT / "docs/weights.svg").read_text()
    lines = dict(re.findall(r'id="beta-(\d)".* points="([^"]+)"', text))
    assert sorted(map(int, lines)) == [1, 2, 3, 4, 5, 6]
    for beta, line in lines.items():
        points = torch.tensor([[float(n) for n in xy.split(",")] for xy in line.split()][1:-1])
        p, w = (points[:, 0] - 60) / 400, (270 - points[:, 1]) / 240
        for x, y in zip(p, w):
            logits, label = torch.stack([x, 1 - x]).log()[None], torch.tensor([0])
            weight = dwce(logits, label, beta=float(beta)) / ce(logits, label)
            assert abs(weight - y) < 1e-3, (beta, x)


def test_the_weights_in_the_text_are_those_of_the_loss():
    for page in PAGES:
        for p, said in ((0.1, ".9954"), (0.5, ".5623"), (0.9, ".0348")):
            logits, label = torch.tensor([[p, 1 - p]]).log(), torch.tensor([0])
            assert f"{dwce(logits, label) / ce(logits, label):.4f}"[1:] == said
            assert said in page.read_text()


@pytest.mark.parametrize("name", DRAWINGS)
def test_drawings_are_small_text_in_both_modes_and_shown(name):
    path = ROOT / "docs" / name
    root = ElementTree.parse(path).getroot()
    assert path.stat().st_size < 30_000 and root.find(".//{*}text") is not None
    assert "prefers-color-scheme: dark" in root.find("{*}style").text
    classes = {c for node in root.iter() for c in node.get("class", "").split()}
    assert classes == set(re.findall(r"^\.([a-z]+) {", root.find("{*}style").text, re.M))
    for page in PAGES:
        assert name in page.read_text(), page.name


def test_both_languages_have_the_same_sections_errata_and_deviations():
    """By number: a new erratum, or a deviation of a file, is missing in no language."""
    parts = [page.read_text().split("\n## ") for page in PAGES]
    assert len(parts[0]) == len(parts[1]) == 9
    for here, there in zip(*(part[-2:] for part in parts), strict=True):
        assert here.count("\n* ") == there.count("\n* ") > 8
    files = [re.findall(r"^\* `([\w/.]+)`", part[-1], re.M) for part in parts]
    assert files[0] == files[1]


if __name__ == "__main__":
    names = [f"encoder {k}" for k in range(4)] + [f"PSP {k}" for k in range(4)]
    names += [*(f"decoder {k}" for k in (2, 1, 0)), "segmentation head", "classification head"]
    for name, cells in zip([*names, "all"], table(), strict=True):
        print("|", " | ".join([name, *cells]), "|")
