"""A model that leaves its folder: nothing but the file of its weights is known."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.runs import results
from tract_det import load_classifier, load_detector
from tract_det.errors import UserError
from tract_det.tract import TrActLayer


def challenge_lines(detector, paths):
    """The lines of the challenge's files by class, as the detections of these images make them."""
    lines = {name: [] for name in detector.class_names}
    for path, found in zip(paths, detector(paths), strict=True):
        for box, score, name in zip(found.boxes, found.scores, found.names, strict=True):
            left, top, right, bottom = box.double().tolist()
            corners = (left + 1, top + 1, right, bottom)
            lines[name].append(" ".join([path.stem, repr(score.item()), *map(repr, corners)]))
    return lines


def test_images(tree):
    return sorted((tree / "JPEGImages").glob("b*.png"))


test_images.__test__ = False


@pytest.mark.parametrize("name", ["model_final.pth", "model_best.pth"])
def test_detections_are_those_of_the_evaluation_to_the_last_bit(detector_run, tree, name):
    detector = load_detector(detector_run / name, "cpu")
    for class_name, lines in challenge_lines(detector, test_images(tree)).items():
        file = detector_run / f"detections/comp4_det_test_{class_name}.txt"
        assert file.read_text().splitlines() == lines and lines


def test_a_model_that_was_evaluated_in_bf16_and_channels_last_is_used_so(
    tree, tmp_path, detector_run
):
    from tests.conftest import tiny_options
    from tests.training.runs import run_here

    changes = {"SOLVER__AMP__ENABLED": True, "MODEL__CHANNELS_LAST": True, "SOLVER__MAX_ITER": 1}
    run_here("train", *tiny_options(tree, tmp_path, **changes))
    lines = challenge_lines(load_detector(tmp_path / "model_final.pth", "cpu"), test_images(tree))
    for class_name, expected in lines.items():
        file = tmp_path / f"detections/comp4_det_test_{class_name}.txt"
        assert file.read_text().splitlines() == expected


def test_all_kinds_of_images_give_the_same_detections(detector_run, tree):
    detector = load_detector(str(detector_run / "model_final.pth"), "cpu")
    path = test_images(tree)[0]
    with Image.open(path) as image:
        pixels = np.array(image.convert("RGB"))
        kinds = [path, str(path), image.copy(), pixels, torch.from_numpy(pixels).permute(2, 0, 1)]
    expected, *others = detector(kinds, batch_size=1)
    assert len(expected) and expected.labels.max() < 2
    assert expected.names == [("box", "disc")[label] for label in expected.labels]
    for found in (*others, *map(detector, kinds), detector(kinds[-1][None])[0]):
        assert torch.equal(found.boxes, expected.boxes)
        assert torch.equal(found.scores, expected.scores)
    assert detector([]) == []
    threshold = expected.scores.median().item()
    kept = detector(path, score_threshold=threshold)
    assert len(kept) == (expected.scores >= threshold).sum() < len(expected)


def test_probabilities_are_those_that_the_evaluation_ranks(classifier_run, photographs):
    classifier = load_classifier(classifier_run / "model_final.pth", "cpu")
    paths = sorted((photographs / "val").rglob("*.png"))
    shown = classifier(paths)
    correct = sum(
        image.top(1)[0][0] == path.parent.name for image, path in zip(shown, paths, strict=True)
    )
    assert correct == results(classifier_run)["correct"]["top1"]
    for image in shown:
        assert image.probabilities.sum().item() == pytest.approx(1, abs=1e-6)
        assert [p for _, p in image.top()] == sorted(image.probabilities.tolist(), reverse=True)
    with Image.open(paths[0]) as image:
        again = classifier(image.convert("RGB"), batch_size=1)
    torch.testing.assert_close(again.probabilities, shown[0].probabilities)


def test_the_model_is_plain_and_the_random_state_stays(detector_run):
    before = torch.get_rng_state()
    network = load_detector(detector_run / "model_final.pth", "cpu").network
    assert torch.equal(before, torch.get_rng_state())
    assert not any(isinstance(module, TrActLayer) for module in network.modules())
    assert not network.training


