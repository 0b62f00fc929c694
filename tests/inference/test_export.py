"""`tract-det export`: the files in their own runtimes give what the model gives."""

import json
from pathlib import Path

import pytest
import torch

from tests.training.runs import run_here
from tract_det import load_classifier, load_detector
from tract_det.cli import call
from tract_det.engine.checkpoint import save_weights
from tract_det.errors import UserError
from tract_det.inference import export
from tract_det.inference.models import Detections
from tract_det.inference.parity import of as parity_of
from tract_det.inference.samples import made
from tract_det.modeling.saved import detector_of

SUFFIXES = {"onnx": "onnx", "torchscript": "pt", "pt2": "pt2"}


def exported(run, folder, form, *arguments):
    """The file, what was printed, and the report."""
    path = folder / f"model.{SUFFIXES[form]}"
    printed = run_here(
        "export", "--weights", run / "model_final.pth", "--format", form, "--out", path, *arguments
    )
    return path, printed, json.loads(Path(f"{path}.json").read_text())


def test_a_detector_in_torchscript_detects_the_same_in_photographs(detector_run, tree, tmp_path):
    images = tree / "JPEGImages"
    path, printed, report = exported(
        detector_run, tmp_path, "torchscript", "--size", "96x96", "--images", images, "--count", 3
    )
    assert "parity passed: " in printed and "of 96 x 96 pixels" in printed
    parity = report["parity"]
    assert parity["passed"] and parity["images"] == 3 and parity["results"] > 10
    assert parity["unmatched"] == 0 and parity["box_difference"] <= 0.5
    assert parity["score_difference"] <= 1e-3
    extra = {export.METADATA: ""}
    loaded = torch.jit.load(str(path), _extra_files=extra)
    metadata = json.loads(extra[export.METADATA])
    assert metadata["class_names"] == ["box", "disc"] and metadata["size"] == [96, 96]
    assert metadata["pixel_mean"] == pytest.approx([123.675, 116.28, 103.53])
    kinds = {node.kind() for node in loaded.inlined_graph.nodes()}
    assert "aten::_convolution" in kinds and not any("tract" in kind for kind in kinds)


@pytest.mark.parametrize("form", ["onnx", "torchscript", "pt2"])
def test_a_classifier_gives_the_same_probabilities_for_batches(
    classifier_run, photographs, tmp_path, form
):
    if form == "onnx":
        pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    images = photographs / "val"
    path, printed, report = exported(
        classifier_run, tmp_path, form, "--images", images, "--count", 5
    )
    assert "parity passed: 5 results" in printed and report["parity"]["score_difference"] < 1e-4
    assert report["class_names"] == ["ant", "bee", "cat", "dog"]
    if form == "torchscript":
        return
    classifier = load_classifier(classifier_run / "model_final.pth", "cpu")
    batch = torch.stack([classifier.pixels(path) for path in sorted(images.rglob("*.png"))[:7]])
    torch.testing.assert_close(
        export.reader(form, path)(batch)[0], classifier.probabilities(batch), rtol=0, atol=1e-4
    )
    if form == "onnx":
        import onnx

        model = onnx.load(path)
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        assert json.loads(metadata["class_names"]) == ["ant", "bee", "cat", "dog"]
        assert "uint8 (B, 3, 32, 32), RGB, 0 to 255" in metadata["input"]
        assert {node.domain for node in model.graph.node} == {""}


def shifted(pixels=0.0, score=0.0, drop=0, labels=0):
    """A detector's own answers, changed."""

    def run_of(detector):
        def run(image):
            own: Detections = detector.detect([image])[0]
            keep = slice(drop, None)
            return own.boxes[keep] + pixels, own.labels[keep] + labels, own.scores[keep] + score

        return run

    return run_of


