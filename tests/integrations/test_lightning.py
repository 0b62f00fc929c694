import csv

import pytest
import torch
from torch import nn

pytest.importorskip("lightning", reason="Lightning is not installed: pip install lightning")
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from tests.conftest import run_python
from tests.integrations.common import (
    BATCH,
    RATE,
    assert_same_steps,
    network,
    oracle_steps,
    samples,
)
from tract_det import TrActConv2d, set_micro_batches
from tract_det.errors import UserError
from tract_det.integrations.lightning import TrActCallback
from tract_det.tract.modules import tract_layers


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network()

    def training_step(self, batch, index):
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=RATE)


class Weights(Callback):
    """The stem's weights after every optimizer step."""

    def __init__(self):
        self.after, self.steps, self.lambdas = [], 0, []

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step > self.steps:
            self.steps = trainer.global_step
            ((_, stem),) = tract_layers(module)
            self.after.append(stem.weight.detach().clone())
            self.lambdas.append(stem.lambda_)


class Stream(IterableDataset):
    """Samples whose number nobody knows in advance."""

    def __init__(self, number):
        self.number = number

    def __iter__(self):
        return iter(zip(*samples(self.number), strict=True))


def fit(tmp_path, dataset, *, module=None, callback=None, sampler=None, **options):
    weights = Weights()
    trainer = Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "default_root_dir": tmp_path,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **options,
        },
        callbacks=[callback or TrActCallback(), weights],
    )
    module = Module() if module is None else module
    trainer.fit(module, DataLoader(dataset, batch_size=BATCH, sampler=sampler))
    return trainer, module, weights


@pytest.mark.parametrize(
    "data", [lambda n: TensorDataset(*samples(n)), Stream], ids=["map", "stream"]
)
def test_every_step_is_the_oracles_also_the_short_last_one(tmp_path, data):
    """Five batches of which two make a step: the last step has one. Lightning halves its loss."""
    _, _, weights = fit(tmp_path, data(5 * BATCH), accumulate_grad_batches=2)
    pair = [BATCH, BATCH]
    assert_same_steps(weights.after, oracle_steps([pair, pair, [BATCH]], scale=2))


def test_without_accumulation_every_batch_is_a_step(tmp_path):
    _, _, weights = fit(tmp_path, TensorDataset(*samples(2 * BATCH)))
    assert_same_steps(weights.after, oracle_steps([[BATCH], [BATCH]]))


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path):
    """Lightning starts the second process; each rank has every other sample of a step."""
    result = run_python("-m", "tests.integrations.ranks", "lightning", tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    both = [torch.load(tmp_path / f"{rank}.pth") for rank in range(2)]
    for weights in both:
        assert_same_steps(weights, oracle_steps([[2 * BATCH] * 2, [2 * BATCH]], scale=2))
    assert all(map(torch.equal, *both))


def test_checkpoints_fit_with_and_without_tract(tmp_path):
    data, path = TensorDataset(*samples(BATCH)), tmp_path / "with.ckpt"
    trainer, module, _ = fit(tmp_path, data)
    trainer.save_checkpoint(path)
    assert list(torch.load(path)["state_dict"]) == list(Module().state_dict())
    plain = Module.load_from_checkpoint(path)
    assert type(plain.net[0]) is nn.Conv2d
    assert torch.equal(plain.net[0].weight, module.net[0].weight)

    trainer = Trainer(accelerator="cpu", max_epochs=1, logger=False, default_root_dir=tmp_path)
    trainer.fit(Module(), DataLoader(data, batch_size=BATCH))
    trainer.save_checkpoint(tmp_path / "without.ckpt")
    resumed = Module()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[TrActCallback()],
        logger=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(resumed, DataLoader(data, batch_size=BATCH), ckpt_path=tmp_path / "without.ckpt")
    assert trainer.global_step == 2 and type(resumed.net[0]) is TrActConv2d


def test_a_schedule_sets_lambda_by_the_fraction_of_the_steps(tmp_path):
    fractions = []

    def schedule(fraction):
        fractions.append(fraction)
        return 0.1 + fraction

    callback = TrActCallback(schedule=schedule)
    data = TensorDataset(*samples(5 * BATCH))
    _, _, weights = fit(tmp_path, data, callback=callback, accumulate_grad_batches=2, max_epochs=2)
    assert fractions == pytest.approx([step / 6 for step in range(6)])
    assert weights.lambdas == pytest.approx([0.1 + step / 6 for step in range(6)])


def test_the_logger_gets_the_diagnostics_every_few_steps(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    fit(
        tmp_path,
        TensorDataset(*samples(8 * BATCH)),
        logger=logger,
        callback=TrActCallback(log_every=2),
        accumulate_grad_batches=2,
    )
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 3]
    assert all(float(row["tract_lambda"]) == pytest.approx(0.1) for row in rows)
    assert all(float(row["stem_grad_norm"]) > 0 for row in rows)


def test_a_second_fit_goes_on(tmp_path):
    data = TensorDataset(*samples(BATCH))
    trainer, module, weights = fit(tmp_path, data)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, DataLoader(data, batch_size=BATCH))
    assert len(weights.after) == 2


