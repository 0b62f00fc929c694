"""Pictures of training runs: curves of several runs in one, and what their stems have learnt.

    python tools/visualize.py output/plain output/tract --out pictures

writes `pictures/curves.png` (loss and mAP over the steps, a line a run) and, for each run that has
finished, `pictures/<run>-stem.png` (the first layer's filters).
"""

import argparse
from pathlib import Path

from tract_det.cli import run
from tract_det.engine.writers import say
from tract_det.errors import UserError
from tract_det.modeling.weight_files import read_weights
from tract_det.visualize import stem_filters, training_curves


def main(argv: list[str] | None = None) -> None:
    """Draws what the runs have left."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="OUTPUT_DIR")
    parser.add_argument("--out", type=Path, default=Path("pictures"), help="folder (%(default)s)")
    args = parser.parse_args(argv)
    names = [folder.resolve().name for folder in args.runs]
    if len(set(names)) < len(names):
        raise UserError(f"two runs have the same folder name ({', '.join(names)}): rename one")
    runs = dict(zip(names, args.runs, strict=True))
    curves = args.out / "curves.png"
    training_curves(curves, {name: folder / "metrics.jsonl" for name, folder in runs.items()})
    say(f"wrote {curves}")
    for name, folder in runs.items():
        if not (folder / "model_final.pth").is_file():
            say(f"{folder} has no model_final.pth yet: no picture of its stem")
            continue
        weights = read_weights(str(folder / "model_final.pth"))
        stem = next(value for value in weights.state.values() if value.dim() == 4)
        picture = args.out / f"{name}-stem.png"
        stem_filters(picture, stem.numpy())
        say(f"wrote {picture}")


if __name__ == "__main__":
    run(main)
