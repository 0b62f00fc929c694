"""Files of weights as other programs write them, and as nobody should."""

import argparse
import zipfile
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from tract_det.errors import UserError
from tract_det.modeling.faster_rcnn import build_faster_rcnn
from tract_det.modeling.loading import load_into
from tract_det.modeling.weight_files import read_weights

STATE = nn.Conv2d(3, 2, 3).state_dict()


def read(path, content):
    torch.save(content, path)
    return read_weights(str(path))


def refusal(path, content):
    with pytest.raises(UserError) as caught:
        read(path, content)
    message = str(caught.value)
    assert message.startswith(f"MODEL.WEIGHTS {path}") and "\n" not in message
    return message


@pytest.fixture
def path(tmp_path):
    return tmp_path / "w.pth"


def test_command_lines_and_paths_beside_the_tensors_are_passed_over(path):
    arguments = argparse.Namespace(lr=0.1, data=Path("somewhere"))
    weights = read(path, {"model": STATE, "args": arguments, "epoch": 3})
    assert list(weights.state) == list(STATE)


def test_an_object_of_another_kind_is_refused_by_its_class(path):
    message = refusal(path, {"model": STATE, "scaler": nn.ReLU()})
    assert "an object of torch.nn.modules.activation.ReLU" in message
    assert "torch.save({'model'" in message and "\x1b" not in message


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_the_prefix_of_a_wrapper_is_taken_off_and_said(path, prefix):
    with pytest.warns(UserWarning, match=r"lost the prefix"):
        weights = read(path, {f"{prefix}{key}": tensor for key, tensor in STATE.items()})
    assert list(weights.state) == list(STATE)


def test_a_backbone_beside_a_head_is_found_and_a_detectors_is_left(path):
    with pytest.warns(UserWarning, match=r"lost the prefix backbone\."):
        weights = read(
            path, {"backbone.conv1.weight": STATE["weight"], "head.fc.weight": STATE["weight"]}
        )
    assert list(weights.state) == ["conv1.weight", "head.fc.weight"]
    keys = ["backbone.body.conv1.weight", "rpn.head.conv.weight"]
    assert list(read(path, dict.fromkeys(keys, STATE["weight"])).state) == keys


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.eye(3).to_sparse(), "quantised or sparse"),
        (torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8), "quantised or sparse"),
        (torch.eye(3, dtype=torch.complex64), "is complex"),
        (torch.zeros(1).expand(2**40), "repeats its values"),
    ],
    ids=["sparse", "quantised", "complex", "stride-0"],
)
def test_a_tensor_that_is_no_weight_is_refused_by_name(path, tensor, words):
    assert words in refusal(path, {"fine": torch.ones(2), "layer.weight": tensor})


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        (
            {"pixel_mean": "imagenet"},
            "'pixel_mean' in its metadata is 'imagenet', not a number for each",
        ),
        ({"pixel_mean": [1.0, 2.0]}, "have 2 and 0 numbers, not one for each channel"),
        ({"pixel_mean": [], "pixel_std": []}, "not a number for each channel"),
        ({"pixel_mean": [1.0, 2.0, float("nan")]}, "not a number for each channel"),
        ({"pixel_std": [1.0, 0.0, 1.0]}, "not a positive number for each"),
        ({"class_names": "cat"}, "'class_names' in its metadata is 'cat', not a list of names"),
        ({"class_names": [1, 2]}, "not a list of names"),
        ({"backbone": 5}, "'backbone' in its metadata is 5, not a text"),
    ],
)
def test_metadata_of_another_type_is_refused_by_its_entry(path, meta, words):
    assert words in refusal(path, {"model": STATE, "meta": meta})


def test_a_file_that_inflates_is_refused_before_it_is_read(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as parts:
        parts.writestr("archive/data.pkl", b"\0" * 2**25)
    with pytest.raises(UserError, match="compressed to a fraction of their 33,554,432 bytes"):
        read_weights(str(path))


def test_a_file_of_a_later_form_of_zip_is_refused_since_its_size_cannot_be_told(path):
    torch.save({"w": torch.zeros(3)}, path)
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\x01\x02")  # of the central directory
    data[entry + 6] = 99  # the version that reading it takes, times ten
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"zip file version 9\.9, as torch never writes it"):
        read_weights(str(path))


def test_values_that_are_not_finite_are_named_and_so_is_another_depth():
    with torch.device("meta"):
        detector = build_faster_rcnn(backbone="resnet18_fpn", num_classes=2)
    detector.to_empty(device="cpu")
    state = torchvision.models.resnet18().state_dict()
    state["layer1.0.conv1.weight"][0] = torch.nan
    with pytest.raises(UserError, match=r"'backbone\.body\.layer1\.0\.conv1\.weight' has values"):
        load_into(detector, weights_of(state), ("a", "b"))
    with torch.device("meta"):
        deeper = torchvision.models.resnet34().state_dict()
    zeros = {key: torch.zeros(tensor.shape) for key, tensor in deeper.items()}
    with pytest.raises(UserError, match=r"it is deeper, with 'backbone\.body\.layer1\.2\."):
        load_into(detector, weights_of(zeros), ("a", "b"))


def weights_of(state):
    from tract_det.modeling.weight_files import Weights

    return Weights("w.pth", dict(state), {})
