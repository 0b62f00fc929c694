"""A converted file is the same network under other names, and reading it runs no code."""

import io
import os
import pickle
import pickletools
from collections import OrderedDict

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

from tract_det.errors import UserError
from tract_det.modeling.classifiers import build_classifier
from tract_det.modeling.detectron2_files import _ArraysOnly, read_pickle
from tract_det.modeling.faster_rcnn import build_faster_rcnn
from tract_det.modeling.forms import flip_stem, to_form, to_torchvision
from tract_det.modeling.heads import BoxHeadOptions
from tract_det.modeling.loading import load_into
from tract_det.modeling.weight_files import read_weights, write_weights

META = {
    "model": "resnet10",
    "class_names": ["a", "b"],
    "pixel_mean": [123.675, 116.28, 1 / 3],
    "pixel_std": [58.395, 57.12, 57.375],
}


@pytest.fixture(scope="module")
def resnet():
    """A narrow ResNet-10 with a 7x7 stem, and running statistics of its own."""
    torch.manual_seed(0)
    model = build_classifier("resnet10", 2, width=8)
    model(torch.randn(4, 3, 64, 64))
    return model


@pytest.fixture(scope="module")
def vgg():
    """The names of VGG-16 with a width of 2: conv and linear weights, small."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        keys = torchvision.models.vgg16(weights=None).state_dict()
    shapes = {"classifier.0.weight": (4, 2 * 49), "classifier.3.weight": (4, 4)}
    return {
        key: torch.randn(
            shapes.get(key, (2, 3 if "s.0." in key else 2, 3, 3) if value.dim() == 4 else (2,)),
            generator=generator,
        )
        for key, value in keys.items()
    }


FORMS = [
    ("torchvision", "w.pth", "RGB"),
    ("timm", "w.pth", "RGB"),
    ("timm", "w.safetensors", "RGB"),
    ("detectron2", "w.pkl", "RGB"),
    ("detectron2", "w.pkl", "BGR"),
]


def assert_identical(one, other):
    assert list(one) == list(other)
    for key, tensor in one.items():
        assert tensor.dtype == other[key].dtype and torch.equal(tensor, other[key]), key
        assert tensor.shape == other[key].shape, key


@pytest.mark.parametrize(("form", "file", "channels"), FORMS)
@pytest.mark.parametrize("network", ["resnet", "vgg"])
def test_a_round_trip_keeps_bits_keys_order_and_statistics(
    form, file, channels, network, resnet, vgg, tmp_path
):
    state = resnet.state_dict() if network == "resnet" else vgg
    write_weights(tmp_path / file, state, META, form, channels=channels)
    weights = read_weights(str(tmp_path / file))
    assert_identical(to_torchvision(weights.state), state)
    assert weights.meta == META
    write_weights(tmp_path / "back.pth", weights.state, weights.meta, "torchvision")
    back = read_weights(str(tmp_path / "back.pth"))
    assert_identical(back.state, state)
    assert back.meta == META
    assert not list(tmp_path.glob(".*"))


def test_the_names_are_those_of_detectron2s_own_converter(resnet):
    # Spelled out from detectron2's tools/convert-torchvision-to-d2.py: a chain of replacements.
    def theirs(key):
        key = key if "layer" in key else f"stem.{key}"
        for i in (1, 2, 3, 4):
            key = key.replace(f"layer{i}", f"res{i + 1}")
        for i in (1, 2, 3):
            key = key.replace(f"bn{i}", f"conv{i}.norm")
        return key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")

    for state in (resnet.state_dict(), torchvision.models.resnet50(weights=None).state_dict()):
        ours = to_form(state, "detectron2", "w")
        expected = [theirs(key).replace("stem.fc.", "linear.") for key in state]
        assert list(ours) == expected


def test_the_names_of_a_vgg_are_those_of_tract_dets_in_detectron2(vgg):
    numbered = {"classifier.0": "fc6", "classifier.3": "fc7", "classifier.6": "fc8"}
    names = [key.rsplit(".", 1) for key in vgg]
    expected = [f"{numbered.get(module, module)}.{tensor}" for module, tensor in names]
    assert list(to_form(vgg, "detectron2", "w")) == expected
    assert list(to_form(to_form(vgg, "timm", "w"), "detectron2", "w")) == expected


def test_a_vgg_without_its_fully_connected_layers_keeps_what_it_has(vgg, tmp_path):
    """For small images; of features alone; and with NaN, as IMAGENET1K_FEATURES has it."""
    features = {key: value for key, value in vgg.items() if key.startswith("features.")}
    small = {**features, "classifier.weight": torch.ones(2, 2), "classifier.bias": torch.ones(2)}
    lacking = {k: v if k in features else torch.full_like(v, torch.nan) for k, v in vgg.items()}
    for state, kept in ((features, features), (small, small), (lacking, features)):
        write_weights(tmp_path / "w.pkl", state, META, "detectron2")
        assert_identical(read_weights(str(tmp_path / "w.pkl")).state, kept)


def test_a_vggs_pkl_with_torchvisions_names_is_still_read(vgg, tmp_path):
    content = {"model": {k: v.numpy() for k, v in vgg.items()}, "__author__": "a", "FORMAT": "RGB"}
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(content))
    assert_identical(read_weights(str(tmp_path / "w.pkl")).state, vgg)


def test_timms_models_take_what_is_written_for_them(tmp_path):
    torch.manual_seed(0)
    for name in ("resnet18", "vgg11"):
        with torch.device("meta"):
            theirs = timm.create_model(name, num_classes=2)
            ours = torchvision.models.get_model(name, weights=None, num_classes=2)
        state = to_form(ours.state_dict(), "timm", name)
        assert {k: v.shape for k, v in state.items()} == {
            k: v.shape for k, v in theirs.state_dict().items()
        }


def test_a_file_in_torchvisions_form_is_a_state_dict_for_torchvision_and_timm(resnet, tmp_path):
    path = tmp_path / "w.pth"
    write_weights(path, resnet.state_dict(), META, "torchvision")
    other = build_classifier("resnet10", 2, width=8)
    other.load_state_dict(torch.load(path, weights_only=True))
    assert_identical(other.state_dict(), resnet.state_dict())
    assert_identical(dict(timm.models.load_state_dict(str(path))), resnet.state_dict())
    write_weights(tmp_path / "w.safetensors", resnet.state_dict(), META, "timm")
    theirs = timm.models.load_state_dict(str(tmp_path / "w.safetensors"))
    assert theirs.keys() == resnet.state_dict().keys()


def test_a_bgr_file_holds_the_same_function_of_the_flipped_image(resnet, tmp_path):
    write_weights(tmp_path / "w.pkl", resnet.state_dict(), META, "detectron2", channels="BGR")
    content = pickle.loads((tmp_path / "w.pkl").read_bytes())
    assert content["FORMAT"] == "BGR" and content["STRIDE_IN_1X1"] is False
    assert content["PIXEL_MEAN"] == META["pixel_mean"][::-1]
    assert content["PIXEL_STD"] == META["pixel_std"][::-1]
    assert content["matching_heuristics"] is True and content["__author__"]
    images = torch.randn(1, 3, 64, 64) * 50 + 120
    mean, std = (torch.tensor(content[f"PIXEL_{n}"])[:, None, None] for n in ("MEAN", "STD"))
    stem = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False)
    stem.weight = nn.Parameter(torch.from_numpy(content["model"]["stem.conv1.weight"]))
    rgb_mean = torch.tensor(META["pixel_mean"])[:, None, None]
    rgb_std = torch.tensor(META["pixel_std"])[:, None, None]
    torch.testing.assert_close(
        stem((images.flip(1) - mean) / std),
        resnet.conv1((images - rgb_mean) / rgb_std),
        rtol=1e-4,
        atol=1e-4,
    )


def test_a_detectron2_file_enters_a_detector_as_torchvisions_does(resnet, tmp_path):
    classifier = torchvision.models.resnet18(weights=None, num_classes=2)
    write_weights(tmp_path / "w.pkl", classifier.state_dict(), META, "detectron2", channels="BGR")
    detector = build_faster_rcnn(
        backbone="resnet18_fpn",
        num_classes=2,
        fpn_channels=8,
        box_head=BoxHeadOptions(fc_dim=8),
    )
    report = load_into(detector, read_weights(str(tmp_path / "w.pkl")), ["a", "b"])
    assert report.left == ["backbone.body.fc.weight", "backbone.body.fc.bias"]
    assert torch.equal(detector.backbone.body.conv1.weight, classifier.conv1.weight)


def d2_file(path, state, **changes):
    content = {
        "model": {k: v.numpy() for k, v in to_form(state, "detectron2", "w").items()},
        "__author__": "someone",
        "matching_heuristics": True,
        "FORMAT": "RGB",
        "STRIDE_IN_1X1": False,
        **changes,
    }
    path.write_bytes(pickle.dumps({k: v for k, v in content.items() if v is not None}))
    return str(path)


@pytest.fixture(scope="module")
def bottleneck():
    from torchvision.models.resnet import Bottleneck

    from tract_det.modeling.resnets import ScaledResNet

    return ScaledResNet(Bottleneck, [1, 1, 1, 1], width=4, num_classes=2).state_dict()


def test_a_network_that_torchvisions_cannot_compute_is_refused(bottleneck, resnet, tmp_path):
    path = tmp_path / "w.pkl"
    for stride in (True, None):
        with pytest.raises(UserError, match=r"w\.pkl strides in the 1x1 .* --stride-in-3x3"):
            read_weights(d2_file(path, bottleneck, STRIDE_IN_1X1=stride))
    source = d2_file(path, bottleneck, STRIDE_IN_1X1=None)
    assert_identical(read_weights(source, stride_in_3x3=True).state, bottleneck)
    read_weights(d2_file(path, resnet.state_dict(), STRIDE_IN_1X1=None))  # basic blocks have no 1x1
    theirs = d2_file(path, bottleneck, STRIDE_IN_1X1=None, FORMAT=None, __author__="torchvision")
    assert_identical(read_weights(theirs).state, bottleneck)
    path.write_bytes(pickle.dumps({"conv1_w": np.zeros(1), "res2_0_branch2a_w": np.zeros(1)}))
    with pytest.raises(UserError, match=r"Caffe2's names"):
        read_weights(str(path))
    path.write_bytes(pickle.dumps({"model": {"backbone.bottom_up.stem.conv1.weight": np.ones(1)}}))
    with pytest.raises(UserError, match=r"not a classifier with detectron2's .*'backbone\.bott"):
        read_weights(str(path))
    path.write_bytes(pickle.dumps([1]))
    with pytest.raises(UserError, match=r"is not a detectron2 file"):
        read_weights(str(path))


def test_an_unknown_channel_order_is_asked_for_not_guessed(resnet, tmp_path):
    source = d2_file(tmp_path / "w.pkl", resnet.state_dict(), FORMAT=None)
    with pytest.raises(UserError, match=r"does not say whether it takes RGB or BGR"):
        read_weights(source)
    bgr = read_weights(source, channels="BGR")
    assert_identical(bgr.state, flip_stem(resnet.state_dict()))


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (Bomb(), rf"{os.name}\.mkdir"),
        ({"model": {"stem.conv1.weight": Bomb()}}, rf"{os.name}\.mkdir"),
        ({"model": np.array([Bomb()], dtype=object)}, rf"{os.name}\.mkdir"),
        ({"model": {"stem.conv1.weight": torch.ones(1)}}, r"torch\._utils\._rebuild_tensor_v2"),
        ({"model": getattr}, r"builtins\.getattr"),
    ],
    ids=["bare", "nested", "in-an-array", "tensor", "getattr"],
)
def test_a_pickle_with_another_class_is_refused_unread_by_name(
    content, name, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=rf"w\.pkl.*holds a {name}"):
        read_weights(str(path))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("spelling", ["numpy.core", "numpy._core"])
def test_arrays_are_read_of_every_protocol_and_numpy(protocol, spelling, resnet, tmp_path):
    content = OrderedDict(a=np.arange(6.0).reshape(2, 3), n=np.float64(2), count=np.array(3))
    raw = pickle.dumps(content, protocol)
    own = "numpy._core" if np.__version__ >= "2" else "numpy.core"
    names = {arg for _, arg, _ in pickletools.genops(raw) if isinstance(arg, str)}
    assert any(own in name for name in names)
    if protocol < 4:  # names of any length, ended by a line feed
        raw = raw.replace(own.encode() + b".", spelling.encode() + b".")
    (tmp_path / "w.pkl").write_bytes(raw)
    read = read_pickle(tmp_path / "w.pkl", "w.pkl")
    assert list(read) == list(content)
    assert np.array_equal(read["a"], content["a"]) and read["n"] == 2 and read["count"].shape == ()


@pytest.mark.parametrize("name", ["w.pkl", "w.safetensors", "w.pth"])
def test_a_damaged_file_is_one_error_that_names_it(name, tmp_path):
    for content in (b"", b"\x80\x02not a pickle", b"\x00" * 100, b"0"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            read_weights(str(tmp_path / name))


def test_what_a_library_does_not_have_is_refused(tmp_path):
    with torch.device("meta"):
        small = build_classifier("resnet18", 2, small_images=True).state_dict()
        small_vgg = build_classifier("vgg11", 2, small_images=True).state_dict()
        vit = build_classifier("timm:vit_tiny_patch16_224", 2).state_dict()
        se = timm.create_model("seresnet18").state_dict()
    with pytest.raises(UserError, match=r"stem for small images"):
        to_form(small, "detectron2", "w")
    assert to_form(small, "timm", "w") == small
    with pytest.raises(UserError, match=r"VGG for small images, which timm"):
        to_form(small_vgg, "timm", "w")
    with pytest.raises(UserError, match=r"torchvision has no form of timm:vit_tiny"):
        to_form(vit, "torchvision", "w", "timm:vit_tiny_patch16_224")
    with pytest.raises(UserError, match=r"neither a ResNet nor a VGG"):
        to_form(vit, "timm", "w")
    assert to_form(vit, "timm", "w", "timm:vit_tiny_patch16_224") == vit
    with pytest.raises(UserError, match=r"'layer1\.0\.se\.fc1\.weight' is not a tensor"):
        to_form(se, "detectron2", "w")
    half = {k: torch.ones(1, 3, 7, 7, dtype=torch.bfloat16) for k in ("conv1.weight", "layer1.0.conv1.weight")}  # fmt: skip  # noqa: E501
    with pytest.raises(UserError, match=r"which is numpy's"):
        write_weights(tmp_path / "w.pkl", half, META, "detectron2", source="w")


def test_an_unpickled_file_needs_no_import_of_a_named_module():
    # `pickle` would import the module before it looks for the class.
    with pytest.raises(pickle.UnpicklingError, match=r"holds a antigravity\.fly"):
        _ArraysOnly(io.BytesIO(b"cantigravity\nfly\n.")).load()
