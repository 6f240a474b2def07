"""The three methods that the paper compares with (Tables 6, 7, Figs. 7, 8), small and faithful.

    python -m extras.baselines multitask --pixel-frac 0.1   # Ciga & Martel, the paper's [20]
    python -m extras.baselines mil --pixel-frac 0.1         # Lerousseau et al., [18]
    python -m extras.baselines transfer --pixel-frac 0.1    # Celik et al., [30]

Flags are those of train.py but --resume; tiles, labels, their order and the number of optimizer
steps are the same too. --width, --alpha, --beta and the losses are for transfer alone, which has
our network; the others have a ResNet-18, untrained. Writes last.pt, tiles.csv, results.json,
pictures/.
"""

import argparse
import math
import time
from pathlib import Path

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
from slide import DataError

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation of its channels
MIL_TOP = 0.1  # share of a positive bag that is positive, [18]'s alpha; its beta is 0
MIL_LR = 5  # [18] has Adam at 5e-4, where the others have 1e-4


def conv_bn(c_in, c_out, kernel, stride=1):
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out))


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; halves the sides where it doubles the channels."""

    def __init__(self, c_in, c_out):
        super().__init__()
        stride = c_out // c_in
        self.conv1, self.conv2 = conv_bn(c_in, c_out, 3, stride), conv_bn(c_out, c_out, 3)
        self.shortcut = conv_bn(c_in, c_out, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):  # (B, c_in, H, W)
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-18 without its fourth stage, and the head of [20] or of [18]."""

    def __init__(self, method):
        super().__init__()
        widths = 64, 64, 64, 128, 128, 256, 256
        stem = conv_bn(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        self.trunk = nn.Sequential(*stem, *(Block(i, o) for i, o in zip(widths, widths[1:])))
        if method == "mil":
            self.head = nn.Conv2d(256, 1, 1)
        else:
            double = nn.Upsample(scale_factor=2, mode="bilinear")
            self.head = nn.Sequential(conv_bn(256, 64, 3), nn.ReLU(), double, nn.Conv2d(64, 2, 1))
        self.register_buffer("imagenet", torch.tensor(IMAGENET)[..., None, None], persistent=False)
        self.to(memory_format=torch.channels_last)

    def low(self, tiles):
        """tiles (B, 3, H, W), 0..255 -> logits, [20] (B, 2, H/8, W/8), [18] (B, 1, H/16, W/16)."""
        mean, deviation = self.imagenet
        return self.head(self.trunk((tiles.float() / 255 - mean) / deviation))

    def forward(self, tiles):
        """tiles (B, 3, H, W) -> logits (B, 2, H, W), class logits (B, 2), the highest of them."""
        low = self.low(tiles)
        if low.shape[1] == 1:  # the softmax of 0 and z is the sigmoid of z
            low = torch.cat([torch.zeros_like(low), low], 1)
        return F.interpolate(low, tiles.shape[2:]), low.amax((2, 3))


class ConstantMasks:
    """`tiles`, but the mask is equal to the label on each tile that is not in `mask_rows`."""

    def __init__(self, tiles, mask_rows):
        self.tiles, self.mask_rows = tiles, set(mask_rows.tolist())

    def __getitem__(self, key):
        image, mask, label = self.tiles[key]
        return image, mask if key[0] in self.mask_rows else torch.full_like(mask, label), label


def mil_loss(z, label):
    """Bags z (B, n) of logits, label (B,) -> binary cross entropy over labelled instances.

    All instances of a negative bag are negative; the highest of a positive one are positive,
    and its others have no label.
    """
    # [18] takes int(top * n) instances, but none gives NaN.
    z, count = z.float(), max(1, int(MIL_TOP * z.shape[1]))
    highest = torch.zeros_like(z).scatter(1, z.topk(count).indices, 1)
    known = torch.where(label[:, None] == 1, highest, 1.0)
    target = highest * label[:, None]
    return F.binary_cross_entropy_with_logits(z, target, known, reduction="sum") / known.sum()


def descend(args, adam, tiles, rows, stream, total):
    """Yield `total` batches; the learning rate of `adam` falls linearly from --lr to 0."""
    loader = train.batch_stream(args, tiles, rows, stream, 0, total)
    for n, batch in enumerate(data.progress(loader, "training", total)):
        adam.param_groups[0]["lr"] = args.lr * (1 - n / total)
        yield batch


def autocast(args):
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.amp)


def multitask(args, model, tiles, mask_rows, label_rows, total, pretrain):
    """Train [20]: one list of tiles of both kinds, both losses in every update."""
    rows, table = np.union1d(mask_rows, label_rows), tiles.table
    tumour = np.where(np.isin(rows, mask_rows), table["tumour"][rows], table["label"][rows])
    # Class weights inverse to frequency; the mean weight of a pixel, and of a tile, is 1.
    frequencies = tumour.mean(), table["label"][label_rows].mean()  # of class 1 in each
    weights = torch.tensor([(0.5 / (1 - f), 0.5 / f) for f in frequencies], device=args.device)
    adam = torch.optim.Adam(model.parameters())
    tiles, updates = ConstantMasks(tiles, mask_rows), 2 * total - pretrain
    for images, masks, labels in descend(args, adam, tiles, rows, 11, updates):
        with autocast(args):
            logits, class_logits = model(images)
        loss_seg = loss.fw(logits, masks, weights[0])
        train.update(adam, loss_seg + loss.fw(class_logits, labels, weights[1]))
    return rows


