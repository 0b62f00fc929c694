"""Image folders: splits, labels, decoding and error messages."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data.image_folder import ALL, COUNTS, folder, ids, photo
from tract_det.data import images as decoding
from tract_det.data.classification import (
    ClassificationDataset,
    ClassificationSplit,
    _spread,
    read_classification,
)
from tract_det.data.images import CorruptImageError, read_rgb
from tract_det.errors import UserError


def read(root, train=True, **options):
    return read_classification("imagefolder", root, train=train, **options)


@pytest.fixture
def root(tmp_path):
    folder(tmp_path, "train")
    return folder(tmp_path, "val", {"cat": 1, "dog": 2, "eel": 1}, seed=50)


def test_classes_are_the_sorted_folder_names_and_labels_index_them(root):
    split = read(root)
    assert split.class_names == ("cat", "dog", "eel")
    assert split.labels.dtype == np.int64
    names = [split.class_names[label] for label in split.labels]
    assert [Path(i).parent.name for i in ids(split)] == names
    assert ids(split) == ALL


@pytest.mark.parametrize("part", ["val", "test"])
def test_evaluation_reads_val_or_test(root, part):
    (root / "val").rename(root / part)
    assert ids(read(root, train=False)) == [
        f"{part}/cat/000.jpg",
        f"{part}/dog/000.jpg",
        f"{part}/dog/001.jpg",
        f"{part}/eel/000.jpg",
    ]


@pytest.mark.parametrize("where", [".", "../x", "absolute"])
def test_the_root_may_be_written_in_any_way(root, where, monkeypatch, tmp_path):
    (tmp_path / "x").mkdir(exist_ok=True)
    monkeypatch.chdir(root)
    path = {".": ".", "../x": f"x/../../{root.name}", "absolute": root}[where]
    split = read(path, train=False)
    assert ids(split)[0] == "val/cat/000.jpg"
    assert split.read(0).shape == (3, 10, 20)


def test_images_are_found_in_any_letter_case_and_other_files_are_not_images(root):
    photo(0).save(root / "train" / "cat" / "zebra.JPEG", "JPEG")
    photo(0).save(root / "train" / "cat" / "zoo.png")
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    assert [Path(i).name for i in ids(read(root)) if "/z" in i] == ["zebra.JPEG", "zoo.png"]


@pytest.mark.parametrize("share", [0.1, 0.34, 0.9])
def test_holding_out_partitions_every_class_in_proportion(root, share):
    (root / "val").rename(root / "unused")
    train, test = (read(root, train=t, holdout=share) for t in (True, False))
    assert sorted(ids(train) + ids(test)) == ALL
    for k, count in enumerate(COUNTS.values()):
        expected = min(max(1, round(share * count)), count - 1)
        assert (test.labels == k).sum() == expected
    assert train.class_names == test.class_names == ("cat", "dog", "eel")


def test_what_is_held_out_depends_on_the_seed_alone(root):
    (root / "val").rename(root / "unused")
    first, same_seed, other_seed = (
        ids(read(root, train=False, holdout=0.4, seed=s)) for s in (1, 1, 2)
    )
    assert first == same_seed != other_seed


def test_a_class_of_one_image_cannot_be_held_out(root):
    (root / "val").rename(root / "unused")
    for extra in sorted((root / "train" / "dog").iterdir())[1:]:
        extra.unlink()
    with pytest.raises(UserError, match=r"train/dog: one image"):
        read(root, holdout=0.1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(1, 50))
def test_a_limit_takes_the_first_images_spread_evenly(labels, limit):
    labels = np.array(labels)
    split = ClassificationSplit("", (), labels, np.arange(len(labels)), Path())
    positions = _spread(labels, limit)
    taken = split.subset(positions)
    assert len(taken) == min(limit, len(labels))
    assert (np.diff(positions) > 0).all()
    counts = {k: int((taken.labels == k).sum()) for k in set(labels.tolist())}
    for k, count in counts.items():
        assert positions[taken.labels == k].tolist() == np.flatnonzero(labels == k)[:count].tolist()
        exhausted = count == (labels == k).sum()
        assert exhausted or count >= max(counts.values()) - 1


def test_the_training_images_are_needed_for_training_alone(root):
    (root / "train").rename(root / "x")
    with pytest.raises(UserError, match="no folder train here; expected train/"):
        read(root)
    assert len(read(root, train=False)) == 4


def test_a_limit_is_for_training_alone(root):
    assert ids(read(root, limit=4)) == [
        "train/cat/000.jpg",
        "train/cat/001.jpg",
        "train/dog/000.jpg",
        "train/eel/000.jpg",
    ]
    assert len(read(root, train=False, limit=1)) == 4


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (lambda r: (r / "val").rename(r / "x"), {}, "no folder val or test.*DATASETS.HOLDOUT"),
        (lambda r: None, {"holdout": 0.1}, "val is there.*DATASETS.HOLDOUT"),
        (lambda r: (r / "train/dog").rename(r / "train/fox"), {}, "val: no folder for fox"),
        (lambda r: (r / "val/dog").rename(r / "x"), {}, "val: no folder for dog, which train has"),
        (lambda r: (r / "val/ant").mkdir(), {}, "train: no folder for ant, which val has"),
    ],
)
def test_a_wrong_layout_is_named(root, train, damage, options, message):
    damage(root)
    with pytest.raises(UserError, match=message) as caught:
        read(root, train=train, **options)
    assert "\n" not in str(caught.value)


def test_an_empty_class_is_named(root):
    (root / "train/ant").mkdir()
    (root / "val/ant").mkdir()
    with pytest.raises(UserError, match="train/ant: no images here"):
        read(root)


def test_empty_and_missing_folders_are_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no such folder.*DATASETS\.ROOT"):
        read(tmp_path / "nowhere")
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
    with pytest.raises(UserError, match="train: no class folders here"):
        read(tmp_path)


# Decoding.


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [("jpg", mode) for mode in ("RGB", "L", "CMYK")]
    + [("png", mode) for mode in ("RGB", "L", "P", "1", "RGBA", "LA")]
    + [("bmp", mode) for mode in ("RGB", "L", "P", "1")]
    + [("webp", mode) for mode in ("RGB", "RGBA")],
)
def test_every_kind_of_image_becomes_rgb(tmp_path, suffix, mode):
    path = tmp_path / f"a.{suffix}"
    transparent = {"transparency": 0} if (suffix, mode) == ("png", "P") else {}
    photo(3, mode=mode).save(path, **transparent)
    with Image.open(path) as file:
        expected = np.array(file.convert("RGB")).transpose(2, 0, 1)
    image = read_rgb(path)
    assert image.dtype == torch.uint8
    assert np.abs(image.numpy().astype(int) - expected).max() <= 2


def test_arrays_are_images_but_not_beside_a_picture_of_their_name(root):
    pixels = np.random.default_rng(0).integers(0, 256, (10, 20, 3), dtype=np.uint8)
    np.save(root / "train/cat/000.npy", pixels)  # as Ultralytics leaves its caches
    np.save(root / "train/cat/new.npy", pixels)
    split = read(root)
    assert ids(split) == sorted([*ALL, "train/cat/new.npy"])
    image = split.read(ids(split).index("train/cat/new.npy"))
    assert np.array_equal(image.permute(1, 2, 0), pixels)


def test_a_split_reads_the_channels_that_it_is_told_and_refuses_others(root):
    pixels = np.random.default_rng(0).integers(0, 256, (10, 20, 5), dtype=np.uint8)
    np.save(root / "train/cat/a.npy", pixels)
    Image.fromarray(pixels[..., :4]).save(root / "train/cat/b.tif")
    split = read(root)
    place = ids(split).index
    for name, count in (("a.npy", 5), ("b.tif", 4)):
        index = place(f"train/cat/{name}")
        image = replace(split, channels=count).read(index)
        assert np.array_equal(image.permute(1, 2, 0), pixels[..., :count])
        with pytest.raises(CorruptImageError, match=rf"{name}: the image has {count} channels"):
            replace(split, channels=2).read(index)


def test_exif_rotation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(0).save(tmp_path / "a.jpg", exif=exif.tobytes())
    assert read_rgb(tmp_path / "a.jpg").shape == (3, 10, 20)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


CORRUPTIONS = {
    "cut": cut,
    "empty": lambda path: path.write_bytes(b""),
    "html": lambda path: path.write_bytes(b"<html>not found</html>"),
}


@pytest.mark.parametrize("damage", CORRUPTIONS.values(), ids=CORRUPTIONS)
@pytest.mark.parametrize("decoder", ["torchvision", "pillow"])
def test_a_corrupt_image_is_named(root, damage, decoder, monkeypatch):
    if decoder == "pillow":
        monkeypatch.setattr(decoding, "decode_jpeg", None)
    damage(root / "train/cat/001.jpg")
    with pytest.raises(CorruptImageError, match=r"train/cat/001\.jpg: the image cannot be read"):
        ClassificationDataset(read(root))[1]


def test_a_file_that_is_gone_is_an_error_also_where_corrupt_ones_are_skipped(root):
    dataset = ClassificationDataset(read(root), skip_corrupt=True)
    (root / "train/cat/001.jpg").unlink()
    with pytest.raises(UserError, match=r"train/cat/001\.jpg") as caught:
        dataset[1]
    assert not isinstance(caught.value, CorruptImageError)


def test_another_image_takes_the_place_of_a_corrupt_one_and_says_so(root):
    cut(root / "train/cat/001.jpg")
    split = read(root)
    dataset = ClassificationDataset(split, skip_corrupt=True)
    replacements = []
    for seed in (0, 0, 1, 2, 3):
        torch.manual_seed(seed)
        image, target = dataset[1]
        assert target["skipped"] == ("train/cat/001.jpg",) * len(target["skipped"])
        index = ids(split).index(target["image_id"])
        assert target["label"] == split.labels[index]
        assert torch.equal(image, split.read(index))
        replacements.append(target["image_id"])
    assert replacements[0] == replacements[1]
    assert len(set(replacements)) > 1
    assert "skipped" not in dataset[0][1]


def test_nothing_but_corrupt_images_is_an_error(root):
    for path in (root / "train").rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"train/cat/000\.jpg.*others.*are corrupt"):
        ClassificationDataset(read(root), skip_corrupt=True)[0]


def test_a_transform_that_refuses_an_image_names_it(root):
    def refuse(image):
        raise UserError("too small")

    with pytest.raises(UserError, match=r"train/dog/000\.jpg: too small"):
        ClassificationDataset(read(root), refuse)[5]


def test_a_cache_keeps_what_fits_and_changes_no_pixel(root, monkeypatch):
    split = read(root)
    plain = ClassificationDataset(split)
    cached = ClassificationDataset(split, cache=1)
    cached._cache_bytes_left = 3 * 600 + 1  # three images of 20 x 10 x 3 bytes
    for _ in range(2):
        for i in range(len(split)):
            assert torch.equal(plain[i][0], cached[i][0])
    reads = []
    monkeypatch.setattr(
        ClassificationSplit, "read", lambda self, i: reads.append(i) or torch.zeros(3, 10, 20)
    )
    for i in range(len(split)):
        cached[i]
    assert reads == list(range(3, len(split)))
