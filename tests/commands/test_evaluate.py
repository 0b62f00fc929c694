"""The tool from the command line, on devkits of a few XML files, without images or a model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tract_det.cli import call
from tract_det.data.voc import VOC_CLASSES
from tract_det.errors import UserError
from tract_det.evaluation.metrics import METRICS

TOOL = Path(__file__).parents[2] / "tools" / "evaluate_voc.py"


def main(arguments):
    call("evaluate", arguments)


OBJECT = (
    "<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin>"
    "<xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)
# Two cats, one of them difficult, and two dogs. Boxes as in the files: 1-based, inclusive.
IMAGES = {
    "000001": [("cat", 0, 1, 1, 100, 100), ("dog", 0, 201, 1, 300, 100)],
    "000002": [("cat", 1, 1, 1, 100, 100)],
    "000003": [("dog", 0, 1, 1, 100, 100)],
}
# The easy cat by a box of IoU 0.5, the difficult one, and one dog of two.
CATS = "000001 0.9 1 1 100 50\n000002 0.95 1 1 100 100\n"
DOGS = "000001 0.8 201 1 300 100\n"


def write_tree(root: Path) -> Path:
    """Annotations and a split "test"; no images."""
    (root / "Annotations").mkdir(parents=True)
    (root / "ImageSets" / "Main").mkdir(parents=True)
    size = "<size><width>400</width><height>300</height><depth>3</depth></size>"
    for image_id, objects in IMAGES.items():
        body = "".join(OBJECT.format(*one) for one in objects)
        xml = f"<annotation><filename>{image_id}.jpg</filename>{size}{body}</annotation>"
        (root / "Annotations" / f"{image_id}.xml").write_text(xml)
    (root / "ImageSets" / "Main" / "test.txt").write_text("\n".join(IMAGES) + "\n")
    return root


def write_detections(folder: Path, classes: tuple[str, ...]) -> Path:
    folder.mkdir()
    for name in classes:
        lines = {"cat": CATS, "dog": DOGS}.get(name, "")
        (folder / f"comp4_det_test_{name}.txt").write_text(lines)
    return folder


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    """The tool in a process of its own, started in a folder that is not the repository."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_devkit_is_evaluated_over_its_twenty_classes(tmp_path):
    write_tree(tmp_path / "VOCdevkit" / "VOC2007")
    write_detections(tmp_path / "found", VOC_CLASSES)
    done = run(
        *("--devkit", tmp_path, "--year", 2007, "--split", "test"),
        *("--detections", "found", "--json", "out/voc.json"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "voc.json").read_text())
    assert (results["images"], results["rule"]) == (3, "devkit")
    assert list(results["voc_07"]["AP"]) == list(VOC_CLASSES)
    assert results["voc_07"]["AP"]["cat"] == pytest.approx(100)
    assert results["voc_07"]["AP"]["dog"] == pytest.approx(600 / 11)
    assert results["voc_07"]["AP"]["person"] is None
    assert results["voc_area"]["mAP"] == pytest.approx(75)
    assert results["coco"]["AP50"] == pytest.approx((100 + 5100 / 101) / 2)
    assert "devkit rule" in done.stdout
    assert ["dog", "54.55", "54.55", "50.00", "50.00"] in map(str.split, done.stdout.splitlines())
    assert "18 of 20 classes have no objects" in done.stderr


