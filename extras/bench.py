"""How fast it is, beside peers and limits; ratios of one run, interleaved, medians of 5 or more.

    pip install -r extras/requirements-bench.txt            # for reads: OpenSlide, tiffslide, ...
    python -m extras.bench                                  # all; network is slow without a GPU
    python -m extras.bench reads masks                      # or network, ways, feeding

The slide is drawn: 120,000 x 90,000 px as in CAMELYON, every JPEG block one of four that are real,
so no reader's cache of decoded blocks helps it, and reading from the disk is left out.
"""

import argparse
import itertools
import multiprocessing
import os
import platform
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import tifffile
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import data
import evaluate
import loss
import train
from extras import synthetic
from model import Network, conv_bn_relu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAPER, DEMO = ((scale["width"], scale["tile"]) for scale in (train.PAPER, train.DEMO))
BATCH, BLOCK = 8, 512


def interleaved(functions, rounds=7, clock=time.perf_counter):
    """{name: function of the round} -> {name: (rounds,) seconds}, one round more to warm up."""
    seconds = {name: [] for name in functions}
    for n in range(rounds + 1):
        for name, function in functions.items():
            start = clock()
            function(n)
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(clock() - start)
    return {name: np.array(taken[1:]) for name, taken in seconds.items()}


def table(*rows):
    """Markdown, the first row as head."""
    for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]):
        print("|", *(f"{c:.3g} |" if isinstance(c, float) else f"{c} |" for c in row))
    print(flush=True)


