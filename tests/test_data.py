"""Annotations, slides of a folder, tiles, labels: slow oracles for the fast forms, odd folders."""

import csv
import multiprocessing
import signal
import sys
import time
from multiprocessing import util
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from extras import synthetic
from slide import Annotation, DataError, Slide, read_annotation, winding

XML = Path(__file__).parent / "data"
SQUARE = np.array([(10, 10), (30, 10), (30, 30), (10, 30)], float)


# -------------------------------------------------------------------------------------- annotation


def test_many_outlines_take_no_time():
    """The list of a kind was made anew for each of its shapes: 22 s here, now .01."""
    start = time.process_time()
    annotation = Annotation([(SQUARE, "tumour")] * 20_000)
    assert len(annotation.rings["tumour"]) == 20_000 and time.process_time() - start < 2


@pytest.mark.parametrize(
    "name, tumour, exclusions",
    [
        ("patient_010_node_4", 73, 1),
        ("patient_015_node_2", 2, 0),
        ("test_010", 2, 0),
        ("test_066", 21, 0),
    ],
)
def test_original_files_keep_areas_and_skip_dots_rulers_and_rings_of_two(name, tumour, exclusions):
    annotation = read_annotation(XML / f"{name}.xml")
    shapes = annotation.rings
    assert (len(shapes["tumour"]), len(shapes.get("exclusion", ()))) == (tumour, exclusions)
    assert all(len(xy) >= 3 for rings in shapes.values() for xy in rings)


def write_xml(path, *rings, groups=(), order=None):
    """Rings are (group, type, xy), groups {name: group that it is in}; -> `path`."""
    body = ""
    for group, kind, xy in rings:
        points = [f'X="{x}" Y="{y}"' for x, y in xy]
        if order is not None:
            points = [f'Order="{n}" {p}' for n, p in zip(order, points, strict=True)]
        points = "".join(f"<Coordinate {p}/>" for p in points)
        group = "" if group is None else f'PartOfGroup="{group}"'
        body += (
            f'<Annotation Name="a" Type="{kind}" {group}>'
            f"<Coordinates>{points}</Coordinates></Annotation>"
        )
    tree = "".join(f'<Group Name="{a}" PartOfGroup="{b}"/>' for a, b in dict(groups).items())
    tree = f"<AnnotationGroups>{tree}</AnnotationGroups>"
    text = f"<ASAP_Annotations><Annotations>{body}</Annotations>{tree}</ASAP_Annotations>"
    path.write_text(text)
    return path


@pytest.mark.parametrize("tumour", ["_0", "_1", "Tumor", "metastases"])
@pytest.mark.parametrize("exclusion", ["_2", "Exclusion", "normal"])
def test_exclusions_are_cleared_whatever_the_order_of_the_file(tmp_path, tumour, exclusion):
    """In the order of the file, test_113 gains 4.6 % of tumour."""
    hole, ruler = (exclusion, "Polygon", SQUARE / 2 + 10), ("None", "Dot", SQUARE[:1])
    path = write_xml(tmp_path / "a.xml", hole, (tumour, "Spline", SQUARE), ruler)
    mask = read_annotation(path).mask(0, 0, 64, 64)
    assert mask.sum() == 20 * 20 - 10 * 10 and mask[12, 12] == 1 and mask[20, 20] == 0


def test_points_are_put_by_their_order(tmp_path):
    """ASAP sorts them: a file that another tool has shuffled is a square there, here an eight."""
    shuffled = [2, 0, 3, 1]
    path = write_xml(tmp_path / "a.xml", ("_0", "Polygon", SQUARE[shuffled]), order=shuffled)
    assert read_annotation(path).mask(0, 0, 64, 64).sum() == 20 * 20
    path = write_xml(tmp_path / "a.xml", ("_0", "Polygon", SQUARE))  # without: as they stand
    assert read_annotation(path).mask(0, 0, 64, 64).sum() == 20 * 20


@pytest.mark.parametrize("order", [[10, 2, 1, 0], [0.5, 0.25, -1, -2]])
def test_the_order_is_one_of_numbers(tmp_path, order):
    """As texts, "10" comes before "2"."""
    path = write_xml(tmp_path / "a.xml", ("_0", "Polygon", SQUARE), order=order)
    (xy,) = read_annotation(path).rings["tumour"]
    assert np.array_equal(xy, SQUARE[::-1])


def test_a_group_in_a_known_one_is_of_that_one(tmp_path):
    """ASAP nests groups; `macro` in `metastases` was refused as unknown."""
    groups = {"macro": "metastases", "deep": "macro", "fat": "exclusion", "metastases": "None"}
    rings = [("deep", "Polygon", SQUARE), ("fat", "Polygon", SQUARE / 2)]
    rings += [("macro", "Polygon", SQUARE + 30)]
    annotation = read_annotation(write_xml(tmp_path / "a.xml", *rings, groups=groups))
    assert {kind: len(rings) for kind, rings in annotation.rings.items()} == {
        "tumour": 2,
        "exclusion": 1,
    }


@pytest.mark.parametrize(
    "groups", [{"a": "b", "b": "a"}, {"a": "a"}, {"a": "b", "b": "c", "c": "b"}]
)
def test_groups_in_a_ring_end_and_are_unknown(tmp_path, groups):
    with pytest.raises(DataError, match="a.xml"):
        path = write_xml(tmp_path / "a.xml", ("a", "Polygon", SQUARE), groups=groups)
        read_annotation(path)


