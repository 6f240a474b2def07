"""Slides, annotations, tiles: slow oracles for the fast forms, and every kind of odd file."""
import io
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import data
import synthetic

XML = Path(__file__).parent / "data"
SQUARE = np.array([(10, 10), (30, 10), (30, 30), (10, 30)], float)


# -------------------------------------------------------------------------------------- annotation

@pytest.mark.parametrize("name, tumour, exclusions", [
    ("patient_010_node_4", 73, 1), ("patient_015_node_2", 2, 0), ("test_010", 2, 0),
    ("test_066", 21, 0)])
def test_original_files_keep_areas_and_skip_dots_rulers_and_rings_of_two(name, tumour, exclusions):
    annotation = data.read_annotation(XML / f"{name}.xml")
    kinds = [is_tumour for _, is_tumour in annotation.polygons]
    assert (kinds.count(True), kinds.count(False)) == (tumour, exclusions)
    assert all(len(xy) >= 3 for xy, _ in annotation.polygons)


def write_xml(path, *rings):
    """Rings are (group, type, xy)."""
    body = ""
    for group, kind, xy in rings:
        points = "".join(f'<Coordinate X="{x}" Y="{y}"/>' for x, y in xy)
        body += (f'<Annotation Name="a" Type="{kind}" PartOfGroup="{group}">'
                 f"<Coordinates>{points}</Coordinates></Annotation>")
    path.write_text(f"<ASAP_Annotations>{body}</ASAP_Annotations>")
    return path


@pytest.mark.parametrize("tumour", ["_0", "_1", "Tumor", "metastases"])
@pytest.mark.parametrize("exclusion", ["_2", "Exclusion", "normal"])
def test_exclusions_are_cleared_whatever_the_order_of_the_file(tmp_path, tumour, exclusion):
    hole = (exclusion, "Polygon", SQUARE / 2 + 10)
    path = write_xml(tmp_path / "a.xml", hole, (tumour, "Spline", SQUARE),
                     ("None", "Polygon", SQUARE + 20))
    mask = data.read_annotation(path).mask(0, 0, 64, 64)
    assert mask.sum() == 20 * 20 - 10 * 10 and mask[12, 12] == 1 and mask[20, 20] == 0


def test_annotations_in_each_other_are_read_in_no_time(tmp_path):
    """Looking below every Annotation for its points took minutes for 100,000 of them."""
    body = "<Annotation>" * 10 ** 5 + "</Annotation>" * 10 ** 5
    (tmp_path / "a.xml").write_text(f"<ASAP_Annotations>{body}</ASAP_Annotations>")
    assert data.read_annotation(tmp_path / "a.xml").polygons == []


@pytest.mark.parametrize("text", [
    "<ASAP_Annotations><Annotations>", "", "<Annotations/>",
    '<!DOCTYPE a [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><a>&b;</a>'])
def test_broken_or_foreign_xml_is_named(tmp_path, text):
    (tmp_path / "a.xml").write_text(text)
    with pytest.raises(data.DataError, match="a.xml"):
        data.read_annotation(tmp_path / "a.xml")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400", "1e30", "", "x"])
def test_coordinates_that_are_no_pixels_are_refused(tmp_path, value):
    path = write_xml(tmp_path / "a.xml", ("_0", "Polygon", [(0, 0), (9, value), (9, 9)]))
    with pytest.raises(data.DataError, match="a.xml"):
        data.read_annotation(path)


def test_an_unknown_group_is_refused_not_taken_as_normal(tmp_path):
    with pytest.raises(data.DataError, match="necrosis"):
        data.read_annotation(write_xml(tmp_path / "a.xml", ("necrosis", "Polygon", SQUARE)))


def slow_winding(xy, w, h):
    """Dan Sunday's winding number, point by point and edge by edge."""
    out = np.zeros((h, w), int)
    for y in range(h):
        for x in range(w):
            for (x1, y1), (x2, y2) in zip(xy.tolist(), np.roll(xy, -1, 0).tolist()):
                left = (x2 - x1) * (y - y1) - (x - x1) * (y2 - y1)
                if y1 <= y < y2 and left > 0:
                    out[y, x] += 1
                elif y2 <= y < y1 and left < 0:
                    out[y, x] -= 1
    return out


