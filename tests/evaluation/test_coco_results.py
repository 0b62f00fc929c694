"""COCO's files: evaluated as pycocotools does, results refused with file, line and entry."""

import contextlib
import io
import json
import re

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tests.evaluation.detections import CLASSES, image, random_split
from tract_det.data.coco import read_file
from tract_det.errors import UserError
from tract_det.evaluation.coco_results import read_coco_results
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


def read_coco_ground_truth(path):
    split = read_file(path)
    return from_annotations(split.annotations, split.class_names, split.categories)


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1))
    return path


def test_ground_truth_has_classes_by_number_and_edges_of_boxes(tmp_path):
    truth = read_coco_ground_truth(write(tmp_path / "truth.json", TRUTH))
    assert truth.image_ids == ("dir/b", "a")
    assert truth.class_names == ("cat", "dog")
    assert truth.objects.image.tolist() == [0, 1, 1]
    assert truth.objects.labels.tolist() == [1, 0, 1]
    assert truth.objects.boxes[0].tolist() == [10, 20, 40, 60]
    assert truth.objects.area.tolist() == [900.5, 25, 32]
    assert truth.objects.difficult.tolist() == [False, True, True]
    assert truth.objects.crowd.tolist() == [False, True, False]
    assert [truth.numbers[name] for name in (3, "3", "b", "dir/b")] == [0, 0, 0, 0]
    assert [truth.numbers[name] for name in (7, "7", "a")] == [1, 1, 1]
    assert truth.positions == {"dir/b": 0, "b": 0, "a": 1}
    assert truth.categories == {5: "dog", 2: "cat"}


def test_a_number_that_is_another_images_name_is_a_name_to_the_challenge_and_an_id_to_coco(
    tmp_path,
):
    content = {
        "images": [{"id": 1, "file_name": "2.jpg"}, {"id": 2, "file_name": "1.jpg"}],
        "annotations": [],
        "categories": [{"id": 4, "name": "cat"}],
    }
    truth = read_coco_ground_truth(write(tmp_path / "truth.json", content))
    assert [truth.positions[name] for name in ("2", "1")] == [0, 1]
    assert [truth.numbers[number] for number in (1, 2)] == [0, 1]
    assert [truth.numbers[name] for name in ("2", "1")] == [0, 1]
    entry = {"image_id": 2, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1}
    named = entry | {"image_name": "2", "category_name": "cat"}
    results = write(tmp_path / "named.json", [named])
    assert read_coco_results(results, truth).image.tolist() == [0]
    by_number = write(tmp_path / "numbers.json", [entry | {"category_id": 4}])
    assert read_coco_results(by_number, truth).image.tolist() == [1]


def test_results_have_positions_labels_and_edges_of_boxes(tmp_path):
    truth = read_coco_ground_truth(write(tmp_path / "truth.json", TRUTH))
    detections = read_coco_results(write(tmp_path / "results.json", RESULTS), truth)
    assert detections.image.tolist() == [0, 1]
    assert detections.labels.tolist() == [1, 0]
    assert detections.boxes.tolist() == [[10, 20, 40.5, 60], [1, 2, 4, 6]]
    assert detections.scores.tolist() == [0.5, 0.25]
    assert not len(read_coco_results(write(tmp_path / "none.json", []), truth).scores)


def test_without_a_coco_ground_truth_images_are_numbers_or_names(tmp_path):
    images = [image("000012", [], []), image("000007", [], [])]
    truth = from_annotations(images, CLASSES, dict(enumerate(CLASSES, 1)))
    entries = [
        {"image_id": name, "category_id": 3, "bbox": [0, 0, 1, 1], "score": 1}
        for name in (7, "000012")
    ]
    detections = read_coco_results(write(tmp_path / "results.json", entries), truth)
    assert detections.image.tolist() == [1, 0]
    assert detections.labels.tolist() == [2, 2]
    unnumbered = from_annotations(images, CLASSES)
    with pytest.raises(UserError, match="do not say which class has which category_id: give --cl"):
        read_coco_results(tmp_path / "results.json", unnumbered)
    named = [{**entry, "category_name": "dog"} for entry in entries]
    read = read_coco_results(write(tmp_path / "named.json", named), unnumbered)
    assert read.labels.tolist() == [1, 1]


