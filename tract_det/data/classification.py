"""What a classifier is pretrained on: image folders in ImageNet's layout, and small known sets.

Labels are 0..K-1. A split is a list of images with labels; `ClassificationDataset` decodes and
transforms them.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import datasets

from tract_det.data.images import CorruptImageError, read_rgb
from tract_det.errors import UserError

Target = dict[str, Any]

_LAYOUT = "expected train/<class>/*.jpg and val/<class>/*.jpg (or test/<class>/*.jpg)"
_CALLS = {
    "cifar10": "datasets.CIFAR10('{root}', download=True)",
    "cifar100": "datasets.CIFAR100('{root}', download=True)",
    "flowers102": "datasets.Flowers102('{root}', download=True)",
}
NAMES = ("imagefolder", *_CALLS, "stanford_cars")

# Draws of a replacement for a corrupt image before giving up on the data.
_MAX_REPLACEMENTS = 100


@dataclass(frozen=True, eq=False)
class ClassificationSplit:
    """n images with their labels.

    Attributes:
        name: Data set and part, for messages.
        class_names: K names; label k is class_names[k].
        labels: (n,) int64, 0..K-1.
        numbers: (n,) int64, where the images are in `files` or `pixels`, whichever there is.
        root: The folder that `files` starts from.
        files: Paths below root as a numpy array of bytes. Python strings would be copied into every
            reading process, page by page, as their reference counts change.
        pixels: (m, H, W, 3) uint8 RGB, of sets that are held in memory.
    """

    name: str
    class_names: tuple[str, ...]
    labels: np.ndarray
    numbers: np.ndarray
    root: Path
    files: np.ndarray | None = None
    pixels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def image_id(self, index: int) -> str:
        """The file below root, or the data set's part and the position in it."""
        number = self.numbers[index]
        if self.files is None:
            return f"{self.name}/{number}"
        return os.fsdecode(self.files[number].item())

    def read(self, index: int) -> torch.Tensor:
        """(3, H, W) uint8 RGB; may share the split's memory: not to be written to.

        Raises:
            UserError: As `read_rgb`.
        """
        if self.pixels is None:
            return read_rgb(self.root / self.image_id(index))
        return torch.from_numpy(self.pixels[self.numbers[index]]).permute(2, 0, 1)

    def subset(self, keep: np.ndarray) -> "ClassificationSplit":
        """The images that `keep` indexes, positions or (n,) bool."""
        return replace(self, labels=self.labels[keep], numbers=self.numbers[keep])


def read_classification(
    name: str,
    root: Path | str,
    *,
    train: bool,
    holdout: float = 0.0,
    seed: int = 0,
    limit: int = 0,
) -> ClassificationSplit:
    """The images to train or to evaluate on.

    Args:
        name: `imagefolder` for root/train/<class>/* and root/val/<class>/* (or root/test), the
            classes being the sorted folder names; `cifar10`, `cifar100`, `flowers102` or
            `stanford_cars` for torchvision's data sets at root. Of Flowers-102 the parts train and
            val are trained on and test is evaluated on, as everybody's fine-tuning tables have it.
        root: A folder.
        train: Whether the training images or those for evaluation are meant.
        holdout: Where an image folder has no val: the share of each class in train that is kept for
            evaluation, at least one image.
        seed: Of what is held out.
        limit: Training images, spread evenly over the classes, the first of each; 0: all.

    Raises:
        UserError: Anything missing, empty or contradictory; the message names the folder or key.
    """
    root = Path(root).expanduser().absolute()
    if name not in NAMES:
        raise UserError(f"DATASETS.NAME is {name!r}: it takes one of {', '.join(NAMES)}")
    if not root.is_dir():
        raise UserError(f"{root}: no such folder: set DATASETS.ROOT to where {name} lies")
    if not 0 <= holdout < 1 or limit < 0:
        raise UserError(
            f"need 0 <= DATASETS.HOLDOUT < 1 and DATASETS.LIMIT >= 0, not {holdout} and {limit}"
        )
    if name == "imagefolder":
        split = _read_image_folder(root, train, holdout, seed)
    elif holdout:
        raise UserError(f"DATASETS.HOLDOUT is for folders without val, {name} has one: set it to 0")
    elif name in ("cifar10", "cifar100"):
        split = _read_cifar(name, root, train)
    else:
        split = _read_files(name, root, train)
    return split.subset(_spread(split.labels, limit)) if train and limit else split


