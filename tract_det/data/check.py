"""What is in a data set, what is likely to be wrong with it, and settings that fit it.

Everything but `image_facts` and `pixel_statistics` needs the annotations alone.
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from tract_det.data.annotations import Annotation, DetectionSplit, in_threads
from tract_det.data.exif import check_headers, reader, with_sizes
from tract_det.data.faults import Faults
from tract_det.errors import UserError

THIN = 2.0  # pixels: a box that is thinner within its image
_WHOLE = 0.97  # of the image's width and height: a box that covers it
_SAME = 0.95  # IoU of two boxes of a class that are one object twice
_FAR = 1.0  # pixels beyond the image's edge
_SMALL = 16.0  # pixels: an object's side that a feature pyramid finds well
_LARGEST_SIDE = 800  # pixels: beyond it, COCO's own recipes do not go
_LEVELS = 5  # of a feature pyramid

RATIO_QUANTILES = {"min": 0.0, "5%": 0.05, "50%": 0.5, "95%": 0.95, "max": 1.0}


@dataclass
class Suspects:
    """Boxes that are likely to be wrong, as (image id, class) each.

    Attributes:
        outside: reach beyond their image by more than a pixel.
        thin: are less than two pixels wide or high within it.
        duplicated: nearly the same as another box of their class.
        whole: cover the image.
    """

    outside: list[tuple[str, str]] = field(default_factory=list)
    thin: list[tuple[str, str]] = field(default_factory=list)
    duplicated: list[tuple[str, str]] = field(default_factory=list)
    whole: list[tuple[str, str]] = field(default_factory=list)

    def by_kind(self) -> dict[str, list[tuple[str, str]]]:
        """The lists by what is said of them."""
        return {
            "outside their image": self.outside,
            "less than two pixels wide or high": self.thin,
            "twice there": self.duplicated,
            "as large as their image": self.whole,
        }


def counts(split: DetectionSplit) -> dict[str, Any]:
    """Numbers of a split.

    Returns:
        `images`, `without_objects`, `objects`, `difficult`, `dropped` (boxes of a pixel or less),
        and by class `classes`; `sizes`, the five most frequent (width, height) with their numbers;
        `aspect_ratios`, height / width of the boxes by `RATIO_QUANTILES`, {} without boxes.
    """
    boxes = np.concatenate([a.boxes for a in split.annotations])
    ratios = (boxes[:, 3] - boxes[:, 1]) / (boxes[:, 2] - boxes[:, 0])
    quantiles = RATIO_QUANTILES if len(ratios) else {}
    labels = np.concatenate([a.labels for a in split.annotations]).astype(int)
    per_class = np.bincount(labels, minlength=len(split.class_names))
    sizes = Counter((a.width, a.height) for a in split.annotations)
    return {
        "images": len(split),
        "without_objects": sum(not len(a.labels) for a in split.annotations),
        "objects": len(labels),
        "difficult": int(sum(a.difficult.sum() for a in split.annotations)),
        "dropped": split.dropped,
        "classes": dict(zip(split.class_names, per_class.tolist(), strict=True)),
        "sizes": sizes.most_common(5),
        "aspect_ratios": {
            name: round(float(np.quantile(ratios, q)), 3) for name, q in quantiles.items()
        },
    }


def summary(split: DetectionSplit) -> str:
    """A split in a line, for the log of a training."""
    numbers = counts(split)
    classes = sorted(numbers["classes"].items(), key=lambda item: -item[1])
    few = ", ".join(f"{name} {count:,}" for name, count in classes[:4])
    others = f", and {len(classes) - 4} more classes" if len(classes) > 4 else ""
    empty = numbers["without_objects"]
    suspects = find_suspects(split).by_kind()
    doubtful = [f"{len(boxes):,} boxes are {kind}" for kind, boxes in suspects.items() if boxes]
    parts = [f"{numbers['objects']:,} objects ({few}{others})"]
    parts += [f"{empty:,} images without objects"] * bool(empty)
    parts += doubtful
    hint = "; `tract-det check` shows them" if doubtful else ""
    return f"{split.name}: {'; '.join(parts)}{hint}"


def find_suspects(split: DetectionSplit) -> Suspects:
    """The boxes of a split that are likely to be wrong."""
    suspects = Suspects()
    for a in split.annotations:
        if not len(a.boxes) or not a.width:
            continue
        low, high = a.boxes[:, :2], a.boxes[:, 2:]
        size = np.array([a.width, a.height], dtype=float)
        inside = np.clip(high, 0, size) - np.clip(low, 0, size)
        flags = {
            "outside": ((low < -_FAR) | (high > size + _FAR)).any(axis=1),
            "thin": (inside < THIN).any(axis=1),
            "whole": (inside >= _WHOLE * size).all(axis=1),
            "duplicated": _is_double(a),
        }
        for kind, is_suspect in flags.items():
            listed = getattr(suspects, kind)
            listed += [
                (a.image_id, split.class_names[a.labels[k]]) for k in np.flatnonzero(is_suspect)
            ]
    return suspects


def _is_double(a: Annotation) -> np.ndarray:
    """(n,) bool: boxes that an earlier one of their class is nearly the same as."""
    n = len(a.boxes)
    low = np.maximum(a.boxes[:, None, :2], a.boxes[None, :, :2])
    high = np.minimum(a.boxes[:, None, 2:], a.boxes[None, :, 2:])
    common = np.clip(high - low, 0, None).prod(axis=2)
    area = (a.boxes[:, 2:] - a.boxes[:, :2]).prod(axis=1)
    union = area[:, None] + area[None, :] - common
    is_same = (common > _SAME * union) & (a.labels[:, None] == a.labels[None, :])
    return (is_same & np.tri(n, k=-1, dtype=bool)).any(axis=1)


def twins(class_names: Sequence[str]) -> list[tuple[str, ...]]:
    """Names that are one but for case, spaces, punctuation or a plural's s."""
    groups = defaultdict(list)
    for name in class_names:
        bare = re.sub(r"[\W_]", "", name.casefold())
        groups[bare.removesuffix("s") if len(bare) > 3 else bare].append(name)
    return [tuple(names) for names in groups.values() if len(names) > 1]


