"""Images, masks and labels to slides: what training reads of them, and what is refused."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
from jobs import call, ok, one_line_of
from PIL import Image
from test_outline import MASKS

import data
from extras import images
from slide import Slide, read_annotation

STAINED = 200, 80, 140


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """Workers take 0.1 s to start; one test has them."""
    monkeypatch.setattr(images, "in_parallel", lambda function, jobs, _: [*map(function, jobs)])


def save(path, picture=None, size=(32, 24), **options):
    """An image at `path`: an array, an Image, or stained all over."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if picture is None:
        picture = Image.new("RGB", size, STAINED)
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    picture.save(path, **options)


def values(*numbers, size=(32, 24)):
    """A mask with these values, in stripes."""
    return np.resize(np.array(numbers, np.uint8), size).T.copy()


@pytest.fixture
def place(tmp_path):
    """A folder with a field, a mask of it and a table that calls another one normal."""
    save(tmp_path / "fields/a.png")
    save(tmp_path / "masks/a.png", values(0, 1))
    save(tmp_path / "fields/b.png")
    (tmp_path / "labels.csv").write_text("b,normal\n")
    return tmp_path


def argv(place, *flags):
    paths = place / "fields", place / "slides", "--masks", place / "masks"
    return [*paths, "--labels", place / "labels.csv", "--mpp", 0.5, *flags]


def refusal(place, *flags):
    """The line of a refusal, which leaves the folder as it was."""
    before = sorted(place.rglob("*"))
    line = one_line_of(*call(images.main, *argv(place, *flags)))
    assert sorted(place.rglob("*")) == before
    return line


@pytest.mark.parametrize("form", ["bool", "grey", "palette", "rgba", "16 bits", "tif", "tif, bit"])
def test_masks_of_any_form_are_equal_in_every_pixel(tmp_path, form):
    """Also with other values beside tumour's, and where a mask is empty."""
    masks = {
        f"{n}": mask for n, mask in enumerate([*MASKS[:12], MASKS[-1], np.zeros((5, 9), bool)])
    }
    tumour = {"grey": 255, "palette": 3, "rgba": 7, "16 bits": 700}.get(form, 1)
    for name, mask in masks.items():
        save(tmp_path / f"fields/{name}.png", size=mask.shape[::-1])
        picture = mask.astype(np.uint16 if form == "16 bits" else np.uint8) * tumour
        if form == "rgba":
            picture = np.stack([picture] * 3 + [np.full_like(picture, 255)], 2)
        picture = Image.fromarray(mask if form == "bool" else picture)
        if form == "palette":
            picture.putpalette([9, 9, 9] * 256)  # the colours say nothing
            assert picture.mode == "P"
        if form.startswith("tif"):  # WhiteIsZero: Pillow gave the complement
            (tmp_path / "masks").mkdir(exist_ok=True)
            white_is_zero = mask if "bit" in form else mask.astype(np.uint8)
            tifffile.imwrite(tmp_path / f"masks/{name}.tif", white_is_zero, photometric=0)
        else:
            save(tmp_path / f"masks/{name}.png", picture)
    ok(images.main, tmp_path / "fields", tmp_path / "o", "--mpp", 1, "--masks", tmp_path / "masks")
    for name, mask in masks.items():
        annotation = read_annotation(tmp_path / f"o/{name}.xml")
        assert np.array_equal(annotation.mask(0, 0, *mask.shape[::-1]), mask)


def test_tumour_in_masks_of_classes_is_what_the_flag_names(place):
    save(place / "masks/a.png", mask := values(0, 1, 2, 3))
    ok(images.main, *argv(place, "--tumour", 1, 3, 9))
    inside = read_annotation(place / "slides/a.xml").mask(0, 0, *mask.shape[::-1])
    assert np.array_equal(inside, mask % 2)


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (224, 224), (700, 520)])
def test_a_slide_has_the_pixels_of_its_field(tmp_path, size):
    yy, xx = np.mgrid[: size[1], : size[0]]
    picture = np.stack([128 + 100 * np.sin(xx / 40), 128 + 100 * np.cos(yy / 50), 0 * xx + 90], 2)
    save(tmp_path / "f/a.b.png", picture.astype(np.uint8))
    (tmp_path / "l.csv").write_text("a.b,cancer")
    ok(images.main, tmp_path / "f", tmp_path / "o", "--mpp", 0.25, "--labels", tmp_path / "l.csv")
    slide = Slide(tmp_path / "o/a.b.tif")
    assert slide.mpp == pytest.approx(0.25) and slide.levels[0][:2] == size
    difference = slide.read(0, 0, 0, *size).astype(int) - picture.astype(np.uint8)
    assert np.abs(difference).max() <= 12 and np.abs(difference).mean() < 2
    low = slide.levels[-1]
    colour = slide.read(len(slide.levels) - 1, 0, 0, *low[:2]).mean((0, 1))
    assert low.downsample == 8 or min(size) < 64
    assert np.abs(colour - picture.mean((0, 1))).max() < 6


