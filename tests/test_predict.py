"""Whole slides: blending, the files that are written, failures, interruptions, memory, scores."""
import csv
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import data
import evaluate
import outline
import predict
import synthetic
from jobs import call, ok, one_line_of


@pytest.fixture(scope="module")
def predicted(run, slides, tmp_path_factory):
    """The test slides, predicted with the defaults -> folder."""
    out = tmp_path_factory.mktemp("predicted")
    ok(predict.main, "--ckpt", run[0] / "last.pt", "--out", out, "--device", "cpu",
       *sorted(slides.glob("test/*.tif")))
    return out


def page(path, k=0):
    return np.concatenate(list(predict.read_strips(path, k)))


def table(out):
    with open(out / "slides.csv") as file:
        return list(csv.DictReader(file))


def cut(field, tile, stride):
    """A field (h, w) in windows as predict_slide lays them, 0 beyond the edge."""
    h, w = field.shape
    field = np.pad(field, ((0, tile), (0, tile)))
    for y in range(0, max(h - tile, 0) + stride, stride):
        for x in range(0, max(w - tile, 0) + stride, stride):
            yield x, y, field[y:y + tile, x:x + tile].astype(np.float32)


@pytest.mark.parametrize("tile, stride", [(64, 32), (64, 64), (96, 29), (384, 192)])
def test_blending_leaves_a_constant_and_a_linear_map_as_they_are(tile, stride):
    h, w = 530, 301
    for field in (np.full((h, w), 0.35), np.add.outer(np.arange(h) / 900, np.arange(w) / 900)):
        strips = list(predict.blend(cut(field, tile, stride), tile, w, h))
        assert [len(strip) for strip in strips] == [256, 256, 18]
        assert np.abs(np.concatenate(strips) - 255 * field).max() < 0.501


