"""Annotations of QuPath and ImageScope, read as their programs write them; GeoJSON for QuPath."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from jobs import call, ok, one_line_of
from test_outline import MASKS

from extras import convert, outline
from slide import Annotation, read_annotation, winding

HERE = Path(__file__).parent


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
    ok(convert.main, path, *flags)
    return read_annotation(tmp_path / "slide.xml")


@pytest.mark.parametrize("downsample", [1, 4])
def test_mask_to_geojson_to_xml_to_mask_is_the_identity(tmp_path, downsample):
    """As written, and every other time in one MultiPolygon of rings of any direction."""
    rng = np.random.default_rng(0)
    for n, mask in enumerate(MASKS):
        rings = outline.trace([mask])
        convert.write(tmp_path / "a.geojson", rings, downsample)
        content = json.loads((tmp_path / "a.geojson").read_text())
        assert len(content["features"]) == sum(not ring.is_hole for ring in rings)
        if n % 2 == 0:  # so is the last one, with a lesion in the hole of another
            parts = [f["geometry"]["coordinates"] for f in content["features"]]
            parts = [[ring[:: rng.choice([-1, 1])] for ring in part] for part in parts]
            content = feature(parts, kind="MultiPolygon")
        annotation = converted(tmp_path, content, "--overwrite")
        again = annotation.mask(0, 0, *mask.shape[::-1], downsample)
        assert np.array_equal(again, mask)
        level_0 = np.kron(mask, np.ones((downsample, downsample)))
        assert np.array_equal(annotation.mask(0, 0, *level_0.shape[::-1]), level_0)


def test_what_is_written_has_the_colour_without_which_qupath_reads_nothing(tmp_path):
    """QuPath 0.4 to 0.7 refused the whole file: "Unable to parse PathClass"."""
    mask = np.pad(np.pad(np.ones((1, 2), bool), 1), 1, constant_values=True)
    convert.write(tmp_path / "a.geojson", outline.trace([mask]), 4)
    content = json.loads((tmp_path / "a.geojson").read_text())
    assert "as predicted" in call(convert.main, tmp_path / "a.geojson")[2]
    assert content["type"] == "FeatureCollection"
    around, island = content["features"]
    for one in around, island:
        assert one["type"] == "Feature" and one["properties"]["objectType"] == "annotation"
        assert one["properties"]["classification"] == {"name": "Tumor", "color": [200, 0, 0]}
        assert one["geometry"]["type"] == "Polygon"
    assert around["geometry"]["coordinates"] == [box(0, 0, 24, 20), box(4, 4, 16, 12)]
    assert island["geometry"]["coordinates"] == [box(8, 8, 8, 4)]


def test_what_qupath_exports_is_read(tmp_path):
    """tests/data/qupath.geojson is of QuPath 0.7 itself: all that it writes, in its own order."""
    out = ok(convert.main, HERE / "data/qupath.geojson", "--out", tmp_path)
    assert "3 tumour, 1 exclusion, 1 roi, 1 cancer region" in out
    annotation = read_annotation(tmp_path / "qupath.xml")
    mask = np.full((120, 100), -1)
    mask[:90] = 0
    mask[10:70, 10:70] = 1
    mask[20:60, 20:60] = 0
    mask[30:50, 30:50] = 1
    mask[35:40, 35:40] = 0
    assert np.array_equal(annotation.mask(0, 0, 80, 120), mask[:, :80])
    derived = annotation.mask(80, 0, 20, 90)  # Tumor: Positive, with slopes
    assert abs((derived == 1).sum() - 178.125) < 5
    assert annotation.inside("cancer region", 0, 0, 100, 120).sum() == 2000


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


@pytest.mark.parametrize(
    "classification",
    [
        {"names": ["Tumor", "Positive"], "color": [200, 0, 0]},  # since 0.4
        {"name": "Positive", "colorRGB": -1, "parentClass": {"name": "Tumor", "colorRGB": -2}},
        {"name": "Tumor: Positive", "colorRGB": -1},
        "Tumor",  # GeoPandas
    ],
)
@pytest.mark.parametrize(
    "about, ident",
    [
        ({"objectType": "annotation"}, "0ed77a45-b858-402a-ab0d-ef762224225e"),
        ({"object_type": "annotation"}, None),
        ({}, "PathAnnotationObject"),
        ({}, 7),
    ],
)
def test_classes_and_objects_are_read_as_every_version_writes_them(
    tmp_path, classification, about, ident
):
    one = feature([box(10, 10, 30, 30)]) | {"id": ident}
    one["properties"] = about | {"classification": classification}
    assert converted(tmp_path, one).mask(0, 0, 50, 50).sum() == 900


def test_objects_inside_objects_are_read_at_any_depth(tmp_path):
    """They were left out in silence, so an ignored area was tumour."""
    outer, cut = feature([box(10, 10, 60, 60)]), feature([box(30, 30, 20, 20)], "Ignore*")
    deep = feature([box(80, 80, 10, 10)])
    cut["properties"]["childObjects"] = [deep]
    outer["properties"]["childObjects"] = [cut]
    assert converted(tmp_path, outer).mask(0, 0, 100, 100).sum() == 3600 - 400 + 100


@pytest.mark.parametrize("name", ["Region*", "Region", "region", "ROI", "roi*"])
def test_a_region_says_where_all_tumour_is_outlined(tmp_path, name):
    features = [feature([box(0, 0, 20, 20)], name), feature([box(5, 5, 10, 10)])]
    mask = converted(tmp_path, features).mask(0, 0, 30, 20)
    assert [(mask == value).sum() for value in (1, 0, -1)] == [100, 300, 200]


@pytest.mark.parametrize(
    "name", ["Cancer region", "cancer region*", "Normal region", "NORMAL REGION"]
)
def test_a_region_with_a_label_alone_keeps_its_label(tmp_path, name):
    (kind,) = converted(tmp_path, feature([box(0, 0, 20, 20)], name)).rings
    assert kind == name.lower().strip("*")


@pytest.mark.parametrize(
    "features, warned",
    [
        ([], True),
        ([feature([box(0, 0, 9, 9)], "Ignore*")], True),
        ([feature([box(0, 0, 9, 9)], "Region*")], False),
        ([feature([box(0, 0, 9, 9)], "Normal region")], False),
        ([feature([box(0, 0, 9, 9)])], False),
    ],
)
def test_an_export_without_tumour_is_warned_of_as_it_makes_a_normal_slide(
    tmp_path, features, warned
):
    (tmp_path / "a.geojson").write_text(json.dumps(features))
    status, _, err = call(convert.main, tmp_path / "a.geojson")
    assert status == 0 and ("no tumour" in err) == warned


@pytest.mark.parametrize("name", ["Ignore*", "ignore", "Normal", "Exclusion"])
def test_what_is_to_be_ignored_is_cut_out_whatever_the_order_but_for_its_holes(tmp_path, name):
    cut = feature([box(5, 5, 10, 10), box(8, 8, 2, 2)[::-1]], name)
    annotation = converted(tmp_path, [cut, feature([box(0, 0, 20, 20)])])
    assert [len(annotation.rings[kind]) for kind in ("tumour", "exclusion")] == [1, 1]
    mask = annotation.mask(0, 0, 20, 20)
    assert mask.sum() == 400 - 100 + 4 and mask[9, 9] == 1 and mask[6, 6] == 0


def without_class():
    one = feature([box(0, 0, 9, 9)])
    del one["properties"]["classification"]
    return one


def with_type(**types):
    one = feature([box(0, 0, 9, 9)])
    one["properties"] = types | {"classification": {"name": "Tumor", "color": [200, 0, 0]}}
    return one


def on_plane(z, t):
    one = feature([box(0, 0, 9, 9)])
    one["geometry"]["plane"] = {"c": -1, "z": z, "t": t}
    return one


@pytest.mark.parametrize("empty", [[], [[[0, 0]] * 5], [[[0, 0], [9, 9], [0, 0]]]])
def test_an_object_of_which_all_was_taken_away_is_skipped_by_name(tmp_path, empty):
    """QuPath keeps it, as a polygon of one place; it refused the whole file."""
    path, hole = tmp_path / "slide.geojson", box(1, 1, 3, 3)
    path.write_text(json.dumps([feature(empty), feature([box(0, 0, 9, 9), *empty, hole])]))
    status, _, err = call(convert.main, path)
    assert status == 0 and f"{path}: skipped polygons without area, of class (1): Tumor" in err
    mask = read_annotation(path.with_suffix(".xml")).mask(0, 0, 9, 9)
    assert mask.sum() == 81 - 9


def test_an_out_that_is_a_file_is_said_in_a_line(tmp_path):
    path = tmp_path / "slide.geojson"
    path.write_text(json.dumps(feature([box(0, 0, 9, 9)])))
    line = one_line_of(*call(convert.main, path, "--out", path))
    assert "is a file; give --out FOLDER" in line


def test_coordinates_that_training_would_refuse_are_refused_here(tmp_path):
    """With a hole 30,000,000 px took 5 GB."""
    path = tmp_path / "slide.geojson"
    path.write_text(json.dumps(feature([box(0, 0, 1e9, 1e9), box(5, 5, 9, 9)])))
    assert "finite" in one_line_of(*call(convert.main, path))


def test_a_figure_of_8_with_equal_halves_has_an_area(tmp_path):
    path, ring = tmp_path / "slide.geojson", [[10, 10], [90, 90], [90, 10], [10, 90], [10, 10]]
    path.write_text(json.dumps(feature([ring])))
    ok(convert.main, path)
    mask = read_annotation(path.with_suffix(".xml")).mask(0, 0, 99, 99)
    assert abs(mask.sum() - 3200) < 90  # of the diagonals one is inside


@pytest.mark.parametrize(
    "bad, reason",
    [
        (feature([box(0, 0, 9, 9)], "Stroma"), "Stroma"),
        (without_class(), "None"),
        (feature([box(0, 0, 9, 9)], "Normal tissue"), "Normal tissue"),
        (feature([1, 2], kind="Point"), "Point"),
        (with_type(objectType="detection"), "detection"),
        (with_type(objectType="cell"), "cell"),
        (with_type(object_type="tile"), "tile"),
        (with_type(objectType="tmaCore"), "tmaCore"),
        (with_type() | {"id": "PathDetectionObject"}, "detection"),
        (with_type() | {"id": "TMACoreObject"}, "tmacore"),
        (on_plane(z=1, t=0), "z 1"),
        (on_plane(z=0, t=2), "t 2"),
        (feature([box(0, 0, 9, 9)]) | {"geometry": None}, "None"),
        (feature([[[0, 0], [9, float("nan")], [0, 9], [0, 0]]]), "finite"),
        ({"a": 1}, "properties"),
    ],
)
def test_a_file_with_anything_else_is_refused_by_name_and_leaves_no_xml(tmp_path, bad, reason):
    """A class that was skipped in silence would be normal tissue to training."""
    path = tmp_path / "slide.geojson"
    path.write_text(json.dumps([feature([box(0, 0, 5, 5)]), bad]))
    line = one_line_of(*call(convert.main, path))
    assert reason in line and str(path) in line
    assert not path.with_suffix(".xml").exists()


@pytest.mark.parametrize("text", ['{"type": "Feat', "3", None])
def test_broken_and_missing_files_are_refused_by_name(tmp_path, text):
    path = tmp_path / "slide.geojson"
    if text:
        path.write_text(text)
    assert str(path) in one_line_of(*call(convert.main, path))


def test_an_annotation_that_is_there_is_replaced_on_demand_alone(tmp_path):
    """It may be hours of a pathologist's work."""
    xml = tmp_path / "slide.xml"
    xml.write_text("drawn by hand")
    (tmp_path / "slide.geojson").write_text(json.dumps(feature([box(0, 0, 5, 5)])))
    line = one_line_of(*call(convert.main, tmp_path / "slide.geojson"))
    assert "slide.xml" in line and "--overwrite" in line and xml.read_text() == "drawn by hand"
    out = ok(convert.main, tmp_path / "slide.geojson", "--overwrite")
    assert "slide.xml: 1 tumour" in out
    assert read_annotation(xml).mask(0, 0, 9, 9).sum() == 25