def test_pale_tissue_is_not_taken_for_glass(tmp_path):
    save(tmp_path / "f/a.png", Image.new("RGB", (300, 300), (240, 215, 235)))
    (tmp_path / "l.csv").write_text("a,normal")
    ok(images.main, tmp_path / "f", tmp_path / "o", "--mpp", 1, "--labels", tmp_path / "l.csv")
    assert Slide(tmp_path / "o/a.tif").read(0, 0, 0, 300, 300).max() <= 241


def test_a_field_is_turned_by_its_exif_and_put_on_white(tmp_path):
    corner = np.full((24, 32, 3), STAINED, np.uint8)
    corner[:8, :8] = 0
    for n, suffix in enumerate(("jpg", "tif")):
        save(tmp_path / f"f/turned{n}.{suffix}", corner, exif=(exif := Image.Exif()))
        exif[0x0112] = 6  # the picture's first row is the right side of the view
        save(tmp_path / f"f/turned{n}.{suffix}", corner, exif=exif)
        save(tmp_path / f"m/turned{n}.png", values(0, 1, size=(24, 32)))
    save(tmp_path / "f/clear.png", Image.new("RGBA", (16, 16), (0, 0, 0, 0)))
    save(tmp_path / "f/grey.png", Image.new("L", (16, 16), 90))
    for name in ("clear", "grey"):
        save(tmp_path / f"m/{name}.png", Image.new("L", (16, 16)))
    ok(images.main, tmp_path / "f", tmp_path / "o", "--mpp", 1, "--masks", tmp_path / "m")
    for n in range(2):
        slide = Slide(tmp_path / f"o/turned{n}.tif")
        assert slide.levels[0][:2] == (24, 32)
        dark = slide.read(0, 0, 0, 24, 32).max(2) < 60
        assert dark[1:7, 17:23].all() and not dark[:, :12].any() and not dark[12:].any()
    assert (Slide(tmp_path / "o/clear.tif").read(0, 0, 0, 16, 16) == 255).all()
    assert np.abs(Slide(tmp_path / "o/grey.tif").read(0, 0, 0, 16, 16).astype(int) - 90).max() < 3


def test_training_reads_split_masks_and_labels(tmp_path):
    """Folders are the split; a region gives its tiles a label and no mask, a mask gives both."""
    for split in ("train", "test"):
        for name in ("outlined", "cancer", "normal", "nothing"):
            save(tmp_path / f"fields/{split}/{name}.png", size=(150, 128))
        # For equal stems the mask is that of the same subfolder.
        mask = np.zeros((128, 150), np.uint8)
        mask[:, 64:] = split == "train"
        save(tmp_path / f"masks/{split}/outlined.bmp", mask)
    rows = ["\ufeffName ; Label", "train/cancer; Cancer", "test\\cancer.png;CANCER", ""]
    rows += [
        "train/normal.png;normal;",
        "test/normal ; normal",
        "train/outlined;cancer",
        "x;normal",
    ]
    (tmp_path / "labels.csv").write_text("\n".join(rows), encoding="utf-8")
    status, out, err = call(images.main, *argv(tmp_path))
    assert status == 0 and "6 slides" in out and "2 outlined, 2 cancer, 2 normal" in out
    warnings = "".join(sorted(err.splitlines(True)))
    assert "names in" in warnings and "of no field (1): x\n" in warnings
    assert "fields are left out" in warnings and "(2): test/nothing.png, train/nothing" in warnings
    tiles = data.tile_slides(data.find_slides(tmp_path / "slides"), tile=64, mpp=0.5)
    assert [s.split for s in tiles.sources] == ["test"] * 3 + ["train"] * 3
    for n, source in enumerate(tiles.sources):
        rows = tiles.table["slide"] == n
        outlined = source.path.stem == "outlined"
        # The third column of tiles lies beyond the edge for two thirds.
        assert rows.sum() == (6 if outlined else 4) and (tiles.has_mask[rows] == outlined).all()
        cancer = (source.path.stem == "cancer") | (outlined & (tiles.table["x"][rows] > 0))
        if outlined and source.split == "test":
            cancer[:] = False
        assert (tiles.table["label"][rows] == cancer).all()


