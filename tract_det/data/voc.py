"""Reads data sets in the layout of the PASCAL VOC devkit.

    root/Annotations/<id>.xml
    root/ImageSets/Main/<split>.txt     one image id per line
    root/JPEGImages/<id>.jpg            or .jpeg, .png, .webp, .bmp, .tif, .tiff, .npy

In the files a box is (xmin, ymin, xmax, ymax) in 1-based pixels, the last one included. Here it is
(xmin - 1, ymin - 1, xmax, ymax), the edges of its pixels counted from 0, so that a width is a
difference. VOC2012 has a few fractional coordinates; they are kept.

Format: "The PASCAL Visual Object Classes Challenge 2012 Development Kit", sections 6 and 8.3.
"""

import codecs
import re
from collections.abc import Container, Sequence
from dataclasses import replace
from pathlib import Path

from tract_det.data.annotations import DetectionSplit, Record, build_split, check_unique, shorten
from tract_det.data.faults import Faults
from tract_det.data.files import IMAGE_SUFFIXES, by_stem, is_below, is_file, is_hidden
from tract_det.data.voc_xml import parse_annotation
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

# The devkit's folders, and what they are called in trees that are made by hand.
_ANNOTATIONS = ("Annotations", "annotations")
_IMAGES = ("JPEGImages", "images", "Images")

# The official archives: path on the server, and md5.
_SERVER = "https://thor.robots.ox.ac.uk/pascal/VOC"
_ARCHIVES = {
    "voc2007/VOCtrainval_06-Nov-2007.tar": "c52e279531787c972589f7e41ab4ae64",
    "voc2007/VOCtest_06-Nov-2007.tar": "b6e924de25625d8de591ea690078ad9f",
    "voc2012/VOCtrainval_11-May-2012.tar": "6cd6e144f989b92b3379bac3b3de84fd",
}


def read_split(
    root: Path,
    split: str,
    class_names: Sequence[str] | None = None,
    *,
    need_images: bool = True,
    upright: bool = True,
) -> DetectionSplit:
    """Reads one split of a tree in the devkit's layout.

    Boxes of a single pixel (xmax = xmin and ymax = ymin) or less are dropped, with a warning.

    Args:
        root: The folder that holds Annotations/, ImageSets/ and JPEGImages/.
        split: Name of a file in ImageSets/Main, without ".txt".
        class_names: The classes, in the order of the labels; None or empty: the sorted classes of
            all objects in the split.
        need_images: Whether every id must have an image file. If not, `Annotation.path` may name a
            file that does not exist.
        upright: As in `build_split`.

    Raises:
        UserError: Something is missing or malformed; the message names the file.
    """
    root = Path(root)
    check_tree(root, need_images)
    annotations = _folder(root, _ANNOTATIONS)
    xmls = _list_files(annotations, (".xml",))
    folder = _folder(root, _IMAGES)
    images = _list_files(folder, IMAGE_SUFFIXES)
    split_file = _split_file(root, split)
    ids = _read_ids(split_file, annotations, xmls)
    faults = Faults()
    described = []
    for image_id in ids:
        with faults.noted():
            record = parse_annotation(_find_annotation(annotations, split_file, image_id, xmls))
            path = _find_image(folder, image_id, record, images, xmls, need_images)
            described.append((image_id, path, record))
    faults.refuse()
    data = build_split(
        split, split_file, described, class_names, need_images=need_images, upright=upright
    )
    return replace(data, origin=f"VOC, {split_file}")


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


def is_tree(root: Path) -> bool:
    """Whether a folder has a devkit's layout, as far as its splits go."""
    return _folder(root, _ANNOTATIONS).is_dir() and (root / "ImageSets" / "Main").is_dir()


def is_begun(root: Path) -> bool:
    """Whether a folder has a part of a devkit's layout."""
    return any((root / name).is_dir() for name in ("Annotations", "ImageSets", "JPEGImages"))


def split_names(root: Path) -> list[str]:
    """Names of the lists in ImageSets/Main, but for those of single classes (cat_train)."""
    files = (root / "ImageSets" / "Main").glob("*.txt")
    lists = sorted((path.stem, path) for path in files if not is_hidden(path))
    stems = [stem for stem, _ in lists]
    ends = tuple(f"_{stem}" for stem in stems)
    of_classes = {
        stem
        for stem, path in lists
        if re.fullmatch(r".+_(train|val|trainval|test)", stem)
        or (
            stem.endswith(ends)  # CVAT's cat_default
            and re.match(rb"\s*\S+\s+-?[01]\s", path.read_bytes())
        )
    }
    return [stem for stem in stems if stem not in of_classes] or stems


