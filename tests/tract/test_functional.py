"""The weight gradient is TrAct's, everything else is PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
import torch_tract
from torch import nn

from tests.conftest import photo_like
from tests.reference import conv_gradient, tract_gradient
from tract_det import (
    TrActConv2d,
    TrActError,
    TrActLinear,
    set_image_sizes,
    set_micro_batches,
    tract_conv2d,
    tract_linear,
)


def geometry(kernel_size, *, channels=3, **keywords):
    return {"in_channels": channels, "out_channels": 6, "kernel_size": kernel_size, **keywords}


# (constructor's keywords, image size)
GEOMETRIES = [
    (geometry(7, stride=2, padding=3), (33, 40)),
    (geometry(3, padding=1), (17, 20)),
    (geometry(4, stride=4, bias=False), (18, 16)),
    (geometry((3, 5), stride=(2, 1), padding=(0, 2)), (15, 21)),
    (geometry(3, dilation=(2, 3), padding=2), (16, 19)),
    (geometry(3, channels=6, groups=3, padding=1), (12, 13)),
    (geometry((4, 3), padding="same"), (13, 14)),
    (geometry(4, dilation=3, padding="same"), (17, 14)),
    (geometry(3, padding="valid"), (9, 9)),
    (geometry(3, padding=1, padding_mode="reflect"), (11, 12)),
    (geometry(5, padding=2, padding_mode="circular"), (11, 12)),
    (geometry(3, padding="same", padding_mode="replicate"), (8, 9)),
    (geometry(1), (6, 7)),
    (geometry(2, stride=5), (23, 22)),
    (geometry(7, padding=3), (4, 5)),  # the kernel reaches beyond the image
]


def _name(part):
    if not isinstance(part, dict):
        return "x".join(map(str, part))
    return "-".join(f"{key}={value}" for key, value in part.items() if "channels" not in key)


@pytest.mark.parametrize(("keywords", "size"), GEOMETRIES, ids=_name)
def test_weight_gradient_solves_the_damped_system(keywords, size, generator):
    conv = TrActConv2d(**keywords)
    images = photo_like(generator, 3, conv.in_channels, *size)
    out = conv(images)
    dZ = torch.randn(out.shape, generator=generator)
    out.backward(dZ)
    expected, plain, damped = conv_gradient(conv, images, dZ, conv.lambda_)
    gradient = conv.weight.grad.double().reshape(expected.shape)
    assert (gradient @ damped - plain).norm() <= 1e-5 * plain.norm()
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3 * expected.abs().max())


@pytest.mark.parametrize(("keywords", "size"), GEOMETRIES, ids=_name)
def test_output_input_gradient_and_bias_gradient_are_those_of_conv2d(keywords, size, generator):
    conv = TrActConv2d(**keywords)
    plain = nn.Conv2d(**keywords)
    plain.load_state_dict(conv.state_dict())
    images = photo_like(generator, 2, conv.in_channels, *size)
    results = []
    for layer in (conv, plain):
        x = images.clone().requires_grad_()
        out = layer(x)
        out.square().sum().backward()
        results.append((out, x.grad, None if layer.bias is None else layer.bias.grad))
    for result, expected in zip(*results, strict=True):
        assert result is expected or torch.equal(result, expected)
    assert not torch.allclose(conv.weight.grad, plain.weight.grad)


@pytest.mark.parametrize("shape", [(40, 12), (3, 7, 12), (5, 12), (12,)])
def test_linear_weight_gradient_solves_the_damped_system(shape, generator):
    layer = TrActLinear(12, 7)
    X = torch.randn(shape, generator=generator)
    out = layer(X)
    dZ = torch.randn(out.shape, generator=generator)
    out.backward(dZ)
    expected, plain, damped = tract_gradient(X.reshape(-1, 12), dZ.reshape(-1, 7), 0.1)
    assert (layer.weight.grad.double() @ damped - plain).norm() <= 1e-5 * plain.norm()
    torch.testing.assert_close(layer.weight.grad.double(), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(layer.bias.grad, dZ.reshape(-1, 7).sum(0))


@pytest.mark.parametrize(
    "keywords",
    [
        {"kernel_size": 7, "stride": 2, "padding": 3},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 4, "stride": 4},
    ],
)
def test_agrees_with_torch_tract_where_that_works(keywords, generator):
    plain = nn.Conv2d(3, 8, **keywords)
    reference = torch_tract.TrAct(nn.Conv2d(3, 8, **keywords), l=0.1)
    reference.load_state_dict(plain.state_dict())
    images = photo_like(generator, 2, 3, 32, 32)
    ours = tract_conv2d(images, plain.weight, plain.bias, plain.stride, plain.padding, lambda_=0.1)
    dZ = torch.randn(ours.shape, generator=generator)
    ours.backward(dZ)
    reference(images).backward(dZ)
    expected = next(p.grad for p in reference.parameters() if p.dim() == 4)
    assert (plain.weight.grad - expected).norm() <= 1e-4 * expected.norm()


def test_large_lambda_recovers_the_plain_direction(generator):
    images = photo_like(generator, 2, 3, 16, 16)
    weight = nn.Parameter(torch.randn(4, 3, 3, 3, generator=generator))
    tract_conv2d(images, weight, lambda_=1e6).square().sum().backward()
    ours, weight.grad = weight.grad, None
    F.conv2d(images, weight).square().sum().backward()
    assert (ours * 1e6 - weight.grad).norm() <= 1e-4 * weight.grad.norm()


def test_small_lambda_whitens_the_input(generator):
    # As lambda vanishes, another basis of the input gives the same gradient in that basis.
    X = torch.randn(200, 6, generator=generator)
    A = torch.eye(6) + 0.3 * torch.randn(6, 6, generator=generator)
    dZ = torch.randn(200, 4, generator=generator)
    gradients = []
    for rows in (X, X @ A):
        weight = nn.Parameter(torch.zeros(4, 6))
        tract_linear(rows, weight, lambda_=1e-7).backward(dZ)
        gradients.append(weight.grad)
    torch.testing.assert_close(gradients[1] @ A.T, gradients[0], rtol=1e-3, atol=1e-2)


def test_loss_scale_passes_through(generator):
    images, weight = photo_like(generator, 2, 3, 16, 16), nn.Parameter(torch.randn(4, 3, 3, 3))
    gradients = []
    for scale in (1.0, 1024.0):
        weight.grad = None
        (scale * tract_conv2d(images, weight).square().sum()).backward()
        gradients.append(weight.grad / scale)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_bf16_autocast_solves_in_fp32_and_stays_close_to_fp32(generator):
    conv = TrActConv2d(3, 8, 7, stride=2, padding=3)
    images = photo_like(generator, 4, 3, 64, 64)
    dZ = torch.randn(4, 8, 32, 32, generator=generator)
    conv(images).backward(dZ)
    exact, conv.weight.grad = conv.weight.grad, None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = conv(images)
    assert out.dtype == torch.bfloat16
    out.backward(dZ.bfloat16())
    assert conv.weight.grad.dtype == torch.float32
    assert (conv.weight.grad - exact).norm() <= 0.02 * exact.norm()


def test_an_input_that_is_not_finite_gives_a_gradient_that_is_not_finite():
    weight = nn.Parameter(torch.randn(4, 3, 3, 3))
    tract_conv2d(torch.full((1, 3, 8, 8), torch.nan), weight).sum().backward()
    assert not weight.grad.isfinite().any()


def test_no_grad_and_frozen_weights_cost_nothing(monkeypatch):
    def fail(*_):
        raise AssertionError("the Gram matrix was computed")

    monkeypatch.setattr("tract_det.tract.sums.patch_gram_sum", fail)
    weight = nn.Parameter(torch.randn(4, 3, 3, 3))
    images = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        tract_conv2d(images, weight)
    tract_conv2d(images.requires_grad_(), weight.detach()).sum().backward()
    conv = TrActConv2d(3, 4, 3)
    conv.eval()(images).sum().backward()
    with pytest.raises(AssertionError, match="was computed"):
        conv.train()(images)


@pytest.mark.parametrize("lambda_", [0.0, -1.0, float("nan"), float("inf")])
def test_a_lambda_that_is_not_positive_is_refused(lambda_):
    weight = nn.Parameter(torch.randn(4, 3, 3, 3))
    with pytest.raises(TrActError, match="must be positive"):
        tract_conv2d(torch.randn(1, 3, 8, 8), weight, lambda_=lambda_)
    with pytest.raises(TrActError, match="must be positive"):
        TrActConv2d(3, 4, 3, lambda_=lambda_)


def test_unbatched_images_are_a_batch_of_one(generator):
    images, weight = photo_like(generator, 3, 12, 12), nn.Parameter(torch.randn(4, 3, 3, 3))
    gradients = []
    for x in (images, images[None]):
        weight.grad = None
        tract_conv2d(x, weight).square().sum().backward()
        gradients.append(weight.grad)
    assert torch.equal(*gradients)


def test_second_derivatives_are_refused(generator):
    weight = nn.Parameter(torch.randn(4, 3, 3, 3))
    out = tract_conv2d(photo_like(generator, 1, 3, 8, 8), weight).square().sum()
    (gradient,) = torch.autograd.grad(out, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("k", [2, 4])
def test_micro_batches_give_the_step_of_the_whole_batch(k, generator):
    conv = TrActConv2d(3, 8, 7, stride=2, padding=3)
    images = photo_like(generator, 8, 3, 32, 32)
    conv(images).square().mean().backward()
    whole, conv.weight.grad = conv.weight.grad, None
    set_micro_batches(conv, k)
    for _ in range(2):  # the second step starts without the sums of the first
        conv.weight.grad = None
        for i, part in enumerate(images.chunk(k)):
            (conv(part).square().mean() / k).backward()
            assert (i == k - 1) == bool(conv.weight.grad.any())
        torch.testing.assert_close(conv.weight.grad, whole, rtol=1e-4, atol=1e-6)


def test_a_padded_batch_gives_the_gradient_of_the_unpadded_images(generator):
    conv = TrActConv2d(3, 6, 7, stride=2, padding=3, bias=False)
    sizes = [(30, 41), (48, 29), (30, 41)]
    images = [photo_like(generator, 3, *size) for size in sizes]
    X, dZ = [], []
    batch = torch.zeros(3, 3, 48, 48)
    gradient = torch.zeros(3, 6, 24, 24)
    for i, (image, (height, width)) in enumerate(zip(images, sizes, strict=True)):
        batch[i, :, :height, :width] = image
        unfolded = F.unfold(image[None], 7, 1, 3, 2)[0]
        out = ((height + 1) // 2, (width + 1) // 2)
        dZ.append(torch.randn(6, *out, generator=generator))
        gradient[i, :, : out[0], : out[1]] = dZ[-1]
        X.append(unfolded.T)
    expected, _, _ = tract_gradient(
        torch.cat(X), torch.cat([z.flatten(1) for z in dZ], 1).T, conv.lambda_
    )
    set_image_sizes(conv, sizes)
    conv(batch).backward(gradient)
    ours = conv.weight.grad.reshape(6, -1).double()
    assert (ours - expected).norm() <= 1e-5 * expected.norm()
    with pytest.raises(TrActError, match="2 entries for 3 images"):
        set_image_sizes(conv, sizes[:2])
        conv(batch)


@pytest.mark.parametrize(
    ("keywords", "sizes"),
    [
        (geometry(7, stride=2, padding=3), [(30, 41), (48, 29), (2, 3)]),
        (geometry(3, padding=1), [(31, 17), (48, 48)]),
        (geometry(16, stride=16), [(33, 47), (10, 20)]),  # even smaller than a patch
        (geometry(2, stride=5), [(23, 22)]),
    ],
    ids=_name,
)
def test_windows_at_the_edges_of_padded_images_count_where_they_are_learnt_from(
    keywords, sizes, generator
):
    """`dZ` is zero nowhere, and the oracle uses every window of the canvas that sees a pixel."""
    conv = TrActConv2d(**keywords)
    batch = torch.zeros(len(sizes), 3, 48, 48)
    for image, (height, width) in zip(batch, sizes, strict=True):
        image[:, :height, :width] = photo_like(generator, 3, height, width) + 3  # no pixel is zero
    set_image_sizes(conv, sizes, edges=True)
    out = conv(batch)
    dZ = torch.randn(out.shape, generator=generator)
    out.backward(dZ)
    X = F.unfold(batch, conv.kernel_size, 1, conv.padding, conv.stride).mT.flatten(0, 1)
    touches = X.abs().sum(1) > 0
    rows = dZ.movedim(1, -1).flatten(0, 2)[touches]
    expected, _, _ = tract_gradient(X[touches], rows, conv.lambda_)
    ours = conv.weight.grad.flatten(1).double()
    assert (ours - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("module", [TrActConv2d(3, 4, 3, padding=1), TrActLinear(8, 4)])
def test_compiles_without_a_graph_break(module, generator):
    x = torch.randn(2, 3, 8, 8, generator=generator)
    module(x).square().sum().backward()
    eager, module.weight.grad = module.weight.grad, None
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    compiled(x).square().sum().backward()
    torch.testing.assert_close(module.weight.grad, eager)


def test_activation_checkpointing_changes_nothing(generator):
    from torch.utils.checkpoint import checkpoint

    conv, x = TrActConv2d(3, 4, 3), photo_like(generator, 2, 3, 12, 12).requires_grad_()
    gradients = []
    for run in (conv, lambda x: checkpoint(conv, x, use_reentrant=False)):
        conv.weight.grad = None
        run(x).square().sum().backward()
        gradients.append(conv.weight.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("keywords", "size"),
    [
        (geometry(7, stride=2, padding=3), (192, 192)),
        (geometry(3, padding=1), (192, 192)),
        (geometry(4, stride=4), (192, 192)),
        (geometry(16, stride=16), (256, 256)),
        (geometry(16, stride=16), (64, 64)),  # 16 patches, K = 768: `G` is far from full rank
    ],
    ids=_name,
)
def test_small_batches_of_smooth_photographs_learn_as_in_float64(keywords, size, generator):
    """The gradient itself, not its residual: the solve magnifies the rounding of float32."""
    conv = TrActConv2d(**keywords)
    images = photo_like(generator, 1, 3, *size)
    images = F.avg_pool2d(images, 5, 1, 2) + 2  # not centred either
    out = conv(images)
    dZ = 1 + torch.randn(out.shape, generator=generator)
    out.backward(dZ)
    X = F.unfold(images.double(), conv.kernel_size, 1, conv.padding, conv.stride).mT.flatten(0, 1)
    expected, *_ = tract_gradient(X, dZ.movedim(1, -1).flatten(0, 2), conv.lambda_)
    gradient = conv.weight.grad.double().flatten(1)
    assert (gradient - expected).norm() <= 1e-6 * expected.norm()
