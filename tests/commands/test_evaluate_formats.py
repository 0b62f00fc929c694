"""Result files with data in COCO's and YOLO's formats: numbers mean what the data say they mean."""

import json

import numpy as np
import pytest
from PIL import Image
from PIL.ExifTags import Base
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tract_det.cli import call
from tract_det.data.datasets import Holdout, read_dataset
from tract_det.errors import UserError
from tract_det.evaluation.evaluators import DetectionEvaluator

ORIENTATION = Base.Orientation

# Ids that are neither positions nor in the order of the names, file names that are other ids.
TRUTH = {
    "images": [
        {"id": 2, "file_name": "1.jpg", "width": 300, "height": 300},
        {"id": 1, "file_name": "3.jpg", "width": 300, "height": 300},
        {"id": 3, "file_name": "2.jpg", "width": 300, "height": 300},
    ],
    "categories": [{"id": 1, "name": "dog"}, {"id": 7, "name": "ant"}, {"id": 2, "name": "cat"}],
    "annotations": [
        {
            "id": 1,
            "image_id": 2,
            "category_id": 1,
            "bbox": [10, 20, 50, 60],
            "area": 3000,
            "iscrowd": 0,
        },
        {"id": 2, "image_id": 1, "category_id": 7, "bbox": [30, 20, 100, 120], "area": 10000}
        | {"iscrowd": 0},
        {"id": 3, "image_id": 3, "category_id": 1, "bbox": [5, 5, 20, 20], "area": 200}
        | {"iscrowd": 0},
        {"id": 4, "image_id": 3, "category_id": 1, "bbox": [100, 100, 190, 190], "iscrowd": 1}
        | {"area": 20000},
    ],
}
NAMES = {entry["id"]: entry["file_name"][0] for entry in TRUTH["images"]}
CLASSES = {entry["id"]: entry["name"] for entry in TRUTH["categories"]}
# Every object, and parts of the crowd, which COCO ignores however little they overlap it.
FOUND = [
    {"image_id": 2, "category_id": 1, "bbox": [10, 20, 50, 60], "score": 0.5},
    {"image_id": 1, "category_id": 7, "bbox": [30, 20, 100, 120], "score": 0.9},
    {"image_id": 3, "category_id": 1, "bbox": [5, 5, 20, 20], "score": 0.6},
    *(
        {"image_id": 3, "category_id": 1, "bbox": [110 + 9 * k, 110, 40, 40], "score": 0.95}
        for k in range(4)
    ),
]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def evaluate(tmp_path, *arguments):
    out = tmp_path / "out.json"
    call("evaluate", [*map(str, arguments), "--json", str(out), "--bootstrap", "0"])
    return json.loads(out.read_text())


def detected(entries):
    """As `tract-det detect` writes them: positions of classes, numbers of names, and the names."""
    positions = {name: k for k, name in enumerate(["ant", "bee", "dog"], 1)}
    return [
        entry
        | {"image_id": int(NAMES[entry["image_id"]]), "image_name": NAMES[entry["image_id"]]}
        | {"category_id": positions[CLASSES[entry["category_id"]]]}
        | {"category_name": CLASSES[entry["category_id"]]}
        for entry in entries
    ]


@pytest.fixture
def root(tmp_path):
    write(tmp_path / "data/annotations/instances_val.json", TRUTH)
    return tmp_path / "data"


@pytest.mark.parametrize("form", [lambda entries: entries, detected], ids=["coco's", "detect's"])
def test_a_result_file_gives_the_same_figures_by_the_folder_and_by_the_file(tmp_path, root, form):
    results = write(tmp_path / "results.json", form(FOUND))
    by_folder = evaluate(tmp_path, "--root", root, "--split", "val", "--detections", results)
    truth = root / "annotations/instances_val.json"
    with pytest.warns(UserWarning, match="1 of 3 classes have no objects .*: cat"):
        by_file = evaluate(tmp_path, "--coco-truth", truth, "--detections", results)
    for figures in (by_folder, by_file):
        assert figures["coco"] == pytest.approx(dict.fromkeys(figures["coco"], 100))
    assert by_folder["coco"] == by_file["coco"]
    assert by_folder["voc_area"]["AP"]["ant"] == 100


