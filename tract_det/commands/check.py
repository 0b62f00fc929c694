"""Looks at a data set before a training: what is in it, and what is likely to be wrong.

    tract-det check path/to/cells
    tract-det check path/to/cells --splits trainval test --out pictures --json check.json
    tract-det check path/to/cells --statistics
    tract-det check path/to/multispectral --channels 5 --statistics

It counts images, objects and classes by split, and says the images' sizes and the boxes' aspect
ratios; finds boxes outside their image, thin ones, double ones and those as large as their image,
images that cannot be read or are in two splits, sizes that disagree, classes that only one split
has, and names that look like twins. It proposes an image size and anchors that fit, as text to
paste behind a command. --out draws a sheet of pictures with their boxes, suspicious ones first. The
exit code is 0 if a training can start, 1 if not.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tract_det.data.choices import DETECTION_FORMATS, EXIF_MODES
from tract_det.errors import UserError

if TYPE_CHECKING:
    from tract_det.data.annotations import DetectionSplit
    from tract_det.data.check import ImageFacts, Suspects

_PICTURES = 24


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    parser.add_argument("root", type=Path, metavar="DATA", help="as DATASETS.ROOT")
    parser.add_argument("--splits", nargs="+", metavar="SPLIT", help="default: all that are there")
    parser.add_argument("--format", choices=DETECTION_FORMATS, default="auto")
    parser.add_argument("--exif", choices=EXIF_MODES, default="auto", help="as INPUT.EXIF")
    parser.add_argument("--classes", nargs="+", help="as DATASETS.CLASSES")
    parser.add_argument(
        "--channels",
        type=int,
        metavar="N",
        help="of every image, which become the length of MODEL.PIXEL_MEAN (default: those of the "
        "first image if it is a .npy, else 3)",
    )
    parser.add_argument("--statistics", action="store_true", help="measure pixel statistics")
    parser.add_argument("--out", type=Path, metavar="DIR", help="draw pictures into check.png here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it")
    args = parser.parse_args(argv)
    if args.channels is not None and args.channels < 1:
        parser.error("--channels is a number of channels, from 1")
    return args


def main(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """Looks, prints and writes; returns 0 if a training can start."""
    args = _parse(parser, argv)
    from tract_det.data import check
    from tract_det.files import write_json

    splits, refused = _read(args)
    for message in refused:
        print(f"error: {message}")
    if not splits:
        return 1
    facts = check.image_facts(splits, args.exif, args.channels or _channels(splits))
    splits = facts.splits
    numbers = {split.name: check.counts(split) for split in splits}
    suspects = {split.name: check.find_suspects(split) for split in splits}
    print(f"{args.root}: {splits[0].origin.partition(',')[0]}")
    print(_table(numbers))
    warnings = _warnings(splits, suspects, facts)
    for line in warnings:
        print(f"warning: {line}")
    for line in facts.faults:
        print(f"error: {line}")
    training = next((s for s in splits if s.name in ("train", "trainval")), splits[0])
    settings = check.fitting_settings(training)
    if args.statistics and not facts.faults:
        mean, std = check.pixel_statistics(training)
        settings["MODEL.PIXEL_MEAN"] = [round(x, 2) for x in mean]
        settings["MODEL.PIXEL_STD"] = [round(x, 2) for x in std]
    if settings:
        print(f"settings that fit {training.name}:")
        print("  " + " ".join(f"{key} {_quoted(value)}" for key, value in settings.items()))
    can_start = not refused and not facts.faults
    print("a training can start" if can_start else "a training cannot start: mend the errors")
    if args.out:
        _draw(args.out / "check.png", splits, suspects)
    if args.json:
        kinds = {name: lists.by_kind() for name, lists in suspects.items()}
        write_json(
            args.json,
            {
                "can_start": can_start,
                "errors": [*refused, *facts.faults],
                "warnings": warnings,
                "splits": numbers,
                "suspects": kinds,
                "same_images": facts.shared,
                "settings": settings,
            },
        )
        print(f"wrote {args.json}")
    return 0 if can_start else 1


def _read(args: argparse.Namespace) -> tuple[list["DetectionSplit"], list[str]]:
    """The splits that can be read, and why others cannot."""
    from tract_det.data.datasets import read_whole, splits_of

    names = args.splits or splits_of(args.root, args.format)
    upright = args.exif != "ignore"
    splits, refused = [], []
    for name in names:
        try:
            splits.append(read_whole(args.root, name, args.classes, args.format, upright))
        except UserError as error:
            if str(error) not in refused:
                refused.append(str(error))
    return splits, refused


def _channels(splits: Sequence["DetectionSplit"]) -> int:
    from tract_det.data.images import usual_channels

    try:
        return usual_channels(splits[0].annotations[0].path)
    except UserError:
        return 3  # the images' headers are looked at next, and what is wrong is said of all


def _table(numbers: dict[str, dict[str, Any]]) -> str:
    """Counts by split, and by class and split."""
    names = list(numbers)
    rows = [
        ("", names),
        ("images", [f"{n['images']:,}" for n in numbers.values()]),
        ("  without objects", [f"{n['without_objects']:,}" for n in numbers.values()]),
        ("objects", [f"{n['objects']:,}" for n in numbers.values()]),
        ("  difficult", [f"{n['difficult']:,}" for n in numbers.values()]),
        ("most frequent size", [_size(n) for n in numbers.values()]),
        ("height / width, 5 to 95 %", [_ratios(n) for n in numbers.values()]),
    ]
    classes = dict.fromkeys(name for n in numbers.values() for name in n["classes"])
    for name in classes:
        cells = [f"{n['classes'].get(name, 0):,}" for n in numbers.values()]
        rows.append((f"class {name}", cells))
    left = max(len(title) for title, _ in rows) + 2
    wide = max(len(cell) for _, cells in rows for cell in cells) + 2
    return "\n".join(
        f"{title:{left}}" + "".join(f"{c:>{wide}}" for c in cells) for title, cells in rows
    )


def _size(numbers: dict[str, Any]) -> str:
    (width, height), count = numbers["sizes"][0]
    return f"{width} x {height} ({100 * count / numbers['images']:.0f} %)"


def _ratios(numbers: dict[str, Any]) -> str:
    """Quantiles of the boxes' aspect ratios, the median in the middle."""
    quantiles = numbers["aspect_ratios"]
    return " ".join(f"{quantiles[q]:.2f}" for q in ("5%", "50%", "95%")) if quantiles else ""


