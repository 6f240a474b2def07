"""Reading TIFFs: every kind that scanners and converters write, and every kind of odd file."""

import io
import struct
import sys

import numpy as np
import pytest
import tifffile
from PIL import Image

import data
from extras import synthetic
from slide import DataError, Slide

BLOCK = 128


def picture(seed, width=300, height=200, glass=True):
    """Smooth colours, with one block of glass -> (height, width, 3) uint8."""
    small = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8)
    image = np.array(Image.fromarray(small).resize((width, height), Image.BICUBIC))
    if glass:
        image[:BLOCK, BLOCK : 2 * BLOCK] = 255
    return image


def halves(image, count=4):
    """An image and its halves, quarters ... -> [(height, width, 3)]."""
    return [np.array(Image.fromarray(image).reduce(2**k)) for k in range(count)]


def encode(image, space="YCbCr", marked=False):
    """A JPEG of an image; unless `marked`, its colour space stands in the TIFF's tag alone."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=90, keep_rgb=space == "RGB")
    raw = file.getvalue()
    at = -1 if marked else raw.find(b"\xff\xee")  # Aperio writes no APP14 marker
    return raw if at < 0 else raw[:at] + raw[at + 2 + int.from_bytes(raw[at + 2 : at + 4], "big") :]


def blocks(image):
    """An image -> its blocks, padded with white."""
    h, w, _ = image.shape
    image = np.pad(image, ((0, -h % BLOCK), (0, -w % BLOCK), (0, 0)), constant_values=255)
    for y in range(0, h, BLOCK):
        for x in range(0, w, BLOCK):
            yield image[y : y + BLOCK, x : x + BLOCK]


def decoded(image, space="YCbCr"):
    """What a reader must give for an image: each block through a JPEG that says what it is."""
    h, w, _ = image.shape
    across = -(-w // BLOCK)
    out = [np.asarray(Image.open(io.BytesIO(encode(b, space, True)))) for b in blocks(image)]
    rows = [np.concatenate(out[n : n + across], 1) for n in range(0, len(out), across)]
    return np.concatenate(rows)[:h, :w]


def write(path, pictures, space="YCbCr", mpp=0.25, subifds=False, sizes=None, **options):
    """Tiled JPEG pages in this order, all but the first as its SubIFDs on demand -> `path`.

    `sizes` (height, width) are what the tags say where the picture is padded to whole blocks.
    """
    with tifffile.TiffWriter(path, bigtiff=True) as tif:
        for n, image in enumerate(pictures):
            scale = {"resolution": (1e4 / mpp,) * 2, "resolutionunit": 3} if mpp else {}
            raw = (b"" if b.min() == 255 else encode(b, space) for b in blocks(image))
            tif.write(
                raw,
                shape=(*(sizes[n] if sizes else image.shape[:2]), 3),
                dtype=np.uint8,
                tile=(BLOCK, BLOCK),
                photometric="rgb",
                compression="zlib",  # tifffile writes no JPEG: the tags are put right below
                metadata=None,
                subifds=len(pictures) - 1 if subifds and not n else None,
                subfiletype=int(subifds and n > 0),
                **scale,
                **options,
            )
    patch(path, Compression=7, PhotometricInterpretation=6 if space == "YCbCr" else 2)
    return path


def every_page(tif):
    pages = [tif.pages[k] for k in range(len(tif.pages))]
    return pages + [p.pages[k] for p in pages for k in range(len(p.subifds or ()))]


def patch(path, **tags):
    with tifffile.TiffFile(path, mode="r+b") as tif:
        for page in every_page(tif):
            for name, value in tags.items():
                page.tags[name].overwrite(value)


def rename_tag(path, name, code):
    """Give a tag another number, which is to take it out."""
    with tifffile.TiffFile(path, mode="r+b") as tif:
        for page in every_page(tif):
            tif.filehandle.seek(page.tags[name].offset)
            tif.filehandle.write(struct.pack("<H", code))


def sizes_of(slide):
    return [(lv.width, lv.height, lv.downsample) for lv in slide.levels]


@pytest.fixture(params=["YCbCr", "RGB"])
def written(request, tmp_path):
    """A pyramid of 300 x 200 px with one absent block -> path, what its pixels must be."""
    image = picture(2)
    path = write(tmp_path / "a.tif", halves(image), request.param)
    return path, decoded(image, request.param)


@pytest.fixture
def slide_file(tmp_path):
    return write(tmp_path / "a.tif", halves(picture(2)))


# ------------------------------------------------------------------------------------------ pixels


def test_colours_are_those_of_the_tiff_tag_and_absent_blocks_white(written):
    """libjpeg takes Aperio's RGB blocks for YCbCr; other readers make absent blocks black."""
    path, truth = written
    slide = Slide(path)
    assert np.array_equal(slide.read(0, 0, 0, 300, 200), truth)
    assert slide.levels[0].counts[1] == 0 and (truth[:128, 128:256] == 255).all()
    assert slide.mpp == pytest.approx(0.25)
    assert [lv.downsample for lv in slide.levels] == [1, 2, 4, 8]


