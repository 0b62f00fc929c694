r"""Evaluates detections in files: no model is needed, and images for data in YOLO's format alone.

    tract-det evaluate --devkit datasets --year 2007 --split test \
        --detections output/detections --json output/voc.json
    tract-det evaluate --root datasets/cells --split test --detections output/detections
    tract-det evaluate --root datasets/cells --split test --classes RBC WBC Platelets \
        --rule detectron2 --detections output/detections --against output/plain/detections
    tract-det evaluate --root datasets/coco --split val2017 --detections results.json
    tract-det evaluate --coco-truth instances_val.json --detections results.json

DETECTIONS is a folder or a file. The folder holds the PASCAL VOC challenge's files
`comp4_det_<split>_<class>.txt` (or comp3) for each class, with a line `image_id score xmin ymin
xmax ymax` for each detection; pixels count from 1. The file is a COCO result file. What its
`image_id` and `category_id` are depends on the data:

    in COCO's format    the ids there; a text, where ids are numbers, is first an image's name
    in YOLO's           the image's name, or the number that it is; the class's number there + 1
    in VOC's            the same; the class's position in --classes, counted from 1

Where an entry has `image_name` and `category_name`, as `tract-det detect` writes them, these count.

The classes are those that have objects in the split, unless --classes lists them; with --coco-truth
they are all categories of the file, and boxes without an area count as objects, as in COCO's own
program. Detections of other classes are left out with a warning, and so are those of other images
with --ignore-other-images.

Printed are AP by class, the best F1 and its score threshold, the mistakes by kind with what mending
them adds to the mAP, and the confidence interval of every mean. With --against a second set of
detections of the same split, also the differences of the means, with intervals and p-values. The
JSON file has the same figures unrounded, and the confusion matrix. In a checkout,
`tools/evaluate_voc.py` is the same program.
"""

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tract_det.data.choices import DETECTION_FORMATS, EXIF_MODES
from tract_det.errors import UserError
from tract_det.evaluation.voc_ap import RULES

if TYPE_CHECKING:
    from tract_det.data.annotations import DetectionSplit
    from tract_det.evaluation.boxes import Detections
    from tract_det.evaluation.ground_truth import GroundTruth

_FEWEST_SAMPLES = 20  # fewer have no percentiles 2.5 and 97.5


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--devkit", type=Path, help="folder with VOC<year> or VOCdevkit/VOC<year>")
    data.add_argument(
        "--root", type=Path, help="your data: in the layout of VOC, or in COCO's or YOLO's format"
    )
    data.add_argument("--coco-truth", type=Path, metavar="FILE", help="a COCO ground truth file")
    parser.add_argument("--year", type=int, help="of the devkit (default: 2007)")
    parser.add_argument("--split", default="test", help="default: %(default)s")
    parser.add_argument(
        "--format",
        choices=DETECTION_FORMATS,
        default="auto",
        help="of the data at --root; default: what lies there",
    )
    parser.add_argument(
        "--classes", nargs="+", help="of the data at --root (default: those in the split, sorted)"
    )
    parser.add_argument(
        "--holdout",
        type=float,
        default=0.0,
        metavar="F",
        help="the share that was held out of data without splits, as DATASETS.HOLDOUT",
    )
    parser.add_argument(
        "--holdout-seed", type=int, default=0, metavar="N", help="as DATASETS.HOLDOUT_SEED"
    )
    parser.add_argument(
        "--exif",
        choices=EXIF_MODES,
        default="auto",
        help="as INPUT.EXIF: by it, YOLO's boxes are fractions of upright or of stored images",
    )
    parser.add_argument(
        "--detections", type=Path, required=True, help="the challenge's folder or a COCO file"
    )
    parser.add_argument("--against", type=Path, help="other detections, to be subtracted")
    parser.add_argument(
        "--ignore-other-images",
        action="store_true",
        help="leave out detections of images that are not in the split (default: an error)",
    )
    parser.add_argument("--rule", choices=RULES, default=RULES[0], help="default: %(default)s")
    parser.add_argument(
        "--bootstrap",
        type=int,
        default=1000,
        metavar="N",
        help="samples of the images for the intervals (default: %(default)s); 0 = no intervals",
    )
    parser.add_argument(
        "--score-threshold",
        type=float,
        default=0.5,
        metavar="S",
        help="of the confusion matrix (default: %(default)s)",
    )
    parser.add_argument(
        "--pycocotools",
        action="store_true",
        help="let pycocotools compute the figures of COCO (slow; they are the same)",
    )
    parser.add_argument("--json", type=Path, help="file for the figures, unrounded")
    args = parser.parse_args(argv)
    _check(parser, args)
    return args


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses options that contradict each other."""
    if args.classes and not args.root:
        parser.error("--classes goes with --root: other data have their own")
    for option, is_set in (
        ("--holdout", args.holdout),
        ("--holdout-seed", args.holdout_seed),
        ("--format", args.format != "auto"),
        ("--exif", args.exif != "auto"),
    ):
        if is_set and not args.root:
            parser.error(f"{option} goes with --root: other data do not need it")
    if not 0 <= args.holdout < 1:
        parser.error("--holdout is a share, from 0 to below 1")
    if args.year and not args.devkit:
        parser.error("--year goes with --devkit")
    if args.bootstrap and args.bootstrap < _FEWEST_SAMPLES:
        parser.error(f"--bootstrap is a number of samples from {_FEWEST_SAMPLES}, or 0")
    if args.against and not args.bootstrap:
        parser.error("--against needs --bootstrap")


def main(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Evaluates, prints the tables and writes the JSON file.

    Raises:
        UserError: for anything wrong with the data, the detections or the output file.
    """
    args = _parse(parser, argv)
    from tract_det.evaluation.detection_results import (
        compare,
        details,
        evaluate_detections,
        sampled_means,
        summary,
    )
    from tract_det.evaluation.tables import format_comparison, format_details, format_table
    from tract_det.files import write_json

    truth = _read_truth(args)
    detections = _read(args.detections, args, truth)
    others = _read(args.against, args, truth) if args.against else None
    evaluated = evaluate_detections(truth, detections, args.rule)
    results = summary(evaluated)
    if args.pycocotools:
        from tract_det.evaluation.pycocotools_ap import pycocotools_ap

        sizes = len(truth.image_ids), len(truth.class_names)
        results["coco"] = pycocotools_ap(truth.objects, detections, *sizes)
    samples = sampled_means(evaluated, args.bootstrap)
    results |= details(evaluated, samples=samples, score_threshold=args.score_threshold)
    print(format_table(results))
    print(format_details(results))
    if others is not None:
        other = evaluate_detections(truth, others, args.rule)
        comparison = compare(evaluated, other, samples)
        results["against"] = {"detections": str(args.against), **comparison}
        print(format_comparison(comparison, str(args.against)))
    if args.json:
        write_json(args.json, results)


