"""Reads data sets in the layout of the PASCAL VOC devkit.

    root/Annotations/<id>.xml
    root/ImageSets/Main/<split>.txt     one image id per line
    root/JPEGImages/<id>.jpg            or .jpeg, .png

In the files a box is (xmin, ymin, xmax, ymax) in 1-based pixels, the last one included. Here it is
(xmin - 1, ymin - 1, xmax, ymax), the edges of its pixels counted from 0, so that a width is a
difference and a flip is `width - x`. VOC2012 has a few fractional coordinates; they are kept.

Format: "The PASCAL Visual Object Classes Challenge 2012 Development Kit", sections 6 and 8.3.
"""

import codecs
import difflib
import os
import re
import warnings
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tract_det.data.faults import Faults
from tract_det.data.images import MAX_PIXELS, upright_size
from tract_det.data.shapes import SHAPES_CLASSES, ensure_shapes
from tract_det.data.voc_xml import Record, parse_annotation
from tract_det.errors import UserError

VOC_CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)

# The official archives: path on the server, and md5.
_SERVER = "https://thor.robots.ox.ac.uk/pascal/VOC"
_ARCHIVES = {
    "voc2007/VOCtrainval_06-Nov-2007.tar": "c52e279531787c972589f7e41ab4ae64",
    "voc2007/VOCtest_06-Nov-2007.tar": "b6e924de25625d8de591ea690078ad9f",
    "voc2012/VOCtrainval_11-May-2012.tar": "6cd6e144f989b92b3379bac3b3de84fd",
}
# If an id has several image files, the first suffix in this order wins.
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True, eq=False)
class Annotation:
    """One image and its n objects.

    Attributes:
        image_id: The line of the split file, and the name of the XML file without its suffix.
        path: The image file.
        width: In pixels, of the image turned upright by its EXIF orientation; 0 = neither <size>
            nor an image says, where none is needed.
        height: In pixels, likewise.
        boxes: (n, 4) float64, pixel edges x1, y1, x2, y2; as read, not clipped to the image.
        labels: (n,) int64, 0..K-1, positions in the split's class names.
        difficult: (n,) bool, objects that the evaluation ignores.
    """

    image_id: str
    path: Path
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray


@dataclass
class VOCSplit:
    """The annotations of a split, in the order of the split file.

    Attributes:
        name: The split's name; several names are joined by "+".
        class_names: K names; label k is class_names[k].
        annotations: One per image, including images without objects.
        dropped: Number of boxes without area, which were left out.
        max_pixels: An image with more is refused.
    """

    name: str
    class_names: tuple[str, ...]
    annotations: list[Annotation]
    dropped: int
    max_pixels: int = MAX_PIXELS

    def __len__(self) -> int:
        return len(self.annotations)

    def first(self, count: int) -> "VOCSplit":
        """The first images, at most so many."""
        return replace(self, annotations=self.annotations[:count])


def read_split(
    root: Path,
    split: str,
    class_names: Sequence[str] | None = None,
    *,
    need_images: bool = True,
) -> VOCSplit:
    """Reads one split of a tree in the devkit's layout.

    Boxes with xmax <= xmin or ymax <= ymin have no area: they are dropped, with a single warning.

    Args:
        root: The folder that holds Annotations/, ImageSets/ and JPEGImages/.
        split: Name of a file in ImageSets/Main, without ".txt".
        class_names: The classes, in the order of the labels; None or empty: the sorted classes of
            all objects in the split.
        need_images: Whether every id must have an image file. If not, `Annotation.path` may name a
            file that does not exist.

    Raises:
        UserError: Something is missing or malformed; the message names the file.
    """
    root = Path(root)
    _check_tree(root, need_images)
    xmls = _list_files(root / "Annotations", (".xml",))
    images = _list_files(root / "JPEGImages", _IMAGE_SUFFIXES)
    split_file = _split_file(root, split)
    ids = _read_ids(split_file, xmls)
    faults = Faults()
    records, paths = [], []
    for image_id in ids:
        with faults.noted():
            record = parse_annotation(_find_annotation(root, split_file, image_id, xmls))
            paths.append(_find_image(root, image_id, record, images, xmls, need_images))
            records.append(record)
    faults.refuse()
    names = _class_list(class_names, records, split_file)
    label_of = {name: k for k, name in enumerate(names)}
    annotations = []
    for image_id, path, record in zip(ids, paths, records, strict=True):
        with faults.noted():
            annotations.append(_annotation(image_id, path, record, label_of, need_images))
    faults.refuse()
    dropped = [text for record in records for text in record.dropped]
    if dropped:
        total = sum(len(record.classes) for record in records)
        warnings.warn(
            f"{split_file}: {len(dropped)} of {total} boxes have no area and were dropped: "
            f"{_shorten(dropped, 3)}",
            stacklevel=2,
        )
    return VOCSplit(split, names, annotations, len(dropped))


