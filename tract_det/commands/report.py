"""Writes a report of training runs, or of a comparison: one HTML page that opens offline.

    tract-det report output/cells
    tract-det report output/cells/plain output/cells/tract --out both.html
    tract-det report output/compare/cpu_small

Every run leaves `report.html` in its OUTPUT_DIR already. This makes it anew, also of a run that
goes on or was made elsewhere, and puts several runs into one page: their curves over each other,
their figures and configurations beside each other. Pictures of the worst images are shown where the
images are still where they were. In the folder of a `tract-det compare`, it makes `comparison.html`
anew.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Writes the page."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="OUTPUT_DIR")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="default: report.html or comparison.html in the folder, of several runs report.html "
        "here",
    )
    args = parser.parse_args(argv)
    from tract_det.evaluation.comparison_file import JSON
    from tract_det.report.comparison import write_comparison
    from tract_det.report.page import write_report

    folder = args.runs[0] if len(args.runs) == 1 else Path()
    if len(args.runs) == 1 and (folder / JSON).is_file():
        out = args.out or folder / "comparison.html"
        write_comparison(folder, out)
    else:
        out = args.out or folder / "report.html"
        write_report(args.runs, out)
    print(f"wrote {out}")