def test_blending_leaves_no_seam_between_windows_that_disagree():
    windows = [(x, 0, np.full((64, 64), x // 32 % 2, np.float32)) for x in range(0, 193, 32)]
    row = np.concatenate(list(predict.blend(windows, 64, 256, 64)))[32].astype(int)
    assert row.min() < 10 and row.max() > 245 and np.abs(np.diff(row)).max() <= 255 / 32 + 1


def test_where_no_window_was_probability_is_0():
    p = np.concatenate(list(predict.blend([(300, 400, np.ones((64, 64)))], 64, 400, 600)))
    assert p.sum() == 255 * 64 * 64 and (p[400:464, 300:364] == 255).all()


@pytest.mark.parametrize("h, w", [(600, 777), (256, 256), (1, 3), (513, 200)])
def test_the_pyramid_holds_the_pixels_and_their_means(tmp_path, h, w):
    picture = np.random.default_rng(0).integers(0, 256, (h, w), np.uint8)
    picture[:256, :256] = 0
    predict.write_pyramid(tmp_path / "p.tif", [picture[y:y + 256] for y in range(0, h, 256)], w, h,
                          0.5)
    with tifffile.TiffFile(tmp_path / "p.tif") as tif:
        pages = len(tif.pages)
        assert tif.is_bigtiff and [tif.pages[k].is_reduced for k in range(pages)] == [
            k > 0 for k in range(pages)]
        assert [tif.pages[k].tags["XResolution"].value[0] for k in range(pages)] == [
            20000 / 2 ** k for k in range(pages)]
    expected = picture
    for k in range(pages):
        assert np.array_equal(page(tmp_path / "p.tif", k), expected)
        if k + 1 < pages:
            expected = np.asarray(Image.fromarray(expected).reduce(2))
    assert max(expected.shape) <= 256
    if pages > 1:
        even = picture[:h // 2 * 2, :w // 2 * 2].reshape(h // 2, 2, w // 2, 2).mean((1, 3))
        assert np.abs(page(tmp_path / "p.tif", 1)[:h // 2, :w // 2] - even).max() <= 0.5


def test_outlines_are_of_pixels_at_the_threshold_and_of_min_area_in_um(tmp_path):
    p = np.zeros((20, 20), np.uint8)
    p[2, 2:4], p[6, 2:4], p[10, 2] = 51, 50, 200
    predict.write_pyramid(tmp_path / "p.tif", [p], 20, 20, 10)
    args = SimpleNamespace(threshold=0.2, min_area=200)
    rings = predict.outlines(tmp_path / "p.tif", 10, args)          # a px is 100 um^2
    assert [ring.xy.tolist() for ring in rings] == [[[2, 2], [4, 2], [4, 3], [2, 3]]]


def test_one_tile_alone_gets_the_bits_it_gets_among_others(run):
    model, args, _ = predict.load(run[0] / "last.pt", SimpleNamespace(device="cpu"))
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))
    model.eval()
    for n, p in enumerate(zip(*predict.probabilities(model, images, args))):
        alone = predict.probabilities(model, images[n:n + 1], args)
        assert all(torch.equal(a[0], b) for a, b in zip(alone, p))


def test_openslide_reads_the_same_pixels(predicted):
    openslide = pytest.importorskip("openslide")
    path = next(predicted.glob("*_prob.tif"))
    slide = openslide.OpenSlide(path)
    assert float(slide.properties["openslide.mpp-x"]) == 1
    for k, size in enumerate(slide.level_dimensions):
        theirs = np.asarray(slide.read_region((0, 0), k, size))
        assert (theirs[..., 3] == 255).all() and np.array_equal(theirs[..., 0], page(path, k))


def test_probabilities_are_the_weighted_means_of_windows_with_tissue(run, slides, predicted):
    """The slow form: one window at a time, in float64, over the whole level at once."""
    model, args, _ = predict.load(run[0] / "last.pt", SimpleNamespace(device="cpu"))
    model.eval()
    for path in slides.glob("test/*.tif"):
        slide, found = data.Slide(path), page(predicted / f"{path.stem}_prob.tif")
        lv = slide.levels[1]
        total, weights = np.zeros((2, lv.height + 64, lv.width + 64))
        ramp = np.array([min(i + 0.5, 63.5 - i) for i in range(64)])
        chroma, score = data.tissue_share(slide, 1, 64, 32), 0
        for row, y in enumerate(range(0, lv.height - 32, 32)):
            for col, x in enumerate(range(0, lv.width - 32, 32)):
                if chroma[row, col] < 0.1:
                    continue
                tile = torch.from_numpy(slide.read(1, x, y, 64, 64)).permute(2, 0, 1)[None]
                with torch.no_grad():
                    p, cancer = (logits.softmax(1)[0, 1].double() for logits in model(tile))
                p, score = p.numpy(), max(score, float(cancer))
                total[y:y + 64, x:x + 64] += np.outer(ramp, ramp) * p
                weights[y:y + 64, x:x + 64] += np.outer(ramp, ramp)
        expected = 255 * total / np.maximum(weights, 1e-9)
        assert found.shape == (lv.height, lv.width)
        assert np.abs(found - expected[:lv.height, :lv.width]).max() < 0.51
        row, = (row for row in table(predicted) if row["slide"] == path.stem)
        assert float(row["score"]) == pytest.approx(score, abs=1e-4)
        assert chroma.shape == ((lv.height - 32) // 32, (lv.width - 32) // 32)


def test_tissue_of_overlapping_windows_is_the_mean_of_their_squares(slides):
    slide = data.Slide(next(slides.glob("test/*.tif")))
    whole, half = data.tissue_share(slide, 1, 64, 32), data.tissue_share(slide, 1, 32)
    rows, cols = whole.shape
    assert np.allclose(whole, sum(half[a:a + rows, b:b + cols] for a in (0, 1) for b in (0, 1)) / 4)
    assert np.array_equal(data.tissue_share(slide, 1, 64), whole[::2, ::2])


def test_the_annotation_is_the_mask_and_can_be_trained_on(run, slides, predicted, tmp_path):
    """Predicted, corrected in ASAP, trained on: with nothing in between."""
    for path in slides.glob("test/*.tif"):
        shutil.copy(path, tmp_path)
    ok(predict.main, "--ckpt", run[0] / "last.pt", "--out", tmp_path, "--min-area", 0,
       "--device", "cpu", *tmp_path.glob("*.tif"))
    areas = []
    for path in slides.glob("test/*.tif"):
        mask = page(tmp_path / f"{path.stem}_prob.tif") >= 128
        annotation = data.read_annotation(tmp_path / f"{path.stem}.xml")
        assert np.array_equal(annotation.mask(0, 0, *mask.shape[::-1], 2), mask)
        areas.append(mask.sum() / 1e6)                              # 1 um/px
        specks = outline.trace([mask], 200)
        kept = data.read_annotation(predicted / f"{path.stem}.xml")
        assert len(kept.polygons) == len(specks) <= len(annotation.polygons)
        assert np.array_equal(kept.mask(0, 0, *mask.shape[::-1], 2), data.Annotation(
            outline.to_polygons(specks, 2)).mask(0, 0, *mask.shape[::-1], 2))
    assert sorted(float(row["tumour_mm2"]) for row in table(tmp_path)) == pytest.approx(
        sorted(areas), abs=1e-6)
    assert max(areas) > 0.001
    sources = data.find_slides(tmp_path)
    assert len(sources) == 3 and all(source.xml for source in sources)
    tumour = data.index_tiles(sources, 64, 1.0).tiles["tumour"]
    assert tumour.sum() * 64 * 64 / 1e6 == pytest.approx(sum(areas), rel=0.05)      # on tissue


def test_the_line_of_a_slide_says_what_is_in_the_files(run, slides, predicted):
    rows = {row["slide"]: row for row in table(predicted)}
    assert set(rows) == {path.stem for path in slides.glob("test/*.tif")}
    for path in slides.glob("test/*.tif"):
        row, rings = rows[path.stem], outline.trace([page(predicted / f"{path.stem}_prob.tif")
                                                     >= 128], 200)
        lesions = [ring for ring in rings if not ring.is_hole]
        assert (int(row["width"]), int(row["height"]), int(row["level"])) == (768, 768, 1)
        assert float(row["um_per_px"]) == 1 and int(row["lesions"]) == len(lesions)
        assert int(row["tissue_tiles"]) == (data.tissue_share(data.Slide(path), 1, 64, 32)
                                            >= 0.1).sum()
        assert float(row["diameter_mm"]) == pytest.approx(
            max(outline.diameters(lesions), default=0) / 1000, abs=1e-4)
        assert 0 < float(row["score"]) < 1 and int(row["bytes"]) == path.stat().st_size


def test_areas_and_diameters_are_in_the_um_of_the_slide(run, tmp_path):
    picture, _ = synthetic.draw_slide(np.random.default_rng((0, 0)), 768)       # is in train/
    synthetic.write_slide(tmp_path / "s", np.asarray(Image.fromarray(picture).reduce(2)), [],
                          mpp=0.8)
    ok(predict.main, "--ckpt", run[0] / "last.pt", "--out", tmp_path, "--device", "cpu",
       tmp_path / "s.tif")
    (row,), rings = table(tmp_path), outline.trace([page(tmp_path / "s_prob.tif") >= 128],
                                                   200 / 0.8 ** 2)
    area = sum(-ring.area if ring.is_hole else ring.area for ring in rings)
    assert float(row["um_per_px"]) == 0.8 and area > 100
    assert float(row["tumour_mm2"]) == pytest.approx(area * 0.64e-6, abs=1e-6)
    assert float(row["diameter_mm"]) == pytest.approx(
        max(outline.diameters([ring for ring in rings if not ring.is_hole])) * 0.8e-3, abs=1e-4)


def test_the_picture_shows_the_slide_its_outlines_and_the_probability(predicted):
    path = max(predicted.glob("*.xml"), key=lambda xml: xml.stat().st_size)
    picture = np.asarray(Image.open(path.with_suffix(".png"))).astype(int)
    assert picture.shape == (768, 2 * 768 + 8, 3)
    green = (picture[:, :768] == (0, 220, 0)).all(2)
    assert 100 < green.sum() < 30000
    (xy, _), *_ = data.read_annotation(path).polygons
    assert green[xy[:, 1].clip(2, 765).astype(int), xy[:, 0].clip(2, 765).astype(int)].mean() > 0.5
    small = np.asarray(Image.fromarray(page(path.with_name(f"{path.stem}_prob.tif")))).astype(int)
    assert np.abs(picture[::2, 776::2, 0] - small).max() == 0


@pytest.mark.parametrize("flags", ["--batch-size 1", "--batch-size 3", "--batch-size 50",
                                   "--workers 2"])
def test_batch_size_and_workers_change_nothing(run, slides, predicted, tmp_path, flags):
    path = sorted(slides.glob("test/*.tif"))[0]
    ok(predict.main, "--ckpt", run[0] / "last.pt", "--out", tmp_path, "--device", "cpu",
       *flags.split(), path)
    for end in ("_prob.tif", ".xml", ".png"):
        assert (tmp_path / f"{path.stem}{end}").read_bytes() == (
            predicted / f"{path.stem}{end}").read_bytes()


def test_a_slide_that_fails_is_named_and_the_others_finish(run, slides, tmp_path):
    good = sorted(slides.glob("test/*.tif"))
    bad = tmp_path / "bad slide.tif"
    bad.write_bytes(good[0].read_bytes()[:9000])
    damaged = tmp_path / "damaged.tif"
    shutil.copy(good[0], damaged)
    with damaged.open("r+b") as file:
        lv = data.Slide(damaged).levels[1]
        file.seek(int(lv.offsets[lv.counts.argmax()]))
        file.write(bytes(60))
    status, out, err = call(predict.main, "--ckpt", run[0] / "last.pt", "--out", tmp_path / "out",
                            "--device", "cpu", good[0], bad, damaged, tmp_path / "none.tif",
                            good[1])
    lines = err.splitlines()
    assert status == 1 and lines[-1] == "3 of 5 slides failed" and len(lines) == 4
    assert all(line.startswith("error: ") for line in lines[:3])
    assert "bad slide.tif" in lines[0] and "damaged" in lines[1] and "none.tif" in lines[2]
    assert [row["slide"] for row in table(tmp_path / "out")] == [good[0].stem, good[1].stem]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"slides.csv"} | {
        f"{p.stem}{end}" for p in good[:2] for end in ("_prob.tif", ".xml", ".png")}


@pytest.mark.parametrize("where", ["tiles", "write_picture", "outlines", "describe"])
def test_an_interrupted_run_leaves_nothing_half_written_and_goes_on(
        run, slides, predicted, tmp_path, monkeypatch, where):
    paths, calls, out = sorted(slides.glob("test/*.tif")), [], tmp_path / "out"
    argv = ["--ckpt", run[0] / "last.pt", "--out", out, "--device", "cpu", *paths]
    first = paths[0].stem
    real = getattr(predict, where)

    def stopped(*args):
        calls.append(args)
        if (out / f"{first}.xml").exists():         # at the second slide, or as the first is done
            if where == "tiles":
                return interrupt()
            raise KeyboardInterrupt
        return real(*args)

    def interrupt():
        yield predict.EMPTY
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, where, stopped)
    assert call(predict.main, *argv)[0] == 130
    monkeypatch.undo()
    left = {path.name for path in out.iterdir()}
    assert not any(name.endswith(".part") for name in left) and f"{first}.xml" in left
    for path in out.glob("*_prob.tif"):
        assert data.read_annotation(out / f"{first}.xml") and page(path).shape == (384, 384)
    before = (out / f"{first}_prob.tif").stat().st_mtime_ns
    assert "done before" in ok(predict.main, *argv)
    assert (out / f"{first}_prob.tif").stat().st_mtime_ns == before
    assert len(table(out)) == 3
    for path in predicted.iterdir():
        if path.name != "slides.csv":
            assert (out / path.name).read_bytes() == path.read_bytes()


def test_what_is_done_is_kept_and_other_settings_are_said(run, slides, predicted, tmp_path,
                                                         monkeypatch):
    out, path = tmp_path / "out", sorted(slides.glob("test/*.tif"))[0]
    shutil.copytree(predicted, out)
    argv = ["--ckpt", run[0] / "last.pt", "--out", out, "--device", "cpu", path]
    assert "done before" in ok(predict.main, *argv)
    status, _, err = call(predict.main, *argv, "--threshold", 0.7)
    assert status == 1 and "done with threshold 0.5, not 0.7" in err and "--overwrite" in err
    ok(predict.main, *argv, "--threshold", 0.7, "--overwrite")
    assert [row["threshold"] for row in table(out)] == ["0.5", "0.5", "0.5", "0.7"]
    mask = page(out / f"{path.stem}_prob.tif") >= 255 * 0.7
    assert sum(r.area * (1 - 2 * r.is_hole) for r in outline.trace([mask], 200)) == pytest.approx(
        float(table(out)[-1]["tumour_mm2"]) * 1e6, abs=1)
    assert "done before" in ok(predict.main, *argv, "--threshold", 0.7)
    for where in ("write_picture", "write_annotation"):     # half of the old, half of the new
        monkeypatch.setattr(predict.data if "ann" in where else predict, where, lambda *args: 1 / 0)
        status, _, err = call(predict.main, *argv, "--threshold", 0.4, "--overwrite")
        assert status == 1 and f"{path.name}: ZeroDivisionError: division by zero" in err
        monkeypatch.undo()
        assert "done before" not in ok(predict.main, *argv, "--threshold", 0.7)
    assert "done before" in ok(predict.main, *argv, "--threshold", 0.7)
    status, _, err = call(predict.main, *argv, "--threshold", 0.7, "--amp")
    assert status == 1 and "done with amp False, not True" in err
    (out / f"{path.stem}.xml").unlink()
    assert "done before" not in ok(predict.main, *argv, "--threshold", 0.7)
    (out / "slides.csv").unlink()                   # killed before the first line of all
    assert "done before" not in ok(predict.main, *argv, "--threshold", 0.7)


def test_outlines_that_a_person_has_saved_are_never_written_over(run, slides, predicted, tmp_path):
    out, path = tmp_path / "out", sorted(slides.glob("test/*.tif"))[0]
    shutil.copytree(predicted, out)
    xml = out / f"{path.stem}.xml"
    data.write_annotation(xml, data.read_annotation(xml).polygons)      # as ASAP: no comment
    before = xml.read_bytes()
    status, _, err = call(predict.main, "--ckpt", run[0] / "last.pt", "--out", out, "--device",
                          "cpu", "--overwrite", path)
    assert status == 1 and "by hand" in err and xml.read_bytes() == before


def test_what_a_person_has_saved_is_trained_on_rather_than_a_prediction(slides, tmp_path, capsys):
    path = next(slides.glob("test/synthetic*.tif"))
    for folder in ("images", "xml"):
        (tmp_path / folder).mkdir()
    shutil.copy(path, tmp_path / "images")
    data.write_annotation(tmp_path / f"images/{path.stem}.xml", [], data.PREDICTED)
    source, = data.find_slides(tmp_path)
    assert source.xml.parent.name == "images" and path.stem in capsys.readouterr().err
    shutil.copy(path.with_suffix(".xml"), tmp_path / "xml")
    source, = data.find_slides(tmp_path)
    assert source.xml.parent.name == "xml" and not capsys.readouterr().err


def test_slides_of_one_name_and_bad_flags_are_refused(run, slides, tmp_path):
    path = next(slides.glob("test/*.tif"))
    ckpt = ["--ckpt", run[0] / "last.pt", "--out", tmp_path / "out"]
    assert "two slides" in one_line_of(*call(predict.main, *ckpt, path, path))
    for flags, said in (("--overlap 1", "1 is not in"), ("--threshold 0", "0 is not in"),
                        ("--threshold nan", "nan is not in"), ("--min-area -1", "-1 is not in"),
                        ("--batch-size 0", "0 is not in"), ("--device x", "x cannot be")):
        assert said in one_line_of(*call(predict.main, *ckpt, path, *flags.split()))
    assert "give the slides" in one_line_of(*call(predict.main, *ckpt, "a_prob.tif"))
    (tmp_path / "file").touch()
    status, _, err = call(predict.main, *ckpt, "--out", tmp_path / "file", path)
    assert status == 1 and path.name in err and "exists" in err and len(err.splitlines()) == 2
    assert "not a checkpoint" in one_line_of(*call(predict.main, "--ckpt", path, path))
    assert not (tmp_path / "out").exists()


def test_a_slide_without_tissue_or_resolution_is_predicted_too(run, tmp_path):
    white = np.full((300, 410, 3), 255, np.uint8)
    synthetic.write_slide(tmp_path / "glass", white, [])
    picture, _ = synthetic.draw_slide(np.random.default_rng(0), 512)
    synthetic.write_slide(tmp_path / "no_mpp", picture, [], mpp=1e4)    # a placeholder
    ckpt = ["--ckpt", run[0] / "last.pt", "--out", tmp_path / "out", "--device", "cpu"]
    assert "0 tissue tiles" in ok(predict.main, *ckpt, tmp_path / "glass.tif")
    assert page(tmp_path / "out/glass_prob.tif").shape == (150, 205)
    assert not data.read_annotation(tmp_path / "out/glass.xml").polygons
    status, _, err = call(predict.main, *ckpt, tmp_path / "no_mpp.tif")
    assert status == 1 and "--level" in err
    status, out, err = call(predict.main, *ckpt, tmp_path / "no_mpp.tif", "--level", 1)
    assert status == 0 and "level 1, 1 um/px" in out and "um/px unknown" in err


def test_memory_stays_flat_on_a_slide_of_30000_px(run, tmp_path):
    """900 megapixels of probability would take 3.6 GB as float32."""
    side, path = 30_000, tmp_path / "large.tif"
    picture = Image.fromarray(synthetic.draw_slide(np.random.default_rng(1), 1024)[0])
    with tifffile.TiffWriter(path, bigtiff=True) as tif:
        for level in range(6):
            size, across = side >> level, -(-(side >> level) // 256)
            tables, patch = synthetic.jpeg_tiles(picture.reduce(2 ** level))
            rows = np.array([*patch, None], object)[:-1].reshape(2 * [int(len(patch) ** 0.5)])
            tiles = np.full((across, across), b"", object)
            tiles[:len(rows), :len(rows)] = rows
            far = 96 >> level                                       # and far off, from 24576 px
            tiles[far:far + len(rows), far:far + len(rows)] = rows
            tif.write(iter(tiles.ravel().tolist()), shape=(size, size, 3), dtype=np.uint8,
                      tile=(256, 256), photometric="rgb", compression="zlib", metadata=None,
                      subfiletype=int(level > 0), resolution=(1e4 / 2 ** level,) * 2,
                      resolutionunit="CENTIMETER", extratags=[(347, 7, len(tables), tables, True)])
    with tifffile.TiffFile(path, mode="r+b") as tif:
        for k in range(6):
            tif.pages[k].tags["Compression"].overwrite(7)
            tif.pages[k].tags["PhotometricInterpretation"].overwrite(6)
    code = ("import resource, sys; sys.path.insert(0, sys.argv.pop(1)); import predict; "
            "predict.main(sys.argv[1:]); "
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)")
    done = subprocess.run([sys.executable, "-c", code, str(Path(predict.__file__).parent), "--ckpt",
                           str(run[0] / "last.pt"), "--out", str(tmp_path / "out"), "--device",
                           "cpu", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    line, peak = done.stdout.splitlines()
    assert "30000 x 30000 px, level 0" in line and int(peak) < 1536, done.stdout
    strips = list(predict.read_strips(tmp_path / "out/large_prob.tif", 0))
    assert strips[1].any() and strips[97].any() and not strips[60].any()


# ---------------------------------------------------------------- evaluate.py --whole-slides

def test_pixels_and_lesions_of_whole_slides_are_counted(slides, tmp_path, monkeypatch):
    """Lesions of three sizes at 10 um/px; some found, some not, one found in two pieces."""
    def box(x, y, w, h):
        return np.array([(x, y), (x + w, y), (x + w, y + h), (x, y + h)]) * 2. - 0.5

    source = data.find_slides(slides)[0]
    truth = data.Annotation([(box(10, 10, 250, 60), True), (box(30, 30, 20, 20), False),
                             (box(38, 38, 4, 4), True),             # in the hole of the large one
                             (box(10, 100, 30, 30), True), (box(100, 100, 30, 30), True),
                             (box(200, 200, 10, 10), True), (box(300, 300, 1, 1), True)])
    # 1 px is 100 um^2: below the 200 of --min-area, no lesion but a pixel that is missed.
    found = np.zeros((384, 384), bool)
    found[10:70, 10:100] = found[10:70, 150:260] = True             # the macro one, in two pieces
    found[129:140, 39:60] = True                                    # one pixel of the first micro
    found[300:310, 100:120] = found[330:332, 100:120] = True        # false
    folder = tmp_path / Path(source.name).parent
    folder.mkdir()
    predict.write_pyramid(folder / f"{source.path.stem}_prob.tif",
                          [found[y:y + 256] * np.uint8(255) for y in (0, 256)], 384, 384, 10)
    monkeypatch.setattr(predict, "finished", lambda *args: "")
    monkeypatch.setattr(predict, "working_level", lambda *args: (1, 10.0))
    index = data.Index([source], [data.Slide(source.path)], [truth], [(0, 0)], 64, None, "")
    results = evaluate.whole_slides(None, index, [0], tmp_path, SimpleNamespace(**predict.DEFAULTS))
    true = truth.mask(0, 0, 384, 384, 2) == 1
    tp, fp, fn = (true & found).sum(), (found & ~true).sum(), (true & ~found).sum()
    assert results["dsc"] == 2 * tp / (2 * tp + fp + fn) and results["iou"] == tp / (tp + fp + fn)
    assert true.sum() == 250 * 60 - 400 + 0 + 2 * 900 + 100 + 1     # exclusions clear what is in
    assert results["lesions"] == {"macro": {"lesions": 1, "hit": 1},
                                  "micro": {"lesions": 2, "hit": 1},
                                  "ITC": {"lesions": 1, "hit": 0}}
    assert results["false_lesions_per_slide"] == 2
    assert results["per_slide"]["list"][0]["false_lesions"] == 2


def test_whole_slides_are_scored_once_and_again_after_a_change(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    argv = ["--ckpt", folder / "last.pt", "--device", "cpu", "--whole-slides"]
    first = ok(evaluate.main, *argv).splitlines()
    assert len(first) == 4 and first[-1].startswith("whole slides: DSC 0.")
    assert "micro" in first[-1] and (folder / "whole_slides/results.json").exists()
    assert ok(evaluate.main, *argv).splitlines() == first[-1:]
    checkpoint = torch.load(folder / "last.pt", weights_only=True)
    checkpoint["model"]["head.bias"] += torch.tensor([-1.0, 1.0])
    torch.save(checkpoint, folder / "last.pt")
    other = ok(evaluate.main, *argv).splitlines()
    assert len(other) == 4 and other[-1] != first[-1]
