"""A folder of slides in, batches out: slides -> tissue -> tiles -> whose labels -> batches.

    sources = find_slides("CAMELYON16")                         # slides, annotations, the split
    tiles = tile_slides(sources)                                # all tissue tiles
    pool, mask_rows, label_rows = choose_labels(tiles, pixel_frac=0.1, image_frac=1)
    image, mask, label = tiles[0, 0]                            # row 0, turn 0: as it is

Places of tiles are in level-0 pixels, their sides in pixels of the level that is read.
"""

import csv
import hashlib
import math
import multiprocessing
import os
import re
import signal
import sys
import time
import unicodedata
from collections import namedtuple
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import ImageChops

from slide import REGIONS, Annotation, DataError, Slide, read_annotation, read_shapes, warn

NO_SLIDES = "_mask", "_likelihood_map"  # ends of stems: CAMELYON16's masks, predictions
OTHER_FORMATS = ".ndpi .mrxs .scn .bif .czi .dcm .vsi .vms .svslide .qptiff .btf .tf8".split()
LABEL_TABLES = "stage_labels.csv", "stages.csv", "reference.csv"  # of CAMELYON16 and 17
TISSUE_SHARE, CANCER_SHARE = 0.1, 0.05  # less tissue: dropped; more tumour: labelled cancer
COVERED = 0.5  # a tile has a mask, or a region's label, if at least this share of it is inside
CANCER, NORMAL, AMBIGUOUS = 1, 0, -1  # image-level labels; AMBIGUOUS never trains the head
# CAMELYON16 slides on which not every metastasis is outlined, or withdrawn, by its authors' lists.
NUMBERS = 10, 15, 18, 20, 25, 29, 33, 34, 44, 46, 51, 54, 55, 56, 67, 79, 85, 92, 95, 110
# Deviation: the paper names CAMELYON17; here it is 16, because only 16 has 110 tumour slides.
INCOMPLETE = {f"tumor_{n:03}" for n in NUMBERS} | {"test_114", "normal_086", "test_049"}
# A slide to use: its path below the data folder and in full, its XML or None, "train" or "test".
Source = namedtuple("Source", "name path xml split")
# A tile: number of its slide, x and y in level-0 px, level, whether it is to train on, share of
# tumour in the known px (nan if none is), image-level label, share of known px (1 without regions).
TILE = "slide int, x int, y int, level int, train bool, tumour float, label int, known float"
TILE = np.dtype([tuple(field.split()) for field in TILE.split(", ")])


def progress(items, what, total=None):
    """Yield from `items`, with a line of the time left on a terminal; quiet elsewhere."""
    total, start = len(items) if total is None else total, time.time()
    for n, item in enumerate(items, 1):
        yield item
        if sys.stderr.isatty():
            left = (total - n) * (time.time() - start) / n
            line = f"\r{what} {n}/{total}  {left:.0f} s left \033[K"
            print(line, end="\n" if n == total else "", file=sys.stderr)


