"""Settings, schedules, diagnostics and copies of TrAct layers, and changes of scale."""

import copy
import gc

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn

from tests.conftest import photo_like
from tests.reference import conv_gradient, tract_gradient
from tract_det import (
    TrActConv2d,
    TrActError,
    TrActLinear,
    apply_tract,
    set_lambda,
    set_micro_batches,
    tract_diagnostics,
)
from tract_det.tract import sums
from tract_det.tract.gram import patch_gram
from tract_det.tract.solve import condition_number


def stem(lambda_=0.1, **keywords):
    torch.manual_seed(0)
    return apply_tract(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1)), lambda_, **keywords)


def gradient(model, images):
    model.zero_grad()
    model(images).square().sum().backward()
    return model[0].weight.grad.clone()


def test_relative_lambda_is_in_units_of_the_mean_square_that_the_layer_sees(generator):
    images = 7 + 3 * photo_like(generator, 2, 3, 16, 16)
    X = F.unfold(images, 3, padding=1).transpose(1, 2).flatten(0, 1).double()
    mean_square = float(X.square().mean())
    expected = gradient(stem(0.05 * mean_square), images)
    torch.testing.assert_close(gradient(stem(0.05, relative=True), images), expected)


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 8, 8), torch.zeros(0, 3, 8, 8)])
@pytest.mark.parametrize("relative", [True, False])
def test_a_black_or_empty_batch_gives_a_zero_gradient(images, relative):
    assert torch.equal(gradient(stem(relative=relative), images), torch.zeros(6, 3, 3, 3))


@pytest.mark.parametrize("scale", [0.01, 255.0])
@pytest.mark.parametrize("optimizer", ["SGD", "momentum"])
def test_input_times_s_weight_by_s_and_lambda_times_s_squared_is_the_same_training(
    scale, optimizer, generator
):
    images = photo_like(generator, 5, 4, 3, 16, 16).double()
    targets = torch.randint(4, (5, 4), generator=generator)
    weights = []
    for s in (1.0, scale):
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
        ).double()
        with torch.no_grad():
            model[0].weight /= s
        apply_tract(model, 0.1 * s**2)
        momentum = 0.9 if optimizer == "momentum" else 0.0
        steps = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
        for x, y in zip(images, targets, strict=True):
            steps.zero_grad()
            F.cross_entropy(model(s * x), y).backward()
            steps.step()
        weights.append([model[0].weight * s, *list(model.parameters())[1:]])
    for plain, scaled in zip(*weights, strict=True):
        torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("mean", [0.0, 1.0])
@pytest.mark.parametrize(
    "keywords",
    [
        {"kernel_size": 7, "stride": 2, "padding": 3},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 16, "stride": 16},
    ],
)
def test_pixels_in_0_to_255_with_a_lambda_meant_for_standardised_ones(keywords, mean, generator):
    conv = TrActConv2d(3, 6, **keywords, bias=False)
    images = (118 + 58 * photo_like(generator, 2, 3, 64, 80)).clamp(0, 255).round()
    dZ = torch.randn(conv(images).shape, generator=generator) + mean
    conv(images).backward(dZ)
    expected, _, _ = conv_gradient(conv, images, dZ, conv.lambda_)
    error = conv.weight.grad.reshape(expected.shape) - expected
    assert error.norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize("size", [7, 24])
def test_the_users_precision_of_products_does_not_touch_the_gram_matrix(precision, size, generator):
    conv = TrActConv2d(3, 6, size, stride=size)
    images = photo_like(generator, 2, 3, 48, 48)
    exact = conv._sums(images)[0]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert torch.equal(conv._sums(images)[0], exact)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("N", [5, 40])
@pytest.mark.parametrize("relative", [False, True])
def test_a_linear_layer_solves_the_smaller_system(N, relative, generator, monkeypatch):
    called = []
    original = sums.linear_sums
    monkeypatch.setattr(sums, "linear_sums", lambda X: called.append(1) or original(X))
    layer = apply_tract(nn.Sequential(nn.Linear(20, 4)), 0.1, relative=relative)
    X, dZ = torch.randn(N, 20, generator=generator), torch.randn(N, 4, generator=generator)
    layer(X).backward(dZ)
    assert bool(called) == (N > 20)
    lambda_ = 0.1 * float(X.square().mean()) if relative else 0.1
    expected, _, damped = tract_gradient(X, dZ, lambda_)
    torch.testing.assert_close(layer[0].weight.grad.double(), expected, rtol=1e-4, atol=1e-4)
    diagnostics = tract_diagnostics(layer)
    assert diagnostics["tract_condition"] == pytest.approx(
        float(torch.linalg.cond(damped)), rel=1e-5
    )


