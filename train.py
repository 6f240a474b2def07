"""Train on a few pixel masks and many image labels: step 1 segments, step 2 classifies, in turn.

    python train.py --pixel-frac 0.1                        # synthetic slides, no data needed
    python train.py --data CAMELYON16 --pixel-frac 0.1      # S+C, the paper's headline row
    python train.py --data CAMELYON16 --pixel-frac 0.1 --image-frac 0       # S, no image labels
    python train.py --resume runs/x/last.pt                 # from its last checkpoint

Sections 1.2 and 1.4, Figs. 2 and 4: pre-train with step 1 alone, then alternate. Writes to --out:
last.pt (checkpoint), log.jsonl (losses by epoch), tiles.csv, results.json, pictures/.
"""

import argparse
import json
import math
import os
import signal
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch.optim.swa_utils import update_bn

import data
import evaluate
import loss
from model import Network
from slide import DataError

# Deviation: the paper gives no tile size, resolution or epochs; here 512 px, 0.5 um/px and 50,
# because comparable work is near these.
FULL = {"tile": 512, "mpp": 0.5, "width": 32, "lr": 1e-4, "epochs": 50}  # lr: section 2.1
SAVE_EVERY = 600  # s: last.pt and a line of the log, also inside a long epoch
DEMO = {"tile": 128, "mpp": 1.0, "width": 16, "lr": 1e-3, "epochs": 8}  # without --data


def flags():
    """The command line's parser."""
    loss_names = {"choices": ("dwce", "ce", "fw"), "default": "dwce"}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=evaluate.AS_WRITTEN)
    add = parser.add_argument_group("slides and labels").add_argument
    add("--data", help="folder of slides and ASAP XML, at any depth (default: synthetic slides)")
    add("--pixel-frac", type=float, default=0.1, help="fraction of tiles with masks (default 0.1)")
    add("--image-frac", type=float, default=1, help="fraction with image labels; 0: S (default 1)")
    units = "masks are of single tiles or of whole slides (default tile)"
    add("--label-unit", choices=("tile", "slide"), default="tile", help=units)
    add("--level", type=int, help="level to read where a file has no resolution (um/px)")
    add = parser.add_argument_group("scale", f"with --data {FULL}, without {DEMO}").add_argument
    add("--tile", type=int, help="side of a tile in px, a multiple of 8")
    add("--mpp", type=float, help="um/px; the nearest level is read")
    add("--width", type=int, help="channels C0, a multiple of 4")
    add("--lr", type=float, help="Adam's, falling linearly to 0")
    add("--epochs", type=int, help="each a pass over the pool: all tiles that training may use")
    add = parser.add_argument_group("training and machine").add_argument
    pretrain = "which labels train alone first (default masks)"
    add("--pretrain", choices=("masks", "labels"), default="masks", help=pretrain)
    add("--pretrain-epochs", type=int, help="how many epochs (default: masks 1/10, labels 1/2)")
    add("--seg-loss", **loss_names, help="loss of step 1 (default dwce, the paper's DWF)")
    add("--cls-loss", **loss_names, help="loss of step 2 (default dwce)")
    add("--alpha", type=float, default=1, help="weight in Eq. (3) (default 1)")
    add("--beta", type=float, default=3, help="exponent of dwce, Eq. (2) (default 3)")
    add("--batch-size", type=int, default=8, help="tiles in each step (default 8)")
    add("--seed", type=int, default=0, help="of split, labels, weights, order (default 0)")
    add("--device", choices=evaluate.DEVICES, help="default: the GPU if there is one")
    add("--workers", type=int, help="reading processes of each step (default: 8 with a GPU)")
    add("--amp", action="store_true", help="bfloat16, float32 losses; for Ampere GPUs or newer")
    run = time.strftime(f"runs/%Y%m%d-%H%M%S-{os.getpid()}")
    add("--out", default=run, help="folder of this run (runs/<time>)")
    add("--resume", help="last.pt of a run; go on with its arguments and folder")
    parser.set_defaults(**evaluate.MACHINE)
    return parser