@pytest.mark.parametrize("size", [(1, 1), (64, 33)])
def test_a_region_holds_every_pixel(tmp_path, size):
    save(tmp_path / "f/deep/normal_1.png", size=size)
    (tmp_path / "l.csv").write_text("normal_1.png,cancer")
    ok(images.main, tmp_path / "f", tmp_path / "o", "--mpp", 1, "--labels", tmp_path / "l.csv")
    annotation = read_annotation(tmp_path / "o/deep/normal_1.xml", size)
    inside = annotation.inside("cancer region", -2, -2, size[0] + 4, size[1] + 4)
    assert np.array_equal(inside, np.pad(np.ones(size[::-1], bool), 2))
    (corners,) = annotation.rings["cancer region"]
    assert (corners.min(0) == -0.5).all() and (corners.max(0) == np.array(size) - 0.5).all()


def test_a_case_stays_on_one_side_of_a_drawn_split(tmp_path):
    cases = {"P7": 3, "P10": 2, "P3": 1, "Q": 4}
    for case, count in cases.items():
        for n in range(count):
            save(tmp_path / f"fields/{'deep/' if n % 2 else ''}{case}-{n}.png")
            save(tmp_path / f"masks/{case}-{n}.png", values(0, 1))
    (tmp_path / "labels.csv").write_text("")
    ok(images.main, *argv(tmp_path, "--case", r"(\w+)-\d"))
    rows = list(csv.DictReader(open(tmp_path / "slides/fields.csv", encoding="utf-8")))
    case_of = {row["slide"]: row["case"] for row in rows}
    assert {(r["field"].split("/")[-1].split("-")[0], r["case"]) for r in rows} == {
        (case, case) for case in cases
    }
    assert all(("deep/" in row["field"]) == ("deep/" in row["slide"]) for row in rows)
    for seed in range(5):
        sources = data.find_slides(tmp_path / "slides", seed)
        assert {s.name for s in sources} == {*case_of} and len(sources) == 10
        sides = {(case_of[s.name], s.split) for s in sources}
        assert len(sides) == 4 and {side for _, side in sides} == {"train", "test"}
    names = sorted(Path(name).name for name in case_of)
    assert names[:3] == [f"patient_000_node_{n}.tif" for n in (0, 1)] + ["patient_001_node_0.tif"]


def twice(place):
    save(place / "fields/A.jpg")


def sixteen_bits(place):
    save(place / "fields/a.png", np.zeros((24, 32), np.uint16))


def sixteen_bit_colours(place):
    (place / "fields/a.png").unlink()
    tifffile.imwrite(place / "fields/a.tif", np.zeros((24, 32, 3), np.uint16), photometric="rgb")


def cmyk(place):
    (place / "fields/a.png").unlink()
    save(place / "fields/a.jpg", Image.new("CMYK", (32, 24)))


def pages(place):
    (place / "fields/a.png").unlink()
    page = Image.new("RGB", (32, 24))
    save(place / "fields/a.tif", page, save_all=True, append_images=[page])


