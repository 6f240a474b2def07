"""The README against the code: files, flags, names of results, deviations, snippets."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
CODE = sorted([*ROOT.glob("*.py"), *(ROOT / "extras").glob("*.py")])
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def deviations(path):
    """The first sentence of every deviation's comment in a file."""
    found, text = [], path.read_text()
    for comment in re.findall(r"^ *# Deviation[:] (.*\n(?: *# .*\n)*)", text, re.M):
        words = " ".join(re.sub(r"^ *# ", "", line) for line in comment.splitlines())
        found.append(re.split(r"\.(?: |$)", words)[0] + ".")
    return found


def test_the_list_of_deviations_is_that_of_the_code():
    """Lists written by hand had drifted: two deviations were in the code alone."""
    text = (ROOT / "docs/paper.md").read_text()
    listed = re.findall(r"^\* `([\w/.]+)`: (.*(?:\n  .*)*)", text, re.M)
    listed = sorted((name, " ".join(said.split())) for name, said in listed)
    names = {path: path.relative_to(ROOT).as_posix() for path in CODE}
    assert listed == sorted((names[p], said) for p in CODE for said in deviations(p))
    for _, said in listed:
        assert "; here" in said and "because " in said, said


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_files_and_flags_of_the_texts_exist(path):
    text = path.read_text()
    for name in re.findall(r"`((?:extras/|docs/|tests/)[\w./]+)`", text):
        assert (ROOT / name).exists(), name
    for link in re.findall(r"\]\(([\w./]+)\)", text):
        assert (path.parent / link).exists(), link
    for page, anchor in re.findall(r"\]\(([\w./]*)#([^)]+)\)", text):
        headings = re.findall("^#+ (.*)", (path.parent / page if page else path).read_text(), re.M)
        assert anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
    for script, argv in re.findall(r"python (?:-m )?([\w./]+)((?: .*)?)$", text, re.M):
        if script in ("pytest", "pip", "tests"):
            continue
        module = script.removesuffix(".py").replace("/", ".")
        code = Path(importlib.util.find_spec(module).origin).read_text()
        code += (ROOT / "train.py").read_text() if "parse_known_args" in code else ""
        code += (ROOT / "train.py").read_text() if "parse_args" in code else ""
        for flag in re.findall(r"--[a-z][\w-]*", argv.split("#")[0]):
            assert f'"{flag}"' in code, (script, flag)


def test_names_of_a_run_in_the_docs_are_those_of_its_files(run):
    text = (ROOT / "docs/files.md").read_text()
    rows = dict(re.findall(r"^\| `([\w./]+)` \| (.*) \|$", text, re.M))
    results = json.loads((run[0] / "results.json").read_text())
    line = json.loads((run[0] / "log.jsonl").read_text().splitlines()[-1])
    header = (run[0] / "tiles.csv").read_text().splitlines()[0]
    assert set(re.findall(r"`(\w+)`", rows["results.json"])) == set(results)
    assert set(re.findall(r"`(\w+)`", rows["log.jsonl"])) == set(line) - {"epoch"}
    assert len(header.split(",")) == 10
    assert {path.name for path in run[0].iterdir()} == {
        name.rstrip("/") for name in rows if (run[0] / name).exists()
    }


def test_snippets_run():
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert snippets
    for snippet in snippets:
        names = {}
        exec(snippet, names)
        assert torch.isfinite(names["loss"])


def test_both_readmes_have_the_same_figures_and_commands():
    here, there = ((ROOT / name).read_text() for name in ("README.md", "README.zh.md"))
    figures, theirs = ({*re.findall(r"(?<![\d.])\.\d{3}\b", text)} for text in (here, there))
    assert figures == theirs and len(figures) > 15
    commands, theirs = (
        {line.split("#")[0].strip() for line in re.findall("^(?:python|pip) .*$", text, re.M)}
        for text in (here, there)
    )
    assert commands == theirs and len(commands) > 10


def test_the_readme_is_one_screen_after_another():
    """Lines that a terminal or a diff can show; details are in docs/."""
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 10_240
    assert [line for line in text.splitlines() if len(line) > 110] == []