def parse_args(argv=None):
    """Command line -> arguments, and the checkpoint of --resume or None."""
    parser, checkpoint = flags(), None
    args = parser.parse_args(argv)
    if args.resume:
        checkpoint = evaluate.load_checkpoint(args.resume)
        old = checkpoint["args"] | {"out": os.path.dirname(args.resume) or "."} | evaluate.MACHINE
        parser.set_defaults(**old)
        args = parser.parse_args(argv)
        fixed = "width", "batch_size", "seed"  # of the weights, of the sequence of batches
        if any(vars(args)[name] != old[name] for name in fixed) or "iteration" not in checkpoint:
            changed = "--width, --batch-size, --seed or version"
            parser.error(f"{args.resume} has another {changed}; start a new run")
    args.data = args.data and os.path.abspath(args.data)  # evaluate.py may be called elsewhere
    scale = FULL if args.data else DEMO
    vars(args).update({name: scale[name] for name in scale if getattr(args, name) is None})
    if not (0 <= args.pixel_frac <= 1 and 0 <= args.image_frac <= 1):
        parser.error("--pixel-frac and --image-frac are fractions, 0 to 1")
    if args.pretrain == "labels" and not args.image_frac:
        parser.error("--pretrain labels needs image labels; give --image-frac")
    if args.tile % 8 or args.width % 4 or min(args.tile, args.width) < 1:
        parser.error("--tile is a multiple of 8, --width of 4")
    if min(args.epochs, args.batch_size) < 1 or args.workers < 0:
        parser.error("--epochs and --batch-size are at least 1, --workers 0")
    if args.image_frac and pretrain_epochs(args) >= args.epochs:
        parser.error("no epoch is left for both steps; fewer --pretrain-epochs, or more --epochs")
    if not args.resume and Path(args.out, "last.pt").exists():
        parser.error(f"{args.out} holds a run; --resume {args.out}/last.pt, or another --out")
    return args, checkpoint


def pretrain_epochs(args):
    """How many epochs one step runs alone before both alternate, Fig. 2."""
    # Deviation: the paper gives no pre-training time; here 1/10, because 0 was not clearly better.
    # Labels first: half, the best of 1/6, 1/3, 1/2 on training cases kept aside (docs/results.md).
    part = args.epochs // (10 if args.pretrain == "masks" else 2)
    default = min(max(1, part), args.epochs - 1)
    return default if args.pretrain_epochs is None else args.pretrain_epochs


def update(optimizer, value):
    optimizer.zero_grad()  # to None: Adam leaves a branch that was not run as it is, Fig. 4
    value.backward()
    optimizer.step()


def save(path, model, optimizer, iteration, fingerprint, args):
    """Write a checkpoint to a temporary file, then rename it: a kill never leaves half of one."""
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    content |= {"iteration": iteration, "fingerprint": fingerprint, "args": vars(args)}
    torch.save(content, f"{path}.part")
    os.replace(f"{path}.part", path)


def log_line(epoch, totals, batch_size, start):
    """Totals since the last line -> the numbers to print and log. DataError for NaN."""
    totals = {name: float(value) for name, value in totals.items()}  # waits for a GPU
    n, seconds, line = totals["iterations"], time.time() - start, {"epoch": epoch}
    if "loss_seg" in totals:
        dsc = 2 * totals["overlap"] / max(totals["area"], 1)
        line |= {"loss_seg": totals["loss_seg"] / n, "train_dsc": dsc}
    if "loss_cls" in totals:
        accuracy = totals["correct"] / n / batch_size
        line |= {"loss_cls": totals["loss_cls"] / n, "train_accuracy": accuracy}
    if not all(map(math.isfinite, line.values())):
        raise DataError(f"the loss is not finite in epoch {math.ceil(epoch)}; lower --lr")
    line |= {"iterations_per_s": n / seconds, "seconds": seconds}
    line = {name: float(f"{value:.4g}") for name, value in line.items()}
    return line | {"epoch": int(epoch) if epoch == int(epoch) else epoch}


def batch_stream(args, tiles, rows, stream, first, last):
    """Batches `first` to `last` - 1 of tiles `rows`; `stream` is a number for the random order."""
    keys = data.batches(rows, args.batch_size, (args.seed, stream), first, last)
    return data.load_batches(tiles, keys, torch.device(args.device), args.workers)


def loss_functions(args, tiles, mask_rows, label_rows):
    """--seg-loss and --cls-loss -> two functions of logits and targets."""
    tumour, cancer = tiles.table["tumour"][mask_rows], tiles.table["label"][label_rows]
    seg_loss_fn = loss.by_name(args.seg_loss, args.beta, tumour.mean(), args.device)
    frequency = cancer.sum() / max(len(cancer), 1)
    return seg_loss_fn, loss.by_name(args.cls_loss, args.beta, frequency, args.device)


def restore(args, checkpoint, model, adam, fingerprint):
    """Put the state of --resume back -> its iteration, the lines of its log."""
    if checkpoint["fingerprint"] != fingerprint:
        finding = "slides, annotations or the flags of tiles and labels are not those of the run"
        raise DataError(f"{args.resume}: {finding}; use the same, or start anew")
    model.load_state_dict(checkpoint["model"])
    adam.load_state_dict(checkpoint["optimizer"])
    log = Path(args.resume).with_name("log.jsonl")
    return checkpoint["iteration"], log.read_text().splitlines(True) if log.exists() else []


