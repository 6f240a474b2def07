"""The losses: values of method and paper, a pixel loop as the oracle, the edge cases."""

import math

import pytest
import torch

from loss import ce, dwce, fw, fw_weights

LOSSES = {
    "ce": ce,
    "dwce": dwce,
    "dwce beta 1": lambda x, y: dwce(x, y, beta=1.0),
    "dwce printed": lambda x, y: dwce(x, y, printed=True),
    "fw": lambda x, y: fw(x, y, fw_weights((0.9, 0.1))),
}


def weight(name, p, label):
    return {
        "ce": 1.0,
        "dwce": 100 ** -(p**3),
        "dwce beta 1": 100**-p,
        "dwce printed": 100 ** (p**3),
        "fw": 1 / math.log(1.10 + (0.9, 0.1)[label]),
    }[name]


def slow(name, logits, target):
    """-mean of w log p, pixel by pixel, w a plain number."""
    total, count = logits.sum() * 0, 0
    for b in range(target.shape[0]):
        for y in range(target.shape[1]):
            for x in range(target.shape[2]):
                label = int(target[b, y, x])
                if label >= 0:
                    e = [torch.exp(logits[b, k, y, x]) for k in range(2)]
                    p = e[label] / (e[0] + e[1])
                    total, count = total - weight(name, p.item(), label) * torch.log(p), count + 1
    return total / max(count, 1)


@pytest.mark.parametrize(
    "p, w",
    [(0.1, 0.9954), (0.25, 0.9306), (0.5, 0.5623), (0.75, 0.1433), (0.9, 0.0348), (1 - 1e-7, 0.01)],
)
def test_dynamic_weight_has_the_values_of_beta_3(p, w):
    logits, label = torch.tensor([[math.log(p), math.log(1 - p)]]), torch.tensor([0])
    assert (dwce(logits, label) / ce(logits, label)).item() == pytest.approx(w, abs=1e-4)


@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_every_loss_falls_as_the_true_class_gains(p):
    """Eq. (2) as printed and left in the graph rises for p in (.449, .908): it cannot train."""
    for name, loss in LOSSES.items():
        logits = torch.tensor([[math.log(p), math.log(1 - p)]], requires_grad=True)
        loss(logits, torch.tensor([0])).backward()
        assert logits.grad[0, 0] < 0 < logits.grad[0, 1], name


@pytest.mark.parametrize("name", LOSSES)
def test_vectorised_loss_equals_the_pixel_loop_forward_and_gradient(name):
    torch.manual_seed(0)
    target = torch.randint(-1, 2, (2, 5, 4))
    logits = 2 * torch.randn(2, 2, 5, 4)
    fast, oracle = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    a, b = LOSSES[name](fast, target), slow(name, oracle, target)
    a.backward(), b.backward()
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fast.grad, oracle.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_labelled_is_exactly_zero(name):
    """F.cross_entropy over an all-ignored batch is NaN."""
    logits = torch.randn(2, 2, 4, 4, requires_grad=True)
    value = LOSSES[name](logits, torch.full((2, 4, 4), -1))
    value.backward()
    assert value == 0 and (logits.grad == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_logits_give_a_finite_float32_loss(name):
    logits = torch.tensor([[300.0, -300.0]], dtype=torch.bfloat16, requires_grad=True)
    value = LOSSES[name](logits, torch.tensor([1]))
    assert value.dtype == torch.float32 and value.isfinite() and value > 1


def test_fixed_weights_are_of_y_net():
    assert fw_weights((0.5, 0.0)) == pytest.approx([1 / math.log(1.6), 1 / math.log(1.1)])
