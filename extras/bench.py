"""How fast it is, beside peers and limits; ratios of one run, interleaved, medians of 5 or more.

    pip install -r requirements-bench.txt       # OpenSlide, tiffslide, imagecodecs
    python bench.py                             # all but dsc: 15 minutes on 2 CPU cores
    python bench.py reads masks                 # or index, network, ways, feeding
    python bench.py dsc                         # six runs of train.py: 20 minutes

The slide is drawn: 120,000 x 90,000 px as in CAMELYON, every tile one of four that are real JPEGs,
so no reader's cache of decoded tiles helps it, and reading from the disk is left out.
"""
import argparse
import gc
import itertools
import json
import multiprocessing
import os
import pickle
import platform
import statistics
import sys
import tempfile
import time
import tracemalloc
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import tifffile
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import data
import loss
import model
import predict
import synthetic
import train

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAPER, DEMO = (32, 512), (16, 128)          # width, tile
BATCH, ROUNDS, TIFF_TILE = 8, 7, 512


def interleaved(functions, rounds=ROUNDS, clock=time.perf_counter):
    """{name: function of the round} -> {name: seconds of each round}, one round to warm up."""
    seconds = {name: [] for name in functions}
    for n in range(-1, rounds):
        for name, function in functions.items():
            start = clock()
            function(n)
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            if n >= 0:
                seconds[name].append(clock() - start)
    return seconds


def ratio(a, b):
    return statistics.median(x / y for x, y in zip(a, b))


def table(*rows):
    """Markdown, the first row as head."""
    for n, row in enumerate(rows):
        print("| " + " | ".join(f"{c:.3g}" if isinstance(c, float) else str(c) for c in row) + " |")
        if not n:
            print("|" + " --- |" * len(row))
    print(flush=True)


# -------------------------------------------------------------------------------- slides and masks

