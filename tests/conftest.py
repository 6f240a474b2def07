"""What all tests share: slides, 8 to train, one of them without tumour, and 3 to test; a run."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import jobs  # noqa: E402

import train  # noqa: E402
from extras import synthetic  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: not in the default run, see torture.py")


@pytest.fixture(scope="session")
def slides(tmp_path_factory):
    """A folder of small slides that differ as tissue and tumour do."""
    return synthetic.make(tmp_path_factory.mktemp("data") / "slides", train=8, test=3, side=768)


@pytest.fixture(scope="session")
def few(slides, tmp_path_factory):
    """Two of them to train and one to test, for jobs that only have to end."""
    folder = tmp_path_factory.mktemp("few")
    for name in ("train/synthetic_001", "train/synthetic_003", "test/synthetic_008"):
        (folder / name).parent.mkdir(exist_ok=True)
        for suffix in (".tif", ".xml"):
            (folder / f"{name}{suffix}").symlink_to(slides / f"{name}{suffix}")
    return folder


@pytest.fixture(scope="session")
def many(tmp_path_factory):
    """More of them, 18 to train: with 8, a CPU's rounding decided if a short run learns."""
    return synthetic.make(tmp_path_factory.mktemp("many") / "slides", train=18, test=3, side=768)


@pytest.fixture(scope="session")
def run(many, tmp_path_factory):
    """A run that is long enough to learn -> its folder, what it printed."""
    folder = tmp_path_factory.mktemp("run") / "a"
    flags = ["--data", many, "--out", folder, "--pixel-frac", 1, *jobs.TINY, "--epochs", 5]
    return folder, jobs.ok(train.main, *flags)
