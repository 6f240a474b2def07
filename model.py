"""The network of Fig. 3: a U-Net with ESP encoder, PSP decoder and a classification head.

    model = Network(width=32)
    seg_logits, class_logits = model(tiles)     # tiles (B, 3, H, W), 0..255, H and W multiples of 8
    model.decode(model.encode(tiles))           # step 1: the classification head is not run
    model.classify(model.encode(tiles))         # step 2: PSP and decoder are not run

Glossary, for all files:
    B          tiles in a batch                 S, C    the groups: segmentation, classification
    H, W       height and width of a tile       alpha   weight of the classification loss, Eq. (3)
    C0..C3     channels of the four scales      beta    exponent of the dynamic weight, Eq. (2)
    k          a scale, 0 (full) .. 3 (1/8)     p(x)    predicted probability of x's labelled class
    logits     scores before the softmax        w(x)    the weight of x in the loss, section 1.6
    tumour     class 1 of a pixel               mask    the labels of a tile's pixels
    cancer     class 1 of a tile                label   the image-level label of a tile

Sections are the paper's: 1.3 the network, 1.5 ESP and PSP. Needs torch alone, so it can be copied.
"""

import torch
import torch.nn.functional as F
from torch import nn

DILATIONS = (1, 2, 3, 5)  # section 1.5
BINS = (1, 2, 3, 5)  # section 1.5


def conv_bn_relu(c_in, c_out, kernel):
    """The convolution block of section 1.3: (B, c_in, H, W) -> (B, c_out, H, W)."""
    conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


class ESP(nn.Module):
    """Efficient spatial pyramid, section 1.5: reduce, four dilated convolutions, concatenate."""

    # Deviation: the paper's source [21] adds hierarchical fusion and a residual; here neither,
    # because the paper's text has neither.
    def __init__(self, channels):
        super().__init__()
        d = channels // 4
        self.reduce = nn.Conv2d(channels, d, 1, bias=False)
        branches = (nn.Conv2d(d, d, 3, padding=r, dilation=r, bias=False) for r in DILATIONS)
        self.branches = nn.ModuleList(branches)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x):  # (B, C, H, W)
        x = self.reduce(x)  # (B, C/4, H, W)
        x = torch.cat([branch(x) for branch in self.branches], 1)  # (B, C, H, W)
        return F.relu(self.bn(x))  # (B, C, H, W)


class PSP(nn.Module):
    """Pyramid spatial pooling, section 1.5: the map beside four pooled views of itself."""

    # No BN: the paper names none, and the 1x1 bin of a batch of one tile is too little for it.
    def __init__(self, channels):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels // 4, 1) for _ in BINS)

    def forward(self, x):  # (B, C, H, W)
        views = [conv(F.adaptive_avg_pool2d(x, bins)) for bins, conv in zip(BINS, self.convs)]
        # In float32: a GPU sums a bin's gradient, over up to H x W pixels, in the type of the map,
        # and in bfloat16 (--amp) most of such a sum is lost.
        views = [F.interpolate(v.float(), x.shape[2:], mode="bilinear").to(v.dtype) for v in views]
        return torch.cat([x, *views], 1)  # (B, 2C, H, W)


class Network(nn.Module):
    """Encoder of four scales, PSP on each skip, decoder, classification head.

    ValueError for a width that 4 does not divide (ESP's four branches would be empty), and for
    sides that 8 does not (three poolings).
    """

    def __init__(self, width=32):
        super().__init__()
        if width < 4 or width % 4:
            raise ValueError(f"width is {width}; a multiple of 4, 4 or more, is needed")
        # Deviation: the paper gives no widths; here C0 = 32, then doubled, because U-Nets do so.
        c0, c1, c2, c3 = c = [width * 2**k for k in range(4)]
        self.convs = nn.ModuleList(conv_bn_relu(i, o, 3) for i, o in zip([3, c0, c1, c2], c))
        self.esps = nn.ModuleList(ESP(i) for i in c)
        self.psps = nn.ModuleList(PSP(i) for i in c)
        ups = (nn.ConvTranspose2d(i, o, 2, stride=2) for i, o in zip([c1, c2, 2 * c3], c))
        self.ups = nn.ModuleList(ups)
        # Deviation: the paper does not say how the decoder fuses; here with a 1x1 convolution,
        # because with 3x3 the network takes 2.7 times the multiply-adds.
        self.fuses = nn.ModuleList(conv_bn_relu(3 * i, i, 1) for i in (c0, c1, c2))
        self.head = nn.Conv2d(c0, 2, 1)  # of the decoder: segmentation
        # Deviation: the paper does not say how a map becomes one label; here by its mean, because
        # that takes any size.
        self.classifier = nn.Sequential(conv_bn_relu(c3, c3 // 2, 1), nn.Conv2d(c3 // 2, 2, 1))
        self.to(memory_format=torch.channels_last)  # faster than NCHW, see docs/speed.md

    def encode(self, tiles):
        """tiles (B, 3, H, W), 0..255, any dtype -> the ESP maps of the four scales."""
        if tiles.shape[2] % 8 or tiles.shape[3] % 8:
            raise ValueError(f"tiles of {tuple(tiles.shape[2:])} px; multiples of 8 are needed")
        x, maps = tiles.float() / 127.5 - 1, []
        for k in range(4):
            x = F.max_pool2d(x, 2) if k else x
            x = self.esps[k](self.convs[k](x))  # (B, Ck, H/2^k, W/2^k)
            maps.append(x)
        return maps

    def decode(self, maps):
        """The four ESP maps -> segmentation logits (B, 2, H, W), class 1 is tumour."""
        x = self.psps[3](maps[3])  # (B, 2C3, H/8, W/8)
        for k in (2, 1, 0):
            x = self.ups[k](x)  # (B, Ck, H/2^k, W/2^k)
            x = torch.cat([x, self.psps[k](maps[k])], 1)  # (B, 3Ck, H/2^k, W/2^k)
            x = self.fuses[k](x)  # (B, Ck, H/2^k, W/2^k)
        return self.head(x)  # (B, 2, H, W)

    def classify(self, maps):
        """The ESP maps, of which the deepest is used -> class logits (B, 2), class 1 is cancer."""
        return self.classifier(maps[3]).mean((2, 3))  # (B, 2, H/8, W/8) -> (B, 2)

    def forward(self, tiles):
        """tiles (B, 3, H, W) -> segmentation logits (B, 2, H, W), class logits (B, 2)."""
        maps = self.encode(tiles)
        return self.decode(maps), self.classify(maps)