FIGURE_8 = [[10, 10], [40, 10], [40, 40], [40, 80], [80, 80], [80, 40], [40, 40], [10, 40]]


@pytest.mark.parametrize(
    "rings, pixels",
    [
        ([box(10, 10, 40, 40), box(40, 20, 20, 10)], 1500),  # over its edge
        ([box(10, 10, 30, 30), box(60, 60, 20, 20)], 900),  # beside it
        ([box(10, 10, 60, 60), box(20, 20, 20, 20), box(30, 30, 20, 20)], 2900),  # overlapping
        ([box(10, 10, 60, 60), box(20, 20, 20, 20), box(20, 20, 20, 20)], 3200),  # twice
        ([box(10, 10, 60, 60), box(20, 20, 40, 40), box(30, 30, 10, 10)], 2000),  # in a hole
        ([FIGURE_8, box(15, 15, 10, 10)], 2400),  # in the reversed lobe
        ([box(10, 10, 60, 60), box(20, 20, 20, 20), box(40, 20, 20, 20)], 2800),  # side by side
    ],
)
def test_a_hole_takes_away_exactly_its_own_area(tmp_path, rings, pixels):
    """A ring of winding -1 for each hole filled what was twice a hole, or no tumour."""
    assert converted(tmp_path, feature(rings)).mask(0, 0, 100, 100).sum() == pixels


