"""A builder of small devkit trees, valid or broken."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

BCCD = Path(__file__).resolve().parents[3] / "shared" / "data" / "BCCD"


class Tree:
    """A devkit-like tree that a test fills file by file."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
            (root / folder).mkdir(parents=True)

    def split(self, name, ids):
        path = self.root / "ImageSets" / "Main" / f"{name}.txt"
        if isinstance(ids, bytes):
            path.write_bytes(ids)
        else:
            path.write_text("".join(f"{i}\n" for i in ids))
        return path

    def image(self, name, size=(20, 10), mode="RGB", **options):
        pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        path = self.root / "JPEGImages" / name
        Image.fromarray(pixels).convert(mode).save(path, **options)
        return path

    def xml(self, image_id, text):
        path = self.root / "Annotations" / f"{image_id}.xml"
        path.write_bytes(text.encode(errors="surrogateescape"))
        return path

    def add(self, image_id, *objects, size=(20, 10)):
        """Image and annotation; an object is (class, box) or (class, box, difficult)."""
        self.image(f"{image_id}.jpg", size)
        return self.xml(image_id, annotation(*objects, size=size))


def annotation(*objects, size=(20, 10), head=""):
    body = "".join(
        f"<object><name>{name}</name><difficult>{int(bool(rest))}</difficult>{bndbox(*box)}</object>"
        for name, box, *rest in objects
    )
    w, h = size
    return (
        f"<annotation>{head}<size><width>{w}</width><height>{h}</height><depth>3</depth></size>"
        f"{body}</annotation>"
    )


def bndbox(x1, y1, x2, y2):
    return f"<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox>"


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path / "tree")


@pytest.fixture
def new_tree(tmp_path):
    return lambda name: Tree(tmp_path / name)


@pytest.fixture
def write_annotation():
    return annotation


@pytest.fixture(scope="session")
def bccd():
    if not BCCD.is_dir():
        pytest.skip(f"the BCCD photographs are not at {BCCD}")
    return BCCD