RNG = np.random.default_rng(0)
T = np.linspace(0, 4 * np.pi, 40, endpoint=False)
RINGS = {"random": RNG.uniform(-5, 25, (12, 2)),
         "integers": RNG.integers(-3, 23, (15, 2)).astype(float),
         "halves": RNG.integers(-6, 46, (15, 2)) / 2,
         "twice round": np.stack([10.3 + 8 * np.cos(T), 9.2 + 7 * np.sin(T)], 1),
         "eight": np.stack([10.3 + 8 * np.sin(T / 2), 9.2 + 7 * np.sin(T)], 1),
         "square": SQUARE / 3, "outside": SQUARE + 100, "around": (SQUARE - 20) * 9,
         "flat": np.array([(0, 5), (9, 5), (4, 5.)])}


@pytest.mark.parametrize("name", RINGS)
def test_winding_equals_the_brute_force_loop(name):
    for xy in (RINGS[name], RINGS[name][::-1]):
        assert np.array_equal(data.winding(xy, 20, 18), slow_winding(xy, 20, 18))


@pytest.mark.parametrize("downsample", [1, 2, 4])
def test_mask_of_a_tile_is_the_union_of_its_rings_less_exclusions(downsample):
    rng = np.random.default_rng(1)
    rings = [(rng.uniform(0, 80, (7, 2)) + rng.uniform(0, 40, 2), n != 1) for n in range(4)]
    x, y, w, h = 60 // downsample - 12, 50 // downsample - 9, 25, 19
    slow = np.zeros((h, w), bool)
    for wanted in (True, False):
        for xy, is_tumour in rings:
            if is_tumour == wanted:
                slow[slow_winding((xy + .5) / downsample - .5 - (x, y), w, h) != 0] = wanted
    fast = data.Annotation(rings).mask(x, y, w, h, downsample)
    assert np.array_equal(fast, slow) and 0 < slow.sum() < slow.size


# -------------------------------------------------------------------------------------------- TIFF