def marked_block(image, marker, space):
    """A JPEG with a JFIF marker, with Adobe's, or with none."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=90, keep_rgb=space == "RGB")
    raw = file.getvalue()
    for other, code in (("jfif", b"\xff\xe0"), ("adobe", b"\xff\xee")):
        at = raw.find(code)
        if other != marker and at > 0:
            raw = raw[:at] + raw[at + 2 + int.from_bytes(raw[at + 2 : at + 4], "big") :]
    assert marker is None or {"jfif": b"JFIF", "adobe": b"Adobe"}[marker] in raw
    return raw


@pytest.mark.parametrize("tag", ["RGB", "YCbCr"])
@pytest.mark.parametrize("marker, space", [("jfif", "YCbCr"), ("adobe", "RGB"), (None, None)])
def test_a_jpegs_own_marker_wins_over_the_tag(tmp_path, monkeypatch, tag, marker, space):
    """OME-TIFF of QuPath says RGB in the tag, its blocks are JFIF: violet tissue was green."""
    image, inside = picture(3, 128, 128, glass=False), space or tag
    monkeypatch.setattr(
        sys.modules[__name__], "encode", lambda block, _: marked_block(block, marker, inside)
    )
    path = write(tmp_path / "a.tif", [image], tag)
    read = Slide(path).read(0, 0, 0, 128, 128)
    assert np.abs(read.astype(int) - image).mean() < 10  # wrong colours: 50


def test_a_marker_of_the_shared_tables_is_not_the_blocks_own(tmp_path, monkeypatch):
    """libjpeg forgets it at the start of the block, then guesses; tifffile goes by the tag."""
    image, as_it_is = picture(3, 128, 128, glass=False), encode

    def numbered(*block):  # components 1, 2, 3, not R, G, B, which libjpeg knows
        raw = as_it_is(*block).replace(b"R\x11\0G\x11\0B\x11", b"\1\x11\0\2\x11\0\3\x11")
        return raw.replace(b"\3R\0G\0B", b"\3\1\0\2\0\3")

    monkeypatch.setattr(sys.modules[__name__], "encode", numbered)
    slide = Slide(write(tmp_path / "a.tif", [image], "RGB"))
    right, jfif = slide.read(0, 0, 0, 128, 128), b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"
    slide.levels[0] = slide.levels[0]._replace(tables=b"\xff\xd8" + jfif + b"\xff\xd9")
    assert np.array_equal(slide.read(0, 0, 0, 128, 128), right)
    assert np.abs(right.astype(int) - image).mean() < 10  # wrong colours: 50


def test_a_region_is_the_same_wherever_it_starts_and_white_beyond_the_edge(written):
    path, truth = written
    slide = Slide(path)
    padded = np.pad(truth, ((400, 400), (400, 400), (0, 0)), constant_values=255)
    for x, y, w, h in (
        *((0, 0, 128, 128), (100, 60, 150, 90), (-50, -70, 200, 100), (250, 150, 100, 90)),
        *((300, 0, 20, 20), (-90, 10, 80, 10), (127, 127, 2, 2), (-10, -10, 330, 230)),
        *((-300, -300, 20, 20), (350, 350, 30, 30)),
    ):
        wanted = padded[400 + y : 400 + y + h, 400 + x : 400 + x + w]
        assert np.array_equal(slide.read(0, x, y, w, h), wanted), (x, y, w, h)


def test_blocks_without_tables_decode_with_the_shared_ones(tmp_path):
    """The tables of streamtype 1 in front of the block of streamtype 2 are one whole JPEG."""
    image = picture(4, 200, 200, glass=False)
    synthetic.write_slide(tmp_path / "a", image, [])
    whole, block = io.BytesIO(), Image.new("RGB", (256, 256), "white")
    block.paste(Image.fromarray(image))
    block.save(whole, "JPEG", quality=80)
    read = Slide(tmp_path / "a.tif").read(0, 0, 0, 200, 200)
    assert np.array_equal(read, np.asarray(Image.open(whole))[:200, :200])


def test_a_damaged_block_is_named(written):
    path, _ = written
    slide = Slide(path)
    with open(path, "r+b") as file:
        file.seek(slide.levels[0].offsets[0])
        file.write(bytes(50))
    with pytest.raises(DataError, match="a.tif: block 0 at 1/1 is damaged"):
        slide.read(0, 0, 0, 10, 10)
    slide.read(0, 260, 140, 10, 10)  # another block is whole


# ------------------------------------------------------------------------------------------ levels


def test_the_largest_page_is_level_0_wherever_it_stands(tmp_path):
    """Smallest page first made level 0 of the smallest: no outline met its tile, all was normal."""
    images = halves(picture(5))
    flat = Slide(write(tmp_path / "flat.tif", images))
    other = Slide(write(tmp_path / "reversed.tif", images[::-1]))
    assert (
        sizes_of(other)
        == sizes_of(flat)
        == [
            (300, 200, 1),
            (150, 100, 2),
            (75, 50, 4),
            (38, 25, 8),
        ]
    )
    for k, (w, h, _) in enumerate(sizes_of(flat)):
        assert np.array_equal(other.read(k, 0, 0, w, h), flat.read(k, 0, 0, w, h))


def test_a_pyramid_in_subifds_equals_the_same_one_in_pages(tmp_path):
    """OME-TIFF: unread SubIFDs left level 0 alone, four times finer than what was asked for."""
    images = halves(picture(6))
    flat = Slide(write(tmp_path / "flat.tif", images))
    nested = Slide(write(tmp_path / "nested.tif", images, subifds=True))
    with tifffile.TiffFile(tmp_path / "nested.tif") as tif:
        assert len(tif.pages) == 1
    assert sizes_of(nested) == sizes_of(flat) and len(flat.levels) == 4
    for k, (w, h, _) in enumerate(sizes_of(flat)):
        assert np.array_equal(nested.read(k, 0, 0, w, h), flat.read(k, 0, 0, w, h))
    assert nested.nearest_level(1) == flat.nearest_level(1) == 2


def test_a_macro_larger_than_the_pyramid_is_refused(tmp_path):
    """It would be level 0, and the slide itself nothing but pages of another factor."""
    pages = [picture(1, 900, 310), *halves(picture(7), 3)]
    with pytest.raises(DataError, match="a.tif: only 1 of its 4 tiled pages .* 900 px wide"):
        Slide(write(tmp_path / "a.tif", pages))


def test_a_tiled_thumbnail_of_another_shape_is_no_level(tmp_path):
    pages = [*halves(picture(7), 3), picture(1, 150, 60)]
    slide = Slide(write(tmp_path / "a.tif", pages))
    assert sizes_of(slide) == [(300, 200, 1), (150, 100, 2), (75, 50, 4)]


def test_levels_by_three_are_refused(tmp_path):
    """Only halves are read; a silent 4 x finer level would train a model on other tissue."""
    pages = [picture(7, 300, 210), picture(1, 100, 70)]
    with pytest.raises(DataError, match="a.tif: only 1 of its 2 tiled pages"):
        Slide(write(tmp_path / "a.tif", pages))


def test_a_level_far_from_the_wanted_one_is_named(slide_file, capsys):
    slide = Slide(slide_file)
    assert slide.nearest_level(0.3) == 0 and not capsys.readouterr().err
    assert slide.nearest_level(0.1) == 0
    said = capsys.readouterr().err
    assert said.startswith("warning: ") and "a.tif" in said and "0.25 um/px" in said


def test_the_level_is_the_nearest_in_um_per_px_or_the_one_asked_for(slide_file):
    slide = Slide(slide_file)
    assert [slide.nearest_level(mpp) for mpp in (0.1, 0.25, 0.34, 0.37, 1, 9)] == [0, 0, 0, 1, 2, 3]
    slide.mpp = None
    assert slide.nearest_level(0.5, 1) == 1
    for level in (None, 4, -1):
        with pytest.raises(DataError, match="a.tif: no um/px.*--level, 0 to 3"):
            slide.nearest_level(0.5, level)


def test_philips_levels_are_halves_by_their_order_whatever_their_padding(tmp_path):
    """Padded to whole blocks, 640 px over the 384 px of level 1 is no ratio of 2."""
    images = halves(picture(8, 600, 350, glass=False))
    sizes = [(-(-len(i) // BLOCK) * BLOCK, -(-len(i[0]) // BLOCK) * BLOCK) for i in images]
    text = "DPUfsImport"
    slide = Slide(write(tmp_path / "a.tif", images, sizes=sizes, description=text))
    assert sizes_of(slide) == [(640, 384, 1), (320, 192, 2), (160, 96, 4), (80, 48, 8)]


# -------------------------------------------------------------------------------------- resolution

PHILIPS = (
    '<DataObject ObjectType="DPUfsImport"><Attribute Name="DICOM_PIXEL_SPACING" Group="0x0028">'
    "&quot;0.000227&quot; &quot;0.000227&quot;</Attribute></DataObject>"
)


@pytest.mark.parametrize(
    "text, mpp",
    [
        ("Aperio Image Library|AppMag = 40|MPP = 0.2527|", 0.2527),
        ("Aperio|MPP = 0,2527|", 0.2527),  # Windows in Germany
        ("Aperio|MPP=0.25", 0.25),
        ("Aperio|MPP = 0|", None),
        ("Aperio|Comment = low MPP = 9|MPP = 0.25|Original MPP = 1", 0.25),  # keys lie between |
        ("Aperio|MPP = 1.234,5|", None),  # no number: the whole slide was not readable
        (PHILIPS, 0.227),
        (PHILIPS.replace(".", ","), 0.227),
        ("", None),
    ],
)
def test_resolution_is_found_where_scanners_write_it(tmp_path, text, mpp):
    """A decimal comma was read as no resolution at all."""
    slide = Slide(write(tmp_path / "a.tif", [picture(1)], mpp=None, description=text))
    assert slide.mpp == pytest.approx(mpp)


@pytest.mark.parametrize(
    "unit, resolution, mpp",
    [
        (3, (40_000, 1), 0.25),  # per cm
        (2, (101_600, 1), 0.25),  # per inch
        (3, (72, 1), None),  # a placeholder of picture editors
        (1, (40_000, 1), None),  # no unit: a ratio alone
        (3, (0, 1), None),
        (3, (1, 0), None),
    ],
)
def test_resolution_is_in_the_unit_of_its_tag(slide_file, unit, resolution, mpp):
    patch(slide_file, ResolutionUnit=unit, XResolution=resolution)
    assert Slide(slide_file).mpp == pytest.approx(mpp)


def test_a_missing_unit_is_inch_as_tiff_has_it(slide_file):
    patch(slide_file, XResolution=(50_800, 1))
    rename_tag(slide_file, "ResolutionUnit", 297)
    assert Slide(slide_file).mpp == pytest.approx(0.5)


@pytest.mark.parametrize(
    "text, tags, mpp, other",
    [
        ("Aperio|MPP = 0.25|", {"XResolution": (10_000, 1), "YResolution": (10_000, 1)}, 0.25, "1"),
        ("", {"XResolution": (20_000, 1), "YResolution": (10_000, 1)}, 0.5, "1"),
        ("Aperio|MPP = 0.25|", {"XResolution": (72, 1), "YResolution": (72, 1)}, 0.25, None),
        ("", {}, 0.25, None),
    ],
)
def test_two_resolutions_that_differ_are_both_named(tmp_path, capsys, text, tags, mpp, other):
    """A resized .svs keeps the text of the original: four times too fine."""
    path = write(tmp_path / "a.svs", [picture(1)], description=text)
    patch(path, **tags)
    assert Slide(path).mpp == pytest.approx(mpp)
    said = capsys.readouterr().err
    assert (f"a.svs: {mpp:g} um/px is used; its index also says {other}" in said) == bool(other)


def test_aperios_text_is_read_whatever_else_is_in_it(tmp_path):
    """KFBIO's exports have a byte that is no ASCII: their resolution was lost."""
    text = b"Aperio \xb5 KFBIO|AppMag = 20|MPP = 0.48|"
    tags = [(270, 2, len(text) + 1, text + b"\0", True)]
    path = write(tmp_path / "a.svs", [picture(1)], mpp=None, extratags=tags)
    assert Slide(path).mpp == pytest.approx(0.48)


