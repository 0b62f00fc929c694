"""How far the filters of a stem have turned, and where a run says so."""

import numpy as np
import pytest

from tests.training.image_folder import options, write_image_folder
from tests.training.runs import log, run_here, weights
from tract_det.errors import UserError
from tract_det.report.stem import Filters, mean_turn, read_filters, write_filters

RNG = np.random.default_rng(0)


def random_filters(count=5):
    return RNG.normal(size=(count, 3, 7, 7)).astype(np.float32)


@pytest.mark.parametrize("degrees", [0, 1e-6, 30, 90, 180])
def test_the_turn_is_the_angle_of_a_rotation_whatever_the_lengths(degrees):
    start, other = random_filters().reshape(5, -1).astype(float), random_filters().reshape(5, -1)
    start /= np.linalg.norm(start, axis=1, keepdims=True)
    other = other - (other * start).sum(axis=1, keepdims=True) * start
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    angle = np.radians(degrees)
    now = RNG.uniform(0.1, 9, (5, 1)) * (np.cos(angle) * start + np.sin(angle) * other)
    shape = (5, 3, 7, 7)
    assert mean_turn(start.reshape(shape), now.reshape(shape)) == pytest.approx(degrees, abs=1e-12)


def test_the_mean_is_over_filters_and_those_that_are_zero_have_no_direction():
    start = np.zeros((4, 1, 1, 2), dtype=np.float32)
    start[:3, ..., 0] = 1  # the last is zero
    now = start.copy()
    now[0] = [0, 2]  # by 90 degrees
    now[2] = 0
    assert mean_turn(start, now) == 45
    assert np.isnan(mean_turn(start, np.zeros_like(start)))


def test_filters_are_read_back_and_a_damaged_file_is_named(tmp_path):
    filters = Filters("conv1.weight", random_filters())
    assert read_filters(tmp_path) is None
    write_filters(tmp_path, filters)
    again = read_filters(tmp_path)
    assert again.name == filters.name and (again.weight == filters.weight).all()
    path = tmp_path / "stem_at_start.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"stem_at_start\.npz is damaged .*: delete it"):
        read_filters(tmp_path)


def test_every_evaluation_notes_the_turn_also_of_a_run_that_was_resumed(tmp_path):
    output = tmp_path / "out"
    keys = {"TEST__EVAL_EPOCHS": 0.25, "SOLVER__CHECKPOINT_EPOCHS": 0.25}
    arguments = options(write_image_folder(tmp_path / "images"), output, **keys)
    run_here("pretrain", *arguments)
    turns = log(output, "stem_turn")
    assert list(turns) == [1, 2, 3, 4] and 0 < turns[1] < turns[4] < 180
    start = read_filters(output)
    assert turns[4] == mean_turn(start.weight, weights(output)[start.name].numpy())
    (output / "last_checkpoint").write_text("iter_0000003")
    assert "at step 3" in run_here("pretrain", "--resume", *arguments)
    assert log(output, "stem_turn") == turns


def test_a_frozen_stem_has_not_turned(tmp_path):
    folder, keys = write_image_folder(tmp_path / "images"), {"MODEL__TRACT__ENABLED": False}
    run_here("pretrain", "--arm", "frozen", *options(folder, tmp_path / "out", **keys))
    assert log(tmp_path / "out", "stem_turn") == {4: 0.0}
