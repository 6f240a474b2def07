"""Whole slides: blending, the files that are written, failures, interruptions, memory."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from jobs import call, ok, one_line_of
from PIL import Image

import data
import evaluate
from extras import convert, outline, predict, pyramid, synthetic
from slide import Annotation, Slide, read_annotation

ENDS = ("_likelihood_map.tif", "_pred.xml", ".geojson", ".png")


@pytest.fixture(scope="module")
def predicted(run, slides, tmp_path_factory):
    """The test slides, predicted with the defaults -> folder."""
    out = tmp_path_factory.mktemp("predicted")
    predict_all(run, out, *sorted(slides.glob("test/*.tif")))
    return out


def predict_all(run, out, *argv):
    return ok(predict.main, *flags(run, out), *argv)


def flags(run, out):
    return "--ckpt", run[0] / "last.pt", "--out", out, "--device", "cpu"


def page(path, level=0):
    return np.concatenate(list(pyramid.read_strips(path, level)))


def table(out):
    with open(out / "slides.csv") as file:
        return list(csv.DictReader(file))


# ----------------------------------------------------------------------- windows -> strips -> TIFF


def cut(field, tile, stride):
    """A field (h, w) in windows as predict_slide lays them, 0 beyond the edge."""
    h, w = field.shape
    field = np.pad(field, ((0, tile), (0, tile)))
    for y in range(0, max(h - tile, 0) + stride, stride):
        for x in range(0, max(w - tile, 0) + stride, stride):
            yield x, y, field[y : y + tile, x : x + tile].astype(np.float32)


@pytest.mark.parametrize("tile, stride", [(64, 32), (64, 64), (96, 29), (384, 192)])
def test_blending_leaves_a_constant_and_a_linear_map_as_they_are(tile, stride):
    h, w = 530, 301
    for field in (np.full((h, w), 0.35), np.add.outer(np.arange(h) / 900, np.arange(w) / 900)):
        strips = list(pyramid.blend(cut(field, tile, stride), tile, w, h))
        assert [len(strip) for strip in strips] == [256, 256, 18]
        assert np.abs(np.concatenate(strips) - 255 * field).max() < 0.501


def test_blending_leaves_no_seam_between_windows_that_disagree():
    windows = [(x, 0, np.full((64, 64), x // 32 % 2, np.float32)) for x in range(0, 193, 32)]
    row = np.concatenate(list(pyramid.blend(windows, 64, 256, 64)))[32].astype(int)
    assert row.min() < 10 and row.max() > 245 and np.abs(np.diff(row)).max() <= 255 / 32 + 1


def test_where_no_window_was_probability_is_0():
    p = np.concatenate(list(pyramid.blend([(300, 400, np.ones((64, 64)))], 64, 400, 600)))
    assert p.sum() == 255 * 64 * 64 and (p[400:464, 300:364] == 255).all()


@pytest.mark.parametrize("h, w", [(600, 777), (256, 256), (1, 3), (513, 200)])
def test_the_pyramid_holds_the_pixels_and_their_means_as_asap_reads_them(tmp_path, h, w):
    picture = np.random.default_rng(0).integers(0, 256, (h, w), np.uint8)
    picture[:256, :256] = 0
    strips = [picture[y : y + 256] for y in range(0, h, 256)]
    pyramid.write(tmp_path / "p.tif", strips, w, h, 0.5)
    expected = picture
    with tifffile.TiffFile(tmp_path / "p.tif") as tif:
        count = len(tif.pages)
        for k in range(count):
            tags = tif.pages[k].tags
            assert tags["Compression"].value == 32946  # of ASAP's reader; not 8, the same bytes
            assert tif.is_bigtiff and tif.pages[k].is_reduced == (k > 0)
            assert tags["XResolution"].value[0] == 20000 / 2**k
            assert np.array_equal(page(tmp_path / "p.tif", k), expected)
            if k + 1 < count:
                expected = np.asarray(Image.fromarray(expected).reduce(2))
    assert max(expected.shape) <= 256
    if count > 1:
        even = picture[: h // 2 * 2, : w // 2 * 2].reshape(h // 2, 2, w // 2, 2).mean((1, 3))
        assert np.abs(page(tmp_path / "p.tif", 1)[: h // 2, : w // 2] - even).max() <= 0.5


def test_outlines_are_of_pixels_at_the_threshold_and_of_min_area_in_um(tmp_path):
    p = np.zeros((20, 20), np.uint8)
    p[2, 2:4], p[6, 2:4], p[10, 2] = 51, 50, 200
    pyramid.write(tmp_path / "p.tif", [p], 20, 20, 10)
    args = SimpleNamespace(threshold=0.2, min_area=200, simplify=0)
    rings, _ = predict.outlines(tmp_path / "p.tif", 10, args)  # a px is 100 um^2
    assert [ring.xy.tolist() for ring in rings] == [[[2, 2], [4, 2], [4, 3], [2, 3]]]


def test_openslide_reads_the_same_pixels(predicted):
    openslide = pytest.importorskip("openslide")
    path = next(predicted.glob("*_likelihood_map.tif"))
    slide = openslide.OpenSlide(path)
    assert float(slide.properties["openslide.mpp-x"]) == 1
    for k, size in enumerate(slide.level_dimensions):
        theirs = np.asarray(slide.read_region((0, 0), k, size))
        assert (theirs[..., 3] == 255).all() and np.array_equal(theirs[..., 0], page(path, k))


# ------------------------------------------------------------------------------------- a slide


@pytest.mark.parametrize("overlap, steps", [(0, 1), (0.5, 2), (0.67, 3), (0.75, 4)])
def test_windows_cover_the_slide_and_have_the_tissue_of_their_squares(slides, overlap, steps):
    slide, stride = Slide(next(slides.glob("test/*.tif"))), 64 // steps
    places = predict.places_with_tissue(slide, 1, 64, overlap).tolist()
    share = data.tissue_share(slide, 1, stride)
    rows, cols = (max(1, -(-(256 - 64) // stride) + 1) for _ in range(2))
    expected = [
        [col * stride, row * stride]
        for row in range(rows)
        for col in range(cols)
        if share[row : row + steps, col : col + steps].mean() >= 0.1
    ]
    assert places == expected and len(places) > 10


def test_a_slide_smaller_than_a_window_has_one(slides):
    slide = Slide(next(slides.glob("test/*.tif")))
    assert predict.places_with_tissue(slide, 3, 128, 0.5).tolist() == [[0, 0]]


def test_probabilities_are_the_weighted_means_of_windows_with_tissue(run, slides, predicted):
    """The slow form: one window at a time, in float64, over the whole level at once."""
    model, _ = evaluate.load_model(run[0] / "last.pt", device="cpu")
    path = sorted(slides.glob("test/*.tif"))[0]
    slide, found = Slide(path), page(predicted / f"{path.stem}_likelihood_map.tif")
    lv, score = slide.levels[1], 0
    total, weights = np.zeros((2, lv.height + 64, lv.width + 64))
    ramp = np.array([min(i + 0.5, 63.5 - i) for i in range(64)])
    for x, y in predict.places_with_tissue(slide, 1, 64, 0.5).tolist():
        tile = torch.from_numpy(slide.read(1, x, y, 64, 64)).permute(2, 0, 1)[None]
        with torch.no_grad():
            p, cancer = (logits.softmax(1)[0, 1].double() for logits in model(tile))
        score = max(score, float(cancer))
        total[y : y + 64, x : x + 64] += np.outer(ramp, ramp) * p.numpy()
        weights[y : y + 64, x : x + 64] += np.outer(ramp, ramp)
    expected = (255 * total / np.maximum(weights, 1e-9))[: lv.height, : lv.width]
    assert found.shape == expected.shape and np.abs(found - expected).max() < 0.51
    assert found.max() > 128
    (row,) = (row for row in table(predicted) if row["slide"] == path.stem)
    assert float(row["score"]) == pytest.approx(score, abs=1e-4)


def test_xml_geojson_and_slides_csv_are_of_one_mask(slides, predicted):
    rows = {row["slide"]: row for row in table(predicted)}
    paths = sorted(slides.glob("test/*.tif"))
    assert set(rows) == {path.stem for path in paths}
    for path in paths:
        row, mask = rows[path.stem], page(predicted / f"{path.stem}_likelihood_map.tif") >= 128
        rings = outline.trace([mask], 200)
        lesions = [ring for ring in rings if not ring.is_hole]
        kept = Annotation(outline.to_shapes(rings, 2)).mask(0, 0, 384, 384, 2)
        annotation = read_annotation(predicted / f"{path.stem}_pred.xml")
        assert np.array_equal(annotation.mask(0, 0, 384, 384, 2), kept)
        features = json.loads((predicted / f"{path.stem}.geojson").read_text())["features"]
        assert len(features) == len(lesions) == int(row["lesions"])
        assert float(row["tumour_mm2"]) == pytest.approx(kept.sum() / 1e6, abs=1e-6)  # 1 um/px
        diameter = max(map(outline.diameter, lesions), default=0) / 1000
        assert float(row["diameter_mm"]) == pytest.approx(diameter, abs=1e-4)
        assert (int(row["level"]), int(row["bytes"])) == (1, path.stat().st_size)
        assert float(row["um_per_px"]) == 1
        windows = predict.places_with_tissue(Slide(path), 1, 64, 0.5)
        assert int(row["windows"]) == len(windows)
    assert max(int(row["lesions"]) for row in rows.values()) > 0


def test_predictions_are_trained_on_only_once_a_person_has_saved_them_as_name_xml(
    slides, predicted, tmp_path, capsys
):
    path = sorted(slides.glob("test/synthetic*.tif"))[0]
    shutil.copytree(predicted, tmp_path / "a")
    shutil.copy(path, tmp_path / "a")
    (normal,) = slides.glob("train/normal*.tif")
    shutil.copy(normal, tmp_path / "a")
    assert [source.path.stem for source in data.find_slides(tmp_path / "a")] == [normal.stem]
    assert f"{path.name}" in capsys.readouterr().err  # named as left out; no map is a slide
    shutil.copy(tmp_path / "a" / f"{path.stem}_pred.xml", tmp_path / "a" / f"{path.stem}.xml")
    found = {source.path.stem: source.xml for source in data.find_slides(tmp_path / "a")}
    assert found == {normal.stem: None, path.stem: tmp_path / "a" / f"{path.stem}.xml"}


def test_simplified_outlines_are_near_the_exact_ones(run, slides, predicted, tmp_path):
    path = max(slides.glob("test/*.tif"), key=lambda p: size_of(predicted, p, "_pred.xml"))
    predict_all(run, tmp_path, "--simplify", 4, path)
    exact, fewer = (
        read_annotation(folder / f"{path.stem}_pred.xml") for folder in (predicted, tmp_path)
    )
    corners = [sum(len(xy) for rings in a.rings.values() for xy in rings) for a in (exact, fewer)]
    assert corners[1] < corners[0] / 2
    a, b = (annotation.mask(0, 0, 384, 384, 2).astype(bool) for annotation in (exact, fewer))
    assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.9
    assert size_of(tmp_path, path, ".geojson") < size_of(predicted, path, ".geojson") / 2
    (row,) = table(tmp_path)
    assert row["simplify"] == "4" and float(row["tumour_mm2"]) * 1e6 == pytest.approx(b.sum())


def test_a_table_with_other_columns_is_not_added_to(run, tmp_path):
    (tmp_path / "slides.csv").write_text("slide,seconds\nx,1\n")
    line = one_line_of(*call(predict.main, *flags(run, tmp_path), "x.tif"))
    assert "slides.csv" in line and "--out" in line


@pytest.mark.parametrize("side", [2, 4, 8])
def test_simplified_outlines_differ_in_blocks_that_the_exact_ones_cross_alone(tmp_path, side):
    yy, xx = np.mgrid[:528, :304]
    field = np.random.default_rng(0).normal(np.hypot(xx - 150, yy - 250), 6)
    p = np.clip(255 - field, 0, 255).astype(np.uint8)
    pyramid.write(tmp_path / "p.tif", [p[y : y + 256] for y in (0, 256, 512)], 304, 528, 1)
    masks, corners = [], []
    for n in 1, side:
        args = SimpleNamespace(threshold=0.5, min_area=0, simplify=n)
        rings, _ = predict.outlines(tmp_path / "p.tif", 1, args)
        corners.append(sum(len(ring.xy) for ring in rings))
        masks.append(Annotation(outline.to_shapes(rings, n)).mask(0, 0, 304, 528))
    assert np.array_equal(masks[0], p >= 127.5) and corners[1] < corners[0] / side
    blocks = masks[0].reshape(528 // side, side, 304 // side, side)
    crossed = (blocks.min((1, 3)) != blocks.max((1, 3))).repeat(side, 0).repeat(side, 1)
    differs = masks[0] != masks[1]
    assert differs.any() and not (differs & ~crossed).any()


def size_of(folder, path, end):
    return (folder / f"{path.stem}{end}").stat().st_size


def test_areas_and_diameters_are_in_the_um_of_the_slide(run, slides, tmp_path):
    picture = Slide(slides / "train/synthetic_000.tif").read(1, 0, 0, 384, 384)
    synthetic.write_slide(tmp_path / "s", picture, [], mpp=0.8)
    predict_all(run, tmp_path, tmp_path / "s.tif")
    (row,), mask = table(tmp_path), page(tmp_path / "s_likelihood_map.tif") >= 128
    rings = outline.trace([mask], 200 / 0.8**2)
    area = outline.area(rings)
    assert float(row["um_per_px"]) == 0.8 and area > 100
    assert float(row["tumour_mm2"]) == pytest.approx(area * 0.64e-6, abs=1e-6)
    diameter = max(outline.diameter(ring) for ring in rings if not ring.is_hole) * 0.8e-3
    assert float(row["diameter_mm"]) == pytest.approx(diameter, abs=1e-4)


def test_the_picture_shows_the_slide_and_its_outlines(predicted):
    xml = max(predicted.glob("*.xml"), key=lambda path: path.stat().st_size)
    picture = np.asarray(Image.open(predicted / f"{xml.stem.removesuffix('_pred')}.png"))
    assert picture.shape == (512, 512, 3)
    yellow = (picture == (255, 230, 0)).all(2)
    assert 100 < yellow.sum() < 60000
    xy, *_ = read_annotation(xml).rings["tumour"]
    x, y = xy.clip(2, 765).astype(int).T
    assert yellow[y, x].mean() > 0.5


def test_workers_change_nothing(run, slides, predicted, tmp_path):
    path = sorted(slides.glob("test/*.tif"))[0]
    predict_all(run, tmp_path, "--workers", 2, path)
    for end in ENDS:
        name = f"{path.stem}{end}"
        assert (tmp_path / name).read_bytes() == (predicted / name).read_bytes()


# ----------------------------------------------------------------------- what goes wrong, and again


def test_a_slide_that_fails_is_named_and_the_others_finish(run, slides, tmp_path):
    good = sorted(slides.glob("test/*.tif"))
    bad = tmp_path / "bad slide.tif"
    bad.write_bytes(good[0].read_bytes()[:9000])
    damaged = tmp_path / "damaged.tif"
    shutil.copy(good[0], damaged)
    with damaged.open("r+b") as file:
        lv = Slide(damaged).levels[1]
        file.seek(int(lv.offsets[lv.counts.argmax()]))
        file.write(bytes(60))
    paths = good[0], bad, damaged, tmp_path / "none.tif", good[1]
    status, _, err = call(predict.main, *flags(run, tmp_path / "out"), *paths)
    lines = err.splitlines()
    assert status == 1 and lines[-1] == "3 of 5 slides failed" and len(lines) == 4
    assert all(line.startswith("error: ") for line in lines[:3])
    assert all(str(path) in line for path, line in zip(paths[1:4], lines))
    assert [row["slide"] for row in table(tmp_path / "out")] == [good[0].stem, good[1].stem]
    names = {f"{p.stem}{end}" for p in good[:2] for end in ENDS}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"slides.csv"} | names


def test_an_interrupted_run_leaves_nothing_half_written_and_goes_on(
    run, slides, predicted, tmp_path, monkeypatch
):
    """Interrupted twice in the second slide: at its .geojson, and at its XML, which comes last."""
    paths, out = sorted(slides.glob("test/*.tif")), tmp_path / "out"
    names = {f"{paths[0].stem}{end}" for end in ENDS}
    for module, name in (convert, "write"), (outline, "write_annotation"):

        def stopped(path, *args, real=getattr(module, name)):
            if paths[1].stem in path.name:
                raise KeyboardInterrupt
            real(path, *args)

        monkeypatch.setattr(module, name, stopped)
        with pytest.raises(KeyboardInterrupt):
            call(predict.main, *flags(run, out), *paths[:2])
        monkeypatch.undo()
        assert {path.name for path in out.iterdir()} == names | {"slides.csv"}
    before = (out / f"{paths[0].stem}.png").stat().st_mtime_ns
    assert f"{paths[0]}: done before" in predict_all(run, out, *paths[:2])
    assert (out / f"{paths[0].stem}.png").stat().st_mtime_ns == before
    assert len(table(out)) == 2
    for path in paths[:2]:
        for end in ENDS:
            name = f"{path.stem}{end}"
            assert (out / name).read_bytes() == (predicted / name).read_bytes()


def test_what_is_done_is_kept_and_other_settings_are_said(run, slides, predicted, tmp_path):
    out, path = tmp_path / "out", sorted(slides.glob("test/*.tif"))[0]
    shutil.copytree(predicted, out)
    assert "done before" in predict_all(run, out, path)
    argv = [*flags(run, out), path]
    for more, said in (
        (("--threshold", 0.7), "done with threshold 0.5, not 0.7"),
        (("--simplify", 2), "done with simplify 0, not 2"),
    ):
        status, _, err = call(predict.main, *argv, *more)
        assert status == 1 and said in err and "--overwrite" in err
    ok(predict.main, *argv, "--threshold", 0.7, "--overwrite")
    assert [row["threshold"] for row in table(out)] == ["0.5", "0.5", "0.5", "0.7"]
    mask = page(out / f"{path.stem}_likelihood_map.tif") >= 255 * 0.7
    area = outline.area(outline.trace([mask], 200))
    assert float(table(out)[-1]["tumour_mm2"]) * 1e6 == pytest.approx(area, abs=1)
    assert "done before" in ok(predict.main, *argv, "--threshold", 0.7)
    other = tmp_path / "other.pt"
    checkpoint = torch.load(run[0] / "last.pt", weights_only=True)
    checkpoint["model"]["head.bias"] += torch.tensor([-1.0, 1.0])
    torch.save(checkpoint, other)
    status, _, err = call(predict.main, *argv, "--threshold", 0.7, "--ckpt", other)
    assert status == 1 and "done with weights" in err
    (out / f"{path.stem}_pred.xml").unlink()  # as after a kill
    assert "done before" not in ok(predict.main, *argv, "--threshold", 0.7)


def test_slides_of_one_name_masks_alone_and_bad_flags_are_refused(run, slides, tmp_path):
    path, argv = next(slides.glob("test/*.tif")), flags(run, tmp_path / "out")
    assert "2 slides of that name" in one_line_of(*call(predict.main, *argv, path, path))
    for name in "a_likelihood_map.tif", "a_Mask.tif":
        assert "give the slides" in one_line_of(*call(predict.main, *argv, name))
    for bad in "--overlap 1", "--threshold 0", "--threshold nan", "--min-area -1", "--simplify 3":
        status, _, err = call(predict.main, *argv, path, *bad.split())
        assert status == 2 and bad.split()[0] in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_slide_on_which_no_tissue_was_found_is_not_called_free_of_tumour(run, tmp_path):
    """A pale slide had `tumour 0.000 mm^2`, as one that was looked at and is normal."""
    synthetic.write_slide(tmp_path / "glass", np.full((300, 410, 3), 255, np.uint8), [])
    argv = [*flags(run, tmp_path / "out"), tmp_path / "glass.tif"]
    status, out, err = call(predict.main, *argv)
    assert status == 0 and err.startswith("warning: ") and "nothing predicted" in err
    assert "tumour" not in out and "windows 0" in out
    (row,) = table(tmp_path / "out")
    cells = [row[name] for name in ("tumour_mm2", "score", "lesions", "diameter_mm")]
    assert cells == [""] * 4 and row["windows"] == "0"
    assert page(tmp_path / "out/glass_likelihood_map.tif").shape == (150, 205)
    assert Image.open(tmp_path / "out/glass.png").size == (410, 300)
    assert not read_annotation(tmp_path / "out/glass_pred.xml").rings
    assert "done before" in ok(predict.main, *argv)


def test_a_slide_without_resolution_is_read_at_the_level_that_is_said(run, tmp_path):
    picture, _ = synthetic.draw_slide(np.random.default_rng(0), 512)
    synthetic.write_slide(tmp_path / "no_mpp", picture, [], mpp=1e4)  # a placeholder
    argv = [*flags(run, tmp_path / "out"), tmp_path / "no_mpp.tif"]
    status, _, err = call(predict.main, *argv)
    assert status == 1 and "--level" in err
    status, out, err = call(predict.main, *argv, "--level", 1)
    assert status == 0 and "windows" in out and "um/px unknown" in err


def large_slide(path, side):
    """A slide of `side` px at 1 um/px with tissue in two corners, the rest absent blocks."""
    picture = Image.fromarray(synthetic.draw_slide(np.random.default_rng(1), 256)[0])

    def pages():
        for level in range(6):
            size, across = side >> level, -(-(side >> level) // 256)
            tables, patch = synthetic.jpeg_tiles(picture.reduce(2**level))
            rows = np.array([*patch, None], object)[:-1].reshape(2 * [int(len(patch) ** 0.5)])
            blocks = np.full((across, across), b"", object)
            for at in 0, 32 >> level:  # and far off, from 8192 px
                blocks[at : at + len(rows), at : at + len(rows)] = rows
            yield size, size, tables, blocks.ravel().tolist()

    synthetic.write_pages(path, pages(), 1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says it there")
def test_memory_stays_flat_on_a_slide_of_9000_px(run, tmp_path):
    """81 megapixels of probability and weights would take 648 MB as float32."""
    large_slide(tmp_path / "large.tif", 9_000)
    # Not ru_maxrss: after a fork it begins with the peak of the process that runs the tests.
    code = (
        "import re, sys; from extras import predict\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "before = peak(); predict.main(sys.argv[1:]); print((peak() - before) // 1024)"
    )
    argv = [sys.executable, "-c", code, *flags(run, tmp_path / "out"), tmp_path / "large.tif"]
    root = Path(predict.__file__).parents[1]
    done = subprocess.run(list(map(str, argv)), capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    line, peak = done.stdout.splitlines()
    assert "windows" in line and int(peak) < 250, done.stdout
    strips = list(pyramid.read_strips(tmp_path / "out/large_likelihood_map.tif"))
    assert sum(map(len, strips)) == strips[0].shape[1] == 9_000
    assert strips[1].any() and strips[33].any() and not strips[20].any()


def test_the_map_of_an_odd_slide_divides_its_sides_as_asap_does(run, tmp_path):
    """ASAP showed no map where level 1 is (517 + 1) / 2 px wide: 517 // 259 is 1."""
    image = np.full((391, 517, 3), (160, 90, 150), np.uint8)
    synthetic.write_slide(tmp_path / "odd", image, [])
    assert Slide(tmp_path / "odd.tif").levels[1][:2] == (259, 196)
    ok(predict.main, "--ckpt", run[0] / "last.pt", "--out", tmp_path, tmp_path / "odd.tif")
    with tifffile.TiffFile(tmp_path / "odd_likelihood_map.tif") as tif:
        assert tif.pages[0].shape == (195, 258)
