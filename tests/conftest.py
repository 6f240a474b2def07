"""What all tests share: slides, 8 to train, one of them without tumour, and 3 to test; a run."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import jobs  # noqa: E402
import synthetic  # noqa: E402
import train  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: not in the default run, see torture.py")


@pytest.fixture(scope="session")
def slides(tmp_path_factory):
    return synthetic.make(tmp_path_factory.mktemp("data") / "slides", train=8, test=3, side=768)


@pytest.fixture(scope="session")
def run(slides, tmp_path_factory):
    """A run that is long enough to learn -> its folder, what it printed."""
    folder = tmp_path_factory.mktemp("run") / "a"
    return folder, jobs.ok(train.main, "--data", slides, "--out", folder, "--pixel-frac", 1,
                           *jobs.TINY, "--epochs", jobs.EPOCHS)
