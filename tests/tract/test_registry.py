"""TrAct in convolutions that do more than convolve, and in averages of models."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.tract.test_stems import photographs
from tract_det import TrActError, TrActLayer, apply_tract, remove_tract, set_image_sizes
from tract_det.tract.registry import TRACT_CLASSES

INNER = ["Conv2dSame", "StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"]
# Each takes seconds to compile. The first one pads and the second one standardises; the last three
# combine or vary these two.
COMPILED = [*INNER[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in INNER[2:])]


def inner(name):
    layers = pytest.importorskip("timm.layers")
    torch.manual_seed(0)
    return getattr(layers, name)(3, 8, 3, stride=2)


def gradient(model, images):
    model.zero_grad()
    model(images).square().sum().backward()
    return model[0].weight.grad


@pytest.mark.parametrize("name", INNER)
def test_timms_convolutions_are_the_same_after_tract_was_put_on_and_removed(name):
    model = nn.Sequential(inner(name))
    text, plain_class = str(model), type(model[0])
    apply_tract(model, 0.2)
    assert type(model[0]).__name__ == f"TrAct{name}" and isinstance(model[0], plain_class)
    assert "lambda_=0.2" in str(model)
    assert type(remove_tract(model)[0]) is plain_class and str(model) == text


@pytest.mark.parametrize("name", INNER)
def test_copies_and_pickles_of_timms_convolutions_keep_tract(name):
    model, images = apply_tract(nn.Sequential(inner(name)), 0.2), photographs(2, 16)
    expected, pickled = gradient(model, images), pickle.dumps(model)
    assert torch.equal(gradient(copy.deepcopy(model), images), expected)
    del TRACT_CLASSES[model[0].plain_class]  # as in another process
    twin = pickle.loads(pickled)
    assert twin[0].lambda_ == 0.2 and torch.equal(gradient(twin, images), expected)
    assert type(remove_tract(twin)[0]) is model[0].plain_class


@pytest.mark.parametrize("name", COMPILED)
def test_timms_convolutions_compile_in_one_graph(name):
    model, images = apply_tract(nn.Sequential(inner(name))), photographs(2, 17)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images), model(images))
    expected = gradient(model, images).clone()
    compiled(images).square().sum().backward()
    torch.testing.assert_close(model[0].weight.grad, 2 * expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", INNER)
def test_the_gradient_of_a_standardised_weight_leaves_its_mean_and_length_alone(name):
    """Neither changes the output, so the gradient has no component along them."""
    stem = inner(name)
    grad = gradient(apply_tract(nn.Sequential(stem)), photographs(2, 16)).flatten(1)
    weight = stem.weight.detach().flatten(1)
    along = torch.stack([grad.mean(1), (grad * weight).mean(1)]).abs().amax()
    assert (along < 1e-4 * grad.abs().amax()) == ("Std" in name)


def test_timms_convolutions_are_plain_in_evaluation_and_frozen():
    model, images = apply_tract(nn.Sequential(inner("StdConv2d"))), photographs(2, 16)
    learnt = gradient(model, images).clone()
    plain = gradient(remove_tract(copy.deepcopy(model)), images)
    assert not torch.allclose(learnt, plain, rtol=0.1)
    assert torch.equal(gradient(model.eval(), images), plain)


def test_padding_of_the_batch_does_not_count_where_the_layer_standardises():
    model, images = apply_tract(nn.Sequential(inner("StdConv2d"))), photographs(2, 16)
    expected = gradient(model, images).clone()
    model.zero_grad()
    set_image_sizes(model, [(16, 16), (16, 16)])
    model(F.pad(images, (0, 8, 0, 8)))[..., :8, :8].square().sum().backward()
    torch.testing.assert_close(model[0].weight.grad, expected, rtol=1e-4, atol=1e-5)


def test_padding_of_the_batch_where_the_layer_pads_by_the_size_is_refused():
    model, images = apply_tract(nn.Sequential(inner("Conv2dSame"))), photographs(2, 16)
    expected = gradient(model, images).clone()
    set_image_sizes(model, [(16, 16), (12, 16)])
    with pytest.raises(
        TrActError, match=r"Conv2dSame pads by the size of the batch.*set_image_sizes"
    ):
        model(images)
    set_image_sizes(model, [(16, 16), (16, 16)])
    assert torch.equal(gradient(model, images), expected)


def averaged(model):
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))


def timms_average(model):
    return pytest.importorskip("timm.utils").ModelEmaV3(model, decay=0.9)


@pytest.mark.parametrize("average", [averaged, timms_average], ids=["torch", "timm"])
@pytest.mark.parametrize("name", ["Conv2d", "ScaledStdConv2d"])
def test_an_average_of_the_weights_keeps_tract_and_averages(average, name):
    stem = nn.Conv2d(3, 8, 3) if name == "Conv2d" else inner(name)
    model = apply_tract(nn.Sequential(stem, nn.ReLU(), nn.Conv2d(8, 2, 3)), 0.2)
    images, optimizer = photographs(2, 16), torch.optim.SGD(model.parameters(), lr=0.1)
    ema = average(model)
    twin = next(module for module in ema.modules() if isinstance(module, TrActLayer))
    assert type(twin) is type(model[0]) and twin.lambda_ == 0.2
    assert twin.tract is not model[0].tract
    ema.update_parameters(model) if average is averaged else ema.update(model)
    start = [parameter.clone() for parameter in model.parameters()]
    gradient(model, images)
    optimizer.step()
    ema.update_parameters(model) if average is averaged else ema.update(model)
    expected = [0.9 * a + 0.1 * b for a, b in zip(start, model.parameters(), strict=True)]
    for parameter, value in zip(ema.module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter, value)

    plain = remove_tract(copy.deepcopy(model)).eval()
    with torch.no_grad():
        for parameter, value in zip(plain.parameters(), expected, strict=True):
            parameter.copy_(value)
        torch.testing.assert_close(ema.eval()(images), plain(images))
    assert list(ema.module.state_dict()) == list(model.state_dict())
