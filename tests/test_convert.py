"""QuPath's GeoJSON, written and read."""

import json

import numpy as np
import pytest
from jobs import call, ok, one_line_of
from test_outline import MASKS

from extras import geojson, outline
from slide import read_annotation


def box(x, y, w, h):
    return [[x, y], [x + w, y], [x + w, y + h], [x, y + h], [x, y]]


def feature(rings, name="Tumor", kind="Polygon"):
    """A feature as QuPath 0.5 exports it."""
    properties = {"objectType": "annotation", "isLocked": False}
    properties["classification"] = {"name": name, "color": [200, 0, 0]}
    geometry = {"type": kind, "coordinates": rings}
    return {"type": "Feature", "id": "a", "geometry": geometry, "properties": properties}


def converted(tmp_path, content, *flags):
    """GeoJSON to XML as a user does it -> the annotation that training reads."""
    path = tmp_path / "slide.geojson"
    path.write_text(json.dumps(content))
    ok(geojson.main, path, *flags)
    return read_annotation(tmp_path / "slide.xml")


@pytest.mark.parametrize("downsample", [1, 4])
def test_mask_to_geojson_to_xml_to_mask_is_the_identity(tmp_path, downsample):
    """As written, and every other time in one MultiPolygon of rings of any direction."""
    rng = np.random.default_rng(0)
    for n, mask in enumerate(MASKS):
        rings = outline.trace([mask])
        geojson.write(tmp_path / "a.geojson", rings, downsample)
        content = json.loads((tmp_path / "a.geojson").read_text())
        assert len(content["features"]) == sum(not ring.is_hole for ring in rings)
        if n % 2 == 0:  # so is the last one, with a lesion in the hole of another
            parts = [f["geometry"]["coordinates"] for f in content["features"]]
            parts = [[ring[:: rng.choice([-1, 1])] for ring in part] for part in parts]
            content = feature(parts, kind="MultiPolygon")
        annotation = converted(tmp_path, content, "--overwrite")
        found = annotation.mask(0, 0, *mask.shape[::-1], downsample)
        assert np.array_equal(found, mask)
        level_0 = np.kron(mask, np.ones((downsample, downsample)))
        assert np.array_equal(annotation.mask(0, 0, *level_0.shape[::-1]), level_0)


def test_what_is_written_is_what_qupath_reads(tmp_path):
    mask = np.pad(np.pad(np.ones((1, 2), bool), 1), 1, constant_values=True)
    geojson.write(tmp_path / "a.geojson", outline.trace([mask]), 4)
    content = json.loads((tmp_path / "a.geojson").read_text())
    assert "as predicted" in call(geojson.main, tmp_path / "a.geojson")[2]
    assert content["type"] == "FeatureCollection"
    around, island = content["features"]
    for one in around, island:
        assert one["type"] == "Feature" and one["properties"]["objectType"] == "annotation"
        assert one["properties"]["classification"] == {"name": "Tumor"}
        assert one["geometry"]["type"] == "Polygon"
    assert around["geometry"]["coordinates"] == [box(0, 0, 24, 20), box(4, 4, 16, 12)]
    assert island["geometry"]["coordinates"] == [box(8, 8, 8, 4)]


@pytest.mark.parametrize("x, pixel", [(0, 0), (0.4, 0), (0.6, 1), (1, 1)])
def test_pixel_0_0_spans_0_to_1_in_qupath_so_its_centre_is_at_a_half(tmp_path, x, pixel):
    mask = converted(tmp_path, feature([box(x, x, 1, 1)])).mask(0, 0, 4, 4)
    assert mask[pixel, pixel] == 1 and mask.sum() == 1


@pytest.mark.parametrize("form", [lambda f: {"type": "FeatureCollection", "features": f}, list])
def test_collections_lists_and_classes_of_any_spelling_are_read(tmp_path, form):
    names = "Tumor", "TUMOUR", "Metastasis", "metastases", "Tumor: Positive"
    features = [feature([box(10 * n, 0, 5, 5)], name) for n, name in enumerate(names)]
    mask = converted(tmp_path, form(features)).mask(0, 0, 60, 10)
    assert [mask[2, 10 * n + 2] for n in range(6)] == [1] * 5 + [0] and mask.sum() == 125


@pytest.mark.parametrize("name", ["Ignore*", "ignore", "Normal", "Exclusion"])
def test_what_is_to_be_ignored_is_cut_out_whatever_the_order_but_for_its_holes(tmp_path, name):
    cut = feature([box(5, 5, 10, 10), box(8, 8, 2, 2)[::-1]], name)
    found = converted(tmp_path, [cut, feature([box(0, 0, 20, 20)])])
    assert [len(found.shapes[kind]) for kind in ("tumour", "exclusion")] == [1, 1]
    mask = found.mask(0, 0, 20, 20)
    assert mask.sum() == 400 - 100 + 4 and mask[9, 9] == 1 and mask[6, 6] == 0


def without_class():
    one = feature([box(0, 0, 9, 9)])
    del one["properties"]["classification"]
    return one


@pytest.mark.parametrize(
    "bad, said",
    [
        (feature([box(0, 0, 9, 9)], "Stroma"), "Stroma"),
        (without_class(), "None"),
        (feature([box(0, 0, 9, 9)], "Normal tissue"), "Normal tissue"),
        (feature([1, 2], kind="Point"), "Point"),
        (feature([[[0, 0], [9, 9], [0, 0]]]), "without area"),
        (feature([[[0, 0], [9, float("nan")], [0, 9], [0, 0]]]), "finite"),
        ({"a": 1}, "properties"),
    ],
)
def test_a_file_with_anything_else_is_refused_by_name_and_leaves_no_xml(tmp_path, bad, said):
    """A class that was skipped in silence would be normal tissue to training."""
    path = tmp_path / "slide.geojson"
    path.write_text(json.dumps([feature([box(0, 0, 5, 5)]), bad]))
    line = one_line_of(*call(geojson.main, path))
    assert said in line and str(path) in line
    assert not path.with_suffix(".xml").exists()


@pytest.mark.parametrize("text", ['{"type": "Feat', "3", None])
def test_broken_and_missing_files_are_refused_by_name(tmp_path, text):
    path = tmp_path / "slide.geojson"
    if text:
        path.write_text(text)
    assert str(path) in one_line_of(*call(geojson.main, path))


def test_an_annotation_that_is_there_is_replaced_on_demand_alone(tmp_path):
    """It may be hours of a pathologist's work."""
    xml = tmp_path / "slide.xml"
    xml.write_text("drawn by hand")
    (tmp_path / "slide.geojson").write_text(json.dumps(feature([box(0, 0, 5, 5)])))
    line = one_line_of(*call(geojson.main, tmp_path / "slide.geojson"))
    assert "slide.xml" in line and "--overwrite" in line and xml.read_text() == "drawn by hand"
    out = ok(geojson.main, tmp_path / "slide.geojson", "--overwrite")
    assert "slide.xml: 1 polygons, 1 of them tumour" in out
    assert read_annotation(xml).mask(0, 0, 9, 9).sum() == 25
