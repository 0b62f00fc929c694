"""The evaluation of detections against reading them and against pycocotools.

    tract-det bench evaluation
    tract-det bench evaluation --images 500 --objects 1500 --detections 22000 --bootstrap 0

It makes a split with its annotations and detections as files, of the size of VOC2007 test unless
told otherwise, and evaluates them in one process, imports apart. Times are those of the process, so
that other work on the machine counts little; what is compared, is compared within one run.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tract_det.cli import run
from tract_det.commands.bench import print_and_keep
from tract_det.data.annotations import DetectionSplit
from tract_det.data.voc import VOC_CLASSES, read_split
from tract_det.evaluation.boxes import Detections
from tract_det.evaluation.detection_files import ImageDetections, read_detections, write_detections
from tract_det.evaluation.detection_results import (
    Evaluated,
    compare,
    details,
    evaluate_detections,
    sampled_means,
    summary,
)
from tract_det.evaluation.ground_truth import GroundTruth, from_annotations
from tract_det.evaluation.pycocotools_ap import pycocotools_ap
from tract_det.evaluation.tables import format_details, format_table

OBJECT = (
    "<object><name>{}</name><pose>Unspecified</pose><truncated>0</truncated>"
    "<difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax>"
    "<ymax>{}</ymax></bndbox></object>"
)
ANNOTATION = (
    "<annotation><folder>VOC2007</folder><filename>{}.jpg</filename><size><width>500</width>"
    "<height>500</height><depth>3</depth></size><segmented>0</segmented>{}</annotation>"
)


def make_split(root: Path, images: int, objects: int) -> None:
    """Annotations in VOC layout: half of the objects are persons, a fifth is difficult."""
    rng = np.random.default_rng(0)
    image = np.sort(np.concatenate([np.arange(images), rng.integers(0, images, objects - images)]))
    shares = np.full(len(VOC_CLASSES), 0.5 / (len(VOC_CLASSES) - 1))
    shares[VOC_CLASSES.index("person")] = 0.5
    labels = rng.choice(len(VOC_CLASSES), objects, p=shares)
    corner = rng.integers(0, 300, (objects, 2))
    size = np.exp(rng.uniform(np.log(15), np.log(200), (objects, 2))).astype(int)
    boxes = np.concatenate([corner + 1, corner + size], axis=1)
    difficult = (rng.random(objects) < 0.2).astype(int)
    (root / "Annotations").mkdir(parents=True)
    (root / "ImageSets" / "Main").mkdir(parents=True)
    bounds = np.searchsorted(image, np.arange(images + 1))
    ids = [f"{number:06d}" for number in range(images)]
    for name, begin, end in zip(ids, bounds[:-1], bounds[1:], strict=True):
        parts = [
            OBJECT.format(VOC_CLASSES[labels[k]], difficult[k], *boxes[k])
            for k in range(begin, end)
        ]
        (root / "Annotations" / f"{name}.xml").write_text(ANNOTATION.format(name, "".join(parts)))
    (root / "ImageSets" / "Main" / "test.txt").write_text("\n".join(ids) + "\n")


def make_detections(split: DetectionSplit, count: int) -> dict[str, ImageDetections]:
    """Found objects, their duplicates and confusions, and background with low scores.

    Numbers are float32, as a detector's are.
    """
    rng = np.random.default_rng(1)
    detections = {}
    # Up to and including each image, so that the numbers add up.
    up_to = np.arange(len(split) + 1) * count // len(split)
    for annotation, wanted in zip(split.annotations, np.diff(up_to), strict=True):
        n = len(annotation.boxes)
        hits = np.flatnonzero(rng.random(n) < 0.85)
        again = rng.integers(0, max(n, 1), min(n, 1) * 8)
        false = max(0, int(wanted) - len(hits) - len(again))
        corner = rng.uniform(0, 300, (false, 2))
        background = np.concatenate([corner, corner + rng.uniform(15, 200, (false, 2))], axis=1)
        boxes = np.concatenate(
            [
                annotation.boxes[hits] + rng.normal(0, 6, (len(hits), 4)),
                annotation.boxes[again] + rng.normal(0, 20, (len(again), 4)),
                background,
            ]
        )
        boxes[:, :2] = np.minimum(boxes[:, :2], boxes[:, 2:] - 1)
        scores = [
            rng.beta(4, 1.5, len(hits)),
            rng.beta(1, 4, len(again)),
            rng.beta(0.6, 12, false),
        ]
        is_confused = rng.random(len(again)) < 0.5
        other = rng.integers(0, len(split.class_names), len(again))
        labels = [
            annotation.labels[hits],
            np.where(is_confused, other, annotation.labels[again]),
            rng.integers(0, len(split.class_names), false),
        ]
        detections[annotation.image_id] = ImageDetections(
            boxes.astype(np.float32).astype(np.float64),
            np.concatenate(scores).astype(np.float32).astype(np.float64),
            np.concatenate(labels),
        )
    return detections


class Clock:
    """Seconds of this process by the name of a part, a list over the rounds."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def __call__(self, name: str, part: Callable[[], Any]) -> Any:
        """Runs a part."""
        began = time.process_time()
        result = part()
        self.seconds.setdefault(name, []).append(time.process_time() - began)
        return result

    def median(self, name: str) -> float:
        """Of the rounds."""
        return statistics.median(self.seconds[name])


