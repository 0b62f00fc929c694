"""torchvision's data sets, read from small imitations of their files."""

import pickle
import sys
import types
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

from tests.data.image_folder import ids, photo
from tract_det.data.classification import read_classification
from tract_det.data.images import read_rgb
from tract_det.errors import UserError


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
    """Replaces scipy.io.loadmat by a reader of pickles."""
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
