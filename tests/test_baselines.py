"""The three compared methods: what makes each one that method, and that it learns."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import baselines
import data
import evaluate
import predict
import train
from jobs import TINY, call, ok, one_line_of
from model import Network


@pytest.mark.parametrize("method, epochs", [("multitask", 6), ("mil", 4), ("transfer", 6)])
def test_each_method_learns(slides, tmp_path, method, epochs):
    """Better than the answer that needs no eyes; its checkpoint gives the same figures again."""
    lr = [] if method == "transfer" else ["--lr", 1e-3]
    out = ok(train.main, "--data", slides, "--out", tmp_path / "r", *TINY, "--epochs", epochs,
             "--pixel-frac", 1, "--method", method, *lr)
    results = json.loads((tmp_path / "r/results.json").read_text())
    index = evaluate.load_index(train.parse(["--data", str(slides), *TINY])[0])
    share = index.tiles["tumour"][~index.tiles["train"]].mean()
    assert results["dsc"] > 2 * share / (1 + share) + 0.15, results["dsc"]
    assert (results["accuracy"] is None) == (method == "transfer")
    assert ok(evaluate.main, "--ckpt", tmp_path / "r/last.pt").strip() in out


def test_every_method_makes_as_many_steps_as_ours(slides, tmp_path):
    """Same tiles in the same number of batches: only then do the tables compare methods."""
    steps, tiles = {}, {}
    for name in ("ours", "multitask", "mil", "transfer"):
        ok(train.main, "--data", slides, "--out", tmp_path / name, *TINY, "--method", name)
        state = torch.load(tmp_path / name / "last.pt", weights_only=True)["optimizer"]["state"]
        steps[name] = int(state[0]["step"])                     # of the first convolution
        tiles[name] = (tmp_path / name / "tiles.csv").read_text()
    assert len(set(steps.values())) == len(set(tiles.values())) == 1


def test_the_trunk_takes_torchvisions_weights(tmp_path):
    """Names and shapes of torchvision's resnet18, written down here."""
    shapes = {"conv1.weight": (64, 3, 7, 7), "fc.weight": (1000, 512), "fc.bias": (1000,)}

    def norm(name, c):
        shapes.update({f"{name}.{k}": (c,) for k in ("weight", "bias", "running_mean",
                                                     "running_var")})
        shapes[f"{name}.num_batches_tracked"] = ()

    norm("bn1", 64)
    for n, (c_in, c) in enumerate([(64, 64), (64, 128), (128, 256), (256, 512)], 1):
        for k in (0, 1):
            block = f"layer{n}.{k}"
            shapes[f"{block}.conv1.weight"] = (c, c_in if k == 0 else c, 3, 3)
            shapes[f"{block}.conv2.weight"] = (c, c, 3, 3)
            norm(f"{block}.bn1", c), norm(f"{block}.bn2", c)
        if n > 1:
            shapes[f"layer{n}.0.downsample.0.weight"] = (c, c_in, 1, 1)
            norm(f"layer{n}.0.downsample.1", c)
    rng = torch.Generator().manual_seed(0)
    weights = {name: torch.rand(shape, generator=rng) for name, shape in shapes.items()}
    assert len(weights) == 122                                  # as torchvision's has
    torch.save(weights, tmp_path / "resnet18.pth")
    trunk = baselines.Trunk()
    baselines.load_pretrained(trunk, str(tmp_path / "resnet18.pth"))
    state = trunk.state_dict()
    assert set(state) == {n for n in weights if not n.startswith(("layer4.", "fc."))}
    assert all(torch.equal(state[name], weights[name].to(state[name])) for name in state)
    assert trunk(torch.zeros(2, 3, 64, 96)).shape == (2, 256, 4, 6)


