"""Train on a few pixel masks and many image labels: step 1 segments, step 2 classifies, in turn.

    python train.py --pixel-frac 0.1                        # synthetic slides, no data needed
    python train.py --data CAMELYON16 --pixel-frac 0.1      # S+C, the paper's headline row
    python train.py --data CAMELYON16 --pixel-frac 0.1 --image-frac 0       # S, no image labels
    python train.py --resume runs/x/last.pt                 # go on where it stopped

Sections 1.2 and 1.4, Figs. 2 and 4: pre-train with step 1 alone, then alternate. Writes to --out:
last.pt (checkpoint), log.jsonl (a line per epoch), tiles.csv, index.npz, results.json, pictures/.
"""
import argparse
import functools
import io
import itertools
import json
import math
import os
import platform
import signal
import time
from collections import Counter
from multiprocessing import resource_tracker
from pathlib import Path

import numpy as np
import PIL
import tifffile
import torch

import baselines
import data
import evaluate
import loss
import predict
from data import number

# Deviation: the paper gives no tile size, resolution or epochs; here 512 px at 0.5 um/px and 50
# epochs, 5 of them pre-training, because comparable work has 224-512 px, 20x and 20-100 epochs.
PAPER = {"tile": 512, "mpp": 0.5, "width": 32, "lr": 1e-4, "epochs": 50, "pretrain_epochs": 5}
# Without --data: for a laptop, and for slides that are simpler than tissue.
DEMO = {"tile": 128, "mpp": 1.0, "width": 16, "lr": 1e-3, "epochs": 8, "pretrain_epochs": 1}
MAY_CHANGE = {"data", "device", "epochs", "resume", "workers"}              # on --resume


def parse(argv=None):
    """Command line -> arguments, and the checkpoint of --resume or None."""
    def either(name):
        return f"(default {PAPER[name]}; {DEMO[name]} without --data)"

    count, share, positive = number(int, 0), number(float, 0, 1), number(float, 1e-12, 1e12)
    losses = {"choices": ("dwce", "ce", "fw"), "default": "dwce"}
    parser = argparse.ArgumentParser(description=__doc__, usage="train.py [flags]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("slides and labels").add_argument
    add("--data", help="folder of slides and ASAP XML, any depth; train/ and test/ in it are the "
        "split (default: synthetic slides)")
    add("--pixel-frac", type=share, default=0.1, help="share of the training tiles whose mask is "
        "used; 0 keeps one tile of each class (default 0.1)")
    add("--image-frac", type=share, default=1.0, help="share of the training tiles whose image "
        "label is used; 0 is the paper's S group (default 1)")
    add("--label-unit", choices=("tile", "slide"), default="tile", help="masks are of single tiles "
        "(default, the paper) or of whole slides, as when a pathologist outlines a few")
    add("--normal-per-cancer", type=positive, default=1.0, help="normal tiles to train on, per "
        "cancer tile (default 1)")
    add("--cancer-share", type=share, default=0.05, help="share of tumour above which a tile is "
        "labelled cancer; with less but some it has no image label (default 0.05)")
    add("--unlabelled-is-normal", action="store_true", help="slides without XML have no tumour")
    add("--tile", type=number(int, 16, 8192, 8), help=f"side of a tile in px {either('tile')}")
    add("--mpp", type=positive, help=f"um/px, the nearest level is read {either('mpp')}")
    add("--level", type=count, help="level to read where a file does not tell its um/px")
    add = parser.add_argument_group("method").add_argument
    add("--method", choices=("ours", "multitask", "mil", "transfer"), default="ours", help="the "
        "paper's (default), or one that it compares with; losses, alpha, beta and width are ours")
    add("--pretrained", metavar="FILE_OR_URL", help="torchvision's ImageNet weights of a resnet18, "
        "for multitask and mil (default: random weights)")
    add("--seg-loss", **losses, help="loss of step 1 (default dwce)")
    add("--cls-loss", **losses, help="loss of step 2 (default dwce)")
    add("--alpha", type=number(float, 0), default=1.0, help="weight of step 2's loss, Eq. 3; Adam "
        "all but cancels it (default 1)")
    add("--beta", type=number(float, 0), default=3.0, help="exponent of dwce, Eq. 2 (default 3)")
    add("--normal-masks", action="store_true", help="extension: step 2 also trains the decoder, on "
        "normal tiles, whose mask is known to be empty")
    add("--width", type=number(int, 4, 1024, 4), help=f"channels C0 {either('width')}")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=number(int, 1), help=f"passes over the tiles {either('epochs')}")
    add("--pretrain-epochs", type=count, help=f"of step 1 alone {either('pretrain_epochs')}")
    add("--batch-size", type=number(int, 1), default=8, help="tiles, in each step (default 8)")
    add("--lr", type=positive, help=f"Adam's, falling linearly to 0 {either('lr')}; "
        "for mil 5 times the default")
    add("--seed", type=number(int, 0, 2 ** 63), default=0, help="of split, labels, weights and "
        "order (default 0)")
    add = parser.add_argument_group("machine").add_argument
    add("--device", type=predict.usable, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=count, help="processes that read tiles, for each of the two steps "
        "(default 0; up to 8 with a GPU)")
    add("--amp", action="store_true", help="bfloat16 autocast; the losses stay float32")
    add("--out", help="folder of this run (default runs/<time>)")
    add("--resume", metavar="LAST.PT", help="go on from this checkpoint, in its folder, with its "
        "arguments; more --epochs stretch the fall of the learning rate")

    args, checkpoint = parser.parse_args(argv), None
    if args.resume:
        checkpoint = predict.load_checkpoint(args.resume)
        if missing := {"optimizer", "epoch", "sums", "rng"} - checkpoint.keys():
            parser.error(f"{args.resume} has no {', '.join(sorted(missing))}; start a new run")
        old = checkpoint["args"] | {"out": os.path.dirname(args.resume) or "."}
        parser.set_defaults(**old)
        args = parser.parse_args(argv)
        fixed = old.keys() - MAY_CHANGE | ({"epochs"} if old["method"] == "transfer" else set())
        for name in fixed:
            if getattr(args, name) != old[name]:
                parser.error(f"--{name.replace('_', '-')} is {old[name]} for {args.resume}; leave "
                             "it out, or start a new run")
    for name, value in (PAPER if args.data else DEMO).items():
        if getattr(args, name) is None:
            setattr(args, name, value * (5 if (name, args.method) == ("lr", "mil") else 1))
    if args.workers is None:
        args.workers = 0 if args.device.type == "cpu" else min(8, os.cpu_count())
    args.out = args.out or time.strftime(f"runs/%Y%m%d-%H%M%S-{os.getpid()}")
    if args.method != "ours" and not args.image_frac:
        parser.error(f"--method {args.method} needs image labels: --image-frac above 0")
    if args.normal_masks and args.method != "ours":
        parser.error(f"--normal-masks is for our method, not for {args.method}")
    if args.pretrained and args.method not in ("multitask", "mil"):
        parser.error(f"--pretrained is a resnet18, which --method {args.method} does not have")
    if args.image_frac and args.pretrain_epochs >= args.epochs:
        parser.error(f"--pretrain-epochs {args.pretrain_epochs} of {args.epochs} leave none for "
                     "step 2; fewer of them, or more --epochs")
    if not args.resume and Path(args.out, "last.pt").exists():
        parser.error(f"{args.out} holds a run; go on with --resume {args.out}/last.pt, or choose "
                     "another --out")
    return args, checkpoint


