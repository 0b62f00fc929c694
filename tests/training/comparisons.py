"""Designs of comparisons, and what runs would leave."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tract_det.engine import checkpoint
from tract_det.training.comparison import Design

CLASSIFIER = "CIFAR/cpu_small.yaml"
DETECTOR = "quickstart/shapes.yaml"


def design(output, images=None, config=CLASSIFIER, **changes):
    pairs = changes.pop("pairs", [])
    if images:
        pairs = ["DATASETS.ROOT", str(images), "SOLVER.IMS_PER_BATCH", "8", *pairs]
    options = {
        "arms": ["plain", "tract"], "sweeps": {}, "lengths": [], "seeds": 2, "baseline": "",
    } | changes  # fmt: skip
    return Design([config], pairs=pairs, output=output, **options)


def write_run(planned, run, final):
    """What the trainer leaves, without the training."""
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text(run.cfg.dump())
    entries = [
        {"iteration": run.steps // 2, "images_per_second": 10.0, planned.metric: final / 2},
        {
            "iteration": run.steps,
            "images_per_second": 10.0,
            planned.metric: final,
            "stem_turn": 12.0 + run.seed,
        },
    ]
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    (run.folder / "metrics.jsonl").write_text(lines)
    (run.folder / "results.json").write_text("{}")


def save(folder, step, *, evaluated):
    """A checkpoint of so many steps, of a model of no weights."""
    engine = SimpleNamespace(module=nn.Linear(1, 1), device=torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.ds, "whole_model", lambda engine: engine.module)
        patch.setattr(checkpoint.optimizer_state, "part_of", lambda engine: {})
        best = {"best": 50.0, "best_step": 1, "since": 0, "evaluated": evaluated}
        checkpoint.save(
            engine, folder, step, keep=2, shared={"best": best}, per_rank={}, identity={}
        ).result()
