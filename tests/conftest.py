"""What all tests share: slides, 8 to train, one of them without tumour, and 3 to test; a run."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import jobs  # noqa: E402

import evaluate  # noqa: E402
import train  # noqa: E402
from extras import synthetic  # noqa: E402
from slide import Annotation  # noqa: E402

# Small networks: a second thread waits more than it works. For the processes of tests, too.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
evaluate.SIDE = 64  # px of a picture's panels: at 224 to draw them takes as long as a small run


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: not in the default run, see torture.py")


@pytest.fixture(scope="session")
def slides(tmp_path_factory):
    """A folder of small slides. Their tumour is dark: a run of seconds learns it, on any CPU."""
    draw = synthetic.draw_slide

    def darker(rng, side, tumour):
        picture, outlines = draw(rng, side, tumour)
        inside = Annotation(outlines).mask(0, 0, side, side) == 1
        picture[inside] = picture[inside] * 0.6
        return picture, outlines

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "draw_slide", darker)
        patch.setattr(synthetic, "ProcessPoolExecutor", ThreadPoolExecutor)  # sees `darker`
        folder = tmp_path_factory.mktemp("data") / "slides"
        return synthetic.make(folder, train=8, test=3, side=512)


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
def run(slides, tmp_path_factory):
    """A run that is long enough to learn -> its folder, what it printed."""
    folder = tmp_path_factory.mktemp("run") / "a"
    flags = "--tile 64 --mpp 1 --width 8 --lr 1e-2 --epochs 2 --pixel-frac 1 --device cpu".split()
    return folder, jobs.ok(train.main, "--data", slides, "--out", folder, *flags)
