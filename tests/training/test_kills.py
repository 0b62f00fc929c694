"""Runs that are killed again and again, and resumed, are those that were not, to the last bit.

TRACT_DET_KILLS=50 python -m pytest -n 0 -m slow tests/training/test_kills.py

kills every kind of run at 50 moments; otherwise at 2.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import REPO, tiny_options
from tests.training.image_folder import options, write_image_folder
from tests.training.runs import (
    LAUNCHERS,
    assert_close,
    assert_same_bits,
    free_port,
    log,
    results,
    run_apart,
)

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("TRACT_DET_KILLS", "2"))
TOOLS = {"train": REPO / "tools/train_net.py", "pretrain": REPO / "tools/pretrain_net.py"}
DETECTOR = {
    "SOLVER__MAX_ITER": 8, "SOLVER__CHECKPOINT_PERIOD": 2, "LOG_PERIOD": 1, "TEST__EVAL_PERIOD": 4,
    "DATALOADER__NUM_WORKERS": 1, "INPUT__COLOR_JITTER": 0.3, "MODEL__TRACT__ENABLED": True,
}  # fmt: skip
CLASSIFIER = {
    "SOLVER__MAX_ITER": 12, "SOLVER__CHECKPOINT_EPOCHS": 1, "LOG_PERIOD": 1, "TEST__EVAL_EPOCHS": 1,
    "DATALOADER__NUM_WORKERS": 1, "MODEL__NORM": "BN", "MODEL__EMA__ENABLED": True,
    "MODEL__EMA__DECAY": 0.8, "SOLVER__OPTIMIZER": "AdamW", "SOLVER__ACCUMULATION": 2,
}  # fmt: skip
LONGEST = 0.5  # seconds from what a kill is aimed at to the kill


def folders(run):
    return {path.name for path in (run / "checkpoints").glob("*")}


def content(path):
    return path.read_bytes() if path.is_file() else b""


# What a kill may be aimed at. Each is called in turn, and the kill follows when its value changes.
AIMS = {
    "start": lambda run: content(run / "config.yaml") + content(run / "provenance.json"),
    "figures": lambda run: content(run / "metrics.jsonl"),
    "checkpoint begins": folders,
    "checkpoint is complete": lambda run: content(run / "last_checkpoint"),
    "best weights": lambda run: sorted(path.name for path in run.glob(".model_best*")),
    "final weights": lambda run: sorted(path.name for path in run.glob(".model_final*")),
    "results": lambda run: content(run / "results.json"),
}


def kill(command, run, aim, delay):
    """Starts a run and kills all its processes; returns what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    before = AIMS[aim](run)
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=environment, cwd=REPO, start_new_session=True,
    )  # fmt: skip
    while process.poll() is None and AIMS[aim](run) == before:
        time.sleep(0.001)
    if process.poll() is None:
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGKILL)
    printed, _ = process.communicate(timeout=60)  # until the last of its processes is gone
    assert process.returncode in (0, -signal.SIGKILL), printed
    return printed


@pytest.fixture
def arguments_of(verb, ranks, voc_tree, tmp_path):
    """The arguments of a run in a folder."""
    if verb == "train":
        return lambda run, **changes: tiny_options(voc_tree, run, **DETECTOR, **changes)
    images = write_image_folder(tmp_path / "images")
    stage = {"DEEPSPEED__zero_optimization__stage": 0 if ranks == 1 else 2}
    return lambda run, **changes: options(images, run, **(CLASSIFIER | stage | changes))


def launched_by(ranks):
    return "deepspeed" if ranks == 2 else None


def start_and_kill(verb, ranks, arguments, run, moments):
    aim, delay = moments.choice(sorted(AIMS)), moments.uniform(0, LONGEST)
    launch = [*LAUNCHERS["deepspeed"], free_port()] if ranks == 2 else []
    kill([*launch, TOOLS[verb], *resume(run), *arguments], run, aim, delay)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("verb", ["train", "pretrain"])
def test_a_run_that_is_killed_and_resumed_is_one_that_was_not(arguments_of, tmp_path, verb, ranks):
    whole, run = tmp_path / "whole", tmp_path / "killed"
    run_apart(TOOLS[verb], *arguments_of(whole), launcher=launched_by(ranks))
    moments = random.Random(f"{verb} {ranks}")
    for _ in range(KILLS):
        start_and_kill(verb, ranks, arguments_of(run), run, moments)
    run_apart(TOOLS[verb], *resume(run), *arguments_of(run), launcher=launched_by(ranks))

    names = whole_files(run, whole)
    assert_same_bits(run, whole, names)
    assert log(run) == log(whole) and results(run) == results(whole)


@pytest.mark.parametrize("ranks", ["1 or 2"])
@pytest.mark.parametrize("verb", ["train", "pretrain"])
def test_a_run_that_is_killed_and_resumed_on_other_numbers_of_ranks_is_one_but_for_rounding(
    arguments_of, tmp_path, verb, ranks
):
    """Larger steps would make more of rounding, and so would an optimizer that divides by noise.

    There is no batch norm: its statistics are those of a rank's images.
    """
    changes = {"SOLVER__BASE_LR": 1e-3}
    if verb == "pretrain":
        changes |= {"MODEL__NORM": "GN", "SOLVER__EPS": 0.01}
    whole, run = tmp_path / "whole", tmp_path / "killed"
    run_apart(TOOLS[verb], *arguments_of(whole, **changes))
    moments = random.Random(verb)
    for number in range(KILLS):
        start_and_kill(verb, 1 + number % 2, arguments_of(run, **changes), run, moments)
    last = 1 + KILLS % 2
    run_apart(TOOLS[verb], *resume(run), *arguments_of(run, **changes), launcher=launched_by(last))
    assert_close(run, whole, names=[name for name in whole_files(run, whole) if "best" not in name])


def whole_files(run, whole):
    """The names of the weights, which are those of a run that was not killed; none is half."""
    names = sorted(path.name for path in whole.glob("*.pth"))
    assert names == sorted(path.name for path in run.glob("*.pth"))
    figures = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(figures) == len(log(whole)) + evaluations(whole), "a line is there twice"
    stayed = [path for path in run.rglob(".*.writing-*") if "previous-1" not in path.parts]
    assert not stayed, "a temporary file stayed"
    assert len(folders(run)) == len(folders(whole))
    return names


def resume(run):
    """What the program asks for: best weights may be there before the first checkpoint is."""
    if (run / "last_checkpoint").is_file():
        return ["--resume"]
    return ["--overwrite"] if list(run.glob("model_*.pth")) else []


def evaluations(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return sum("lr" not in json.loads(line) for line in lines)