class ClassificationDataset(Dataset):
    """Pairs (image, target) of a split.

    image: What the transform makes of a uint8 (3, H, W) RGB tensor: (3, S, S) float32.

    target:
        label: int, 0..K-1.
        image_id: str, `split.image_id`.
        skipped: tuple of the ids of corrupt images, where this one is in the place of others.

    Args:
        split: What to read.
        transform: Of `classification_transforms.py`; None: the uint8 pixels. It must not write to
            its argument.
        skip_corrupt: Another image takes the place of one that does not decode, drawn with torch's
            generator: a function of (seed, draw) under `SeededDataset`. In evaluation there is no
            such replacement, the loader leaves the image out.
        cache: MiB of decoded images that each reading process keeps. For small images: decoding a
            32 x 32 JPEG takes longer than its augmentation.
    """

    def __init__(
        self,
        split: ClassificationSplit,
        transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
        *,
        skip_corrupt: bool = False,
        cache: int = 0,
    ) -> None:
        self.split = split
        self.transform = transform
        self.skip_corrupt = skip_corrupt
        self._room = cache << 20 if split.pixels is None else 0  # bytes
        self._cache: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Target]:
        """Reads and transforms one image.

        Raises:
            UserError: As `load`; with `skip_corrupt`, too many images in turn are corrupt.
        """
        skipped: list[str] = []
        while len(skipped) <= _MAX_REPLACEMENTS:
            try:
                image, target = self.load(index)
            except CorruptImageError:
                if not self.skip_corrupt:
                    raise
                skipped.append(self.split.image_id(index))
                index = int(torch.randint(len(self), ()))
            else:
                return image, target | {"skipped": tuple(skipped)} if skipped else target
        raise UserError(
            f"{self.split.root / skipped[0]}: this image and {_MAX_REPLACEMENTS} others drawn to "
            "replace it are corrupt: mend the data"
        )

    def load(self, index: int) -> tuple[torch.Tensor, Target]:
        """This image and no other.

        Raises:
            CorruptImageError: It does not decode.
            UserError: The file cannot be opened, or the transform refuses the image's size.
        """
        image = self._read(index)
        image_id = self.split.image_id(index)
        if self.transform is not None:
            try:
                image = self.transform(image)
            except UserError as error:
                raise UserError(f"{image_id}: {error}") from None
        return image, {"label": int(self.split.labels[index]), "image_id": image_id}

    def _read(self, index: int) -> torch.Tensor:
        image = self._cache.get(index)
        if image is None:
            image = self.split.read(index)
            if image.nbytes <= self._room:
                self._room -= image.nbytes
                self._cache[index] = image
        return image


def _read_image_folder(root: Path, train: bool, holdout: float, seed: int) -> ClassificationSplit:
    has_train = (root / "train").is_dir()
    if not has_train and (train or not any((root / part).is_dir() for part in ("val", "test"))):
        raise UserError(f"{root}: no folder train here; {_LAYOUT}")
    own = next((part for part in ("val", "test") if (root / part).is_dir()), None)
    if own is None and not holdout:
        raise UserError(
            f"{root}: no folder val or test here: set DATASETS.HOLDOUT to the share of train to "
            "evaluate on, for example 0.1"
        )
    if own and holdout:
        raise UserError(
            f"{root / own} is there to evaluate on: set DATASETS.HOLDOUT to 0, or remove the folder"
        )
    if own and has_train:
        _check_same_classes(root, own)
    split = _read_part(root, own if own and not train else "train")
    if own:
        return split
    held = _held_out(split, holdout, seed)
    part = "train without holdout" if train else "holdout of train"
    return replace(split.subset(~held if train else held), name=part)


def _classes(folder: Path) -> set[str]:
    return {entry.name for entry in os.scandir(folder) if entry.is_dir()}


def _check_same_classes(root: Path, own: str) -> None:
    train, test = _classes(root / "train"), _classes(root / own)
    for there, here, missing in (("train", own, train - test), (own, "train", test - train)):
        if missing:
            names = sorted(missing)
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(
                f"{root / here}: no folder for {', '.join(names[:3])}{more}, which {there} has: "
                "both need the same classes"
            )


