"""COCO's files: read, evaluated as pycocotools does, and refused with file, line and entry."""

import contextlib
import io
import json
import re

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tests.evaluation.detections import CLASSES, image, random_split
from tract_det.errors import UserError
from tract_det.evaluation.coco_files import read_coco_ground_truth, read_coco_results
from tract_det.evaluation.detection_results import evaluate_detections, summary
from tract_det.evaluation.ground_truth import from_annotations

TRUTH = {
    "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 3, "file_name": "dir/b.jpg"}],
    "annotations": [
        {"id": 1, "image_id": 3, "category_id": 5, "bbox": [10, 20, 30, 40], "area": 900.5},
        {"id": 2, "image_id": 7, "category_id": 2, "bbox": [0, 0, 5, 5], "iscrowd": 1},
        {"id": 3, "image_id": 7, "category_id": 5, "bbox": [0, 0, 8, 4], "ignore": 1},
    ],
    "categories": [{"id": 5, "name": "dog"}, {"id": 2, "name": "cat"}],
}
RESULTS = [
    {"image_id": 3, "category_id": 5, "bbox": [10, 20, 30.5, 40], "score": 0.5},
    {"image_id": 7, "category_id": 2, "bbox": [1, 2, 3, 4], "score": 0.25},
]


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1))
    return path


def test_ground_truth_has_classes_by_number_and_edges_of_boxes(tmp_path):
    truth = read_coco_ground_truth(write(tmp_path / "truth.json", TRUTH))
    assert truth.image_ids == ("a", "b")
    assert truth.class_names == ("cat", "dog")
    assert truth.objects.image.tolist() == [1, 0, 0]
    assert truth.objects.labels.tolist() == [1, 0, 1]
    assert truth.objects.boxes[0].tolist() == [10, 20, 40, 60]
    assert truth.objects.area.tolist() == [900.5, 25, 32]
    assert truth.objects.difficult.tolist() == [False, True, True]
    assert truth.objects.crowd.tolist() == [False, True, False]
    assert [truth.positions[name] for name in (7, "7", "a", 3, "3", "b")] == [0, 0, 0, 1, 1, 1]


def test_results_have_positions_labels_and_edges_of_boxes(tmp_path):
    truth = read_coco_ground_truth(write(tmp_path / "truth.json", TRUTH))
    detections = read_coco_results(write(tmp_path / "results.json", RESULTS), truth)
    assert detections.image.tolist() == [1, 0]
    assert detections.labels.tolist() == [1, 0]
    assert detections.boxes.tolist() == [[10, 20, 40.5, 60], [1, 2, 4, 6]]
    assert detections.scores.tolist() == [0.5, 0.25]
    assert not len(read_coco_results(write(tmp_path / "none.json", []), truth).scores)


def test_without_a_coco_ground_truth_images_are_numbers_or_names_and_classes_count_from_1(tmp_path):
    truth = from_annotations([image("000012", [], []), image("000007", [], [])], CLASSES)
    entries = [
        {"image_id": name, "category_id": 3, "bbox": [0, 0, 1, 1], "score": 1}
        for name in (7, "000012")
    ]
    detections = read_coco_results(write(tmp_path / "results.json", entries), truth)
    assert detections.image.tolist() == [1, 0]
    assert detections.labels.tolist() == [2, 2]


