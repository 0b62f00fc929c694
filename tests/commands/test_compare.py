"""`tract-det compare` through its command line."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.conftest import REPO
from tests.training.image_folder import TINY, write_image_folder
from tract_det.cli import call
from tract_det.errors import UserError

LENGTH = {"SOLVER.MAX_ITER": "6", "MODEL.TRACT.ENABLED": None, "TEST.EVAL_EPOCHS": None}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("images"))


def arguments(images, output, *flags):
    keys = {key: value for key, value in (TINY | LENGTH).items() if value}
    pairs = [part for pair in keys.items() for part in pair]
    config = ["--config-file", "CIFAR/cpu_small.yaml"]
    return [*config, "--output", str(output), *flags, "DATASETS.ROOT", str(images), *pairs]


def compare(images, output, *flags, until=None):
    """Runs it in a process of its own, to its end or until a line begins so; returns the output."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tract_det.cli", "compare", *arguments(images, output, *flags)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPO,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    printed = ""
    for line in process.stdout:
        printed += line
        if until and line.startswith(until):
            process.send_signal(signal.SIGTERM)
    code = process.wait()
    assert code == (128 + signal.SIGTERM if until else 0), printed
    return printed


def results(output):
    """The comparison without what depends on the clock and the folder."""
    content = json.loads((output / "comparison.json").read_text())
    del content["command"]
    for row in content["rows"]:
        del row["cost"]
    for run in content["runs"]:
        del run["training_seconds"], run["starts"], run["folder"]
    return content


@pytest.mark.slow
def test_stopped_and_started_again_only_missing_runs_are_made_and_the_table_is_the_same(
    tmp_path, images
):
    compare(images, tmp_path / "whole", "--seeds", "2", "--jobs", "2")
    stopped = tmp_path / "stopped"
    printed = compare(images, stopped, "--seeds", "2", "--jobs", "1", until="[1/4]")
    assert "the same command goes on from here" in printed
    done = {path: path.stat().st_mtime_ns for path in stopped.glob("*/*/*/model_final.pth")}
    assert 1 <= len(done) < 4
    printed = compare(images, stopped, "--seeds", "2", "--jobs", "2")
    assert f"4 runs, {len(done)} of them done" in printed
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())
    assert results(stopped) == results(tmp_path / "whole")
    assert not list(stopped.glob("*/*/*/checkpoints"))
    again = compare(images, stopped, "--seeds", "2")
    assert "4 runs, 4 of them done" in again and "[" not in again.split("|")[0]


@pytest.mark.slow
def test_a_training_that_diverges_is_a_result(tmp_path, images):
    flags = ("--seeds", "1", "--sweep", "SOLVER.BASE_LR=0.05,1e30", "--jobs", "2")
    printed = compare(images, tmp_path, *flags, "--arms", "plain")
    assert "plain BASE_LR=1e30" in printed and "diverged: the loss is not finite" in printed
    assert "0, 1 failed" in printed
    assert "2 runs, 2 of them done" in compare(images, tmp_path, *flags, "--arms", "plain")


@pytest.mark.slow
def test_a_plan_measures_and_leaves_nothing(tmp_path, images):
    printed = compare(images, tmp_path / "out", "--seeds", "2", "--lengths", "1,2", "--plan")
    assert "plain: 4 runs to be made" in printed and "tract: 4 runs to be made" in printed
    assert "8 of 8 runs, 1 at a time" in printed and "GiB" in printed
    assert not (tmp_path / "out").exists()


def test_options_behind_the_pairs_are_refused_in_one_line(images, tmp_path):
    with pytest.raises(UserError, match="--plan stands behind KEY VALUE pairs"):
        call("compare", [*arguments(images, tmp_path), "--plan"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "0"], "a whole number of at least 1, not '0'"),
        (["--seeds", "two"], "a whole number of at least 1, not 'two'"),
        (["--jobs", "0"], "a whole number of at least 1, not '0'"),
        (["--lengths", "0"], "positive numbers of epochs, such as 5,7,10, not '0'"),
        (["--lengths", "5,-1"], "positive numbers of epochs"),
        (["--lengths", "five"], "positive numbers of epochs, such as 5,7,10, not 'five'"),
        (["--lengths", "5,5.0"], "5,5.0: a length is there twice"),
        (["--arms", ""], "names, such as plain,tract, not ''"),
    ],
)
def test_values_that_make_no_sense_are_refused(images, tmp_path, flags, message, capsys):
    with pytest.raises(SystemExit):
        call("compare", arguments(images, tmp_path, *flags))
    assert f"argument {flags[0]}: {message}" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_said_before_the_first_run(images, tmp_path):
    (tmp_path / "locked/.lock").mkdir(parents=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/tract").write_text("a file where the runs of an arm are to be")
    with pytest.raises(UserError, match=r"locked/\.lock cannot be written: Is a directory"):
        call("compare", arguments(images, tmp_path / "locked"))
    with pytest.raises(UserError, match=r"full/tract/.* cannot be made: Not a directory"):
        call("compare", arguments(images, tmp_path / "full"))
    assert not list(tmp_path.rglob("log.txt"))


def test_an_arm_that_the_model_refuses_is_said_before_the_first_run(images, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(UserError, match=r"arm patch_norm: MODEL\.PATCH_NORM"):
        call("compare", arguments(images, output, "--arms", "plain,patch_norm"))
    assert not [path for path in output.rglob("*") if path.is_dir()]