def jpeg_without_app14(image, **options):
    """A JPEG whose colour space only the TIFF tag knows, as Aperio writes it."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90, **options)
    raw = file.getvalue()
    at = raw.find(b"\xff\xee")
    return raw if at < 0 else raw[:at] + raw[at + 2 + int.from_bytes(raw[at + 2:at + 4], "big"):]


@pytest.fixture(params=["YCbCr", "RGB"])
def written(request, tmp_path, monkeypatch):
    """A slide of 300 x 200 px with one absent tile -> path, what its pixels must be."""
    rng = np.random.default_rng(2)
    small = Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8))
    picture = np.array(small.resize((300, 200), Image.BICUBIC))
    picture[:128, 128:256] = 255
    options = {"keep_rgb": True} if request.param == "RGB" else {}
    truth = np.full((200, 300, 3), 255, np.uint8)

    def tiles(image):
        out = []
        for y in range(0, image.height, 128):
            for x in range(0, image.width, 128):
                tile = Image.new("RGB", (128, 128), "white")
                right, below = min(x + 128, image.width), min(y + 128, image.height)
                tile.paste(image.crop((x, y, right, below)))
                marked = io.BytesIO()
                tile.save(marked, "JPEG", quality=90, **options)    # with APP14, so Pillow knows
                absent = np.asarray(tile).min() == 255
                out.append(b"" if absent else jpeg_without_app14(tile, **options))
                if image.size == (300, 200) and not absent:
                    part = truth[y:y + 128, x:x + 128]
                    part[:] = np.asarray(Image.open(marked))[:part.shape[0], :part.shape[1]]
        return b"\xff\xd8\xff\xd9", out          # no shared tables: each tile has its own

    monkeypatch.setattr(synthetic, "TIFF_TILE", 128)
    monkeypatch.setattr(synthetic, "jpeg_tiles", tiles)
    synthetic.write_slide(tmp_path / "a", picture, [], mpp=0.25)
    if request.param == "RGB":
        patch_pages(tmp_path / "a.tif", PhotometricInterpretation=2)
    return tmp_path / "a.tif", truth


def test_colours_are_those_of_the_tiff_tag_and_absent_tiles_white(written):
    path, truth = written
    slide = data.Slide(path)
    assert np.array_equal(slide.read(0, 0, 0, 300, 200), truth)
    assert slide.levels[0].counts[1] == 0 and (truth[:128, 128:256] == 255).all()
    assert slide.mpp == pytest.approx(0.25)
    assert [lv.downsample for lv in slide.levels] == [1, 2, 4, 8]


def test_a_region_is_the_same_wherever_it_starts_and_white_beyond_the_edge(written):
    path, truth = written
    slide = data.Slide(path)
    padded = np.pad(truth, ((400, 400), (400, 400), (0, 0)), constant_values=255)
    for x, y, w, h in [(0, 0, 128, 128), (100, 60, 150, 90), (-50, -70, 200, 100),
                       (250, 150, 100, 90), (300, 0, 20, 20), (-90, 10, 80, 10), (127, 127, 2, 2),
                       (-10, -10, 330, 230)]:
        wanted = padded[400 + y:400 + y + h, 400 + x:400 + x + w]
        assert np.array_equal(slide.read(0, x, y, w, h), wanted)


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_file_fails_at_open_not_at_tile_10_000(written, share, tmp_path):
    raw = written[0].read_bytes()
    (tmp_path / "cut.tif").write_bytes(raw[:int(share * len(raw))])
    with pytest.raises(data.DataError, match="cut.tif"):
        data.Slide(tmp_path / "cut.tif")


def test_tiles_without_tables_decode_with_the_shared_ones(tmp_path):
    """The tables of streamtype 1 in front of the tile of streamtype 2 are one whole JPEG."""
    rng = np.random.default_rng(4)
    small = Image.fromarray(rng.integers(0, 256, (25, 25, 3), np.uint8))
    picture = np.array(small.resize((200, 200)))
    synthetic.write_slide(tmp_path / "a", picture, [])
    whole, tile = io.BytesIO(), Image.new("RGB", (256, 256), "white")
    tile.paste(Image.fromarray(picture))
    tile.save(whole, "JPEG", quality=80)
    read = data.Slide(tmp_path / "a.tif").read(0, 0, 0, 200, 200)
    assert np.array_equal(read, np.asarray(Image.open(whole))[:200, :200])


def patch_pages(path, **tags):
    with tifffile.TiffFile(path, mode="r+b") as tif:
        for k in range(len(tif.pages)):
            for name, value in tags.items():
                tif.pages[k].tags[name].overwrite(value)


def test_a_file_cut_after_a_page_is_truncated_not_a_smaller_pyramid(written, tmp_path):
    """libtiff writes every page behind its tiles: a cut file opens, with fewer levels."""
    raw = written[0].read_bytes()
    with tifffile.TiffFile(written[0]) as tif:
        starts = [tif.pages[k].offset for k in range(1, len(tif.pages))]
    for start in starts:
        (tmp_path / "cut.tif").write_bytes(raw[:start])
        with pytest.raises(data.DataError, match="cut.tif: truncated"):
            data.Slide(tmp_path / "cut.tif")


@pytest.mark.parametrize("text, mpp", [
    ("Aperio Image Library|AppMag = 40|MPP = 0.2527|", 0.2527), ("Aperio|MPP = 0|", None),
    ('<DataObject ObjectType="DPUfsImport"><Attribute Name="DICOM_PIXEL_SPACING" Group="0x0028">'
     "&quot;0.000227&quot; &quot;0.000227&quot;</Attribute></DataObject>", 0.227)])
def test_resolution_is_found_where_scanners_write_it(tmp_path, text, mpp):
    page = type("Page", (), {"description": text, "tags": {}})
    assert data.Slide._mpp([page]) == pytest.approx(mpp)


def test_philips_levels_are_halves_by_their_order_whatever_their_padding(tmp_path, monkeypatch):
    """Padded to whole tiles, 300 px over the 256 px of level 1 is no ratio of 2."""
    monkeypatch.setattr(synthetic, "TIFF_TILE", 128)
    original = tifffile.TiffWriter.write

    def padded(self, tiles, **options):
        h, w, _ = options["shape"]
        options["shape"] = (-(-h // 128) * 128, -(-w // 128) * 128, 3)
        return original(self, tiles, description="DPUfsImport", **options)

    monkeypatch.setattr(tifffile.TiffWriter, "write", padded)
    synthetic.write_slide(tmp_path / "a", np.zeros((384, 640, 3), np.uint8), [])
    levels = data.Slide(tmp_path / "a.tif").levels
    assert [(lv.width, lv.height, lv.downsample) for lv in levels] == [
        (640, 384, 1), (320, 192, 2), (160, 96, 4), (80, 48, 8)]


def test_other_kinds_of_tiff_are_refused_with_what_they_are(tmp_path):
    image = np.zeros((64, 64, 3), np.uint8)
    for name, match, options in [
            ("striped", "striped", {}),
            ("deflate", "DEFLATE", {"tile": (32, 32), "compression": "zlib"})]:
        tifffile.imwrite(tmp_path / f"{name}.tif", image, photometric="rgb", **options)
        with pytest.raises(data.DataError, match=f"{name}.tif.*{match}"):
            data.Slide(tmp_path / f"{name}.tif")
    for name, raw in (("text", b"no picture"), ("empty", b"")):
        (tmp_path / f"{name}.tif").write_bytes(raw)
        with pytest.raises(data.DataError, match=f"{name}.tif"):
            data.Slide(tmp_path / f"{name}.tif")
    with pytest.raises(data.DataError, match="missing.tif"):
        data.Slide(tmp_path / "missing.tif")


@pytest.mark.parametrize("tag", ["ImageWidth", "ImageLength", "TileWidth", "TileLength"])
@pytest.mark.parametrize("size", [0, 10 ** 9])
def test_sizes_that_cannot_be_are_refused_before_memory_is_taken(written, tag, size):
    patch_pages(written[0], **{tag: size})
    with pytest.raises(data.DataError, match="a.tif"):
        data.Slide(written[0])


def test_jpeg_2000_is_refused_by_its_name(written):
    patch_pages(written[0], Compression=33005)
    with pytest.raises(data.DataError, match="JP2000"):
        data.Slide(written[0])


def test_a_damaged_tile_is_named(written):
    path, _ = written
    before = data.Slide(path)
    with open(path, "r+b") as file:
        file.seek(before.levels[0].offsets[0])
        file.write(bytes(50))
    with pytest.raises(data.DataError, match="a.tif: tile 0"):
        data.Slide(path).read(0, 0, 0, 10, 10)
    with pytest.raises(data.DataError, match="a.tif: changed"):    # not what its index is of
        before.read(0, 0, 0, 10, 10)


def test_the_level_is_the_nearest_in_um_per_px_or_the_one_asked_for(written):
    slide = data.Slide(written[0])
    assert [slide.nearest_level(mpp) for mpp in (0.1, 0.25, 0.34, 0.37, 1, 9)] == [0, 0, 0, 1, 2, 3]
    slide.mpp = None
    assert slide.nearest_level(0.5, 1) == 1
    for level in (None, 4):
        with pytest.raises(data.DataError, match="--level"):
            slide.nearest_level(0.5, level)


def test_tissue_is_found_where_it_is(written):
    slide = data.Slide(written[0])
    share = data.tissue_share(slide, 0, 64)
    assert share.shape == (4, 5) and (share[:2, 2:4] < 0.05).all() and (share[:2, :2] > 0.5).all()


# ------------------------------------------------------------------------ slides, tiles, fractions

def index_of(slides, tile=64, **options):
    return data.index_tiles(data.find_slides(slides), tile, 1.0, **options)


def test_tiles_cover_the_grid_and_their_share_is_that_of_their_mask(slides):
    index = index_of(slides)
    assert len(index.tiles) > 100
    for row in range(0, len(index.tiles), 17):
        image, mask, label, back = data.Tiles(index)[row]
        t = index.tiles[row]
        assert image.shape == (3, 64, 64) and mask.shape == (64, 64) and back == row
        assert mask.float().mean() == pytest.approx(t["tumour"]) and label == t["label"]
        assert t["label"] == (1 if t["tumour"] > .05 else -1 if t["tumour"] > 0 else 0)
        assert t["x"] % 128 == t["y"] % 128 == 0 and t["level"] == 1


def test_the_index_is_kept_while_all_it_depends_on_is_the_same(slides, tmp_path, monkeypatch):
    cache, copy = tmp_path / "index.npz", tmp_path / "slides"
    shutil.copytree(slides, copy)
    index = index_of(copy)
    data.write_index(index, cache)
    monkeypatch.setattr(data, "tiles_of", None)             # no tile is looked for again
    again = index_of(copy, cache=cache)
    assert np.array_equal(index.tiles, again.tiles) and again.fingerprint() == index.fingerprint()
    assert [tuple(lost) for lost in again.dropped] == index.dropped
    for options in ({"tile": 128}, {"cancer_share": 0.1}):
        with pytest.raises(TypeError, match="NoneType"):
            index_of(copy, cache=cache, **options)
    for path in (next(copy.rglob("*.xml")), next(copy.rglob("*.tif"))):
        before = path.stat()
        path.write_bytes(path.read_bytes())                 # the same, but who knows
        with pytest.raises(TypeError, match="NoneType"):
            index_of(copy, cache=cache)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    index_of(copy, cache=cache)
    cache.write_bytes(cache.read_bytes()[:-30])
    with pytest.raises(data.DataError, match="index.npz"):
        index_of(copy, cache=cache)


def test_no_slide_is_on_both_sides_and_patients_stay_together(tmp_path):
    for patient in range(11):
        for node in range(3):
            (tmp_path / f"patient_{patient:03}_node_{node}.tif").touch()
            if patient % 2 and node == 1:
                (tmp_path / f"patient_{patient:03}_node_{node}.xml").touch()
    for seed in range(5):
        sources = data.find_slides(tmp_path, seed, unlabelled_is_normal=True)
        train, test = ({s.name[:11] for s in sources if s.split == split}
                       for split in ("train", "test"))
        assert len(sources) == 33 and not train & test and len(test) == 2
        assert {s.split for s in sources if s.xml} == {"train", "test"}


def test_copies_of_a_slide_stay_on_one_side(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for n in range(12):
            (tmp_path / folder / f"tumor_{n:03}.tif").touch()
            (tmp_path / folder / f"tumor_{n:03}.xml").touch()
    sources = data.find_slides(tmp_path)
    assert not ({s.path.stem for s in sources if s.split == "train"}
                & {s.path.stem for s in sources if s.split == "test"})


def test_folders_train_and_test_are_the_split_and_a_patient_in_both_is_named(tmp_path, capsys):
    for split, node in (("train", 0), ("test", 1), ("other", 2)):
        (tmp_path / split).mkdir()
        (tmp_path / split / f"patient_007_node_{node}.tif").touch()
    sources = data.find_slides(tmp_path, unlabelled_is_normal=True)
    assert [(s.name.split("/")[0], s.split) for s in sources] == [("test",) * 2, ("train",) * 2]
    assert "patient_007" in (said := capsys.readouterr().err) and "other/" in said


def test_a_slide_without_xml_is_normal_only_where_that_is_known(tmp_path, capsys):
    for name in ("tumor_001.tif", "deep/er/Normal_002.TIFF", "patient_003_node_1.tif", "x_004.svs",
                 "tumor_001_mask.tif", ".hidden.tif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/tumor_001.xml").touch()
    (tmp_path / "stage_labels.csv").write_text("patient,stage\npatient_003.zip,pN0\n"
                                               "patient_003_node_1.tif,negative\nx_004.tif,micro\n")
    names = {s.path.stem: s.xml for s in data.find_slides(tmp_path)}
    assert set(names) == {"tumor_001", "Normal_002", "patient_003_node_1"} and names["tumor_001"]
    assert "1 slides left out" in (said := capsys.readouterr().err) and "x_004.svs" in said
    assert len(data.find_slides(tmp_path, unlabelled_is_normal=True)) == 4


def test_slides_not_outlined_in_full_are_named(tmp_path, capsys):
    for name in ("tumor_010", "tumor_011"):
        (tmp_path / f"{name}.tif").touch(), (tmp_path / f"{name}.xml").touch()
    data.find_slides(tmp_path)
    assert "tumor_010.tif" in (said := capsys.readouterr().err) and "tumor_011" not in said


@pytest.mark.parametrize("unit", ["tile", "slide"])
def test_fractions_are_nested_and_keep_a_tile_of_each_class(slides, unit):
    index, before = index_of(slides), None
    for fraction in (0, .01, .1, .25, .5, .75, 1):
        pool = data.choose_labels(index, fraction, fraction, unit, seed=3)
        t = index.tiles
        assert not (t["pixel"] | t["image"])[~t["train"]].any()
        assert {0, 1} <= set(t["label"][t["pixel"]].tolist())
        assert set(t["label"][t["image"]].tolist()) == ({0, 1} if fraction else set())
        for name in ("pixel", "image"):
            assert before is None or not (before[name] & ~t[name]).any()
        if unit == "tile" and fraction:
            assert abs(t["pixel"].sum() - fraction * len(pool)) <= 2
        if unit == "slide":                 # whole slides, but for the one tile of each class
            shares = [t["pixel"][pool][t["slide"][pool] == n].mean() for n in set(t["slide"][pool])]
            assert sum(0 < share < 1 for share in shares) <= 2
        before = t.copy()
    assert t["pixel"][pool].all() and (t["image"] == (t["label"] >= 0))[pool].all()
    cancer, normal = ((t["train"] & (t["label"] == kind)).sum() for kind in (1, 0))
    assert (t["label"][pool] == 1).sum() == cancer
    assert (t["label"][pool] == 0).sum() == min(cancer, normal)


def test_another_seed_labels_other_tiles(slides):
    index, chosen = index_of(slides), []
    for seed in (0, 0, 1):
        data.choose_labels(index, .1, 1, seed=seed)
        chosen.append(index.tiles["pixel"].copy())
    assert np.array_equal(chosen[0], chosen[1]) and not np.array_equal(chosen[0], chosen[2])


def test_flips_and_turns_move_image_and_mask_together(slides):
    index = index_of(slides)
    row = int(np.argmax((index.tiles["tumour"] > .2) & (index.tiles["tumour"] < .8)))
    dataset = data.Tiles(index)
    image, mask, _, _ = dataset[row]
    both = torch.cat([image, mask[None]])
    views = [torch.rot90(v, turns, (1, 2)) for v in (both, both.flip(2)) for turns in range(4)]
    seen = set()
    for position in range(60):
        a, m, _, _ = dataset[position, row]
        hits = [n for n, v in enumerate(views) if torch.equal(torch.cat([a, m[None]]), v)]
        assert len(hits) == 1
        seen.update(hits)
        assert torch.equal(dataset[position, row][0], a)
    assert seen == set(range(8))


@pytest.mark.parametrize("context", multiprocessing.get_all_start_methods())
def test_workers_give_the_same_tiles_as_none(slides, context):
    """A TiffFile opened before the fork gives wrong tiles; a dataset's own RNG, equal ones."""
    index = index_of(slides)
    batches = data.Batches(np.arange(40), 8, (0, 1), range(7))
    a, b = ([[t.clone() for t in batch] for batch in torch.utils.data.DataLoader(
        data.Tiles(index), batch_sampler=batches, num_workers=n,
        multiprocessing_context=context if n else None)] for n in (0, 2))
    assert all(torch.equal(s, t) for x, y in zip(a, b) for s, t in zip(x, y)) and len(a) == 7