def make_loss(name, beta, frequency):
    """A loss of loss.py -> f(logits, target); `frequency` (2,) of the classes is for FW."""
    return {"ce": loss.ce, "dwce": functools.partial(loss.dwce, beta=beta),
            "fw": functools.partial(loss.fw, weights=loss.fw_weights(frequency))}[name]


def ours(args, model, tiles):
    """The paper's two steps: functions of a batch -> loss, logits."""
    pixel, image = tiles[tiles["pixel"]], tiles[tiles["image"]]
    tumour = float(pixel["tumour"].mean())
    cancer = float(image["label"].mean()) if len(image) else 0.5
    seg_loss = make_loss(args.seg_loss, args.beta, (1 - tumour, tumour))
    cls_loss = make_loss(args.cls_loss, args.beta, (1 - cancer, cancer))

    def step1(images, masks, labels, rows):
        # Pixel labels -> encoder, PSP, decoder. The class branch has no gradient.
        logits = model.decode(model.encode(images))                     # (B, 2, H, W)
        return seg_loss(logits, masks), logits

    def step2(images, masks, labels, rows):
        # Image labels -> encoder, class branch. PSP and decoder have no gradient.
        maps = model.encode(images)
        scores = model.classify(maps)                                   # (B, 2)
        loss_cls = args.alpha * cls_loss(scores, labels)
        if args.normal_masks:
            # Deviation: the paper's step 2 leaves the decoder alone; here, on demand, it learns
            # that normal tiles have empty masks, because that costs no annotation. Balanced:
            # these pixels together weigh as much as the tumour pixels of step 1.
            empty = torch.where(labels == data.NORMAL, 0, -1)[:, None, None].expand(masks.shape)
            loss_cls = loss_cls + tumour * seg_loss(model.decode(maps), empty)
        return loss_cls, scores

    return step1, step2


