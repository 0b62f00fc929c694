import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import pasted
from tests.data.image_folder import folder, photo
from tract_det.data.datasets import read_dataset
from tract_det.data.images import read_rgb
from tract_det.data.shapes import SHAPES_CLASSES
from tract_det.errors import UserError

SPLITS = ("train", "test")
GREEN = (0, 200, 0)
COLOURS = {"train": (200, 0, 0), "test": (0, 0, 200)}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Image folder of noise, photographs of noise."""
    root = tmp_path_factory.mktemp("sources")
    for part in SPLITS:
        folder(root / "pictures", part, {"cat": 5, "dog": 3})
    (root / "photographs" / "deep").mkdir(parents=True)
    for i in range(6):
        photo(i, (90, 70)).save(root / "photographs" / "deep" / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Image folder and photographs of one colour each; a photograph's red tells which it is."""
    root = tmp_path_factory.mktemp("plain")
    for part, colour in COLOURS.items():
        (root / "pictures" / part / "cat").mkdir(parents=True)
        Image.new("RGB", (32, 32), colour).save(root / "pictures" / part / "cat" / "0.png")
    (root / "photographs").mkdir()
    for i in range(10):
        Image.new("RGB", (90, 70), (i, *GREEN[1:])).save(root / "photographs" / f"{i}.png")
    return root


@pytest.fixture
def make(tmp_path):
    def call(sources, name, *options, images=4):
        out = tmp_path / name
        arguments = [out, "--pictures", sources / "pictures"]
        arguments += ["--photographs", sources / "photographs", "--size", 64, "--images", images]
        arguments += ["--test-images", 2, "--object-size", "12-30", *options]
        pasted.main([str(a) for a in arguments])
        return out

    return call


def contents(root, folders=("Annotations", "JPEGImages")):
    return {path.name: path.read_bytes() for name in folders for path in (root / name).iterdir()}


def images(root):
    paths = sorted((root / "JPEGImages").iterdir())
    return np.stack([read_rgb(path).permute(1, 2, 0).numpy() for path in paths]).astype(float)


def test_a_set_with_fewer_images_is_the_beginning_of_one_with_more(sources, make):
    few, more = contents(make(sources, "few")), contents(make(sources, "more", images=7))
    assert more.items() >= few.items()
    assert len(more) == len(few) + 2 * 3
    assert len({hashlib.sha256(data).digest() for data in more.values()}) == len(more)


def test_another_seed_is_another_set(sources, make):
    first, second = contents(make(sources, "a")), contents(make(sources, "b", "--seed", 1))
    assert first.keys() == second.keys()
    assert all(first[name] != second[name] for name in first)


@pytest.mark.parametrize(
    "options",
    [
        ("--contrast", 0.3),
        ("--colour", 0),
        ("--brightness", 0.1),
        ("--smooth", 1.5),
        ("--flat-background",),
        ("--drawn-background",),
    ],
    ids=str,
)
def test_what_varies_changes_every_image_and_no_annotation(sources, make, options):
    one, other = make(sources, "one"), make(sources, "other", *options)
    assert contents(one, ["Annotations"]) == contents(other, ["Annotations"])
    assert (images(one) != images(other)).any(axis=(1, 2, 3)).all()


def test_pictures_are_the_same_on_every_background(sources, make):
    photographs, flat = make(sources, "a"), make(sources, "b", "--flat-background")
    same = (images(photographs) == images(flat)).all(axis=3)
    split = read_dataset(["test", "train"], photographs, None)  # the order of the files
    for equal, a in zip(same, split.annotations, strict=True):
        for x1, y1, x2, y2 in a.boxes.astype(int):
            assert equal[y1:y2, x1:x2].all()
        assert equal.mean() < 0.9


def test_boxes_are_the_edges_of_the_pictures(plain, make):
    out = make(plain, "out")
    for part, colour in COLOURS.items():
        for a in read_dataset([part], out, None).annotations:
            pixels = read_rgb(a.path).permute(1, 2, 0).numpy()
            inside = np.zeros(pixels.shape[:2], dtype=bool)
            for x1, y1, x2, y2 in a.boxes.astype(int):
                assert x2 - x1 == y2 - y1
                assert 12 <= x2 - x1 <= 30
                inside[y1:y2, x1:x2] = True
            assert (pixels[inside] == colour).all()
            assert (pixels[~inside][:, 1:] == GREEN[1:]).all()


def test_training_and_test_share_no_picture_and_no_photograph(plain, make):
    out = make(plain, "out", images=12)
    seen = {}
    for part in SPLITS:
        paths = sorted((out / "JPEGImages").glob(f"{part}_*"))
        pixels = np.stack([read_rgb(p).flatten(1).T.numpy() for p in paths]).reshape(-1, 3)
        seen[part] = set(pixels[pixels[:, 1] == GREEN[1], 0])
        other = COLOURS["test" if part == "train" else "train"]
        assert not (pixels == other).all(axis=1).any()
    assert len(seen["train"]) > 2
    assert not seen["train"] & seen["test"]
    assert seen["test"] <= {0, 5}