def main(argv=None):
    args, checkpoint = parse_args(argv)
    run_start, device, out = time.time(), torch.device(args.device), Path(args.out)
    torch.backends.cudnn.benchmark = True  # all batches have one shape
    tiles = evaluate.find_tiles(args)
    pool, mask_rows, label_rows, fingerprint = data.label_tiles(tiles, args)
    torch.manual_seed(args.seed)
    model = Network(args.width).to(device)
    adam = torch.optim.Adam(model.parameters(), lr=args.lr)
    seg_loss_fn, cls_loss_fn = loss_functions(args, tiles, mask_rows, label_rows)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.amp)

    # Deviation: the paper does not say how long an epoch is; here a pass over the pool, whatever
    # the fractions, because in its order S and S+C then make as many updates in step 1.
    per_epoch = math.ceil(len(pool) / args.batch_size)
    total, pretrain_iters = args.epochs * per_epoch, pretrain_epochs(args) * per_epoch
    mask_start, label_start = 0, pretrain_iters if len(label_rows) else total
    if args.pretrain == "labels":
        mask_start, label_start = pretrain_iters, 0
    first, lines = 0, []
    if checkpoint:
        first, lines = restore(args, checkpoint, model, adam, fingerprint)
        lines = [line for line in lines if json.loads(line)["epoch"] * per_epoch < first + 0.5]
        print(f"going on after epoch {first / per_epoch:g} of {args.epochs}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    data.write_tiles(out / "tiles.csv", tiles, mask_rows, label_rows)
    checkpoint_path, log_path = out / "last.pt", out / "log.jsonl"
    log_path.write_text("".join(lines))
    save(checkpoint_path, model, adam, first, fingerprint, args)  # so that Ctrl-C can name it
    resume = f"interrupted; go on with: python train.py --resume {checkpoint_path}"
    signal.signal(signal.SIGINT, lambda *_: sys.exit(resume))

    # Iteration n takes batch n of a stream; 11, 12, 13 are streams of random numbers.
    mask_batches = batch_stream(args, tiles, mask_rows, 11, max(first, mask_start), total)
    label_batches = batch_stream(args, tiles, label_rows, 12, max(first, label_start), total)
    totals, log_start = defaultdict(float), time.time()
    for n in data.progress(range(first, total), "training"):
        # Deviation: the paper has one learning rate; here it falls to 0, because the last weights
        # are the ones that are scored.
        adam.param_groups[0]["lr"] = args.lr * (1 - n / total)
        totals["iterations"] += 1

        # Step 1, Fig. 4: masks teach encoder, PSP and decoder; no gradient for the
        # classification head.
        if n >= mask_start:
            images, masks, _ = next(mask_batches)
            with autocast:
                logits = model.decode(model.encode(images))  # (B, 2, H, W)
            loss_seg = seg_loss_fn(logits, masks)
            update(adam, loss_seg)
            predicted = logits.argmax(1)
            totals["loss_seg"] += loss_seg.detach()
            totals["overlap"] += (predicted * (masks == 1)).sum()
            totals["area"] += (predicted * (masks >= 0)).sum() + (masks == 1).sum()

        # Step 2, Fig. 4: image labels teach encoder and classification head; none for PSP, decoder.
        if n >= label_start:
            images, _, labels = next(label_batches)
            with autocast:
                logits = model.classify(model.encode(images))  # (B, 2)
            # Deviation: the paper adds its losses, Eq (3); here they alternate, because Fig 4 does.
            loss_cls = args.alpha * cls_loss_fn(logits, labels)
            update(adam, loss_cls)
            totals["loss_cls"] += loss_cls.detach()
            totals["correct"] += (logits.argmax(1) == labels).sum()

        if (n + 1) % per_epoch == 0 or time.time() - log_start > SAVE_EVERY:
            line = log_line((n + 1) / per_epoch, totals, args.batch_size, log_start)
            with log_path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            save(checkpoint_path, model, adam, n + 1, fingerprint, args)
            print(*(f"{name} {value:g} " for name, value in line.items()), flush=True)
            totals, log_start = defaultdict(float), time.time()
    mask_batches.close(), label_batches.close()  # their workers end

    # Deviation: the paper does not say what BN's statistics are; here they are computed again on
    # the tiles with masks, because running means over small batches are inaccurate.
    with autocast:
        count = math.ceil(len(mask_rows) / args.batch_size)
        update_bn(batch_stream(args, tiles, mask_rows, 13, 0, count), model)
    last = max(first, total)  # first, where it was resumed with fewer --epochs
    save(checkpoint_path, model, adam, last, fingerprint, args)
    evaluate.write_results(out, model, tiles, args, run_start, classes=args.image_frac > 0)
    again = f"again: python evaluate.py --ckpt {checkpoint_path}"
    print(f"{time.time() - run_start:.0f} s, results in {out}; {again}")


if __name__ == "__main__":
    main()