def test_error_is_one_line_with_exit_code_one_and_no_output_file(tmp_path):
    write_tree(tmp_path / "cells")
    path = write_detections(tmp_path / "found", ("cat", "dog")) / "comp4_det_test_dog.txt"
    path.write_text(DOGS + "000009 0.8 1 1 10 10\n")
    done = run(
        *("--root", "cells", "--split", "test", "--detections", path.parent, "--json", "out.json"),
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {path}, line 2: image '000009' is not in the split")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert not (tmp_path / "out.json").exists()


def test_classes_of_a_custom_tree_are_those_in_the_split(tmp_path, capsys):
    arguments = [
        *("--root", str(write_tree(tmp_path / "cells")), "--json", str(tmp_path / "out.json")),
        *("--detections", str(write_detections(tmp_path / "found", ("cat", "dog")))),
    ]
    main(arguments)
    results = json.loads((tmp_path / "out.json").read_text())
    assert list(results["voc_area"]["AP"]) == ["cat", "dog"]
    assert results["voc_area"]["mAP"] == pytest.approx(75)
    main([*arguments, "--rule", "detectron2"])
    assert "detectron2 rule" in capsys.readouterr().out
    strict = json.loads((tmp_path / "out.json").read_text())
    assert strict["voc_area"]["AP"]["cat"] == 0  # an IoU of exactly one half


def test_given_classes_are_evaluated_in_their_order(tmp_path):
    root = write_tree(tmp_path / "cells")
    found = write_detections(tmp_path / "found", ("dog", "cat", "cow"))
    with pytest.warns(UserWarning, match="1 of 3 classes .*: cow"):
        main(
            [
                *("--root", str(root), "--detections", str(found)),
                *("--classes", "dog", "cat", "cow", "--json", str(tmp_path / "out.json")),
            ]
        )
    results = json.loads((tmp_path / "out.json").read_text())
    assert list(results["voc_area"]["AP"].items()) == [("dog", 50), ("cat", 100), ("cow", None)]


def test_the_json_has_classes_mistakes_confusion_and_intervals(tmp_path, capsys):
    arguments = [
        *("--root", str(write_tree(tmp_path / "cells")), "--json", str(tmp_path / "out.json")),
        *("--detections", str(write_detections(tmp_path / "found", ("cat", "dog")))),
    ]
    main([*arguments, "--bootstrap", "50"])
    results = json.loads((tmp_path / "out.json").read_text())
    dog = results["classes"]["dog"]
    assert (dog["objects"], dog["difficult"], dog["detections"]) == (2, 0, 1)
    assert (dog["f1"], dog["score"], dog["recall"]) == pytest.approx((200 / 3, 0.8, 50))
    assert (results["classes"]["cat"]["objects"], results["classes"]["cat"]["difficult"]) == (1, 1)
    assert results["errors"]["missed"] == pytest.approx(
        {"count": 1, "voc_07": 100 * 5 / 22, "voc_area": 25}
    )
    assert results["confusion"]["classes"] == ["cat", "dog", "background"]
    assert results["confusion"]["matrix"] == [[1, 0, 0], [0, 1, 1], [0, 0, 0]]
    assert results["intervals"]["samples"] == 50
    assert set(METRICS) < set(results["intervals"])
    low, high = results["intervals"]["voc_area.mAP"]
    assert low <= 75 <= high
    printed = capsys.readouterr().out
    assert "95% intervals, images resampled 50 times" in printed
    assert "too narrow, perhaps: objects in fewer than 5 images have cat, dog" in printed
    main([*arguments, "--bootstrap", "0"])
    assert "intervals" not in json.loads((tmp_path / "out.json").read_text())


def test_detections_are_compared_with_others_of_the_split(tmp_path, capsys):
    found = write_detections(tmp_path / "found", ("cat", "dog"))
    other = write_detections(tmp_path / "other", ("cat", "dog"))
    (other / "comp4_det_test_dog.txt").write_text("")
    arguments = ["--root", str(write_tree(tmp_path / "cells")), "--bootstrap", "40"]
    out = ["--json", str(tmp_path / "out.json")]
    main([*arguments, *out, "--detections", str(found), "--against", str(other)])
    against = json.loads((tmp_path / "out.json").read_text())["against"]
    assert against["detections"] == str(other)
    assert against["voc_area.mAP"]["difference"] == pytest.approx(25)
    assert against["voc_area.mAP"]["p"] > 0.4
    assert against["images_that_differ"] == 1
    printed = capsys.readouterr().out
    assert f"minus {other}" in printed and "detections differ in 1 of 3 images" in printed
    main([*arguments, *out, "--detections", str(found), "--against", str(found)])
    against = json.loads((tmp_path / "out.json").read_text())["against"]
    assert against["voc_07.mAP"] == {"difference": 0, "interval": [0, 0], "p": 1}


def test_coco_files_give_the_figures_of_the_challenges_files(tmp_path):
    """Both kinds of detections, with both kinds of ground truth."""
    root = write_tree(tmp_path / "cells")
    found = write_detections(tmp_path / "found", ("cat", "dog"))
    numbers = {"cat": 1, "dog": 2}
    objects = [
        {"image_id": int(image_id), "category_id": numbers[name], "ignore": difficult}
        | {"bbox": [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]}
        for image_id, entries in IMAGES.items()
        for name, difficult, x1, y1, x2, y2 in entries
    ]
    truth = {
        "images": [{"id": int(name), "file_name": f"{name}.jpg"} for name in IMAGES],
        "categories": [{"id": number, "name": name} for name, number in numbers.items()],
        "annotations": objects,
    }
    rows = [("cat", line.split()) for line in CATS.splitlines()]
    rows += [("dog", line.split()) for line in DOGS.splitlines()]
    results = []
    for name, (image_id, score, *box) in rows:
        x1, y1, x2, y2 = map(float, box)
        entry = {"image_id": int(image_id), "category_id": numbers[name], "score": float(score)}
        results.append(entry | {"bbox": [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]})
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "results.json").write_text(json.dumps(results))
    outputs = []
    classes = ["--classes", "cat", "dog"]
    for data in (("--root", root, *classes), ("--coco-truth", tmp_path / "truth.json")):
        for detections in (found, tmp_path / "results.json"):
            out = tmp_path / "out.json"
            main(list(map(str, (*data, "--detections", detections, "--json", out))))
            outputs.append(json.loads(out.read_text()))
    assert outputs[0]["voc_area"]["mAP"] == pytest.approx(75)
    assert all(output == outputs[0] for output in outputs[1:])


