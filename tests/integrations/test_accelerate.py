import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("accelerate", reason="Accelerate is not installed: pip install accelerate")
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from tests.integrations.common import (
    BATCH,
    LAMBDA,
    RATE,
    assert_same_steps,
    assert_two_processes_take_the_steps_of_one,
    network,
    oracle_steps,
    samples,
)
from tract_det import TrActConv2d, set_lambda, tract_diagnostics
from tract_det.errors import UserError
from tract_det.integrations.accelerate import prepare_tract


@pytest.fixture(autouse=True)
def fresh_state():
    """Accelerate keeps its state in singletons."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def train(accumulation, number, *, epochs=1, folder=None, tract=True):
    """The prepared model, and the stem's weights after every step."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model = network()
    if tract:
        prepare_tract(accelerator, model, LAMBDA)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    loader = DataLoader(TensorDataset(*samples(number)), batch_size=BATCH)
    stem = model[0]
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    weights = []
    for _ in range(epochs):
        for images, labels in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(images), labels))
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                weights.append(stem.weight.detach().clone())
    if folder is not None:
        accelerator.save_state(folder)
    return model, weights


def test_every_step_is_the_oracles_also_the_short_last_one():
    """Accelerate halves the loss of a last step of one micro-batch, too."""
    _, weights = train(2, 5 * BATCH)
    pair = [BATCH, BATCH]
    assert_same_steps(weights, oracle_steps([pair, pair, [BATCH]], scale=2))


def test_without_accumulation_every_batch_is_a_step():
    model, weights = train(1, 2 * BATCH)
    assert_same_steps(weights, oracle_steps([[BATCH], [BATCH]]))
    assert tract_diagnostics(model)["tract_lambda"] == pytest.approx(LAMBDA)
    set_lambda(model, 0.2)
    assert model[0].lambda_ == 0.2


def test_a_short_epoch_does_not_reach_into_the_next():
    _, weights = train(2, 3 * BATCH, epochs=2)
    assert len(weights) == 4
    parts = [[BATCH] * 2, [BATCH]]
    assert_same_steps(weights[:2], oracle_steps(parts, scale=2))


@pytest.mark.parametrize("saved_with", [True, False])
def test_checkpoints_fit_with_and_without_tract(tmp_path, saved_with):
    model, _ = train(1, BATCH, folder=tmp_path, tract=saved_with)
    accelerator = Accelerator(cpu=True)
    other = network()
    if not saved_with:
        prepare_tract(accelerator, other)
    other, _ = accelerator.prepare(other, torch.optim.SGD(other.parameters(), lr=RATE))
    accelerator.load_state(tmp_path)
    assert type(other[0]) is (nn.Conv2d if saved_with else TrActConv2d)
    assert torch.equal(other[0].weight, model[0].weight)


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path):
    assert_two_processes_take_the_steps_of_one("accelerate", tmp_path, scale=2)


def test_a_model_that_is_prepared_is_refused():
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(network())
    with pytest.raises(UserError, match="Sequential is already prepared: call prepare_tract"):
        prepare_tract(accelerator, model)


def test_an_optimizer_that_is_prepared_is_refused():
    accelerator, model = Accelerator(cpu=True), network()
    accelerator.prepare(torch.optim.SGD(model.parameters(), lr=RATE))
    with pytest.raises(UserError, match="made before TrAct was applied: call prepare_tract"):
        prepare_tract(accelerator, model)


def test_a_compiled_model_is_refused():
    with pytest.raises(UserError, match="the model is already compiled: call prepare_tract"):
        prepare_tract(Accelerator(cpu=True), torch.compile(network(), backend="eager"))
    model = network()
    model.compile(backend="eager")
    with pytest.raises(UserError, match="the model is already compiled: call prepare_tract"):
        prepare_tract(Accelerator(cpu=True), model)


def test_a_wrapped_model_is_refused(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(network())
        with pytest.raises(UserError, match="already wrapped in DistributedDataParallel: call"):
            prepare_tract(Accelerator(cpu=True), wrapped)
    finally:
        torch.distributed.destroy_process_group()
