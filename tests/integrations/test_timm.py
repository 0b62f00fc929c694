"""The loop of timm's train.py in the lines of docs/trainers.md, with timm's own parts."""

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, NativeScaler
from torch import nn

from tests.integrations.common import BATCH, RATE, assert_same_steps, network, oracle_steps, samples
from tract_det import TrActConv2d, apply_tract, set_micro_batches


def test_every_step_of_timms_loop_is_the_oracles_also_the_short_last_one():
    model = apply_tract(network())
    optimizer = create_optimizer_v2(model, opt="momentum", lr=RATE, momentum=0.0, weight_decay=0.0)
    scaler, ema = NativeScaler(device="cpu"), ModelEmaV3(model, decay=0.0)
    loader = [*zip(*(part.split(BATCH) for part in samples(5 * BATCH)), strict=True)]
    accumulation, weights = 2, []
    for index, (images, labels) in enumerate(loader):
        start = index - index % accumulation
        micro_batches = min(accumulation, len(loader) - start)
        if index == start:
            set_micro_batches(model, micro_batches)
        steps = index == start + micro_batches - 1
        loss = nn.functional.cross_entropy(model(images), labels) / micro_batches
        scaler(loss, optimizer, parameters=model.parameters(), need_update=steps)
        if steps:
            optimizer.zero_grad()
            ema.update(model)
            weights.append(model[0].weight.detach().clone())
    pair = [BATCH, BATCH]
    assert_same_steps(weights, oracle_steps([pair, pair, [BATCH]]))
    assert torch.equal(ema.module[0].weight, weights[-1])


@pytest.mark.parametrize("saved_with", [True, False])
def test_checkpoints_of_timms_models_fit_with_and_without_tract(saved_with):
    models = [timm.create_model("resnet10t", num_classes=5) for _ in range(2)]
    apply_tract(models[0])
    source, target = models if saved_with else models[::-1]
    target.load_state_dict(source.state_dict())
    stem = models[0].get_submodule(models[0].pretrained_cfg["first_conv"])
    assert isinstance(stem, TrActConv2d)
