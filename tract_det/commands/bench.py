"""Runs a benchmark program; those that measure compare within one run, by ratios.

    tract-det bench stem             what TrAct costs: stem forward + backward, error, memory
    tract-det bench gpu              on a GPU: its tests, whole training steps, stems
    tract-det bench train            the trainer against a bare PyTorch loop
    tract-det bench integrations     TrAct's share of a training step in Lightning's trainer
    tract-det bench data             reading and augmenting images against plain PIL + torchvision
    tract-det bench annotations      reading the annotations of 100,000 images: seconds and memory
    tract-det bench pasted FOLDER    a detection set to compare arms on, varied in one thing
    tract-det bench evaluation       the evaluation of detections against pycocotools
    tract-det bench spectrum         in how many directions a config's stem learns
    tract-det bench paper            benchmarks/paper.md: the paper's experiments, what was measured
    tract-det bench stem --help      the arguments of one of them

The programs, and what they measured, are in `benchmarks/`.
"""

import argparse
import runpy
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from tract_det.files import write_text

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


def main(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Runs the program as `python benchmarks/PROGRAM.py` does."""
    programs = sorted(path.stem for path in FOLDER.glob("*.py"))
    parser.add_argument("program", choices=programs, metavar="PROGRAM", help=", ".join(programs))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the program")
    args = parser.parse_args(argv)
    path = FOLDER / f"{args.program}.py"
    sys.argv = [str(path), *args.arguments]
    runpy.run_path(str(path), run_name="__main__")


def print_and_keep(lines: Iterable[str], output: Path | None) -> None:
    """For a program: prints each line as it comes, and writes all of them where a file is named."""
    printed = []
    for line in lines:
        print(line, flush=True)
        printed.append(line)
    if output:
        write_text(output, "".join(f"{line}\n" for line in printed))
        print(f"written to {output}", file=sys.stderr)
