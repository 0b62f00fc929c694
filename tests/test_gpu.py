"""`benchmarks/gpu.py` runs where there is no GPU, in small, and says so where it may not."""

import pytest
import torch

from benchmarks import gpu
from tract_det.errors import UserError


def test_a_page_has_a_row_for_each_stem_precision_and_step(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "SMALL_STEPS", {})  # the slow test has them
    page = tmp_path / "page.md"
    gpu.main(["--device", "cpu", "--small", "--turns", "1", "--output", str(page)])
    rows = [line for line in page.read_text().splitlines() if line.startswith(("| 2 x", "| 4 x"))]
    assert len(rows) == 2 * len(gpu.MODES)
    assert all(float(row.split("|")[4]) > 0 for row in rows)


@pytest.mark.slow
def test_whole_steps_of_classifiers_and_detectors_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "SMALL_STEMS", {})
    page = tmp_path / "page.md"
    gpu.main(["--device", "cpu", "--small", "--turns", "1", "--output", str(page)])
    for title in gpu.SMALL_STEPS:
        (row,) = (line for line in page.read_text().splitlines() if title in line)
        assert float(row.split("|")[4]) > 0


def test_what_no_time_is_left_for_is_named(tmp_path):
    page = tmp_path / "page.md"
    gpu.main(["--device", "cpu", "--small", "--minutes", "0", "--output", str(page)])
    assert page.read_text().count("no time left") == 2 * len(gpu.MODES) + len(gpu.SMALL_STEPS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a message for a machine without CUDA")
def test_without_a_gpu_the_error_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="--device cpu"):
        gpu.main(["--output", str(tmp_path / "page.md")])