def evaluate_files(root: Path, folder: Path, clock: Clock) -> tuple[GroundTruth, Evaluated]:
    """Everything but the bootstrap, part by part."""
    split = clock("annotations", lambda: read_split(root, "test", VOC_CLASSES, need_images=False))
    truth = clock("their arrays", lambda: from_annotations(split.annotations, split.class_names))
    detections: Detections = clock(
        "detections", lambda: read_detections(folder, "test", VOC_CLASSES, truth.positions)
    )
    evaluated = clock("matching, VOC and COCO", lambda: evaluate_detections(truth, detections))
    results = clock("means", lambda: summary(evaluated))
    results |= clock("classes, mistakes, confusion", lambda: details(evaluated))
    clock("tables", lambda: format_table(results) + format_details(results))
    return truth, evaluated


def report(args: argparse.Namespace, root: Path, folder: Path) -> Iterator[str]:
    """The whole output, as it is measured."""
    make_split(root, args.images, args.objects)
    split = read_split(root, "test", VOC_CLASSES, need_images=False)
    detections = make_detections(split, args.detections)
    write_detections(folder, "test", VOC_CLASSES, detections)
    count = sum(len(image.scores) for image in detections.values())
    yield f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    yield f"Python {platform.python_version()}, numpy {np.__version__}"
    yield f"{args.images} images, {args.objects} objects, {count} detections, {args.rounds} rounds"
    clock = Clock()
    for _ in range(args.rounds):
        truth, evaluated = evaluate_files(root, folder, clock)
    parts = list(clock.seconds)
    rounds = [sum(seconds) for seconds in zip(*clock.seconds.values(), strict=True)]
    total = statistics.median(rounds)
    for name in parts:
        yield f"  {name:34}{clock.median(name):8.2f} s   {clock.median(name) / total:5.0%}"
    yield f"  {'all of it, from files':34}{total:8.2f} s   ({min(rounds):.2f} to {max(rounds):.2f})"
    if args.bootstrap:
        samples = clock("bootstrap", lambda: sampled_means(evaluated, args.bootstrap))
        seconds = clock.median("bootstrap")
        yield f"  {f'{args.bootstrap} samples':34}{seconds:8.2f} s   ratio {seconds / total:.2f}"
        clock("compared", lambda: compare(evaluated, evaluated, samples))
        seconds = clock.median("compared")
        yield f"  {'difference to another set':34}{seconds:8.2f} s   ratio {seconds / total:.2f}"
    if args.pycocotools:
        sizes = len(truth.image_ids), len(truth.class_names)
        flat = evaluated.detections
        oracle = clock("pycocotools", lambda: pycocotools_ap(truth.objects, flat, *sizes))
        seconds = clock.median("pycocotools")
        computed = summary(evaluated)["coco"]
        error = max(abs(computed[name] - figure) for name, figure in oracle.items())
        yield (
            f"  {'the figures of COCO by pycocotools':34}{seconds:8.2f} s   ratio "
            f"{seconds / total:.2f}; largest difference {error:.1e}"
        )


def main(argv: list[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=4952)
    parser.add_argument("--objects", type=int, default=15_000, help="at least one an image")
    parser.add_argument("--detections", type=int, default=220_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bootstrap", type=int, default=1000, help="samples; 0 = none")
    parser.add_argument("--no-pycocotools", dest="pycocotools", action="store_false")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write what is printed")
    args = parser.parse_args(argv)
    if args.objects < args.images:
        parser.error("--objects is at least --images")
    with tempfile.TemporaryDirectory() as made:
        lines = report(args, Path(made) / "split", Path(made) / "detections")
        print_and_keep(lines, args.output)


if __name__ == "__main__":
    run(main)