def test_a_worker_of_an_interrupted_job_says_nothing_but_of_faults_of_its_own():
    """3 of 40 interruptions once left a traceback beside the line that says how to go on."""
    script = """import data, signal, sys
data.of_a_worker(0)
for error in BrokenPipeError(), EOFError(), ValueError("a fault"):
    sys.excepthook(type(error), error, None)
signal.raise_signal(signal.SIGTERM)"""
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(data.__file__).parent, text=True,
                          capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "ValueError: a fault\n")


def test_batches_pass_over_all_rows_again_and_again_and_never_start_anew():
    rows = np.arange(100, 107)
    one = data.Batches(rows, 2, (5,), range(14))
    keys = [key for batch in one for key in batch]
    assert [position for position, _ in keys] == list(range(28))
    turns = [[row for _, row in keys[n:n + 7]] for n in range(0, 28, 7)]
    assert all(sorted(turn) == rows.tolist() for turn in turns) and turns[0] != turns[1]
    half, halves = data.Batches(rows, 2, (5,)), []
    for half.numbers in (range(7), range(7, 14)):
        halves += list(half)
    assert halves == list(one)


@pytest.mark.parametrize("change, match", [
    (dict(tile=4096), "no normal tile|no cancer tile"), (dict(cancer_share=1.0), "no cancer tile")])
def test_a_setting_without_one_of_the_classes_is_refused(slides, change, match):
    with pytest.raises(data.DataError, match=match):
        data.choose_labels(index_of(slides, **change), 1, 1)


def test_tiles_csv_says_what_was_used(slides, tmp_path):
    index = index_of(slides)
    data.choose_labels(index, .3, .6)
    data.write_tiles(index, tmp_path / "tiles.csv")
    header, *lines = (tmp_path / "tiles.csv").read_text().splitlines()
    assert header == ("slide,x,y,level,split,tumour_share,image_label,pixel_label_used,"
                      "image_label_used")
    assert len(lines) == len(index.tiles) and not list(tmp_path.glob("*.part"))
    assert sum(line.endswith(("1,0", "1,1")) for line in lines) == index.tiles["pixel"].sum()
    assert math.isclose(float(lines[5].split(",")[5]), index.tiles["tumour"][5], abs_tol=1e-6)