def find_slides(root, seed=0):
    """Slides below the folder `root`, with annotation and split -> [Source].

    A slide is used if it has an XML of its name, is called normal, normal_001 or the like, or is
    normal by a table (see `label_tables`); others are named in a warning. Folders train* and test*
    are the split where both hold such slides, else it is drawn with `seed`.
    """
    try:
        files = sorted(walk(Path(root), set()))
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}; give a folder to read") from None
    paths = [f for f in files if f.suffix.lower() in (".tif", ".tiff", ".svs")]
    paths = [f for f in paths if not stem(f).endswith(NO_SLIDES)]
    if not paths:
        raise DataError(f"{root}: no .tif, .tiff, .svs slides; convert others, see docs/files.md")
    normal_by_table = label_tables(files, paths)
    xml_of = match_annotations(paths, [f for f in files if f.suffix.lower() == ".xml"])
    shared, sources = os.path.commonpath([f.parent for f in paths]), []
    left_out = [str(f.relative_to(root)) for f in files if f.suffix.lower() in OTHER_FORMATS]
    for path in paths:
        name = path.relative_to(root).as_posix()
        normal = normal_by_table.get(path, re.match("normal([^a-z]|$)", stem(path)))
        split = re.search("(^|/)(train|test)[^/]*/", path.relative_to(shared).as_posix().lower())
        if path in xml_of or normal:
            sources.append(Source(name, path, xml_of.get(path), split[2] if split else ""))
        else:
            left_out.append(name)
    for source in sources:
        if source.xml and source.path in normal_by_table:
            normal, kinds = normal_by_table[source.path], {k for _, k, _ in read_shapes(source.xml)}
            if normal and kinds & {"tumour", "cancer region"} or not (normal or kinds):
                raise DataError(f"{source.xml}: disagrees with a label table; mend one of them")
    if {"train", "test"} <= {s.split for s in sources}:
        print("split: the folders train* and test*")
        left_out += [s.name for s in sources if not s.split]
        sources = [s for s in sources if s.split]
    else:
        print(f"split: drawn with seed {seed}, by patient where names have one, else by slide")
        sources = seeded_split(sources, seed)
    train, test = ({patient(s) for s in sources if s.split == side} for side in ("train", "test"))
    incomplete = [s.name for s in sources if stem(s.path) in INCOMPLETE]
    warn("slides left out: of another format, without XML, or outside train and test", left_out)
    warn("patients are both in train and in test", sorted(train & test))
    warn("slides are withdrawn or not outlined in full; 'normal' tiles may be tumour", incomplete)
    return sources


def walk(folder, seen):
    """Yield the files below `folder` but hidden ones; links are followed, no folder comes twice."""
    if folder.resolve() not in seen:  # os.walk does not end where two links point at each other
        seen.add(folder.resolve())
        inside = [path for path in folder.iterdir() if path.name[0] != "."]
        for path in sorted(inside, key=lambda path: (path.is_symlink(), path)):
            yield from walk(path, seen) if path.is_dir() else [path]


def stem(path):
    """The name of a file without extension, lower case; .ome.tif is one extension, as in QuPath."""
    name = unicodedata.normalize("NFC", path.name.lower())  # macOS writes accents in another form
    return re.sub(r"(\.ome)?\.[^.]*$", "", name)


def label_tables(files, slides):
    """{slide: whether it is normal by the LABEL_TABLES above it}; DataError if rows disagree."""
    normal = {}
    for file in files:
        if file.name.lower() in LABEL_TABLES:
            text, labels = file.read_text("utf-8-sig", "replace").lower(), {}
            for row in csv.reader(re.sub("[;\t]", ",", text).splitlines(), skipinitialspace=True):
                if len(row) > 1 and row[1].strip():
                    name = re.sub(r"\.(tiff?|svs)$", "", row[0].strip()) + ".tif"
                    is_normal = row[1].strip() in ("negative", "normal")
                    if labels.setdefault(stem(Path(name)), is_normal) != is_normal:
                        raise DataError(f"{file}: {row[0]} is normal and not; remove one row")
            for slide in slides:
                if file.parent in slide.parents and stem(slide) in labels:
                    is_normal = labels[stem(slide)]
                    if normal.setdefault(slide, is_normal) != is_normal:
                        raise DataError(f"{slide}: normal by one label table alone; mend {file}")
    return normal


def match_annotations(slides, xmls):
    """{slide: its XML}. An XML belongs to the slide of its name in the same folder.

    If there is none, then to the only slide of its name that has no XML in its own folder. XML of
    no slide are named. DataError, naming all, where two could belong together.
    """
    xml_of, unused = {}, []
    beside = {(xml.parent, stem(xml)) for xml in xmls}
    for xml in xmls:
        same = [s for s in slides if stem(s) == stem(xml)]
        own = [s for s in same if s.parent == xml.parent]
        own = own or [s for s in same if (s.parent, stem(s)) not in beside]
        if len(own) > 1 or own and own[0] in xml_of:
            several = ", ".join(map(str, [xml, *own, *(xml_of[s] for s in own if s in xml_of)]))
            raise DataError(f"{several}: which is of which? rename slides, put XML beside them")
        if own:
            xml_of[own[0]] = xml
        elif not stem(xml).endswith("_pred"):  # of extras.predict, for a person to correct
            unused.append(str(xml))
    warn("XML are not read: no slide of that name, or another XML lies beside it", unused)
    return xml_of


