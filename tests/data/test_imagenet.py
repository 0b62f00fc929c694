import pickle
import sys
import types
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import datasets

from tract_det.data import images as decoding
from tract_det.data.imagenet import (
    ClassificationDataset,
    ClassificationSplit,
    _spread,
    read_classification,
)
from tract_det.data.images import CorruptImageError, read_rgb
from tract_det.errors import UserError

COUNTS = {"cat": 5, "dog": 3, "eel": 8}
ALL = [f"train/{name}/{i:03d}.jpg" for name, count in COUNTS.items() for i in range(count)]


def photo(seed, size=(20, 10), mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def folder(root, part, counts=COUNTS, seed=0):
    """Makes root/part/<class>/<number>.jpg."""
    for name, count in counts.items():
        (root / part / name).mkdir(parents=True)
        for i in range(count):
            photo(seed + i).save(root / part / name / f"{i:03d}.jpg")
    return root


def ids(split):
    return [split.image_id(i) for i in range(len(split))]


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
    train, held = (read(root, train=t, holdout=share) for t in (True, False))
    assert sorted(ids(train) + ids(held)) == ALL
    for k, count in enumerate(COUNTS.values()):
        expected = min(max(1, round(share * count)), count - 1)
        assert (held.labels == k).sum() == expected
    assert train.class_names == held.class_names == ("cat", "dog", "eel")


def test_what_is_held_out_depends_on_the_seed_alone(root):
    (root / "val").rename(root / "unused")
    first, again, other = (ids(read(root, train=False, holdout=0.4, seed=s)) for s in (1, 1, 2))
    assert first == again != other


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
    kept = _spread(labels, limit)
    taken = split.subset(kept)
    assert len(taken) == min(limit, len(labels))
    assert (np.diff(kept) > 0).all()
    counts = {k: int((taken.labels == k).sum()) for k in set(labels.tolist())}
    for k, count in counts.items():
        assert kept[taken.labels == k].tolist() == np.flatnonzero(labels == k)[:count].tolist()
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
    ("spoil", "options", "message"),
    [
        (lambda r: (r / "val").rename(r / "x"), {}, "no folder val or test.*DATASETS.HOLDOUT"),
        (lambda r: None, {"holdout": 0.1}, "val is there.*DATASETS.HOLDOUT"),
        (lambda r: None, {"holdout": 1.0}, "HOLDOUT < 1"),
        (lambda r: (r / "train/dog").rename(r / "train/fox"), {}, "val: no folder for fox"),
        (lambda r: (r / "val/dog").rename(r / "x"), {}, "val: no folder for dog, which train has"),
        (lambda r: (r / "val/ant").mkdir(), {}, "train: no folder for ant, which val has"),
    ],
)
def test_a_wrong_layout_is_named(root, train, spoil, options, message):
    spoil(root)
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
    with pytest.raises(UserError, match=r"DATASETS\.NAME is 'voc'.*imagefolder, cifar10"):
        read_classification("voc", tmp_path, train=True)


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
    found = read_rgb(path)
    assert found.dtype == torch.uint8
    assert np.abs(found.numpy().astype(int) - expected).max() <= 2


def test_exif_rotation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(0).save(tmp_path / "a.jpg", exif=exif.tobytes())
    assert read_rgb(tmp_path / "a.jpg").shape == (3, 10, 20)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


SPOILT = {
    "cut": cut,
    "empty": lambda path: path.write_bytes(b""),
    "html": lambda path: path.write_bytes(b"<html>not found</html>"),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
@pytest.mark.parametrize("decoder", ["torchvision", "pillow"])
def test_a_corrupt_image_is_named(root, spoil, decoder, monkeypatch):
    if decoder == "pillow":
        monkeypatch.setattr(decoding, "decode_image", None)
    spoil(root / "train/cat/001.jpg")
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
    found = []
    for seed in (0, 0, 1, 2, 3):
        torch.manual_seed(seed)
        image, target = dataset[1]
        assert target["skipped"] == ("train/cat/001.jpg",) * len(target["skipped"])
        there = ids(split).index(target["image_id"])
        assert target["label"] == split.labels[there]
        assert torch.equal(image, split.read(there))
        found.append(target["image_id"])
    assert found[0] == found[1]
    assert len(set(found)) > 1
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
    cached._room = 3 * 600 + 1  # three images of 20 x 10 x 3 bytes
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


# torchvision's data sets, from files that look like theirs.


def fake_cifar(root, monkeypatch, kind, coarse=False):
    """The files of CIFAR with 4 + 2 images, and their checksums in torchvision's class."""
    base = root / kind.base_folder
    base.mkdir()
    rng = np.random.default_rng(0)

    def write(name, value):
        (base / name).write_bytes(pickle.dumps(value))
        return md5((base / name).read_bytes()).hexdigest()

    label = "fine_labels" if coarse else "labels"

    def batch(n):
        return {"data": rng.integers(0, 256, (n, 3072), dtype=np.uint8), label: list(range(n))}

    key = "fine_label_names" if coarse else "label_names"
    names = {key: [f"class {k}" for k in range(4)]}
    train, test = batch(4), batch(2)
    monkeypatch.setattr(kind, "train_list", [["one", write("one", train)]])
    monkeypatch.setattr(kind, "test_list", [["two", write("two", test)]])
    meta = {"filename": "meta", "key": key, "md5": write("meta", names)}
    monkeypatch.setattr(kind, "meta", meta)
    return train["data"].reshape(4, 3, 32, 32), test["data"].reshape(2, 3, 32, 32)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_comes_through_torchvision(tmp_path, monkeypatch, name):
    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    train, test = fake_cifar(tmp_path, monkeypatch, kind, coarse=name == "cifar100")
    for pixels, is_train in ((train, True), (test, False)):
        split = read_classification(name, tmp_path, train=is_train)
        assert split.class_names == ("class 0", "class 1", "class 2", "class 3")
        assert split.labels.tolist() == list(range(len(pixels)))
        for i in range(len(split)):
            assert np.array_equal(split.read(i).numpy(), pixels[i])
    part = read_classification(name, tmp_path, train=True, limit=2).subset(np.array([1]))
    assert ids(part) == [f"{name} train/1"]
    assert np.array_equal(part.read(0).numpy(), train[1])
    with pytest.raises(UserError, match=r"HOLDOUT.*set it to 0"):
        read_classification(name, tmp_path, train=True, holdout=0.1)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "flowers102"])