@pytest.mark.parametrize(
    "ring, kind",
    [
        (("None", "Polygon", SQUARE), "Polygon"),
        ((None, "Spline", SQUARE), "Spline"),
        (("_0", "Dot", SQUARE[:1]), "Dot"),
        (("_0", "Rectangle", SQUARE[:2]), "Rectangle"),
        (("_0", "Polygon", SQUARE[:0]), "Polygon"),
    ],
)
def test_a_file_whose_shapes_are_all_skipped_is_not_one_of_a_normal_slide(tmp_path, ring, kind):
    """One forgotten group once made all 58 tiles of a tumour slide normal, without a word."""
    with pytest.raises(DataError, match=f"a.xml.*3 {kind}"):
        read_annotation(write_xml(tmp_path / "a.xml", *[ring] * 3))


def test_a_file_without_any_shape_is_one_of_a_normal_slide(tmp_path, capsys):
    path = write_xml(tmp_path / "a.xml", groups={"metastases": "None"})
    assert read_annotation(path).rings == {}
    assert read_annotation(path).mask(0, 0, 9, 9).sum() == 0 and not capsys.readouterr().err


def test_outlines_that_were_put_in_no_group_are_warned_of(tmp_path, capsys):
    rings = [("_0", "Polygon", SQUARE), ("None", "Polygon", SQUARE), (None, "Spline", SQUARE)]
    annotation = read_annotation(write_xml(tmp_path / "a.xml", *rings))
    said = capsys.readouterr().err
    assert len(annotation.rings["tumour"]) == 1 and said.count("\n") == 1 and "a.xml" in said
    read_annotation(write_xml(tmp_path / "a.xml", *rings[:1], ("None", "Dot", SQUARE[:1])))
    assert "1 Dot of 1 points" in capsys.readouterr().err


def test_an_unknown_group_is_refused_not_taken_as_normal(tmp_path):
    with pytest.raises(DataError, match="a.xml.*necrosis"):
        read_annotation(write_xml(tmp_path / "a.xml", ("necrosis", "Polygon", SQUARE)))


@pytest.mark.parametrize("count", [3, 30_000])
def test_annotations_in_each_other_are_read_or_refused_in_no_time(tmp_path, count):
    """Looking below every Annotation for its points took a minute for 30,000 of them."""
    body = "<Annotation>" * count + "</Annotation>" * count
    (tmp_path / "a.xml").write_text(f"<ASAP_Annotations>{body}</ASAP_Annotations>")
    with pytest.raises(DataError, match="a.xml"):
        read_annotation(tmp_path / "a.xml")


@pytest.mark.parametrize(
    "text",
    [
        "<ASAP_Annotations><Annotations>",
        "",
        "<Annotations/>",
        '<!DOCTYPE a [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><a>&b;</a>',
    ],
)
def test_broken_or_foreign_xml_is_named(tmp_path, text):
    (tmp_path / "a.xml").write_text(text)
    with pytest.raises(DataError, match="a.xml") as caught:
        read_annotation(tmp_path / "a.xml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400", "1e30", "", "x"])
def test_coordinates_that_are_no_pixels_are_refused(tmp_path, value):
    path = write_xml(tmp_path / "a.xml", ("_0", "Polygon", [(0, 0), (9, value), (9, 9)]))
    with pytest.raises(DataError, match="a.xml"):
        read_annotation(path)


def slow_winding(xy, w, h):
    """Dan Sunday's winding number, point by point and edge by edge."""
    out = np.zeros((h, w), int)
    for y in range(h):
        for x in range(w):
            for (x1, y1), (x2, y2) in zip(xy.tolist(), np.roll(xy, -1, 0).tolist(), strict=True):
                left = (x2 - x1) * (y - y1) - (x - x1) * (y2 - y1)
                if y1 <= y < y2 and left > 0:
                    out[y, x] += 1
                elif y2 <= y < y1 and left < 0:
                    out[y, x] -= 1
    return out


RNG = np.random.default_rng(0)
T = np.linspace(0, 4 * np.pi, 40, endpoint=False)
RINGS = {
    "random": RNG.uniform(-5, 25, (12, 2)),
    "integers": RNG.integers(-3, 23, (15, 2)).astype(float),
    "halves": RNG.integers(-6, 46, (15, 2)) / 2,
    "twice round": np.stack([10.3 + 8 * np.cos(T), 9.2 + 7 * np.sin(T)], 1),
    "eight": np.stack([10.3 + 8 * np.sin(T / 2), 9.2 + 7 * np.sin(T)], 1),
    "square": SQUARE / 3,
    "outside": SQUARE + 100,
    "around": (SQUARE - 20) * 9,
    "flat": np.array([(0, 5), (9, 5), (4, 5.0)]),
}


@pytest.mark.parametrize("name", RINGS)
def test_winding_equals_the_brute_force_loop(name):
    for xy in (RINGS[name], RINGS[name][::-1]):
        assert np.array_equal(winding(xy, 20, 18), slow_winding(xy, 20, 18))


@pytest.mark.parametrize("downsample", [1, 2, 4])
def test_mask_of_a_tile_is_the_union_of_its_rings_less_exclusions(downsample):
    rng = np.random.default_rng(1)
    rings = [
        (rng.uniform(0, 80, (7, 2)) + rng.uniform(0, 40, 2), "exclusion" if n == 1 else "tumour")
        for n in range(4)
    ]
    x, y, w, h = 60 // downsample - 12, 50 // downsample - 9, 25, 19
    slow = np.zeros((h, w), bool)
    for wanted, value in (("tumour", True), ("exclusion", False)):
        for xy, kind in rings:
            if kind == wanted:
                slow[slow_winding((xy + 0.5) / downsample - 0.5 - (x, y), w, h) != 0] = value
    fast = Annotation(rings).mask(x, y, w, h, downsample)
    assert np.array_equal(fast, slow) and 0 < slow.sum() < slow.size


# ---------------------------------------------------------------------------- slides of a folder