def test_any_holes_in_any_outline_are_cut_out_of_it():
    """Random rings, most of which cross themselves and each other, against the rule itself."""
    rng, valid = np.random.default_rng(0), 0
    for n in range(300):
        sizes = rng.integers(3, 7, rng.integers(2, 5))
        rings = [rng.random((size, 2)) * 40 for size in sizes]
        if n % 2:  # small holes in a large outline are often right
            rings = [
                np.array(box(0, 0, 40, 40)[:-1], float),
                *(r / 6 + 20 * rng.random(2) for r in rings),
            ]
        rings = [convert.ring_of(ring) for ring in rings]
        valid += outline.is_valid(rings[0], rings[1:])
        mask = winding(rings[0], 40, 40) != 0
        for hole in rings[1:]:
            mask &= winding(hole, 40, 40) == 0
        shapes = outline.cut_holes([("tumour", rings)])
        assert np.array_equal(Annotation(shapes).mask(0, 0, 40, 40), mask)
    assert 20 < valid < 200


def test_holes_that_cannot_be_cut_out_alone_are_refused(tmp_path):
    """As exclusions they would clear the lesion inside; a region has no exclusions."""
    rings, path = (
        [box(10, 10, 60, 60), box(20, 20, 40, 40), box(20, 20, 40, 40)],
        tmp_path / "a.json",
    )
    for features in ([feature(rings), feature([box(30, 30, 5, 5)])], [feature(rings, "Region*")]):
        path.write_text(json.dumps(features))
        assert "a hole in" in one_line_of(*call(convert.main, path))
    far = [feature(rings), feature([box(80, 80, 5, 5)])]
    assert converted(tmp_path, far).mask(0, 0, 100, 100).sum() == 3600 - 1600 + 25


