"""The three methods that the paper compares with (Tables 6, 7, Figs. 7, 8), small and faithful.

    python -m extras.baselines multitask --pixel-frac 0.1   # Ciga & Martel, the paper's [20]
    python -m extras.baselines mil --pixel-frac 0.1         # Lerousseau et al., [18]
    python -m extras.baselines transfer --pixel-frac 0.1    # Celik et al., [30]

Flags are those of train.py but --resume. Tiles, splits, fractions, seeds, batch size and the number
of optimizer steps are ours too; a loop here is only what makes it that method. Multi-task and MIL
have a ResNet-18 cut at stride 16, with random weights; --width, --alpha, --beta and the losses are
for transfer alone, which has our network. Writes to --out: last.pt, tiles.csv, results.json.
"""

import argparse
import json
import math
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import update_bn

import data
import evaluate
import loss
import train
from model import Network

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's channels
MIL_TOP = 0.1  # share of a positive bag that is positive, [18]'s alpha; its beta is 0
MIL_LR = 5  # [18] has Adam at 5e-4, where the others have 1e-4


def conv_bn(c_in, c_out, kernel, stride=1):
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out))


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, c_in, H, W) -> (B, c_out, H/stride, W/stride)."""

    def __init__(self, c_in, c_out, stride=1):
        super().__init__()
        self.conv1, self.conv2 = conv_bn(c_in, c_out, 3, stride), conv_bn(c_out, c_out, 3)
        self.shortcut = conv_bn(c_in, c_out, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


class Trunk(nn.Module):
    """ResNet-18 without its fourth stage: tiles (B, 3, H, W), 0..255 -> (B, 256, H/16, W/16)."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 64, 7, 2)
        self.stage1 = nn.Sequential(Block(64, 64), Block(64, 64))
        self.stage2 = nn.Sequential(Block(64, 128, 2), Block(128, 128))
        self.stage3 = nn.Sequential(Block(128, 256, 2), Block(256, 256))
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("deviation", torch.tensor(DEVIATION)[:, None, None], persistent=False)
        self.to(memory_format=torch.channels_last)

    def forward(self, tiles):
        x = (tiles.float() / 255 - self.mean) / self.deviation  # (B, 3, H, W)
        x = F.relu(self.stem(x))  # (B, 64, H/2, W/2)
        x = self.stage1(F.max_pool2d(x, 3, 2, 1))  # (B, 64, H/4, W/4)
        return self.stage3(self.stage2(x))  # (B, 256, H/16, W/16)


class MultiTask(nn.Module):
    """[20]: low-resolution logits; their global maximum is the class logits, no parameters."""

    def __init__(self):
        super().__init__()
        self.trunk = Trunk()
        self.head = nn.Sequential(
            *(nn.Conv2d(256, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(True)),
            *(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(64, 2, 1)),
        )

    def forward(self, tiles):
        low = self.head(self.trunk(tiles))  # (B, 2, H/8, W/8)
        return F.interpolate(low, tiles.shape[2:]), low.amax((2, 3))  # (B, 2, H, W), (B, 2)


class MIL(nn.Module):
    """[18]: a tile is a bag, the cells of a logit map are its instances."""

    # Deviation: [18] has bags of many tiles and no masks; here a bag is a tile, its instances are
    # the cells of its logit map, and masks averaged to them teach them too, because image-level
    # labels are of tiles here, and without masks their share would mean nothing.
    def __init__(self):
        super().__init__()
        self.trunk, self.head = Trunk(), nn.Conv2d(256, 1, 1)

    def cells(self, tiles):
        return self.head(self.trunk(tiles))  # (B, 1, H/16, W/16)

    def forward(self, tiles):
        z = self.cells(tiles)
        z = torch.cat([torch.zeros_like(z), z], 1)  # the softmax of 0 and z is the sigmoid of z
        return F.interpolate(z, tiles.shape[2:]), z.amax((2, 3))  # (B, 2, H, W), (B, 2)


def mil_loss(z, label, top=MIL_TOP):
    """Bags of cell logits z (B, n), label (B,) -> binary cross entropy over the labelled cells.

    In a positive bag the largest `top` of the cells are positive and the others have no label; in
    a negative one all are negative.
    """
    # Deviation: [18] takes int(top * n) cells; here one at least, because none gives NaN.
    count = max(1, int(top * z.shape[1]))
    z = z.float()
    highest = torch.zeros_like(z).scatter(1, z.topk(count).indices, 1)
    positive = label[:, None] == 1
    known = (~positive | (highest == 1)).float()  # (B, n)
    each = F.binary_cross_entropy_with_logits(z, highest * positive, reduction="none")
    return (each * known).sum() / known.sum()


class ConstantMasks(torch.utils.data.Dataset):
    """`tiles`, with a mask equal to the label on each tile that is not in `mask_rows`."""

    def __init__(self, tiles, mask_rows):
        self.tiles, self.mask_rows = tiles, set(mask_rows.tolist())

    def __getitem__(self, key):
        image, mask, label = self.tiles[key]
        return image, mask if key[0] in self.mask_rows else torch.full_like(mask, label), label


def load_batches(args, tiles, rows, stream, first, last):
    """Batches `first` to `last` - 1 of the tiles `rows`, those of train.py for its streams."""
    keys = data.batches(rows, args.batch_size, (args.seed, stream), first, last)
    return data.load(tiles, keys, torch.device(args.device), args.workers)


def begin(args, model):
    """A new Adam for `model`, and the autocast of --amp."""
    autocast = torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.amp)
    return torch.optim.Adam(model.parameters(), lr=args.lr), autocast


