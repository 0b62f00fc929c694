"""Writes trees in VOC layout: completely, or not at all."""

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image


class TreeObject(NamedTuple):
    """One annotated object.

    Attributes:
        name: Its class.
        box: xmin, ymin, xmax, ymax in pixels as in a devkit: 1-based, the last pixel included.
        truncated: Whether the image's border cuts part of it off.
        difficult: Whether the evaluation ignores it.
    """

    name: str
    box: tuple[int, int, int, int]
    truncated: bool = False
    difficult: bool = False


@contextmanager
def new_tree(root: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `root` if the block ends without an exception.

    Several processes that write the same tree may do so at once: the first one's stays.

    Raises:
        OSError: The folder cannot be written. As after any exception, nothing is left of it.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
            (temporary / folder).mkdir(parents=True)
        yield temporary
        temporary.chmod(0o755)  # mkdtemp's folder is readable by its owner only
        try:
            temporary.rename(root)
        except OSError:
            if not root.is_dir():  # otherwise another process has put the same tree there
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def add_image(
    tree: Path,
    file_name: str,
    pixels: np.ndarray,
    objects: Iterable[TreeObject],
    *,
    source: str,
    **saving: Any,
) -> None:
    """Writes an image and its annotation.

    Args:
        tree: The folder of the tree.
        file_name: The image id with a suffix that says the format.
        pixels: (H, W, 3) uint8 RGB.
        objects: Those in the image.
        source: The annotation's <folder>, in a devkit the name of the data set.
        saving: Arguments of `PIL.Image.Image.save`.
    """
    Image.fromarray(pixels).save(tree / "JPEGImages" / file_name, **saving)
    xml = _annotation(file_name, pixels.shape, objects, source)
    (tree / "Annotations" / Path(file_name).with_suffix(".xml")).write_text(xml)


def add_split(tree: Path, split: str, ids: Sequence[str]) -> None:
    """Writes the list of a split's image ids."""
    lines = "".join(f"{image_id}\n" for image_id in ids)
    (tree / "ImageSets" / "Main" / f"{split}.txt").write_text(lines)


def _annotation(
    file_name: str, shape: tuple[int, ...], objects: Iterable[TreeObject], source: str
) -> str:
    text = "".join(
        f"""\
  <object>
    <name>{o.name}</name>
    <pose>Unspecified</pose>
    <truncated>{int(o.truncated)}</truncated>
    <difficult>{int(o.difficult)}</difficult>
    <bndbox>
      <xmin>{o.box[0]}</xmin><ymin>{o.box[1]}</ymin><xmax>{o.box[2]}</xmax><ymax>{o.box[3]}</ymax>
    </bndbox>
  </object>
"""
        for o in objects
    )
    return f"""\
<annotation>
  <folder>{source}</folder>
  <filename>{file_name}</filename>
  <size><width>{shape[1]}</width><height>{shape[0]}</height><depth>3</depth></size>
{text}</annotation>
"""