def _warnings(
    splits: Sequence["DetectionSplit"], suspects: dict[str, "Suspects"], facts: "ImageFacts"
) -> list[str]:
    from tract_det.data import check

    lines = []
    for split in splits:
        for kind, boxes in suspects[split.name].by_kind().items():
            if boxes:
                first = ", ".join(f"{image} ({name})" for image, name in boxes[:3])
                lines.append(f"{split.name}: {len(boxes):,} boxes are {kind}: {first}")
        if split.dropped:
            lines.append(
                f"{split.name}: {split.dropped:,} boxes have no area, or that of a pixel, and are "
                "left out"
            )
    names = list(dict.fromkeys(name for split in splits for name in split.class_names))
    lines += [
        f"classes {' and '.join(map(repr, group))} look like one" for group in check.twins(names)
    ]
    for name, split_name in check.only_in_one(splits).items():
        lines.append(f"class {name!r} has objects in {split_name} alone")
    across = [group for group in facts.shared if len({split for split, _ in group}) > 1]
    within = [group for group in facts.shared if group not in across]
    for groups, where in ((across, "in several splits"), (within, "several times in one split")):
        if groups:
            first = " = ".join(f"{split}/{image}" for split, image in groups[0])
            lines.append(f"{len(groups):,} images are {where}: {first}")
    if facts.oriented:
        fate = "are read as stored" if splits[0].exif == "ignore" else "are turned upright"
        lines.append(f"{facts.oriented:,} images have an EXIF orientation and {fate}")
    return lines


def _quoted(value: Any) -> str:
    text = json.dumps(value)
    return f'"{text}"' if isinstance(value, list) else text


def _draw(path: Path, splits: Sequence["DetectionSplit"], suspects: dict[str, "Suspects"]) -> None:
    """Draws pictures with their boxes: those with suspicious boxes, then some of each split."""
    from tract_det.data.annotations import relabel
    from tract_det.visualize import annotation_grid, beside_the_results

    doubtful, others = [], []
    names = tuple(dict.fromkeys(name for split in splits for name in split.class_names))
    for split in splits:
        annotations = relabel(split, names)
        suspicious = {
            image for kind in suspects[split.name].by_kind().values() for image, _ in kind
        }
        step = max(1, len(split) // _PICTURES)
        doubtful += [a for a in annotations if a.image_id in suspicious]
        others += [a for a in annotations[::step] if a.image_id not in suspicious]
    chosen = (doubtful + others)[:_PICTURES]
    with beside_the_results(path):
        objects = [(a.path, a.boxes, a.labels) for a in chosen]
        annotation_grid(path, objects, names, _reader(splits[0]))
        first = ": suspicious pictures come first" if doubtful else ""
        print(f"wrote {path}{first}")


def _reader(split: "DetectionSplit") -> Callable[[Path], Any]:
    """Reads `(H, W, 3)` uint8 for a picture, turned and of the channels as a training reads it."""
    from tract_det.data.exif import reader
    from tract_det.data.images import shown

    read = reader(split.exif)
    return lambda path: shown(read(path, split.max_pixels, split.channels)).permute(1, 2, 0).numpy()