def _read_truth(args: argparse.Namespace) -> "GroundTruth":
    from tract_det.evaluation.ground_truth import from_annotations

    try:
        split = _read_split(args)
    except UserError as error:
        raise _in_options(error, args) from None
    categories = split.categories
    if not categories and (args.devkit or args.classes):
        categories = dict(enumerate(split.class_names, 1))
    return from_annotations(split.annotations, split.class_names, categories)


def _read_split(args: argparse.Namespace) -> "DetectionSplit":
    if args.coco_truth:
        from tract_det.data.coco import read_file

        return read_file(args.coco_truth)
    if args.devkit:
        from tract_det.data.voc import VOC_CLASSES, find_devkit, read_split

        root = find_devkit(args.devkit, args.year or 2007)
        return read_split(root, args.split, VOC_CLASSES, need_images=False)
    from tract_det.data.datasets import Holdout, read_dataset

    return read_dataset(
        [args.split],
        args.root,
        args.classes,
        format=args.format,
        holdout=Holdout(args.holdout, args.holdout_seed),
        need_images=False,
        upright=args.exif != "ignore",
    )


def _in_options(error: UserError, args: argparse.Namespace) -> UserError:
    """The error with this program's options instead of the keys of a configuration."""
    text = str(error)
    for key, option in (
        ("DATASETS.ROOT", "--devkit" if args.devkit else "--root"),
        ("DATASETS.HOLDOUT_SEED", "--holdout-seed"),
        ("DATASETS.HOLDOUT", "--holdout"),
        ("DATASETS.FORMAT", "--format"),
        ("DATASETS.CLASSES; register_voc's class_names", "--classes"),
        ("DATASETS.CLASSES", "--classes"),
        ("INPUT.EXIF", "--exif"),
    ):
        text = text.replace(key, option)
    return UserError(text)


def _read(path: Path, args: argparse.Namespace, truth: "GroundTruth") -> "Detections":
    from tract_det.evaluation.coco_results import read_coco_results
    from tract_det.evaluation.detection_files import read_detections

    others = args.ignore_other_images
    if path.is_file():
        detections = read_coco_results(path, truth, others=others)
    else:
        names = truth.class_names
        detections = read_detections(path, args.split, names, truth.positions, others=others)
    return _of_the_split(path, detections)


def _of_the_split(path: Path, detections: "Detections") -> "Detections":
    """Without those of other images, whose number is said."""
    kept = detections.image >= 0
    count = len(kept) - int(kept.sum())
    if not count:
        return detections
    if not kept.any():
        raise UserError(
            f"{path}: none of its images is in the split: evaluate the split that these detections "
            "belong to"
        )
    warnings.warn(
        f"{path}: left out are {count} of {len(kept)} detections, of images that are not in the "
        "split",
        stacklevel=2,
    )
    columns = {name: values[kept] for name, values in vars(detections).items()}
    return replace(detections, **columns)
