"""detectron2's own programs with TrAct, in one process and in two."""

import json
import math

import pytest
import torch

from tests.conftest import run_python


def run(root, output, processes, *pairs):
    process = run_python("tests/d2/program.py", root, "disc,box", output, processes, *pairs)
    assert process.returncode == 0, process.stderr[-3000:]
    log = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    losses = [line["total_loss"] for line in log if "total_loss" in line]
    figures = json.loads((output / "figures.json").read_text())
    return losses, torch.load(output / "trained.pth"), figures


@pytest.mark.slow
def test_default_trainer_learns_with_tract_and_two_processes_match_one(voc_tree, tmp_path):
    """20 steps of the same global batch of 4, of which each rank has its share."""
    losses, single, figures = run(voc_tree, tmp_path / "single", 1)
    assert losses and all(map(math.isfinite, losses))
    assert single["layer"] == "TrActConv2d"
    key = "backbone.bottom_up.stem.conv1.weight"
    assert not torch.equal(single["before"], single["model"][key])
    assert set(figures) == {"voc_07", "voc_area", "coco"}
    assert set(figures["voc_07"]) == {"mAP", "mAP_50_95", "AP-disc", "AP-box"}
    _, double, figures_of_two = run(voc_tree, tmp_path / "double", 2)
    for name, tensor in single["model"].items():
        difference = (tensor - double["model"][name]).norm()
        assert difference <= 1e-4 * tensor.norm().clamp(min=1), name
    expected = pytest.approx(figures["coco"]["AP50"], abs=0.5, nan_ok=True)
    assert figures_of_two["coco"]["AP50"] == expected
