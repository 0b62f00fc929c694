"""What a run has left: its curve, its end, its time."""

import json

import pytest

from tract_det.errors import UserError
from tract_det.evaluation.runs import read_run


def write(folder, *entries, tail=""):
    lines = [json.dumps(entry) + "\n" for entry in entries]
    (folder / "metrics.jsonl").write_text("".join(lines) + tail)


def train(step, rate):
    return {"iteration": step, "loss": 1.0, "images_per_second": rate}


def read(folder):
    return read_run(folder, "top1", steps=8, batch=4, images=16)


def test_the_curve_counts_epochs_of_images(tmp_path):
    write(tmp_path, train(4, 8.0), {"iteration": 4, "top1": 50.0}, {"iteration": 8, "top1": 60.0})
    curve = read(tmp_path).curve
    assert curve.epochs.tolist() == [1, 2] and curve.values.tolist() == [50, 60]


def test_the_time_is_that_of_the_training_steps(tmp_path):
    write(tmp_path, train(4, 8.0), {"iteration": 4, "top1": 50.0}, train(8, 16.0))
    assert read(tmp_path).seconds == 4 * 4 / 8 + 4 * 4 / 16


def test_a_run_is_finished_when_its_last_step_is_evaluated_and_reported(tmp_path):
    write(tmp_path, {"iteration": 4, "top1": 50.0})
    (tmp_path / "results.json").write_text("{}")  # of an earlier, shorter run
    assert not read(tmp_path).is_finished
    write(tmp_path, {"iteration": 8, "top1": 50.0})
    assert read(tmp_path).is_finished
    (tmp_path / "results.json").unlink()
    assert not read(tmp_path).is_finished


def test_a_run_that_patience_ended_is_finished_unless_it_has_gone_on(tmp_path):
    (tmp_path / "results.json").write_text('{"stopped": {"step": 4, "of": 8}}')
    ended = [{"iteration": 4, "top1": 50.0}, train(4, 8.0)]
    write(tmp_path, *ended)
    assert read(tmp_path).is_finished and read(tmp_path).curve.is_early
    write(tmp_path, *ended, train(6, 8.0))
    assert not read(tmp_path).is_finished and not read(tmp_path).curve.is_early


def test_half_a_line_of_a_killed_run_is_left_out(tmp_path):
    write(tmp_path, {"iteration": 4, "top1": 50.0}, tail='{"iteration": 8, "to')
    assert read(tmp_path).curve.values.tolist() == [50]


def test_a_figure_that_is_no_number_leaves_no_curve(tmp_path):
    write(tmp_path, {"iteration": 4, "top1": 50.0}, {"iteration": 8, "top1": None})
    assert read(tmp_path).curve is None


@pytest.mark.parametrize(
    "line",
    [
        "no json",
        "[]",
        "5",
        '{"top1": 50.0}',
        '{"iteration": 4, "top1": "50"}',
        '{"iteration": 4, "images_per_second": 0.0}',
        '{"iteration": 4, "images_per_second": null}',
    ],
)
def test_damaged_figures_are_named_with_the_mend(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(
        UserError, match=rf"metrics.jsonl is damaged: .*: delete {tmp_path} to make"
    ):
        read(tmp_path)


@pytest.mark.parametrize("text", ["", '{"top1": 5', "[]", "null"])
def test_damaged_results_are_named_with_the_mend(tmp_path, text):
    write(tmp_path, {"iteration": 8, "top1": 50.0})
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match=r"results.json is damaged: .*: delete it to make the run"):
        read(tmp_path)
