"""Train on a few pixel masks and many image labels: step 1 segments, step 2 classifies, in turn.

    python train.py --pixel-frac 0.1                            # synthetic slides, minutes on a laptop
    python train.py --data CAMELYON16 --pixel-frac 0.1          # S+C, the paper's headline row
    python train.py --data CAMELYON16 --pixel-frac 0.1 --image-frac 0           # S, without image labels
    python train.py --resume runs/x/last.pt                     # go on where it stopped

Sections 1.2 and 1.4, Figs. 2 and 4: pre-train with step 1 alone, then alternate. Writes to --out:
last.pt (checkpoint), log.jsonl (a line per epoch), tiles.csv, results.json, pictures/.
"""
import argparse
import functools
import itertools
import json
import math
import os
import platform
import time
from pathlib import Path

import numpy as np
import PIL
import tifffile
import torch

import data
import evaluate
import loss
from model import Network

# Defaults with --data: the paper's (section 2.1: Adam, 1e-4, batch 8) where it speaks.
# Deviation: the paper gives no tile size, resolution or number of epochs; here 512 px at 0.5 um/px and
# 50 epochs, the first 5 of them pre-training, because comparable work has 224-512 px, 20x, 20-100.
PAPER = {"tile": 512, "mpp": 0.5, "width": 32, "lr": 1e-4, "epochs": 50, "pretrain_epochs": 5}
# Without --data: small enough for a laptop, on slides that are simpler than tissue.
DEMO = {"tile": 128, "mpp": 1.0, "width": 16, "lr": 1e-3, "epochs": 8, "pretrain_epochs": 2}
MAY_CHANGE = {"epochs", "workers", "device", "out", "data", "resume"}       # when a run is resumed


def parse(argv=None):
    """Command line -> arguments, checkpoint to resume from or None."""
    def number(kind, low, high=math.inf, multiple=1):
        def check(text):
            value = kind(text)
            if not low <= value <= high or value % multiple:
                raise argparse.ArgumentTypeError(
                    f"{text} is not in [{low}, {high}]" + f", a multiple of {multiple}" * (multiple > 1))
            return value
        return check

    def both(name):
        return f"(default: {PAPER[name]}; {DEMO[name]} without --data)"

    losses, share, count = ("dwce", "ce", "fw"), number(float, 0, 1), number(int, 0)
    positive = number(float, 1e-12, 1e12)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("slides and labels").add_argument
    add("--data", help="folder of slides and their ASAP XML, any depth; train/ and test/ in it are the split "
        "(default: synthetic slides)")
    add("--pixel-frac", type=share, default=0.1, help="share of the training tiles whose mask is used; 0 "
        "keeps one tile of each class (default: 0.1)")
    add("--image-frac", type=share, default=1.0, help="share of the training tiles whose image label is "
        "used; 0 is the paper's S group (default: 1)")
    add("--label-unit", choices=("tile", "slide"), default="tile", help="--pixel-frac counts tiles, as in "
        "the paper, or whole slides, as when a pathologist outlines a few (default: tile)")
    add("--normal-per-cancer", type=positive, default=1.0, help="normal training tiles per cancer tile (default: 1)")
    add("--cancer-share", type=share, default=0.05, help="a tile with more tumour than this is cancer, with "
        "less but some it has no image label (default: 0.05)")
    add("--unlabelled-is-normal", action="store_true", help="take slides without XML as free of tumour")
    add("--tile", type=number(int, 16, 8192, 8), help=f"side of a tile in px {both('tile')}")
    add("--mpp", type=positive, help=f"um/px; the nearest level is read {both('mpp')}")
    add("--level", type=count, help="level to read where a file does not tell its um/px")
    add = parser.add_argument_group("method").add_argument
    add("--seg-loss", choices=losses, default="dwce", help="loss of step 1 (default: dwce)")
    add("--cls-loss", choices=losses, default="dwce", help="loss of step 2 (default: dwce)")
    add("--alpha", type=number(float, 0), default=1.0, help="weight of step 2's loss, Eq. 3; Adam all but "
        "cancels it (default: 1)")
    add("--beta", type=number(float, 0), default=3.0, help="exponent of the dynamic weight, Eq. 2 (default: 3)")
    add("--normal-masks", action="store_true", help="extension: normal tiles have a known mask, all zeros; "
        "step 2 trains the decoder on them")
    add("--width", type=number(int, 4, 1024, 4), help=f"channels C0 of the first scale {both('width')}")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=number(int, 1), help=f"passes over all training tiles {both('epochs')}")
    add("--pretrain-epochs", type=count, help=f"of them, with step 1 alone {both('pretrain_epochs')}")
    add("--batch-size", type=number(int, 1), default=8, help="tiles in a batch of each step (default: 8)")
    add("--lr", type=positive, help=f"Adam's learning rate {both('lr')}")
    add("--seed", type=count, default=0, help="of weights, split, labels and order (default: 0)")
    add = parser.add_argument_group("machine").add_argument
    add("--device", type=evaluate.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=count, help="processes that read tiles (default: 0 on a CPU, else up to 8)")
    add("--amp", action="store_true", help="bfloat16 autocast; losses stay float32")
    add("--out", help="folder of this run (default: runs/<time>)")
    add("--resume", metavar="LAST.PT", help="go on from this checkpoint, with its arguments")

    args, checkpoint = parser.parse_args(argv), None
    if args.resume:
        checkpoint = evaluate.load_checkpoint(args.resume, "cpu")
        parser.set_defaults(**checkpoint["args"], out=os.path.dirname(args.resume))
        args = parser.parse_args(argv)
        for name, value in checkpoint["args"].items():
            if name not in MAY_CHANGE and getattr(args, name) != value:
                parser.error(f"--{name.replace('_', '-')} was {value} in {args.resume}; leave it out, or start a new run")
    for name, value in (PAPER if args.data else DEMO).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.workers is None:
        args.workers = 0 if args.device.type == "cpu" else min(8, os.cpu_count())
    args.out = args.out or time.strftime("runs/%Y%m%d-%H%M%S")
    if not args.resume and Path(args.out, "last.pt").exists():
        parser.error(f"{args.out} holds a run; go on with --resume {args.out}/last.pt, or choose another --out")
    return args, checkpoint


