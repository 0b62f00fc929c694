"""The lines of docs/trainers.md, as they stand there, with stand-ins for the reader's objects."""

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, TensorDataset

from tests.integrations.common import (
    BATCH,
    RATE,
    assert_same_steps,
    network,
    oracle_steps,
    samples,
)
from tests.pages import python_blocks
from tract_det import TrActConv2d

BLOCKS = python_blocks("docs/trainers.md")


def short(code, length, shorter):
    assert length in code
    return code.replace(length, shorter)


def lightning(code):
    from tests.integrations.test_lightning import Module

    loader = DataLoader(TensorDataset(*samples(BATCH)), batch_size=BATCH)
    exec(short(code, "max_epochs=90", "max_epochs=2"), {"module": Module(), "loader": loader})
    return oracle_steps([[BATCH]])


def transformers(code):
    from tests.integrations.test_transformers import Classifier, arguments, dataset

    exec(code, {"model": Classifier(), "args": arguments("out"), "data": dataset(BATCH)})
    return oracle_steps([[BATCH]])


def accelerate(code):
    pytest.importorskip("accelerate", reason="Accelerate is not installed: pip install accelerate")
    model, data = network(), TensorDataset(*samples(4 * BATCH))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    loader = DataLoader(data, batch_size=BATCH)
    loop = """
for images, labels in loader:
    with accelerator.accumulate(model):
        accelerator.backward(nn.functional.cross_entropy(model(images), labels))
        optimizer.step()
        optimizer.zero_grad()
"""
    exec(code + loop, {"model": model, "optimizer": optimizer, "loader": loader, "nn": nn})
    return oracle_steps([[BATCH] * 4])


def mmengine(code):
    from tests.integrations.test_mmengine import Classifier, runner

    if "custom_imports" in code:
        from mmengine.config import Config

        hooks = Config.fromstring(code, ".py").custom_hooks
        runner("work", BATCH, tract=list(hooks))[0].train()
    else:
        images, labels = samples(BATCH)
        data = [{"inputs": i, "data_samples": k} for i, k in zip(images, labels, strict=True)]
        exec(
            code,
            {
                "model": Classifier(),
                "loader": DataLoader(data, batch_size=BATCH),
                "train_cfg": {"by_epoch": True, "max_epochs": 1},
                "wrapper": {"optimizer": {"type": "SGD", "lr": RATE}},
            },
        )
    return oracle_steps([[BATCH]])


def own_loop(code):
    """With timm's own parts, as in its train.py."""
    from timm.optim import create_optimizer_v2
    from timm.utils import ModelEmaV3, NativeScaler

    model = network()
    scope = {
        "model": model,
        "loader": [*zip(*(part.split(BATCH) for part in samples(5 * BATCH)), strict=True)],
        "accumulation": 2,
        "optimizer": create_optimizer_v2(model, opt="momentum", lr=RATE, momentum=0.0),
        "scaler": NativeScaler(device="cpu"),
        "ema": ModelEmaV3(model, decay=0.0),
        "nn": nn,
    }
    body = """
    first = index - index % accumulation
    micro_batches = min(accumulation, len(loader) - first)
    steps = index == first + micro_batches - 1
    loss = nn.functional.cross_entropy(model(images), labels) / micro_batches
    scaler(loss, optimizer, parameters=model.parameters(), need_update=steps)
    if steps:
        optimizer.zero_grad()
        ema.update(model)
"""
    exec(code + body, scope)
    assert torch.equal(scope["ema"].module[0].weight, model[0].weight)
    pair = [BATCH, BATCH]
    return oracle_steps([pair, pair, [BATCH]])


RUNS = {
    "Lightning": lightning,
    "Transformers": transformers,
    "Accelerate": accelerate,
    "MMEngine": mmengine,
    "Loops of your own, and timm's": own_loop,
}


@pytest.fixture
def weights():
    """The stem's weights after every step of any optimizer."""
    after = []

    def keep(optimizer, args, kwargs):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        after.append(next(p for p in parameters if p.ndim == 4).detach().cpu().clone())

    handle = register_optimizer_step_post_hook(keep)
    yield after
    handle.remove()


@pytest.mark.parametrize(
    "block",
    [block for block in BLOCKS if block.heading != "Ultralytics"],
    ids=lambda block: f"{block.heading}: {block.code.splitlines()[0]}",
)
def test_the_lines_of_the_page_take_the_oracles_steps(block, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = RUNS[block.heading](block.code)
    assert_same_steps(weights[: len(expected)], expected)


def test_the_lines_for_ultralytics_train_the_stem_by_tract(tmp_path, monkeypatch):
    from tests.integrations.test_ultralytics import Record, write_data

    (code,) = (block.code for block in BLOCKS if block.heading == "Ultralytics")
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path).rename("coco8.yaml")
    options = "epochs=1, imgsz=64, batch=4, nbs=4, device='cpu', optimizer='SGD', plots=False"
    code = short(code, "epochs=100", f"{options}, project='{tmp_path}'")
    before, training = code.split("model.train(")
    scope = {}
    exec(before, scope)
    record = Record(scope["model"])
    exec("model.train(" + training, scope)
    assert record.classes == (TrActConv2d, nn.Conv2d) and len(record.stems) == 2
