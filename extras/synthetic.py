"""CAMELYON-shaped slides drawn on the spot: a JPEG pyramid TIFF and an ASAP XML each.

    python -m extras.synthetic my_slides         # 30 training and 10 test slides, 44 MB, a minute

Lymph-node tissue seen at 0.5 um/px: small dark lymphocytes; larger, paler, irregular tumour nuclei
in lesions from a few cells to half a millimetre; germinal centres, which look a little like tumour;
vessels and fat as holes; stroma; a stain of its own for every slide. Large lesions have islands of
lymphocytes, outlined as exclusions; tiles without tissue are absent from the file. Only drawings.
"""

import hashlib
import io
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image, ImageDraw, ImageFilter

from data import progress
from extras.outline import write_annotation
from slide import Annotation, DataError

MPP, TIFF_TILE, LEVELS = 0.5, 256, 4
LYMPHOCYTE, BENIGN, TUMOUR = range(3)
#            spacing, radius (px), irregularity, haematoxylin of the nuclei, cytoplasm
CELLS = {
    LYMPHOCYTE: (15, 5.0, 0.08, 1.00, 0.30),
    BENIGN: (18, 6.5, 0.10, 0.70, 0.26),
    TUMOUR: (24, 8.5, 0.26, 0.66, 0.20),
}