def test_files_with_crowds_and_areas_give_pycocotools_own_figures(tmp_path):
    images, detections = random_split(40)
    rng = np.random.default_rng(0)
    annotations = [
        {
            "image_id": number,
            "category_id": int(label) + 1,
            "bbox": [*box[:2], *(box[2:] - box[:2])],
            "area": float(rng.choice([300, 1024, 5000, 9216, 20000])),
            "iscrowd": int(rng.random() < 0.2),
        }
        for number, annotation in enumerate(images)
        for box, label in zip(annotation.boxes, annotation.labels, strict=True)
    ]
    truth_path = write(
        tmp_path / "truth.json",
        {
            "images": [{"id": number} for number in range(40)],
            "categories": [{"id": k + 1, "name": name} for k, name in enumerate(CLASSES)],
            "annotations": [{"id": k + 1} | entry for k, entry in enumerate(annotations)],
        },
    )
    results_path = write(
        tmp_path / "results.json",
        [
            {"image_id": number, "category_id": int(label) + 1, "score": float(score)}
            | {"bbox": [*box[:2], *(box[2:] - box[:2])]}
            for number, (boxes, scores, labels) in enumerate(detections)
            for box, score, label in zip(boxes, scores, labels, strict=True)
        ],
    )
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(truth_path)
        evaluation = COCOeval(coco, coco.loadRes(str(results_path)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    truth = read_coco_ground_truth(truth_path)
    figures = summary(evaluate_detections(truth, read_coco_results(results_path, truth)))["coco"]
    assert list(figures.values()) == pytest.approx(100 * evaluation.stats[:6], abs=1e-9)
    assert 5 < figures["AP"] < 95


def changed(entry, **values):
    """An entry with other values; None takes a key away."""
    return {key: value for key, value in (entry | values).items() if value is not None}


# The changed second entry of RESULTS, which is on line 13 of the file.
BAD_RESULTS = {
    "unknown image": (changed(RESULTS[1], image_id=9), "image_id 9 is not in the ground truth"),
    "list as image": (changed(RESULTS[1], image_id=[1]), r"image_id \[1\] is not in"),
    "true as category": (changed(RESULTS[1], category_id=True), "category_id True is not in"),
    "no category": (changed(RESULTS[1], category_id=None), "category_id None is not in"),
    "nan in a box": (changed(RESULTS[1], bbox=[1, 2, float("nan"), 4]), "bbox .*finite numbers"),
    "inf as score": (changed(RESULTS[1], score=float("inf")), "score is not a finite number"),
    "three numbers": (changed(RESULTS[1], bbox=[1, 2, 3]), "bbox .*finite numbers"),
    "huge number": (changed(RESULTS[1], bbox=[1, 2, 3, 10**400]), "bbox .*finite numbers"),
    "sum beyond the doubles": (changed(RESULTS[1], bbox=[1e308, 2, 1e308, 4]), "bbox .*finite"),
    "negative width": (changed(RESULTS[1], bbox=[1, 2, -3, 4]), "negative width or height"),
    "no object": ([1, 2], "is not an object"),
    "no score": (changed(RESULTS[1], score=None), "score is not a finite number"),
}


@pytest.mark.parametrize("case", BAD_RESULTS)
def test_a_bad_result_is_refused_in_a_line_with_file_line_and_entry(tmp_path, case):
    truth = read_coco_ground_truth(write(tmp_path / "truth.json", TRUTH))
    entry, message = BAD_RESULTS[case]
    path = write(tmp_path / "results.json", [RESULTS[0], entry])
    where = f"{re.escape(str(path))}, line 13: entry 2: "
    with pytest.raises(UserError, match=f"^{where}.*{message}") as caught:
        read_coco_results(path, truth)
    assert "\n" not in str(caught.value)


BAD_ANNOTATIONS = {
    "unknown image": (changed(TRUTH["annotations"][1], image_id=1), "image_id 1 is not in"),
    "unknown category": (changed(TRUTH["annotations"][1], category_id=1), "category_id 1 is not"),
    "negative height": (changed(TRUTH["annotations"][1], bbox=[0, 0, 5, -5]), "negative width"),
    "no box": (changed(TRUTH["annotations"][1], bbox=None), "bbox None is not"),
    "word as area": (changed(TRUTH["annotations"][1], area="big"), "area is not a finite number"),
    "word as flag": (changed(TRUTH["annotations"][1], iscrowd="no"), "are not 0 or 1"),
}


@pytest.mark.parametrize("case", BAD_ANNOTATIONS)
def test_a_bad_annotation_is_refused_in_a_line_with_file_line_and_entry(tmp_path, case):
    entry, message = BAD_ANNOTATIONS[case]
    content = TRUTH | {"annotations": [TRUTH["annotations"][0], entry]}
    path = write(tmp_path / "truth.json", content)
    where = f"{re.escape(str(path))}, line 25: entry 2 of annotations: "
    with pytest.raises(UserError, match=f"^{where}.*{message}"):
        read_coco_ground_truth(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "is no COCO ground truth: write an object with images"),
        ('{"images": []}', "is no COCO ground truth"),
        ("{\n'images': []}", ", line 2: is no JSON"),
        ("[" * 100_000, "cannot be read"),
        ("9" * 5000, "cannot be read"),
        (TRUTH | {"images": [{"id": 7}, {"id": 7}]}, "entry 2 of images: id 7 occurs twice"),
        (TRUTH | {"images": [{"id": 7.5}]}, "entry 1 of images: has no id"),
        (TRUTH | {"categories": [{"id": 5}]}, "entry 1 of categories: has no name"),
        (
            TRUTH | {"categories": [{"id": 5, "name": "cat"}, {"id": 2, "name": "cat"}]},
            "two categories have the same name",
        ),
    ],
)
def test_a_file_that_is_no_ground_truth_is_refused_in_a_line(tmp_path, content, message):
    path = write(tmp_path / "truth.json", content)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}.*{message}") as caught:
        read_coco_ground_truth(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text_or_no_list_is_refused_by_name(tmp_path):
    truth = read_coco_ground_truth(write(tmp_path / "truth.json", TRUTH))
    with pytest.raises(UserError, match=r"results\.json: is no COCO result file: write a list"):
        read_coco_results(write(tmp_path / "results.json", {"a": 1}), truth)
    with pytest.raises(UserError, match=r"missing\.json: cannot be read"):
        read_coco_results(tmp_path / "missing.json", truth)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"bytes\.json: cannot be read as text"):
        read_coco_results(tmp_path / "bytes.json", truth)