def touch(folder, *names):
    """Empty files, XML with an outline of tumour; `find_slides` opens these and tables alone."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
        if name.lower().endswith(".xml"):
            write_xml(folder / name, ("_0", "Polygon", SQUARE))
    return folder


def found(root, seed=0):
    """{name of a slide: (its XML below the root or None, its split)}."""
    return {
        s.name: (s.xml and s.xml.relative_to(root).as_posix(), s.split)
        for s in data.find_slides(root, seed)
    }


OUTLINES = ["lesion_annotations", "lesion_annotations/lesion_annotations"]  # zips unpack so or so
PARENTS = ["", "CAMELYON/", "my data/CAMELYON/"]


@pytest.mark.parametrize("parent", PARENTS)
@pytest.mark.parametrize("outlines", OUTLINES)
def test_camelyon16_is_read_as_it_is_shipped(slides, tmp_path, capsys, outlines, parent):
    """The test set was drawn anew from all slides: each official test slide was trained on."""
    links = {
        "training/normal/normal_001.tif": "train/normal_005.tif",
        "training/tumor/tumor_001.tif": "train/synthetic_000.tif",
        f"training/{outlines}/tumor_001.xml": "train/synthetic_000.xml",
        "testing/images/test_001.tif": "test/synthetic_008.tif",
        f"testing/{outlines}/test_001.xml": "test/synthetic_008.xml",
        "testing/images/test_002.tif": "train/normal_005.tif",
        "testing/images/test_003.tif": "train/normal_005.tif",  # in no table
        "testing/evaluation_masks/test_001_mask.tif": "test/synthetic_008.tif",
    }
    for name, target in links.items():
        (tmp_path / parent / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / parent / name).symlink_to(slides / target)
    table = "test_001,Tumor,IDC,Macro\ntest_002,Normal,None,None\n"  # without a header
    (tmp_path / parent / "testing/reference.csv").write_text(table)
    wanted = {
        f"{parent}training/normal/normal_001.tif": (None, "train"),
        f"{parent}training/tumor/tumor_001.tif": (
            f"{parent}training/{outlines}/tumor_001.xml",
            "train",
        ),
        f"{parent}testing/images/test_001.tif": (
            f"{parent}testing/{outlines}/test_001.xml",
            "test",
        ),
        f"{parent}testing/images/test_002.tif": (None, "test"),
    }
    assert found(tmp_path) == wanted
    said = capsys.readouterr()
    assert "split" in said.out and "folders" in said.out and "test_003.tif" in said.err
    tiles = data.tile_slides(data.find_slides(tmp_path), 64, 1.0)
    cancer = tiles.table[tiles.table["label"] == data.CANCER]
    assert {tiles.sources[n].path.stem for n in cancer["slide"]} == {"tumor_001", "test_001"}


@pytest.mark.parametrize("table", ["training/stage_labels.csv", "stages.csv"])
@pytest.mark.parametrize("parent", PARENTS)
@pytest.mark.parametrize("outlines", OUTLINES)
def test_camelyon17_is_read_as_it_is_shipped(tmp_path, capsys, outlines, parent, table):
    """Its testing/ has no labels: the split is drawn, by patient, from training/."""
    rows, wanted = ["patient,stage"], {}
    for patient in range(6):
        rows.append(f"patient_{patient:03}.zip,pN1")
        for node in range(2):
            name = f"patient_{patient:03}_node_{node}"
            slide = f"{parent}training/center_{patient // 3}/{name}.tif"
            touch(tmp_path, slide, f"{parent}testing/patient_10{patient}_node_{node}.tif")
            rows.append(f"{name}.tif,{('negative', 'macro')[node]}")
            wanted[slide] = None
            if node:
                wanted[slide] = f"{parent}training/{outlines}/{name}.xml"
                touch(tmp_path, wanted[slide])
    (tmp_path / parent / table).write_text("\n".join(rows))
    sources = found(tmp_path)
    assert {name: xml for name, (xml, _) in sources.items()} == wanted
    split = {name[-22:-11]: side for name, (_, side) in sources.items()}
    assert sorted(split.values()) == ["test"] + ["train"] * 5
    assert all(side == split[name[-22:-11]] for name, (_, side) in sources.items())
    said = capsys.readouterr()
    assert "seed 0" in said.out and "patient_100_node_0.tif" in said.err and "12" in said.err


@pytest.mark.parametrize(
    "train, test", [("TRAINING", "Testing"), ("Train", "test"), ("x/train", "y/TEST")]
)
def test_folders_train_and_test_are_the_split_in_any_case(tmp_path, capsys, train, test):
    for folder in (train, test, "other"):
        touch(
            tmp_path,
            *(f"{folder}/{folder[0]}{n}.{suffix}" for n in range(4) for suffix in ("tif", "xml")),
        )
    split = {name: side for name, (_, side) in found(tmp_path).items()}
    assert split == {f"{train}/{train[0]}{n}.tif": "train" for n in range(4)} | {
        f"{test}/{test[0]}{n}.tif": "test" for n in range(4)
    }
    said = capsys.readouterr()
    assert "folders" in said.out and all(f"other/o{n}.tif" in said.err for n in range(4))


def test_one_folder_of_the_two_is_no_split(tmp_path, capsys):
    touch(tmp_path, *(f"training/a{n}.{suffix}" for n in range(11) for suffix in ("tif", "xml")))
    split = [side for _, side in found(tmp_path).values()]
    assert sorted(split) == ["test"] * 2 + ["train"] * 9
    assert "seed 0" in capsys.readouterr().out
    other = [side for _, side in found(tmp_path, seed=1).values()]
    assert other != split and sorted(other) == sorted(split)


def test_no_slide_is_on_both_sides_and_patients_stay_together(tmp_path):
    rows = []
    for patient in range(11):
        for node in range(3):
            name = f"patient_{patient:03}_node_{node}"
            touch(tmp_path, f"{name}.tif")
            if patient % 2 and node == 1:
                touch(tmp_path, f"{name}.xml")
            else:
                rows.append(f"{name}.tif,negative\n")
    (tmp_path / "stage_labels.csv").write_text("patient,stage\n" + "".join(rows))
    for seed in range(5):
        sources = data.find_slides(tmp_path, seed)
        sides = [{s.name[:11] for s in sources if s.split == split} for split in ("train", "test")]
        assert len(sources) == 33 and not set.intersection(*sides) and len(sides[1]) == 2
        assert {s.split for s in sources if s.xml} == {"train", "test"}


def test_copies_of_a_slide_stay_on_one_side(tmp_path):
    for folder in ("a", "b"):
        touch(tmp_path, *(f"{folder}/tumor_{n:03}.{s}" for n in range(12) for s in ("tif", "xml")))
    sources = data.find_slides(tmp_path)
    sides = [{s.path.stem for s in sources if s.split == split} for split in ("train", "test")]
    assert not set.intersection(*sides) and all(sides)


def test_a_patient_on_both_sides_is_named(tmp_path, capsys):
    for split, node in (("train", 0), ("test", 1)):
        touch(tmp_path, *(f"{split}/patient_007_node_{node}.{s}" for s in ("tif", "xml")))
        touch(tmp_path, *(f"{split}/patient_01{node}_node_0.{s}" for s in ("tif", "xml")))
    assert {side for _, side in found(tmp_path).values()} == {"train", "test"}
    said = capsys.readouterr().err
    assert "patient_007" in said and "patient_01" not in said


def test_a_slide_without_xml_is_normal_only_where_that_is_known(tmp_path, capsys):
    known = ["deep/er/Normal_002.TIFF", "patient_003_node_1.tif", "mine.svs", "deep/test_002.tif"]
    unknown = ["x_004.svs", "patient_003_node_2.tif", "abnormal.tif", "y.tif"]
    touch(tmp_path, *known, *unknown, "tumor_001.tif", "annotations/tumor_001.xml")
    touch(tmp_path, "tumor_001_mask.tif", "tumor_001_likelihood_map.tif", ".hidden.tif")
    (tmp_path / "stage_labels.csv").write_text(
        "patient,stage\npatient_003.zip,pN0\npatient_003_node_1.tif,negative\nx_004.tif,micro\n"
    )
    (tmp_path / "stages.csv").write_text("\ufeffpatient,stage\r\nmine.svs,Negative\r\n")
    (tmp_path / "deep/reference.csv").write_text("test_001,Tumor,IDC\ntest_002,Normal,None\n")
    sources = {name: xml for name, (xml, _) in found(tmp_path).items()}
    assert sources == dict.fromkeys(known) | {"tumor_001.tif": "annotations/tumor_001.xml"}
    said = capsys.readouterr().err
    assert all(name in said for name in unknown) and "mask" not in said and "hidden" not in said


def test_an_xml_belongs_to_the_slide_beside_it(tmp_path, capsys):
    """Another hospital's HE_0.tif, normal, took this one's outlines: 7 cancer tiles on it."""
    touch(tmp_path, "a/HE_0.tif", "a/HE_0.XML", "b/HE_0.tif", "b/y.tif", "b/Y.xml", "old/y.xml")
    xmls = {name: xml for name, (xml, _) in found(tmp_path).items()}
    assert xmls == {"a/HE_0.tif": "a/HE_0.XML", "b/y.tif": "b/Y.xml"}
    said = capsys.readouterr().err
    assert "b/HE_0.tif" in said
    # A correction saved elsewhere than beside the slide was passed over in silence.
    assert "XML are not read" in said and "(1):" in said and str(tmp_path / "old/y.xml") in said


@pytest.mark.parametrize(
    "names, beside",
    [
        (["a/x.tif", "b/x.tif", "outlines/x.xml"], []),
        (["x.tif", "x.svs", "x.xml"], []),
        (["x.tif", "a/x.xml", "b/x.xml"], []),
        (["x.tif", "X.TIF", "outlines/X.xml"], []),
        (["b/x.tif", "b/x.svs", "b/x.xml"], ["a/x.tif", "a/x.xml"]),
    ],
)
def test_an_xml_that_may_be_of_two_slides_is_refused_and_all_are_named(tmp_path, names, beside):
    with pytest.raises(DataError) as caught:
        data.find_slides(touch(tmp_path, *names, *beside))
    assert all(str(tmp_path / name) in str(caught.value) for name in names)
    assert not any(str(tmp_path / name) in str(caught.value) for name in beside)


@pytest.mark.parametrize("name, normal", [("normal", 1), ("Normal_3", 1), ("normal-a", 1)])
@pytest.mark.parametrize("word", ["normalized_tumor_2", "abnormal_2", "normality"])
def test_normal_is_a_word_not_the_start_of_one(tmp_path, capsys, name, normal, word):
    """Stain-normalised copies of tumour slides were taken for normal ones, in silence."""
    touch(tmp_path, f"{name}.tif", f"{word}.tif", "t.tif", "t.xml")
    assert set(found(tmp_path)) == {f"{name}.tif", "t.tif"}
    assert f"{word}.tif" in capsys.readouterr().err


def test_xml_that_no_slide_takes_is_named_but_not_a_prediction(tmp_path, capsys):
    """The XML of slides that were renamed are outlines that nobody reads."""
    touch(tmp_path, "a.tif", "a.xml", "old/tumor_002.xml", "a_pred.xml")
    assert set(found(tmp_path)) == {"a.tif"}
    said = capsys.readouterr().err
    assert "XML are not read" in said and "(1):" in said
    assert "tumor_002.xml" in said and "pred" not in said


@pytest.mark.parametrize("xml", ["case.xml", "case.ome.xml"])
def test_ome_tif_is_one_extension_as_in_qupath(tmp_path, xml):
    touch(tmp_path, "case.ome.tif", xml)
    assert found(tmp_path) == {"case.ome.tif": (xml, "train")}


def test_names_are_compared_in_one_unicode_form(tmp_path):
    """macOS writes an accent as a letter of its own: the XML of Windows was not found."""
    touch(tmp_path, "caf\u00e9.tif", "x/cafe\u0301.xml")
    assert found(tmp_path)["caf\u00e9.tif"][0] == "x/cafe\u0301.xml"


def test_a_label_table_is_for_the_slides_below_its_folder(tmp_path, capsys):
    """Two hospitals number their slides alike: one's table made the other's slide normal."""
    touch(tmp_path, "a/s1.tif", "b/s1.tif", "b/s2.tif", "b/s2.xml")
    (tmp_path / "a/stages.csv").write_text("s1.tif,negative\n")
    assert set(found(tmp_path)) == {"a/s1.tif", "b/s2.tif"}
    assert "b/s1.tif" in capsys.readouterr().err


def test_no_slide_is_normal_where_a_table_says_tumour(tmp_path, capsys):
    touch(tmp_path, "normal_1.tif", "normal_2.tif", "t.tif", "t.xml")
    (tmp_path / "stages.csv").write_text("normal_1.tif,macro\nnormal_2.tif,negative\n")
    assert set(found(tmp_path)) == {"normal_2.tif", "t.tif"}
    assert "normal_1.tif" in capsys.readouterr().err
    for label, shapes in (("macro", []), ("negative", [("_0", "Polygon", SQUARE)])):
        write_xml(tmp_path / "t.xml", *shapes)
        (tmp_path / "stages.csv").write_text(f"t.tif,{label}\n")
        with pytest.raises(DataError, match="t.xml: disagrees with a label table"):
            data.find_slides(tmp_path)
    box = ("roi", "Polygon", SQUARE), ("_0", "Polygon", SQUARE)
    for shapes in (box, [("cancer region", "Polygon", SQUARE)]):  # a region hid that they disagree
        write_xml(tmp_path / "t.xml", *shapes)
        with pytest.raises(DataError, match="t.xml: disagrees with a label table"):
            data.find_slides(tmp_path)
    (tmp_path / "stages.csv").write_text("t.tif,macro\n")
    write_xml(tmp_path / "t.xml", box[0])  # its tumour is elsewhere
    assert "t.tif" in found(tmp_path)
    (tmp_path / "stages.csv").write_text("a/t.tif,macro\nb/t.tif,negative\n")
    with pytest.raises(DataError, match="stages.csv: b/t.tif is normal and not"):
        data.find_slides(tmp_path)
    (tmp_path / "deeper").mkdir()
    touch(tmp_path, "deeper/n.tif")
    (tmp_path / "stages.csv").write_text("n.tif,macro\n")
    (tmp_path / "deeper/reference.csv").write_text("n,Normal\n")
    with pytest.raises(DataError, match="n.tif: normal by one label table alone"):
        data.find_slides(tmp_path)


@pytest.mark.parametrize(
    "name, patient",
    [
        ("patient_017_node_2.tif", "patient_017"),
        ("TCGA-A2-A0D2-01Z-00-DX1.1234.svs", "tcga-a2-a0d2"),
        ("TCGA-A2-A0D2.svs", "tcga-a2-a0d2"),
        ("normal_TCGA-A2-A0D2-11A.svs", "tcga-a2-a0d2"),
        ("TCGA-A2-A0D2_1.tif", "tcga-a2-a0d2"),
        ("tumor_001.tif", "tumor_001"),
        ("xtcga-a2-a0d2.tif", "xtcga-a2-a0d2"),
        ("TCGA-A2-A0D22.tif", "tcga-a2-a0d22"),
    ],
)
def test_a_patient_is_known_by_camelyon17s_names_and_tcgas_barcodes(name, patient):
    assert data.patient(data.Source(name, Path(name), None, "")) == patient


@pytest.mark.parametrize("seed", range(6))
def test_an_xml_without_tumour_is_none_of_a_slide_with_tumour(tmp_path, seed):
    """Three slides with tumour, eight with an empty XML: half of the seeds had none to test on."""
    touch(tmp_path, *(f"t{n}.{s}" for n in range(3) for s in ("tif", "xml")))
    touch(tmp_path, *(f"n{n}.tif" for n in range(8)))
    for n in range(8):
        write_xml(tmp_path / f"n{n}.xml")
    test = [name[0] for name, (_, split) in found(tmp_path, seed).items() if split == "test"]
    assert sorted(test) == ["n", "t"]


def test_slides_of_other_formats_are_named(tmp_path, capsys):
    touch(tmp_path, "normal_1.tif", "normal_2.ndpi", "c/normal_3.mrxs")
    assert set(found(tmp_path)) == {"normal_1.tif"}
    assert "(2): c/normal_3.mrxs, normal_2.ndpi" in capsys.readouterr().err
    (tmp_path / "normal_1.tif").unlink()
    with pytest.raises(DataError, match="convert"):
        data.find_slides(tmp_path)


def test_slides_that_camelyon16_has_withdrawn_are_named(tmp_path, capsys):
    found(touch(tmp_path, "normal_086.tif", "test_049.tif", "test_049.xml", "t.tif", "t.xml"))
    assert "slides are withdrawn" in (said := capsys.readouterr().err) and "(2):" in said


def test_predictions_are_never_taken_for_annotations(tmp_path):
    """Training on its own answers: predict.py writes NAME_pred.xml beside NAME.tif."""
    touch(tmp_path, "x.tif", "x_pred.xml", "y.tif", "y.xml", "y_pred.xml", "x_likelihood_map.tif")
    assert found(tmp_path) == {"y.tif": ("y.xml", "train")}


def test_links_are_followed_and_no_folder_comes_twice(tmp_path):
    """`ln -s . latest` once made forty copies of each slide."""
    elsewhere = touch(tmp_path / "disk", "b.tif", "b.xml")
    root = touch(tmp_path / "data", "deep/a.tif", "deep/a.xml")
    (root / "latest").symlink_to(".")
    (root / "deep/up").symlink_to("..")
    (root / "again").symlink_to("deep")
    (root / "more").symlink_to(elsewhere)
    (root / "c.tif").symlink_to(elsewhere / "b.tif")
    (root / "c.xml").symlink_to(elsewhere / "b.xml")
    assert set(found(root)) == {"deep/a.tif", "more/b.tif", "c.tif"}


def test_a_folder_without_slides_and_a_missing_one_are_named(tmp_path):
    touch(tmp_path, "empty/x.xml", "empty/x_mask.tif", "empty/x.png")
    for folder in ("empty", "missing"):
        with pytest.raises(DataError, match=folder):
            data.find_slides(tmp_path / folder)


def test_slides_not_outlined_in_full_are_named(tmp_path, capsys):
    names = ("tumor_010", "tumor_011", "test_114")
    found(touch(tmp_path, *(f"{name}.{s}" for name in names for s in ("tif", "xml"))))
    said = capsys.readouterr().err
    assert "tumor_010.tif" in said and "test_114.tif" in said and "tumor_011" not in said


# ------------------------------------------------------------------------------------------- tiles


@pytest.fixture(scope="module")
def tiles(slides):
    return data.tile_slides(data.find_slides(slides), 64, 1.0)


def test_tiles_cover_the_grid_and_their_share_is_that_of_their_mask(tiles):
    assert len(tiles.table) > 100
    for row in range(0, len(tiles.table), 17):
        image, mask, label = tiles[row, 0]
        t = tiles.table[row]
        slide, annotation = tiles.slides[t["slide"]], tiles.annotations[t["slide"]]
        x, y = t["x"] // 2, t["y"] // 2
        assert t["x"] % 128 == t["y"] % 128 == 0 and t["level"] == 1
        assert np.array_equal(image, slide.read(1, x, y, 64, 64).transpose(2, 0, 1))
        assert np.array_equal(mask, annotation.mask(x, y, 64, 64, 2))
        share = mask.float().mean().item()
        assert share == pytest.approx(t["tumour"]) and label == t["label"]
        assert label == (1 if share > 0.05 else -1 if share > 0 else 0)


def test_flips_and_turns_move_image_and_mask_together(tiles):
    row = int(np.argmax((tiles.table["tumour"] > 0.2) & (tiles.table["tumour"] < 0.8)))
    image, mask, _ = tiles[row, 0]
    both = torch.cat([image, mask[None]])
    views = [torch.rot90(v, turns, (1, 2)) for v in (both, both.flip(2)) for turns in range(4)]
    seen = []
    for turn in range(8):
        image, mask, _ = tiles[row, turn]
        both = torch.cat([image, mask[None]])
        seen += [n for n, view in enumerate(views) if torch.equal(both, view)]
    assert sorted(seen) == list(range(8)) and seen[0] == 0


def painted(path, width, height, tissue):
    """A slide that is tissue in its first `tissue` columns, else glass -> Slide."""
    image = np.full((height, width, 3), 240, np.uint8)
    image[:, :tissue] = (160, 90, 150)
    synthetic.write_slide(path, image, [])
    return Slide(path.with_suffix(".tif"))


def test_tissue_is_the_share_of_coloured_pixels(tmp_path):
    share = data.tissue_share(painted(tmp_path / "a", 256, 192, 96), 0, 64)
    assert share == pytest.approx(np.tile([1, 0.5, 0, 0], (3, 1)), abs=0.1)
    share = data.tissue_share(painted(tmp_path / "b", 512, 512, 192), 1, 64)  # 1/2
    assert share == pytest.approx(np.tile([1, 0.5, 0, 0], (4, 1)), abs=0.1)


@pytest.mark.parametrize("colour", [(50, 75, 170), (200, 65, 80)])
def test_a_stroke_of_pen_or_a_lake_of_blood_does_not_take_the_pale_tissue_away(tmp_path, colour):
    """Otsu parted ink from all the rest: 27 of the 33 squares of a faded slide vanished."""
    image = np.full((512, 512, 3), 240, np.uint8)
    image[:, :256] = (205, 185, 203)  # chroma 20
    synthetic.write_slide(tmp_path / "plain", image, [])
    image[20:60, 270:500] = colour
    synthetic.write_slide(tmp_path / "marked", image, [])
    plain, marked = (
        data.tissue_share(Slide(tmp_path / f"{name}.tif"), 0, 64) for name in ("plain", "marked")
    )
    assert (plain[:, :4] > 0.9).all() and np.array_equal(marked[:, :4], plain[:, :4])
    assert not marked[4:, 4:].any()


def test_tinted_glass_is_not_tissue():
    """Coloured as pale tissue is, it made the tissue on it a few vivid pixels, to be left out."""
    histogram = [0] * 256
    histogram[13], histogram[15] = 700_000, 3_100_000  # glass
    histogram[16:70], histogram[70:77] = [20] * 54, [34_000] * 7  # tissue and its edges
    assert 15 <= data.tissue_threshold(histogram) < 70


def test_a_square_over_the_edge_counts_as_its_part_on_the_slide(tmp_path):
    """Tissue along the right and lower edges was dropped: glass was added where no slide is."""
    share = data.tissue_share(painted(tmp_path / "a", 576, 320, 544), 0, 256)
    assert share.shape == (2, 3)
    assert share == pytest.approx(np.tile([1, 1, 0.5], (2, 1)), abs=0.15)


def test_a_slide_smaller_than_a_tile_is_one_tile(tmp_path):
    painted(tmp_path / "a", 40, 24, 40)
    tiles = data.tile_slides([data.Source("a", tmp_path / "a.tif", None, "test")], 64, 0.5)
    assert tiles.table.tolist() == [(0, 0, 0, 0, False, 0.0, data.NORMAL, 1.0)]


def test_an_empty_slide_stays_empty_and_one_without_glass_whole(tmp_path):
    """Otsu alone splits whatever it gets in two: the noise of glass, or two kinds of tissue."""
    noise = np.random.default_rng(0).integers(0, 5, (256, 256, 3))
    for colour, wanted in ((240, 0), ((160, 90, 150), 1)):
        synthetic.write_slide(tmp_path / "a", (noise + colour).astype(np.uint8), [])
        share = data.tissue_share(Slide(tmp_path / "a.tif"), 0, 64)
        assert (share == wanted).all(), wanted


def test_outlines_off_the_slide_are_refused_or_warned_of(tmp_path, capsys):
    """An XML of another slide or level leaves tumour tiles that are called normal."""
    painted(tmp_path / "a", 256, 256, 256)
    source = data.Source("a.tif", tmp_path / "a.tif", tmp_path / "a.xml", "train")
    on, off = (("_0", "Polygon", SQUARE + shift) for shift in (100, 1000))
    beside = ("_0", "Polygon", SQUARE - (0, 50))
    write_xml(tmp_path / "a.xml", off, beside)
    with pytest.raises(DataError, match="a.xml.*2 Polygon off the slide"):
        data.tile_slides([source], 64, 0.5)
    assert not capsys.readouterr().err
    write_xml(tmp_path / "a.xml", on, off)
    tiles = data.tile_slides([source], 64, 0.5)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "a.xml" in said and "1 Polygon off the slide" in said
    assert tiles.table["tumour"].sum() * 64 * 64 == 20 * 20  # of the one that is on it


# ------------------------------------------------------------------------------------------ labels


@pytest.mark.parametrize("unit", ["tile", "slide"])
def test_fractions_are_nested_and_keep_a_tile_of_each_class(tiles, unit):
    """A subset drawn anew for each ratio leaves 10 % that is not inside 20 %."""
    label, train, before = tiles.table["label"], tiles.table["train"], [set(), set()]
    for fraction in (0, 0.01, 0.1, 0.25, 0.5, 0.75, 1):
        pool, masks, images = data.choose_labels(tiles, fraction, fraction, unit, seed=3)
        assert train[pool].all() and {*masks, *images} <= {*pool}
        assert {0, 1} <= set(label[masks].tolist())
        assert set(label[images].tolist()) == ({0, 1} if fraction else set())
        assert before[0] <= {*masks} and before[1] <= {*images}
        if unit == "tile" and fraction:
            assert abs(len(masks) - fraction * len(pool)) <= 2
        if unit == "slide":  # whole slides, but for the one tile of each class
            of, used = tiles.table["slide"][pool], np.isin(pool, masks)
            shares = [used[of == n].mean() for n in np.unique(of)]
            assert sum(0 < share < 1 for share in shares) <= 2
        before = [{*masks}, {*images}]
    assert before == [{*pool}, {*pool[label[pool] != data.AMBIGUOUS]}]
    cancer, normal = ((train & (label == kind)).sum() for kind in (data.CANCER, data.NORMAL))
    assert (label[pool] == data.CANCER).sum() == cancer
    assert (label[pool] == data.NORMAL).sum() == min(cancer, normal)


def test_another_seed_labels_other_tiles(tiles):
    chosen = [data.choose_labels(tiles, 0.1, 1, seed=seed)[1].tolist() for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]


@pytest.mark.parametrize(
    "label, split", [(data.CANCER, True), (data.NORMAL, True), (data.CANCER, False)]
)
def test_a_missing_class_is_refused(tiles, label, split):
    table = tiles.table[(tiles.table["label"] != label) | (tiles.table["train"] != split)]
    less = data.Tiles(tiles.sources, tiles.slides, tiles.annotations, 64, table)
    with pytest.raises(DataError, match="cancer|normal"):
        data.choose_labels(less, 1, 1)


@pytest.mark.parametrize("seed", range(3))
def test_a_normal_mask_is_used_however_many_normal_labels_there_are(tiles, seed):
    """Drawn from all normal tiles, none had a mask, and training refused masks of one class."""
    train, label = tiles.table["train"], tiles.table["label"]
    surplus = np.flatnonzero(train & (label != data.NORMAL))[1:]  # one cancer tile is left
    table = np.delete(tiles.table, surplus)
    train, label = table["train"], table["label"]
    cancer, normal = (np.flatnonzero(train & (label == kind)) for kind in (1, 0))
    table["known"][normal[1:]] = 0
    few = data.Tiles(tiles.sources, tiles.slides, tiles.annotations, 64, table)
    pool, masks, _ = data.choose_labels(few, 1, 1, seed=seed)
    assert pool.tolist() == masks.tolist() == sorted([*cancer, normal[0]])


def test_tiles_csv_says_what_was_used(tiles, tmp_path):
    pool, masks, labels = data.choose_labels(tiles, 0.3, 0.6)
    data.write_tiles(tmp_path / "tiles.csv", tiles, masks, labels)
    with open(tmp_path / "tiles.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:4] == ["slide", "x", "y", "level"] and len(rows) == len(tiles.table)
    for name, used in (("mask_used", masks), ("label_used", labels)):
        assert [n for n, row in enumerate(rows) if row[name] in ("1", "True")] == used.tolist()
    for row, tile in zip(rows, tiles.table, strict=True):
        assert row["slide"] == tiles.sources[tile["slide"]].name
        assert (int(row["x"]), int(row["y"])) == (tile["x"], tile["y"])
        assert float(row["tumour"]) == tile["tumour"] and int(row["label"]) == tile["label"]


# ----------------------------------------------------------------------------------------- batches


def test_batches_are_endless_and_each_pass_is_a_permutation():
    rows = np.arange(100, 107)
    batches = list(data.batches(rows, 2, (5, 11), 0, 14))
    assert [len(batch) for batch in batches] == [2] * 14
    keys = [row for batch in batches for row, _ in batch]
    passes = [keys[n : n + 7] for n in range(0, 28, 7)]
    assert all(sorted(one) == rows.tolist() for one in passes) and passes[0] != passes[1]
    assert {turn for batch in data.batches(rows, 8, (5, 11), 0, 14) for _, turn in batch} == set(
        range(8)
    )
    (large,) = data.batches(rows, 20, (5, 11), 0, 1)  # more than there are
    assert sorted(row for row, _ in large[:7]) == rows.tolist() and len(large) == 20


def test_batches_that_go_on_are_those_of_an_uninterrupted_run():
    whole = list(data.batches(np.arange(7), 3, (5, 11), 0, 14))
    for stop in (1, 5, 13):
        halves = [*data.batches(np.arange(7), 3, (5, 11), 0, stop)]
        assert halves + [*data.batches(np.arange(7), 3, (5, 11), stop, 14)] == whole
    assert list(data.batches(np.arange(7), 3, (6, 11), 0, 14)) != whole


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_give_the_same_tiles_as_none(tiles, method):
    """A TiffFile opened before the fork gives wrong tiles; a dataset's own RNG, equal ones."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(method, force=True)
    batches = list(data.batches(np.arange(40), 8, (0, 1), 0, 6))
    try:
        workers = {"fork": 2, "spawn": 1}[method]  # to spawn one takes seconds
        one, two = (
            list(data.load_batches(tiles, batches, torch.device("cpu"), n)) for n in (0, workers)
        )
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert len(one) == 6
    for batch, same in zip(one, two, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, same, strict=True))
    assert one[0][0].dtype == torch.uint8 and not torch.equal(one[0][0], one[5][0])