def test_names_that_are_there_need_no_numbers_and_are_never_taken_for_any(tmp_path):
    """Names of another split's images may be the numbers of this one's."""
    truth = read_coco_ground_truth(write(tmp_path / "truth.json", TRUTH))
    entry = {"category_name": "cat", "bbox": [0, 0, 1, 1], "score": 1}
    path = write(tmp_path / "results.json", [entry | {"image_name": "dir/b"}])
    assert read_coco_results(path, truth).image.tolist() == [0]
    for name in ("3", "7"):
        write(path, [entry | {"image_name": name}])
        with pytest.raises(UserError, match=f"image_name '{name}' is not in the split"):
            read_coco_results(path, truth)


def test_among_other_names_those_that_are_numbers_can_be_called_so(tmp_path):
    images = [image(name, [], []) for name in ("b", "07", "1", "01", "c/9", "d/9")]
    truth = from_annotations(images, ("cat",))
    assert truth.numbers == {
        **{"b": 0, "07": 1, 7: 1, "1": 2, "01": 3, "c/9": 4, "d/9": 5},
    }


def test_detections_of_classes_that_the_split_does_not_have_are_left_out_by_name(tmp_path):
    images = [image("a", [], []), image("b", [], [])]
    truth = from_annotations(images, ("cat",), {1: "cow", 2: "cat"})
    entries = [
        {"image_id": "b", "category_id": number, "bbox": [number, 0, 1, 1], "score": number / 4}
        for number in (1, 2)
    ]
    path = write(tmp_path / "results.json", entries)
    with pytest.raises(UserError, match=r"none of its classes \(cow\) is one of the split's \(cat"):
        read_coco_results(write(tmp_path / "cows.json", entries[:1]), truth)
    with pytest.warns(UserWarning, match=r"results\.json: left out .* does not have: cow$"):
        detections = read_coco_results(path, truth)
    assert detections.image.tolist() == [1] and detections.labels.tolist() == [0]
    assert detections.boxes.tolist() == [[2, 0, 3, 1]] and detections.scores.tolist() == [0.5]


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
    "unknown image": (
        changed(RESULTS[1], image_id=9),
        "image_id 9 is not in the split, whose images are 3, 7: evaluate the split",
    ),
    "unknown name": (changed(RESULTS[1], image_name="c"), "image_name 'c' is not in the split"),
    "true as image": (changed(RESULTS[1], image_id=True), "image_id True is not what an image is"),
    "number as an image's name": (
        changed(RESULTS[1], image_name=3),
        "image_name 3 is not what an image is",
    ),
    "no image": (changed(RESULTS[1], image_id=None), "has no image_id: write image_id, category"),
    "list as image": (changed(RESULTS[1], image_id=[1]), r"image_id \[1\] is not what an image is"),
    "true as category": (changed(RESULTS[1], category_id=True), "category_id True is none"),
    "unknown category": (
        changed(RESULTS[1], category_id=3),
        r"category_id 3 is none of the data's: 5 \(dog\), 2 \(cat\)",
    ),
    "number as name": (changed(RESULTS[1], category_name=2), "category_name 2 is not a name"),
    "no category": (changed(RESULTS[1], category_id=None), "has no category_id: write"),
    "box in a list": (changed(RESULTS[1], bbox=[[1, 2, 3, 4]]), "bbox .*finite numbers"),
    "true in a box": (changed(RESULTS[1], bbox=[1, 2, True, 4]), "bbox .*finite numbers"),
    "word as score": (changed(RESULTS[1], score="0.5"), "score '0.5' is not a finite number"),
    "true as score": (changed(RESULTS[1], score=True), "score True is not a finite number"),
    "nan in a box": (changed(RESULTS[1], bbox=[1, 2, float("nan"), 4]), "bbox .*finite numbers"),
    "inf as score": (changed(RESULTS[1], score=float("inf")), "score inf is not a finite number"),
    "three numbers": (changed(RESULTS[1], bbox=[1, 2, 3]), "bbox .*finite numbers"),
    "huge number": (changed(RESULTS[1], bbox=[1, 2, 3, 10**400]), "bbox .*finite numbers"),
    "sum beyond the doubles": (changed(RESULTS[1], bbox=[1e308, 2, 1e308, 4]), "bbox .*finite"),
    "negative width": (changed(RESULTS[1], bbox=[1, 2, -3, 4]), "negative width or height"),
    "no object": ([1, 2], "is not an object"),
    "no score": (changed(RESULTS[1], score=None), "has no score: write"),
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
    "unknown image": ({"image_id": 1}, "image_id 1 is no image's id"),
    "unknown category": ({"category_id": 1}, "category_id 1 is no category's id"),
    "negative height": ({"bbox": [0, 0, 5, -5]}, "with a negative width or height"),
    "no box": ({"bbox": None}, "bbox is None"),
    "word as area": ({"area": "big"}, "area is 'big': write a number"),
    "list as flag": ({"iscrowd": [1]}, r"iscrowd is \[1\]: write 0 or 1"),
    "word as flag": ({"iscrowd": "maybe"}, "iscrowd is 'maybe': write 0 or 1"),
}