def patient(source):
    """What stays on one side of the split: the patient if the name has one, else the slide.

    CAMELYON17's patient_001_node_2 and TCGA's barcode, TCGA-A2-A0D2, have one.
    """
    name = stem(source.path)
    match = re.search(r"patient_\d+|(?<![a-z0-9])tcga-\w\w-[a-z0-9]{4}(?![a-z0-9])", name)
    return match[0] if match else name


def seeded_split(sources, seed):
    """Section 2.2: hold out 20 in 110 patients at random.

    Separately among those with outlined tumour, with cancer regions alone and without cancer, so
    that test tiles have masks wherever two patients have them.
    """
    # Deviation: the paper trains on 90 tumour slides and tests on 20, unnamed; here normal slides
    # are in both, because most slides in use are normal. Folders train* and test* are the split.
    outlined, cancer = set(), set()
    for source in sources:
        kinds = {kind for _, kind, _ in read_shapes(source.xml)} if source.xml else set()
        if "tumour" in kinds and ("roi" in kinds or not kinds & {*REGIONS}):
            outlined.add(patient(source))
        elif "cancer region" in kinds:
            cancer.add(patient(source))
    rest = {patient(s) for s in sources} - outlined - cancer
    test, rng = set(), np.random.default_rng((seed, 0))
    for patients in (outlined, cancer - outlined, rest):
        count = max(1, round(len(patients) * 20 / 110)) if len(patients) > 1 else 0
        test.update(rng.permutation(sorted(patients))[:count].tolist())
    return [s._replace(split="test" if patient(s) in test else "train") for s in sources]


