import itertools

import pytest
import torch
from torch import nn

pytest.importorskip("mmengine", reason="MMEngine is not installed: pip install mmengine")
from mmengine.hooks import EMAHook, Hook
from mmengine.model import BaseModel, ImgDataPreprocessor
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import MODEL_WRAPPERS
from mmengine.runner import Runner

from tests.integrations.common import (
    BATCH,
    RATE,
    assert_same_steps,
    assert_two_processes_take_the_steps_of_one,
    network,
    oracle_steps,
    samples,
)
from tract_det import TrActConv2d, TrActError, apply_tract, set_image_sizes
from tract_det.errors import UserError
from tract_det.integrations.mmengine import TrActHook
from tract_det.pixels import IMAGENET_STD, input_variance
from tract_det.tract.modules import tract_layers

NAMES = itertools.count()


class Classifier(BaseModel):
    def __init__(self, preprocessor=None):
        super().__init__(data_preprocessor=preprocessor)
        self.net = network()

    def forward(self, inputs, data_samples=None, mode="tensor"):
        return {"loss": nn.functional.cross_entropy(self.net(inputs), data_samples)}


class Weights(Hook):
    """The stem's weights after every optimizer step, and its lambda."""

    def __init__(self):
        self.after, self.lambdas, self.effective = [], [], []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        model = getattr(runner.model, "module", runner.model)
        if runner.optim_wrapper.should_update():
            self.after.append(model.net[0].weight.detach().clone())
            self.lambdas += [layer.lambda_ for _, layer in tract_layers(model)]


def runner(folder, number, *, model=None, tract=None, accumulates=1, epochs=1, **options):
    """A Runner over `number` samples in order, and what `Weights` will have seen."""
    weights = Weights()
    data = [
        {"inputs": image, "data_samples": label}
        for image, label in zip(*samples(number), strict=True)
    ]
    optimizer = {"type": "SGD", "lr": RATE}
    made = Runner(
        **{
            "model": Classifier() if model is None else model,
            "work_dir": str(folder),
            "train_dataloader": {
                "dataset": data,
                "batch_size": BATCH,
                "sampler": {"type": "DefaultSampler", "shuffle": False},
                "collate_fn": {"type": "default_collate"},
            },
            "train_cfg": {"by_epoch": True, "max_epochs": epochs},
            "optim_wrapper": {"optimizer": optimizer, "accumulative_counts": accumulates},
            "custom_hooks": [*([{"type": "TrActHook"}] if tract is None else tract), weights],
            "experiment_name": f"run_{next(NAMES)}",
            "log_level": "ERROR",
            **options,
        }
    )
    return made, weights


def train(*args, **options):
    made, weights = runner(*args, **options)
    made.train()
    return made, weights


def test_every_step_is_the_oracles_also_the_short_last_one(tmp_path):
    """Five batches of which two make a step: the last step has one, and its own loss."""
    _, weights = train(tmp_path, 5 * BATCH, accumulates=2)
    pair = [BATCH, BATCH]
    assert_same_steps(weights.after, oracle_steps([pair, pair, [BATCH]]))


def test_without_accumulation_every_batch_is_a_step(tmp_path):
    _, weights = train(tmp_path, 2 * BATCH)
    assert_same_steps(weights.after, oracle_steps([[BATCH], [BATCH]]))


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path):
    assert_two_processes_take_the_steps_of_one("mmengine", tmp_path)


@pytest.mark.parametrize("saved_with", [True, False])
def test_checkpoints_fit_with_and_without_tract(tmp_path, monkeypatch, saved_with):
    first, _ = train(tmp_path, BATCH, tract=None if saved_with else [])
    saved = torch.load(tmp_path / "epoch_1.pth", weights_only=False)["state_dict"]
    assert list(saved) == list(Classifier().state_dict())
    # MMEngine 0.10.7 loads its checkpoints as torch did before 2.6.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    hooks = [] if saved_with else None
    second, weights = train(tmp_path, BATCH, tract=hooks, epochs=2, resume=True)
    assert second.iter == 2 and len(weights.after) == 1
    assert type(second.model.net[0]) is (nn.Conv2d if saved_with else TrActConv2d)
    assert torch.equal(saved["net.0.weight"], first.model.net[0].weight)


def test_a_moving_average_is_plain(tmp_path):
    average = EMAHook()
    train(tmp_path, 2 * BATCH, tract=[{"type": "TrActHook"}, average])
    assert type(average.ema_model.module.net[0]) is nn.Conv2d
    saved = torch.load(tmp_path / "epoch_1.pth", weights_only=False)
    assert list(saved["state_dict"]) == list(Classifier().state_dict())


