"""Reads VOC's XML files without the devkit's lists of splits, as labelling tools export them.

root/<split>/<id>.xml, <id>.jpg                     Roboflow
root/Annotations/<id>.xml with JPEGImages/ or images/   no splits
root/<id>.xml, <id>.jpg                             labelImg, no splits
"""

import re
from pathlib import Path

from tract_det.data.annotations import Record
from tract_det.data.faults import Faults
from tract_det.data.files import IMAGE_SUFFIXES, Source, by_stem, is_hidden
from tract_det.data.voc_xml import parse_annotation
from tract_det.errors import UserError

EXPECTED = "VOC: XML files of its annotations beside images, or in Annotations/"

_ANNOTATIONS = ("Annotations", "annotations", "labels", "xml")
_IMAGES = ("JPEGImages", "images", "Images", "img")


def find_splits(root: Path) -> dict[str, Source]:
    """Folders of XML files: those of the splits by their names, or one without splits by ""."""
    if not root.is_dir():
        return {}
    for folder in (root, *(root / name for name in _ANNOTATIONS)):
        if _has_xml(folder):
            return {"": _source(folder, root)}
    splits = {}
    for split in sorted(path for path in root.iterdir() if path.is_dir()):
        for folder in (split, *(split / name for name in _ANNOTATIONS)):
            if _has_xml(folder):
                splits[split.name] = _source(folder, split)
                break
    return splits


def _has_xml(folder: Path) -> bool:
    return any(not is_hidden(path) for path in folder.glob("*.[xX][mM][lL]"))


def _source(folder: Path, above: Path) -> Source:
    beside = tuple(above / name for name in _IMAGES if (above / name).is_dir())
    return Source(folder, (*beside, folder))


def describe(
    root: Path, source: Source, *, need_images: bool, upright: bool = True
) -> list[tuple[str, Path, Record]]:
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
    return described


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
