"""apply_tract changes the stem's class and nothing else."""

import copy
import pickle

import pytest
import torch
import torchvision
from torch import nn

from tests.tract.meta import meta
from tract_det import (
    TrActConv2d,
    TrActError,
    TrActLinear,
    apply_tract,
    find_stem,
    register_layer,
    remove_tract,
)
from tract_det.tract import trainable_layers
from tract_det.tract.modifier import TRACT_CLASSES

FAMILIES = {
    "alexnet": "features.0",
    "convnext_tiny": "features.0.0",
    "densenet121": "features.conv0",
    "efficientnet_b0": "features.0.0",
    "googlenet": "conv1.conv",
    "inception_v3": "Conv2d_1a_3x3.conv",
    "maxvit_t": "stem.0.0",
    "mnasnet0_5": "layers.0",
    "mobilenet_v2": "features.0.0",
    "mobilenet_v3_small": "features.0.0",
    "regnet_y_400mf": "stem.0",
    "resnet18": "conv1",
    "resnext50_32x4d": "conv1",
    "shufflenet_v2_x0_5": "conv1.0",
    "squeezenet1_1": "features.0",
    "swin_t": "features.0.0",
    "vgg11": "features.0",
    "vit_b_32": "conv_proj",
    "wide_resnet50_2": "conv1",
}


def build(name):
    keywords = {"init_weights": False} if name in ("googlenet", "inception_v3", "vgg11") else {}
    return getattr(torchvision.models, name)(weights=None, **keywords)


def test_the_table_has_every_family_of_torchvision():
    modules = {
        torchvision.models.get_model_builder(name).__module__
        for name in torchvision.models.list_models(module=torchvision.models)
    }
    assert {torchvision.models.get_model_builder(name).__module__ for name in FAMILIES} == modules


@pytest.mark.parametrize("name", FAMILIES)
def test_the_stem_of_every_torchvision_family_is_found(name):
    try:
        with meta():
            model = build(name)
    except NotImplementedError:  # it reads values of tensors while it is built
        model = build(name)
    assert find_stem(model) == FAMILIES[name]


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "shufflenet_v2_x0_5"])
def test_parameters_keys_and_outputs_are_the_same_to_the_bit(name):
    model = build(name).eval()
    images = torch.randn(2, 3, 64, 64)
    before = model(images)
    parameters, keys = list(model.parameters()), list(model.state_dict())
    assert apply_tract(model) is model
    assert isinstance(model.get_submodule(FAMILIES[name]), TrActConv2d)
    assert torch.equal(model(images), before)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    assert "TrActConv2d(" in str(model) and "lambda_=0.1)" in str(model)


@pytest.mark.parametrize(
    "name", ["fasterrcnn_resnet50_fpn", "ssd300_vgg16", "retinanet_resnet50_fpn"]
)
def test_the_backbone_inside_a_torchvision_detector(name):
    detection = getattr(torchvision.models.detection, name)
    with meta():
        model = detection(weights=None, weights_backbone=None)
    stem = "backbone.features.0" if "vgg" in name else "backbone.body.conv1"
    apply_tract(model)
    assert find_stem(model) == stem
    assert isinstance(model.get_submodule(stem), TrActConv2d)


def test_remove_tract_gives_the_plain_model_back():
    model = build("resnet18")
    text = str(model)
    remove_tract(apply_tract(model, 0.3))
    assert str(model) == text
    assert type(model.conv1) is nn.Conv2d
    assert not {"tract", "image_sizes", "edges"} & set(vars(model.conv1))


def test_applying_twice_sets_lambda():
    model = apply_tract(apply_tract(build("resnet18")), 0.2)
    assert model.conv1.lambda_ == 0.2


def test_copies_and_pickles_keep_tract():
    model = apply_tract(nn.Sequential(nn.Conv2d(3, 4, 3)), 0.2)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin[0]) is TrActConv2d and twin[0].lambda_ == 0.2
        twin(torch.randn(1, 3, 8, 8)).sum().backward()
        assert twin[0].weight.grad is not None


def test_linear_stem():
    model = apply_tract(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)))
    assert type(model[1]) is TrActLinear


def test_hooks_stay():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    apply_tract(model)(torch.randn(1, 3, 8, 8))
    assert calls == [1]


def test_the_trainable_layers_are_those_that_tract_takes_and_that_learn():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4), OwnConv(4, 4, 3),
        nn.MultiheadAttention(4, 2), nn.Linear(4, 4), nn.Linear(4, 2),
    )  # fmt: skip
    model[5].weight.requires_grad_(False)
    assert trainable_layers(model) == ["0", "6"]
    assert trainable_layers(apply_tract(model, stem=["0", "6"])) == ["0", "6"]


class OwnConv(nn.Conv2d):
    """A convolution with an activation, which a plain TrActConv2d would lose."""

    def forward(self, input):
        return super().forward(input).relu()


@pytest.mark.parametrize(
    ("model", "keywords", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3).requires_grad_(False)), {}, r"'0' is frozen"),
        (nn.Sequential(nn.Flatten(), nn.ReLU()), {}, "no layer with parameters"),
        (nn.Sequential(nn.LSTM(3, 4), nn.Linear(4, 2)), {}, r"'0', is a LSTM.*stem="),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), {}, "'0', is a BatchNorm2d"),
        (nn.Sequential(OwnConv(3, 4, 3)), {}, r"'0' is a .*OwnConv.*register_layer"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), {"lambda_": 0}, "must be positive"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), {"stem": "stem.conv"}, "no module 'stem.conv'"),
    ],
    ids=["frozen", "no-layer", "lstm", "norm-first", "subclass", "lambda", "missing"],
)
def test_a_layer_that_cannot_learn_by_tract_is_refused_by_name(model, keywords, message):
    before = str(model)
    with pytest.raises(TrActError, match=message):
        apply_tract(model, **keywords)
    assert str(model) == before


def test_a_stem_can_be_named():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3))
    assert type(apply_tract(model, stem="1")[1]) is TrActConv2d


def test_a_registered_class_is_known():
    class TrActOwnConv(OwnConv, TrActConv2d):
        pass

    register_layer(OwnConv, TrActOwnConv)
    try:
        model = nn.Sequential(OwnConv(3, 4, 3))
        images = torch.randn(1, 3, 8, 8)
        before = model(images)
        apply_tract(model)
        assert torch.equal(model(images), before)
        assert type(remove_tract(model)[0]) is OwnConv
    finally:
        del TRACT_CLASSES[OwnConv]
