"""Trackers get what metrics.jsonl gets, and never end a training."""

import json
import sys

import pytest

from tests.training.image_folder import options, write_image_folder
from tests.training.runs import log, run_here
from tract_det.cli import call
from tract_det.engine import trackers
from tract_det.engine.trackers import Trackers
from tract_det.errors import UserError


class Noting:
    """Notes what it is told; fails from the given call on."""

    def __init__(self, fails_from=99):
        self.calls, self.fails_from = [], fails_from

    def started(self, output, run_id, config, start):
        self.id, self.config, self.start = run_id, config, start
        return self

    def _note(self, *call):
        self.calls.append(call)
        if len(self.calls) >= self.fails_from:
            raise ConnectionError("the network is gone")

    def log(self, values, step):
        self._note("log", step, dict(values))

    def results(self, values, step):
        self._note("results", step, dict(values))

    def close(self):
        self._note("close")


@pytest.fixture
def noting(monkeypatch):
    tracker = Noting()
    monkeypatch.setitem(trackers._KINDS, "tensorboard", tracker.started)
    return tracker


def test_a_run_passes_on_config_figures_and_results_and_goes_on_under_its_id(noting, tmp_path):
    root, output = write_image_folder(tmp_path / "images"), tmp_path / "run"
    run_here("pretrain", *options(root, output, SOLVER__MAX_ITER=2))
    first = noting.id
    assert noting.config["SOLVER"]["MAX_ITER"] == 2 and noting.start == 0
    losses = {call[1]: call[2]["loss"] for call in noting.calls if "loss" in call[-1]}
    assert losses == log(output)
    (results,) = [call for call in noting.calls if call[0] == "results"]
    assert results[1] == 2 and results[2]["top1"] == log(output, "top1")[2]
    assert noting.calls[-1] == ("close",)
    run_here("pretrain", "--resume", *options(root, output, SOLVER__MAX_ITER=3))
    assert (noting.id, noting.start) == (first, 2)
    run_here("pretrain", "--overwrite", *options(root, output, SOLVER__MAX_ITER=1))
    assert noting.id != first


def test_one_that_fails_is_left_out_with_a_single_warning_and_the_others_go_on(
    noting, tmp_path, monkeypatch
):
    failing = Noting(fails_from=2)
    monkeypatch.setitem(trackers._KINDS, "wandb", failing.started)
    both = Trackers(["wandb", "tensorboard"], tmp_path, config={})
    both.log({"loss": 1.0}, 1)
    with pytest.warns(
        UserWarning, match="LOGGERS wandb: it has failed .*network is gone"
    ) as warned:
        both.log({"loss": 1.0}, 2)
        both.log({"loss": 1.0}, 3)
        both.close()
    assert len(warned) == 1 and len(failing.calls) == 2 and len(noting.calls) == 4


def test_one_that_does_not_start_is_an_error_that_names_it(tmp_path, monkeypatch):
    def start(*_):
        raise RuntimeError("no API key")

    monkeypatch.setitem(trackers._KINDS, "wandb", start)
    with pytest.raises(UserError, match=r"LOGGERS wandb: it does not start \(no API key\)"):
        Trackers(["wandb"], tmp_path, config={})


def test_a_missing_package_and_an_unknown_name_are_refused_before_data_are_read(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    arguments = options(tmp_path / "missing", tmp_path / "run")
    with pytest.raises(UserError, match=r"LOGGERS wandb: .*pip install wandb"):
        call("pretrain", [*arguments, "LOGGERS", "[tensorboard, wandb]"])
    with pytest.raises(UserError, match="LOGGERS has 'neptune': it takes of tensorboard, wandb"):
        call("pretrain", [*arguments, "LOGGERS", "neptune"])


def test_damaged_ids_are_as_none(tmp_path, noting):
    (tmp_path / "trackers.json").write_text("{")
    Trackers(["tensorboard"], tmp_path, config={}, is_resumed=True)
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"tensorboard": noting.id}
