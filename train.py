"""Train on a few pixel masks and many image labels: step 1 segments, step 2 classifies, in turn.

    python train.py --pixel-frac 0.1                        # synthetic slides, no data needed
    python train.py --data CAMELYON16 --pixel-frac 0.1      # S+C, the paper's headline row
    python train.py --data CAMELYON16 --pixel-frac 0.1 --image-frac 0       # S, no image labels
    python train.py --resume runs/x/last.pt                 # go on from its last whole epoch

Sections 1.2 and 1.4, Figs. 2 and 4: pre-train with step 1 alone, then alternate. Writes to --out:
last.pt (checkpoint), log.jsonl (a line per epoch), tiles.csv, results.json, pictures/.
"""

import argparse
import hashlib
import json
import math
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch.optim.swa_utils import update_bn

import data
import evaluate
import loss
from model import Network

# Deviation: the paper gives no tile size, resolution or epochs; here 512 px, 0.5 um/px and 50,
# because comparable work is near these.
FULL = {"tile": 512, "mpp": 0.5, "width": 32, "lr": 1e-4, "epochs": 50}  # lr: section 2.1
DEMO = {"tile": 128, "mpp": 1.0, "width": 16, "lr": 1e-3, "epochs": 8}  # without --data


def flags():
    """The command line's parser."""
    losses = {"choices": ("dwce", "ce", "fw"), "default": "dwce"}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=evaluate.AS_WRITTEN)
    add = parser.add_argument_group("slides and labels").add_argument
    add("--data", help="folder of slides and ASAP XML, at any depth (default: synthetic slides)")
    add("--pixel-frac", type=float, default=0.1, help="share of tiles with masks (default 0.1)")
    add("--image-frac", type=float, default=1, help="with image labels, 0: S group (default 1)")
    add("--label-unit", choices=("tile", "slide"), default="tile", help="what has masks or not")
    add("--level", type=int, help="level to read where a file does not tell its um/px")
    add = parser.add_argument_group("scale", f"with --data {FULL}, without {DEMO}").add_argument
    add("--tile", type=int, help="side of a tile in px, a multiple of 8")
    add("--mpp", type=float, help="um/px; the nearest level is read")
    add("--width", type=int, help="channels C0, a multiple of 4")
    add("--lr", type=float, help="Adam's, falling linearly to 0")
    add("--epochs", type=int, help="each as many iterations as a pass over the pool")
    add = parser.add_argument_group("training and machine").add_argument
    add("--pretrain-epochs", type=int, help="of step 1 alone (default: a tenth, at least 1)")
    add("--seg-loss", **losses, help="loss of step 1 (default dwce)")
    add("--cls-loss", **losses, help="loss of step 2 (default dwce)")
    add("--alpha", type=float, default=1, help="weight in Eq. (3) (default 1)")
    add("--beta", type=float, default=3, help="exponent of dwce, Eq. (2) (default 3)")
    add("--self-train", type=float, default=0, help="extension: share of px to learn from (0: off)")
    add("--batch-size", type=int, default=8, help="tiles in each step (default 8)")
    add("--seed", type=int, default=0, help="of split, labels, weights, order (default 0)")
    add("--device", default=evaluate.DEVICE)
    add("--workers", type=int, default=8 * torch.cuda.is_available(), help="readers for each step")
    add("--amp", action="store_true", help="bfloat16 autocast; the losses stay float32")
    run = time.strftime(f"runs/%Y%m%d-%H%M%S-{os.getpid()}")
    add("--out", default=run, help="folder of this run (runs/<time>)")
    add("--resume", help="last.pt of a run; go on with its arguments and folder")
    return parser


