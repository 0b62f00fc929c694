"""`tract-det check` finds what is wrong with a data set, and says whether a training can start."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.data.conftest import Tree, annotation
from tests.data.formats import label_studio, yolo_ultralytics
from tract_det.cli import call
from tract_det.data.check import fitting_settings, only_in_one, pixel_statistics, summary, twins
from tract_det.data.datasets import read_dataset


@pytest.fixture
def tree(tmp_path):
    """Images of 60 x 40: one with a suspicious box of each kind, one without objects."""
    tree = Tree(tmp_path / "voc")
    size = (60, 40)
    tree.add("good", ("cell", (11, 11, 30, 30)), size=size)
    tree.add("outside", ("cell", (41, 11, 75, 30)), size=size)
    tree.add("thin", ("cell", (60, 11, 75, 30)), size=size)
    tree.add("double", ("cell", (11, 11, 40, 40)), ("cell", (11, 11, 40, 39)), size=size)
    tree.add("whole", ("Cell ", (1, 1, 60, 40)), size=size)
    tree.add("empty", size=size)
    for i, image in enumerate(["good", "outside", "thin", "double", "whole", "empty", "new"]):
        pixels = np.full((40, 60, 3), 20 * i, dtype=np.uint8)
        Image.fromarray(pixels).save(tree.root / f"JPEGImages/{image}.jpg")
    tree.add("new", ("cell", (1, 1, 20, 20)), size=size)
    tree.split("train", ["good", "outside", "thin", "double", "whole", "empty"])
    tree.split("test", ["new"])
    return tree


def check(root, *flags):
    out = root.parent / "check.json"
    code = call("check", [str(root), "--json", str(out), *flags])
    return code, json.loads(out.read_text())


def test_every_kind_of_suspect_is_found_and_named(tree, capsys):
    code, found = check(tree.root)
    assert code == 0 and found["can_start"]
    suspects = {
        kind: [image for image, _ in boxes] for kind, boxes in found["suspects"]["train"].items()
    }
    assert suspects == {
        "outside their image": ["outside", "thin"],
        "less than two pixels wide or high": ["thin"],
        "twice there": ["double"],
        "as large as their image": ["whole"],
    }
    assert found["splits"]["train"]["without_objects"] == 1
    assert found["splits"]["train"]["classes"] == {"Cell": 1, "cell": 5}
    printed = capsys.readouterr().out
    assert "classes 'cell' and 'Cell' look like one" in printed or "'Cell' and 'cell'" in printed
    assert "class 'Cell' has objects in train alone" in printed
    assert "a training can start" in printed


def test_an_image_in_two_splits_is_found_by_its_content(tree):
    shutil.copy(tree.root / "JPEGImages/good.jpg", tree.root / "JPEGImages/new.jpg")
    _, found = check(tree.root)
    assert found["same_images"] == [[["test", "new"], ["train", "good"]]]
    tree.split("trainval", ["good", "outside", "new"])  # new is in test as well
    _, found = check(tree.root, "--splits", "trainval", "test", "train")
    places = {tuple(place) for group in found["same_images"] for place in group}
    assert ("trainval", "good") in places and ("test", "new") in places


def test_a_list_that_is_part_of_another_shares_no_image_with_it(tree):
    tree.split("trainval", ["good", "outside", "thin", "double", "whole", "empty"])
    _, found = check(tree.root)
    assert found["same_images"] == []


def test_what_stops_a_training_is_said_at_once_and_by_the_exit_code(tree, capsys):
    (tree.root / "JPEGImages/good.jpg").write_bytes(b"no image")
    Image.new("RGB", (40, 60)).save(tree.root / "JPEGImages/whole.jpg")
    code, found = check(tree.root)
    assert code == 1 and not found["can_start"]
    assert "good.jpg" in found["errors"][0] and "whole.jpg" in found["errors"][0]
    assert "a training cannot start" in capsys.readouterr().out


def test_a_split_that_cannot_be_read_is_an_error_beside_the_others(tree, capsys):
    tree.split("broken", ["nowhere"])
    code, found = check(tree.root)
    assert code == 1 and set(found["splits"]) == {"train", "test"}
    assert "nowhere" in found["errors"][0]


def test_suspicious_pictures_are_drawn(tree, tmp_path):
    code, _ = check(tree.root, "--out", str(tmp_path / "pictures"))
    assert code == 0
    with Image.open(tmp_path / "pictures/check.png") as picture:
        assert picture.width > 300


@pytest.mark.parametrize(("mode", "is_upright"), [("ignore", False), ("apply", True)])
def test_pictures_are_drawn_as_their_boxes_mean_them(tree, tmp_path, monkeypatch, mode, is_upright):
    """The stored image is black and white from left to right, upright from above."""
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels[:, 30:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the right
    for suffix in (".png", ".tif"):
        name = suffix[1:]
        Image.fromarray(pixels).save(tree.root / f"JPEGImages/{name}{suffix}", exif=exif)
        tree.xml(
            name, annotation(("cell", (1, 1, 20, 20)), size=(40, 60) if is_upright else (60, 40))
        )
    tree.split("turned", ["png", "tif"])
    drawn = []
    monkeypatch.setattr("tract_det.visualize.detection_grid", lambda *args: drawn.extend(args[1]))
    code, _ = check(tree.root, "--splits", "turned", "--exif", mode, "--out", str(tmp_path / "out"))
    assert code == 0
    expected = np.rot90(pixels, -1) if is_upright else pixels
    assert [picture.path.stem for picture in drawn] == ["png", "tif"]
    assert all(np.array_equal(picture.pixels, expected) for picture in drawn)


def test_aspect_ratios_are_quantiles_of_height_by_width_and_none_without_boxes(tree, capsys):
    for k in range(1, 11):
        tree.add(f"ratio{k}", ("cell", (1, 1, 10, 4 * k)), size=(60, 40))
    tree.split("ratios", [f"ratio{k}" for k in range(1, 11)])
    tree.split("none", ["empty"])
    _, found = check(tree.root, "--splits", "ratios", "none", "--classes", "cell")
    quantiles = found["splits"]["ratios"]["aspect_ratios"]
    assert quantiles == pytest.approx(
        {"min": 0.4, "5%": 0.58, "50%": 2.2, "95%": 3.82, "max": 4.0}, abs=1e-3
    )
    assert found["splits"]["none"]["aspect_ratios"] == {}
    (line,) = [text for text in capsys.readouterr().out.splitlines() if "height / width" in text]
    assert line.split()[-3:] == ["0.58", "2.20", "3.82"]


def test_data_in_other_formats_are_checked_alike(tree, tmp_path):
    splits = [read_dataset([name], tree.root, ["cell", "Cell"]) for name in ("train", "test")]
    yolo_ultralytics(tmp_path / "yolo", splits[1:])
    code, found = check(tmp_path / "yolo")
    assert code == 0 and found["splits"]["test"]["objects"] == 1
    label_studio(tmp_path / "studio", splits[1:])
    code, found = check(tmp_path / "studio")
    assert code == 0 and found["splits"]["all"]["objects"] == 1


def test_names_are_twins_but_for_case_spaces_and_plural():
    assert twins(["car", "Car ", "cars", "cat", "traffic light", "traffic_light"]) == [
        ("car", "Car ", "cars"),
        ("traffic light", "traffic_light"),
    ]
    assert twins(["bus", "buses", "as", "a"]) == []


def test_a_single_split_has_no_class_alone(tree):
    assert only_in_one([read_dataset(["test"], tree.root, None)]) == {}


def test_statistics_are_those_of_all_pixels(tree):
    for name, value in (("new", 100), ("good", 200)):
        Image.new("RGB", (60, 40), (value, 0, 50)).save(tree.root / f"JPEGImages/{name}.png")
        (tree.root / f"JPEGImages/{name}.jpg").unlink()
    tree.split("two", ["new", "good"])
    mean, std = pixel_statistics(read_dataset(["two"], tree.root, None))
    assert mean == pytest.approx([150, 0, 50]) and std == pytest.approx([50, 0, 0])
    _, found = check(tree.root, "--statistics", "--splits", "two")
    assert found["settings"]["MODEL.PIXEL_MEAN"] == [150, 0, 50]


def test_statistics_of_other_channels_are_by_channel_and_pasted_as_they_are(tree, capsys):
    for name, value in (("new", 100), ("good", 200)):
        pixels = np.full((40, 60, 5), (value, 0, 50, 60, 70), dtype=np.uint8)
        np.save(tree.root / f"JPEGImages/{name}.npy", pixels)
        Image.fromarray(pixels[..., :4]).save(tree.root / f"JPEGImages/{name}.png")
        (tree.root / f"JPEGImages/{name}.jpg").unlink()
    tree.split("two", ["new", "good"])
    arguments = ("--statistics", "--splits", "two", "--out", tree.root.parent / "out")
    code, found = check(tree.root, *map(str, arguments), "--channels", "4")
    assert code == 0 and (tree.root.parent / "out/check.png").is_file()
    assert found["settings"]["MODEL.PIXEL_MEAN"] == [150, 0, 50, 60]
    assert found["settings"]["MODEL.PIXEL_STD"] == [50, 0, 0, 0]
    assert 'MODEL.PIXEL_MEAN "[150.0, 0.0, 50.0, 60.0]"' in capsys.readouterr().out
    for name in ("new", "good"):
        (tree.root / f"JPEGImages/{name}.png").unlink()
    code, found = check(tree.root, *map(str, arguments))
    assert code == 0 and found["settings"]["MODEL.PIXEL_MEAN"] == [150, 0, 50, 60, 70]
    code, found = check(tree.root, *map(str, arguments[:3]), "--channels", "4")
    assert code == 1 and "the image has 5 channels" in "".join(found["errors"])


def test_settings_follow_the_sizes_of_all_classes_alike(tmp_path):
    tree = Tree(tmp_path / "sizes")
    objects = [("large", (1, 1, 200, 200))] * 9 + [("small", (1, 1, 20, 20))]
    tree.add("a", *objects, size=(640, 480))
    tree.split("train", ["a"])
    settings = fitting_settings(read_dataset(["train"], tree.root, None))
    anchors = settings["MODEL.ANCHOR_GENERATOR.SIZES"]
    assert anchors[:2] == [16, 24] and {200, 208} <= set(anchors)  # one in ten has half of them
    assert settings["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"] == [1.0]
    assert settings["INPUT.MIN_SIZE_TRAIN"] == [480] and settings["INPUT.MAX_SIZE_TRAIN"] == 640


def test_small_objects_ask_for_larger_images(tmp_path):
    tree = Tree(tmp_path / "sizes")
    tree.add("a", ("dot", (1, 1, 8, 8)), size=(320, 240))
    tree.split("train", ["a"])
    settings = fitting_settings(read_dataset(["train"], tree.root, None))
    assert settings["INPUT.MIN_SIZE_TRAIN"] == [480] and settings["INPUT.MAX_SIZE_TRAIN"] == 640


def test_the_line_in_a_trainings_log_points_to_what_is_doubtful(tree):
    line = summary(read_dataset(["train"], tree.root, None))
    assert line.startswith("train: 6 objects (cell 5, Cell 1); 1 images without objects")
    assert "1 boxes are twice there" in line and "`tract-det check` shows them" in line