def _folder(root: Path, names: tuple[str, ...]) -> Path:
    """The first folder of these names that is there, or else the devkit's."""
    return next((root / name for name in names if (root / name).is_dir()), root / names[0])


def check_tree(root: Path, need_images: bool = True) -> None:
    """Refuses a folder without a devkit's layout.

    Raises:
        UserError: Names the folder that is missing, and shows the layout.
    """
    folders = [_ANNOTATIONS, ("ImageSets/Main",)] + [_IMAGES] * need_images
    for names in folders:
        if not _folder(root, names).is_dir():
            raise UserError(f"{root}: no folder {names[0]} here\n{_expected_tree(root.name)}")


def _list_files(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Files by their stem, from one directory listing: over NFS a stat for every id is slow."""
    return by_stem(folder.iterdir(), suffixes) if folder.is_dir() else {}


def _find_annotation(
    annotations: Path, split_file: Path, image_id: str, xmls: dict[str, Path]
) -> Path:
    """Annotations/<id>.xml; an id may name a folder below, as in ImageNet VID."""
    if image_id in xmls:
        return xmls[image_id]
    path = annotations / f"{image_id}.xml"
    if "/" in image_id and is_below(image_id) and is_file(path):
        return path
    stem, dot, ending = image_id.rpartition(".")
    if dot and stem in xmls:
        raise UserError(
            f"{split_file}: id {image_id!r} has an ending, and ids have none: write {stem!r} "
            f"instead of it, in all lines with .{ending}"
        )
    name = re.split(r"[\\/]", image_id)[-1]
    for stem in (name, name.rpartition(".")[0]):
        if stem in xmls:
            raise UserError(
                f"{split_file}: id {image_id!r:.200} is a path, and ids are names without folder "
                f"and ending: write {stem!r} instead of it, and likewise in all lines"
            )
    raise UserError(
        f"{split_file}: id {image_id!r:.200} has no annotation {annotations}/{image_id:.200}.xml: "
        "add the file or remove the line"
    )


def _find_image(
    folder: Path,
    image_id: str,
    record: Record,
    images: dict[str, Path],
    xmls: Container[str],
    need_images: bool,
) -> Path:
    """JPEGImages/<id>.*, or else the file named by the XML's <filename>, if it is no other id's."""
    usual = folder / f"{image_id}.jpg"
    if "/" in image_id:
        for suffix in IMAGE_SUFFIXES:
            if is_file(path := usual.with_suffix(suffix)):
                return path
    # <filename> may be a path on the annotator's machine, even a Windows path, or have no suffix.
    name = re.split(r"[\\/]", record.filename.strip())[-1]
    for stem in (image_id, name, name.rpartition(".")[0]):
        if stem in images and (stem == image_id or stem not in xmls):
            return images[stem]
    if need_images:
        raise UserError(
            f"{record.source}: image {usual} is missing (also {', '.join(IMAGE_SUFFIXES[1:])}, and "
            f"<filename> {record.filename!r}): add it or remove the id from the split"
        )
    return usual


def _split_file(root: Path, split: str) -> Path:
    path = root / "ImageSets" / "Main" / f"{split}.txt"
    if not is_file(path):
        # Names with "_" last: a devkit has 60 files for single classes, such as cat_train.
        splits = sorted((p.stem for p in path.parent.glob("*.txt")), key=lambda s: ("_" in s, s))
        raise UserError(f"{path}: no such split; there is: {shorten(splits, 8) or 'none'}")
    return path


def _read_ids(path: Path, annotations: Path, known: Container[str]) -> list[str]:
    """The image ids of a split file. A second column, as in cat_train.txt, is ignored."""
    raw = path.read_bytes()
    # PowerShell's > writes UTF-16.
    is_utf16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        lines = raw.decode("utf-16" if is_utf16 else "utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 ({error}): save it as UTF-8") from None

    # An id may contain a space: a line that is an id as a whole is not split into columns. CVAT
    # writes such ids in quotes.
    def first_column(line: str) -> str:
        if line in known:
            return line
        if "/" in line and is_below(line) and is_file(annotations / f"{line}.xml"):
            return line
        quoted = re.match(r'"(.+)"(\s|$)', line)
        return quoted[1] if quoted else line.split(maxsplit=1)[0]

    ids = [first_column(stripped) for line in lines if (stripped := line.strip())]
    if not ids:
        raise UserError(f"{path}: the split is empty: write one image id per line")
    check_unique(ids, str(path))
    return ids