def test_missing_data_say_where_they_come_from(tmp_path, name):
    with pytest.raises(UserError, match=rf"no {name} here.*download=True") as caught:
        read_classification(name, tmp_path, train=True)
    assert "\n" not in str(caught.value)


@pytest.fixture
def matlab(monkeypatch):
    """scipy.io.loadmat, of files that hold pickles."""
    module = types.ModuleType("scipy.io")
    module.loadmat = lambda path, squeeze_me: pickle.loads(Path(path).read_bytes())
    package = types.ModuleType("scipy")
    package.io = module
    monkeypatch.setitem(sys.modules, "scipy", package)
    monkeypatch.setitem(sys.modules, "scipy.io", module)


def test_flowers_are_trained_on_train_and_val_and_tested_on_test(tmp_path, monkeypatch, matlab):
    base = tmp_path / "flowers-102"
    (base / "jpg").mkdir(parents=True)
    for i in range(1, 7):
        photo(i).save(base / "jpg" / f"image_{i:05d}.jpg")
    parts = {"trnid": np.array([4, 1]), "valid": np.array([2]), "tstid": np.array([3, 5, 6])}
    (base / "setid.mat").write_bytes(pickle.dumps(parts))
    labels = {"labels": np.array([1, 2, 1, 102, 3, 3])}
    (base / "imagelabels.mat").write_bytes(pickle.dumps(labels))
    monkeypatch.setattr(datasets.Flowers102, "_check_integrity", lambda self: True)
    train, test = (read_classification("flowers102", tmp_path, train=t) for t in (True, False))
    assert len(train.class_names) == 102
    assert [Path(i).stem[-1] for i in ids(train)] == ["4", "1", "2"]
    assert train.labels.tolist() == [101, 0, 1]
    assert [Path(i).stem[-1] for i in ids(test)] == ["3", "5", "6"]
    assert test.labels.tolist() == [0, 2, 2]
    assert torch.equal(train.read(0), read_rgb(base / "jpg" / "image_00004.jpg"))


def test_cars_come_through_torchvision(tmp_path, matlab):
    base = tmp_path / "stanford_cars"
    for part in ("devkit", "cars_train", "cars_test"):
        (base / part).mkdir(parents=True)
    kind = [("fname", "U9"), ("class", "i8")]
    for part, names, where in (
        ("cars_train", [("a.jpg", 2), ("b.jpg", 1)], base / "devkit" / "cars_train_annos.mat"),
        ("cars_test", [("c.jpg", 2)], base / "cars_test_annos_withlabels.mat"),
    ):
        where.write_bytes(pickle.dumps({"annotations": np.array(names, dtype=kind)}))
        for name, label in names:
            photo(label).save(base / part / name)
    meta = {"class_names": np.array(["Audi", "Bugatti"])}
    (base / "devkit" / "cars_meta.mat").write_bytes(pickle.dumps(meta))
    train, test = (read_classification("stanford_cars", tmp_path, train=t) for t in (True, False))
    assert train.class_names == test.class_names == ("Audi", "Bugatti")
    assert train.labels.tolist() == [1, 0]
    assert ids(test) == ["stanford_cars/cars_test/c.jpg"]
    assert train.read(1).shape == (3, 10, 20)
    for path in base.rglob("*.mat"):
        path.unlink()
    with pytest.raises(UserError, match=r"no stanford_cars here.*cars_test_annos_withlabels\.mat"):
        read_classification("stanford_cars", tmp_path, train=True)


@pytest.mark.parametrize("name", ["flowers102", "stanford_cars"])
def test_a_missing_scipy_is_named(tmp_path, monkeypatch, name):
    (tmp_path / "flowers-102").mkdir()
    monkeypatch.setattr(datasets.Flowers102, "_check_integrity", lambda self: True)
    for module in ("scipy", "scipy.io"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match="pip install scipy"):
        read_classification(name, tmp_path, train=True)
