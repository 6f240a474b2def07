"""Slides outlined in part: roi, cancer region, normal region; masks known in part."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from jobs import QUICK, call, checkpoint_of, ok, one_line_of
from test_data import SQUARE, write_xml

import data
import evaluate
import train
from extras import baselines, convert, lesions, outline, predict
from loss import ce
from model import Network
from slide import Annotation, read_annotation

SIDE = 128  # level-0 px of a tile of 64 px at 1 um/px, on slides of 0.5


def box(x, y, w, h):
    """A rectangle of whole pixels, as an outline."""
    return np.array([(x, y), (x + w, y), (x + w, y + h), (x, y + h)]) - 0.5


def tiles_csv(folder):
    with open(folder / "tiles.csv", newline="") as file:
        return list(csv.DictReader(file))


def link(source, folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / source.name).symlink_to(source)
    return folder / source.with_suffix(".xml").name


# ---------------------------------------------------------------- simulation and reality are one


def test_masks_of_whole_slides_and_boxes_for_the_others_train_as_the_simulation_does(
    slides, tmp_path
):
    """--label-unit slide --pixel-frac 0.3 of full outlines, or the same choice drawn by hand."""
    rng = np.random.default_rng(0)
    for path in sorted(slides.rglob("*.tif")):
        # Tumour in squares of the grid: no tile is ambiguous.
        xml = link(path, tmp_path / "all" / path.parent.name)
        squares = [box(SIDE * x, SIDE * y, SIDE, SIDE) for x, y in rng.integers(1, 4, (4, 2))]
        outline.write_annotation(
            xml, [(s, "tumour") for s in squares] if "normal" not in path.name else []
        )
    flags = [*QUICK, "--seed", 3]
    simulated = ["--data", tmp_path / "all", "--label-unit", "slide", "--pixel-frac", 0.3]
    ok(train.main, *simulated, "--out", tmp_path / "a", *flags)
    rows = tiles_csv(tmp_path / "a")
    assert not [row for row in rows if row["label"] == "-1"]
    outlined = {row["slide"] for row in rows if row["mask_used"] == "True"}
    for path in sorted(slides.rglob("*.tif")):
        name = f"{path.parent.name}/{path.name}"
        xml = link(path, tmp_path / "some" / path.parent.name)
        shapes = read_annotation(tmp_path / "all" / name.replace(".tif", ".xml")).rings
        shapes = [(xy, kind) for kind, rings in shapes.items() for xy in rings]
        if name in outlined:
            shapes.append((box(0, 0, 512, 512), "roi"))
        elif path.parent.name == "train":
            kinds = ("normal region", "cancer region")
            shapes = [
                (box(int(row["x"]), int(row["y"]), SIDE, SIDE), kinds[int(row["label"])])
                for row in rows
                if row["slide"] == name
            ]
        outline.write_annotation(xml, shapes)
    real = ["--data", tmp_path / "some", "--pixel-frac", 1]
    out = ok(train.main, *real, "--out", tmp_path / "b", *flags)
    masks = sum(row["mask_used"] == "True" for row in rows)
    labels = sum(row["label_used"] == "True" for row in rows)
    said = f"used of the pool: {masks} of {masks} masks, {labels} of {labels} image labels"
    assert said in out and 0 < masks < labels
    for one, other in zip(rows, tiles_csv(tmp_path / "b"), strict=True):
        for name in ("slide", "x", "y", "label", "mask_used", "label_used"):
            assert one[name] == other[name]
    one, other = checkpoint_of(tmp_path / "a"), checkpoint_of(tmp_path / "b")
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    counts = [json.loads((tmp_path / x / "results.json").read_text())["counts"] for x in "ab"]
    assert counts[0] == counts[1]


# ------------------------------------------------------------------------------------ half a slide


@pytest.fixture(scope="module")
def half(slides, tmp_path_factory):
    """A slide that is outlined up to x = 330 alone, in the middle of a tile -> Tiles."""
    folder = tmp_path_factory.mktemp("half")
    xml = link(slides / "train/synthetic_001.tif", folder)
    outlines = [(box(150, 130, 400, 300), "tumour"), (box(200, 200, 50, 40), "exclusion")]
    outline.write_annotation(xml, [*outlines, (box(0, 0, 330, 512), "roi")])
    source = data.Source("a", folder / "synthetic_001.tif", xml, "train")
    return data.tile_slides([source], 64, 1.0)


def slow_mask(x, y):
    """What is known of the 64 x 64 px (of two level-0 px) at x, y: pixel by pixel."""
    mask = np.empty((64, 64), int)
    for j in range(64):
        for i in range(64):
            px, py = x + 2 * i + 0.5, y + 2 * j + 0.5  # the centre of the pixel
            tumour = 149.5 <= px < 549.5 and 129.5 <= py < 429.5
            hole = 199.5 <= px < 249.5 and 199.5 <= py < 239.5
            mask[j, i] = -1 if px >= 329.5 else tumour and not hole
    return mask


def test_masks_losses_and_counts_are_of_the_known_pixels_alone(half):
    """The unknown half of a slide was trained as normal tissue, in silence."""
    table = half.table
    assert len(table) and set(table["x"].tolist()) <= {0, 128, 256}
    model, args = (
        Network(4).eval(),
        SimpleNamespace(batch_size=3, device="cpu", workers=0, amp=False),
    )
    counts = evaluate.count(model, half, np.arange(len(table)), args)
    partial = 0
    for n, row in enumerate(table):
        image, mask, label = half[n, 0]
        wanted = slow_mask(row["x"], row["y"])
        assert np.array_equal(mask, wanted)
        known = [(i, j) for i in range(64) for j in range(64) if wanted[i, j] >= 0]
        partial += len(known) < 64 * 64
        tumour = sum(wanted[place] for place in known) / len(known)
        assert row["known"] == len(known) / 64**2 and row["tumour"] == pytest.approx(tumour)
        assert label == row["label"] == (1 if tumour > 0.05 else -1 if tumour else 0)
        logits = model(image[None])[0]
        p = logits[0].softmax(0).detach().numpy()
        slow = -np.mean([np.log(p[wanted[place]][place]) for place in known])
        assert ce(logits, mask[None]).item() == pytest.approx(slow, rel=1e-4)
        answer = [(p[1][place] > 0.5, wanted[place] == 1) for place in known]
        slow = [sum(a and t for a, t in answer), sum(a and not t for a, t in answer)]
        assert counts[n, :3].tolist() == [*slow, sum(t and not a for a, t in answer)]
    assert (table["tumour"] > 0).any() and partial > 0


def test_a_tile_of_which_less_than_half_is_known_gives_no_mask(slides, tmp_path):
    xml = link(slides / "train/synthetic_001.tif", tmp_path)
    for width, known in ((256 + 63, 0), (256 + 65, 65 / 128)):
        outline.write_annotation(xml, [(box(0, 0, width, 512), "roi")])
        source = data.Source("a", tmp_path / "synthetic_001.tif", xml, "train")
        tiles = data.tile_slides([source], 64, 1.0)
        column = tiles.table[tiles.table["x"] == 256]
        assert len(column) > 0 if known else len(column) == 0
        assert column["known"] == pytest.approx(known, abs=0.01)
        for n in np.flatnonzero(tiles.table["x"] == 256).tolist():
            assert (tiles[n, 0][1].numpy() < 0).mean() == pytest.approx(1 - known, abs=0.01)


# ------------------------------------------------------------------------------------ label regions


def test_a_label_region_labels_the_tiles_that_it_covers_by_half(slides, tmp_path):
    xml = link(slides / "train/synthetic_001.tif", tmp_path)
    cancer, normal = box(256, 128, 128 + 63, 256), box(256, 256, 256, 128 + 65)
    outline.write_annotation(xml, [(cancer, "cancer region"), (normal, "normal region")])
    source = data.Source("a", tmp_path / "synthetic_001.tif", xml, "train")
    tiles = data.tile_slides([source], 64, 1.0)
    labels = {(t["x"] // 128, t["y"] // 128): t["label"] for t in tiles.table}
    wanted = {(2, 1): 1, (2, 2): -1, (3, 2): 0, (2, 3): 0, (3, 3): 0}  # both kinds: ambiguous
    assert labels == wanted and (tiles.table["known"] == 0).all()
    assert np.isnan(tiles.table["tumour"]).all() and not tiles.has_mask.any()
    assert all((tiles[n, 0][1] == -1).all() for n in range(5))


def test_a_mask_has_the_last_word_on_its_tiles_label(slides, tmp_path):
    xml = link(slides / "train/synthetic_001.tif", tmp_path)
    shapes = [(box(256, 256, 128, 128), "roi"), (box(256, 256, 256, 128), "cancer region")]
    outline.write_annotation(xml, shapes)
    tiles = data.tile_slides([data.Source("a", xml.with_suffix(".tif"), xml, "train")], 64, 1.0)
    assert tiles.table[["x", "label", "known"]].tolist() == [(256, 0, 1.0), (384, 1, 0.0)]


def test_the_same_annotation_of_asap_and_of_qupath_gives_the_same_table(slides, tmp_path):
    tif = slides / "train/synthetic_001.tif"
    classes = {"tumour": "Tumor", "exclusion": "Ignore*", "roi": "Region*"}
    shapes = [(box(130, 140, 100, 90), "tumour"), (box(150, 150, 30, 20), "exclusion")]
    shapes += [(box(120, 120, 260, 260), "roi"), (box(384, 128, 128, 256), "cancer region")]
    shapes += [(box(128, 384, 256, 128), "normal region")]
    features = []
    for xy, kind in shapes:
        ring = (xy + 0.5).tolist()  # pixel (0, 0) spans 0 to 1 in QuPath
        geometry = {"type": "Polygon", "coordinates": [[*ring, ring[0]]]}
        about = {"objectType": "annotation", "classification": {"name": classes.get(kind, kind)}}
        features.append({"type": "Feature", "geometry": geometry, "properties": about})
    asap, qupath = link(tif, tmp_path / "asap"), link(tif, tmp_path / "qupath")
    outline.write_annotation(asap, shapes)
    qupath.with_suffix(".geojson").write_text(json.dumps(features))
    ok(convert.main, qupath.with_suffix(".geojson"))
    tables = [
        data.tile_slides([data.Source("a", xml.with_suffix(".tif"), xml, "train")], 64, 1.0).table
        for xml in (asap, qupath)
    ]
    assert str(tables[0].tolist()) == str(tables[1].tolist())  # as text: nan is not equal to nan
    assert {*tables[0]["label"].tolist()} == {0, 1} and len(tables[0]) > 5


def few_outlined_many_boxed(slides, folder, test_too=True):
    """Two training slides have a roi, two a cancer and a normal box; one to test -> `folder`."""
    for path in sorted(slides.rglob("synthetic_00[01238].tif")):
        xml = link(path, folder / path.parent.name)
        rings = read_annotation(path.with_suffix(".xml")).rings
        shapes = [(xy, kind) for kind, some in rings.items() for xy in some]
        if path.stem[-3:] in ("000", "001") or test_too and path.parent.name == "test":
            shapes += [(box(0, 0, 512, 512), "roi")]
        else:
            shapes = [(box(256, 256, 256, 128), "cancer region")]
            shapes += [(box(256, 384, 256, 128), "normal region")]
        outline.write_annotation(xml, shapes)
    return folder


def test_a_few_masks_and_many_boxes_train(slides, tmp_path):
    folder = few_outlined_many_boxed(slides, tmp_path / "slides")
    argv = ["--data", folder, "--out", tmp_path / "r", "--pixel-frac", 1, *QUICK]
    ok(train.main, *argv, "--pretrain", "labels", "--seg-loss", "fw")
    rows = tiles_csv(tmp_path / "r")
    masks = {row["slide"][-5] for row in rows if row["mask_used"] == "True"}
    labels = {row["slide"][-5] for row in rows if row["label_used"] == "True"}
    assert masks == {"0", "1"} and labels == {"0", "1", "2", "3"}
    results = json.loads((tmp_path / "r/results.json").read_text())
    assert 0 <= results["dsc"] <= 1 and 0 <= results["accuracy"] <= 1


@pytest.mark.parametrize("method", ["multitask", "mil"])  # transfer has our steps
def test_the_compared_methods_train_on_them_too(slides, tmp_path, method):
    folder = few_outlined_many_boxed(slides, tmp_path / "slides")
    argv = [method, "--data", folder, "--out", tmp_path / "r", "--pixel-frac", 1, *QUICK]
    ok(baselines.main, *argv, "--epochs", 1, "--pretrain-epochs", 0)


def test_a_test_set_without_masks_is_said_and_still_scores_the_labels(slides, tmp_path):
    folder = few_outlined_many_boxed(slides, tmp_path / "slides", test_too=False)
    argv = ["--data", folder, "--out", tmp_path / "r", "--pixel-frac", 1, *QUICK]
    status, out, err = call(train.main, *argv)
    assert status == 0 and "no test tile with tumour has a mask" in err and "roi" in err
    results = json.loads((tmp_path / "r/results.json").read_text())
    assert results["dsc"] is None and results["false_positive_px_per_slide"] is None
    assert 0 <= results["accuracy"] <= 1 and "DSC null" in out


def test_without_any_mask_to_train_on_there_is_one_line(slides, tmp_path):
    folder = few_outlined_many_boxed(slides, tmp_path / "slides")
    for xml in folder.glob("train/*00[01].xml"):
        outline.write_annotation(xml, [(box(256, 256, 256, 128), "cancer region")])
    argv = ["--data", folder, "--out", tmp_path / "r", *QUICK]
    assert "mask" in one_line_of(*call(train.main, *argv))


@pytest.mark.parametrize("seed", range(4))
def test_a_drawn_split_has_outlined_tumour_to_test_on(tmp_path, seed):
    """Cancer regions alone counted as tumour would often leave no mask to test on."""
    kinds = ["tumour"] * 3 + ["cancer region"] * 12 + ["normal region"] * 6
    for n, kind in enumerate(kinds):
        (tmp_path / f"{n:02}.tif").touch()
        shapes = [(SQUARE, kind)] + [(SQUARE * 2, "roi")] * (n == 0)
        outline.write_annotation(tmp_path / f"{n:02}.xml", shapes)
    test = [int(s.name[:2]) for s in data.find_slides(tmp_path, seed) if s.split == "test"]
    assert [sum(n in part for n in test) for part in (range(3), range(3, 15), range(15, 21))] == [
        *(1, 2, 1)
    ]


# ------------------------------------------------------------------------------------- annotations


@pytest.mark.parametrize("shape", ["Polygon", "Spline", "Rectangle"])
@pytest.mark.parametrize("name", ["roi", "ROI", "Cancer Region", "normal region"])
def test_regions_are_read_in_any_case_and_nested(tmp_path, name, shape):
    rings = [(name, shape, SQUARE), ("inner", shape, SQUARE + 50)]
    path = write_xml(tmp_path / "a.xml", *rings, groups={"inner": name, name: "None"})
    annotation = read_annotation(path)
    assert [*annotation.rings] == [name.lower()] and len(annotation.rings[name.lower()]) == 2
    mask = annotation.mask(0, 0, 100, 100)
    assert (mask == 0).sum() == (2 * 400 if name.lower() == "roi" else 0)
    assert (mask == -1).sum() == 100 * 100 - (mask == 0).sum()


def test_outlines_in_no_roi_are_named_with_their_number(tmp_path, capsys):
    """Drawn in full or not, nobody knows: they teach nothing, and that is not silent."""
    roi = ("roi", "Polygon", np.array([(0, 0), (40, 0), (0, 40)], float))
    rings = [("_0", "Polygon", SQUARE / 2), ("_0", "Polygon", SQUARE / 4 + 22)]
    read_annotation(write_xml(tmp_path / "a.xml", roi, rings[0]))
    assert not capsys.readouterr().err
    annotation = read_annotation(write_xml(tmp_path / "a.xml", roi, *rings, *rings[1:]))
    assert "a.xml: 2 outlines of tumour are in no roi" in capsys.readouterr().err
    assert (annotation.mask(0, 0, 40, 40) == 1).sum() == 100
    read_annotation(write_xml(tmp_path / "a.xml", ("cancer region", "Polygon", SQUARE), rings[0]))
    assert "1 outlines of tumour are in no roi" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["roi", "cancer region", "normal region"])
@pytest.mark.parametrize("xy", [SQUARE * (1, 0), SQUARE + 5000])
def test_a_region_without_area_or_off_the_slide_never_makes_the_slide_outlined_in_full(
    tmp_path, capsys, kind, xy
):
    tumour = ("_0", "Polygon", SQUARE)
    path = write_xml(tmp_path / "a.xml", (kind, "Rectangle", xy), tumour)
    line = one_line_of(*call(lambda _: read_annotation(path, (100, 100))))
    assert "a.xml: no region" in line and "1 Rectangle" in line
    path = write_xml(
        tmp_path / "a.xml", (kind, "Rectangle", xy), ("roi", "Polygon", SQUARE), tumour
    )
    assert read_annotation(path, (100, 100)).has_regions
    assert "a.xml: skipped 1 Rectangle" in capsys.readouterr().err


def test_a_box_of_group_normal_is_not_a_normal_slide(tmp_path):
    """It is a hole in no tumour: the whole slide was trained as normal, tumour and all."""
    path = write_xml(tmp_path / "a.xml", ("normal", "Rectangle", SQUARE))
    line = one_line_of(*call(lambda _: read_annotation(path)))
    assert "a.xml: holes" in line and "normal region" in line


def test_a_roi_whose_outlines_cannot_be_used_is_refused(tmp_path):
    """Its tumour would be normal tissue; boxes alone lose nothing."""
    dot = ("_0", "Dot", SQUARE[:1])
    path = write_xml(tmp_path / "a.xml", ("roi", "Polygon", SQUARE), dot)
    assert "no outline of tumour" in one_line_of(*call(lambda _: read_annotation(path)))
    path = write_xml(tmp_path / "a.xml", ("cancer region", "Polygon", SQUARE), dot)
    assert read_annotation(path).has_regions
    for shape in ("Dot", "Measurement"):  # of no group: nobody meant an outline
        path = write_xml(tmp_path / "a.xml", ("roi", "Polygon", SQUARE), ("None", shape, SQUARE))
        assert (read_annotation(path).mask(0, 0, 9, 9) <= 0).all()
    path = write_xml(tmp_path / "a.xml", ("roi", "Polygon", SQUARE), ("None", "Polygon", SQUARE))
    assert "no outline of tumour" in one_line_of(*call(lambda _: read_annotation(path)))


def test_a_thin_outline_in_a_roi_is_not_said_to_be_in_none(tmp_path, capsys):
    """It was looked for at 256 x 256 places, and it lay between them."""
    roi, thin = box(0, 0, 20_000, 20_000), box(100, 110, 8000, 20)
    path = write_xml(tmp_path / "a.xml", ("roi", "Polygon", roi), ("_0", "Polygon", thin))
    assert read_annotation(path, (20_000, 20_000)).mask(100, 112, 8, 8).all()
    assert not capsys.readouterr().err


# ------------------------------------------------------------------------------------ whole slides


def test_lesions_are_scored_inside_a_roi_and_slides_without_one_left_out_by_name(
    slides, tmp_path, monkeypatch, capsys
):
    sources = [
        data.Source(f"{n}.tif", slides / "train/synthetic_001.tif", None, "test") for n in (0, 1)
    ]
    rings = [(box(20, 20, 60, 40), "tumour"), (box(200, 20, 40, 40), "tumour")]
    truths = [
        Annotation([*rings, (box(0, 0, 100, 200), "roi")]),
        Annotation([(box(0, 0, 100, 200), "cancer region")]),
    ]
    found = [(box(30, 20, 60, 40), "tumour"), (box(300, 300, 40, 40), "tumour")]
    outline.write_annotation(tmp_path / "synthetic_001_pred.xml", found)
    monkeypatch.setattr(predict, "predict_slide", lambda *args: (0, 10.0))
    slide = data.Slide(sources[0].path)
    tiles = SimpleNamespace(sources=sources, slides=[slide] * 2, annotations=truths)
    tiles.table = np.zeros(1, data.TILE)
    results = lesions.score(None, tiles, tmp_path, SimpleNamespace(**predict.DEFAULTS))
    assert "1.tif" in capsys.readouterr().err
    tp, both = 50 * 40, 60 * 40 + 60 * 40
    assert results["dsc"] == pytest.approx(2 * tp / both)
    assert results["false_positives_per_slide"] == 0 and len(results["slides"]) == 1
    assert sum(size["lesions"] for size in results["lesion_recall"].values()) == 1