def draw_large(path, width=120_000, height=90_000, levels=10):
    """Write a slide of CAMELYON's size in 3 MB: all blocks of a level share the bytes of four."""
    before, synthetic.TIFF_TILE = synthetic.TIFF_TILE, BLOCK
    picture, _ = synthetic.draw_slide(np.random.default_rng(0))
    tables, four = synthetic.jpeg_tiles(Image.fromarray(picture[512:1536, 512:1536]))
    sizes = [(width >> k, height >> k) for k in range(levels)]
    counts = [-(-w // BLOCK) * -(-h // BLOCK) for w, h in sizes]
    pages = ((*s, tables, (four + [b""] * n)[:n]) for s, n in zip(sizes, counts))
    synthetic.write_pages(path, pages, 0.25)
    synthetic.TIFF_TILE = before
    with tifffile.TiffFile(path, mode="r+b") as tif:
        for k, name in itertools.product(range(levels), ("TileOffsets", "TileByteCounts")):
            tag = tif.pages[k].tags[name]
            if tag.count > 4:
                tag.overwrite(list(itertools.islice(itertools.cycle(tag.value[:4]), tag.count)))


def reads(path):
    """CPU time of a read at level 1, the one that training reads, at 40 new places a round."""
    import imagecodecs
    import openslide
    import tiffslide

    slide = data.Slide(path)
    lv, file = slide.levels[1], open(path, "rb")
    across, buffer = -(-lv.width // BLOCK), np.empty((BLOCK, BLOCK, 3), np.uint8)
    colours = {"colorspace": "YCBCR", "outcolorspace": "RGB"}
    one, two = openslide.OpenSlide(path), tiffslide.TiffSlide(path)

    def limit(x, y, side):
        """pread and libjpeg-turbo alone, of the blocks that are touched."""
        rows, columns = (range(low // BLOCK, (low + side - 1) // BLOCK + 1) for low in (y, x))
        for row, column in itertools.product(rows, columns):
            n = row * across + column
            raw = os.pread(file.fileno(), int(lv.counts[n]), int(lv.offsets[n]))
            imagecodecs.jpeg8_decode(raw, tables=lv.tables, out=buffer, **colours)

    def openslide_(x, y, side):
        return np.asarray(one.read_region((2 * x, 2 * y), 1, (side, side)).convert("RGB"))

    def tiffslide_(x, y, side):
        return two.read_region((2 * x, 2 * y), 1, (side, side), as_array=True)

    def ours(x, y, side):
        return slide.read(1, x, y, side, side)

    rows = [("read", "ms", "ours / limit", "openslide / ours", "tiffslide / ours")]
    for side, aligned in itertools.product((512, 256), (True, False)):

        def at_places(n, read, side=side, step=side if aligned else 1):
            rng = np.random.default_rng((side, step, n))
            places = rng.integers(0, (lv.width - side, lv.height - side), (40, 2))
            for x, y in (places // step * step).tolist():
                read(x, y, side)

        readers = {f: partial(at_places, read=f) for f in (limit, ours, openslide_, tiffslide_)}
        t = interleaved(readers, clock=time.process_time)
        ratios = t[ours] / t[limit], t[openslide_] / t[ours], t[tiffslide_] / t[ours]
        medians = map(float, map(np.median, (t[ours] / 40 * 1e3, *ratios)))
        rows.append((f"{side} px, {'aligned with blocks' if aligned else 'random'}", *medians))
    table(*rows)


def masks(path):
    """CPU time of a mask of 512 px, of opening a slide, and of finding its tiles, all tissue."""
    ring = synthetic.blob(np.random.default_rng(0), 512, 512, 350, points=10_000)
    annotation, source = data.Annotation([(ring, True)]), data.Source("", path, None, "train")
    jobs = {
        "mask, polygon of 10,000 vertices": lambda n: annotation.mask(0, 0, 512, 512, 2),
        "mask, no box meets it": lambda n: annotation.mask(9e3, 0, 512, 512, 2),
        "opening 120,000 x 90,000 px": lambda n: data.Slide(path),
        "tile_slides of it, 512 px at 0.5 um/px": lambda n: data.tile_slides([source]),
    }
    t = interleaved(jobs, 9, time.process_time)
    table(("what", "ms"), *((name, float(1e3 * np.median(t[name]))) for name in jobs))


class UNet(Network):
    """The yardstick: as wide, with two 3x3 conv-BN-ReLU a scale for ESP, PSP and 1x1 fuse."""

    def __init__(self, width):
        super().__init__(width)
        c = [width * 2**k for k in range(4)]
        fuses = (nn.Sequential(conv_bn_relu(2 * i, i, 3), conv_bn_relu(i, i, 3)) for i in c[:3])
        self.esps = nn.ModuleList(conv_bn_relu(i, i, 3) for i in c)
        self.psps = nn.ModuleList(nn.Identity() for _ in c)
        self.ups = nn.ModuleList(nn.ConvTranspose2d(2 * i, i, 2, stride=2) for i in c[:3])
        self.fuses = nn.ModuleList(fuses)
        self.to(memory_format=torch.channels_last)


class Job:
    """A network, its Adam and a batch of noise; step 1, step 2 and a forward pass to be timed."""

    def __init__(self, network, tile, amp=False):
        self.network, random = network.to(DEVICE), torch.Generator().manual_seed(0)
        self.adam = torch.optim.Adam(network.parameters(), 1e-4)
        self.autocast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=amp)
        self.tiles = torch.randint(256, (BATCH, 3, tile, tile), generator=random).byte().to(DEVICE)
        self.masks = torch.randint(2, (BATCH, tile, tile), generator=random).byte().to(DEVICE)
        self.labels = torch.randint(2, (BATCH,), generator=random).to(DEVICE)

    def step1(self, _=0):
        self.step(self.network.decode, self.masks)

    def step2(self, _=0):
        self.step(self.network.classify, self.labels)

    def step(self, branch, target):
        with self.autocast:
            logits = branch(self.network.encode(self.tiles))
        train.update(self.adam, loss.dwce(logits, target))

    def both(self, _=0):
        self.step1()
        self.step2()

    @torch.no_grad()
    def forward(self, _=0):
        self.network(self.tiles)

    def figures(self):
        """Number of parameters, multiply-adds per pixel of a forward pass."""
        with FlopCounterMode(display=False) as counter:
            self.forward()
        macs = counter.get_total_flops() // 2 // self.tiles[:, 0].numel()
        return sum(p.numel() for p in self.network.parameters()), macs


NETWORKS = {"ours": Network, "U-Net": UNet}


def peak(name, width, tile):
    """GiB that both steps take: of the GPU's memory, or of a new process beyond what it had."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        Job(NETWORKS[name](width), tile).both()
        return (torch.cuda.max_memory_allocated() - before) / 2**30

    def resident():  # ru_maxrss begins with the parent's
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20

    Job(NETWORKS[name](4), 16).both()  # what torch itself takes
    before = resident()
    Job(NETWORKS[name](width), tile).both()
    return resident() - before


def network():
    """Both steps against the U-Net of the same widths, at the paper's scale and the demo's."""
    for width, tile in (PAPER, DEMO):
        jobs = {name: Job(make(width), tile) for name, make in NETWORKS.items()}
        whats = "step1", "step2", "both", "forward"
        calls = {(name, w): getattr(job, w) for name, job in jobs.items() for w in whats}
        t = interleaved(calls, 5 if tile > 128 else 15)
        rows = [(f"width {width}, {BATCH} tiles of {tile} px", *jobs, "ours / U-Net")]
        for w in whats:
            a, b = t["ours", w], t["U-Net", w]
            rows.append((f"{w}, s", *map(float, map(np.median, (a, b, a / b)))))
        figures = [job.figures() for job in jobs.values()]
        del jobs, calls
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:
            gib = [pool.submit(peak, name, width, tile).result() for name in NETWORKS]
        names = "parameters", "multiply-adds per px", "peak memory, GiB"
        figures = [*zip(*figures), gib]
        table(*rows, *((k, a, b, a / b) for k, (a, b) in zip(names, figures)))


def ways():
    """Other ways to run both steps, against the one that train.py takes."""
    width, tile = PAPER if DEVICE.type == "cuda" else DEMO
    nchw, compiled = Network(width).to(memory_format=torch.contiguous_format), Network(width)
    for name in ("encode", "decode", "classify"):
        setattr(compiled, name, torch.compile(getattr(compiled, name)))
    jobs = {
        "as it is": Job(Network(width), tile),
        "NCHW, not channels_last": Job(nchw, tile),
        "bf16 autocast (--amp)": Job(Network(width), tile, amp=True),
        "torch.compile": Job(compiled, tile),
    }
    t = interleaved({name: job.both for name, job in jobs.items()}, 15)
    rows = [(k, *map(float, (np.median(s), np.median(s / t["as it is"])))) for k, s in t.items()]
    table((f"both steps, width {width}, {BATCH} tiles of {tile} px", "s", "of the first"), *rows)


def feeding(path, count=200):
    """How fast workers read tiles of the large slide, and the share of time that the GPU waits."""
    width, tile = PAPER
    tiles = data.tile_slides([data.Source("large", Path(path), None, "train")], tile)
    job, rows = Job(Network(width), tile), [("workers", "tiles / s", "share of waiting")]
    for workers in (w for w in (0, 1, 2, 4, 8) if w <= os.cpu_count()):
        keys = data.batches(np.arange(len(tiles.table)), BATCH, (0, 11), 0, count + 5)
        loader = data.load(tiles, keys, DEVICE, workers)
        for _ in range(5):  # the workers have started
            next(loader)
        waited, start = 0.0, time.perf_counter()
        for _ in range(count):  # many more than the workers read ahead
            asked = time.perf_counter()
            job.tiles = next(loader)[0]
            waited += time.perf_counter() - asked
            if DEVICE.type == "cuda":
                job.step1()
                torch.cuda.synchronize()
        total = time.perf_counter() - start
        share = waited / total if DEVICE.type == "cuda" else "not yet run on a GPU"
        rows.append((workers, count * BATCH / total, share))
    table(*rows)


PARTS = {part.__name__: part for part in (reads, masks, network, ways, feeding)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=evaluate.AS_WRITTEN)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parts = parser.parse_args(argv).parts or PARTS
    if unknown := set(parts) - set(PARTS):
        raise data.DataError(f"{', '.join(unknown)}: give some of {', '.join(PARTS)}")
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "no GPU"
    threads = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {where}; {threads}\n")
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/large.tif"
        draw_large(path)
        for name in parts:
            print(f"{name}: {PARTS[name].__doc__}\n")
            PARTS[name](*[path] * (name in ("reads", "masks", "feeding")))


if __name__ == "__main__":
    main()