@pytest.mark.parametrize("case", BAD_ANNOTATIONS)
def test_a_bad_annotation_is_refused_in_a_line_with_file_and_id(tmp_path, case):
    values, message = BAD_ANNOTATIONS[case]
    entry = changed(TRUTH["annotations"][1], **values)
    path = write(tmp_path / "truth.json", TRUTH | {"annotations": [entry]})
    where = f"{re.escape(str(path))}: annotation 2: "
    with pytest.raises(UserError, match=f"^{where}.*{message}"):
        read_coco_ground_truth(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "has no list 'images'"),
        ('{"images": []}', "has no list 'annotations'"),
        ("{\n'images': []}", ", line 2: is no JSON"),
        ("[" * 100_000, "cannot be read"),
        ("9" * 5000, "cannot be read"),
        (TRUTH | {"images": [], "annotations": []}, "its list 'images' is empty"),
        (TRUTH | {"categories": [], "annotations": []}, "its list 'categories' is empty"),
        (TRUTH | {"images": [{"id": 7}, {"id": 7}]}, "image id 7 occurs twice"),
        (TRUTH | {"images": [{"id": 7.5}]}, "image .*7.5.* has no id"),
        (TRUTH | {"categories": [{"id": 5}]}, "category .* has no id and name"),
    ],
)
def test_a_file_that_is_no_ground_truth_is_refused_in_a_line(tmp_path, content, message):
    path = write(tmp_path / "truth.json", content)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}.*{message}") as caught:
        read_coco_ground_truth(path)
    assert "\n" not in str(caught.value)


NAMELESS = {
    "the same twice": ["x.jpg", "x.jpg"],
    "empty": ["", ""],
    "of other machines": ["/cam1/x.jpg", "C:\\cam2\\x.jpg"],
    "addresses": ["https://a.org/" + 300 * "x" + ".jpg?1", "https://b.org/" + 300 * "x" + ".jpg?2"],
    "none": [None, None],
    "no names": ["..", "/"],
    "a file that is no image": ["truth.json", "x.jpg"],
}


@pytest.mark.filterwarnings("ignore:.*have no objects in this split")
@pytest.mark.parametrize("case", NAMELESS)
def test_no_file_names_are_needed_as_images_have_ids(tmp_path, case):
    images = [
        {"id": number} | ({} if name is None else {"file_name": name})
        for number, name in zip((7, "7"), NAMELESS[case], strict=True)
    ]
    annotations = [
        {"id": k, "image_id": image["id"], "category_id": 2, "bbox": [k, 0, 50, 50], "iscrowd": 0}
        for k, image in enumerate(images)
    ]
    content = TRUTH | {"images": images, "annotations": annotations}
    truth = read_coco_ground_truth(write(tmp_path / "truth.json", content))
    assert len(set(truth.image_ids)) == 2
    entries = [
        {"image_id": image["id"], "category_id": 2, "bbox": [k, 0, 50, 50], "score": 1}
        for k, image in enumerate(images)
    ]
    detections = read_coco_results(write(tmp_path / "results.json", entries), truth)
    assert summary(evaluate_detections(truth, detections))["coco"]["AP50"] == pytest.approx(100)


