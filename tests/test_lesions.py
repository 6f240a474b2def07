"""Whole-slide scores: pixels, lesion recall, false positives per slide."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from jobs import call, ok, one_line_of

import data
from extras import lesions, outline, predict, synthetic
from slide import Annotation, Slide


def box(x, y, w, h):
    """A rectangle of pixels of level 1, as an outline in level-0 pixels."""
    return np.array([(x, y), (x + w, y), (x + w, y + h), (x, y + h)]) * 2.0 - 0.5


@pytest.fixture
def score(tmp_path, monkeypatch):
    """The figures of one slide at 10 um/px, given its annotation and the mask that was found."""
    path = tmp_path / "s.tif"
    synthetic.write_slide(path, np.zeros((768, 768, 3), np.uint8), [])
    source = data.Source("s.tif", path, None, "test")
    monkeypatch.setattr(predict, "predict_slide", lambda *args: (1, 10.0))

    def figures(polygons, found):
        answer = outline.to_shapes(outline.trace([found]), 2)
        outline.write_annotation(tmp_path / "s_pred.xml", answer)
        annotations, slide = [Annotation(polygons)], Slide(path)
        tiles = SimpleNamespace(sources=[source], slides=[slide], annotations=annotations)
        tiles.table = np.zeros(1, data.TILE)  # a tile of the slide
        return lesions.score(None, tiles, tmp_path, SimpleNamespace(**predict.DEFAULTS))

    return figures


def test_pixels_and_lesions_are_counted(score):
    """Lesions of three sizes; some found, some not, one found in two pieces."""
    truth = [
        (box(10, 10, 250, 60), "tumour"),
        (box(30, 30, 20, 20), "exclusion"),
        (box(38, 38, 4, 4), "tumour"),  # in the hole of the large one, and cleared with it
        (box(10, 100, 30, 30), "tumour"),
        (box(100, 100, 30, 30), "tumour"),
        (box(200, 200, 10, 10), "tumour"),
        (box(300, 300, 1, 1), "tumour"),  # 100 um^2: below --min-area no lesion, but a missed pixel
    ]
    found = np.zeros((384, 384), bool)
    found[10:70, 10:100] = found[10:70, 150:260] = True  # the macro one, in two pieces
    found[129:140, 39:60] = True  # one pixel of the first micro
    found[300:310, 100:120] = found[330:332, 100:120] = True  # false
    results = score(truth, found)
    true = Annotation(truth).mask(0, 0, 384, 384, 2) == 1
    assert true.sum() == 250 * 60 - 400 + 2 * 900 + 100 + 1
    tp, fp, fn = (true & found).sum(), (found & ~true).sum(), (true & ~found).sum()
    assert results["dsc"] == 2 * tp / (2 * tp + fp + fn) and results["iou"] == tp / (tp + fp + fn)
    assert results["lesion_recall"] == {
        "macro": {"lesions": 1, "found": 1},
        "micro": {"lesions": 2, "found": 1},
        "ITC": {"lesions": 1, "found": 0},
    }
    assert results["false_positives_per_slide"] == 2
    (slide,) = results["slides"]
    assert slide["false_positives"] == 2 and slide["dsc"] == results["dsc"]
    assert results["dsc_mean_of_slides"] == results["dsc"]


@pytest.mark.parametrize("count", [0, 1])
def test_a_normal_slide_has_false_positives_but_no_dsc(score, count):
    found = np.zeros((384, 384), bool)
    found[20:30, 20 : 20 + 10 * count] = True
    results = score([], found)
    assert results["dsc"] is None and results["iou"] is None
    assert results["dsc_mean_of_slides"] is None
    assert results["false_positives_per_slide"] == count


def test_whole_slides_are_predicted_once_and_anew_on_demand(run, slides, tmp_path):
    folder, two = tmp_path / "run", tmp_path / "slides"
    shutil.copytree(run[0], folder), two.mkdir()
    for path in slides.glob("test/synthetic_00[89].*"):
        shutil.copy(path, two)
    argv = ["--ckpt", folder / "last.pt", "--data", two, "--split", "all", "--device", "cpu"]
    first = ok(lesions.main, *argv).splitlines()
    results, said = json.loads((folder / "whole_slides/results.json").read_text()), first[-1]
    assert len(first) == 1 + 2 + 1 and len(results["slides"]) == 2 and results["dsc"] > 0
    assert json.loads(said)["dsc"] == pytest.approx(results["dsc"], abs=1e-4)
    assert json.loads(said)["lesion_recall"] == results["lesion_recall"]
    again = ok(lesions.main, *argv).splitlines()
    assert again[-1] == first[-1] and sum("done before" in line for line in again) == 2
    checkpoint = torch.load(folder / "last.pt", weights_only=True)
    checkpoint["model"]["head.bias"] += torch.tensor([-1.0, 1.0])
    torch.save(checkpoint, folder / "last.pt")
    line = one_line_of(*call(lesions.main, *argv))
    assert "done with weights" in line and "--overwrite" in line
    assert ok(lesions.main, *argv, "--overwrite").splitlines()[-1] != first[-1]


def test_normal_slides_alone_are_scored_and_an_empty_split_is_refused(run, slides, tmp_path):
    shutil.copy(run[0] / "last.pt", tmp_path)
    (normal,) = slides.glob("train/normal*.tif")
    (tmp_path / "normals").mkdir()
    shutil.copy(normal, tmp_path / "normals")
    argv = ["--ckpt", tmp_path / "last.pt", "--data", tmp_path / "normals", "--device", "cpu"]
    line = ok(lesions.main, *argv, "--split", "all").splitlines()[-1]
    assert '"dsc": null' in line and '"false_positives_per_slide": ' in line
    results = json.loads((tmp_path / "whole_slides/results.json").read_text())
    assert results["dsc"] is None and results["dsc_mean_of_slides"] is None
    assert results["slides"][0]["slide"] == normal.name
    assert "--split all" in one_line_of(*call(lesions.main, *argv))