def test_thousands_of_holes_take_seconds(tmp_path):
    """They took time with the square of their number: 20 minutes for 50,000."""
    side = 64
    holes = [
        [[20 * (n % side) + x, 20 * (n // side) + y] for x, y in box(5, 5, 10, 10)[::-1]]
        for n in np.random.default_rng(0).permutation(side * side).tolist()
    ]
    start = time.process_time()
    annotation = converted(tmp_path, feature([box(0, 0, 20 * side, 20 * side), *holes]))
    assert time.process_time() - start < 5
    assert annotation.mask(0, 0, 20 * side, 20 * side).sum() == 300 * side * side
    # Every row of a mask meets every edge that crosses it: of the way from hole to hole, two.
    (xy,) = annotation.rings["tumour"]
    heights = np.abs(np.diff(xy[:, 1], append=xy[0, 1])).sum()
    assert heights < 2 * 20 * side * 2 + 2 * 10 * len(holes)


def region(points, kind=0, negative=0, number=1):
    vertices = "".join(f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in points)
    about = f'Id="{number}" Type="{kind}" Zoom="0.5" NegativeROA="{negative}" Text=""'
    return f"<Region {about}><Attributes/><Vertices>{vertices}</Vertices></Region>"


def imagescope(path, *layers):
    """[(Id, Name, regions)] -> an XML as ImageScope 12 saves it."""
    text = '<Annotations MicronsPerPixel="0.252">'
    for number, name, regions in layers:
        text += f'<Annotation Id="{number}" Name="{name}" Type="4" LineColor="65280">'
        text += '<Regions><RegionAttributeHeaders><AttributeHeader Id="9999" Name="Region"/>'
        text += f"</RegionAttributeHeaders>{''.join(regions)}</Regions><Plots/></Annotation>"
    path.write_text(text + "</Annotations>")
    return path


SQUARE = region(box(10, 10, 20, 20)[:-1])


def scoped(tmp_path, *layers, flags=()):
    """ImageScope's XML to ASAP's as a user does it -> the annotation that training reads."""
    path = imagescope(tmp_path / "slide.xml", *layers)
    ok(convert.main, path, "--out", tmp_path / "new", "--overwrite", *flags)
    return read_annotation(tmp_path / "new/slide.xml")


def test_layers_of_imagescope_are_classes_by_name_or_by_flag(tmp_path):
    near = region(box(0, 0, 40, 40)[:-1])
    by_name = scoped(tmp_path, (1, "Tumor", [SQUARE]), (2, "Region", [near]), (3, "", []))
    flags = "--layer", "1=tumor", "--layer", "my layer=ROI"
    by_flag = scoped(tmp_path, (1, "", [SQUARE]), (2, "my layer", [near]), flags=flags)
    for annotation in by_name, by_flag:
        mask = annotation.mask(0, 0, 50, 50)
        assert [(mask == value).sum() for value in (1, 0, -1)] == [400, 1200, 900]


def test_shapes_of_imagescope_are_areas_by_their_type(tmp_path):
    """Rectangles have four vertices, ellipses two; pixel (0, 0) spans 0 to 1."""
    shapes = [
        region([(0, 0), (9, 0), (9, 3), (0, 3)], 1),
        region([(0, 10), (9, 16)], 1),
        region([(100, 100), (300, 200)], 2),
        region([(20, 0), (29, 0), (29, 4), (20, 4)], 0),
    ]
    mask = scoped(tmp_path, (1, "Tumor", shapes)).mask(0, 0, 400, 300)
    assert mask[:3, :9].all() and mask[10:16, :9].all() and mask[:4, 20:29].all()
    assert mask[:50].sum() == 27 + 54 + 36
    y, x = np.indices(mask.shape) + 0.5
    circle = ((x - 200) / 100) ** 2 + ((y - 150) / 50) ** 2 < 1
    assert (mask[50:] != circle[50:]).sum() < 20 and abs(circle.sum() - 5000 * np.pi) < 20


def test_a_negative_region_is_cut_out_of_tumour_and_of_nothing_else(tmp_path):
    cut = region(box(15, 15, 5, 5)[:-1], negative=1, number=7)
    assert scoped(tmp_path, (1, "Tumor", [cut, SQUARE])).mask(0, 0, 50, 50).sum() == 375
    assert (
        "all its layers"
        in call(
            convert.main,
            imagescope(
                tmp_path / "b.xml", (1, "Tumor", [SQUARE, cut]), (2, "Metastases", [SQUARE])
            ),
            *("--out", tmp_path / "new"),
        )[2]
    )
    for name in "Region", "Normal", "cancer region":
        path = imagescope(tmp_path / "a.xml", (3, name, [SQUARE, cut]))
        line = one_line_of(*call(convert.main, path, "--out", tmp_path / "new"))
        assert "region 7 of layer 3" in line and "negative" in line


def test_what_has_no_area_in_imagescope_is_named_and_skipped(tmp_path):
    notes = [region([(1, 1), (5, 5)], 3), region([(1, 1), (5, 5)], 4), region([(2, 2)], 5)]
    click = region([(3, 3), (3, 3), (3, 3)])
    path = imagescope(tmp_path / "a.xml", (1, "", notes), (2, "Tumor", [SQUARE, click]))
    status, out, err = call(convert.main, path, "--out", tmp_path / "new")
    assert status == 0 and "a.xml: 1 tumour" in out
    assert "skipped 1 arrow, 1 ruler, 1 point, 1 polygon" in err


@pytest.mark.parametrize(
    "layer, flags, reason",
    [
        ((5, "Layer 5", [SQUARE]), (), "--layer 5=tumor"),
        ((5, "", [SQUARE]), ("--layer", "6=tumor"), "--layer 5=tumor"),
        ((5, "Tumor", [region([(1, 1), (5, 5), (9, 1)], 2)]), (), "ellipse of 3 points"),
        ((5, "Tumor", [region([(1, 1), (5, 5), (9, 1)], 8)]), (), "type 8"),
        ((5, "Tumor", [region([(1, 1), ("nan", 5), (9, 1)])]), (), "slide.xml"),
        ((5, "Tumor", [SQUARE]), ("--layer", "5=stroma"), "5=stroma"),
        ((5, "Tumor", [SQUARE]), ("--layer", "tumor"), "LAYER=CLASS"),
    ],
)
def test_what_is_unknown_in_imagescope_is_refused_by_name(tmp_path, layer, flags, reason):
    path = imagescope(tmp_path / "slide.xml", layer)
    assert reason in one_line_of(*call(convert.main, path, "--out", tmp_path / "new", *flags))
    assert not (tmp_path / "new").exists()


def test_a_layer_that_is_not_there_is_warned_of(tmp_path):
    path = imagescope(tmp_path / "a.xml", (1, "Tumor", [SQUARE]))
    flags = "--out", tmp_path / "new", "--layer", "2=roi"
    assert "has no layer 2" in call(convert.main, path, *flags)[2]


def test_xml_of_another_program_is_refused(tmp_path):
    outline.write_annotation(tmp_path / "a.xml", [])
    line = one_line_of(*call(convert.main, tmp_path / "a.xml", "--out", tmp_path / "new"))
    assert "ASAP_Annotations" in line and "ImageScope" in line


def test_no_file_that_is_read_is_ever_written(tmp_path):
    """ImageScope's NAME.xml is hours of work under the very name of the result."""
    path = imagescope(tmp_path / "a.xml", (1, "Tumor", [SQUARE]))
    (tmp_path / "a.geojson").write_text(json.dumps(feature([box(0, 0, 5, 5)])))
    (tmp_path / "link.xml").symlink_to(path)
    before = path.read_text()
    for files in ([path], [tmp_path / "link.xml"], [tmp_path / "a.geojson", path]):
        for flags in (), ("--overwrite",), ("--out", tmp_path, "--overwrite"):
            line = one_line_of(*call(convert.main, *files, *flags))
            assert "--out" in line and path.read_text() == before
    files = path, tmp_path / "a.geojson"
    line = one_line_of(*call(convert.main, *files, "--out", tmp_path / "new", "--overwrite"))
    assert "of 2 files" in line and not (tmp_path / "new").exists()