def parse_args(argv=None):
    """Command line -> arguments, and the checkpoint of --resume or None."""
    parser, checkpoint = flags(), None
    args = parser.parse_args(argv)
    if args.resume:
        checkpoint = evaluate.load_checkpoint(args.resume)
        old = checkpoint["args"] | {"out": os.path.dirname(args.resume) or "."}
        parser.set_defaults(**old)
        args = parser.parse_args(argv)
        if args.width != old["width"] or "iteration" not in checkpoint:
            parser.error(f"{args.resume} has another --width or version; start a new run")
    scale = FULL if args.data else DEMO
    vars(args).update({name: scale[name] for name in scale if getattr(args, name) is None})
    # Deviation: the paper gives no pre-training time; here a tenth, because 0 showed no clear gain.
    if args.pretrain_epochs is None:
        args.pretrain_epochs = min(max(1, args.epochs // 10), args.epochs - 1)
    if not all(0 <= f <= 1 for f in (args.pixel_frac, args.image_frac, args.self_train)):
        parser.error("--pixel-frac, --image-frac and --self-train are shares, 0 to 1")
    if args.self_train and not args.image_frac:
        parser.error("--self-train needs image-level labels; give --image-frac")
    if args.tile % 8 or args.width % 4 or min(args.tile, args.width, args.epochs) < 1:
        parser.error("--tile is a multiple of 8, --width of 4, --epochs at least 1")
    if args.image_frac and args.pretrain_epochs >= args.epochs:
        parser.error("no epoch is left for step 2; fewer --pretrain-epochs, or more --epochs")
    if not args.resume and Path(args.out, "last.pt").exists():
        parser.error(f"{args.out} holds a run; --resume {args.out}/last.pt, or another --out")
    return args, checkpoint


def update(optimizer, loss):
    optimizer.zero_grad()  # to None: Adam leaves a branch that was not run as it is, Fig. 4
    loss.backward()
    optimizer.step()


def save(path, model, optimizer, iteration, key, args):
    """Write a checkpoint aside, then rename it: a kill never leaves half a file."""
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    content |= {"iteration": iteration, "key": key, "args": vars(args)}
    torch.save(content, f"{path}.part")
    os.replace(f"{path}.part", path)


def log_line(epoch, sums, batch_size, seconds):
    """Sums over the iterations of an epoch -> the numbers to print and log. DataError for NaN."""
    sums = {name: float(value) for name, value in sums.items()}  # waits for a GPU
    n = sums["iterations"]
    dsc = 2 * sums["overlap"] / max(sums["area"], 1)
    line = {"loss_seg": sums["loss_seg"] / n, "train_dsc": dsc}
    if "loss_cls" in sums:
        line |= {"loss_cls": sums["loss_cls"] / n, "train_accuracy": sums["right"] / n / batch_size}
    line |= {"iterations_per_s": n / seconds, "seconds": seconds}
    if not math.isfinite(line["loss_seg"] + line.get("loss_cls", 0)):
        raise data.DataError(f"the loss is not finite in epoch {epoch}; lower --lr")
    return {"epoch": epoch} | {name: float(f"{value:.4g}") for name, value in line.items()}


def main(argv=None):
    args, checkpoint = parse_args(argv)
    began, device, out = time.time(), torch.device(args.device), Path(args.out)
    sources = data.find_slides(args.data, args.seed)
    tiles = data.tile_slides(sources, args.tile, args.mpp, args.level)
    shares = args.pixel_frac, args.image_frac, args.label_unit, args.seed
    pool, mask_rows, label_rows = data.choose_labels(tiles, *shares)
    print(*data.describe(tiles, mask_rows, label_rows), sep="\n", flush=True)
    torch.manual_seed(args.seed)
    model = Network(args.width).to(device)
    adam = torch.optim.Adam(model.parameters(), lr=args.lr)
    tumour, label = tiles.table["tumour"], tiles.table["label"]
    share = tumour[mask_rows][label[mask_rows] == data.CANCER].mean()  # extension
    cancer = label[label_rows].sum() / max(len(label_rows), 1)
    seg_loss = loss.by_name(args.seg_loss, args.beta, tumour[mask_rows].mean())
    cls_loss = loss.by_name(args.cls_loss, args.beta, cancer)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.amp)

    # Deviation: the paper does not say how long an epoch is; here a pass over the pool (100 %),
    # because S and S+C then make equally many of step 1.
    per_epoch = math.ceil(len(pool) / args.batch_size)
    first, total = checkpoint["iteration"] if checkpoint else 0, args.epochs * per_epoch
    pretrain = args.pretrain_epochs * per_epoch if len(label_rows) else total  # Fig. 2
    used = b"".join(a.tobytes() for a in (tiles.table, mask_rows, label_rows))
    key, last, log = hashlib.sha256(used).hexdigest(), out / "last.pt", out / "log.jsonl"
    if checkpoint:
        if checkpoint["key"] != key:
            raise data.DataError(f"{args.resume}: slides or labels have changed; put them back")
        model.load_state_dict(checkpoint["model"])
        adam.load_state_dict(checkpoint["optimizer"])
        print(f"going on after epoch {first // per_epoch} of {args.epochs}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    data.write_tiles(out / "tiles.csv", tiles, mask_rows, label_rows)
    log.write_text("".join(log.read_text().splitlines(True)[: first // per_epoch] if first else []))

    def stop(*_):
        go_on = f"go on with: python train.py --resume {last}"
        sys.exit(f"interrupted; {go_on if last.exists() else 'no epoch was done, start again'}")

    signal.signal(signal.SIGINT, stop)

    def batches(rows, stream, *numbers):
        keys = data.batches(rows, args.batch_size, (args.seed, stream), *numbers)
        return data.load(tiles, keys, device, args.workers)

    mask_batches = batches(mask_rows, 11, first, total)  # 11, 12, 13: streams of random numbers
    label_batches = batches(label_rows, 12, max(first, pretrain), total)
    sums, start = Counter(), time.time()
    for n in data.progress(range(first, total), "training"):
        # Deviation: the paper has one learning rate; here it falls to 0, because the end is scored.
        adam.param_groups[0]["lr"] = args.lr * (1 - n / total)

        # Step 1, Fig. 4: masks teach encoder, PSP and decoder; no gradient for the head.
        images, masks, _ = next(mask_batches)
        with autocast:
            logits = model.decode(model.encode(images))  # (B, 2, H, W)
        loss_seg = seg_loss(logits, masks)
        update(adam, loss_seg)
        found = logits.argmax(1)
        sums.update(loss_seg=loss_seg.detach(), overlap=(found * masks).sum())
        sums.update(iterations=1, area=found.sum() + masks.sum())

        # Step 2, Fig. 4: image labels teach encoder and head; no gradient for PSP, decoder.
        if n >= pretrain:
            images, _, labels = next(label_batches)
            with autocast:
                maps = model.encode(images)
                logits = model.classify(maps)  # (B, 2)
                seg = model.decode(maps) if args.self_train else None
            # Deviation: the paper adds its losses, Eq (3); here they alternate, because Fig 4 does.
            loss_cls = args.alpha * cls_loss(logits, labels)
            if args.self_train:  # extension: the decoder learns from its surest pixels too
                loss_cls += seg_loss(seg, loss.surest(seg, labels, args.self_train, share))
            update(adam, loss_cls)
            sums.update(loss_cls=loss_cls.detach(), right=(logits.argmax(1) == labels).sum())

        if (n + 1) % per_epoch == 0:
            line = log_line((n + 1) // per_epoch, sums, args.batch_size, time.time() - start)
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            save(last, model, adam, n + 1, key, args)
            print(*(f"{name} {value:g} " for name, value in line.items()), flush=True)
            sums, start = Counter(), time.time()

    # Deviation: the paper does not say what BN's statistics are; here they are estimated anew on
    # the decoder's tiles, because running means of small batches are far off.
    rows = label_rows if args.self_train else mask_rows
    with autocast:
        update_bn(batches(rows, 13, 0, math.ceil(len(rows) / args.batch_size)), model)
    save(last, model, adam, max(first, total), key, args)  # first: resumed with fewer --epochs
    rows = np.flatnonzero(~tiles.table["train"])
    counts = evaluate.count(model, tiles, rows, args)
    results = evaluate.summarise(tiles, rows, counts, args.image_frac > 0)
    results |= {"arguments": vars(args), "seconds": time.time() - began, "torch": torch.__version__}
    (out / "results.json").write_text(json.dumps(results, indent=1))
    evaluate.write_pictures(out / "pictures", model, tiles, rows, counts, args)
    print(evaluate.headline(results))
    print(f"{results['seconds']:.0f} s, results in {out}; again: python evaluate.py --ckpt {last}")


if __name__ == "__main__":
    main()