def test_pycocotools_gives_the_same_figures(tmp_path):
    arguments = [
        *("--root", str(write_tree(tmp_path / "cells")), "--json", str(tmp_path / "out.json")),
        *("--detections", str(write_detections(tmp_path / "found", ("cat", "dog")))),
    ]
    figures = []
    for option in ([], ["--pycocotools"]):
        main([*arguments, *option, "--bootstrap", "0"])
        figures.append(json.loads((tmp_path / "out.json").read_text())["coco"])
    assert figures[0] == pytest.approx(figures[1], abs=1e-9)


def test_missing_devkit_split_and_detections_are_errors_that_name_them(tmp_path):
    root = write_tree(tmp_path / "cells")
    found = str(write_detections(tmp_path / "found", ("cat", "dog")))
    with pytest.raises(UserError, match="VOC2012"):
        main(["--devkit", str(tmp_path), "--year", "2012", "--detections", found])
    with pytest.raises(UserError, match=r"val\.txt"):
        main(["--root", str(root), "--split", "val", "--detections", found])
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        main(["--root", str(root), "--detections", str(tmp_path / "nowhere")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devkit", "d", "--classes", "cat"], "--classes goes with --root"),
        (["--root", "r", "--year", "2007"], "--year goes with --devkit"),
        (["--root", "r", "--devkit", "d"], "not allowed with"),
        (["--coco-truth", "f", "--classes", "cat"], "--classes goes with --root"),
        (["--root", "r", "--against", "d", "--bootstrap", "0"], "--against needs --bootstrap"),
        (["--root", "r", "--bootstrap", "1"], "--bootstrap is a number of samples from 20, or 0"),
        (["--root", "r", "--bootstrap", "-1"], "--bootstrap is a number of samples"),
        (["--devkit", "d", "--holdout", "0.2"], "--holdout goes with --root"),
        (["--coco-truth", "f", "--exif", "ignore"], "--exif goes with --root"),
        (["--root", "r", "--holdout", "1"], "--holdout is a share, from 0 to below 1"),
        ([], "one of the arguments --devkit --root --coco-truth is required"),
    ],
)
def test_contradictory_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--detections", "x"])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
