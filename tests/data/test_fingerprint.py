"""A split's fingerprint: equal wherever the images lie, different for whatever is learnt from."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.training.image_folder import write_image_folder
from tract_det.data.annotations import Annotation, DetectionSplit
from tract_det.data.classification import ClassificationSplit, read_classification


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("images"))


def read(root, **options):
    return read_classification("imagefolder", root, train=True, **options)


def test_images_that_were_moved_are_the_same(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "moved")
    assert read(tmp_path / "moved").fingerprint() == read(folder).fingerprint()


def test_a_class_a_name_a_label_a_number_or_a_content_makes_another_split(folder, tmp_path):
    split = read(folder)
    moved = shutil.copytree(folder, tmp_path / "moved")
    first = moved / "train/ant/000.png"
    first.write_bytes(first.read_bytes() + b"x")
    others = [
        split,
        replace(split, class_names=("ant", "bee", "cat", "fox")),
        replace(split, labels=split.labels[::-1]),
        split.subset(np.arange(len(split) - 1)),
        split.subset(np.roll(np.arange(len(split)), 1)),
        replace(split, root=moved),
    ]
    assert len({other.fingerprint() for other in others}) == len(others)


def test_images_in_memory_have_a_fingerprint_too():
    pixels, labels = np.zeros((3, 2, 2, 3), np.uint8), np.arange(3)
    split = ClassificationSplit("", ("a", "b", "c"), labels, labels, Path(), pixels=pixels)
    other = replace(split, pixels=pixels + np.uint8(1))
    assert split.fingerprint() == replace(split, root=Path("x")).fingerprint()
    assert split.fingerprint() != other.fingerprint()


def test_a_box_its_class_or_what_the_evaluation_makes_of_it_makes_another_split(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"pixels")

    def split(x=1.0, label=0, difficult=False, name="a", path=tmp_path / "a.jpg"):
        boxes, labels = np.array([[x, 1.0, 9.0, 9.0]]), np.array([label])
        annotation = Annotation(name, path, 10, 10, boxes, labels, np.array([difficult]))
        return DetectionSplit("", ("cat", "dog"), [annotation], 0)

    shutil.copy(tmp_path / "a.jpg", tmp_path / "moved.jpg")
    assert split(path=tmp_path / "moved.jpg").fingerprint() == split().fingerprint()

    def of_coco(area, crowd):
        (annotation,) = split(difficult=True).annotations
        changes = {"area": np.array([area]), "crowd": np.array([crowd]), "number": 3}
        return replace(split(), annotations=[replace(annotation, **changes)])

    assert of_coco(np.nan, False).fingerprint() == split(difficult=True).fingerprint()
    others = [
        of_coco(9.0, False), of_coco(8.0, False), of_coco(np.nan, True),
        split(), split(x=2.0), split(label=1), split(difficult=True), split(name="b"),
        split(path=tmp_path / "missing.jpg"), replace(split(), annotations=[]),
    ]  # fmt: skip
    assert len({other.fingerprint() for other in others}) == len(others)
