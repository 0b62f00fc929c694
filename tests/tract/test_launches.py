"""The way of accelerators: its sums against float64, and what it asks of a device, without one."""

from collections import Counter
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import photo_like
from tests.reference import conv_gradient as oracle
from tests.reference import tract_gradient
from tests.tract.test_gram import by_patches, geometries
from tract_det import TrActConv2d, TrActError, TrActLinear, set_micro_batches
from tract_det.tract import device, launches
from tract_det.tract.device import as_on_an_accelerator, set_workspace
from tract_det.tract.gradient import conv_gradient
from tract_det.tract.gram import patch_gram, row_gram_sum
from tract_det.tract.windows import windows_of


@pytest.fixture(autouse=True)
def default_settings(monkeypatch):
    monkeypatch.setattr(device, "_SETTINGS", device._Settings())


@contextmanager
def workspace(size):
    """A workspace of so many bytes, however few."""
    before, device._SETTINGS.workspace = device._SETTINGS.workspace, size
    try:
        with as_on_an_accelerator():
            yield
    finally:
        device._SETTINGS.workspace = before


# The sums


@settings(max_examples=150, deadline=None)
@given(geometries(), st.sampled_from([2**10, 2**13, 2**16, 2**28]), st.sampled_from("NHWC NCHW"))
def test_both_sums_equal_explicit_patches_in_every_geometry(case, size, layout):
    shape, kernel, stride, padding, dilation, groups = case
    generator = torch.Generator().manual_seed(1)
    # Not around zero, so that centring and the zeros of the padding matter.
    images = torch.randn(shape, generator=generator) + 3
    windows = windows_of(shape[2:], kernel, stride, padding, dilation)
    dZ = torch.randn(shape[0], 2 * groups, *windows.out, generator=generator)
    if layout == "NHWC":
        images, dZ = (t.to(memory_format=torch.channels_last) for t in (images, dZ))
    with workspace(size):
        gram = patch_gram(images, kernel, stride, padding, dilation, groups)
        plain, sum_dZ = conv_gradient(images, dZ, windows, groups, bias=True, exact=False)
    torch.testing.assert_close(sum_dZ, dZ.double().sum((0, 2, 3)))
    expected = by_patches(images, kernel, stride, padding, dilation, groups)
    torch.testing.assert_close(gram, expected, rtol=1e-5, atol=1e-4)
    weight = torch.zeros(plain.shape, dtype=torch.float64)
    expected = torch.ops.aten.convolution_backward(
        *(dZ.double(), images.double(), weight, None, stride, padding, dilation, False),
        *((0, 0), groups, (False, True, False)),
    )[1]
    torch.testing.assert_close(plain, expected, rtol=1e-5, atol=2e-4)


def test_float64_stays_float64(generator):
    images = torch.randn(2, 3, 12, 13, generator=generator).double() * 60 + 120
    windows = windows_of((12, 13), 5, 2, 2, 1)
    dZ = torch.randn(2, 4, *windows.out, generator=generator).double()
    expected = conv_gradient(images, dZ, windows, 1, bias=False, exact=True)[0]
    with as_on_an_accelerator():
        gram = patch_gram(images, 5, 2, 2)
        plain = conv_gradient(images, dZ, windows, 1, bias=False, exact=False)[0]
    torch.testing.assert_close(gram, patch_gram(images, 5, 2, 2), rtol=1e-12, atol=1e-8)
    torch.testing.assert_close(plain, expected, rtol=1e-12, atol=1e-8)


@pytest.mark.parametrize("N", [1, 40, 9_000])
def test_sums_over_rows_equal_float64(N, generator):
    X = torch.randn(2, N, 11, generator=generator) * 3 + 5
    with workspace(2**16):
        torch.testing.assert_close(
            row_gram_sum(X), X.double().mT @ X.double(), rtol=1e-6, atol=1e-6 * N
        )


def test_no_image_gives_zeros():
    images, dZ = torch.zeros(0, 3, 9, 9), torch.zeros(0, 4, 9, 9)
    windows = windows_of((9, 9), 3, 1, 1, 1)
    assert not launches.gram_sum(images, windows).any()
    assert not launches.gradient_sum(images, dZ, windows)[0].any()


# The gradient on photographs

# Kernel, stride, padding, channels, images and their size; the last have fewer patches than pixels.
STEMS = [
    (7, 2, 3, 64, 4, 112),
    (3, 1, 1, 64, 4, 112),
    (16, 16, 0, 96, 16, 160),
    (16, 16, 0, 96, 4, 112),
]


