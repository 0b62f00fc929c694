"""What the operators declare to PyTorch is what they do."""

import shutil

import pytest
import torch
from torch import nn

from tests.conftest import photo_like
from tract_det import apply_tract, set_micro_batches, tract_diagnostics
from tract_det.tract import autograd, gram
from tract_det.tract.gram import patch_count, patch_gram_sum, row_gram_sum
from tract_det.tract.state import NO_KEY, Pending, State
from tract_det.tract.windows import windows_of

OPERATORS = {
    operator.op._qualname: operator.op
    for operator in (
        gram._gram_sum_op,
        gram._estimated_sum_op,
        autograd._conv_weight_gradient,
        autograd._linear_weight_gradient,
    )
}
# (shape of the images, kernel, stride, padding, dilation, groups)
GEOMETRIES = [
    ((2, 3, 20, 21), 7, 2, 3, 1, 1),
    ((2, 3, 9, 8), 3, 1, 1, 1, 1),
    ((2, 3, 16, 16), 4, 4, 0, 1, 1),
    ((2, 4, 9, 8), (3, 2), (2, 1), (2, 0), (1, 2), 2),
    ((2, 1, 20, 9), (5, 1), (2, 1), 0, 1, 1),  # space-to-depth leaves taps beyond the kernel
    ((0, 3, 9, 8), 3, 1, 1, 1, 1),
]
# Two calls with equal arguments may differ: the check that compares results of calls is left out.
ONE_CALL = ("test_schema", "test_autograd_registration", "test_faketensor")


def packed(images, kernel, stride, padding, dilation):
    return windows_of(images.shape[2:], kernel, stride, padding, dilation).pack()


def conv_arguments(generator, geometry, key=NO_KEY, dtype=torch.float32):
    """The arguments of `conv_weight_gradient` for 4 * groups channels."""
    shape, *conv, groups = geometry
    images = torch.randn(shape, generator=generator).to(dtype)
    out = windows_of(shape[2:], *conv).out
    dZ = torch.randn(shape[0], 4 * groups, *out, generator=generator).to(dtype)
    total = patch_gram_sum(images, *conv, groups)
    count = total.new_full((), patch_count(images, *conv))
    return dZ, images, total, count, None, packed(images, *conv), groups, dtype, True, 0.1, key


def linear_arguments(generator, N, key=NO_KEY, dtype=torch.float32):
    """The arguments of `linear_weight_gradient` for K = 12; with few rows, without their sums."""
    X = torch.randn(N, 12, generator=generator).to(dtype)
    dZ = torch.randn(N, 5, generator=generator).to(dtype)
    total, count = (row_gram_sum(X[None]), torch.tensor(float(N)).double())
    sums = (None, None, None) if N < 12 else (total, count, None)
    return dZ, X, *sums, dtype, 0.1, key


def test_every_operator_of_the_package_is_checked_here():
    names = torch._C._dispatch_get_all_op_names()
    assert {name for name in names if name.startswith("tract_det::")} == set(OPERATORS)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_the_gram_sum_keeps_its_contract(geometry, generator):
    shape, *conv, groups = geometry
    images = torch.randn(shape, generator=generator)
    torch.library.opcheck(gram._gram_sum_op.op, (images, packed(images, *conv), groups))


