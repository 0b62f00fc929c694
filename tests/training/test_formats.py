"""A training is the same in whatever format its data are."""

import json

import pytest

from tests.conftest import tiny_options
from tests.data.formats import FORMS
from tests.training.runs import assert_same_bits, log, results, run_here
from tract_det.cli import call
from tract_det.data.datasets import read_dataset

pytestmark = pytest.mark.slow

CHANGES = {"SOLVER__MAX_ITER": 10, "LOG_PERIOD": 1, "MODEL__TRACT__ENABLED": True}


@pytest.fixture(scope="module")
def splits(voc_tree):
    train = read_dataset(["train"], voc_tree, None)
    return [train, read_dataset(["test"], voc_tree, train.class_names)]


@pytest.fixture(scope="module")
def expected(voc_tree, tmp_path_factory):
    output = tmp_path_factory.mktemp("voc") / "out"
    run_here("train", *tiny_options(voc_tree, output, **CHANGES))
    return output


@pytest.mark.parametrize("form", ["coco_roboflow", "yolo_ultralytics", "voc_roboflow"])
def test_ten_steps_and_the_results_are_those_of_the_tree_of_voc(
    expected, splits, tmp_path, capsys, form
):
    FORMS[form](tmp_path / "data", splits)
    output = tmp_path / "out"
    printed = run_here("train", *tiny_options(tmp_path / "data", output, **CHANGES))
    assert f"train: {form.partition('_')[0].upper()}, {tmp_path / 'data'}" in printed
    assert log(output) == log(expected) and results(output) == results(expected)
    assert_same_bits(output, expected, ["model_final.pth"])
    figures = results(output)
    command = ["--root", str(tmp_path / "data"), "--detections", str(output / "detections")]
    call("evaluate", [*command, "--json", str(tmp_path / "again.json"), "--bootstrap", "0"])
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["images"] == figures["images"]
    assert again["voc_area"]["AP"] == pytest.approx(figures["voc_area"]["AP"], abs=1e-9)
