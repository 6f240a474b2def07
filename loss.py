"""The losses of section 1.6, Table 3: CE, FW (fixed weights), DWCE (dynamic; the paper's DWF).

    loss = dwce(logits, target, beta=3.0)           # segmentation: (B, 2, H, W), (B, H, W)
    loss = dwce(logits, label, beta=3.0)            # classification: (B, 2), (B,)

All are -mean_x w(x) log p(x), Eq. (1), in float32, over the labelled x alone; a target below 0 is
unlabelled. p(x) is the softmax probability of the labelled class at pixel (or image) x:

    CE    w = 1
    FW    w = 1 / ln(1.10 + frequency of the class)     as in Y-Net, the paper's reference [5]
    DWCE  w = exp(-ln100 p^beta), in [0.01, 1]          Eq. (2), from the prediction itself

Pure functions of tensors, so the file can be copied alone.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F


def log_p(logits, target):
    """log p(x) of the labelled class: logits (B, K, ...), target (B, ...) -> (B, ...) float32."""
    return F.log_softmax(logits.float(), 1).gather(1, target.long().clamp(min=0)[:, None])[:, 0]


def weighted_mean(w, logp, target):
    """-mean of w log p over target >= 0; 0 where nothing is labelled."""
    # Deviation: the paper has +sum w log p in Eq (1); here -mean, because a loss is minimised.
    labelled = target >= 0
    return -torch.where(labelled, w * logp, 0.0).sum() / labelled.sum().clamp(min=1)


def ce(logits, target):
    """Cross entropy, -mean log p. logits (B, K, ...), target (B, ...), below 0 = unlabelled."""
    return weighted_mean(1.0, log_p(logits, target), target)


def fw(logits, target, weights):
    """Cross entropy with fixed class weights (K,), see `fw_weights`. Shapes as in `ce`."""
    w = torch.as_tensor(weights, dtype=torch.float32, device=logits.device)
    return weighted_mean(w[target.long().clamp(min=0)], log_p(logits, target), target)


def fw_weights(frequency):
    """Class weights from the share of each class in the training labels, rare ones heavier."""
    # Deviation: the paper cites [29] for FW; here the weights of [5], because [29]'s are not fixed.
    return [1 / math.log(1.10 + f) for f in frequency]


def dwce(logits, target, beta=3.0, printed=False):
    """Dynamically weighted cross entropy, Eqs. (1) and (2). Shapes as in `ce`.

    w = exp(-ln100 p^beta) is detached: 1 at p = 0, .56 at p = .5 (beta 3), .01 at p = 1, so pixels
    predicted well count little, but are not lost. `printed`: Eq. (2) as it stands, in [1, 100].
    """
    # Deviation: the paper prints w = exp(+ln100 p^beta); here exp(-ln100 p^beta), detached, because
    # its text has w in [0, 1], high at low p. With a gradient, w itself would be minimised.
    logp = log_p(logits, target)
    p = logp.detach().exp()
    w = torch.exp((1 if printed else -1) * math.log(100) * p**beta)
    return weighted_mean(w, logp, target)


def by_name(name, beta, frequency, device="cpu"):
    """A loss -> f(logits, target); `frequency` of class 1 among the labels is for FW alone."""
    if name == "fw":  # the weights are put on the device once, not at every call
        weights = torch.tensor(fw_weights((1 - frequency, frequency)), device=device)
        return partial(fw, weights=weights)
    return partial(dwce, beta=beta) if name == "dwce" else ce
