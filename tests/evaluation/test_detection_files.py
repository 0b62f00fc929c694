"""The challenge's files of detections: written, read back, and refused if they are malformed."""

import re
from pathlib import Path

import numpy as np
import pytest

from tests.evaluation.detections import CLASSES, evaluate, image, random_split
from tests.names import NAMES
from tract_det.errors import UserError
from tract_det.evaluation.detection_files import (
    ImageDetections,
    read_detections,
    write_detections,
)
from tract_det.evaluation.detection_results import evaluate_detections, summary
from tract_det.evaluation.ground_truth import from_annotations


@pytest.mark.parametrize("rule", ["devkit", "detectron2"])
def test_files_read_back_give_the_same_figures(tmp_path, rule):
    images, detections = random_split(40)
    evaluator, results = evaluate(images, detections, rule)
    evaluator.write_detections(tmp_path / "new", "val")
    truth = from_annotations(images, CLASSES)
    read = read_detections(tmp_path / "new", "val", CLASSES, truth.positions)
    again = summary(evaluate_detections(truth, read, rule))
    for definition in ("voc_07", "voc_area"):
        for key in ("AP", "AP_50_95"):
            assert again[definition][key] == pytest.approx(results[definition][key], abs=1e-9)
    assert again["coco"] == pytest.approx(results["coco"], abs=1e-9, nan_ok=True)
    assert 0 < results["voc_07"]["mAP"] < 100


def test_files_have_the_challenges_form_and_nothing_else_is_left(tmp_path):
    images = [image("one", [], []), image("two", [], [])]
    third = np.float32(1 / 3)
    detections = [
        ([[0, 1, 10, 20.5], [4, 4, 8, 8]], [third, 0.25], [1, 2]),
        ([[2, 2, 9, 9]], [1], [1]),
    ]
    evaluator, _ = evaluate(images, detections)
    evaluator.write_detections(tmp_path, "test")
    names = [f"comp4_det_test_{name}.txt" for name in sorted(CLASSES)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert (tmp_path / "comp4_det_test_cat.txt").read_text() == ""
    dogs = "one 0.3333333432674408 1.0 2.0 10.0 20.5\ntwo 1.0 3.0 3.0 9.0 9.0\n"
    assert (tmp_path / "comp4_det_test_dog.txt").read_text() == dogs


def test_no_class_name_writes_outside_its_folder(tmp_path):
    detections = {"a": ImageDetections(np.zeros((len(NAMES), 4)), *numbers_of(NAMES))}
    write_detections(tmp_path / "run" / "here", "test", NAMES, detections)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["here"]
    read = read_detections(tmp_path / "run" / "here", "test", NAMES, {"a": 0})
    assert read.labels.tolist() == list(range(len(NAMES)))


def numbers_of(names):
    return np.full(len(names), 0.5), np.arange(len(names))


def write_files(folder: Path, lines: str = "", competition: str = "comp4") -> Path:
    """Writes a file per class, with `lines` in that of the dogs, and returns the latter."""
    for name in CLASSES:
        path = folder / f"{competition}_det_test_{name}.txt"
        path.write_text(lines if name == "dog" else "")
    return folder / f"{competition}_det_test_dog.txt"


def test_files_of_either_competition_are_read_but_not_of_both(tmp_path):
    write_files(tmp_path, "a 0.5 1 1 10 10\n\n", "comp3")
    read = read_detections(tmp_path, "test", CLASSES, {"b": 0, "a": 1})
    np.testing.assert_array_equal(read.boxes, [[0, 0, 10, 10]])
    assert [read.image.tolist(), read.scores.tolist(), read.labels.tolist()] == [[1], [0.5], [1]]
    write_files(tmp_path)
    with pytest.raises(UserError, match=r"both comp3_det_test_cat\.txt and comp4_det_test_cat"):
        read_detections(tmp_path, "test", CLASSES, {"a": 0})


def test_image_id_with_blanks_is_read_when_it_is_in_the_split(tmp_path):
    write_files(tmp_path, "other 0.5 1 1 10 10\nmy cat 1 0.25 1 1 10 10\n")
    read = read_detections(tmp_path, "test", CLASSES, {"my cat 1": 0, "other": 1})
    assert (read.image.tolist(), read.scores.tolist()) == ([1, 0], [0.5, 0.25])


def test_an_underscore_belongs_to_a_name_and_to_no_number(tmp_path):
    write_files(tmp_path, "2007_000032 0.5 1 1 10 10\n")
    read = read_detections(tmp_path, "test", CLASSES, {"2007_000032": 0})
    assert read.boxes.tolist() == [[0, 0, 10, 10]]


def test_a_box_of_less_than_a_pixel_is_written_and_read(tmp_path):
    thin = ImageDetections(np.array([[3.0, 0.0, 3.0, 0.25]]), np.ones(1), np.zeros(1, dtype=int))
    write_detections(tmp_path, "test", CLASSES, {"a": thin})
    read = read_detections(tmp_path, "test", CLASSES, {"a": 0})
    np.testing.assert_array_equal(read.boxes, thin.boxes)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a 0.5 1 1 10", "line 2: has 5 columns: write image_id score xmin ymin xmax ymax"),
        ("a 0.5 1 1 10 10 10", "line 2: has 7 columns"),
        ("a,0.5,1,1,10,10", "line 2: has 1 columns"),
        ("a 0.5 1 one 10 10", "line 2: .*numbers"),
        ("a nan 1 1 10 10", "line 2: .*finite numbers"),
        ("a 0.5 1 1 inf 10", "line 2: .*finite numbers"),
        ("a 0.5 1 1 1_0 10", "line 2: .*finite numbers"),
        ("z 0.5 1 1 10 10", "line 2: image 'z' is not in the split, whose .* such as 'a': evalu"),
        ("a 0.5 10 1 5 10", "line 2: .*xmax < xmin"),
        ("a 0.5 1 10 10 5", "line 2: .*ymax < ymin"),
    ],
)
def test_bad_line_is_refused_in_one_line_with_file_and_number(tmp_path, line, message):
    path = write_files(tmp_path, f"a 0.5 1 1 10 10\n{line}\n")
    with pytest.raises(UserError, match=f"{re.escape(str(path))}, {message}") as caught:
        read_detections(tmp_path, "test", CLASSES, {"a": 0})
    assert "\n" not in str(caught.value)


def test_missing_files_are_refused_by_name(tmp_path):
    with pytest.raises(
        UserError, match=r"nowhere: no such file or folder.*comp\[34\]_det_test_<class>"
    ):
        read_detections(tmp_path / "nowhere", "test", CLASSES, {})
    path = write_files(tmp_path)
    with pytest.raises(UserError, match=r"no comp\[34\]_det_val_<class>\.txt .*check"):
        read_detections(tmp_path, "val", CLASSES, {})
    path.unlink()
    with pytest.raises(UserError, match=re.escape(f"{path}: is missing")):
        read_detections(tmp_path, "test", CLASSES, {"a": 0})
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=re.escape(f"{path}: cannot be read as text")):
        read_detections(tmp_path, "test", CLASSES, {"a": 0})