def only_in_one(splits: Sequence[DetectionSplit]) -> dict[str, str]:
    """Classes that have objects in one of several splits alone, with its name."""
    where = defaultdict(list)
    for split in splits:
        for name, count in counts(split)["classes"].items():
            if count:
                where[name].append(split.name)
    return {name: names[0] for name, names in where.items() if len(names) == 1 < len(splits)}


class ImageFacts(NamedTuple):
    """What reading the files of a data set has shown.

    Attributes:
        splits: the data, with the sizes of the images as they are read.
        faults: of images that cannot be used, a line each.
        oriented: number of images with an EXIF orientation other than upright.
        shared: of images with the same content, the places (split, image id). A list of images
            that is part of another list, as train is of trainval, shares nothing with it.
    """

    splits: list[DetectionSplit]
    faults: list[str]
    oriented: int
    shared: list[list[tuple[str, str]]]


def image_facts(
    splits: Sequence[DetectionSplit], exif: str = "auto", channels: int = 3
) -> ImageFacts:
    """Reads every image's file: header, orientation, channels, and a hash of its content."""
    settled, faults, oriented = [], [], 0
    for split in splits:
        try:
            orientations = check_headers(split.annotations, exif, channels)
            oriented += orientations.oriented
            annotations = with_sizes(split.annotations, orientations)
        except UserError as error:
            faults.append(str(error))
            annotations = split.annotations
        read_as = replace(split, exif=exif, channels=channels)
        settled.append(replace(read_as, annotations=annotations))
    places = [(split.name, a) for split in splits for a in split.annotations]

    def read(place: tuple[str, Annotation]) -> bytes:
        try:
            return hashlib.sha256(place[1].path.read_bytes()).digest()
        except OSError:
            return b""  # `check_headers` has named it

    same = defaultdict(list)
    for (name, a), digest in zip(places, in_threads(read, places), strict=True):
        if digest:
            same[digest].append((name, a.image_id))
    members = {split.name: {a.image_id for a in split.annotations} for split in splits}
    paths = {(split.name, a.image_id): a.path for split in splits for a in split.annotations}
    shared = [
        group
        for group in same.values()
        if len({paths[place] for place in group}) > 1
        or any(
            not (members[a] <= members[b] or members[b] <= members[a])
            for (a, _), (b, _) in combinations(group, 2)
        )
    ]
    return ImageFacts(settled, faults, oriented, shared)