def truncated(place):
    noise = np.random.default_rng(0).integers(0, 255, (24, 32, 3)).astype(np.uint8)
    save(place / "fields/a.png", noise)
    content = (place / "fields/a.png").read_bytes()
    (place / "fields/a.png").write_bytes(content[: len(content) // 2])


def no_image(place):
    (place / "fields/a.png").write_text("<html>")


def mask_among_fields(place):
    save(place / "fields/a_mask.png")


def mask_of(*arguments, **options):
    def change(place):
        save(place / "masks/a.png", *arguments, **options)

    return change


def second_mask(place):
    save(place / "masks/a.tif", values(0, 1))


def masks_elsewhere(place):
    save(place / "fields/deep/a.png")
    (place / "masks/other").mkdir()
    (place / "masks/a.png").rename(place / "masks/other/a.png")


def other_value(place):
    save(place / "masks/b.png", values(0, 2))


def labels(text, encoding="utf-8"):
    def change(place):
        save(place / "fields/one/c.png")
        save(place / "fields/two/c.png")
        (place / "labels.csv").write_text(text, encoding=encoding)

    return change


def nothing_known(place):
    (place / "labels.csv").write_text("")
    (place / "masks/a.png").rename(place / "masks/z.png")


COLOURS = np.stack([values(0, 1), values(0, 1), values(0, 0)], 2)


@pytest.mark.parametrize(
    "change, flags, words",
    [
        (twice, (), ["fields/a.png", "fields/A.jpg", "rename"]),
        (sixteen_bits, (), ["fields/a.png", "16-bit"]),
        (sixteen_bit_colours, (), ["fields/a.tif", "16-bit"]),
        (cmyk, (), ["fields/a.jpg", "CMYK"]),
        (pages, (), ["fields/a.tif", "2 pages"]),
        (truncated, (), ["fields/a.png", "truncated"]),
        (no_image, (), ["fields/a.png", "image"]),
        (mask_among_fields, (), ["fields/a_mask.png", "folder of their own"]),
        (mask_of(values(0, 1, 2)), (), ["masks/a.png", "0, 1, 2", "--tumour"]),
        (mask_of(values(1, 2)), (), ["masks/a.png", "1, 2", "--tumour"]),
        (other_value, (), ["masks/b.png", "0, 2", "have 1", "--tumour"]),
        (mask_of(COLOURS), (), ["masks/a.png", "colours"]),
        (
            mask_of(values(0, 1, size=(32, 25))),
            (),
            ["fields/a.png", "masks/a.png", "32 x 24", "32 x 25"],
        ),
        (second_mask, (), ["fields/a.png", "a.png, a.tif"]),
        (masks_elsewhere, (), ["fields/a.png", "other/a.png", "subfolders"]),
        (lambda _: None, ("--tumour", 2), ["--tumour", "2", "0, 1"]),
        (labels("a,benign"), (), ["labels.csv", "line 1", "benign"]),
        (labels("name,label\na"), (), ["labels.csv", "line 2", "'a'"]),
        (labels("b,normal\nb.png,cancer"), (), ["labels.csv", "line 2", "b.png", "normal"]),
        (labels("c,normal"), (), ["labels.csv", "one/c.png, two/c.png"]),
        (labels("\u7532,normal", "gb18030"), (), ["labels.csv", "UTF-8"]),
        (labels("a,normal"), (), ["fields/a.png", "normal", "masks/a.png"]),
        (nothing_known, (), ["fields", "--labels"]),
        (lambda place: (place / "labels.csv").unlink(), (), ["labels.csv", "No such file"]),
        (lambda _: None, ("--case", "b"), ["--case b", "a.png"]),
        (lambda _: None, ("--case", "(b)?"), ["--case", "a.png"]),
        (lambda _: None, ("--case", "("), ["--case (", "regular expression"]),
        (lambda _: None, ("--mpp", 500), ["--mpp 500"]),
        (lambda _: None, ("--masks", "nowhere"), ["nowhere", "No such file"]),
    ],
)
def test_what_is_not_clear_is_refused_in_a_line_and_nothing_is_written(place, change, flags, words):
    change(place)
    line = refusal(place, *flags)
    assert all(word in line for word in words), line


def test_cancer_with_an_empty_mask_is_refused(place):
    save(place / "masks/a.png", values(0))
    (place / "labels.csv").write_text("a,cancer")
    line = refusal(place)
    assert "fields/a.png" in line and "labelled cancer" in line and "no tumour" in line


def test_masks_may_lie_below_the_fields_but_not_the_other_way_round(place):
    (place / "masks").rename(place / "fields/masks")
    status, out, err = call(images.main, *argv(place, "--masks", place / "fields/masks"))
    assert status == 0 and "2 slides" in out and err == ""
    line = one_line_of(*call(images.main, place / "fields", "o", "--mpp", 1, "--masks", place))
    assert str(place) in line and "folder of their own" in line


def test_a_folder_that_is_there_stays_as_it_is(place):
    (place / "slides").mkdir()
    (place / "slides/mine").write_text("")
    assert "slides exists" in refusal(place)


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_an_error_or_ctrl_c_while_writing_leaves_nothing(place, monkeypatch, error):
    """After a kill there may be a slides.part*, but no half `slides`, which training would read."""
    write_pages = images.synthetic.write_pages

    def stopped(path, pages, mpp):
        write_pages(path, pages, mpp)
        assert not (place / "slides").exists()
        if Path(path).stem == "b":
            raise error

    monkeypatch.setattr(images.synthetic, "write_pages", stopped)
    before = sorted(place.rglob("*"))
    with pytest.raises(type(error)):
        images.main([str(a) for a in argv(place)])
    assert sorted(place.rglob("*")) == before


def test_with_workers_it_is_the_same(place, monkeypatch):
    ok(images.main, *argv(place))
    content = [(place / f"slides/a.{suffix}").read_bytes() for suffix in ("tif", "xml")]
    monkeypatch.undo()
    shutil.rmtree(place / "slides")
    ok(images.main, *argv(place))
    assert content == [(place / f"slides/a.{suffix}").read_bytes() for suffix in ("tif", "xml")]
    shutil.rmtree(place / "slides")
    truncated(place)
    assert "fields/a.png" in refusal(place)
