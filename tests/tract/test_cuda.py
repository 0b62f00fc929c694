"""TrAct on a real GPU: skipped where there is none."""

import copy

import pytest
import torch
from torch import nn

from tests.conftest import photo_like
from tests.reference import conv_gradient
from tract_det import TrActConv2d, apply_tract, tract_diagnostics

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
STEMS = [(7, 2, 3), (3, 1, 1), (16, 16, 0)]


def case(kernel, stride, padding, generator, dtype=torch.float32):
    """A layer, photographs and a gradient by the output, on the device."""
    conv = TrActConv2d(3, 64, kernel, stride, padding).cuda()
    images = photo_like(generator, 16, 3, 160, 160).cuda()
    dZ = torch.randn(conv(images).shape, generator=generator).cuda().to(dtype)
    return conv, images, dZ


def error(conv, images, dZ):
    expected, _, _ = conv_gradient(copy.deepcopy(conv).cpu(), images.cpu(), dZ.cpu(), 0.1)
    gradient = conv.weight.grad.flatten(1).cpu().double()
    return float((gradient - expected[0]).norm() / expected[0].norm())


@pytest.mark.parametrize("stem", STEMS, ids=lambda s: f"{s[0]}x{s[0]}")
@pytest.mark.parametrize(("tf32", "bound"), [(False, 1.5e-3), (True, 5e-3)])
def test_the_gradient_on_cuda_is_that_of_float64(stem, tf32, bound, generator, monkeypatch):
    """`G` is of TF32 in either case."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    conv, images, dZ = case(*stem, generator)
    conv(images).backward(dZ)
    assert error(conv, images, dZ) < bound


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("stem", STEMS, ids=lambda s: f"{s[0]}x{s[0]}")
def test_under_autocast_the_gradient_is_that_of_the_rounded_one(stem, layout, generator):
    conv, images, dZ = case(*stem, generator, torch.bfloat16)
    conv, images = conv.to(memory_format=layout), images.to(memory_format=layout)
    with torch.autocast("cuda", torch.bfloat16):
        Z = conv(images)
    Z.backward(dZ)
    assert error(conv, images, dZ.float()) < 5e-3


def test_a_step_never_waits_for_the_device(generator):
    model = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3), nn.BatchNorm2d(8), nn.ReLU()).cuda()
    apply_tract(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images = photo_like(generator, 8, 3, 64, 64).cuda()

    def step():
        optimizer.zero_grad(set_to_none=True)
        model(images).square().mean().backward()
        optimizer.step()

    step()  # libraries initialise themselves
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert tract_diagnostics(model)["tract_condition"] > 1


def test_memory_that_is_freed_and_used_again_at_once_changes_no_gradient(generator):
    """The side stream still reads an input that nothing else holds."""
    conv, images, dZ = case(7, 2, 3, generator)
    conv(images).backward(dZ)
    expected, conv.weight.grad = conv.weight.grad, None
    for _ in range(20):
        conv(images.clone())  # no backward pass
        torch.full_like(images, 1e9)
        conv(images.clone()).backward(dZ)
        torch.testing.assert_close(conv.weight.grad, expected, rtol=1e-3, atol=1e-4)
        conv.weight.grad = None