def schedule(args, image_labels):
    """Epochs as (step 1?, step 2?, first and last epoch of the fall of the learning rate)."""
    pretrain, epochs = args.pretrain_epochs, args.epochs
    # Deviation: the paper does not tell how [30], a classifier, was made to segment; here our
    # network, first all of step 2, then all of step 1: what is missing then is the alternation.
    if args.method == "transfer":
        first = epochs - pretrain
        return [(False, True, 0, first)] * first + [(True, False, first, first + epochs)] * epochs
    return [(True, image_labels and epoch >= pretrain, 0, epochs) for epoch in range(epochs)]


class Interrupted(KeyboardInterrupt):
    """Between two iterations, so that what they have done can be saved."""


class Interruptible:
    """Ctrl-C and SIGTERM stop a loop over batches at once while it waits for one, else after the
    iteration at hand; a second Ctrl-C stops it anywhere, as KeyboardInterrupt."""

    def __enter__(self):
        self.asked, self.waiting = set(), False
        self.before = {number: signal.signal(number, self.ask)
                       for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number, _):
        if number == signal.SIGINT in self.asked:
            raise KeyboardInterrupt
        self.asked.add(number)
        if self.waiting:
            self.waiting = False
            raise Interrupted

    def batches(self, start):
        """Yield from what `start()` returns."""
        batches = None
        while True:
            if self.asked:
                raise Interrupted
            self.waiting = True
            batches = batches or iter(start())
            batch = next(batches, None)
            self.waiting = False
            if batch is None:
                return
            yield batch