@pytest.mark.parametrize("text", [b"scanned at 5 \xb5m", b"\x81\xff\xfe \x00 \x8d", b"\xc3"])
def test_a_description_that_is_no_ascii_loses_only_itself(tmp_path, text):
    tags = [(270, 2, len(text) + 1, text + b"\0", True)]
    slide = Slide(write(tmp_path / "a.tif", [picture(1)], extratags=tags))
    assert slide.mpp == pytest.approx(0.25)


# ------------------------------------------------------------------------- files that are no slides


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_file_fails_at_open_not_at_tile_10_000(slide_file, share, tmp_path):
    raw = slide_file.read_bytes()
    (tmp_path / "cut.tif").write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(DataError, match="cut.tif"):
        Slide(tmp_path / "cut.tif")


def test_a_file_cut_after_a_page_is_truncated_not_a_smaller_pyramid(slide_file, tmp_path):
    """libtiff writes every page behind its blocks: a cut file opens, with fewer levels."""
    raw = slide_file.read_bytes()
    with tifffile.TiffFile(slide_file) as tif:
        starts = [tif.pages[k].offset for k in range(1, len(tif.pages))]
    for start in starts:
        (tmp_path / "cut.tif").write_bytes(raw[:start])
        with pytest.raises(DataError, match="cut.tif: truncated"):
            Slide(tmp_path / "cut.tif")


