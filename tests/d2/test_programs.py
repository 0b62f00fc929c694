"""detectron2's own programs with TrAct on, in one process and in two."""

import json
import math

import pytest
import torch

from tests.conftest import run_python


def run(root, output, processes, *pairs):
    found = run_python("tests/d2/program.py", root, "disc,box", output, processes, *pairs)
    assert found.returncode == 0, found.stderr[-3000:]
    log = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    losses = [line["total_loss"] for line in log if "total_loss" in line]
    results = json.loads((output / "found.json").read_text())
    return losses, torch.load(output / "found.pth"), results


@pytest.mark.slow
def test_default_trainer_learns_with_tract_and_two_processes_are_one(voc_tree, tmp_path):
    """20 steps, the same global batch of 4, each rank its share of it."""
    losses, one, results = run(voc_tree, tmp_path / "one", 1)
    assert losses and all(map(math.isfinite, losses))
    assert one["layer"] == "TrActConv2d"
    key = "backbone.bottom_up.stem.conv1.weight"
    assert not torch.equal(one["before"], one["model"][key])
    assert set(results) == {"voc_07", "voc_area", "coco"}
    assert set(results["voc_07"]) == {"mAP", "mAP_50_95", "AP-disc", "AP-box"}
    _, two, again = run(voc_tree, tmp_path / "two", 2)
    for name, tensor in one["model"].items():
        moved = (tensor - two["model"][name]).norm()
        assert moved <= 1e-4 * tensor.norm().clamp(min=1), name
    assert again["coco"]["AP50"] == pytest.approx(results["coco"]["AP50"], abs=0.5, nan_ok=True)