def tissue_share(slide, level, tile):
    """Share of tissue in the squares of `tile` px of `level`, side by side -> (rows, columns).

    Squares over the edge count their part inside. Tissue is chroma (max - min of RGB) above a
    threshold.
    """
    # Deviation: the paper names no way to find tissue; here chroma above Otsu's threshold, because
    # HSV saturation breaks on near-black noise. Fixed thresholds break across centres.
    side = tile * slide.levels[level].downsample
    coarsest = min(32, max(1, side // 8))  # about 8 um/px, or 8 px in a square
    fits = [lv.downsample <= coarsest and side % lv.downsample == 0 for lv in slide.levels]
    k = max(np.flatnonzero(fits).tolist())
    low = slide.levels[k]
    if low.width * low.height > 1 << 27:
        slide.fail(f"its smallest level up to 1/{coarsest} is too large to look at")
    # In Pillow: at CAMELYON's size numpy takes five times as long.
    red, green, blue = slide.image(k, 0, 0, low.width, low.height).split()
    highest = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    lowest = ImageChops.darker(ImageChops.darker(red, green), blue)
    chroma = ImageChops.subtract(highest, lowest)
    threshold = tissue_threshold(chroma.histogram())
    mask = chroma.point([int(value > threshold) for value in range(256)]).convert("F")
    return np.asarray(mask.reduce(side // low.downsample))  # box means


def tissue_threshold(histogram):
    """Otsu's threshold of 256 counts, the value that best splits them in two, held in [8, 30].

    Below 8 an empty slide would be tissue; above 30 a slide without background would lose half of
    its tissue. If the threshold separates only a few vivid pixels (pen, blood) from everything
    else, they are removed and it is computed again.
    """
    count = np.array(histogram, float)
    coloured = count[9:].sum()  # pixels that could be tissue; if nearly all are, glass is tinted
    few = coloured / 4 if coloured < 0.9 * count.sum() else 0
    while True:
        below, moment = count.cumsum(), (count * np.arange(256)).cumsum()
        spread = (moment[-1] * below - moment * below[-1]) ** 2
        threshold = int((spread / np.maximum(below * (below[-1] - below), 1)).argmax())
        if threshold <= 30 or count[threshold + 1 :].sum() > few:
            return np.clip(threshold, 8, 30)
        count[threshold + 1 :] = 0


class Tiles(torch.utils.data.Dataset):
    """All tissue tiles of all slides; `table` (TILE) has a row for each, `side` px of its level.

    tiles[row, turn] -> image (3, T, T) uint8, mask (T, T) int8, label; `turn` 1 to 7 flips and
    turns both. A mask is 1 tumour, 0 not, -1 unknown. Bytes: float32 costs up to twice the CPU.
    """

    def __init__(self, sources, slides, annotations, side, table):
        self.sources, self.slides, self.annotations = sources, slides, annotations  # one per slide
        self.side, self.table, self.has_mask = side, table, table["known"] >= COVERED

    def __getitem__(self, key):
        row, turn = key
        n, x, y, level, _, _, label, _ = self.table[row].item()
        down = self.slides[n].levels[level].downsample
        box = x // down, y // down, self.side, self.side
        image, mask = self.slides[n].read(level, *box), self.annotations[n].mask(*box, down)
        if not self.has_mask[row]:
            mask[:] = -1
        # Deviation: the paper has no augmentation; here flips and turns, because tissue has no up.
        image, mask = (np.rot90(a[:, ::-1] if turn % 2 else a, turn // 2) for a in (image, mask))
        image = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return image, torch.from_numpy(np.ascontiguousarray(mask)), label


def tile_slides(sources, tile=512, mpp=0.5, level=None):
    """Open every slide and lay a grid of `tile` px at `mpp` um/px over its tissue -> Tiles.

    `level` is for slides without a resolution (um/px).
    """
    slides = [Slide(source.path) for source in progress(sources, "slides")]
    annotations, table = [], []
    for n, source in enumerate(progress(sources, "tissue")):
        size, k = slides[n].levels[0][:2], slides[n].nearest_level(mpp, level)
        annotation = read_annotation(source.xml, size) if source.xml else Annotation()
        down, rows = slides[n].levels[k].downsample, []
        # From (0, 0): tiles of 512 or 256 px are aligned with the JPEG blocks, 3 x less CPU.
        squares = np.argwhere(tissue_share(slides[n], k, tile) >= TISSUE_SHARE) * tile
        for y, x in squares.tolist():
            tumour, label, known = label_of(annotation, x, y, tile, tile, down)
            if known >= COVERED or label is not None:  # else nothing is known of it
                place = n, x * down, y * down, k, source.split == "train"
                rows.append((*place, tumour, label, known))
        if not rows:
            finding = "no tissue found"
            if annotation.has_regions:
                finding = f"no tile of {tile} px with tissue lies in its regions by half"
            warn(f"{source.path}: {finding}; slide skipped")
        elif "tumour" in annotation.rings and not any(row[5] > 0 for row in rows):
            where = " inside a roi" if annotation.has_regions else ""
            warn(f"{source.xml}: no outline of tumour lies on tissue{where}; is it of this slide?")
        levels = slides[n].levels  # others than k are not read again: 1.4 MB a slide of CAMELYON
        levels[:] = [lv if lv is levels[k] else lv._replace(offsets=(), counts=()) for lv in levels]
        annotations.append(annotation)
        table += rows
    return Tiles(sources, slides, annotations, tile, np.array(table, TILE))


def label_of(annotation, *box):
    """What is known of a tile -> share of tumour, image-level label or None, share of known px."""
    if not annotation.has_regions and not annotation.near(*box):
        return 0.0, NORMAL, 1.0  # at once: nearly all tiles
    mask = annotation.mask(*box)
    labelled = mask >= 0
    tumour = (mask == 1).sum() / labelled.sum() if labelled.any() else math.nan
    # Deviation: the paper has no rule for a tile's label; here cancer above 5 % tumour, normal at
    # none, because tiles between are neither. Their masks are used.
    label = CANCER if tumour > CANCER_SHARE else AMBIGUOUS if tumour > 0 else NORMAL
    if labelled.mean() < COVERED:
        kinds = {"cancer region": CANCER, "normal region": NORMAL}
        labels = [v for k, v in kinds.items() if annotation.inside(k, *box).mean() >= COVERED]
        label = labels[0] if len(labels) == 1 else AMBIGUOUS if labels else None
    return tumour, label, labelled.mean()


def choose_labels(tiles, pixel_frac, image_frac, label_unit="tile", seed=0):
    """Whose labels training may use -> rows of `tiles.table`: the pool, masks, image labels.

    The pool: all cancer and ambiguous training tiles, and at most as many normal as cancer ones. A
    fraction of 1 is all of its tiles that have a mask, or a label. image_frac 0 is the S group, 1
    is S+C. `label_unit`: masks of tiles (the paper) or of slides. DataError if a class is missing.
    """
    train, label, has_mask = tiles.table["train"], tiles.table["label"], tiles.has_mask
    cancer, normal = (np.flatnonzero(train & (label == kind)) for kind in (CANCER, NORMAL))
    if not (len(cancer) and len(normal)):
        finding = f"{len(cancer)} cancer, {len(normal)} normal tiles of {tiles.side} px to train on"
        raise DataError(f"{finding}; training needs both: change --tile, --mpp, --level or --data")
    if not (~train & (label == CANCER)).any():
        finding = f"no cancer tile of {tiles.side} px to test on"
        raise DataError(f"{finding}; put slides into train/ and test/, or add patients with cancer")
    if not (~train & has_mask & (label == CANCER)).any():
        warn("no test tile with tumour has a mask: DSC will be null; outline one there in a roi")
    # Deviation: the paper gives no ratio of normal to cancer tiles; here 1, because tumour is rare.
    normal = np.random.default_rng((seed, 1)).permutation(normal)
    first = normal[has_mask[normal]][:1]  # step 1 needs one
    normal = np.r_[first, normal[~np.isin(normal, first)]][: len(cancer)]
    pool = np.sort(np.r_[np.flatnonzero(train & (label != NORMAL)), normal])
    # Deviation: the paper does not say what 0 % of the masks is; here it keeps the mask of one tile
    # of each class, because reference [20] does so. 0 % of image labels is none.
    with_mask = pool[has_mask[pool]]
    if {CANCER, NORMAL} - {*label[with_mask].tolist()}:
        finding = "the training tiles with a mask are of one class alone, or there is none"
        cure = "outline tumour, have normal tissue in the roi (images: black masks of normal ones)"
        raise DataError(f"{finding}; {cure}, or take a smaller --tile")
    masks = nested(tiles.table, with_mask, label_unit, pixel_frac, (seed, 2))
    labels = nested(tiles.table, pool[label[pool] != AMBIGUOUS], "tile", image_frac, (seed, 3))
    return pool, masks, labels if image_frac else labels[:0]


def nested(table, rows, unit, fraction, seed):
    """Those of `rows` whose label may be used: a fraction of the units, "tile" or "slide".

    A unit's random score in (0, 1) does not depend on `fraction`, so 10 % is inside 20 %. Units
    with and without cancer are ranked apart, so both are drawn at that fraction, and the
    lowest-scored tile of each class is always used.
    """
    label, units = table["label"][rows], rows if unit == "tile" else table["slide"][rows]
    with_cancer = np.isin(units, units[label == CANCER])
    rng, score = np.random.default_rng(seed), np.empty(len(rows))
    for part in (with_cancer, ~with_cancer):
        which, place = np.unique(units[part], return_inverse=True)
        score[part] = ((rng.permutation(len(which)) + 0.5) / max(len(which), 1))[place]
    used = score < fraction
    for value in (CANCER, NORMAL):
        used[np.where(label == value, score, np.inf).argmin()] = True
    return rows[used]


def label_tiles(tiles, args):
    """`choose_labels` by the flags; prints slides, tiles, labels -> its rows, their fingerprint."""
    choice = args.pixel_frac, args.image_frac, args.label_unit, args.seed
    pool, mask_rows, label_rows = choose_labels(tiles, *choice)
    train = tiles.table["train"]
    for name, rows in {"train": train, "test": ~train, "pool of train": pool}.items():
        part = tiles.table[rows]
        count = [(part["label"] == kind).sum() for kind in (CANCER, NORMAL, AMBIGUOUS)]
        kinds = f"{count[0]} cancer, {count[1]} normal, {count[2]} ambiguous"
        print(f"{name}: {len(np.unique(part['slide']))} slides; {len(part)} tiles: {kinds}")
    masks = f"{len(mask_rows)} of {tiles.has_mask[pool].sum()} masks"
    labels = f"{len(label_rows)} of {count[0] + count[1]} image labels"
    print(f"used of the pool: {masks}, {labels}", flush=True)
    used = b"".join(a.tobytes() for a in (tiles.table, mask_rows, label_rows))
    return pool, mask_rows, label_rows, hashlib.sha256(used).hexdigest()


def write_tiles(path, tiles, mask_rows, label_rows):
    """tiles.csv: what every tile is (TILE), whether training uses its mask and its image label."""
    used = np.stack([np.isin(range(len(tiles.table)), rows) for rows in (mask_rows, label_rows)], 1)
    with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        out = csv.writer(file)
        out.writerow([*TILE.names, "mask_used", "label_used"])
        for (n, *tile), flags in zip(tiles.table.tolist(), used.tolist()):
            out.writerow([tiles.sources[n].name, *tile, *flags])


def batches(rows, batch_size, seed, first, last):
    """Full batches of keys (row, turn): numbers `first` to `last` - 1 of an endless sequence.

    The sequence is pass after shuffled pass over `rows`, each tile turned at random: `seed` and a
    batch's number alone decide it, so a resumed run gets the batches of an uninterrupted one.
    """
    rng = np.random.default_rng(seed)

    def keys():
        while True:
            turns = rng.integers(8, size=len(rows)).tolist()
            yield from zip(rng.permutation(rows).tolist(), turns)

    endless = keys()
    for n in range(last):
        batch = list(islice(endless, batch_size))
        if n >= first:
            yield batch


def load_batches(tiles, batches, device, workers=0):
    """Batches of keys -> images (B, 3, T, T) uint8, masks (B, T, T) int8, labels (B,) on `device`.

    `tiles` is any Dataset. `close()` ends its workers. DataError where they lack shared memory.
    """
    options = {"num_workers": workers, "pin_memory": device.type == "cuda"}
    if workers:
        options["worker_init_fn"] = silence
        # Python 3.14's forkserver sends the index of every slide to each worker (1.8 MB a slide of
        # CAMELYON); after a fork they share it. Where the default is spawn, fork is not safe.
        if multiprocessing.get_start_method() == "forkserver":
            options["multiprocessing_context"] = "fork"
    # Fork with SIGINT blocked: the main process alone handles Ctrl-C and stops its workers.
    block_signals = getattr(signal, "pthread_sigmask", lambda *_: None)  # Windows has none
    try:
        block_signals(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            loader = iter(torch.utils.data.DataLoader(tiles, batch_sampler=batches, **options))
        finally:
            block_signals(signal.SIG_UNBLOCK, {signal.SIGINT})
        for batch in loader:
            yield [t.to(device, non_blocking=True) for t in batch]
    except RuntimeError as error:
        if not re.search("shared memory|worker.* (killed|exited)", str(error)):
            raise
        cure = "give --workers 0, or a larger /dev/shm (docker run --shm-size 8g)"
        raise DataError(f"a worker died, most likely for lack of shared memory; {cure}") from None


def silence(_):
    """In a worker: print no traceback when the main process has ended before it."""
    sys.excepthook = sys.unraisablehook = lambda *_: None