def _with_compiled_network():
    module = Module()
    module.net = torch.compile(module.net)
    return module


def _with_wrapped_network():
    module = Module()
    module.net = nn.DataParallel(module.net)
    return module


def test_a_network_compiled_in_configure_model_takes_the_same_steps(tmp_path):
    class Compiled(Module):
        def configure_model(self):
            self.net = torch.compile(self.net, backend="aot_eager")

    data = TensorDataset(*samples(4 * BATCH))
    _, _, weights = fit(tmp_path, data, module=Compiled(), accumulate_grad_batches=2)
    assert_same_steps(weights.after, oracle_steps([[BATCH] * 2] * 2))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_with_compiled_network, "'net' is already compiled"),
        (_with_wrapped_network, "'net' is already wrapped in DataParallel"),
        (lambda: torch.compile(Module()), "Module is already compiled"),
    ],
    ids=["network_compiled", "network_wrapped", "module_compiled"],
)
def test_a_module_that_is_wrapped_or_compiled_is_refused(tmp_path, make, says):
    with pytest.raises(UserError, match=f"{says}: give TrActCallback to Trainer"):
        fit(tmp_path, TensorDataset(*samples(BATCH)), module=make())


def test_a_callback_that_comes_after_the_optimizer_is_refused(tmp_path):
    trainer = Trainer(accelerator="cpu", max_epochs=1, logger=False, default_root_dir=tmp_path)
    module, loader = Module(), DataLoader(TensorDataset(*samples(BATCH)), batch_size=BATCH)
    trainer.fit(module, loader)
    trainer.callbacks.append(TrActCallback())
    with pytest.raises(UserError, match="SGD was made before TrAct was applied"):
        trainer.fit(module, loader)


def test_a_network_that_is_replaced_after_setup_is_refused(tmp_path):
    class Late(Module):
        def configure_model(self):
            self.net = network()

    with pytest.raises(UserError, match="Late has no TrAct layer"):
        fit(tmp_path, TensorDataset(*samples(BATCH)), module=Late())


def test_a_schedule_without_an_end_is_refused(tmp_path):
    with pytest.raises(UserError, match="set max_steps or max_epochs"):
        fit(
            tmp_path,
            TensorDataset(*samples(BATCH)),
            max_epochs=-1,
            callback=TrActCallback(schedule=lambda fraction: 0.1),
        )


def test_a_module_with_manual_optimization_keeps_its_own_micro_batches(tmp_path):
    class Manual(Module):
        automatic_optimization = False

        def training_step(self, batch, index):
            optimizer = self.optimizers()
            if index % 2 == 0:
                optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, index) / 2)
            if index % 2:
                optimizer.step()

        def on_train_start(self):
            set_micro_batches(self, 2)

    _, _, weights = fit(tmp_path, TensorDataset(*samples(4 * BATCH)), module=Manual())
    assert_same_steps(weights.after, oracle_steps([[BATCH] * 2] * 2))
