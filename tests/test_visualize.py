"""Pictures are whole PNG files, also at the edges of what can be drawn."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import REPO, run_python
from tract_det.engine.checkpoint import save_weights
from tract_det.errors import UserError
from tract_det.visualize import Picture, detection_grid, stem_filters, training_curves


def open_picture(path):
    with Image.open(path) as picture:
        picture.load()
        return np.asarray(picture.convert("RGB")).astype(int)


def grid(tmp_path, boxes, scores):
    Image.new("RGB", (60, 40), (0, 0, 90)).save(tmp_path / "image.png")
    picture = Picture(
        tmp_path / "image.png", np.array([[5.0, 5, 20, 20]]), boxes,
        np.zeros(len(boxes), dtype=int), scores,
    )  # fmt: skip
    detection_grid(tmp_path / "grid.png", [picture], ["cat"])
    return open_picture(tmp_path / "grid.png")


def test_a_detection_is_drawn_when_its_score_reaches_the_threshold(tmp_path):
    box = np.array([[25.0, 10, 55, 35]])
    without = grid(tmp_path, np.zeros((0, 4)), np.zeros(0))
    low = grid(tmp_path, box, np.array([0.4]))
    high = grid(tmp_path, box, np.array([0.9]))
    assert (low == without).all()
    assert (high != without).any()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["grid.png", "image.png"]


def test_curves_and_filters_through_the_command_line(tmp_path):
    for name in ("plain", "tract"):
        run = tmp_path / name
        run.mkdir()
        lines = [{"iteration": k, "loss": 1 / k} for k in range(1, 9)]
        lines.append({"iteration": 8, "voc_area.mAP": 50.0})
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_weights(tmp_path / "tract/model_final.pth", torch.nn.Conv2d(3, 20, 7), {})
    done = run_python(
        REPO / "tools/visualize.py", tmp_path / "plain", tmp_path / "tract", "--out", tmp_path / "p"
    )
    assert done.returncode == 0, done.stderr
    assert "plain has no model_final.pth yet" in done.stdout
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == ["curves.png", "tract-stem.png"]
    assert open_picture(tmp_path / "p/curves.png").std() > 1
    assert open_picture(tmp_path / "p/tract-stem.png").std() > 1


def test_what_cannot_be_drawn_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl is missing"):
        training_curves(tmp_path / "c.png", {"a": tmp_path / "a/metrics.jsonl"})
    with pytest.raises(UserError, match=r"\(M, 3, kh, kw\)"):
        stem_filters(tmp_path / "s.png", np.zeros((4, 1, 3, 3)))
    assert not list(tmp_path.iterdir())