def make_loss(name, beta, frequency):
    """A loss of loss.py by its name -> f(logits, target); `frequency` (2,) is of the classes, for FW."""
    return {"ce": loss.ce, "dwce": functools.partial(loss.dwce, beta=beta),
            "fw": functools.partial(loss.fw, weights=loss.fw_weights(frequency))}[name]


def main(argv=None):
    args, checkpoint = parse(argv)
    start, device, out = time.time(), args.device, Path(args.out)
    if not args.data:
        print(f"no --data: synthetic slides with demo settings, {' '.join(f'{k}={v}' for k, v in DEMO.items())}"
              " unless given; with --data the defaults are the paper's", flush=True)
    index, pool = evaluate.load_index(args)
    print(*data.describe(index), sep="\n", flush=True)

    torch.manual_seed(args.seed)
    model = Network(args.width).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    epochs_done = 0
    if checkpoint:
        if checkpoint["fingerprint"] != index.fingerprint():
            raise data.DataError(f"{args.resume}: slides, annotations or tiles have changed since; put them "
                                 "back as they were, or start a new run")
        evaluate.load_weights(model, checkpoint["model"], args.resume)
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["rng"].cpu())
        epochs_done = checkpoint["epoch"]

    tiles, dataset = index.tiles, data.Tiles(index, args.seed)
    pixel, image = np.flatnonzero(tiles["pixel"]), np.flatnonzero(tiles["image"])
    # Deviation: the paper does not say how long its two loaders are; here an epoch has as many iterations
    # as one pass over all training tiles takes, for every fraction, so that S and S+C make equal steps.
    iterations = math.ceil(len(pool) / args.batch_size)
    step1, step2 = (torch.utils.data.DataLoader(
        dataset, batch_sampler=data.Batches(rows, args.batch_size, iterations, (args.seed, stream)),
        num_workers=args.workers, persistent_workers=args.workers > 0, pin_memory=device.type == "cuda")
        for stream, rows in ((1, pixel), (2, image)))
    tumour, cancer = (float(tiles[name][rows].mean()) if len(rows) else 0.5
                      for name, rows in (("tumour", pixel), ("label", image)))
    seg_loss = make_loss(args.seg_loss, args.beta, (1 - tumour, tumour))
    cls_loss = make_loss(args.cls_loss, args.beta, (1 - cancer, cancer))
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=args.amp)

    def finite(value, step, rows):
        if not math.isfinite(value):
            names = ", ".join(f"{index.sources[n].name} at ({x}, {y})"
                              for n, x, y in tiles[rows.numpy()][["slide", "x", "y"]].tolist())
            raise data.DataError(f"loss of step {step} is {value} in epoch {epoch + 1}; tiles: {names}; "
                                 "lower --lr, or look at these tiles; last.pt holds the epoch before")
        return value

    out.mkdir(parents=True, exist_ok=True)
    data.write_tiles(index, out / "tiles.csv")
    log = (out / "log.jsonl").read_text().splitlines()[:epochs_done] if checkpoint else []
    for epoch in range(epochs_done, args.epochs):
        model.train()
        both = len(image) > 0 and epoch >= args.pretrain_epochs
        step1.batch_sampler.epoch = step2.batch_sampler.epoch = epoch
        sums, began = np.zeros(7), time.time()
        batches = zip(step1, step2 if both else itertools.repeat(None))
        for batch1, batch2 in data.progress(batches, f"epoch {epoch + 1}/{args.epochs}", iterations):
            # Step 1: pixel labels -> encoder, PSP, decoder. The class branch gets no gradient at all.
            images, masks, _, rows = batch1
            images, masks = images.to(device, non_blocking=True), masks.to(device, non_blocking=True)
            with autocast():
                logits = model.decode(model.encode(images))
            loss_seg = seg_loss(logits, masks)
            sums[0] += finite(loss_seg.item(), 1, rows)
            optimizer.zero_grad(set_to_none=True)
            loss_seg.backward()
            optimizer.step()
            hit, either = ((logits.argmax(1) == 1) & (masks == 1)).sum(), logits.argmax(1).sum() + masks.sum()
            sums[1:3] += 2 * hit.item(), either.item()

            # Step 2: image labels -> encoder, class branch. PSP and decoder get no gradient at all.
            if batch2 is None:
                continue
            images, _, labels, rows = batch2
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            with autocast():
                maps = model.encode(images)
                scores = model.classify(maps)
            loss_cls = args.alpha * cls_loss(scores, labels)
            if args.normal_masks:       # below 0 is unlabelled, 0 is normal
                zeros = (labels - 1 + (labels == 0).long())[:, None, None]
            sums[3] += finite(loss_cls.item(), 2, rows)
            optimizer.zero_grad(set_to_none=True)
            loss_cls.backward()
            optimizer.step()
            sums[4:6] += (scores.argmax(1) == labels).sum().item(), len(labels)
        seconds = time.time() - began
        line = {"epoch": epoch + 1, "loss_seg": sums[0] / iterations, "train_dsc": sums[1] / max(sums[2], 1)}
        if both:
            line |= {"loss_cls": sums[3] / iterations, "train_accuracy": sums[4] / sums[5]}
        line |= {"tiles_per_s": iterations * args.batch_size * (1 + both) / seconds, "seconds": seconds}
        line = {k: float(f"{v:.4g}") for k, v in line.items()}
        print("  ".join(f"{k} {v:g}" for k, v in line.items()), flush=True)
        log.append(json.dumps(line))
        with data.atomic(out / "log.jsonl", "w") as file:
            file.write("\n".join(log) + "\n")
        with data.atomic(out / "last.pt", "wb") as file:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1,
                        "rng": torch.get_rng_state(), "fingerprint": index.fingerprint(),
                        "args": {k: str(v) if k == "device" else v for k, v in vars(args).items()}}, file)

    test = np.flatnonzero(~tiles["train"])
    counts = evaluate.count_tiles(model, index, test, device, args.batch_size, args.workers, args.amp)
    results = evaluate.summarise(index, test, counts, classes=len(image) > 0)
    results |= {"arguments": vars(args) | {"device": str(device)}, "seconds": time.time() - start,
                "versions": {"python": platform.python_version(), "torch": torch.__version__,
                             "numpy": np.__version__, "tifffile": tifffile.__version__, "pillow": PIL.__version__}}
    with data.atomic(out / "results.json", "w") as file:
        json.dump(results, file, indent=1)
    evaluate.write_pictures(out / "pictures", model, index, test, counts, device)
    print(f"test   {evaluate.show(results)}\n{results['seconds']:.0f} s; pictures and results in {out}; the same figures "
          f"again:\npython evaluate.py --ckpt {out / 'last.pt'}")


if __name__ == "__main__":
    data.run(main)
