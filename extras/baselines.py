"""The three methods that the paper compares with (Tables 6, 7, Figs. 7, 8), small and faithful.

    python train.py --method multitask      # Ciga & Martel, the paper's [20]
    python train.py --method mil            # Lerousseau et al., [18]
    python train.py --method transfer       # Celik et al., [30]

Same tiles, splits, fractions, seeds and number of optimizer steps as ours; a method here is only
what makes it that method. Multi-task and MIL share a ResNet-18 cut at stride 16, whose names are
torchvision's, so that --pretrained can fill it. Like model.Network, each returns segmentation
logits (B, 2, H, W) and image logits (B, 2). Transfer has our network, and is but an order of its
steps: train.schedule.
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
import loss

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)         # mean, deviation of its channels
MIL_TOP = 0.1                   # of a positive bag is positive, [18]'s alpha; its beta is 0


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = nn.Sequential(
            nn.Conv2d(c_in, c_out, 1, stride, bias=False),
            nn.BatchNorm2d(c_out)) if stride > 1 else None

    def forward(self, x):
        shortcut = self.downsample(x) if self.downsample else x
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class Trunk(nn.Module):
    """ResNet-18 without its fourth stage: tiles (B, 3, H, W), 0..255 -> (B, 256, H/16, W/16)."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(Block(64, 64, 1), Block(64, 64, 1))
        self.layer2 = nn.Sequential(Block(64, 128, 2), Block(128, 128, 1))
        self.layer3 = nn.Sequential(Block(128, 256, 2), Block(256, 256, 1))
        for name, values in zip(("mean", "deviation"), IMAGENET):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        self.to(memory_format=torch.channels_last)

    def forward(self, tiles):
        x = (tiles.float() / 255 - self.mean) / self.deviation          # (B, 3, H, W)
        x = F.relu(self.bn1(self.conv1(x)))                             # (B, 64, H/2, W/2)
        x = self.layer1(F.max_pool2d(x, 3, 2, 1))                       # (B, 64, H/4, W/4)
        return self.layer3(self.layer2(x))                              # (B, 256, H/16, W/16)


class MultiTask(nn.Module):
    """[20]: low-resolution logits; their global maximum is the image's, without parameters."""

    def __init__(self):
        super().__init__()
        self.trunk = Trunk()
        self.head = nn.Sequential(
            nn.Conv2d(256, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True),
            nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(64, 2, 1))

    def forward(self, tiles):
        low = self.head(self.trunk(tiles))                              # (B, 2, H/8, W/8)
        return F.interpolate(low, tiles.shape[2:]), low.amax((2, 3))


class MIL(nn.Module):
    """[18]: a tile is a bag, the cells of a logit map its instances."""

    def __init__(self):
        super().__init__()
        self.trunk, self.head = Trunk(), nn.Conv2d(256, 1, 1)

    def cells(self, tiles):
        return self.head(self.trunk(tiles))                             # (B, 1, H/16, W/16)

    def answer(self, z, tiles):
        z = torch.cat([torch.zeros_like(z), z], 1)                      # softmax is sigmoid then
        return F.interpolate(z, tiles.shape[2:]), z.amax((2, 3))        # (B, 2, H, W), (B, 2)

    def forward(self, tiles):
        return self.answer(self.cells(tiles), tiles)


def load_pretrained(trunk, source):
    """Fill `trunk` from torchvision's resnet18 weights: a file or an URL. Raises DataError."""
    try:
        if source.startswith(("http://", "https://")):
            weights = torch.hub.load_state_dict_from_url(source, map_location="cpu",
                                                         weights_only=True)
        else:
            weights = torch.load(source, map_location="cpu", weights_only=True)
        trunk.load_state_dict({name: value for name, value in weights.items()
                               if not name.startswith(("layer4.", "fc."))})
    except Exception as error:          # of network, pickle, names, shapes: many types
        raise data.DataError(f"--pretrained {source}: not torchvision's resnet18 weights, or no "
                             f"network to get them ({str(error).split(chr(10))[0]}); download the "
                             "file and give its path") from error


def multitask(args, model, tiles):
    """[20]: one list of tiles of both kinds, every update on both losses, so both steps are one."""
    pixel, image = tiles["pixel"], tiles["image"]
    used = pixel | image
    label = tiles["label"]
    share = np.where(pixel, tiles["tumour"], label)[used].mean()        # of tumour pixels
    cancer = label[image].mean()
    # Class weights inverse to frequency, which leave the mean weight of a pixel 1.
    pixel_weights, image_weights = ((0.5 / (1 - f), 0.5 / f) for f in (share, cancer))
    has_mask = torch.from_numpy(pixel).to(args.device)

    def step(images, masks, labels, rows):
        logits, scores = model(images)
        # A tile with an image label alone gets a constant mask.
        target = torch.where(has_mask[rows][:, None, None], masks.long(), labels[:, None, None])
        total = loss.fw(logits, target, pixel_weights) + loss.fw(scores, labels, image_weights)
        return total, logits, scores

    def step1(*batch):
        total, logits, _ = step(*batch)
        return total, logits

    def step2(*batch):
        total, _, scores = step(*batch)
        return total, scores

    return step1, step2


def mil(args, model, tiles):
    """[18]: masks averaged to the cells, or bags of cells."""
    def step1(images, masks, labels, rows):
        z = model.cells(images)
        share = F.adaptive_avg_pool2d(masks[:, None].float(), z.shape[2:])      # (B, 1, h, w)
        return F.binary_cross_entropy_with_logits(z.float(), share), model.answer(z, images)[0]

    def step2(images, masks, labels, rows):
        z = model.cells(images)
        return mil_loss(z.flatten(1), labels), model.answer(z, images)[1]

    return step1, step2


def mil_loss(z, label, top=MIL_TOP):
    """Bags of cell logits z (B, n), label (B,): binary cross entropy of the cells that have one.

    In a positive bag the largest `top` of the cells are positive and the others have no label; in
    a negative one all are negative.
    """
    # Deviation: [18] takes int(top * n) cells; here one at least, because none gives NaN.
    count = max(1, int(top * z.shape[1]))
    z = z.float()
    highest = torch.zeros_like(z).scatter(1, z.topk(count).indices, 1)
    positive = label[:, None] == 1
    known = (~positive | (highest == 1)).float()                        # (B, n)
    target = highest * positive
    each = F.binary_cross_entropy_with_logits(z, target, reduction="none")
    return (each * known).sum() / known.sum()
