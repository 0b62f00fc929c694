"""Lists the experiments of the TrAct paper, prints their commands, and runs them.

    tract-det paper                              # the experiments, their rows and numbers
    tract-det paper cifar100                     # the rows of one
    tract-det paper cifar100/ResNet18/tract-200  # the command of a row
    tract-det paper cifar100/ResNet18/tract-200 DATASETS.ROOT path/to/cifar100 SEED 1
    tract-det paper cifar100/ResNet18/tract-200 --run DATASETS.ROOT path/to/cifar100

`KEY VALUE` pairs are appended to the command. A row of several GPUs is started by `deepspeed` on as
many as there are. The rows are in `configs/paper.yaml`, each with its table or figure.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from itertools import groupby

from tract_det.config.pairs import refuse_half_pairs
from tract_det.config.paper import Row, find_rows
from tract_det.errors import UserError

_MODULE = "tract_det.cli"
_PASSED_ON = ("--resume", "--overwrite", "--eval-only")


def main(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """Lists, prints or runs; returns the exit code."""
    parser.add_argument("row", nargs="?", default="", metavar="ROW", help="EXPERIMENT/ROW/VARIANT")
    parser.add_argument("--run", action="store_true", help="run the row's command")
    for flag in _PASSED_ON:
        parser.add_argument(flag, action="append_const", const=flag, dest="flags", help="passed on")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="appended")
    # argparse would leave a flag after ROW to the pairs.
    flags = [argument for argument in argv if argument in ("--run", *_PASSED_ON)]
    args = parser.parse_args([*flags, *(argument for argument in argv if argument not in flags)])
    refuse_half_pairs(args.opts)
    rows = find_rows(args.row)
    if rows[0].name != args.row:
        if args.run:
            raise UserError(f"--run takes one row, such as {rows[0].name}")
        print(_listing(rows))
        return 0
    row = rows[0]
    if row.not_carried:
        raise UserError(f"{row.name} is not carried: {row.not_carried} (paper: {row.paper})")
    processes = _processes(row)
    print(f"# {row.what}\n# {row.source}: {_number(row)}")
    if row.differs:
        print(f"# the model differs from the paper's: {row.differs}")
    if row.after:
        print(f"# starts from the weights of {row.after}: run that first")
    seed = dict(zip(args.opts[::2], args.opts[1::2], strict=True)).get("SEED", "0")
    arguments = [row.verb, *(args.flags or []), *row.arguments(seed), *args.opts]
    print(shlex.join([*_launcher(processes, python=False), *arguments]), flush=True)
    if not args.run:
        return 0
    command = [*_launcher(processes, python=True), *arguments]
    # In place of this process, so that every signal reaches the training, which saves a checkpoint.
    os.execv(command[0], command)


def _number(row: Row) -> str:
    return f"{row.paper} {row.unit}".strip()


def _listing(rows: Sequence[Row]) -> str:
    """A line for each EXPERIMENT/ROW: its variants, with the numbers that the paper prints."""
    groups = [list(group) for _, group in groupby(rows, key=lambda row: row.group)]
    width = max(len(members[0].group) for members in groups)
    lines, what = [], ""
    for members in groups:
        first = members[0]
        if first.what != what:
            what = first.what
            unit = first.unit or first.paper
            lines += ["", f"{first.source}: {what}", f"  the paper prints: {unit}"]
        variants = [row.variant + (f" {row.paper}" if row.unit else "") for row in members]
        line = f"  {first.group:{width}}  {', '.join(variants)}"
        lines.append(line + (f"; not carried: {first.not_carried}" if first.not_carried else ""))
    return "\n".join(lines[1:])


def _processes(row: Row) -> int:
    """As many as the recipe has GPUs, if they are here; one on a CPU."""
    if row.gpus == 1:
        return 1
    from tract_det import distributed  # imports torch

    return max(1, min(row.gpus, distributed.gpus()))


def _launcher(processes: int, *, python: bool) -> list[str]:
    """What stands before the verb: as a user types it, or by this interpreter."""
    if processes == 1:
        return [sys.executable, "-m", _MODULE] if python else ["tract-det"]
    deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner"] if python else ["deepspeed"]
    return [*deepspeed, "--num_gpus", str(processes), "--module", _MODULE]
