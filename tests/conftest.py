"""Slides for all tests, drawn once: 8 to train, one of them without tumour, and 3 to test."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import synthetic  # noqa: E402


@pytest.fixture(scope="session")
def slides(tmp_path_factory):
    return synthetic.make(tmp_path_factory.mktemp("data") / "slides", train=8, test=3, side=768)
