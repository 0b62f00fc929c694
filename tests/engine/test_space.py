"""What a checkpoint takes on the disk, foretold before the first step."""

from collections import namedtuple

import pytest
import torch
from torch import nn

from tract_det.engine import checkpoint, ds, space
from tract_det.engine.ema import Ema
from tract_det.errors import UserError


def model():
    return nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Conv2d(64, 512, 3), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(512, 1000),
    )  # fmt: skip


@pytest.fixture(scope="module")
def device():
    yield ds.start("cpu")
    ds.stop()


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.SGD, {}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.AdamW, {}),
    ],
    ids=["SGD", "momentum", "AdamW"],
)
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_size_of_a_checkpoint_is_known_before_the_first_step(
    device, tmp_path, optimizer, options, stage
):
    network = model()
    network[0].requires_grad_(False)
    ema = Ema(network, decay=0.9) if stage == 0 else None
    trained = [p for p in network.parameters() if p.requires_grad]
    config = ds.ds_config(
        batch_size=2, accumulation=1, extra={"zero_optimization": {"stage": stage}}
    )
    engine = ds.initialize(network, optimizer(trained, lr=0.01, **options), config)
    expected = space.checkpoint_bytes(engine, ema)
    engine.backward(engine(torch.rand(2, 3, 8, 8)).square().mean())
    engine.step()
    average = ema.model if ema else None
    checkpoint.save(
        engine, tmp_path, 1, keep=1, shared={}, per_rank={}, identity={}, average=average
    ).result()
    written = sum(file.stat().st_size for file in (tmp_path / "checkpoints").rglob("*.pt"))
    assert expected == pytest.approx(written, rel=0.02, abs=100_000)
    assert space.weights_bytes(ds.whole_model(engine)) == pytest.approx(3_232_000, rel=0.01)


def test_what_does_not_fit_is_refused_with_what_is_missing(monkeypatch, tmp_path):
    """Two checkpoints of 1 GiB and two files of weights of 0.25 GiB; 1.5 GiB are free."""
    usage = namedtuple("usage", ["free"])(3 * 2**29)
    monkeypatch.setattr(space.shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(space, "checkpoint_bytes", lambda engine, ema: 2**30)
    monkeypatch.setattr(space, "weights_bytes", lambda module: 2**28)
    engine = namedtuple("engine", ["module"])(None)
    space.require_for_run(tmp_path, engine, None, 1)
    space.require_for_checkpoint(tmp_path, engine, None, 7)
    message = (
        f"{tmp_path} has 1.50 GiB free, but checkpoints and weights of this run take 2.50 GiB, "
        "1.00 GiB more: free some space"
    )
    with pytest.raises(UserError, match=message):
        space.require_for_run(tmp_path, engine, None, 2)