def draw_large(path, width=120_000, height=90_000, levels=10):
    """A slide of CAMELYON's size in 3 MB: all tiles of a level share the bytes of four."""
    before, synthetic.TIFF_TILE = synthetic.TIFF_TILE, TIFF_TILE
    picture, _ = synthetic.draw_slide(np.random.default_rng(0))
    tables, four = synthetic.jpeg_tiles(Image.fromarray(picture[512:1536, 512:1536]))

    def pages():
        for k in range(levels):
            w, h = width >> k, height >> k
            n = -(-w // TIFF_TILE) * -(-h // TIFF_TILE)
            yield w, h, tables, (four + [b""] * n)[:n]

    synthetic.write_pages(path, pages(), 0.25)
    synthetic.TIFF_TILE = before
    with tifffile.TiffFile(path, mode="r+b") as tif:
        for k in range(levels):
            for name in ("TileOffsets", "TileByteCounts"):
                tag = tif.pages[k].tags[name]
                if tag.count > 4:
                    tag.overwrite(list(itertools.islice(itertools.cycle(tag.value[:4]), tag.count)))


def reads(path):
    """CPU time of a read at level 1, the level that training reads, at 40 new places a round."""
    import imagecodecs
    import openslide
    import tiffslide

    slide, level = data.Slide(path), 1
    lv, file = slide.levels[level], open(path, "rb")
    across, buffer = -(-lv.width // lv.tile_w), np.empty((lv.tile_h, lv.tile_w, 3), np.uint8)

    def limit(x, y, side):
        """pread and libjpeg-turbo alone, of the TIFF's tiles that are touched."""
        for row in range(y // lv.tile_h, (y + side - 1) // lv.tile_h + 1):
            for col in range(x // lv.tile_w, (x + side - 1) // lv.tile_w + 1):
                n = row * across + col
                raw = os.pread(file.fileno(), int(lv.counts[n]), int(lv.offsets[n]))
                imagecodecs.jpeg8_decode(raw, tables=lv.tables, colorspace="YCBCR",
                                         outcolorspace="RGB", out=buffer)

    one, two = openslide.OpenSlide(path), tiffslide.TiffSlide(path)
    readers = {
        "limit": limit,
        "ours": lambda x, y, side: slide.read(level, x, y, side, side),
        "openslide": lambda x, y, side: np.asarray(
            one.read_region((2 * x, 2 * y), level, (side, side)).convert("RGB")),
        "tiffslide": lambda x, y, side: two.read_region((2 * x, 2 * y), level, (side, side),
                                                        as_array=True)}
    rows = [("read", "ms", "ours / limit", "openslide / ours", "tiffslide / ours", "to reach")]
    for side, aligned, goal in ((512, True, "<= 2.0, >= 2"), (512, False, "<= 1.6, >= 1.5"),
                                (256, True, "<= 2.0, >= 1.2"), (256, False, "<= 1.6, >= 1.2")):
        def places(n, step=side if aligned else 1):
            low = np.random.default_rng((side, aligned, n + 1)).integers(
                0, (lv.width - side, lv.height - side), (40, 2))
            return (low // step * step).tolist()

        def all_places(reader):
            return lambda n: [reader(x, y, side) for x, y in places(n)]

        t = interleaved({name: all_places(r) for name, r in readers.items()},
                        clock=time.process_time)
        rows.append((f"{side} px, {'aligned' if aligned else 'random'}",
                     statistics.median(t["ours"]) / 40 * 1e3, ratio(t["ours"], t["limit"]),
                     *(ratio(t[name], t["ours"]) for name in ("openslide", "tiffslide")), goal))
    table(*rows)


def masks(path):
    """Masks of a tile, and opening the slide."""
    ring = synthetic.blob(np.random.default_rng(0), 512, 512, 350, points=10_000)
    annotation = data.Annotation([(ring, True)])
    t = interleaved({"meets": lambda n: [annotation.mask(0, 0, 512, 512, 2) for _ in range(40)],
                     "none": lambda n: [annotation.mask(9e3, 0, 512, 512, 2) for _ in range(40)],
                     "open": lambda n: [data.Slide(path) for _ in range(10)]})
    ms = {name: statistics.median(seconds) * 1e3 for name, seconds in t.items()}
    gc.collect()
    tracemalloc.start()
    slide = data.Slide(path)
    gc.collect()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    table(("what", "measured", "to reach"),
          ("mask of 512 px, a polygon of 10,000 vertices, ms", ms["meets"] / 40, "<= 1.5"),
          ("the same, no box meets it, ms", ms["none"] / 40, "<= 0.05"),
          (f"opening {slide.levels[0].width:,} x {slide.levels[0].height:,} px, warm, ms",
           ms["open"] / 10, "<= 10"),
          ("held by it, MB", held / 1e6, "<= 1.5"))


def index(path):
    """Tiles of a slide that is tissue all over, with a real annotation, anew and from a file."""
    xml = Path(__file__).parent / "tests" / "data" / "patient_010_node_4.xml"
    sources = [data.Source("large", Path(path), xml, "train")]
    cache = Path(path).with_name("index.npz")
    found = data.index_tiles(sources)
    data.write_index(found, cache)
    t = interleaved({"anew": lambda n: data.index_tiles(sources),
                     "cached": lambda n: data.index_tiles(sources, cache=cache)}, 5)
    anew, cached = (statistics.median(t[name]) for name in ("anew", "cached"))
    size = len(pickle.dumps(found))
    table(("index", "one slide", "110 slides, estimated"),
          ("anew, s", anew, 110 * anew), ("from index.npz, s", cached, 110 * cached),
          ("held, MB", size / 1e6, 110 * size / 1e6), ("tiles", len(found.tiles), "-"))


# ----------------------------------------------------------------------------------------- network

class UNet(nn.Module):
    """The yardstick: a plain U-Net of the same widths and two 3x3 conv-BN-ReLU a scale."""

    def __init__(self, width):
        super().__init__()
        c = [width * 2 ** k for k in range(4)]

        def double(i, o):
            return nn.Sequential(model.conv_bn_relu(i, o, 3), model.conv_bn_relu(o, o, 3))

        self.convs = nn.ModuleList(double(i, o) for i, o in zip([3, *c], c))
        self.ups = nn.ModuleList(nn.ConvTranspose2d(2 * i, i, 2, stride=2) for i in c[:3])
        self.fuses = nn.ModuleList(double(2 * i, i) for i in c[:3])
        self.head = nn.Conv2d(width, 2, 1)
        self.classifier = nn.Sequential(model.conv_bn_relu(c[3], c[3] // 2, 1),
                                        nn.Conv2d(c[3] // 2, 2, 1))
        self.to(memory_format=torch.channels_last)

    def encode(self, tiles):
        x, maps = tiles.float() / 127.5 - 1, []
        for k in range(4):
            x = self.convs[k](F.max_pool2d(x, 2) if k else x)
            maps.append(x)
        return maps

    def decode(self, maps):
        x = maps[3]
        for k in (2, 1, 0):
            x = self.fuses[k](torch.cat([self.ups[k](x), maps[k]], 1))
        return self.head(x)

    classify, forward = model.Network.classify, model.Network.forward


NETWORKS = {"ours": model.Network, "U-Net": UNet}


class Job:
    """A network, its Adam and a batch of noise; step 1, step 2 and a forward pass to be timed."""

    def __init__(self, network, tile, amp=False):
        self.network, self.amp = network.to(DEVICE), amp
        self.adam = torch.optim.Adam(network.parameters(), 1e-4)
        random = torch.Generator().manual_seed(0)
        self.tiles = torch.randint(256, (BATCH, 3, tile, tile), generator=random).byte().to(DEVICE)
        self.masks = torch.randint(2, (BATCH, tile, tile), generator=random).byte().to(DEVICE)
        self.labels = torch.randint(2, (BATCH,), generator=random).to(DEVICE)

    def step1(self, _=0):
        self.update(self.network.decode, self.masks)

    def step2(self, _=0):
        self.update(self.network.classify, self.labels)

    def both(self, _=0):
        self.step1(), self.step2()

    def update(self, branch, target):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.amp):
            total = loss.dwce(branch(self.network.encode(self.tiles)), target)
        self.adam.zero_grad()
        total.backward()
        self.adam.step()

    @torch.no_grad()
    def forward(self, _=0):
        self.network(self.tiles)


def resident():
    """The most memory that this process has had, GiB. (ru_maxrss begins with its parent's.)"""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2 ** 20


def peak(name, width, tile):
    """GiB that both steps take: of the GPU's memory, or of a new process beyond what it had."""
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        Job(NETWORKS[name](width), tile).both()
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 30
    Job(NETWORKS[name](4), 16).both()               # what torch itself takes
    before = resident()
    Job(NETWORKS[name](width), tile).both()
    return resident() - before


def network():
    """Both steps against the U-Net of the same widths, at the paper's batch and size, and ours."""
    for width, tile in (PAPER, DEMO):
        jobs = {name: Job(make(width), tile) for name, make in NETWORKS.items()}
        t = interleaved({(name, what): getattr(job, what) for name, job in jobs.items()
                         for what in ("step1", "step2", "forward")}, 5 if tile > 128 else 15)
        rows = [("what", *jobs, "ours / U-Net")]
        for what in ("step1", "step2", "both", "forward"):
            ours, theirs = (np.add(t[name, "step1"], t[name, "step2"]) if what == "both"
                            else t[name, what] for name in jobs)
            rows.append((f"{what}, s", statistics.median(ours), statistics.median(theirs),
                         ratio(ours, theirs)))
        figures = {"parameters": [sum(p.numel() for p in job.network.parameters())
                                  for job in jobs.values()]}
        macs = []
        for job in jobs.values():
            with FlopCounterMode(display=False) as counter:
                job.forward()
            macs.append(counter.get_total_flops() // 2 // job.tiles[:, 0].numel())
        figures["multiply-adds per px"] = macs
        del jobs, job
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1
                                 ) as pool:
            run = (lambda f, *a: f(*a)) if DEVICE.type == "cuda" else (
                lambda f, *a: pool.submit(f, *a).result())
            figures["peak memory, GiB"] = [run(peak, name, width, tile) for name in NETWORKS]
        rows += [(name, *values, values[0] / values[1]) for name, values in figures.items()]
        print(f"width {width}, {BATCH} tiles of {tile} px")
        table(*rows)


def ways():
    """Other ways to run both steps, against the one that train.py takes."""
    width, tile = PAPER if DEVICE.type == "cuda" else DEMO
    plain, compiled = model.Network(width), model.Network(width)
    plain.to(memory_format=torch.contiguous_format)
    compiled.encode, compiled.decode, compiled.classify = map(
        torch.compile, (compiled.encode, compiled.decode, compiled.classify))
    jobs = {"as it is": Job(model.Network(width), tile),
            "NCHW, not channels_last": Job(plain, tile),
            "bf16 autocast (--amp)": Job(model.Network(width), tile, amp=True),
            "torch.compile": Job(compiled, tile)}
    t = interleaved({name: job.both for name, job in jobs.items()}, 15)
    print(f"both steps, width {width}, {BATCH} tiles of {tile} px")
    table(("way", "s", "of the first"), *((name, statistics.median(s), ratio(s, t["as it is"]))
                                          for name, s in t.items()))


def feeding(path):
    """How fast workers read tiles of the large slide, and the share of time the step waits."""
    width, tile = PAPER
    source = data.Source("large", Path(path), None, "train")
    tiles = data.Tiles(data.index_tiles([source], tile))
    job, rows = Job(model.Network(width), tile), [("workers", "tiles / s", "share of waiting")]
    job.both()
    batches = 200                                   # many more than the workers read ahead
    for workers in (0, 1, 2, 4, 8):
        if workers > os.cpu_count():
            break
        loader = iter(torch.utils.data.DataLoader(
            tiles, batch_sampler=data.Batches(np.arange(len(tiles.index.tiles)), BATCH, (0, 11),
                                              range(batches + 5)),
            num_workers=workers, pin_memory=DEVICE.type == "cuda"))
        for _ in range(5):                          # the workers have started
            next(loader)
        waited, start = 0.0, time.perf_counter()
        for _ in range(batches):
            asked = time.perf_counter()
            job.tiles = next(loader)[0].to(DEVICE, non_blocking=True)
            waited += time.perf_counter() - asked
            if DEVICE.type == "cuda":
                job.step1()
                torch.cuda.synchronize()
        total = time.perf_counter() - start
        rows.append((workers, batches * BATCH / total,
                     waited / total if DEVICE.type == "cuda" else "not yet run on a GPU"))
    table(*rows)


def dsc(seeds=3):
    """Pooled test DSC of ours and of the U-Net: train.py on the synthetic slides, three epochs."""
    rows = [("network", *(f"seed {seed}" for seed in range(seeds)), "mean")]
    for name, make in NETWORKS.items():
        predict.network = lambda args: make(args.width)
        found = []
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as out:
                train.main(["--pixel-frac", "0.1", "--epochs", "3", "--seed", str(seed),
                            "--out", f"{out}/r"])
                found.append(json.loads(Path(out, "r/results.json").read_text())["dsc"])
        rows.append((name, *found, statistics.mean(found)))
    table(*rows)


PARTS = {"reads": reads, "masks": masks, "index": index, "network": network, "ways": ways,
         "feeding": feeding, "dsc": dsc}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, usage="bench.py [PART...]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parts = parser.parse_args(argv).parts or [name for name in PARTS if name != "dsc"]
    if unknown := set(parts) - set(PARTS):
        parser.error(f"{', '.join(unknown)}: give some of {', '.join(PARTS)}")
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "no GPU"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {where}; Python "
          f"{platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} "
          "threads\n")
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/large.tif"
        if {"reads", "masks", "index", "feeding"} & set(parts):
            draw_large(path)
        for name in parts:
            print(f"{name}: {PARTS[name].__doc__.strip()}\n")
            PARTS[name](*[path] * (PARTS[name].__code__.co_varnames[:1] == ("path",)))


if __name__ == "__main__":
    data.run(main)