def test_a_cyclic_chain_of_pages_ends(slide_file):
    """`for page in tif.pages` never does."""
    raw = bytearray(slide_file.read_bytes())
    with tifffile.TiffFile(slide_file) as tif:
        first, last = tif.pages[0].offset, tif.pages[len(tif.pages) - 1].offset
    (tags,) = struct.unpack_from("<Q", raw, last)
    struct.pack_into("<Q", raw, last + 8 + 20 * tags, first)
    slide_file.write_bytes(raw)
    try:
        assert len(Slide(slide_file).levels) == 4
    except DataError as error:
        assert "a.tif" in str(error)


@pytest.mark.parametrize(
    "name, found, options",
    [
        ("striped", "striped", {}),
        ("deflate", "DEFLATE", {"tile": (32, 32), "compression": "zlib"}),
        ("plain", "NONE", {"tile": (32, 32)}),
    ],
)
def test_other_kinds_of_tiff_are_refused_with_what_they_are(tmp_path, name, found, options):
    path, image = tmp_path / f"{name}.tif", np.zeros((64, 64, 3), np.uint8)
    tifffile.imwrite(path, image, photometric="rgb", **options)
    with pytest.raises(DataError, match=f"{name}.tif.*{found}.*; convert it"):
        Slide(path)


@pytest.mark.parametrize("raw", [b"no picture", b"", b"II*\0", b"\x89PNG\r\n\x1a\n", None])
def test_text_and_empty_and_missing_files_are_named(tmp_path, raw):
    if raw is not None:
        (tmp_path / "other.tif").write_bytes(raw)
    with pytest.raises(DataError, match="other.tif") as caught:
        Slide(tmp_path / "other.tif")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("code, name", [(33005, "JP2000"), (5, "LZW"), (50001, "WEBP")])
def test_other_codecs_are_refused_by_their_name(slide_file, code, name):
    patch(slide_file, Compression=code)
    with pytest.raises(DataError, match=f"a.tif.*{name}"):
        Slide(slide_file)


@pytest.mark.parametrize("tag", ["ImageWidth", "ImageLength", "TileWidth", "TileLength"])
@pytest.mark.parametrize("size", [0, 10**9])
def test_sizes_that_cannot_be_are_refused_before_memory_is_taken(slide_file, tag, size):
    patch(slide_file, **{tag: size})
    with pytest.raises(DataError, match="a.tif"):
        Slide(slide_file)


def test_a_slide_whose_smallest_level_is_huge_is_refused_not_read(tmp_path):
    """One level of 10^9 px, almost all of it absent: its tissue would need gigabytes."""
    path = write(tmp_path / "a.tif", [picture(1)])
    slide = Slide(path)
    slide.levels[0] = slide.levels[0]._replace(width=10**5, height=10**4)
    with pytest.raises(DataError, match="a.tif: its smallest level"):
        data.tissue_share(slide, 0, 64)