def multitask(args, model, tiles, mask_rows, label_rows, total, pretrain):
    """Train [20]: one list of tiles of both kinds, both losses in every update."""
    rows, table = np.union1d(mask_rows, label_rows), tiles.table
    with_mask = np.isin(rows, mask_rows)
    tumour = np.where(with_mask, table["tumour"][rows], table["label"][rows]).mean()
    cancer = table["label"][label_rows].mean()
    # Class weights inverse to frequency; the mean weight of a pixel, and of a tile, is 1.
    mask_weights, label_weights = ((0.5 / (1 - share), 0.5 / share) for share in (tumour, cancer))
    adam, autocast = begin(args, model)
    updates = 2 * total - pretrain
    loader = load_batches(args, ConstantMasks(tiles, mask_rows), rows, 11, 0, updates)
    for n, (images, masks, labels) in enumerate(data.progress(loader, "training", updates)):
        adam.param_groups[0]["lr"] = args.lr * (1 - n / updates)
        with autocast:
            logits, class_logits = model(images)
        loss_seg = loss.fw(logits, masks, mask_weights)
        train.update(adam, loss_seg + loss.fw(class_logits, labels, label_weights))
    return rows


def mil(args, model, tiles, mask_rows, label_rows, total, pretrain):
    """Train [18]: masks averaged to the cells in step 1 and bags of cells in step 2, in turn."""
    adam, autocast = begin(args, model)
    mask_batches = load_batches(args, tiles, mask_rows, 11, 0, total)
    label_batches = load_batches(args, tiles, label_rows, 12, pretrain, total)
    for n in data.progress(range(total), "training"):
        adam.param_groups[0]["lr"] = args.lr * (1 - n / total)

        images, masks, _ = next(mask_batches)
        with autocast:
            z = model.cells(images)  # (B, 1, H/16, W/16)
        share = F.adaptive_avg_pool2d(masks[:, None].float(), z.shape[2:])
        train.update(adam, F.binary_cross_entropy_with_logits(z.float(), share))

        if n >= pretrain:
            images, _, labels = next(label_batches)
            with autocast:
                z = model.cells(images)
            train.update(adam, mil_loss(z.flatten(1), labels))
    return mask_rows


