"""How fast it is on this machine: reading tiles, beside libjpeg-turbo and others; both steps.

    pip install -r extras/requirements.txt                  # for reads
    python -m extras.bench reads
    python -m extras.bench index                            # tissue and table of a large slide
    python -m extras.bench steps                            # at full scale
    python -m extras.bench steps --width 16 --tile 128      # at the demo's

Times are medians. Without OpenSlide or tiffslide their columns are left out.
"""

import argparse
import itertools
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import tifffile
import torch
from PIL import Image
from torch.utils.benchmark import Timer

import data
import evaluate
import loss
import train
from extras import synthetic
from model import Network
from slide import Slide

BLOCK, SIDE = 512, 16_384  # px of a JPEG block, px of the slide
PLACES, ROUNDS = 40, 7  # places that are read in a round


def draw(path):
    """Write a slide of tissue with more blocks than readers keep decoded."""
    picture, _ = synthetic.draw_slide(np.random.default_rng(0))
    blocks = [picture[y:, x:][:BLOCK, :BLOCK] for y in (512, 1024) for x in (512, 1024)]
    blocks = itertools.islice(itertools.cycle(blocks), (SIDE // BLOCK) ** 2)
    kind = {"shape": (SIDE, SIDE, 3), "dtype": np.uint8, "tile": (BLOCK, BLOCK)}
    jpeg = {"photometric": "ycbcr", "compression": "jpeg", "compressionargs": {"level": 80}}
    tifffile.imwrite(path, blocks, **kind, **jpeg)


def readers_of(path):
    """{name: function of x, y, side in px}, first the limit: pread and libjpeg-turbo alone."""
    import imagecodecs

    page, file, slide = tifffile.TiffFile(path).pages[0], open(path, "rb"), Slide(path)

    def limit(x, y, side):
        rows, columns = (range(low // BLOCK, (low + side - 1) // BLOCK + 1) for low in (y, x))
        for row, column in itertools.product(rows, columns):
            n = row * SIDE // BLOCK + column
            raw = os.pread(file.fileno(), page.databytecounts[n], page.dataoffsets[n])
            imagecodecs.jpeg8_decode(raw, colorspace="YCBCR", outcolorspace="RGB")

    readers = {"limit": limit, "ours": lambda x, y, w: slide.read(0, x, y, w, w)}
    with suppress(ImportError):
        from openslide import OpenSlide

        one = OpenSlide(path).read_region
        readers["OpenSlide"] = lambda x, y, w: np.asarray(one((x, y), 0, (w, w)).convert("RGB"))
    with suppress(ImportError):
        from tiffslide import TiffSlide

        two = TiffSlide(path).read_region
        readers["tiffslide"] = lambda x, y, w: two((x, y), 0, (w, w), as_array=True)
    return readers


def reads(path):
    """Print the CPU time of a read; readers take turns, at new places in every round."""
    draw(path)
    readers = readers_of(path)
    print("| ms, times the limit |", " | ".join(readers), "|\n" + "|---" * (1 + len(readers)) + "|")
    for side, place in itertools.product((512, 256), ("aligned with blocks", "random")):
        ms = np.empty((ROUNDS + 1, len(readers)))
        for n in range(ROUNDS + 1):
            xy = np.random.default_rng(n).integers(0, SIDE - side, (PLACES, 2))
            xy = xy if place == "random" else xy // side * side
            for k, read in enumerate(readers.values()):
                start = time.process_time()
                for x, y in xy.tolist():
                    read(x, y, side)
                ms[n, k] = (time.process_time() - start) / PLACES * 1e3
        ms = ms[1:]  # the first round warms up
        medians = zip(np.median(ms, 0), np.median(ms / ms[:, :1], 0))
        print(f"| {side} px, {place} |", *(f"{t:.2f}, {ratio:.2f} |" for t, ratio in medians))


def draw_large(path, width=97_792, height=221_184, levels=8):
    """Write a slide of CAMELYON's size, an ellipse of tissue whose blocks share their bytes."""
    tissue, _ = synthetic.draw_slide(np.random.default_rng(0))
    tables, (block, *_) = synthetic.jpeg_tiles(Image.fromarray(tissue[700:956, 700:956]))
    side, pages, here = synthetic.TIFF_TILE, [], []
    for k in range(levels):
        rows, columns = -(-(height >> k) // side), -(-(width >> k) // side)
        y, x = np.mgrid[:rows, :columns] + 0.5
        inside = np.hypot((x / columns - 0.5) / 0.3, (y / rows - 0.5) / 0.17) < 1
        here.append(inside.ravel())
        pages.append((width >> k, height >> k, tables, [block] + [b""] * (inside.size - 1)))
    synthetic.write_pages(path, pages, mpp=0.243)
    with tifffile.TiffFile(path, mode="r+b") as tif:
        for k, inside in enumerate(here):
            for name in ("TileOffsets", "TileByteCounts"):
                tag = tif.pages[k].tags[name]
                tag.overwrite((inside * tag.value[0]).tolist())


def index(folder):
    """Print what a slide of CAMELYON's size costs before training starts, in CPU time."""
    path = Path(folder, "large.tif")
    draw_large(path)
    seconds = []
    for _ in range(4):
        start = time.process_time()
        tiles = data.tile_slides([data.Source("large", path, None, "train")])
        seconds.append(time.process_time() - start)
    print(f"{len(tiles.table)} tiles of 512 px: {np.median(seconds[1:]):.2f} s")  # 1 warms up


def step(network, adam, branch, tiles, target, way):
    with torch.autocast(tiles.device.type, torch.bfloat16, enabled=way == "--amp"):
        logits = branch(network.encode(tiles))
    train.update(adam, loss.dwce(logits, target))


def steps(width, tile, batch=8):
    """Print the time of both steps of train.py on tiles of noise: GPU time, or CPU time."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = {} if device.type == "cuda" else {"timer": time.process_time}
    tiles = torch.randint(256, (batch, 3, tile, tile), dtype=torch.uint8, device=device)
    masks = tiles[:, 0] % 2
    print(f"| width {width}, {batch} tiles of {tile} px | step 1, s | step 2, s |\n|---|---|---|")
    for way in ("as it is", "NCHW, not channels_last", "--amp"):
        network = Network(width).to(device)
        if way.startswith("NCHW"):
            network.to(memory_format=torch.contiguous_format)
        adam, seconds = torch.optim.Adam(network.parameters()), []
        for branch, target in ((network.decode, masks), (network.classify, masks[:, 0, 0])):
            names = {"step": step, "all": (network, adam, branch, tiles, target, way)}
            timer = Timer("step(*all)", globals=names, **clock)  # in one thread
            seconds.append(timer.blocked_autorange(min_run_time=10).median)
        print(f"| {way} | {seconds[0]:.3g} | {seconds[1]:.3g} |", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=evaluate.AS_WRITTEN)
    parser.add_argument("what", choices=("reads", "index", "steps"))
    parser.add_argument("--width", type=int, default=train.FULL["width"])
    parser.add_argument("--tile", type=int, default=train.FULL["tile"])
    args = parser.parse_args(argv)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{where}, torch {torch.__version__}\n")
    if args.what == "steps":
        return steps(args.width, args.tile)
    with tempfile.TemporaryDirectory() as folder:
        index(folder) if args.what == "index" else reads(f"{folder}/slide.tif")


if __name__ == "__main__":
    main()
