"""The network: which step moves what, sizes, and the errors for sizes that cannot be."""

import pytest
import torch
import torch.nn.functional as F

from loss import ce
from model import BINS, ESP, PSP, Network

SEGMENT, CLASSIFY = ("psps", "ups", "fuses", "head"), ("classifier",)


def step(model, optimizer, which):
    tiles = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    maps = model.encode(tiles)
    loss = (
        ce(model.decode(maps), torch.randint(0, 2, (2, 32, 32)))
        if which == 1
        else ce(model.classify(maps), torch.tensor([0, 1]))
    )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("which, mine, others", [(1, SEGMENT, CLASSIFY), (2, CLASSIFY, SEGMENT)])
def test_a_step_moves_its_branch_and_the_encoder_and_nothing_else(which, mine, others):
    """A gradient of 0 in place of None would let Adam's momentum move the other branch."""
    torch.manual_seed(0)
    model = Network(8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    step(model, optimizer, 3 - which)  # both branches have Adam state
    step(model, optimizer, which)
    weights = {name: p.detach().clone() for name, p in model.state_dict().items()}
    state = {
        name: {k: torch.as_tensor(v).clone() for k, v in optimizer.state[p].items()}
        for name, p in model.named_parameters()
    }
    step(model, optimizer, which)
    for name, p in model.named_parameters():
        if name.startswith(others):
            assert p.grad is None and torch.equal(p, weights[name]), name
            assert all(
                torch.equal(torch.as_tensor(v), state[name][k])
                for k, v in optimizer.state[p].items()
            ), name
        else:
            assert name.startswith(mine + ("convs", "esps")), name
            assert p.grad is not None and p.grad.abs().sum() > 0, name
            assert not torch.equal(p, weights[name]), name
    for name, buffer in model.named_buffers():  # BN statistics too
        if name.startswith(others):
            assert torch.equal(buffer, weights[name]), name


def test_psp_upsamples_in_float32_under_amp(monkeypatch):
    """A GPU adds a bin's gradient up in the map's own type: bfloat16 loses most of the sum."""
    terms = 0.1 + torch.randn(65_536, generator=torch.Generator().manual_seed(0))
    total = torch.zeros((), dtype=torch.bfloat16)
    for term in terms.bfloat16():  # one by one, as atomics do
        total += term
    assert total < 0.5 * terms.sum()
    interpolate, types = F.interpolate, []

    def watched(x, *args, **kwargs):
        types.append(x.dtype)
        return interpolate(x, *args, **kwargs)

    monkeypatch.setattr(F, "interpolate", watched)
    with torch.autocast("cpu", torch.bfloat16):
        out = PSP(8)(torch.randn(1, 8, 16, 16).bfloat16())
    assert types == [torch.float32] * len(BINS) and out.dtype == torch.bfloat16


@pytest.mark.parametrize("height, width", [(7, 13), (1, 1), (4, 64), (33, 2)])
def test_psp_takes_any_size_and_one_tile(height, width):
    psp = PSP(8).train()
    x = torch.randn(1, 8, height, width)
    assert psp(x).shape == (1, 16, height, width)
    assert torch.equal(psp(x)[:, :8], x)


@pytest.mark.parametrize("height, width", [(16, 16), (3, 40), (1, 7)])
def test_psp_is_the_map_beside_its_pooled_convolved_and_enlarged_views(height, width):
    """Section 1.5, one value at a time: a view's pixel is the mean over its bin, then 1x1."""
    torch.manual_seed(0)
    psp, x = PSP(8), torch.randn(2, 8, height, width)
    wanted = [x]
    for bins, conv in zip(BINS, psp.convs, strict=True):
        view = torch.empty(2, 2, bins, bins)
        for i in range(bins):
            for j in range(bins):
                top, left = i * height // bins, j * width // bins
                below, right = -(-(i + 1) * height // bins), -(-(j + 1) * width // bins)
                mean = x[:, :, top:below, left:right].mean((2, 3))
                view[:, :, i, j] = mean @ conv.weight[:, :, 0, 0].T + conv.bias
        wanted.append(F.interpolate(view, (height, width), mode="bilinear"))
    torch.testing.assert_close(psp(x), torch.cat(wanted, 1))


def test_esp_sees_five_pixels_away_and_no_further():
    esp = ESP(8).eval()
    torch.nn.init.constant_(esp.bn.bias, 100)  # no channel dies in the ReLU
    x = torch.zeros(1, 8, 21, 21, requires_grad=True)
    esp(torch.randn(1, 8, 21, 21) + x)[0, :, 10, 10].sum().backward()
    seen = x.grad[0].abs().sum(0).nonzero() - 10
    assert seen.min() == -5 and seen.max() == 5 and len(seen) == 1 + 4 * 8


@pytest.mark.parametrize("batch, height, width", [(1, 16, 16), (1, 24, 40), (3, 64, 32)])
def test_network_keeps_the_size_of_its_tiles_also_in_training_with_one(batch, height, width):
    segmentation, image = Network(8).train()(torch.randint(0, 256, (batch, 3, height, width)))
    assert segmentation.shape == (batch, 2, height, width) and image.shape == (batch, 2)


def test_a_batch_equals_its_tiles_one_by_one():
    torch.manual_seed(0)
    model, tiles = Network(8).eval(), torch.randint(0, 256, (3, 3, 32, 48))
    together = model(tiles)
    for n in range(3):
        for a, b in zip(together, model(tiles[n : n + 1]), strict=True):
            torch.testing.assert_close(a[n : n + 1], b, rtol=1e-4, atol=1e-5)


def test_a_coarse_map_reaches_the_mask_through_the_decoder_and_the_label_through_the_head():
    """Fig. 3: both branches start from the encoder's last map, and the mask uses all four."""
    torch.manual_seed(0)
    model = Network(8).eval()
    maps = [
        m.detach().requires_grad_() for m in model.encode(torch.randint(0, 256, (1, 3, 32, 32)))
    ]
    model.decode(maps).sum().backward()
    assert all(m.grad.abs().sum() > 0 for m in maps)
    for m in maps:
        m.grad = None
    model.classify(maps).sum().backward()
    assert [m.grad is not None for m in maps] == [False, False, False, True]


def test_sizes_that_cannot_be_are_refused():
    for width in (0, 2, 6, 30):
        with pytest.raises(ValueError, match="multiple of 4"):
            Network(width)
    for height, width in ((20, 32), (32, 36)):
        with pytest.raises(ValueError, match="multiples of 8"):
            Network(8)(torch.zeros(1, 3, height, width))
