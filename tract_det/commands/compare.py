"""Trains the arms of an experiment with the same seeds, and says what TrAct does for it.

    tract-det compare --config-file FILE --arms frozen,plain,tract --seeds 5
    tract-det compare --config-file FILE --plan                        # runs, time, disk; no run
    tract-det compare --config-file FILE --sweep MODEL.TRACT.LAMBDA=0.05,0.1,0.2
    tract-det compare --config-file FILE --lengths 5,7,10 SOLVER.BASE_LR 0.05

Runs with the same seed share initial weights and the order of the data. Detectors and classifiers
alike; a length is in epochs. `KEY VALUE` pairs at the end hold for all runs. Finished runs are not
run again, and interrupted ones go on where they stopped: give the same command again, with further
arms, values, lengths or seeds if need be. Several runs beside each other (--jobs) get a GPU each,
or a part of the CPU: an equal one, or OMP_NUM_THREADS threads if that is set.

The results are in `output/compare/<config>/`: `comparison.html` (table, verdicts and curves on a
page that opens offline), `comparison.md`, `.png` and `.json`, and the folder of each run. The
differences are paired: each seed against itself, with a 95 % interval by Student's t, for these
test images. Beside it is the interval over images, for these weights, by resampling those of the
test split. The speed-up is the baseline's length over the epoch at which an arm reaches the
baseline's final figure; over several lengths, complete trainings are compared.
tract_det/evaluation/speed_up.py says what these figures cannot tell. How far the filters of the
stem have turned from what they were, in degrees, says how much it has learned under this rule and
rate; where that is little, SOLVER.STEM.LR_FACTOR is worth a try.
"""

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from tract_det.config.arms import names as arms
from tract_det.config.pairs import refuse_half_pairs


def _words(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise argparse.ArgumentTypeError(f"names, such as plain,tract, not '{text}'")
    return words


def _lengths(text: str) -> list[float]:
    try:
        lengths = [float(word) for word in text.split(",")]
    except ValueError:
        lengths = []
    if not lengths or any(not 0 < length < float("inf") for length in lengths):
        raise argparse.ArgumentTypeError(
            f"positive numbers of epochs, such as 5,7,10, not '{text}'"
        )
    if len(set(lengths)) < len(lengths):
        raise argparse.ArgumentTypeError(f"{text}: a length is there twice")
    return lengths


def _count(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1, not '{text}'")
    return int(text)


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    add = parser.add_argument
    add("--config-file", action="append", required=True, metavar="FILE", help="as for a training")
    add(
        "--arms",
        type=_words,
        default=[],
        metavar="A,B",
        help=f"of {', '.join(arms())}; default: plain,tract, and frozen where there are weights",
    )
    add("--baseline", default="", metavar="ARM", help="default: plain, or else the first arm")
    add("--seeds", type=_count, default=3, metavar="N", help="0 to N - 1 (%(default)s)")
    add("--sweep", action="append", default=[], metavar="KEY=A,B", help="values of a key")
    add("--lengths", type=_lengths, default=[], metavar="A,B", help="epochs; default: the config's")
    add("--jobs", type=_count, default=0, metavar="N", help="default: the number of GPUs, or 1")
    add("--output", type=Path, metavar="DIR", help="default: output/compare/<config>")
    add("--plan", action="store_true", help="print runs, time and disk, and do nothing")
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="for all runs")
    args = parser.parse_args(argv)
    refuse_half_pairs(args.opts)
    return args


def main(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """Runs what is missing and reports; returns the exit code."""
    args = _parse(parser, argv)
    from tract_det import distributed
    from tract_det.engine import jobs
    from tract_det.training import comparison
    from tract_det.training.comparison_estimate import estimate
    from tract_det.training.comparison_folders import has_results
    from tract_det.training.comparison_runs import report, run_missing

    sweeps = comparison.parse_sweeps(args.sweep)
    design = comparison.Design(
        args.config_file,
        args.arms,
        sweeps,
        args.lengths,
        args.seeds,
        args.baseline,
        args.opts,
        args.output,
    )
    planned = comparison.build(design)
    is_for_cpu = all(run.cfg.MODEL.DEVICE == "cpu" for run in planned.runs)
    gpus = [] if is_for_cpu else jobs.visible_gpus(distributed.gpus())
    number = args.jobs or len(gpus) or 1
    threads = jobs.threads_of_each(number, len(os.sched_getaffinity(0)))
    if args.plan:
        print(estimate(planned, number, threads=threads))
        return 0
    with jobs.sole_use(planned.output, waits_for_orphans=True) as lock:
        code = run_missing(planned, jobs.shares(number, gpus, threads), lock)
        if code > 128 and not has_results(planned):  # stopped by a signal, which is said already
            return code
        report(planned, shlex.join(["tract-det", "compare", *argv]))
    return code