def test_ctrl_c_while_workers_start_is_for_the_process_that_they_work_for(tiles):
    """A forked worker had that one's handler for a moment, and said a second time how to go on."""

    class Start:
        pass

    start = Start()
    util.register_after_fork(start, lambda _: signal.raise_signal(signal.SIGINT))
    batches = list(data.batches(np.arange(8), 4, (0, 1), 0, 2))
    assert len(list(data.load_batches(tiles, batches, torch.device("cpu"), 2))) == 2


def test_ctrl_c_works_again_where_workers_cannot_start(tiles, monkeypatch):
    """SIGINT stayed blocked: a job that went on could not be interrupted."""

    def fails(_):
        raise OSError("no more processes")

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", fails)
    with pytest.raises(OSError, match="no more"):
        next(data.load_batches(tiles, [[(0, 0)]], torch.device("cpu"), 2))
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


class Unsendable(torch.utils.data.Dataset):
    """As the index of 270 slides of CAMELYON, but that is 476 MB, not impossible."""

    def __getitem__(self, key):
        return torch.zeros(1)

    def __getstate__(self):
        raise AssertionError("sent to a worker")


def test_workers_share_the_index_where_python_would_send_it(monkeypatch):
    """Python 3.14 starts them by forkserver on Linux."""
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: "forkserver")
    assert len(list(data.load_batches(Unsendable(), [[0]], torch.device("cpu"), 1))) == 1