def read_dataset(
    names: Sequence[str], root: Path | None, class_names: Sequence[str] | None
) -> VOCSplit:
    """Reads and joins the named splits.

    Args:
        names: `voc_<year>_<split>` for a PASCAL VOC devkit, `shapes_train` and `shapes_test` for
            the drawn shapes, any other name for the split of that name in the tree at `root`.
        root: Folder of the custom tree, or of the devkits; None: devkits under $DETECTRON2_DATASETS
            or ./datasets.
        class_names: Overrides the class list; None or empty: VOC_CLASSES, SHAPES_CLASSES, or for a
            custom tree the sorted classes of all objects in the named splits.

    Raises:
        UserError: As `read_split`; there are no names; a custom name without root; an image id
            occurs twice; the splits have different class lists.
    """
    if not names:
        raise UserError("no data set is named: name at least one split")
    root = Path(root).expanduser() if root else None
    splits: list[VOCSplit] = []
    fixed_lists: set[tuple[str, ...]] = set()
    for name in names:
        folder, split_name, fixed_classes = _locate(name, root)
        splits.append(read_split(folder, split_name, class_names or fixed_classes))
        if fixed_classes and not class_names:
            fixed_lists.add(fixed_classes)
    all_classes = tuple(sorted({c for split in splits for c in split.class_names}))
    joined = tuple(class_names) if class_names else next(iter(fixed_lists), all_classes)
    for name, split in zip(names, splits, strict=True):
        if fixed_lists and split.class_names != joined:
            raise UserError(
                f"data sets {' and '.join(names)} have different classes ({name}: "
                f"{', '.join(split.class_names)}): use one of them, or set DATASETS.CLASSES"
            )
    annotations = [a for split in splits for a in _relabel(split, joined)]
    _check_unique([a.image_id for a in annotations], f"data sets {' + '.join(names)}")
    return VOCSplit("+".join(names), joined, annotations, sum(s.dropped for s in splits))


def find_devkit(root: Path, year: int) -> Path:
    """The folder of one VOC year: root/VOC<year>, root/VOCdevkit/VOC<year>, or root itself.

    Raises:
        UserError: None of them exists; the message says where to get the data.
    """
    root, name = Path(root), f"VOC{year}"
    candidates = [root / name, root / "VOCdevkit" / name]
    if root.absolute().name == name:
        candidates.insert(0, root)
    for candidate in candidates:
        if (candidate / "Annotations").is_dir():
            return candidate
    raise UserError(
        f"{root}: no {name} here; point DATASETS.ROOT or the environment variable "
        f"DETECTRON2_DATASETS to the folder that holds {name}/ or VOCdevkit/{name}/\n"
        + _expected_tree(name)
    )


def _locate(name: str, root: Path | None) -> tuple[Path, str, tuple[str, ...] | None]:
    """Folder, split name and fixed class list (None for a custom tree) of a named data set."""
    if match := re.fullmatch(r"voc_(\d{4})_(\w+)", name):
        devkits = root or Path(os.environ.get("DETECTRON2_DATASETS") or "datasets").expanduser()
        return find_devkit(devkits, int(match[1])), match[2], VOC_CLASSES
    if name in ("shapes_train", "shapes_test"):
        return ensure_shapes(), name.removeprefix("shapes_"), SHAPES_CLASSES
    if root is None:
        raise UserError(
            f"data set {name!r}: set DATASETS.ROOT to the folder that holds its Annotations/, "
            "ImageSets/ and JPEGImages/"
        )
    return root, name, None


def _relabel(split: VOCSplit, class_names: tuple[str, ...]) -> list[Annotation]:
    """The split's annotations with labels for another class list that has all of its classes."""
    if split.class_names == class_names:
        return split.annotations
    table = np.array([class_names.index(name) for name in split.class_names], dtype=np.int64)
    return [replace(a, labels=table[a.labels]) for a in split.annotations]


def _expected_tree(name: str) -> str:
    lines = [
        "expected:",
        f"  {name}/Annotations/<id>.xml",
        f"  {name}/ImageSets/Main/<split>.txt",
        f"  {name}/JPEGImages/<id>.jpg",
        "PASCAL VOC's official archives (unpack all in one folder with `tar xf`):",
    ]
    lines += [f"  {_SERVER}/{address}  md5 {md5}" for address, md5 in _ARCHIVES.items()]
    return "\n".join(lines)


def _check_tree(root: Path, need_images: bool) -> None:
    folders = ["Annotations", "ImageSets/Main"] + ["JPEGImages"] * need_images
    for folder in folders:
        if not (root / folder).is_dir():
            raise UserError(f"{root}: no folder {folder} here\n{_expected_tree(root.name)}")