def test_crowds_and_areas_of_the_file_count_as_in_cocos_own_program(tmp_path, root, capsys):
    results = write(tmp_path / "results.json", FOUND)
    figures = evaluate(tmp_path, "--root", root, "--split", "val", "--detections", results)["coco"]
    coco = COCO(str(root / "annotations/instances_val.json"))
    evaluation = COCOeval(coco, coco.loadRes(str(results)), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    capsys.readouterr()
    assert list(figures.values()) == pytest.approx(100 * evaluation.stats[:6])


def challenge_files(folder, entries, more=()):
    folder.mkdir()
    for name in ("ant", "dog"):
        lines = []
        for entry in entries:
            if CLASSES[entry["category_id"]] == name:
                x, y, w, h = entry["bbox"]
                box = f"{x + 1} {y + 1} {x + w} {y + h}"
                lines.append(f"{NAMES[entry['image_id']]} {entry['score']} {box}\n")
        (folder / f"comp4_det_val_{name}.txt").write_text("".join([*lines, *more]))


def test_the_challenges_files_call_an_image_by_its_name_though_that_is_anothers_id(tmp_path, root):
    found = tmp_path / "found"
    challenge_files(found, FOUND)
    (found / "comp4_det_val_bee.txt").write_text("")
    with pytest.warns(UserWarning, match=r"left out are 1 files of .*comp4_det_val_bee"):
        figures = evaluate(tmp_path, "--root", root, "--split", "val", "--detections", found)
    assert figures["coco"]["AP"] == pytest.approx(100)


@pytest.mark.parametrize("kind", ["coco", "comp4"])
def test_detections_of_other_images_are_left_out_if_they_may_be(tmp_path, root, kind):
    """As of all images in one folder, which has more than a split."""
    other = {"image_id": 99, "image_name": "99", "category_id": 1, "category_name": "dog"}
    others = [
        other | {"bbox": [0, 0, 9, 9], "score": 1.0, "image_name": name} for name in ("4", "5")
    ]
    found = tmp_path / "found"
    if kind == "coco":
        write(found, detected(FOUND) + others)
    else:
        challenge_files(found, FOUND, ["99 1 1 1 9 9\n", "my photo 1 1 1 9 9\n"])
    options = ("--root", root, "--split", "val", "--detections", found)
    with pytest.raises(
        UserError, match=r"is not in the split.* leave out others by --ignore-other"
    ):
        evaluate(tmp_path, *options)
    with pytest.warns(UserWarning, match="left out are [24] of .* detections, of images that"):
        figures = evaluate(tmp_path, *options, "--ignore-other-images")["coco"]
    assert figures == pytest.approx(dict.fromkeys(figures, 100))
    if kind == "coco":
        write(found, others)
        with pytest.raises(UserError, match="none of its images is in the split"):
            evaluate(tmp_path, *options, "--ignore-other-images")


@pytest.mark.parametrize(
    "line",
    [
        *("1 0.5 11 21 60 80 99", "dog 1 0.5 11 21 60 80", "1 0.5 11 21 60 80 2 0.5 1 1 9 9"),
        *("cam/1 0.5 11 21 60 80", "1.jpg 0.5 11 21 60 80", "9 0.5 11 21 60", "9 nan 1 1 9 9"),
    ],
)
def test_a_line_that_may_mean_an_image_of_the_split_is_no_other_image(tmp_path, root, line):
    found = tmp_path / "found"
    challenge_files(found, FOUND, [line + "\n"])
    options = ("--root", root, "--split", "val", "--detections", found, "--ignore-other-images")
    with pytest.raises(UserError, match=r"comp4_det_val_ant\.txt, line 2: "):
        evaluate(tmp_path, *options)


@pytest.mark.parametrize("key", ["image_id", "image_name"])
@pytest.mark.parametrize("name", ["cam/1", "1.jpg", "a/b/1.png", "", " ", True, None, 1.0, [1]])
def test_a_name_that_may_mean_an_image_of_the_split_is_no_other_image(tmp_path, root, key, name):
    """As `tract-det detect` calls an image where another folder has one of the same name."""
    results = write(tmp_path / "results.json", [*FOUND, FOUND[0] | {key: name}])
    options = ("--root", root, "--split", "val", "--detections", results)
    with pytest.raises(UserError, match=f"entry 8: {key} .* is not (in the split|what an image)"):
        evaluate(tmp_path, *options, "--ignore-other-images")


def test_yolos_classes_have_their_number_in_the_list_and_one(tmp_path):
    """Of data without splits a share is held out, as for the training."""
    (tmp_path / "data").mkdir()
    for number in range(10):
        Image.fromarray(np.zeros((100, 200, 3), np.uint8)).save(tmp_path / f"data/{number}.png")
        label = f"{1 - number % 2} 0.5 0.5 0.5 0.5\n"
        (tmp_path / f"data/{number}.txt").write_text(label)
    (tmp_path / "data/classes.txt").write_text("zebra\nape\n")
    entries = [
        {"image_id": number, "category_id": 2 - number % 2, "bbox": [50, 25, 100, 50], "score": 1}
        for number in range(10)
    ]
    data = ("--root", tmp_path / "data", "--split", "test")
    with pytest.raises(UserError, match=r"the data have no splits: set --holdout to the share"):
        evaluate(tmp_path, *data, "--detections", write(tmp_path / "results.json", entries))
    split = read_dataset(["test"], tmp_path / "data", None, holdout=Holdout(0.5, 3))
    ids = {int(annotation.image_id) for annotation in split.annotations}
    assert len(ids) == 5 and len({number % 2 for number in ids}) == 2
    held_out = write(tmp_path / "b.json", [e for e in entries if e["image_id"] in ids])
    data += ("--holdout", 0.5, "--holdout-seed", 3, "--detections")
    assert evaluate(tmp_path, *data, held_out)["voc_area"]["mAP"] == 100
    with pytest.raises(UserError, match=r"results\.json, line 1: entry .*is not in the split"):
        evaluate(tmp_path, *data, tmp_path / "results.json")


def test_yolos_boxes_are_fractions_of_the_images_as_exif_says(tmp_path):
    """Turned upright, the image is 100 wide and 200 high; as it is stored, the other way round."""
    (tmp_path / "data").mkdir()
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    picture = Image.fromarray(np.zeros((100, 200, 3), np.uint8))
    picture.save(tmp_path / "data/a.jpg", exif=exif.tobytes())
    (tmp_path / "data/a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "data/classes.txt").write_text("ape\n")
    for mode, box in (("auto", [25, 50, 50, 100]), ("ignore", [50, 25, 100, 50])):
        entry = {"image_id": "a", "category_id": 1, "bbox": box, "score": 1}
        results = write(tmp_path / "results.json", [entry])
        data = ("--root", tmp_path / "data", "--split", "test", "--holdout", 0.9, "--exif", mode)
        assert evaluate(tmp_path, *data, "--detections", results)["voc_area"]["mAP"] == 100


def test_a_training_evaluates_crowds_and_areas_as_the_command_does(tmp_path, root):
    results = write(tmp_path / "results.json", FOUND)
    options = ("--root", root, "--split", "val", "--detections", results)
    split = read_dataset(["val"], root, None, need_images=False)
    evaluator = DetectionEvaluator(split.annotations, split.class_names)
    for annotation in split.annotations:
        entries = [entry for entry in FOUND if entry["image_id"] == annotation.number]
        boxes = np.array([entry["bbox"] for entry in entries], dtype=float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        names = [CLASSES[entry["category_id"]] for entry in entries]
        labels = [split.class_names.index(name) for name in names]
        scores = [entry["score"] for entry in entries]
        evaluator.add(annotation.image_id, boxes, np.array(scores), np.array(labels))
    figures = evaluator.evaluate()["coco"]
    assert figures == pytest.approx(dict.fromkeys(figures, 100))
    assert figures == evaluate(tmp_path, *options)["coco"]


def test_data_that_number_no_classes_need_them_listed(tmp_path):
    root = tmp_path / "cells"
    (root / "Annotations").mkdir(parents=True)
    (root / "ImageSets/Main").mkdir(parents=True)
    (root / "ImageSets/Main/test.txt").write_text("a\n")
    (root / "Annotations/a.xml").write_text(
        "<annotation><size><width>90</width><height>90</height></size><object><name>cat</name>"
        "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>50</xmax><ymax>50</ymax></bndbox></object>"
        "</annotation>"
    )
    entry = {"image_id": "a", "category_id": 2, "bbox": [0, 0, 50, 50], "score": 1}
    results = write(tmp_path / "results.json", [entry])
    with pytest.raises(UserError, match=r"entry 1: the data do not say .*give --classes, in"):
        evaluate(tmp_path, "--root", root, "--detections", results)
    with pytest.warns(UserWarning, match="1 of 2 classes have no objects"):
        figures = evaluate(
            tmp_path, "--root", root, "--classes", "dog", "cat", "--detections", results
        )
    assert figures["voc_area"]["AP"]["cat"] == 100


def test_errors_name_the_options_of_this_program(tmp_path, root):
    results = write(tmp_path / "results.json", FOUND)
    for options, message in (
        (("--root", tmp_path / "none"), r"none: there is no such folder: correct --root$"),
        (("--root", root, "--split", "val", "--classes", "ant"), r"add the class \(--classes\)"),
        (("--root", root, "--split", "val", "--classes", "a", "a"), r"class list \(--classes\)"),
        (("--devkit", root), "point --devkit or the environment variable"),
    ):
        with pytest.raises(UserError, match=message) as error:
            evaluate(tmp_path, *options, "--detections", results)
        assert "DATASETS." not in str(error.value)
