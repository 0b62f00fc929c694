"""The command line of a run, which is detectron2's: arguments, configuration, then the session."""

import argparse
import importlib
from collections.abc import Sequence

from tract_det.config.arms import names as arms
from tract_det.config.arms import the_one
from tract_det.config.tasks import refuse_other_task
from tract_det.errors import UserError


def run_task(
    task: str, parser: argparse.ArgumentParser, argv: Sequence[str], *, default: str
) -> int:
    """Trains or evaluates as the arguments say; returns the exit code.

    Args:
        task: "detection" or "classification": a module of `tract_det.config` and of this folder.
        parser: without arguments yet.
        argv: the arguments.
        default: the config file where none is named.

    Raises:
        UserError: for anything that the user can mend.
    """
    args = _parse(parser, argv, default)
    load_cfg = importlib.import_module(f"tract_det.config.{task}").load_cfg
    files = args.config_file or default
    try:
        cfg = load_cfg(files, args.opts, the_one(args.arm))
    except UserError:
        refuse_other_task(task, files)
        raise
    # Only now: these import torch, and a mistake in the configuration is to be reported at once.
    session = importlib.import_module("tract_det.training.session")
    functions = importlib.import_module(f"tract_det.training.{task}").TASK
    return session.run(
        functions, cfg, resume=args.resume, eval_only=args.eval_only, overwrite=args.overwrite
    )


def _parse(
    parser: argparse.ArgumentParser, argv: Sequence[str], default: str
) -> argparse.Namespace:
    parser.add_argument(
        "--config-file",
        action="append",
        metavar="FILE",
        help=f"may be given several times, later ones override; default: configs/{default}",
    )
    parser.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar="NAME",
        help=f"lay configs/arms/NAME.yaml over the config, or several as A+B: {', '.join(arms())}",
    )
    starts = parser.add_mutually_exclusive_group()
    starts.add_argument("--resume", action="store_true", help="go on where OUTPUT_DIR stopped")
    starts.add_argument(
        "--overwrite", action="store_true", help="move aside the run that is in OUTPUT_DIR"
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS")
    # Launchers append one or the other; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="override keys of the config"
    )
    return parser.parse_args(argv)