def pixel_statistics(split: DetectionSplit, images: int = 500) -> tuple[list[float], list[float]]:
    """Mean and standard deviation by channel, in [0, 255], over images spread over a split."""
    step = max(1, len(split) // images)
    total, squares, count = np.zeros(split.channels), np.zeros(split.channels), 0
    faults, read = Faults(), reader(split.exif)
    for a in split.annotations[::step][:images]:
        with faults.noted():
            pixels = read(a.path, split.max_pixels, split.channels).double().flatten(1)
            total += pixels.sum(1).numpy()
            squares += pixels.square().sum(1).numpy()
            count += pixels.shape[1]
    faults.refuse()
    mean = total / count
    return mean.tolist(), np.sqrt(np.maximum(squares / count - mean**2, 0)).tolist()


def fitting_settings(split: DetectionSplit) -> dict[str, Any]:
    """Image size and anchors that fit the objects of a split, by configuration key.

    The shorter side is that of the images, enlarged until nine of ten objects have a side of 16
    pixels, at most to 800 and at most by two and a half. Anchors of a feature pyramid's five levels
    are quantiles of the objects' sides at that size, their aspect ratios (height / width) quantiles
    likewise; all classes weigh the same, so that a rare one has anchors too.

    Returns:
        Values of INPUT.MIN_SIZE_TRAIN, MAX_SIZE_TRAIN, MIN_SIZE_TEST, MAX_SIZE_TEST and
        MODEL.ANCHOR_GENERATOR's SIZES and ASPECT_RATIOS; {} without objects.
    """
    sizes = np.array([(a.width, a.height) for a in split.annotations], dtype=float)
    boxes = np.concatenate([a.boxes for a in split.annotations])
    sides = np.clip(boxes[:, 2:] - boxes[:, :2], 1, None)
    if not len(sides) or not sizes.all():
        return {}
    shorter = float(np.median(sizes.min(axis=1)))
    longer = float((sizes.max(axis=1) * shorter / sizes.min(axis=1)).max())
    labels = np.concatenate([a.labels for a in split.annotations]).astype(int)
    weights = 1 / np.bincount(labels)[labels]
    root = np.sqrt(sides.prod(axis=1))
    scale = float(np.clip(_SMALL / _quantile(root, weights, 0.1), 1.0, 2.5))
    scale = min(scale, _LARGEST_SIDE / shorter)
    side = max(32, round(shorter * scale / 16) * 16)
    longest = -(-int(longer * side / shorter) // 16) * 16
    anchors = []
    for level in range(_LEVELS):
        anchor = _quantile(root, weights, (level + 0.5) / _LEVELS) * side / shorter
        anchors.append(8 * max(1, round(anchor / 8)))
    for level in range(1, _LEVELS):  # each level has a size of its own
        anchors[level] = max(anchors[level], anchors[level - 1] + 8)
    ratio = sides[:, 1] / sides[:, 0]
    ratios = sorted({round(_quantile(ratio, weights, q), 1) for q in (0.1, 0.5, 0.9)})
    return {
        "INPUT.MIN_SIZE_TRAIN": [side],
        "INPUT.MAX_SIZE_TRAIN": longest,
        "INPUT.MIN_SIZE_TEST": side,
        "INPUT.MAX_SIZE_TEST": longest,
        "MODEL.ANCHOR_GENERATOR.SIZES": anchors,
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [max(ratio, 0.1) for ratio in ratios],
    }


def _quantile(values: np.ndarray, weights: np.ndarray, q: float) -> float:
    """The smallest value below or at which a fraction q of the weights lies."""
    order = np.argsort(values)
    reached = np.cumsum(weights[order])
    return float(values[order[np.searchsorted(reached, q * reached[-1])]])