def smooth_noise(rng, side, grain):
    """A smooth random field with features of about `grain` px: (side, side) float, mean 0, sd 1."""
    coarse = Image.fromarray(rng.standard_normal((side // grain + 3,) * 2).astype(np.float32))
    field = np.asarray(coarse.resize((side + 2 * grain,) * 2, Image.BICUBIC))
    field = field[grain:-grain, grain:-grain]
    return (field - field.mean()) / field.std()


def blob(rng, x, y, radius, roughness=0.25, points=60):
    """A closed wobbly outline around (x, y): (points, 2) level-0 pixels."""
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    wave = sum(
        rng.normal(0, roughness / k) * np.cos(k * angle + rng.uniform(0, 7)) for k in range(2, 7)
    )
    r = radius * np.exp(np.clip(wave, -0.6, 0.6))
    return np.stack([x + r * np.cos(angle), y + r * np.sin(angle)], 1).round(1)


def draw_slide(rng, side=2048, tumour=True):
    """A slide -> its picture (side, side, 3) uint8 and outlines [(xy, kind)]."""
    yy, xx = np.mgrid[:side, :side].astype(np.float32) / side - 0.5
    tissue = 0.55 - 1.5 * np.hypot(xx, yy) ** 1.5 + 0.10 * smooth_noise(rng, side, side // 6) > 0
    tissue &= smooth_noise(rng, side, side // 14) < 2.1  # sinuses, vessels
    inside = np.argwhere(tissue)[:, ::-1]

    outlines, benign = [], []
    if tumour:
        for _ in range(rng.integers(5, 14)):  # lesions
            x, y = inside[rng.integers(len(inside))]
            radius = side * np.exp(rng.uniform(np.log(0.02), np.log(0.22)))
            shape = blob(rng, x, y, radius)
            columns, rows = shape.round().astype(int).clip(0, side - 1).T
            if tissue[rows, columns].mean() < 0.95:
                continue  # nobody outlines glass
            outlines.append((shape, "tumour"))
            if radius > 0.09 * side:  # an island of lymphocytes
                x, y = (x, y) + rng.normal(0, 0.2 * radius, 2)
                outlines.append((blob(rng, x, y, 0.3 * radius), "exclusion"))
    for _ in range(rng.integers(4, 10)):  # germinal centres: the distractors
        x, y = inside[rng.integers(len(inside))]
        benign.append((blob(rng, x, y, side * rng.uniform(0.03, 0.08), 0.12), "tumour"))

    kind = np.full((side, side), LYMPHOCYTE, np.uint8)
    kind[Annotation(benign).mask(0, 0, side, side) == 1] = BENIGN
    kind[Annotation(outlines).mask(0, 0, side, side) == 1] = TUMOUR
    stroma = (np.abs(smooth_noise(rng, side, side // 10)) < 0.12) & (kind != BENIGN)

    nuclei = Image.new("L", (side, side))
    pen, angle = ImageDraw.Draw(nuclei), np.linspace(0, 2 * np.pi, 10, endpoint=False)
    for cell, (spacing, radius, irregular, dark, _) in CELLS.items():
        grid = np.mgrid[0:side:spacing, 0:side:spacing].reshape(2, -1).astype(float)
        grid += rng.normal(0, 0.28 * spacing, grid.shape)
        x, y = grid.round().astype(int).clip(0, side - 1)
        here = tissue[y, x] & (kind[y, x] == cell)
        here &= rng.random(len(x)) > 0.1 + 0.75 * stroma[y, x]
        for x, y in zip(x[here].tolist(), y[here].tolist()):
            r = radius * rng.uniform(0.75, 1.3) * np.exp(rng.normal(0, irregular, 10))
            # An ellipse of random stretch and turn, in the complex plane.
            outline = r * (np.cos(angle) + 1j * rng.uniform(0.75, 1.0) * np.sin(angle))
            outline = outline * np.exp(1j * rng.uniform(0, np.pi)) + complex(x, y)
            pen.polygon(outline.view(float).tolist(), fill=int(255 * dark * rng.uniform(0.75, 1.0)))
    nuclei = np.asarray(nuclei.filter(ImageFilter.GaussianBlur(0.8)), np.float32) / 255

    # Optical density is the stains' sum (Beer-Lambert): haematoxylin in nuclei, eosin around them.
    cytoplasm = Image.fromarray(np.float32([CELLS[k][4] for k in range(3)])[kind])
    cytoplasm = np.asarray(cytoplasm.reduce(16).resize((side, side)))  # no sharp edges
    eosin = (cytoplasm + 0.35 * stroma) * (1 - 0.7 * nuclei) + 0.05 * smooth_noise(rng, side, 8)
    haematoxylin = nuclei * (0.9 + 0.1 * smooth_noise(rng, side, 4)) + 0.25 * cytoplasm
    strength = np.exp(rng.normal(0, [0.25, 0.30]))  # every slide has another stain
    stains = np.array([[0.65, 0.70, 0.29], [0.27, 0.92, 0.30]]) + rng.normal(0, 0.08, (2, 3))
    density = np.stack([haematoxylin * strength[0] * 1.3, eosin.clip(0) * strength[1] * 1.6], 2)
    density *= tissue[..., None]
    light = 244 * np.exp(-density.astype(np.float32) @ stains.clip(0.05).astype(np.float32))
    picture = light + 3 * rng.standard_normal((side, side, 1), np.float32)
    return picture.clip(0, 255).astype(np.uint8), outlines


def write_slide(path, picture, shapes, mpp=MPP):
    """Write `path`.tif, a BigTIFF pyramid of YCbCr JPEG tiles (absent where white), and .xml."""
    path = Path(path)
    images = (Image.fromarray(picture).reduce(2**level) for level in range(LEVELS))
    write_pages(
        path.with_suffix(".tif"), ((im.width, im.height, *jpeg_tiles(im)) for im in images), mpp
    )
    if shapes:
        write_annotation(path.with_suffix(".xml"), shapes)


def write_pages(path, pages, mpp):
    """Pages (width, height, JPEG tables, JPEG tiles), each half as large -> a BigTIFF pyramid."""
    with tifffile.TiffWriter(path, bigtiff=True) as tif:
        for level, (width, height, tables, tiles) in enumerate(pages):
            # tifffile writes no JPEG: give it the bytes as zlib's, then put the tags right.
            tif.write(
                iter(tiles),
                shape=(height, width, 3),
                dtype=np.uint8,
                tile=(TIFF_TILE, TIFF_TILE),
                photometric="rgb",
                compression="zlib",
                subfiletype=int(level > 0),
                resolution=(1e4 / mpp / 2**level,) * 2,
                resolutionunit="CENTIMETER",
                metadata=None,
                extratags=[(347, 7, len(tables), tables, True)],
            )
    with tifffile.TiffFile(path, mode="r+b") as tif:
        for k in range(len(tif.pages)):
            tif.pages[k].tags["Compression"].overwrite(7)
            tif.pages[k].tags["PhotometricInterpretation"].overwrite(6)


def jpeg_tiles(image, quality=80, white=200):
    """An RGB image -> the tables that its JPEG tiles share, the tiles; b"" if all >= `white`."""
    tables, tiles = io.BytesIO(), []
    image.save(tables, "JPEG", quality=quality, streamtype=1)
    for y in range(0, image.height, TIFF_TILE):
        for x in range(0, image.width, TIFF_TILE):
            tile = Image.new("RGB", (TIFF_TILE, TIFF_TILE), "white")
            right, below = min(x + TIFF_TILE, image.width), min(y + TIFF_TILE, image.height)
            tile.paste(image.crop((x, y, right, below)))
            data = io.BytesIO()
            if np.asarray(tile).min() < white:
                tile.save(data, "JPEG", quality=quality, streamtype=2)
            tiles.append(data.getvalue())
    return tables.getvalue(), tiles


def make(folder, train=30, test=10, side=2048, seed=0):
    """Draw slides into the new `folder`, every sixth without tumour -> `folder`."""
    folder = Path(folder)
    if folder.exists():
        raise DataError(f"{folder} exists; name a new folder")
    part = Path(f"{folder}.part{os.getpid()}")  # renamed when complete
    for split in ("train", "test"):
        (part / split).mkdir(parents=True)
    jobs = [(part / "train", n, side, seed) for n in range(train)]
    jobs += [(part / "test", train + n, side, seed) for n in range(test)]
    with ProcessPoolExecutor() as pool:
        for _ in progress(pool.map(make_one, jobs), "drawing slides", len(jobs)):
            pass
    try:
        part.rename(folder)
    except OSError:
        shutil.rmtree(part)  # another run drew them in the meantime
    return folder


def make_one(job):
    folder, n, side, seed = job
    tumour = n % 6 != 5
    name = f"{'synthetic' if tumour else 'normal'}_{n:03}"
    write_slide(folder / name, *draw_slide(np.random.default_rng((seed, n)), side, tumour))


def cached():
    """The default slides, drawn once into .cache/ beside extras/, anew when this file changes."""
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    folder = Path(__file__).resolve().parents[1] / ".cache" / f"synthetic-{version}"
    return folder if folder.is_dir() else make(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m extras.synthetic FOLDER")
    print(f"slides are in {make(sys.argv[1])}")
