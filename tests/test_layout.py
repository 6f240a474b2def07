"""How the files lean on each other, and how long they may grow: read from their syntax trees."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import QUICK

ROOT = Path(__file__).resolve().parents[1]
CORE = {
    "train": {"data", "model", "loss", "evaluate", "slide"},
    "evaluate": {"data", "model", "slide"},
    "data": {"slide"},
    "slide": set(),
    "model": set(),
    "loss": set(),
}
EXTRAS = {path.stem for path in (ROOT / "extras").glob("*.py")}
FILES = [ROOT / f"{name}.py" for name in CORE] + sorted((ROOT / "extras").glob("*.py"))


def imports(tree):
    """Every import of a file, those inside functions too -> names of modules, with the dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = (alias.name for alias in node.names)
            yield from (f"extras.{n}" for n in names) if node.module == "extras" else [node.module]


def of_ours(tree):
    """What a file imports of this project."""
    return [m for m in imports(tree) if m in CORE or m.split(".")[0] in ("extras", "tests")]


@pytest.mark.parametrize("name", CORE)
def test_core_imports_core_alone_and_in_one_direction(name):
    """The six files are to be copied: an import of extras/ or a cycle would break the copy."""
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    found = of_ours(tree)
    if name == "evaluate":  # no --data: the one exception, at the very place where it is needed
        found.remove("extras.synthetic")
        at_the_top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert set(of_ours(ast.Module(at_the_top, []))) == CORE[name]
    assert set(found) == CORE[name]


def test_extras_import_core_and_extras_alone():
    for path in FILES[len(CORE) :]:
        for module in of_ours(ast.parse(path.read_text())):
            assert module in CORE or module.removeprefix("extras.") in EXTRAS, (path.name, module)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_line_is_longer_than_100_columns_and_no_function_than_a_screen(path):
    """A function may have 60 lines; main, which is the story of a job, 85."""
    text = path.read_text()
    assert [n for n, line in enumerate(text.splitlines(), 1) if len(line) > 100] == []
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
    sizes = {f.name: f.end_lineno - f.lineno + 1 for f in functions}
    assert {n: s for n, s in sizes.items() if s > (85 if n == "main" else 60)} == {}


def test_the_files_of_the_method_stay_short():
    """A reference is read to learn: a few hundred lines, and not by dense ones."""
    lines = {name: len((ROOT / f"{name}.py").read_text().splitlines()) for name in CORE}
    assert lines.pop("slide") <= 335 and sum(lines.values()) <= 1106, lines
    assert sum(len(path.read_text().splitlines()) for path in FILES) <= 3730


def test_the_six_files_alone_train_and_evaluate(few, tmp_path):
    """As they are copied, without extras/ and anything else of the repository."""
    for name in CORE:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    train = ["train.py", "--data", str(few), "--out", "r", *QUICK, "--epochs", "1"]
    train += ["--pretrain-epochs", "0"]
    script = "import runpy, sys\n"  # both in one process: to import torch takes seconds
    for argv in (train, ["evaluate.py", "--ckpt", "r/last.pt"]):
        script += f"sys.argv = {argv}\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    alone = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.count("DSC 0.") == 2