class Late(torch.utils.data.Dataset):
    """Its workers find that the process that they work for has ended, as threads of theirs do."""

    def __getitem__(self, key):
        sys.excepthook(ConnectionResetError, ConnectionResetError("reset by peer"), None)
        return torch.zeros(1)


def test_a_worker_says_nothing_when_its_job_has_ended(capfd):
    """3 of 40 interruptions left a traceback beside the line that says how to go on."""
    assert len(list(data.load_batches(Late(), [[(0, 0)]], torch.device("cpu"), 1))) == 1
    assert capfd.readouterr().err == ""


def test_a_worker_that_dies_for_lack_of_shared_memory_is_one_line(tiles, monkeypatch):
    """Docker gives 64 MB of /dev/shm: torch's own words name neither cause nor cure."""
    said = "DataLoader worker (pid 1) is killed by signal: Bus error. It is possible that "
    said += "dataloader's workers are out of shared memory. Please try to raise your limit."

    def dies(_):
        raise RuntimeError(said)

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", dies)
    with pytest.raises(DataError, match="--workers 0"):
        next(data.load_batches(tiles, [[(0, 0)]], torch.device("cpu"), 2))
    said = "a fault of another kind"  # is not explained away
    with pytest.raises(RuntimeError, match="another kind"):
        next(data.load_batches(tiles, [[(0, 0)]], torch.device("cpu"), 2))


def test_bad_input_says_what_it_is_once_however_it_came(tmp_path):
    """A worker's comes as the text of a traceback, with the name of the class before it."""
    error = DataError("Caught DataError in worker 1.\n  File x\nslide.DataError: error: a.tif: bad")
    assert str(error) == "error: a.tif: bad" and error.code == str(error)
    assert isinstance(error, SystemExit) and isinstance(error, Exception)


def test_slides_are_never_drawn_over_a_folder_that_exists(tmp_path):
    (tmp_path / "mine.tif").touch()
    with pytest.raises(DataError, match="exists"):
        synthetic.make(tmp_path)
    assert (tmp_path / "mine.tif").exists()


def test_slides_are_drawn_in_other_processes_and_the_same_each_time(tmp_path):
    """All other tests draw theirs in threads, where what cannot be sent to a process works too."""
    pairs = [synthetic.make(tmp_path / name, train=1, test=1, side=256) for name in "ab"]
    one, two = ([p for p in sorted(folder.rglob("*")) if p.is_file()] for folder in pairs)
    assert [p.relative_to(pairs[0]).as_posix() for p in one if p.suffix == ".tif"] == [
        "test/synthetic_001.tif",
        "train/synthetic_000.tif",
    ]
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}