@pytest.mark.parametrize(
    ("change", "passes"),
    [
        ({}, True),
        ({"pixels": 0.4, "score": 9e-4}, True),
        ({"pixels": 0.6}, False),
        ({"score": 2e-3}, False),
        ({"drop": 1}, False),
        ({"labels": 7}, False),
    ],
)
def test_parity_fails_for_every_difference_beyond_tolerance(detector_run, change, passes):
    detector = load_detector(detector_run / "model_final.pth", "cpu")
    detector.meta["box_head"]["score_thresh"] = 0.0
    detector.network.roi_heads.detections_per_img = 5
    parity = parity_of(detector, shifted(**change)(detector), made(2, (96, 96)))
    assert parity.results > 4 and parity.passed == passes
    assert ("passed" in str(parity)) == passes


def test_the_exit_code_says_that_parity_fails(detector_run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        export, "reader", lambda form, path: lambda image: (torch.zeros(0, 4), *torch.zeros(2, 0))
    )
    out = tmp_path / "model.pt"
    arguments = ("--weights", detector_run / "model_final.pth", "--format", "torchscript")
    code = call("export", [*map(str, arguments), "--size", "96x96", "--out", str(out)])
    assert code == 1
    assert json.loads(Path(f"{out}.json").read_text())["parity"]["passed"] is False


def test_what_cannot_be_exported_is_refused_in_a_line(
    detector_run, classifier_run, tmp_path, monkeypatch
):
    def message(run, form, *arguments):
        with pytest.raises(UserError) as error:
            exported(run, tmp_path, form, *arguments)
        assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
        return str(error.value)

    assert "has one size of images: give --size" in message(detector_run, "torchscript")
    assert "leave it out" in message(classifier_run, "pt2", "--size", "64x64")
    assert "nowhere.png: does not exist" in message(detector_run, "pt2", "--images", "nowhere.png")
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    wanted = "needs onnxscript, which is not installed: pip install 'tract-det[export]'"
    assert message(detector_run, "onnx").endswith(wanted)
    for wrong in (["--size", "8x8"], ["--size", "96"], ["--count", "0"], ["--out", "m.bin"]):
        with pytest.raises(SystemExit):
            exported(detector_run, tmp_path, "pt2", *wrong)


SIZES = [(96, 128), (240, 161), (120, 140)]


def saved_detector(detector_run, folder, backbone):
    """Weights of a detector with this backbone, whose random scores are spread."""
    meta = torch.load(detector_run / "model_final.pth", weights_only=True)["meta"]
    meta |= {"backbone": backbone, "norm": "BN", "freeze_at": 0}
    torch.manual_seed(0)
    model = detector_of(meta)
    for layer in (model.roi_heads.box_predictor.cls_score, model.rpn.head.cls_logits):
        torch.nn.init.normal_(layer.weight, std=0.3 if backbone != "vgg16" else 0.1)
    save_weights(folder / "model_final.pth", model, meta)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "form"),
    [
        ("resnet18_fpn", "onnx"),
        ("resnet18_fpn", "pt2"),
        ("vgg16", "onnx"),
        ("vgg16", "torchscript"),
    ],
)
def test_detectors_of_both_backbones_detect_the_same_at_three_sizes(
    detector_run, tmp_path, backbone, form
):
    if form == "onnx":
        pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    run = saved_detector(detector_run, tmp_path, backbone)
    fixed = ("--size", "96x128") if form == "torchscript" else ()
    path, _, report = exported(run, tmp_path, form, *fixed)
    assert report["size"] == ([96, 128] if fixed else "any")
    detector = load_detector(run / "model_final.pth", "cpu")
    images = [image for size in (SIZES[:1] if fixed else SIZES) for image in made(1, size)]
    parity = parity_of(detector, export.reader(form, path), images)
    assert parity.passed and parity.results > 5 * len(images), str(parity)


def test_an_input_that_an_exported_file_refuses_is_named_in_a_line(classifier_run, tmp_path):
    path, *_ = exported(classifier_run, tmp_path, "pt2")
    with pytest.raises(UserError, match=r"model.pt2 refuses an input of shape \(2, 3, 8, 9\)"):
        export.reader("pt2", path)(torch.zeros(2, 3, 8, 9, dtype=torch.uint8))