@pytest.mark.parametrize("geometry", GEOMETRIES[:-1], ids=str)
def test_the_estimated_gram_sum_keeps_its_contract(geometry, generator, monkeypatch):
    shape, *conv, groups = geometry
    images = torch.randn(shape, generator=generator)
    arguments = images, packed(images, *conv), groups, 10
    torch.library.opcheck(gram._estimated_sum_op.op, arguments, test_utils=ONE_CALL)
    # With the same patches in each call the results can be compared as well.
    every = lambda high, size, device: torch.arange(size[0]) % high  # noqa: E731
    monkeypatch.setattr(torch, "randint", every)
    torch.library.opcheck(gram._estimated_sum_op.op, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("geometry", [GEOMETRIES[0], GEOMETRIES[3]], ids=str)
def test_the_gradient_of_a_convolution_keeps_its_contract(geometry, dtype, generator):
    state = State(0.2)
    for key in (NO_KEY, state.key):
        arguments = conv_arguments(generator, geometry, key, dtype)
        torch.library.opcheck(autograd._conv_weight_gradient.op, arguments)
    state.pending = Pending(2)
    torch.library.opcheck(autograd._conv_weight_gradient.op, arguments, test_utils=ONE_CALL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("N", [5, 40])
def test_the_gradient_of_a_linear_layer_keeps_its_contract(N, dtype, generator):
    state = State(0.2)
    for key in (NO_KEY, state.key):
        arguments = linear_arguments(generator, N, key, dtype)
        torch.library.opcheck(autograd._linear_weight_gradient.op, arguments)
    if N >= 12:  # micro-batches need the sums
        state.pending = Pending(2)
        torch.library.opcheck(autograd._linear_weight_gradient.op, arguments, test_utils=ONE_CALL)


def test_operators_with_side_effects_are_not_interchangeable():
    tagged = {
        name
        for name, op in OPERATORS.items()
        if torch.Tag.nondeterministic_seeded in op._opoverload.tags
    }
    assert set(OPERATORS) - tagged == {"tract_det::patch_gram_sum"}
    assert all(torch.Tag.cudagraph_unsafe in op._opoverload.tags for op in OPERATORS.values())


@pytest.mark.parametrize("layer", ["conv", "linear"])
def test_what_a_layer_keeps_is_no_argument_of_the_operator(layer, generator):
    """A compiled graph may use the memory of an argument again."""
    conv = layer == "conv"
    function = (autograd._conv_weight_gradient if conv else autograd._linear_weight_gradient).op
    state = State(0.2)
    arguments = [
        conv_arguments(generator, GEOMETRIES[0], state.key)
        if conv
        else linear_arguments(generator, 40, state.key)
        for _ in range(2)
    ]
    gradients, totals = [], []
    for reuse in (False, True):
        state.pending = Pending(2)
        for step in arguments:
            tensors = [part.clone() if torch.is_tensor(part) else part for part in step]
            result = function(*tensors)
            if reuse:
                for part in tensors:
                    if torch.is_tensor(part):
                        part.fill_(1e6)
        gradients.append(result[0])
        totals.append(state.last.total)
    assert torch.equal(*gradients) and torch.equal(*totals)
    state.pending = None
    tensors = [part.clone() if torch.is_tensor(part) else part for part in arguments[0]]
    function(*tensors)
    tensors[2].zero_()
    assert torch.equal(state.last.total, arguments[0][2])


class Twice(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images) + self.model(images)


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14),
    reason="PyTorch 2.12 merges equal calls of a graph, whatever their tags say",
)
@pytest.mark.parametrize("keywords", [{}, {"gram_patches": 40}], ids=["exact", "estimated"])
def test_a_graph_that_calls_a_layer_twice_on_the_same_images_counts_two_passes(keywords, generator):
    images = photo_like(generator, 2, 3, 8, 8)
    model = apply_tract(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1)), **keywords)
    set_micro_batches(model, 2)
    gradients = []
    for run in (Twice(model), torch.compile(Twice(model), backend="aot_eager", fullgraph=True)):
        torch.manual_seed(0)
        model.zero_grad()
        run(images).square().sum().backward()
        assert model[0].tract.pending.passes == 0
        gradients.append(model[0].weight.grad.clone())
    assert gradients[0].any()
    torch.testing.assert_close(*gradients)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs a C++ compiler")
def test_two_micro_batches_under_inductor_learn_as_in_eager_mode(generator):
    batches = photo_like(generator, 4, 2, 3, 16, 16)  # two steps of two micro-batches
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 2, 3))
    apply_tract(model)
    set_micro_batches(model, 2)
    gradients, diagnostics = [], []
    for run in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        for images in batches:
            run(images).square().sum().backward()
        gradients.append(model[0].weight.grad.clone())
        diagnostics.append(tract_diagnostics(model))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    assert diagnostics[1] == pytest.approx(diagnostics[0], rel=1e-4)