def tf32(x):
    """Float32 numbers rounded to the 10 bits of TF32's mantissa."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32)


def error(conv, images, dZ):
    """Of the gradient that the layer learns by, against float64."""
    with as_on_an_accelerator():
        conv(images).backward(dZ)
    expected, _, _ = oracle(conv, images, dZ, conv.lambda_)
    difference = conv.weight.grad.flatten(1).double() - expected[0]
    return float(difference.norm() / expected.norm())


@pytest.fixture(params=STEMS, ids=lambda stem: f"{stem[0]}x{stem[0]}-{stem[4]}")
def photographs(request, generator):
    """A layer, standardised photographs, and a gradient that depends on them."""
    kernel, stride, padding, channels, batch, size = request.param
    conv = TrActConv2d(3, channels, kernel, stride, padding, bias=False)
    images = photo_like(generator, batch, 3, size, size)
    with torch.no_grad():
        Z = F.conv2d(images, conv.weight, None, stride, padding)
    return conv, images, (Z / Z.std()).relu() - 0.4 + 0.1 * torch.randn(Z.shape)


def test_float32_products_are_right_to_1e_5(photographs):
    conv, images, dZ = photographs
    assert error(conv, images, dZ) < 1e-5


@pytest.mark.parametrize("photographs", STEMS[:3], indirect=True, ids=["7x7", "3x3", "16x16"])
def test_products_of_tf32_in_the_gram_matrix_are_right_to_1e_3(photographs, monkeypatch):
    conv, images, dZ = photographs
    sums = []
    for name in ("_gram_by_rows", "_by_patches"):
        function = getattr(launches, name)

        def of_rounded(x, windows, centre, dZ=None, function=function):
            if dZ is not None:
                return function(x, windows, centre, dZ)
            sums.append(function)
            mean = centre.to(x.dtype)[:, None, None]
            return function(tf32(x - mean) + mean, windows, centre)

        monkeypatch.setattr(launches, name, of_rounded)
    assert 1e-7 < error(conv, images, dZ) < 1e-3
    assert len(sums) == 1


@pytest.mark.parametrize("scale", [1.0, 0.97])  # whole numbers are exact, others are not
def test_pixels_from_0_to_255_are_right_to_1_percent(photographs, scale):
    conv, images, dZ = photographs
    pixels = (images * 58 + 120).round().clamp(0, 255) * scale
    assert error(conv, pixels, dZ) < 1e-2


def test_settings_of_a_layer_hold_on_this_way_too(generator):
    """Micro-batches, a power, relative damping and a black batch."""
    images = torch.randn(4, 3, 20, 20, generator=generator) + 1
    dZ = torch.randn(4, 8, 10, 10, generator=generator)

    def gradient(accelerated, batches=1, power=1.0, relative=False, images=images):
        torch.manual_seed(0)
        conv = TrActConv2d(3, 8, 3, 2, 1)
        conv.tract.power, conv.tract.relative = power, relative
        set_micro_batches(conv, batches)
        with as_on_an_accelerator() if accelerated else contextmanager(lambda: (yield))():
            for x, z in zip(images.chunk(batches), dZ.chunk(batches), strict=True):
                conv(x).backward(z)
        return conv.weight.grad

    for case in (
        {},
        {"batches": 2},
        {"power": 0.5},
        {"relative": True},
        {"relative": True, "images": torch.zeros_like(images)},
    ):
        torch.testing.assert_close(
            gradient(True, **case), gradient(False, **case), rtol=1e-5, atol=1e-5
        )


def test_a_linear_layer_learns_the_same_on_this_way(generator):
    rows, dZ = torch.randn(60, 12, generator=generator) + 2, torch.randn(60, 5, generator=generator)
    linear = TrActLinear(12, 5)
    with as_on_an_accelerator():
        linear(rows).backward(dZ)
    expected, _, _ = tract_gradient(rows, dZ, 0.1)
    torch.testing.assert_close(linear.weight.grad.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_compiled_layer_goes_this_way_too(generator):
    images, dZ = (torch.randn(2, c, 12, 12, generator=generator) for c in (3, 4))
    conv = TrActConv2d(3, 4, 3, 1, 1)
    with as_on_an_accelerator():
        conv(images).backward(dZ)
        expected, conv.weight.grad = conv.weight.grad, None
        torch.compile(conv, backend="aot_eager")(images).backward(dZ)
    torch.testing.assert_close(conv.weight.grad, expected, rtol=1e-5, atol=1e-6)


def test_a_workspace_that_is_not_positive_is_refused():
    with pytest.raises(TrActError, match="0 MiB: it must be at least 1"):
        set_workspace(0)


# What is asked of a device: tensors on "cuda" without values, where no GPU is needed


class Shape(NamedTuple):
    """Of a stem and its input."""

    batch: int
    height: int
    width: int
    channels: int
    kernel: int
    stride: int
    padding: int


SHAPES = [
    Shape(256, 224, 224, 64, 7, 2, 3),
    Shape(256, 224, 224, 64, 3, 1, 1),
    Shape(128, 32, 32, 64, 3, 1, 1),
    Shape(256, 224, 224, 384, 16, 16, 0),
    Shape(2, 800, 1333, 64, 7, 2, 3),
    Shape(16, 800, 1333, 64, 7, 2, 3),
    Shape(2, 600, 1000, 64, 3, 1, 1),
]
# They launch nothing: views, and memory.
VIEWS = {
    *("view", "_unsafe_view", "expand", "slice", "unfold", "permute", "transpose", "reshape"),
    *("narrow", "select", "alias", "detach", "unsqueeze", "squeeze", "t", "split", "as_strided"),
    *("diagonal", "_reshape_alias", "unflatten", "movedim", "device", "empty", "new_empty"),
}


class Device(TorchDispatchMode):
    """Counts operations, and the bytes of the tensors that are alive."""

    def __init__(self):
        super().__init__()
        self.operations = Counter()
        self.peak = 0
        self._alive = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if name not in VIEWS:
            self.operations[name] += 1
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if torch.is_tensor(tensor):
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {k: v for k, v in self._alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


def on_a_device(shape, dtype, layer=TrActConv2d):
    """What a forward and backward pass of a stem takes, without input and output gradient."""
    with FakeTensorMode(), Device() as used:
        conv = layer(
            *(3, shape.channels, shape.kernel, shape.stride, shape.padding),
            device="cuda",
            dtype=dtype,
        )
        images = torch.empty(shape.batch, 3, shape.height, shape.width, device="cuda", dtype=dtype)
        used.operations.clear()
        output = conv(images)
        dZ = torch.empty_like(output)
        before = sum(size for _, size in used._alive.values())
        output.grad_fn.apply(dZ) if hasattr(output.grad_fn, "apply") else output.grad_fn(dZ)
    return sum(used.operations.values()), used.peak - before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.kernel}-{s.batch}x{s.width}")
def test_a_stem_asks_little_of_a_device_and_never_reads_from_it(shape, dtype):
    """A scalar read, and an operation on two devices, raise under FakeTensorMode."""
    operations, memory = on_a_device(shape, dtype)
    plain, plain_memory = on_a_device(shape, dtype, nn.Conv2d)
    assert operations - plain <= 140
    assert memory - plain_memory <= 256 * 2**20
    set_workspace(64)
    assert on_a_device(shape, dtype)[1] - plain_memory <= 64 * 2**20


def test_a_larger_batch_takes_a_few_more_operations_for_each_block_only():
    few, many = (on_a_device(SHAPES[0]._replace(batch=b), torch.float32)[0] for b in (256, 512))
    pixels, gradients = 3 * (2 * 7 + 4) * 112 * 112 * 4, 64 * 112 * 112 * 4  # bytes of an image
    more_blocks = 256 * (pixels + (pixels + gradients)) / (0.9 * 256 * 2**20)
    assert many - few <= 4 * (more_blocks + 2)


class Stream:
    """Notes what waits for what."""

    events: list = []  # noqa: RUF012 - of the test

    def __init__(self, name="side"):
        self.name = name

    def wait_stream(self, other):
        self.events.append(f"{self.name} waits for {other.name}")


def test_on_cuda_what_needs_the_input_alone_runs_beside_the_forward_pass(generator, monkeypatch):
    Stream.events = events = []
    main = Stream("main")

    @contextmanager
    def inside(stream):
        events.append(f"{stream.name} begins")
        yield
        events.append(f"{stream.name} ends")

    def noted(name, function):
        def call(*args, **kwargs):
            events.append(name)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(device, "_has_streams", lambda tensor: True)
    monkeypatch.setattr(device, "_SIDE_STREAMS", {})
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: main)
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    for module, name in (
        (launches, "gram_sum"),
        (launches, "gradient_sum"),
        (torch.linalg, "cholesky_ex"),
        (torch.linalg, "solve_triangular"),
        (F, "conv2d"),
    ):
        monkeypatch.setattr(module, name, noted(name, getattr(module, name)))
    conv = TrActConv2d(3, 4, 3)
    with as_on_an_accelerator():
        conv(torch.randn(2, 3, 8, 8, generator=generator)).sum().backward()
    forward, backward = events[: events.index("conv2d")], events[events.index("conv2d") + 1 :]
    assert forward == [
        *("side waits for main", "side begins", "gram_sum", "cholesky_ex", "side ends")
    ]
    assert set(backward[:3]) == {"main waits for side"}
    assert backward[3:] == ["gradient_sum", "solve_triangular", "solve_triangular"]
