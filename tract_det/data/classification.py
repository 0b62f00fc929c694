"""Data sets of images to classify: folders in ImageNet's layout, and torchvision's small sets.

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

from tract_det.data.bands import ARRAY_SUFFIX
from tract_det.data.files import is_image
from tract_det.data.fingerprint import beginning, fingerprint, names_as_bytes
from tract_det.data.images import MAX_PIXELS, CorruptImageError, read_as_decoded
from tract_det.errors import UserError

Target = dict[str, Any]

_LAYOUT = "expected train/<class>/*.jpg and val/<class>/*.jpg (or test/<class>/*.jpg)"
_CIFARS = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}
_FILE_SETS = {"flowers102": datasets.Flowers102, "stanford_cars": datasets.StanfordCars}

_SUFFIXES = (*datasets.folder.IMG_EXTENSIONS, ARRAY_SUFFIX)

# Replacements drawn for a corrupt image before the data set is given up.
_MAX_REPLACEMENTS = 100


@dataclass(frozen=True, eq=False)
class ClassificationSplit:
    """n images with their labels.

    Attributes:
        name: Data set and part, for messages.
        class_names: K names; label k is class_names[k].
        labels: (n,) int64, 0..K-1.
        numbers: (n,) int64, positions of the images in `files` or `pixels`, whichever is set.
        root: The folder that `files` are relative to.
        files: Paths below root as a numpy array of bytes. A list of Python strings would end up
            copied into every worker process, page by page, as reference counts change.
        pixels: (m, H, W, 3) uint8 RGB, for data sets held in memory.
        max_pixels: An image file with more is refused.
        channels: C, of the image files, as in `images.read_upright`.
    """

    name: str
    class_names: tuple[str, ...]
    labels: np.ndarray
    numbers: np.ndarray
    root: Path
    files: np.ndarray | None = None
    pixels: np.ndarray | None = None
    max_pixels: int = MAX_PIXELS
    channels: int = 3

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> "ClassificationSplit":
        """The first images, at most so many."""
        return replace(self, labels=self.labels[:count], numbers=self.numbers[:count])

    def image_id(self, index: int) -> str:
        """The file's path below root, or the split's name and the position in `pixels`."""
        number = self.numbers[index]
        if self.files is None:
            return f"{self.name}/{number}"
        return os.fsdecode(self.files[number].item())

    def fingerprint(self) -> str:
        """Equal for the same images with the same labels, wherever they lie."""

        def content(index: int) -> bytes:
            if self.pixels is None:
                return beginning(self.root / self.image_id(index))
            return self.pixels[self.numbers[index]].tobytes()

        ids = map(self.image_id, range(len(self)))
        parts = names_as_bytes(self.class_names), names_as_bytes(ids), self.labels.tobytes()
        return fingerprint(parts, len(self), content)

    def read(self, index: int) -> torch.Tensor:
        """(C, H, W) uint8. It may share the split's memory: do not write to it.

        Raises:
            UserError: As `read_as_decoded`.
        """
        if self.pixels is None:
            path = self.root / self.image_id(index)
            return read_as_decoded(path, self.max_pixels, self.channels)
        return torch.from_numpy(self.pixels[self.numbers[index]]).permute(2, 0, 1)

    def subset(self, keep: np.ndarray) -> "ClassificationSplit":
        """The images that `keep` selects, by positions or by a mask of (n,) bool."""
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
    """The images to train on or to evaluate on.

    Args:
        name: `imagefolder`: root/train/<class>/* and root/val/<class>/* (or root/test), pictures or
            `.npy` arrays, with the sorted folder names as classes. `cifar10`, `cifar100`,
            `flowers102`, `stanford_cars`: torchvision's data set at root. Flowers-102 is trained on
            its parts train and val and evaluated on test, as published fine-tuning results are.
        root: The folder of the data set.
        train: True: the images to train on; False: those to evaluate on.
        holdout: For an image folder without val: the share of each class in train that is kept for
            evaluation, at least one image.
        seed: Selects the images that are held out.
        limit: Number of training images, spread evenly over the classes and taken from the start of
            each; 0: all.

    Raises:
        UserError: Something is missing, empty or contradictory; the message names the folder or
            key.
    """
    root = Path(root).expanduser().absolute()
    if not root.is_dir():
        raise UserError(f"{root}: no such folder: set DATASETS.ROOT to the folder of {name}")
    if name == "imagefolder":
        split = _read_image_folder(root, train, holdout, seed)
    elif holdout:
        raise UserError(
            f"DATASETS.HOLDOUT is for image folders without val; {name} has its own images to "
            "evaluate on: set it to 0"
        )
    elif name in _CIFARS:
        split = _read_cifar(name, root, train)
    else:
        split = _read_files(name, root, train)
    return split.subset(_spread(split.labels, limit)) if train and limit else split


class ClassificationDataset(Dataset):
    """Pairs (image, target) of a split.

    image: What the transform makes of a uint8 (C, H, W) tensor: (C, S, S) float32.

    target:
        label: int, 0..K-1.
        image_id: str, `split.image_id`.
        skipped: tuple of the ids of the corrupt images that this one replaces; only if there are
            any.

    Args:
        split: The images.
        transform: As `classification_transforms.py` builds them; it must not write to its argument.
            None: the uint8 pixels.
        skip_corrupt: Whether an image that does not decode is replaced by a random other one. The
            replacement is drawn from torch's generator, so under `SeededDataset` it is a function
            of (seed, draw). In evaluation there is no replacement: the loader leaves the image out.
        cache: MiB of decoded images that each worker process keeps. Meant for small images:
            decoding a 32 x 32 JPEG takes longer than augmenting it.
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
        self._cache_bytes_left = cache << 20 if split.pixels is None else 0
        self._cache: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Target]:
        """Reads and transforms one image, or with `skip_corrupt` its replacement.

        Raises:
            UserError: As `load`; with `skip_corrupt`, too many images in a row are corrupt.
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
            "replace it are corrupt: repair the data"
        )

    def load(self, index: int) -> tuple[torch.Tensor, Target]:
        """Reads and transforms this image, never a replacement.

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
            if image.nbytes <= self._cache_bytes_left:
                self._cache_bytes_left -= image.nbytes
                self._cache[index] = image
        return image


def _read_image_folder(root: Path, train: bool, holdout: float, seed: int) -> ClassificationSplit:
    has_train = (root / "train").is_dir()
    test_part = next((part for part in ("val", "test") if (root / part).is_dir()), None)
    if not has_train and (train or test_part is None):
        raise UserError(f"{root}: no folder train here; {_LAYOUT}")
    if test_part is None and not holdout:
        raise UserError(
            f"{root}: no folder val or test here: set DATASETS.HOLDOUT to the share of train to "
            "evaluate on, for example 0.1"
        )
    if test_part and holdout:
        raise UserError(
            f"{root / test_part} is there to evaluate on: set DATASETS.HOLDOUT to 0, or remove the "
            "folder"
        )
    if test_part and has_train:
        _check_same_classes(root, test_part)
    split = _read_part(root, test_part if test_part and not train else "train")
    if test_part:
        return split
    is_test = _held_out(split, holdout, seed)
    name = "train without holdout" if train else "holdout of train"
    return replace(split.subset(~is_test if train else is_test), name=name)


def _classes(folder: Path) -> set[str]:
    return {entry.name for entry in os.scandir(folder) if entry.is_dir()}


def _check_same_classes(root: Path, test_part: str) -> None:
    train, test = _classes(root / "train"), _classes(root / test_part)
    for complete, incomplete, missing in (
        ("train", test_part, train - test),
        (test_part, "train", test - train),
    ):
        if missing:
            names = sorted(missing)
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(
                f"{root / incomplete}: no folder for {', '.join(names[:3])}{more}, which "
                f"{complete} has: both need the same classes"
            )


def _read_part(root: Path, part: str) -> ClassificationSplit:
    """The split of root/part, a folder of class folders."""
    try:
        folder = datasets.ImageFolder(str(root / part), is_valid_file=_is_image, allow_empty=True)
    except FileNotFoundError:
        raise UserError(f"{root / part}: no class folders here; {_LAYOUT}") from None
    labels = np.array([label for _, label in folder.samples], dtype=np.int64)
    counts = np.bincount(labels, minlength=len(folder.classes))
    if not counts.all():
        empty = folder.classes[int(counts.argmin())]
        raise UserError(
            f"{root / part / empty}: no images here ({', '.join(_SUFFIXES)}): add some, or remove "
            "the folder"
        )
    paths = [path for path, _ in folder.samples]
    return _file_split(part, folder.classes, labels, root, paths)


def _is_image(path: str) -> bool:
    """Whether a file is an image by its name, or an array that is no picture's cache."""
    name = path.lower()
    is_picture = name.endswith(datasets.folder.IMG_EXTENSIONS)
    return is_picture or (name.endswith(ARRAY_SUFFIX) and is_image(Path(path)))


def _file_split(
    name: str, classes: Sequence[str], labels: np.ndarray, root: Path, paths: Sequence[str]
) -> ClassificationSplit:
    start = len(str(root).rstrip("/")) + 1
    files = np.array([os.fsencode(path[start:]) for path in paths])
    return ClassificationSplit(
        name, tuple(classes), labels, np.arange(len(files)), root, files=files
    )


def _held_out(split: ClassificationSplit, share: float, seed: int) -> np.ndarray:
    """(n,) bool: `share` of each class, at least one image, drawn independently for each class."""
    is_test = np.zeros(len(split), dtype=bool)
    for k, name in enumerate(split.class_names):
        positions = np.flatnonzero(split.labels == k)
        if len(positions) < 2:
            raise UserError(
                f"{split.root / 'train' / name}: one image cannot be both trained on and held out: "
                "add images, or remove the folder"
            )
        count = min(max(1, round(share * len(positions))), len(positions) - 1)
        is_test[np.random.default_rng((seed, k)).permutation(positions)[:count]] = True
    return is_test


def _spread(labels: np.ndarray, limit: int) -> np.ndarray:
    """Ascending positions of `limit` images: the first of every class, the second of each, ..."""
    order = np.argsort(labels, kind="stable")
    class_starts = np.searchsorted(labels[order], labels[order])
    rank_in_class = np.arange(len(labels)) - class_starts
    return np.sort(order[np.lexsort((labels[order], rank_in_class))[:limit]])


def _read_cifar(name: str, root: Path, train: bool) -> ClassificationSplit:
    dataset = _construct(name, root, partial(_CIFARS[name], str(root), train=train, download=False))
    labels = np.array(dataset.targets, dtype=np.int64)
    part = f"{name} {'train' if train else 'test'}"
    pixels = np.ascontiguousarray(dataset.data)  # torchvision's is a view of (n, 3, 32, 32)
    return ClassificationSplit(
        part, tuple(dataset.classes), labels, np.arange(len(labels)), root, pixels=pixels
    )


def _read_files(name: str, root: Path, train: bool) -> ClassificationSplit:
    """Flowers-102 or Stanford Cars, whose files torchvision lists; `loader=str` opens none."""
    parts = ["train"] if train else ["test"]
    if train and name == "flowers102":
        parts.append("val")
    pairs: list[tuple[str, int]] = []
    for part in parts:
        construct = partial(_FILE_SETS[name], str(root), split=part, loader=str)
        dataset = _construct(name, root, construct)
        pairs += [dataset[i] for i in range(len(dataset))]
    labels = np.array([label for _, label in pairs], dtype=np.int64)
    names = getattr(dataset, "classes", None) or [str(k + 1) for k in range(labels.max() + 1)]
    return _file_split(
        f"{name} {'+'.join(parts)}", names, labels, root, [path for path, _ in pairs]
    )


def _construct(name: str, root: Path, construct: Callable[[], Any]) -> Any:
    """Calls torchvision's constructor; missing data become an error of one line."""
    try:
        return construct()
    except TypeError:
        raise UserError(
            f"{name} needs a newer torchvision, whose data set takes `loader`"
        ) from None
    except (ImportError, RuntimeError, OSError) as error:
        if "scipy" in str(error).lower():
            raise UserError(f"{name} needs scipy to read its labels: pip install scipy") from None
        if name == "stanford_cars":
            remedy = (
                "its authors no longer serve it; torchvision expects stanford_cars/ with devkit/, "
                "cars_train/, cars_test/ and cars_test_annos_withlabels.mat"
            )
        else:
            kind = (_CIFARS | _FILE_SETS)[name].__name__
            call = f"datasets.{kind}('{root}', download=True)"
            remedy = f'get it with: python -c "from torchvision import datasets; {call}"'
        raise UserError(f"{root}: no {name} here ({error}): {remedy}") from None
