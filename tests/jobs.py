"""Calling the jobs as a user does, but in this process."""
import contextlib
import io

import data

EPOCHS = 16
TINY = "--tile 64 --mpp 1 --width 8 --lr 3e-3 --epochs 2 --pretrain-epochs 1 --device cpu".split()


def call(main, *argv):
    """Run a job -> exit status, stdout, stderr."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            data.run(lambda: main([str(a) for a in argv]))
        except SystemExit as stop:
            status = stop.code or 0
    return status, out.getvalue(), err.getvalue()


def ok(main, *argv):
    status, out, err = call(main, *argv)
    assert status == 0, err
    return out


def one_line_of(status, out, err):
    """Of the error; argparse puts its one line of usage before it, torch what it downloads."""
    lines = [line for line in err.splitlines()
             if not line.startswith(("usage: ", "warning: ", "Downloading: "))]
    assert status == 2 and len(lines) == 1, err
    return lines[0]