def changed(run, folder, change, name="model_final.pth"):
    content = torch.load(run / name, weights_only=True)
    change(content)
    torch.save(content, folder / "weights.pth")
    return folder / "weights.pth"


NEW_KEYS = ("min_size", "max_size", "proposals", "box_head", "fpn_channels", "amp", "max_pixels")


def without_new_keys(content):
    for key in (*NEW_KEYS, "channels_last", "batch_size"):
        del content["meta"][key]


def test_weights_of_earlier_versions_need_the_runs_config_and_then_give_the_same(
    detector_run, tree, tmp_path
):
    path = changed(detector_run, tmp_path, without_new_keys)
    with pytest.raises(UserError, match=r"lack max_pixels, .*proposals.*: give the run's config"):
        load_detector(path, "cpu")
    old = load_detector(path, "cpu", config_file=detector_run / "config.yaml")
    new = load_detector(detector_run / "model_final.pth", "cpu")
    assert challenge_lines(old, test_images(tree)) == challenge_lines(new, test_images(tree))


def meta(**values):
    return lambda content: content["meta"].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (meta(fpn_channels=10**6), "'backbone.fpn.*' is not that of the model"),
        (meta(fpn_channels=10**15), "'fpn_channels' in its metadata is 1000000000000000"),
        (meta(backbone="resnet50_fpn"), "is not that of the model"),
        (meta(backbone="os.system"), "'backbone' in its metadata"),
        (meta(proposals={}), "'proposals' in its metadata"),
        (meta(min_size="8"), "'min_size' in its metadata"),
        (meta(class_names=["box"]), "is not that of the model"),
        (lambda content: content["meta"].pop("class_names"), "does not name its classes"),
        (lambda content: content["model"].popitem(), "is not that of the model"),
        (
            lambda content: content["model"]["rpn.head.cls_logits.bias"].fill_(float("nan")),
            "not finite",
        ),
        (
            meta(detectron2={"CONFIG_FILE": "/tmp/program.py", "OPTS": []}),
            "the program /tmp/program.py describes: to run it",
        ),
    ],
)
def test_a_file_that_describes_no_model_is_refused_in_a_line(
    detector_run, tmp_path, change, message
):
    path = changed(detector_run, tmp_path, change)
    with pytest.raises(UserError, match=message) as error:
        load_detector(path, "cpu")
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_each_kind_of_weights_names_the_function_that_loads_it(detector_run, classifier_run):
    with pytest.raises(UserError, match="classifier's weights: use load_classifier"):
        load_detector(classifier_run / "model_final.pth")
    with pytest.raises(UserError, match="detector's weights: use load_detector"):
        load_classifier(detector_run / "model_final.pth")
    with pytest.raises(UserError, match=r"nowhere.pth is not a file"):
        load_detector("nowhere.pth")
    with pytest.raises(UserError, match="device tpu0 is unknown"):
        load_detector(detector_run / "model_final.pth", "tpu0")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8, 3)), r"float64 \(8, 8, 3\)"),
        (np.zeros((8, 8), np.uint8), r"uint8 \(8, 8\)"),
        (torch.zeros(8, 8, 3), r"torch.float32 \(8, 8, 3\)"),
        (torch.full((3, 8, 8), 255.0), r"outside \[0, 1\]"),
        (7, "an image is int"),
        ("nowhere.png", r"nowhere.png: the image cannot be read"),
    ],
)
def test_what_is_no_image_is_refused_in_a_line(detector_run, image, message):
    detector = load_detector(detector_run / "model_final.pth", "cpu")
    with pytest.raises(UserError, match=message):
        detector([image])


def test_importing_the_package_loads_nothing_heavy():
    program = "import sys, tract_det; print(json.dumps('torch' in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", f"import json; {program}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) is False
    assert {"load_detector", "load_classifier"} <= set(__import__("tract_det").__all__)


def test_loading_a_detector_imports_neither_deepspeed_nor_timm(detector_run):
    program = (
        "import sys; from tract_det import load_detector;"
        f"load_detector({str(detector_run / 'model_final.pth')!r}, 'cpu');"
        "print([name for name in ('deepspeed', 'timm', 'fvcore') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"\[\]\s*", done.stdout)
