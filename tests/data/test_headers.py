"""Every image's header is looked at once, and again when the file has changed."""

import os
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.training.image_folder import options, write_image_folder
from tract_det.cli import call
from tract_det.data import headers
from tract_det.data.annotations import Annotation
from tract_det.data.bands import ORIENTATION
from tract_det.data.exif import check_headers as check_annotated
from tract_det.data.headers import check_headers, read_headers
from tract_det.data.images import Header
from tract_det.errors import UserError


@pytest.fixture
def images(tmp_path, monkeypatch):
    """Files, a cache of their own, and a list of those that are looked at."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(headers, "_WORTH", 1)
    root = write_image_folder(tmp_path / "images", train=3, val=4)
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*.png"))
    looked_at, read = [], headers.read_header

    def note(path, channels):
        looked_at.append(str(path.relative_to(root)))
        return read(path, channels)

    monkeypatch.setattr(headers, "read_header", note)
    return root, names, looked_at


def test_a_second_start_looks_at_what_has_changed_alone(images):
    root, names, looked_at = images
    check_headers(root, names, 10_000)
    assert sorted(looked_at) == names
    looked_at.clear()
    check_headers(root, names, 10_000)
    assert looked_at == []
    os.utime(root / names[2], ns=(1, 1))
    check_headers(root, names, 10_000)
    assert looked_at == [names[2]]


def test_all_unreadable_files_are_said_at_once_and_again_until_mended(images):
    root, names, looked_at = images
    content = (root / names[0]).read_bytes()
    for name in names[:7]:
        (root / name).write_bytes(b"broken")
    for _ in range(2):
        with pytest.raises(UserError, match=f"{names[0]}.*{names[4]}.*; and 2 more of the kind"):
            check_headers(root, names, 10_000)
    for name in names[:7]:
        (root / name).write_bytes(content)
    looked_at.clear()
    check_headers(root, names, 10_000)
    assert sorted(looked_at) == names[:7]


def test_another_bound_of_the_pixels_holds_for_what_is_remembered(images):
    root, names, looked_at = images
    check_headers(root, names, 10_000)
    looked_at.clear()
    with pytest.raises(UserError, match=r"32 x 32 pixels are more than INPUT\.MAX_PIXELS 100"):
        check_headers(root, names, 100)
    assert looked_at == []


def test_what_is_remembered_is_what_was_read(images):
    root, names, _ = images
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.new("RGB", (5, 3)).save(root / names[1], exif=exif)
    seen = [read_headers(root, names).header(index) for index in range(len(names))]
    again = [read_headers(root, names).header(index) for index in range(len(names))]
    assert seen == again
    assert seen[1] == Header((5, 3), 6)


def test_other_channels_are_looked_at_anew(images):
    root, names, looked_at = images
    read_headers(root, names)
    assert read_headers(root, names, 4).errors.keys() == set(range(len(names)))
    assert not read_headers(root, names).errors
    assert len(looked_at) == 2 * len(names)


def test_a_detector_starts_again_without_a_look_at_the_images(images, monkeypatch):
    root, names, looked_at = images
    none = np.empty((0, 4)), np.empty(0, int), np.empty(0, bool)
    annotations = [Annotation(name, root / name, 32, 32, *none) for name in names]
    check_annotated(annotations)
    looked_at.clear()
    check_annotated(annotations)
    assert looked_at == []
    monkeypatch.chdir(root.parent)
    relative = [replace(a, path=a.path.relative_to(root.parent)) for a in annotations]
    check_annotated(relative)
    with pytest.raises(UserError, match=rf"{names[0]}.*INPUT\.MAX_PIXELS 100"):
        check_annotated(annotations, max_pixels=100)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x93NUMPY\x01\x00"])
def test_a_damaged_cache_is_ignored(images, content):
    root, names, looked_at = images
    cache = headers._cache_file(root)
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content)
    check_headers(root, names, 10_000)
    assert sorted(looked_at) == names


def test_a_cache_that_cannot_be_written_is_ignored(images, tmp_path):
    root, names, looked_at = images
    (tmp_path / "cache").write_text("a file where the folder would be")
    check_headers(root, names, 10_000)
    assert sorted(looked_at) == names


def test_a_classifier_is_refused_before_anything_is_written(tmp_path):
    root = write_image_folder(tmp_path / "images", train=2)
    for name in ("train/ant/000.png", "train/bee/001.png"):
        (root / name).write_bytes(b"broken")
    with pytest.raises(UserError, match=r"ant/000\.png.*bee/001\.png"):
        call("pretrain", options(root, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
