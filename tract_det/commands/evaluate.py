r"""Evaluates detections in the PASCAL VOC challenge's files: no model and no images are needed.

    tract-det evaluate --devkit datasets --year 2007 --split test \
        --detections output/detections --json output/voc.json
    tract-det evaluate --root datasets/cells --split test --detections output/detections
    tract-det evaluate --root datasets/cells --split test --classes RBC WBC Platelets \
        --rule detectron2 --detections output/detections

DETECTIONS holds a file `comp4_det_<split>_<class>.txt` (or comp3) for each class, with a line
`image_id score xmin ymin xmax ymax` for each detection; pixels count from 1. The table goes to the
console, the same figures unrounded to the JSON file. In a checkout, `tools/evaluate_voc.py` is the
same program.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tract_det.evaluation.voc_ap import RULES


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--devkit", type=Path, help="folder with VOC<year> or VOCdevkit/VOC<year>")
    data.add_argument(
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


def main(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Evaluates, prints the table and writes the JSON file.

    Raises:
        UserError: for anything wrong with the data, the detections or the output file.
    """
    args = _parse(parser, argv)
    from tract_det.data.voc import VOC_CLASSES, find_devkit, read_split
    from tract_det.evaluation.detection_files import read_detections
    from tract_det.evaluation.evaluators import DetectionEvaluator, format_table
    from tract_det.files import write_json

    root = find_devkit(args.devkit, args.year or 2007) if args.devkit else args.root
    classes = VOC_CLASSES if args.devkit else args.classes
    split = read_split(root, args.split, classes, need_images=False)
    evaluator = DetectionEvaluator(split.annotations, split.class_names, rule=args.rule)
    image_ids = [annotation.image_id for annotation in split.annotations]
    detections = read_detections(args.detections, args.split, split.class_names, image_ids)
    for image_id, image_detections in detections.items():
        evaluator.add(image_id, *image_detections)
    results = evaluator.evaluate()
    print(format_table(results))
    if args.json:
        write_json(args.json, results)