@pytest.mark.filterwarnings("ignore:.*have no objects in this split")
def test_images_are_in_the_order_of_their_ids_which_decides_among_equal_scores(tmp_path):
    """As pycocotools has them; the true detection comes first by it, though last in both lists."""
    content = TRUTH | {
        "images": [{"id": 2}, {"id": 1}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 2, "bbox": [0, 0, 50, 50]}],
    }
    truth = read_coco_ground_truth(write(tmp_path / "truth.json", content))
    entries = [
        {"image_id": number, "category_id": 2, "bbox": [0, 0, 50, 50], "score": 0.5}
        for number in (2, 1)
    ]
    detections = read_coco_results(write(tmp_path / "results.json", entries), truth)
    assert summary(evaluate_detections(truth, detections))["coco"]["AP"] == pytest.approx(100)


AREAS = {
    "of a large image": (1.6e9, 1.6e9),
    "in words": ("2500.5", 2500.5),
    "not said": (None, 100),
    "empty": ("", 100),
    "not a number": (float("nan"), 100),
}


@pytest.mark.parametrize("case", AREAS)
def test_an_area_is_taken_from_the_file_or_from_the_box(tmp_path, case):
    area, expected = AREAS[case]
    annotations = [
        {"id": 1, "image_id": 7, "category_id": 2, "bbox": [0, 0, 10, 10], "area": area},
        {"id": 2, "image_id": 3, "category_id": 2, "bbox": [0, 0, 10, 10], "area": 7},
    ]
    path = write(tmp_path / "truth.json", TRUTH | {"annotations": annotations})
    assert read_coco_ground_truth(path).objects.area.tolist() == [7, expected]


@pytest.mark.parametrize(
    ("flag", "expected"), [("", False), ("0", False), ("1", True), ("False", False), ("yes", True)]
)
def test_a_flag_may_be_a_word(tmp_path, flag, expected):
    annotation = TRUTH["annotations"][0] | {"ignore": flag}
    truth = read_coco_ground_truth(
        write(tmp_path / "truth.json", TRUTH | {"annotations": [annotation]})
    )
    assert truth.objects.difficult.tolist() == [expected]


def test_null_is_as_nothing_and_two_categories_of_one_name_are_one_class(tmp_path):
    """Roboflow gives the group of the classes an id, and often the name of one of them."""
    annotations = [
        {"id": 1, "image_id": 7, "category_id": number, "bbox": [0, 0, 9, 9]}
        | {"iscrowd": None, "area": None}
        for number in (2, 5)
    ]
    categories = [{"id": 5, "name": "cat"}, {"id": 2, "name": "cat"}]
    content = TRUTH | {"annotations": annotations, "categories": categories}
    path = write(tmp_path / "truth.json", content)
    with pytest.warns(UserWarning, match="several categories are called 'cat': they are one class"):
        truth = read_coco_ground_truth(path)
    assert truth.class_names == ("cat",)
    assert truth.objects.labels.tolist() == [0, 0]
    assert not truth.objects.difficult.any() and truth.objects.crowd is None
    assert truth.objects.area is None


def test_a_box_without_an_area_is_an_object_to_coco_that_no_detection_finds(tmp_path):
    boxes = [[0, 0, 50, 50], [80, 80, 0, 7], [90, 90, 1, 1]]
    annotations = [
        {"id": k, "image_id": 7, "category_id": 2, "bbox": box, "area": box[2] * box[3]}
        for k, box in enumerate(boxes)
    ]
    truth = read_coco_ground_truth(
        write(tmp_path / "truth.json", TRUTH | {"annotations": annotations})
    )
    assert truth.objects.boxes.tolist() == [[0, 0, 50, 50], [80, 80, 80, 87], [90, 90, 91, 91]]
    assert truth.objects.area.tolist() == [2500, 0, 1]


def test_a_file_that_is_no_text_or_no_list_is_refused_by_name(tmp_path):
    truth = read_coco_ground_truth(write(tmp_path / "truth.json", TRUTH))
    with pytest.raises(UserError, match=r"results\.json: is no COCO result file: write a list"):
        read_coco_results(write(tmp_path / "results.json", {"a": 1}), truth)
    with pytest.raises(UserError, match=r"missing\.json: cannot be read"):
        read_coco_results(tmp_path / "missing.json", truth)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"bytes\.json: cannot be read as text"):
        read_coco_results(tmp_path / "bytes.json", truth)