def test_diagnostics_are_those_of_the_last_gradient(generator):
    model, images = stem(0.2), photo_like(generator, 2, 3, 16, 16)
    assert tract_diagnostics(model) == {}
    grad = gradient(model, images)
    out = model(images)
    expected, plain, damped = conv_gradient(model[0], images, 2 * out.detach(), 0.2)
    assert tract_diagnostics(model) == pytest.approx(
        {
            "tract_lambda": 0.2,
            "tract_condition": float(torch.linalg.cond(damped[0])),
            "stem_plain_grad_norm": float(plain.norm()),
            "stem_grad_norm": float(expected.norm()),
        },
        rel=1e-5,
    )
    assert tract_diagnostics(model)["stem_grad_norm"] == pytest.approx(float(grad.norm()))
    two = nn.Sequential(model, stem())
    gradient(two[1], images)
    assert {key.partition("/")[2] for key in tract_diagnostics(two)} == {"0.0", "1.0"}


def test_lambda_follows_a_schedule_and_tract_goes_off_and_on(generator):
    model, images = stem(), photo_like(generator, 2, 3, 16, 16)
    plain = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1))
    plain.load_state_dict(model.state_dict())
    for lambda_ in (0.2, None, 0.05):
        set_lambda(model, lambda_)
        expected = plain if lambda_ is None else stem(lambda_)
        assert torch.equal(gradient(model, images), gradient(expected, images))
        assert ("TrAct off" in str(model)) == (lambda_ is None)
        assert bool(tract_diagnostics(model)) == (lambda_ is not None)
    with pytest.raises(TrActError, match="must be positive"):
        set_lambda(model, 0.0)


def test_a_compiled_model_follows_schedule_and_micro_batches_without_being_compiled_again(
    generator,
):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model, images = stem(), photo_like(generator, 4, 3, 8, 8)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    gradients = []
    for lambda_ in (0.1, 0.2, 0.3):
        set_lambda(model, lambda_)
        model.zero_grad()
        compiled(images).square().sum().backward()
        gradients.append(model[0].weight.grad.clone())
    assert counter.frame_count == 1
    for lambda_, grad in zip((0.1, 0.2, 0.3), gradients, strict=True):
        torch.testing.assert_close(grad, gradient(stem(lambda_), images))
    set_micro_batches(model, 2)
    model.zero_grad()
    for part in images.chunk(2):
        compiled(part).square().sum().backward()
    torch.testing.assert_close(model[0].weight.grad, gradients[-1], rtol=1e-4, atol=1e-5)


def test_micro_batches_may_be_ended_by_a_function_that_a_copy_leaves_behind(generator):
    model, images = stem(0.2), photo_like(generator, 6, 3, 8, 8)
    passes = []
    set_micro_batches(model, lambda: len(passes) == 3)
    for part in images.split([1, 2, 3]):
        assert model[0].weight.grad is None or not model[0].weight.grad.any()
        passes.append(part)
        model(part).square().sum().backward()
    torch.testing.assert_close(
        model[0].weight.grad, gradient(stem(0.2), images), rtol=1e-4, atol=1e-5
    )
    assert copy.deepcopy(model)[0].tract.pending is None


def test_a_copy_has_the_settings_and_not_the_state(generator):
    model, images = stem(0.2, relative=True, gram_patches=50), photo_like(generator, 4, 3, 8, 8)
    set_micro_batches(model, 2)
    model(images).sum().backward()  # the first of two micro-batches
    twin = copy.deepcopy(model)
    assert str(twin) == str(model) and "lambda_=0.2 * trace(G) / K, gram_patches=50" in str(twin)
    assert twin[0].tract.pending.passes == 0 and model[0].tract.pending.passes == 1
    set_lambda(twin, 0.3)
    assert model[0].lambda_ == 0.2


def test_an_estimated_gram_matrix_comes_closer_with_more_patches(generator):
    images = photo_like(generator, 8, 3, 64, 64)
    exact, errors = gradient(stem(), images), []
    for patches in (64, 4096):
        torch.manual_seed(0)
        estimates = torch.stack([gradient(stem(gram_patches=patches), images) for _ in range(5)])
        errors.append(float((estimates - exact).norm() / exact.norm() / 5**0.5))
    assert errors[1] < 0.25 * errors[0]
    # More patches than there are: exact.
    assert torch.equal(gradient(stem(gram_patches=10**6), images), exact)
    with pytest.raises(TrActError, match="gram_patches is -1"):
        stem(gram_patches=-1)