def transfer(args, model, tiles, mask_rows, label_rows, total, pretrain):
    """Train [30]: our network, phase A all of step 2 and then phase B all of step 1."""
    # Deviation: the paper does not tell how [30], a classifier, was made to segment; here our
    # network, first all of step 2, then all of step 1, because what is missing then is the
    # alternation alone.
    tumour = tiles.table["tumour"][mask_rows].mean()
    cancer = tiles.table["label"][label_rows].mean()
    seg_loss = train.make_loss(args.seg_loss, args.beta, tumour)
    cls_loss = train.make_loss(args.cls_loss, args.beta, cancer)

    adam, autocast = begin(args, model)
    updates = total - pretrain
    loader = load_batches(args, tiles, label_rows, 12, 0, updates)
    for n, (images, _, labels) in enumerate(data.progress(loader, "phase A", updates)):
        adam.param_groups[0]["lr"] = args.lr * (1 - n / updates)
        with autocast:
            logits = model.classify(model.encode(images))  # (B, 2)
        train.update(adam, args.alpha * cls_loss(logits, labels))

    # PSP and decoder had no gradient in phase A: they are as fresh as Adam is here.
    adam, autocast = begin(args, model)
    loader = load_batches(args, tiles, mask_rows, 11, 0, total)
    for n, (images, masks, _) in enumerate(data.progress(loader, "phase B", total)):
        adam.param_groups[0]["lr"] = args.lr * (1 - n / total)
        with autocast:
            logits = model.decode(model.encode(images))  # (B, 2, H, W)
        train.update(adam, seg_loss(logits, masks))
    return mask_rows


METHODS = {"transfer": transfer, "multitask": multitask, "mil": mil}


def network(method, width):
    """The untrained network of a method; transfer has ours."""
    return {"transfer": partial(Network, width), "multitask": MultiTask, "mil": MIL}[method]()


def load(path):
    """last.pt of a method -> its network, the arguments of its training."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    args = SimpleNamespace(**checkpoint["args"])
    model = network(args.method, args.width).to(args.device)
    model.load_state_dict(checkpoint["model"])
    return model.eval(), args


def run(method, args):
    """Train and score a method, `args` as of train.parse_args -> what results.json holds."""
    began, out, args.method = time.time(), Path(args.out), method
    sources = data.find_slides(args.data, args.seed)
    tiles = data.tile_slides(sources, args.tile, args.mpp, args.level)
    fractions = args.pixel_frac, args.image_frac, args.label_unit
    pool, mask_rows, label_rows = data.choose_labels(tiles, *fractions, args.seed)
    print(*data.describe(tiles, mask_rows, label_rows), sep="\n", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    data.write_tiles(out / "tiles.csv", tiles, mask_rows, label_rows)

    torch.manual_seed(args.seed)
    model = network(method, args.width).to(args.device).train()
    per_epoch = math.ceil(len(pool) / args.batch_size)  # as in train.py
    total, pretrain = args.epochs * per_epoch, args.pretrain_epochs * per_epoch
    rows = METHODS[method](args, model, tiles, mask_rows, label_rows, total, pretrain)
    if not all(p.isfinite().all() for p in model.parameters()):
        raise data.DataError("the loss was not finite; lower --lr")

    _, autocast = begin(args, model)
    with autocast:  # BN's statistics anew, as in train.py
        last = math.ceil(len(rows) / args.batch_size)
        update_bn(load_batches(args, tiles, rows, 13, 0, last), model)
    torch.save({"model": model.state_dict(), "args": vars(args)}, out / "last.pt")
    rows = np.flatnonzero(~tiles.table["train"])
    counts = evaluate.count(model, tiles, rows, args)
    # No accuracy for transfer: its classification head is of phase A's encoder.
    results = evaluate.summarise(tiles, rows, counts, method != "transfer")
    results |= {"arguments": vars(args), "seconds": time.time() - began, "torch": torch.__version__}
    (out / "results.json").write_text(json.dumps(results, indent=1))
    return results


def parse_args(argv):
    """Command line -> method, arguments of train.py. DataError for flags that no method has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=evaluate.AS_WRITTEN)
    parser.add_argument("method", choices=METHODS, help="then the flags of train.py")
    method = parser.parse_args(argv[:1]).method
    if any(flag.startswith("--res") for flag in argv):
        raise data.DataError("--resume: only train.py resumes; start a new run")
    args, _ = train.parse_args(argv[1:])
    if not args.image_frac:
        raise data.DataError(f"{method} needs image-level labels; give --image-frac above 0")
    if method == "mil" and not any(flag.split("=")[0] == "--lr" for flag in argv):
        args.lr *= MIL_LR
    return method, args


def main(argv=None):
    method, args = parse_args(sys.argv[1:] if argv is None else argv)
    results = run(method, args)
    print(evaluate.headline(results))
    print(f"{results['seconds']:.0f} s; results are in {args.out}")


if __name__ == "__main__":
    main()
