r"""Evaluates detections that lie in the PASCAL VOC challenge's files: no model, no images needed.

    python tools/evaluate_voc.py --devkit datasets --year 2007 --split test \
        --detections output/detections --json output/voc.json
    python tools/evaluate_voc.py --root datasets/cells --split test --detections output/detections
    python tools/evaluate_voc.py --root datasets/cells --split test --classes RBC WBC Platelets \
        --rule detectron2 --detections output/detections

DETECTIONS holds a file `comp4_det_<split>_<class>.txt` (or comp3) for each class, with a line
`image_id score xmin ymin xmax ymax` for each detection; pixels count from 1. The table goes to the
console, the same figures unrounded to the JSON file.
"""

import argparse
from pathlib import Path

from tract_det.data.voc import VOC_CLASSES, find_devkit, read_split
from tract_det.evaluation.detection_files import read_detections
from tract_det.evaluation.evaluators import DetectionEvaluator, format_table, write_json
from tract_det.evaluation.voc_ap import RULES


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; contradictions end the process as argparse's own errors do."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--devkit", type=Path, help="folder with VOC<year> or VOCdevkit/VOC<year>")
    where.add_argument(
        "--root", type=Path, help="a custom tree: folder with Annotations and ImageSets"
    )
    parser.add_argument("--year", type=int, help="of the devkit (default: 2007)")
    parser.add_argument("--split", default="test", help="of ImageSets/Main (default: %(default)s)")
    parser.add_argument(
        "--classes", nargs="+", help="of a custom tree (default: those in the split, sorted)"
    )
    parser.add_argument(
        "--detections", type=Path, required=True, help="folder with the challenge's files"
    )
    parser.add_argument("--rule", choices=RULES, default=RULES[0], help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="file for the figures, unrounded")
    args = parser.parse_args(argv)
    if args.devkit and args.classes:
        parser.error("--classes goes with --root: a devkit's classes are fixed")
    if args.root and args.year:
        parser.error("--year goes with --devkit")
    return args


def main(argv: list[str] | None = None) -> None:
    """Evaluates, prints the table and writes the JSON file.

    Raises:
        UserError: for anything wrong with the data, the detections or the output file.
    """
    args = parse_args(argv)
    root = find_devkit(args.devkit, args.year or 2007) if args.devkit else args.root
    classes = VOC_CLASSES if args.devkit else args.classes
    split = read_split(root, args.split, classes, need_images=False)
    evaluator = DetectionEvaluator(split.annotations, split.class_names, rule=args.rule)
    ids = [annotation.image_id for annotation in split.annotations]
    found = read_detections(args.detections, args.split, split.class_names, ids)
    for image_id, detections in found.items():
        evaluator.add(image_id, *detections)
    results = evaluator.evaluate()
    print(format_table(results))
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    from tract_det.cli import run

    run(main)
