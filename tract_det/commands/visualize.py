"""Draws the curves of several runs in one picture, and their stems' filters, as PNG files.

    tract-det visualize output/plain output/tract --out pictures

writes `pictures/curves.png` (loss and mAP, or a classifier's top-1, over the steps, a line for each
run) and, for each run that has finished, `pictures/<run>-stem.png` (the first layer's filters; of
other channels than RGB the first three, or the first in grey). In a checkout, `tools/visualize.py`
is the same program.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tract_det.errors import UserError


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    parser.add_argument("runs", nargs="+", type=Path, metavar="OUTPUT_DIR")
    parser.add_argument("--out", type=Path, default=Path("pictures"), help="folder (%(default)s)")
    args = parser.parse_args(argv)
    names = [folder.resolve().name for folder in args.runs]
    if len(set(names)) < len(names):
        raise UserError(f"two runs have the same folder name ({', '.join(names)}): rename one")
    args.named_runs = dict(zip(names, args.runs, strict=True))
    return args


def main(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Draws what the runs have left."""
    args = _parse(parser, argv)
    from tract_det.modeling.weight_files import read_weights
    from tract_det.visualize import stem_filters, training_curves

    curves = args.out / "curves.png"
    metrics = {name: folder / "metrics.jsonl" for name, folder in args.named_runs.items()}
    training_curves(curves, metrics)
    print(f"wrote {curves}")
    for name, folder in args.named_runs.items():
        if not (folder / "model_final.pth").is_file():
            print(f"{folder} has no model_final.pth yet: no picture of its stem")
            continue
        weights = read_weights(str(folder / "model_final.pth"))
        stem = next(tensor for tensor in weights.state.values() if tensor.dim() == 4)
        picture = args.out / f"{name}-stem.png"
        stem_filters(picture, stem.numpy())
        print(f"wrote {picture}")