def mil(args, model, tiles, mask_rows, label_rows, total, pretrain):
    """Train [18]: masks averaged to instances, and bags of instances, in turn."""
    # Deviation: the paper's [18] has bags of tiles, no masks; here a bag is one tile, its instances
    # are the pixels of the map z, and masks teach too, because image-level labels are of tiles.
    adam = torch.optim.Adam(model.parameters())
    bags = train.batch_stream(args, tiles, label_rows, 12, pretrain, total)
    for n, (images, masks, _) in enumerate(descend(args, adam, tiles, mask_rows, 11, total)):
        with autocast(args):
            z = model.low(images)  # (B, 1, H/16, W/16)
        tumour, known = (
            F.adaptive_avg_pool2d(m[:, None].float(), z.shape[2:]) for m in (masks == 1, masks >= 0)
        )
        share = tumour / known.clamp(min=1e-6)  # of the labelled pixels of an instance
        train.update(adam, F.binary_cross_entropy_with_logits(z.float(), share, known))
        if n >= pretrain:
            images, _, labels = next(bags)
            with autocast(args):
                z = model.low(images)
            train.update(adam, mil_loss(z.flatten(1), labels))
    return mask_rows


def transfer(args, model, tiles, mask_rows, label_rows, total, pretrain):
    """Train [30]: encoder and head on labels, then with a new Adam encoder and decoder on masks."""
    # Deviation: the paper does not say how [30], a classifier, segments; here all of step 2 comes
    # before all of step 1, because only the alternation is missing then.
    seg_loss_fn, cls_loss_fn = train.loss_functions(args, tiles, mask_rows, label_rows)
    adam = torch.optim.Adam(model.parameters())
    for images, _, labels in descend(args, adam, tiles, label_rows, 12, total - pretrain):
        with autocast(args):
            logits = model.classify(model.encode(images))  # (B, 2)
        train.update(adam, args.alpha * cls_loss_fn(logits, labels))
    adam = torch.optim.Adam(model.parameters())
    for images, masks, _ in descend(args, adam, tiles, mask_rows, 11, total):
        with autocast(args):
            logits = model.decode(model.encode(images))  # (B, 2, H, W)
        train.update(adam, seg_loss_fn(logits, masks))
    return mask_rows


METHODS = {"transfer": transfer, "multitask": multitask, "mil": mil}


def network(method, width):
    """The untrained network of a method."""
    # Deviation: the paper's [30] starts from ImageNet weights; here all methods start untrained,
    # because no weights are downloaded.
    return Network(width) if method == "transfer" else ResNet(method)


def load_method(path):
    """last.pt of a method -> its network, the arguments of its training."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    args = argparse.Namespace(**checkpoint["args"] | evaluate.MACHINE)
    model = network(args.method, args.width).to(args.device)
    model.load_state_dict(checkpoint["model"])
    return model.eval(), args


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=evaluate.AS_WRITTEN)
    parser.add_argument("method", choices=METHODS, help="then the flags of train.py")
    options, flags = parser.parse_known_args(argv)
    args, _ = train.parse_args(flags)
    args.method = options.method
    if args.resume or not args.image_frac:
        parser.error("--resume is for train.py alone, and --image-frac must be above 0")
    if args.method == "mil" and not any(flag.startswith("--lr") for flag in flags):
        args.lr *= MIL_LR

    began, out = time.time(), Path(args.out)
    tiles = evaluate.find_tiles(args)
    pool, mask_rows, label_rows, _ = data.label_tiles(tiles, args)
    out.mkdir(parents=True, exist_ok=True)
    data.write_tiles(out / "tiles.csv", tiles, mask_rows, label_rows)

    torch.manual_seed(args.seed)
    model = network(args.method, args.width).to(args.device)
    per_epoch = math.ceil(len(pool) / args.batch_size)  # as in train.py
    total, pretrain = args.epochs * per_epoch, train.pretrain_epochs(args) * per_epoch
    rows = METHODS[args.method](args, model, tiles, mask_rows, label_rows, total, pretrain)
    if not all(p.isfinite().all() for p in model.parameters()):
        raise DataError("the loss was not finite; lower --lr")
    with autocast(args):  # BN's statistics anew, as in train.py
        count = math.ceil(len(rows) / args.batch_size)
        update_bn(train.batch_stream(args, tiles, rows, 13, 0, count), model)
    torch.save({"model": model.state_dict(), "args": vars(args)}, out / "last.pt")
    # No accuracy for transfer: its encoder has moved away from its classification head.
    classes = args.method != "transfer"
    evaluate.write_results(out, model, tiles, args, began, classes)
    print(f"{time.time() - began:.0f} s; results are in {out}")


if __name__ == "__main__":
    main()
