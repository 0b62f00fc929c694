"""The console command `tract-det VERB ...`, which `tools/*.py` call as well.

A verb is a module of `tract_det.commands`. It is imported only when it is called, and imports what
is heavy only after its arguments are checked, so that help and mistakes are quick.
"""

import argparse
import importlib
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

from tract_det.errors import UserError
from tract_det.version import __version__

VERBS = {
    "train": "train a detector, or evaluate one",
    "pretrain": "train an image classifier, or evaluate one",
    "check": "look at a data set before a training: counts, faults, settings that fit",
    "compare": "train the arms of an experiment with the same seeds, and judge them",
    "report": "one HTML page of a training run, or of several",
    "evaluate": "average precision of detections in the VOC challenge's files",
    "detect": "detect objects in images and videos, with a detector's weights",
    "export": "write a model as ONNX, TorchScript or a program of torch.export",
    "convert": "convert weights between torchvision, timm and detectron2",
    "visualize": "draw the curves and stem filters of training runs",
    "paper": "list the paper's experiments, print or run the command of one",
    "bench": "measure what TrAct, the trainer and the data loading cost here",
}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The console command: reads the verb and runs it with the arguments that follow."""
    width = max(map(len, VERBS))
    listing = "\n".join(f"  {verb:{width}}  {summary}" for verb, summary in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="tract-det",
        description="TrAct for object detection: the first layer learns from its pre-activations.",
        epilog=f"verbs:\n{listing}\n\n`tract-det VERB --help` explains a verb.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tract-det {__version__}")
    # `deepspeed --module tract_det.cli` writes it before the verb; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the verb")
    args = parser.parse_args(argv)
    run(partial(call, args.verb, args.arguments, prog=f"tract-det {args.verb}"))


def tool(verb: str) -> NoReturn:
    """Runs a verb with this process's arguments, as `tools/*.py` do."""
    run(partial(call, verb, sys.argv[1:]))


def call(verb: str, argv: Sequence[str], prog: str | None = None) -> int:
    """Runs a verb in this process; returns the exit code.

    Args:
        verb: one of `VERBS`.
        argv: its arguments.
        prog: what its help calls the program; None = the script's name.

    Raises:
        UserError, TrActError: for what the user can mend.
        SystemExit: for arguments that argparse refuses, and after `--help`.
    """
    command = importlib.import_module(f"tract_det.commands.{verb}")
    parser = argparse.ArgumentParser(
        prog=prog,
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return command.main(parser, argv) or 0


def run(command: Callable[[], int | None]) -> NoReturn:
    """Runs `command` and ends the process with the exit code that it returns.

    An error that the user can mend is one line on stderr and the exit code that the error has: 1,
    or 3 for a training that diverged. With `TRACT_DET_DEBUG=1` in the environment its traceback is
    shown as well.
    """
    is_main = os.environ.get("RANK", "0") == "0"
    if not is_main:
        warnings.simplefilter("ignore")  # the main rank gives the same warnings
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        code = command() or 0
    except ValueError as error:
        if not _is_for_the_user(error):
            raise
        if os.environ.get("TRACT_DET_DEBUG"):
            traceback.print_exc()
        rank = "" if is_main else f"[rank {os.environ['RANK']}] "
        print(f"{rank}error: {one_line(error)}", file=sys.stderr, flush=True)
        code = getattr(error, "exit_code", 1)
    except KeyboardInterrupt:
        code = 130
    sys.stdout.flush()
    if code and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # The other ranks may be waiting for this one in a collective, where an orderly exit would
        # join them; the launcher ends them when this process is gone.
        os._exit(code)
    sys.exit(code)


def _is_for_the_user(error: ValueError) -> bool:
    tract = sys.modules.get("tract_det.tract")  # not imported here: it imports torch
    return isinstance(error, UserError) or (
        tract is not None and isinstance(error, tract.TrActError)
    )


def one_line(error: BaseException) -> str:
    """The error's own message, also where a worker process wrapped it in a traceback."""
    text = str(error).strip()
    if not text.startswith("Caught "):
        return text
    # torch appends the worker's formatted traceback; its end is "<module>.<Class>: <message>".
    last = re.split(r"^[\w.]*Error: ", text, flags=re.MULTILINE)[-1]
    return last.strip()


if __name__ == "__main__":
    main()
