"""Reads VOC's XML files without the devkit's lists of splits, as labelling tools export them.

root/<split>/<id>.xml, <id>.jpg                             Roboflow
root/<split>/pascal/<id>.xml, <split>/images/<id>.jpg       Open Images' converters
root/images/<split>/<id>.xml, <id>.jpg                      TensorFlow's tutorials
root/annotations/<split>/<id>.xml with images/              Kaggle
root/Annotations/<id>.xml with JPEGImages/ or images/       Label Studio, no splits
root/<id>.xml, <id>.jpg                                     labelImg, no splits
"""

import re
from pathlib import Path

from tract_det.data.annotations import Contents, Record
from tract_det.data.faults import Faults
from tract_det.data.files import IMAGE_SUFFIXES, Source, by_stem, folders_in, is_hidden
from tract_det.data.voc_xml import parse_annotation
from tract_det.errors import UserError

EXPECTED = "VOC: XML files of its annotations beside images, or in Annotations/"

# Oxford-IIIT Pet has annotations/xmls.
_ANNOTATIONS = ("Annotations", "annotations", "annotations/xmls", "labels", "xml", "xmls", "pascal")
_IMAGES = ("JPEGImages", "images", "Images", "img")


def find_splits(root: Path) -> dict[str, Source]:
    """Folders of XML files: those of the splits by their names, or one without splits by "".

    Raises:
        UserError: Two of them have the same name.
    """
    if not root.is_dir():
        return {}
    if folder := _xml_folder(root):
        return {"": _source(folder, root)}
    below = [folder for folder in folders_in(root) if not _is_devkit(folder)]
    return _splits_in([root], root) or _splits_in(below, root)


def _splits_in(places: list[Path], root: Path) -> dict[str, Source]:
    """The splits among the folders in some places; a devkit, which has its own, is none."""
    splits: dict[str, Source] = {}
    for split in (split for place in places for split in folders_in(place)):
        folder = _xml_folder(split)
        if folder is None or _is_devkit(split):
            continue
        if split.name in splits:
            raise UserError(
                f"{splits[split.name].where} and {folder} are both the split {split.name!r}: move "
                "one of them away"
            )
        splits[split.name] = _source(folder, split, root)
    return splits


def _is_devkit(folder: Path) -> bool:
    return (folder / "ImageSets" / "Main").is_dir()


def _xml_folder(above: Path) -> Path | None:
    """A folder itself if it has XML files, or that of its annotations."""
    folders = (above, *(above / name for name in _ANNOTATIONS))
    return next((folder for folder in folders if _has_xml(folder)), None)


def _has_xml(folder: Path) -> bool:
    return any(not is_hidden(path) for path in folder.glob("*.[xX][mM][lL]"))


def _source(folder: Path, above: Path, root: Path | None = None) -> Source:
    """Where the images may lie: beside the XML files, or in `root` by the name of their split."""
    beside = [above / name for name in _IMAGES]
    if root is not None:
        beside += [root / name / above.name for name in _IMAGES] + [root / n for n in _IMAGES]
    return Source(folder, (*(path for path in beside if path.is_dir()), folder))


def describe(root: Path, source: Source, *, need_images: bool, upright: bool = True) -> Contents:
    """Id, file and record of every image that has an XML file, sorted by id.

    Images without an XML file are not taken: nobody has looked at them.

    Raises:
        UserError: What is wrong with all files at once.
    """
    xmls = by_stem(source.where.iterdir(), (".xml",))
    images: dict[str, Path] = {}
    for folder in source.folders:
        for stem, path in by_stem(folder.iterdir(), IMAGE_SUFFIXES).items():
            images.setdefault(stem, path)
    faults = Faults()
    described = []
    for image_id, xml in sorted(xmls.items()):
        with faults.noted():
            record = parse_annotation(xml)
            described.append((image_id, _find(image_id, record, images, xmls, need_images), record))
    faults.refuse()
    return Contents(described)


def _find(
    image_id: str,
    record: Record,
    images: dict[str, Path],
    xmls: dict[str, Path],
    need_images: bool,
) -> Path:
    """The image of the XML's name, or else that of its <filename>, if it is no other XML's."""
    name = re.split(r"[\\/]", record.filename.strip())[-1]
    for stem in (image_id, name.rpartition(".")[0] or name):
        if stem in images and (stem == image_id or stem not in xmls):
            return images[stem]
    xml = Path(record.source)
    if need_images:
        raise UserError(
            f"{xml}: no image {image_id}.* or <filename> {record.filename!r} beside it or in "
            f"{', '.join(_IMAGES)}: add it, or remove the XML file"
        )
    return xml.with_name(f"{image_id}.jpg")
