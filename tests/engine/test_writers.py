"""What a resumed run finds in metrics.jsonl, and a console that is gone."""

import json
import os
import sys

import pytest
import torch

from tests.training.runs import log
from tract_det.engine.writers import Writers, say

LINES = [
    {"iteration": 2, "loss": 1.0, "lr": 0.1},
    {"iteration": 4, "loss": 0.9, "lr": 0.1},
    {"iteration": 4, "top1": 50.0},
]


def opened(folder, start, max_iter):
    """`metrics.jsonl` after a run in this folder has gone on at step `start`."""
    writers = Writers(
        folder, start=start, max_iter=max_iter, period=2, device=torch.device("cpu"),
        is_evaluated_again=start == max_iter,
    )  # fmt: skip
    writers.close()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("start", "max_iter", "lines"),
    [
        (4, 4, 2),  # the run was killed in, or after, its last evaluation, which is made again
        (4, 6, 3),  # the evaluation was before the checkpoint of its step, and is not made again
        (3, 6, 1),
        (0, 6, 0),
    ],
)
def test_what_a_run_writes_again_is_dropped_when_it_goes_on(tmp_path, start, max_iter, lines):
    half = '{"iteration": 4, "lo'
    text = "".join(json.dumps(line) + "\n" for line in LINES) + half
    (tmp_path / "metrics.jsonl").write_text(text)
    assert opened(tmp_path, start, max_iter) == LINES[:lines]
    assert opened(tmp_path, start, max_iter) == LINES[:lines]
    assert log(tmp_path) == {line["iteration"]: line["loss"] for line in LINES[: min(lines, 2)]}


def test_a_training_goes_on_when_nobody_reads_what_it_prints(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    broken = sys.stdout
    say("step 1")
    say("step 2")
    assert sys.stdout is not broken
    with pytest.raises(BrokenPipeError):
        broken.close()