def _read_part(root: Path, part: str) -> ClassificationSplit:
    """One folder of class folders."""
    try:
        found = datasets.ImageFolder(str(root / part), allow_empty=True)
    except FileNotFoundError:
        raise UserError(f"{root / part}: no class folders here; {_LAYOUT}") from None
    labels = np.array([label for _, label in found.samples], dtype=np.int64)
    counts = np.bincount(labels, minlength=len(found.classes))
    if not counts.all():
        empty = found.classes[int(counts.argmin())]
        raise UserError(
            f"{root / part / empty}: no images here ({', '.join(datasets.folder.IMG_EXTENSIONS)}): "
            "add some, or remove the folder"
        )
    paths = [path for path, _ in found.samples]
    return _file_split(part, found.classes, labels, root, paths)


def _file_split(
    name: str, classes: Sequence[str], labels: np.ndarray, root: Path, paths: Sequence[str]
) -> ClassificationSplit:
    start = len(str(root).rstrip("/")) + 1
    files = np.array([os.fsencode(path[start:]) for path in paths])
    return ClassificationSplit(
        name, tuple(classes), labels, np.arange(len(files)), root, files=files
    )


def _held_out(split: ClassificationSplit, share: float, seed: int) -> np.ndarray:
    """(n,) bool: `share` of each class, at least one image, drawn for each class by itself."""
    held = np.zeros(len(split), dtype=bool)
    for k, name in enumerate(split.class_names):
        own = np.flatnonzero(split.labels == k)
        if len(own) < 2:
            raise UserError(
                f"{split.root / 'train' / name}: one image cannot be both trained on and held out: "
                "add images, or remove the folder"
            )
        count = min(max(1, round(share * len(own))), len(own) - 1)
        held[np.random.default_rng((seed, k)).permutation(own)[:count]] = True
    return held


def _spread(labels: np.ndarray, limit: int) -> np.ndarray:
    """Positions, ascending, of at most `limit` images: the first of every class, the second, ..."""
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], labels[order])  # where each one's class begins
    turn = np.arange(len(labels)) - starts
    return np.sort(order[np.lexsort((labels[order], turn))[:limit]])


def _read_cifar(name: str, root: Path, train: bool) -> ClassificationSplit:
    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    found = _construct(name, root, lambda: kind(str(root), train=train, download=False))
    labels = np.array(found.targets, dtype=np.int64)
    part = f"{name} {'train' if train else 'test'}"
    pixels = np.ascontiguousarray(found.data)  # torchvision's is a view of (n, 3, 32, 32)
    return ClassificationSplit(
        part, tuple(found.classes), labels, np.arange(len(labels)), root, pixels=pixels
    )


def _read_files(name: str, root: Path, train: bool) -> ClassificationSplit:
    """Flowers-102 or Stanford Cars: torchvision knows the files, and `loader=str` reads none."""
    kind = datasets.Flowers102 if name == "flowers102" else datasets.StanfordCars
    parts = ["train"] if train else ["test"]
    if train and name == "flowers102":
        parts.append("val")
    pairs: list[tuple[str, int]] = []
    for part in parts:
        found = _construct(name, root, partial(kind, str(root), split=part, loader=str))
        pairs += [found[i] for i in range(len(found))]
    labels = np.array([label for _, label in pairs], dtype=np.int64)
    names = getattr(found, "classes", None) or [str(k + 1) for k in range(labels.max() + 1)]
    return _file_split(
        f"{name} {'+'.join(parts)}", names, labels, root, [path for path, _ in pairs]
    )


def _construct(name: str, root: Path, construct: Callable[[], Any]) -> Any:
    """Torchvision's data set, with what it lacks said in one line."""
    try:
        return construct()
    except TypeError:
        raise UserError(
            f"{name} needs a newer torchvision, whose data set takes `loader`"
        ) from None
    except (ImportError, RuntimeError, OSError) as error:
        if "scipy" in str(error).lower():
            raise UserError(f"{name} needs scipy to read its labels: pip install scipy") from None
        how = (
            f'get it with: python -c "from torchvision import datasets; '
            f'{_CALLS[name].format(root=root)}"'
            if name in _CALLS
            else "it is no longer served by its authors; torchvision expects stanford_cars/ with "
            "devkit/, cars_train/, cars_test/ and cars_test_annos_withlabels.mat"
        )
        raise UserError(f"{root}: no {name} here ({error}): {how}") from None