@pytest.mark.slow
def test_a_train_step_that_the_runner_compiles_takes_the_same_steps(tmp_path):
    cfg = {"compile": {"backend": "aot_eager"}}
    _, weights = train(tmp_path, 4 * BATCH, accumulates=2, cfg=cfg)
    assert_same_steps(weights.after, oracle_steps([[BATCH] * 2] * 2))


def test_a_schedule_sets_lambda_by_the_fraction_of_the_steps(tmp_path):
    hook = TrActHook(schedule=lambda done: 0.1 + done)
    _, weights = train(tmp_path, 5 * BATCH, tract=[hook], accumulates=2)
    assert weights.lambdas == pytest.approx([0.1 + step / 3 for step in range(3)])


def test_the_log_gets_the_diagnostics_every_few_iterations(tmp_path):
    made, _ = train(tmp_path, 4 * BATCH, tract=[TrActHook(log_every=2)])
    buffer = made.message_hub.get_scalar("train/tract_lambda")
    values, _ = buffer.data
    assert list(values) == pytest.approx([0.1, 0.1])
    assert made.message_hub.get_scalar("train/stem_grad_norm").current() > 0


@pytest.mark.parametrize(
    ("preprocessor", "settings", "effective"),
    [
        (None, {}, 0.1),
        (ImgDataPreprocessor([0.0] * 3, IMAGENET_STD), {}, 0.1),
        (ImgDataPreprocessor([0.0] * 3, [1.0] * 3), {}, 0.1 * input_variance([1.0] * 3)),
        (ImgDataPreprocessor(), {}, 0.1 * input_variance([1.0] * 3)),
        (ImgDataPreprocessor(), {"pixel_std": IMAGENET_STD}, 0.1),
        (ImgDataPreprocessor(), {"relative": True}, 0.1),
    ],
    ids=["unknown", "imagenet", "caffe", "raw", "pipeline", "relative"],
)
def test_lambda_is_of_standardised_pixels(tmp_path, preprocessor, settings, effective):
    hook = TrActHook(schedule=lambda done: 0.1, **settings)
    model = Classifier(preprocessor)
    _, weights = train(tmp_path, BATCH, model=model, tract=[hook])
    assert weights.lambdas == pytest.approx([effective])


def test_the_zeros_that_pad_a_batch_are_no_patches(tmp_path):
    images, labels = samples(2)
    images = [images[0], images[1, :, :9, :7]]
    model = Classifier(ImgDataPreprocessor(pad_size_divisor=8))
    data = [{"inputs": i, "data_samples": n} for i, n in zip(images, labels, strict=True)]
    loader = {
        "dataset": data,
        "batch_size": 2,
        "sampler": {"type": "DefaultSampler", "shuffle": False},
        "collate_fn": _listed,
    }
    hook = TrActHook(pixel_std=IMAGENET_STD)
    _, weights = train(tmp_path, 2, model=model, tract=[hook], train_dataloader=loader)

    wanted = apply_tract(network())
    set_image_sizes(wanted, [(12, 12), (9, 7)], edges=True)
    padded = torch.zeros(2, 3, 16, 16)
    for place, image in zip(padded, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    nn.functional.cross_entropy(wanted(padded), labels).backward()
    update = weights.after[0] - network()[0].weight.detach()
    assert torch.allclose(update, -RATE * wanted[0].weight.grad, rtol=1e-5, atol=1e-7)


def _listed(batch):
    """Images of several sizes in a list, which the model's preprocessor pads."""
    labels = torch.stack([sample["data_samples"] for sample in batch])
    return {"inputs": [sample["inputs"] for sample in batch], "data_samples": labels}


def test_a_frozen_stem_is_refused(tmp_path):
    model = Classifier()
    model.net[0].requires_grad_(False)
    with pytest.raises(TrActError, match=r"'net\.0' is frozen"):
        train(tmp_path, BATCH, model=model)


def test_several_optimizers_that_accumulate_are_refused(tmp_path):
    model = Classifier()
    parts = {
        name: OptimWrapper(torch.optim.SGD(part.parameters(), lr=RATE), accumulative_counts=2)
        for name, part in (("stem", model.net[0]), ("head", model.net[-1]))
    }
    with pytest.raises(UserError, match="leave accumulative_counts out"):
        train(tmp_path, BATCH, model=model, optim_wrapper=OptimWrapperDict(**parts))


def test_a_wrapper_that_replaces_the_parameters_is_refused(tmp_path):
    @MODEL_WRAPPERS.register_module(force=True)
    class Sharded(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module
            self.train_step = module.train_step

    with pytest.raises(UserError, match="wraps the model in Sharded: TrActHook needs MMDist"):
        train(tmp_path, BATCH, model=Sharded(Classifier()))