def start_workers(*loaders):
    """On POSIX they are deaf to Ctrl-C, which a terminal sends to all: their parent ends them."""
    if os.name != "posix":
        return
    resource_tracker.ensure_running()           # with a worker that is spawned, it would undo this:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        for loader in loaders:
            iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def main(argv=None):
    args, checkpoint = parse(argv)
    start, device, out = time.time(), args.device, Path(args.out)
    if not args.data:
        print("no --data: synthetic slides, and demo settings where not given:",
              *(f"--{k.replace('_', '-')} {v}" for k, v in DEMO.items()), flush=True)
    index = evaluate.load_index(args)
    pool, fingerprint = evaluate.choose_labels(index, args), index.fingerprint()
    print(*data.describe(index), sep="\n", flush=True)

    torch.manual_seed(args.seed)
    model = predict.network(args).to(device)
    if args.pretrained and not checkpoint:
        baselines.load_pretrained(model.trunk, args.pretrained)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    epochs_done, sums = 0, Counter()
    if checkpoint:
        if checkpoint["fingerprint"] != fingerprint:
            raise data.DataError(f"{args.resume}: slides or annotations have changed since; put "
                                 "them back as they were, or start a new run")
        predict.load_weights(model, checkpoint, args.resume)
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["rng"])
        epochs_done, sums = checkpoint["epoch"], Counter(checkpoint["sums"])

    tiles, dataset = index.tiles, data.Tiles(index, args.seed)
    pixel, image = np.flatnonzero(tiles["pixel"]), np.flatnonzero(tiles["image"])
    if args.method == "multitask":                                  # one list of both
        pixel = image = np.union1d(pixel, image)
    step1, step2 = {"multitask": baselines.multitask, "mil": baselines.mil}.get(
        args.method, ours)(args, model, tiles)
    # Deviation: the paper does not say how long an epoch of two loaders is; here one pass over all
    # training tiles, at every fraction, so that S and S+C make the same number of step 1.
    iterations = math.ceil(len(pool) / args.batch_size)
    loader1, loader2 = (torch.utils.data.DataLoader(
        dataset, batch_sampler=data.Batches(rows, args.batch_size, (args.seed, stream)),
        num_workers=args.workers, persistent_workers=args.workers > 0,
        worker_init_fn=data.of_a_worker, generator=torch.Generator(),
        pin_memory=device.type == "cuda")
        for stream, rows in ((11, pixel), (12, image)))

    def update(step, batch):
        """Forward, backward, Adam -> the loss, predicted classes, and the batch on the device."""
        rows, batch = batch[3].numpy(), [t.to(device, non_blocking=True) for t in batch]
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            total, logits = step(*batch)
        if not math.isfinite(value := total.item()):
            names = [f"{index.sources[n].name} at ({x}, {y})"
                     for n, x, y in tiles[rows][["slide", "x", "y"]].tolist()]
            raise data.DataError(f"loss of {step.__name__} is {value} in epoch {epoch + 1}; lower "
                                 f"--lr or look at these tiles: {', '.join(names)}")
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        return value, logits.argmax(1), batch

    def save(epoch, sums):
        """last.pt: `epoch` epochs are done, and of the next one what `sums` counts."""
        buffer = io.BytesIO()           # torch takes a full disk for a fault of its own
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                    "epoch": epoch, "sums": dict(sums), "rng": torch.get_rng_state(),
                    "fingerprint": fingerprint, "args": vars(args) | {"device": str(device)}},
                   buffer)
        with data.atomic(out / "last.pt", "wb") as file:
            file.write(buffer.getbuffer())

    epochs = schedule(args, len(image) > 0)
    if epochs_done + bool(sums) > len(epochs):
        raise data.DataError(f"{args.resume}: epoch {epochs_done + bool(sums)} has begun; give at "
                             "least as many --epochs")
    out.mkdir(parents=True, exist_ok=True)
    data.write_tiles(index, out / "tiles.csv")
    data.write_index(index, out / "index.npz")
    log = (out / "log.jsonl").read_text().splitlines()[:epochs_done] if epochs_done else []
    if args.workers:
        start_workers(*(loader for loader, used in zip((loader1, loader2), zip(*epochs))
                        if any(used)))
    go_on = f"go on with: python train.py --resume {out / 'last.pt'}"
    with Interruptible() as interruptible:
        for epoch in range(epochs_done, len(epochs)):
            model.train()
            segment, classify, first, last = epochs[epoch]
            began = time.time() - sums["seconds"]
            numbers = range(epoch * iterations + sums["iterations"], (epoch + 1) * iterations)
            loader1.batch_sampler.numbers = loader2.batch_sampler.numbers = numbers

            def batches():
                return data.progress(zip(numbers, loader1 if segment else itertools.repeat(None),
                                         loader2 if classify else itertools.repeat(None)),
                                     f"epoch {epoch + 1}/{len(epochs)}", len(numbers))

            try:
                for n, batch1, batch2 in interruptible.batches(batches):
                    # Deviation: the paper gives one learning rate; here it falls linearly to 0,
                    # because BN's running statistics lag behind weights that move (README, "What
                    # we found").
                    optimizer.param_groups[0]["lr"] = args.lr * (
                        1 - (n - first * iterations) / ((last - first) * iterations))
                    if segment:
                        loss_seg, found, (_, masks, _, _) = update(step1, batch1)
                        sums["loss_seg"] += loss_seg
                        sums["both"] += (found * masks).sum().item()
                        sums["either"] += (found.sum() + masks.sum()).item()
                    if classify:
                        loss_cls, found, (_, _, labels, _) = update(step2, batch2)
                        sums["loss_cls"] += loss_cls
                        sums["right"] += (found == labels).sum().item()
                    sums["iterations"] += 1
            except Interrupted:
                sums["seconds"] = time.time() - began
                save(epoch, sums)
                raise KeyboardInterrupt(f"saved in epoch {epoch + 1}; {go_on}") from None

            seconds, seen = time.time() - began, iterations * args.batch_size
            line = {"epoch": epoch + 1}
            if segment:
                line["loss_seg"] = sums["loss_seg"] / iterations
                line["train_dsc"] = 2 * sums["both"] / max(sums["either"], 1)
            if classify:
                line["loss_cls"] = sums["loss_cls"] / iterations
                line["train_accuracy"] = sums["right"] / seen
            line |= {"tiles_per_s": seen * (segment + classify) / seconds, "seconds": seconds}
            line = {name: float(f"{value:.4g}") for name, value in line.items()}
            print(*(f"{name} {value:g} " for name, value in line.items()), flush=True)
            log.append(json.dumps(line))
            with data.atomic(out / "log.jsonl", "w") as file:
                file.write("\n".join(log) + "\n")
            sums = Counter()
            save(epoch + 1, sums)
        if interruptible.asked:
            raise KeyboardInterrupt(f"all epochs are done, but not scored; {go_on}")

    # Deviation: the paper leaves BN's statistics as they ran; here they are estimated anew over the
    # step-1 tiles, because running means of the last 20 small batches, half of them from step 2,
    # are far off (README, "What we found").
    evaluate.settle_batch_norm(model, index, pixel, args)
    save(len(epochs), {})
    test = np.flatnonzero(~tiles["train"])
    counts = evaluate.count_tiles(model, index, test, args)
    results = evaluate.summarise(index, test, counts, classes=predict.classifies(args)) | {
        "arguments": vars(args) | {"device": str(device)}, "seconds": time.time() - start,
        "versions": {"python": platform.python_version()} | {
            module.__name__: module.__version__ for module in (torch, np, tifffile, PIL)}}
    with data.atomic(out / "results.json", "w") as file:
        json.dump(results, file, indent=1)
    evaluate.write_pictures(out / "pictures", model, index, test, counts, args)
    print(evaluate.headline(results))
    print(f"{results['seconds']:.0f} s; pictures and results are in {out}; the same figures "
          f"again:\npython evaluate.py --ckpt {out / 'last.pt'}")


if __name__ == "__main__":
    data.run(main)