def test_objects_hide_little_of_each_other_and_their_number_varies(sources):
    args = pasted.parse(["out", "--objects", "2-5"])
    counts = set()
    for number in range(60):
        found = pasted.places(args, "train", number)
        counts.add(len(found))
        owner = np.full((args.size, args.size), -1)
        for i, p in enumerate(found):
            assert min(p.left, p.top) >= 0
            assert max(p.left, p.top) + p.size <= args.size
            owner[p.top : p.top + p.size, p.left : p.left + p.size] = i
        for i, p in enumerate(found):
            hiding = len(found) - 1 - i
            assert (owner == i).sum() >= (1 - pasted.OVERLAP * hiding) * p.size**2
    assert counts == {2, 3, 4, 5}


def test_contrast_is_scaled_about_mid_grey_and_brightness_is_added(sources, make):
    before = images(make(sources, "before"))
    after = images(make(sources, "after", "--contrast", 0.4, "--brightness", 0.1))
    expected = 127.5 + 0.4 * (before - 127.5) + 25.5
    assert np.abs(after - expected).max() <= 0.5 + 0.4 * 0.5


def test_values_beyond_white_are_clipped_and_counted(sources, make, capsys):
    after = images(make(sources, "out", "--contrast", 0.01, "--brightness", 0.6))
    assert (after == 255).all()
    assert "100.00% clipped" in capsys.readouterr().out


def test_without_colour_the_luminance_stays(sources, make):
    before, after = images(make(sources, "a")), images(make(sources, "b", "--colour", 0))
    assert np.ptp(after, axis=3).max() == 0
    assert np.abs(after[..., 0] - before @ pasted.LUMA).max() <= 1


def test_smoothing_takes_detail_and_leaves_the_mean(sources, make):
    before, after = images(make(sources, "a")), images(make(sources, "b", "--smooth", 2))
    assert np.abs(np.diff(after, axis=2)).mean() < 0.1 * np.abs(np.diff(before, axis=2)).mean()
    assert after.mean((1, 2)) == pytest.approx(before.mean((1, 2)), abs=4)


def test_a_flat_background_has_the_mean_colour_of_the_crop(sources):
    args = pasted.parse(
        ["out", "--photographs", str(sources / "photographs"), "--drawn", "--size", "48"]
    )
    of_split = pasted.read_sources(args)["train"]
    crop = pasted.background(args, of_split, "train", 3)
    args.flat_background = True
    flat = pasted.background(args, of_split, "train", 3)
    assert np.ptp(flat, axis=(0, 1)).max() == 0
    assert flat[0, 0] == pytest.approx(crop.mean((0, 1)))


def test_drawn_shapes_lie_where_the_pictures_would(sources, make):
    pictures = read_dataset(["train"], make(sources, "a"), None).annotations
    shapes = read_dataset(["train"], make(sources, "b", "--drawn"), SHAPES_CLASSES).annotations
    for a, b in zip(pictures, shapes, strict=True):
        assert len(a.boxes) == len(b.boxes)
        for picture, shape in zip(a.boxes, b.boxes, strict=True):
            assert (shape[:2] >= picture[:2]).all()
            assert (shape[2:] <= picture[2:]).all()
            assert (shape[2:] - shape[:2]).max() >= 0.6 * (picture[2] - picture[0])


def test_a_tree_is_found_again_and_other_settings_are_refused(sources, make):
    out = make(sources, "out")
    before = contents(out)
    assert contents(make(sources, "out")) == before
    with pytest.raises(UserError, match=r"out/pasted\.json: made with contrast 1\.0, not 0\.5"):
        make(sources, "out", "--contrast", 0.5)
    (out / "pasted.json").unlink()
    with pytest.raises(UserError, match=r"out exists and has no readable pasted\.json"):
        make(sources, "out")
    assert contents(out) == before


def test_an_interrupted_run_leaves_nothing(sources, make, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pasted, "add_split", fail)
        make(sources, "out")
    assert list(tmp_path.iterdir()) == []
    settings = json.loads((make(sources, "out") / "pasted.json").read_text())
    assert settings["contrast"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--objects", "0-3"), "--objects 0-3: it must be A-B with 1 <= A <= B"),
        (("--object-size", "20-65"), "--object-size 20-65: .* B <= --size, 64"),
        (("--contrast", "nan"), "--contrast nan: it must be positive"),
        (("--smooth", 16), "--smooth 16.0: it must be 0 or more, and below"),
        (("--seed", -1), "--seed -1: it must be 0 or more"),
        (("--pictures", "nowhere"), "nowhere: no folder train here"),
        (("--photographs", "nowhere"), "nowhere: no .jpg, .jpeg, .png here"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(sources, make, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        make(sources, "out", *options)
    assert list(tmp_path.iterdir()) == []


def test_what_is_pasted_is_asked_for():
    with pytest.raises(UserError, match="--pictures is missing"):
        pasted.main(["out"])
    with pytest.raises(UserError, match="--photographs is missing"):
        pasted.main(["out", "--drawn"])