def test_an_estimate_from_every_patch_is_the_sum(generator, monkeypatch):
    every = lambda high, size, device: torch.arange(size[0]) % high  # noqa: E731
    monkeypatch.setattr(torch, "randint", every)
    images = photo_like(generator, 2, 4, 9, 8)
    geometry = (images, (3, 2), (2, 1), (2, 0), (1, 2), 2)
    exact, count = sums.conv_sums(*geometry)
    estimate = sums.estimated_gram_sum(*geometry, patches=3 * count)
    torch.testing.assert_close(estimate, exact)


def test_fp16_and_its_loss_scale(generator):
    model, images = stem(), photo_like(generator, 2, 3, 16, 16)
    exact = gradient(model, images)
    model.zero_grad()
    (1024 * model.half()(images.half()).float().square().sum() / 2**16).backward()
    grad = model[0].weight.grad.float() * 64
    assert model[0].weight.grad.dtype == torch.float16
    assert (grad - exact).norm() <= 0.02 * exact.norm()


def test_the_gradient_of_a_layer_in_channels_last(generator):
    model, images = stem(), photo_like(generator, 2, 3, 16, 16)
    exact = gradient(model, images)
    model = model.to(memory_format=torch.channels_last)
    grad = gradient(model, images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(grad, exact)
    assert model(images).is_contiguous(memory_format=torch.channels_last)


def test_the_input_of_a_linear_layer_gets_pytorchs_gradient(generator):
    layer, plain = TrActLinear(6, 4), nn.Linear(6, 4)
    plain.load_state_dict(layer.state_dict())
    results = []
    for module in (layer, plain):
        X = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
        module(X).square().sum().backward()
        results.append((X.grad, module.bias.grad))
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected)


def test_woodbury_stays_float64_where_the_smaller_system_is_large(generator):
    basis = torch.randn(40, 700, generator=generator)
    X = torch.randn(600, 40, generator=generator) @ basis  # correlated, as pixels are
    X = (X + 0.1 * torch.randn(600, 700, generator=generator)) / 6
    dZ, layer = torch.randn(600, 4, generator=generator), TrActLinear(700, 4)
    layer(X).backward(dZ)
    _, plain, damped = tract_gradient(X, dZ, 0.1)
    assert (layer.weight.grad.double() @ damped - plain).norm() <= 1e-5 * plain.norm()


def test_a_linear_layer_with_few_rows_allocates_nothing_of_the_size_of_its_gram_matrix(generator):
    layer = TrActLinear(20000, 2)  # K^2 numbers would be 3 GB
    layer(torch.randn(3, 20000, generator=generator)).sum().backward()
    assert layer.tract.last.total.shape == (1, 3, 3)
    assert tract_diagnostics(layer)["tract_condition"] > 1


@pytest.mark.parametrize("relative", [False, True])
def test_no_rows_give_a_linear_layer_a_zero_gradient(relative):
    layer = apply_tract(nn.Sequential(nn.Linear(6, 2)), relative=relative)
    layer(torch.zeros(0, 6)).sum().backward()
    assert torch.equal(layer[0].weight.grad, torch.zeros(2, 6))


def test_the_condition_of_a_large_system_is_known_to_5_percent(generator):
    grams = torch.stack([patch_gram(photo_like(generator, 8, 3, 64, 64), 10)[0] for _ in range(2)])
    for damping in (torch.tensor([0.1, 0.001]).double(), torch.tensor([10.0, 10.0]).double()):
        expected = torch.linalg.cond(grams + damping[:, None, None] * torch.eye(300)).max()
        assert 0.95 < float(condition_number(grams, damping) / expected) <= 1 + 1e-9


def test_diagnostics_of_a_batch_that_is_not_finite_are_not_a_number():
    layer = TrActLinear(3, 2)
    layer(torch.full((9, 3), torch.inf)).sum().backward()
    assert torch.tensor(tract_diagnostics(layer)["tract_condition"]).isnan()


def test_autocast_leaves_other_uses_of_the_weight_their_gradient(generator):
    conv, images = TrActConv2d(3, 4, 3), photo_like(generator, 1, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        conv(images)
        again = F.conv2d(images, conv.weight)
    again.float().sum().backward()
    assert conv.weight.grad is not None and conv.weight.grad.any()


def test_a_layer_that_is_gone_before_its_backward_pass_is_said(generator):
    model = stem()
    loss = model(photo_like(generator, 1, 3, 8, 8)).sum()
    del model
    gc.collect()
    with pytest.raises(TrActError, match="deleted between its forward and its backward pass"):
        loss.backward()
