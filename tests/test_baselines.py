"""The three compared methods: what makes each one that method, and that it learns."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jobs import QUICK, call, ok, one_line_of

import data
import evaluate
import train
from extras import baselines
from slide import DataError

ARGS = {"device": "cpu", "workers": 0, "amp": False, "batch_size": 8, "seed": 0, "width": 8}
ARGS |= {"lr": 3e-3, "seg_loss": "ce", "cls_loss": "ce", "alpha": 1, "beta": 3}
ARGS = SimpleNamespace(**ARGS)


class DarkQuarters(torch.utils.data.Dataset):
    """Tiles of 32 px of noise, whose tumour is a dark quarter of every second tile."""

    def __init__(self, count=48):
        rng = np.random.default_rng(0)
        self.table = np.zeros(count, data.TILE)
        self.table["label"] = np.arange(count) % 2
        self.table["tumour"] = self.table["label"] / 4
        self.masks = np.zeros((count, 32, 32), np.uint8)
        for mask in self.masks[1::2]:
            y, x = 16 * rng.integers(2, size=2)
            mask[y : y + 16, x : x + 16] = 1
        self.images = rng.integers(120, 256, (count, 3, 32, 32)) - 60 * self.masks[:, None]
        self.images = self.images.astype(np.uint8)

    def __getitem__(self, key):
        label = int(self.table["label"][key[0]])
        return torch.tensor(self.images[key[0]]), torch.tensor(self.masks[key[0]]), label


@pytest.fixture
def steps(monkeypatch):
    """The learning rate of every step of any Adam."""
    rates, step = [], torch.optim.Adam.step

    def note(adam):
        rates.append(adam.param_groups[0]["lr"])
        step(adam)

    monkeypatch.setattr(torch.optim.Adam, "step", note)
    return rates


@pytest.fixture
def losses(monkeypatch):
    """The loss of every update, none of which is made."""
    values = []
    monkeypatch.setattr(train, "update", lambda adam, value: values.append(value.item()))
    return values


def noise(*shape):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(0)).byte()


def started(method):
    torch.manual_seed(0)
    return baselines.network(method, ARGS.width)


@pytest.mark.parametrize("method", baselines.METHODS)
def test_each_method_learns_from_a_few_masks_and_many_labels(method, steps):
    """On tiles that it has not seen: much better than to call every pixel tumour."""
    tiles, model = DarkQuarters(), started(method)
    unseen = np.arange(32, 48)
    baselines.METHODS[method](ARGS, model, tiles, np.arange(8), np.arange(32), 30, 10)
    assert steps[0] == ARGS.lr and len(steps) == 50 and 0 < steps[-1] < ARGS.lr / 20
    counts = evaluate.count(model, tiles, unseen, ARGS)
    share = tiles.table["tumour"][unseen].mean()
    assert evaluate.dsc_iou(counts)[0] > 2 * share / (1 + share) + 0.2
    if method != "transfer":
        assert (counts[:, 3] == tiles.table["label"][unseen]).mean() > 0.9


def test_methods_are_compared_on_the_same_tiles_after_as_many_steps(few, tmp_path, steps):
    """Only then do the tables compare methods. What a run wrote can be loaded and scored again."""
    flags = ["--data", few, *QUICK, "--pixel-frac", 0.5]
    ok(train.main, *flags, "--out", tmp_path / "ours")
    ours, used = len(steps), (tmp_path / "ours/tiles.csv").read_text()
    keys = json.loads((tmp_path / "ours/results.json").read_text()).keys()
    resumed = call(baselines.main, "mil", "--resume", tmp_path / "ours/last.pt")
    assert "--resume is for train.py" in one_line_of(*resumed)  # would train over that run
    for method in baselines.METHODS:
        steps.clear()
        out = ok(baselines.main, method, *flags, "--out", tmp_path / method)
        assert len(steps) == ours and (tmp_path / method / "tiles.csv").read_text() == used
        results = json.loads((tmp_path / method / "results.json").read_text())
        assert results.keys() == keys and evaluate.headline(results) in out
        assert (results["accuracy"] is None) == (method == "transfer")

        model, args = baselines.load_method(tmp_path / method / "last.pt")
        assert args.method == method and not model.training
        tiles = data.tile_slides(data.find_slides(few), args.tile, args.mpp)
        _, for_bn, labelled = data.choose_labels(tiles, 0.5, 1)
        for_bn = np.union1d(for_bn, labelled) if method == "multitask" else for_bn
        batches = [int(n) for name, n in model.state_dict().items() if "num_batches" in name]
        assert {*batches} == {math.ceil(len(for_bn) / args.batch_size)}
        rows = np.flatnonzero(~tiles.table["train"])
        counts = evaluate.count(model, tiles, rows, args)
        assert counts[:, 0].sum() == results["counts"]["tp"]


def test_the_learning_rate_of_mil_is_five_times_the_default(few, tmp_path, monkeypatch):
    def tell(args, *_):
        raise DataError(f"{args.lr:g}")

    scale = "--data", few, *QUICK[:4], "--out", tmp_path
    for method, factor in (("mil", 5), ("multitask", 1)):
        monkeypatch.setitem(baselines.METHODS, method, tell)
        for flags in ([], ["--lr", "0.1"], ["--lr=0.1"]):
            lr = 0.1 if flags else train.FULL["lr"] * factor
            assert one_line_of(*call(baselines.main, method, *scale, *flags)) == f"error: {lr:g}"


def test_what_no_method_has_is_refused_in_a_line(few, tmp_path):
    here = "--data", few, *QUICK, "--out", tmp_path / "r"
    for argv, said in (
        (("mil", *here, "--image-frac", 0), "--image-frac"),
        (("ours", *here), "choose from"),
    ):
        assert said in one_line_of(*call(baselines.main, *argv))
    assert not (tmp_path / "r").exists()


def test_the_trunk_is_a_resnet18_without_its_fourth_stage():
    """Its parameters: the 11,689,512 of the published network less stage 4 and the classifier."""
    trunk = started("mil").trunk
    stage4 = 512 * 256 * 9 + 3 * 512 * 512 * 9 + 512 * 256 + 5 * 2 * 512
    assert sum(p.numel() for p in trunk.parameters()) == 11_689_512 - stage4 - 513 * 1000
    assert trunk(noise(2, 3, 64, 96).float()).shape == (2, 256, 4, 6)


def test_class_logits_of_multitask_are_the_maximum_of_its_map():
    model = started("multitask").eval()
    logits, class_logits = model(noise(2, 3, 64, 64))
    assert logits.shape == (2, 2, 64, 64)
    assert torch.equal(logits.amax((2, 3)), class_logits)
    assert torch.equal(logits[..., ::8, ::8], logits[..., 7::8, 7::8])  # nearest, cells of 8 px


def test_multitask_takes_a_constant_mask_where_there_is_only_a_label(losses):
    """Of tiles 0 and 1 the mask is used; 2 and 3 are normal and tumour all over."""
    tiles, model = DarkQuarters(4), started("multitask").eval()
    tiles.table["label"][0] = data.AMBIGUOUS  # tells nothing of the image
    with_masks, with_labels = np.array([0, 1]), np.array([2, 3])
    baselines.multitask(ARGS, model, tiles, with_masks, with_labels, 1, 1)
    masks = torch.tensor(tiles.masks).long()
    masks[2], masks[3] = 0, 1
    share = (0 + 0.25 + 0 + 1) / 4  # of tumour in the masks that are used
    logits, class_logits = model(torch.tensor(tiles.images))
    weights = torch.where(masks == 1, 0.5 / share, 0.5 / (1 - share))
    loss_seg = (F.cross_entropy(logits, masks, reduction="none") * weights).mean()
    loss_cls = F.cross_entropy(class_logits[1:], torch.tensor([1, 0, 1]))  # half cancer: weights 1
    assert losses == [pytest.approx((loss_seg + loss_cls).item(), rel=1e-4)]


@pytest.mark.parametrize("n", [1, 9, 10, 64])
def test_bags_of_any_size_have_a_loss(n):
    """int(a n) is 0 below ten instances: NaN in the published code."""
    z = torch.randn(6, n, generator=torch.Generator().manual_seed(n), requires_grad=True)
    label = torch.tensor([1, 0, 1, 1, 0, 0])
    value = baselines.mil_loss(z, label)
    count, slow = max(1, int(0.1 * n)), []
    for bag, positive in zip(z.tolist(), label.tolist()):
        if positive:
            slow += [np.log1p(np.exp(-v)) for v in sorted(bag)[-count:]]
        else:
            slow += [np.log1p(np.exp(v)) for v in bag]
    assert value.item() == pytest.approx(np.mean(slow), rel=1e-5)
    value.backward()
    assert ((z.grad != 0).sum(1) == torch.where(label == 1, count, n)).all()
    for one in (torch.ones(6), torch.zeros(6)):
        assert torch.isfinite(baselines.mil_loss(z, one.long()))


def test_instances_of_mil_learn_from_the_tumour_in_them_and_in_turn_from_bags(losses):
    tiles, model = DarkQuarters(4), started("mil").eval()
    tiles.masks[:] = 0
    tiles.masks[1, :8, :16] = 1  # half of the first instance
    baselines.mil(ARGS, model, tiles, np.array([0, 1]), np.arange(4), 2, 1)
    z, share = model.low(torch.tensor(tiles.images))[:, 0], torch.zeros(2, 2, 2)
    share[1, 0, 0] = 0.5
    instances = F.binary_cross_entropy_with_logits(z[:2], share).item()
    bags = baselines.mil_loss(z.flatten(1), torch.tensor([0, 1, 0, 1])).item()
    expected = [instances, instances, bags]  # the first is pre-training
    assert losses == pytest.approx(expected, rel=1e-4)

    logits, class_logits = model(torch.tensor(tiles.images))
    assert torch.equal(logits.argmax(1)[:, ::16, ::16], (z > 0).long())
    assert torch.equal(class_logits.argmax(1), (z.amax((1, 2)) > 0).long())


def test_transfer_keeps_the_encoder_and_begins_with_a_new_decoder(steps, monkeypatch):
    """Phase A moves no decoder and phase B no head; each has its own fall of the learning rate."""
    states, model, update = [], started("transfer"), train.update

    def keep(adam, value):
        update(adam, value)
        states.append({name: p.clone() for name, p in model.state_dict().items()})

    monkeypatch.setattr(train, "update", keep)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    baselines.transfer(ARGS, model, DarkQuarters(), np.arange(8), np.arange(32), 3, 1)
    assert steps == pytest.approx([ARGS.lr * part for part in (1, 1 / 2, 1, 2 / 3, 1 / 3)])
    for name in before:
        part = name.split(".")[0]
        after_a, after_b = states[1][name], states[-1][name]
        assert torch.equal(after_a, before[name]) == (part in ("psps", "ups", "fuses", "head"))
        assert torch.equal(after_b, after_a) == (part == "classifier")