def _list_files(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """Files by their stem, from one directory listing: over NFS a stat for every id is slow."""
    files_by_stem: dict[str, Path] = {}
    files = folder.iterdir() if folder.is_dir() else ()
    # Sorted, so that of several files with the same stem the first suffix wins on every machine.
    ranked = sorted(
        (suffixes.index(suffix), f.name, f)
        for f in files
        if (suffix := f.suffix.lower()) in suffixes
    )
    for _, _, file in ranked:
        files_by_stem.setdefault(file.stem, file)
    return files_by_stem


def _find_annotation(root: Path, split_file: Path, image_id: str, xmls: dict[str, Path]) -> Path:
    """Annotations/<id>.xml; an id may name a folder below, as in ImageNet VID."""
    if image_id in xmls:
        return xmls[image_id]
    path = root / "Annotations" / f"{image_id}.xml"
    if "/" in image_id and ".." not in image_id.split("/") and path.is_file():
        return path
    stem, dot, ending = image_id.rpartition(".")
    if dot and stem in xmls:
        raise UserError(
            f"{split_file}: id {image_id!r} has an ending, and ids have none: write {stem!r} "
            f"instead of it, in all lines with .{ending}"
        )
    raise UserError(
        f"{split_file}: id {image_id!r} has no annotation {path}: add the file or remove the line"
    )


def _find_image(
    root: Path,
    image_id: str,
    record: Record,
    images: dict[str, Path],
    xmls: Container[str],
    need_images: bool,
) -> Path:
    """JPEGImages/<id>.*, or else the file named by the XML's <filename>, if it is no other id's."""
    usual = root / "JPEGImages" / f"{image_id}.jpg"
    if "/" in image_id:
        for suffix in _IMAGE_SUFFIXES:
            if (path := usual.with_suffix(suffix)).is_file():
                return path
    # <filename> may be a path on the annotator's machine, even a Windows path, or have no suffix.
    name = re.split(r"[\\/]", record.filename.strip())[-1]
    for stem in (image_id, name, name.rpartition(".")[0]):
        if stem in images and (stem == image_id or stem not in xmls):
            return images[stem]
    if need_images:
        raise UserError(
            f"{record.xml}: image {usual} is missing (also .jpeg and .png, and <filename> "
            f"{record.filename!r}): add it or remove the id from the split"
        )
    return usual


def _annotation(
    image_id: str, path: Path, record: Record, label_of: dict[str, int], need_images: bool
) -> Annotation:
    size = record.size
    if size is None and (need_images or path.is_file()):
        try:
            size = upright_size(path)
        except UserError as error:
            raise UserError(f"{record.xml}: no <size>, and {error}; or add <size>") from None
    width, height = size or (0, 0)
    return Annotation(
        image_id,
        path,
        width,
        height,
        boxes=np.array(record.boxes, dtype=np.float64).reshape(-1, 4),
        labels=np.array([label_of[name] for name in record.labelled], dtype=np.int64),
        difficult=np.array(record.difficult, dtype=bool),
    )


def _class_list(
    class_names: Sequence[str] | None, records: Sequence[Record], split_file: Path
) -> tuple[str, ...]:
    """The configured classes, checked against the files; without any, those in the files."""
    annotated = {name for record in records for name in record.classes}
    if not class_names:
        if not annotated:
            raise UserError(
                f"{split_file}: none of its annotations has an object: set DATASETS.CLASSES"
            )
        return tuple(sorted(annotated))
    names = tuple(class_names)
    if len(set(names)) < len(names):
        raise UserError(f"the class list (DATASETS.CLASSES) has a name twice: {', '.join(names)}")
    if not annotated <= set(names):
        xml, name = next((r.xml, n) for r in records for n in r.classes if n not in names)
        close = difflib.get_close_matches(name, names, n=1)
        guess = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(
            f"{xml}: class {name!r} is not in the class list ({', '.join(names)}): {guess}"
            "correct the annotation or add the class (DATASETS.CLASSES; register_voc's class_names)"
        )
    return names


def _split_file(root: Path, split: str) -> Path:
    path = root / "ImageSets" / "Main" / f"{split}.txt"
    if not path.is_file():
        # Names with "_" last: a devkit has 60 files for single classes, such as cat_train.
        splits = sorted((p.stem for p in path.parent.glob("*.txt")), key=lambda s: ("_" in s, s))
        raise UserError(f"{path}: no such split; there is: {_shorten(splits, 8) or 'none'}")
    return path


def _read_ids(path: Path, known: Container[str]) -> list[str]:
    """The image ids of a split file. A second column, as in cat_train.txt, is ignored."""
    raw = path.read_bytes()
    # PowerShell's > writes UTF-16.
    is_utf16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        lines = raw.decode("utf-16" if is_utf16 else "utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 ({error}): save it as UTF-8") from None
    # An id may contain a space: a line that is an id as a whole is not split into columns.
    ids = [s if s in known else s.split()[0] for line in lines if (s := line.strip())]
    if not ids:
        raise UserError(f"{path}: the split is empty: write one image id per line")
    _check_unique(ids, str(path))
    return ids


def _shorten(items: Sequence[str], count: int) -> str:
    return ", ".join(items[:count]) + (", ..." if len(items) > count else "")


def _check_unique(ids: Sequence[str], where: str) -> None:
    earlier: set[str] = set()
    for image_id in ids:
        if image_id in earlier:
            raise UserError(f"{where}: image id {image_id!r} occurs twice: remove one of them")
        earlier.add(image_id)