def test_weights_that_are_none_get_a_line(slides, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    for source in (tmp_path / "no.pth", tmp_path / "other.pth", "https://localhost:9/resnet18.pth"):
        line = one_line_of(*call(train.main, "--data", slides, *TINY, "--method", "mil", "--out",
                                 tmp_path / "r", "--pretrained", source))
        assert str(source) in line and "download the file" in line
    for flags, said in (("--pretrained x", "does not have"), ("--method mil --image-frac 0",
                                                             "needs image labels")):
        assert said in one_line_of(*call(train.main, "--data", slides, *TINY, "--out",
                                         tmp_path / "r", *flags.split()))
    assert not (tmp_path / "r").exists()


def test_image_logits_of_multitask_are_the_maximum_of_its_map():
    torch.manual_seed(0)
    model = baselines.MultiTask().eval()
    logits, scores = model(torch.randint(0, 256, (2, 3, 64, 64)))
    assert logits.shape == (2, 2, 64, 64)
    assert torch.equal(logits.amax((2, 3)), scores)
    assert torch.equal(logits[..., ::8, ::8], logits[..., 7::8, 7::8])      # nearest, 8 px cells


def test_multitask_takes_a_constant_mask_where_there_is_only_an_image_label():
    tiles = np.zeros(4, data.TILE)
    tiles["tumour"], tiles["label"] = [0.5, 0, 0.9, 0], [1, 0, 1, 0]
    tiles["pixel"], tiles["image"] = [True, True, False, False], [False, False, True, True]
    torch.manual_seed(0)
    model = baselines.MultiTask().eval()
    step1, step2 = baselines.multitask(SimpleNamespace(device="cpu"), model, tiles)
    images, masks = torch.randint(0, 256, (4, 3, 64, 64)), torch.zeros(4, 64, 64, dtype=torch.uint8)
    masks[0, :, :32] = 1
    masks[2, :5] = 1                            # known to nobody: tile 2 has an image label alone
    labels, rows = torch.tensor([1, 0, 1, 0]), torch.arange(4)
    total, logits = step1(images, masks, labels, rows)
    target = masks.long()
    target[2], target[3] = 1, 0
    f = (0.5 + 0 + 1 + 0) / 4                   # of tumour in the masks that are used
    pixel = F.cross_entropy(logits, target, reduction="none") * torch.where(
        target == 1, 0.5 / f, 0.5 / (1 - f))
    scores = model(images)[1]
    image = F.cross_entropy(scores, labels)     # half of the image labels are cancer: weights 1
    assert total.item() == pytest.approx((pixel.mean() + image).item(), rel=1e-5)
    other, found = step2(images, masks, labels, rows)
    assert other.item() == total.item() and torch.equal(found, scores)


@pytest.mark.parametrize("cells", [1, 9, 10, 64])
def test_bags_of_any_size_have_a_loss(cells):
    """int(a n) is 0 below ten cells: NaN in the published code."""
    z = torch.randn(6, cells, generator=torch.Generator().manual_seed(cells), requires_grad=True)
    label = torch.tensor([1, 0, 1, 1, 0, 0])
    value = baselines.mil_loss(z, label)
    count, slow = max(1, int(0.1 * cells)), []
    for bag, positive in zip(z.tolist(), label.tolist()):
        if positive:
            slow += [np.log1p(np.exp(-v)) for v in sorted(bag)[-count:]]
        else:
            slow += [np.log1p(np.exp(v)) for v in bag]
    assert value.item() == pytest.approx(np.mean(slow), rel=1e-5)
    value.backward()
    assert ((z.grad != 0).sum(1) == torch.where(label == 1, count, cells)).all()
    for one in (torch.ones(6), torch.zeros(6)):
        assert torch.isfinite(baselines.mil_loss(z, one.long()))


def test_cells_of_mil_learn_from_the_share_of_tumour_in_them():
    torch.manual_seed(0)
    model = baselines.MIL().eval()
    step1, step2 = baselines.mil(None, model, None)
    images, masks = torch.randint(0, 256, (2, 3, 32, 32)), torch.zeros(2, 32, 32, dtype=torch.uint8)
    masks[0, :8, :16] = 1                       # half of the first cell
    total, logits = step1(images, masks, None, None)
    z, share = model.cells(images)[:, 0], torch.zeros(2, 2, 2)
    share[0, 0, 0] = 0.5
    assert total.item() == pytest.approx(
        F.binary_cross_entropy_with_logits(z, share).item(), rel=1e-5)
    assert torch.equal(logits.argmax(1)[:, ::16, ::16], (z > 0).long())
    assert torch.equal(step2(images, masks, torch.tensor([1, 0]), None)[1].argmax(1),
                       (z.amax((1, 2)) > 0).long())


def test_transfer_keeps_the_encoder_and_begins_with_a_new_decoder(slides, tmp_path, monkeypatch):
    """Phase A moves no decoder, phase B no class branch, and B's encoder starts as A's ended."""
    argv = ["--data", slides, "--out", tmp_path / "r", *TINY, "--epochs", 2, "--method", "transfer"]
    saved, save = [], torch.save

    def keep(checkpoint, file):
        saved.append({k: v.clone() for k, v in checkpoint["model"].items()})
        save(checkpoint, file)

    def decode(self, maps):                     # is first called in phase B
        if not encoders:
            encoders.append({k: v.clone() for k, v in self.named_parameters()})
        return real(self, maps)

    encoders, real = [], Network.decode
    monkeypatch.setattr(Network, "decode", decode)
    monkeypatch.setattr(torch, "save", keep)
    out = ok(train.main, *argv)
    assert all(torch.equal(encoders[0][name], saved[0][name]) for name in encoders[0])
    # A: one epoch, as ours has one of step 2; B: two; and BN's statistics.
    assert len(saved) == 4
    lines = [json.loads(line) for line in (tmp_path / "r/log.jsonl").read_text().splitlines()]
    assert ["loss_cls" in line for line in lines] == [True, False, False]
    assert ["loss_seg" in line for line in lines] == [False, True, True] and "left out" in out
    torch.manual_seed(0)
    before = Network(8).state_dict()
    parts = dict(Network(8).named_parameters())
    for name in parts:
        part = name.split(".")[0]
        if part in ("psps", "ups", "fuses", "head"):
            assert torch.equal(saved[0][name], before[name])
        elif part == "classifier":
            assert torch.equal(saved[2][name], saved[0][name])
        else:
            assert not torch.equal(saved[0][name], before[name])


def test_a_method_resumes_and_predicts_whole_slides(slides, tmp_path):
    ok(train.main, "--data", slides, "--out", tmp_path / "r", *TINY, "--method", "mil")
    checkpoint = torch.load(tmp_path / "r/last.pt", weights_only=True)
    assert checkpoint["args"]["method"] == "mil"
    ok(train.main, "--resume", tmp_path / "r/last.pt", "--epochs", 3)
    assert "lesions" in ok(predict.main, "--ckpt", tmp_path / "r/last.pt", "--device", "cpu",
                           sorted(slides.glob("test/*.tif"))[0])
    checkpoint["args"]["method"] = "transfer"
    torch.save(checkpoint, tmp_path / "t.pt")
    line = one_line_of(*call(train.main, "--resume", tmp_path / "t.pt", "--epochs", 3))
    assert "--epochs is 2" in line
