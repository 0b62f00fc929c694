"""The runs of a comparison: which there are, by which commands, judged against which."""

import pytest

from tests.training.comparisons import CLASSIFIER, DETECTOR, design, write_run
from tests.training.image_folder import write_image_folder
from tract_det.config.classification import load_cfg
from tract_det.config.files import flat
from tract_det.errors import UserError
from tract_det.training.comparison import (
    Variant,
    baseline_of,
    build,
    parse_sweep,
    parse_sweeps,
)
from tract_det.training.comparison_estimate import _extrapolated, seconds_beside
from tract_det.training.comparison_folders import missing


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("images"))  # 32 for training


def test_every_arm_has_every_length_and_seed(tmp_path, images):
    runs = build(design(tmp_path, images, lengths=[2.0, 1.0])).runs
    kinds = [(run.variant.arm, run.epochs, run.seed) for run in runs]
    assert sorted(kinds) == [
        (arm, length, seed) for arm in ("plain", "tract") for length in (1, 2) for seed in (0, 1)
    ]
    assert len({run.folder for run in runs}) == 8
    assert [run.steps for run in runs if run.epochs == 2] == [8] * 4


def test_runs_of_a_seed_differ_in_their_arm_alone(tmp_path, images):
    plain, tract = (flat(run.cfg) for run in build(design(tmp_path, images)).runs[:2])
    different = {key for key in plain if plain[key] != tract[key]}
    assert different == {"ARM", "MODEL.TRACT.ENABLED", "OUTPUT_DIR"}


def test_the_length_of_the_config_is_the_default_and_sets_no_key(tmp_path, images):
    run = build(design(tmp_path, images)).runs[0]
    assert run.epochs == 5 and "SOLVER.EPOCHS" not in run.arguments


def test_the_length_of_the_config_is_that_to_the_step(tmp_path):
    pairs = ["SOLVER.MAX_ITER", "12345", "SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR"]
    pairs += ["SOLVER.STEPS", "[8001,10001]"]
    run = build(design(tmp_path, config=DETECTOR, pairs=pairs)).runs[0]
    assert run.steps == 12345 and run.cfg.SOLVER.STEPS == [8001, 10001]
    assert run.epochs == 123.5 and run.folder.parent.name == "123.5-epochs"  # 123.45


def test_a_detector_s_length_is_in_epochs_of_its_own_data(tmp_path):
    runs = build(design(tmp_path, config=DETECTOR, lengths=[3.0, 6.0])).runs
    short, long = runs[0].cfg, runs[-1].cfg
    assert (short.SOLVER.MAX_ITER, long.SOLVER.MAX_ITER) == (300, 600)  # 400 images, 4 a step
    assert short.TEST.EVAL_PERIOD == 60 and long.TEST.EVAL_PERIOD == 100


def test_steps_of_the_schedule_follow_a_detector_s_length(tmp_path):
    pairs = ["SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.STEPS", "[400,500]"]
    pairs += ["MODEL.TRACT.STOP_AT", "200"]
    run = build(design(tmp_path, config=DETECTOR, lengths=[3.0], pairs=pairs)).runs[0]
    assert run.cfg.SOLVER.STEPS == [200, 250] and run.cfg.MODEL.TRACT.STOP_AT == 100


def test_steps_in_epochs_follow_a_classifier_s_length(tmp_path, images):
    pairs = ["SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.STEPS", "[2,4]"]
    run = build(design(tmp_path, images, lengths=[10.0], pairs=pairs)).runs[0]
    assert run.cfg.SOLVER.EPOCHS == 10 and run.cfg.SOLVER.STEPS == [4, 8]


def test_a_period_that_the_user_sets_is_kept(tmp_path, images):
    run = build(design(tmp_path, images, pairs=["TEST.EVAL_EPOCHS", "2.5"])).runs[0]
    assert run.cfg.TEST.EVAL_EPOCHS == 2.5


def test_keys_of_tract_are_swept_only_where_tract_is_on(tmp_path, images):
    sweeps = {"MODEL.TRACT.LAMBDA": ["0.1", "1"], "SOLVER.BASE_LR": ["0.1", "0.2"]}
    planned = build(design(tmp_path, images, sweeps=sweeps, seeds=1))
    names = [variant.name for variant in planned.variants]
    assert names == [
        "plain BASE_LR=0.1", "plain BASE_LR=0.2",
        "tract LAMBDA=0.1 BASE_LR=0.1", "tract LAMBDA=0.1 BASE_LR=0.2",
        "tract LAMBDA=1 BASE_LR=0.1", "tract LAMBDA=1 BASE_LR=0.2",
    ]  # fmt: skip
    assert planned.baselines[planned.variants[3]].name == "plain BASE_LR=0.2"
    assert planned.runs[4].cfg.MODEL.TRACT.LAMBDA == 1


def test_an_arm_is_judged_against_the_baseline_of_the_values_that_both_have(tmp_path, images):
    sweeps = {"MODEL.TRACT.LAMBDA": ["0.05", "0.1"], "SOLVER.BASE_LR": ["0.05", "0.1"]}
    planned = build(design(tmp_path, images, sweeps=sweeps, seeds=1, baseline="tract"))
    plain = next(variant for variant in planned.variants if variant.name == "plain BASE_LR=0.1")
    assert planned.baselines[plain].name == "tract LAMBDA=0.05 BASE_LR=0.1"


def test_a_swept_value_that_the_arm_has_anyway_is_the_same_run(tmp_path, images):
    sweeps = {"MODEL.TRACT.LAMBDA": ["0.1", "1"]}
    planned = build(design(tmp_path, images, sweeps=sweeps, seeds=1))
    assert [variant.folder for variant in planned.variants] == ["plain", "tract", "tract+LAMBDA=1"]
    first = build(design(tmp_path, images, seeds=1))
    for run in first.runs:
        write_run(first, run, 50.0)
    assert [run.variant.name for run in missing(planned)] == ["tract LAMBDA=1"]


def test_the_baseline_is_judged_by_nothing():
    plain, tract = Variant("plain"), Variant("tract", (("SOLVER.BASE_LR", "1"),))
    assert baseline_of(plain, [plain, tract], "plain") is None
    assert baseline_of(tract, [plain, tract], "plain") == plain
    other = Variant("tract", (("SOLVER.BASE_LR", "2"),))
    assert baseline_of(other, [tract, other], "tract") == tract


def test_a_sweep_s_value_may_have_commas_in_brackets():
    assert parse_sweep("SOLVER.STEPS=[1,2],[3]") == ("SOLVER.STEPS", ["[1,2]", "[3]"])
    for text in ("SOLVER.BASE_LR", "=1", "SOLVER.BASE_LR=1,,2", "SOLVER.BASE_LR=1,1"):
        with pytest.raises(UserError, match="--sweep"):
            parse_sweep(text)


def test_no_sweep_of_a_key_is_lost_to_another_of_the_same_key():
    assert parse_sweeps(["A=1,2", "B=3"]) == {"A": ["1", "2"], "B": ["3"]}
    with pytest.raises(UserError, match="--sweep A is there twice"):
        parse_sweeps(["A=1", "A=2"])


def test_a_key_that_no_config_has_yet_and_a_long_value_can_be_swept(tmp_path, images):
    sweeps = {"DEEPSPEED.comment": ["a", "b" * 300]}
    for run in build(design(tmp_path, images, arms=["plain"], sweeps=sweeps)).runs:
        assert all(len(part) < 256 for part in run.folder.parts) and not run.folder.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": ["SEED", "3"]}, "SEED is set by the comparison: use --seeds"),
        ({"pairs": ["OUTPUT_DIR", "x"]}, "use --output"),
        ({"baseline": "frozen"}, "--baseline frozen is none of the arms plain, tract"),
        ({"arms": ["plane"]}, "there is no such arm"),
        ({"sweeps": {"SOLVER.BASE_RL": ["1"]}}, "did you mean 'SOLVER.BASE_LR'"),
        ({"arms": ["plain", "plain"]}, "an arm is there twice"),
        ({"sweeps": {"MODEL.TRACT.LAMBDA": ["0.1", "0.10"]}}, "would share the folder"),
        ({"lengths": [2.0, 2.0000001]}, "would share the folder"),
        ({"lengths": [2.0, 2.1]}, "--lengths 2 and 2.1 are the same training: 8 x 8 images"),
        ({"sweeps": {"SEED": ["0", "1"]}}, "SEED is set by the comparison: use --seeds"),
        ({"sweeps": {"OUTPUT_DIR": ["a", "b"]}}, "use --output"),
        ({"sweeps": {"SOLVER.EPOCHS": ["1", "2"]}}, "--sweep SOLVER.EPOCHS: .*--lengths"),
        ({"sweeps": {"TEST.EVAL_EPOCHS": ["1", "2"]}}, "--sweep TEST.EVAL_EPOCHS: .*alike"),
        ({"sweeps": {"TEST.BEST_METRIC": ["top1", "top5"]}}, "--sweep TEST.BEST_METRIC: .*alike"),
        ({"sweeps": {"DATASETS.LIMIT": ["8", "16"]}}, "--sweep DATASETS.LIMIT: .*same images"),
        (
            {"arms": ["plain"], "sweeps": {"MODEL.TRACT.LAMBDA": ["0.1"]}},
            "--sweep MODEL.TRACT.LAMBDA: none of the arms plain has TrAct on",
        ),
    ],
)
def test_mistakes_are_refused_before_the_first_run(tmp_path, images, changes, message):
    with pytest.raises(UserError, match=message):
        build(design(tmp_path, images, **changes))


def test_frozen_is_an_arm_where_there_are_weights(tmp_path, images):
    assert {run.variant.arm for run in build(design(tmp_path, images, arms=[])).runs} == {
        "plain", "tract",
    }  # fmt: skip
    pairs = ["MODEL.WEIGHTS", "weights.pth"]
    planned = build(design(tmp_path, images, arms=[], pairs=pairs))
    assert [variant.arm for variant in planned.variants] == ["frozen", "plain", "tract"]


def test_runs_beside_each_other_take_as_long_as_the_last_of_them():
    assert seconds_beside([3.0, 3.0, 3.0], 1) == 9
    assert seconds_beside([3.0, 3.0, 3.0], 2) == 6
    assert seconds_beside([3.0], 4) == 3 and seconds_beside([], 2) == 0


@pytest.mark.parametrize("images", [8, 10, 24, 100])
def test_an_evaluation_of_all_images_is_estimated_from_a_few(images):
    assert _extrapolated(lambda count: 3 + 0.5 * count, 8, images) == 3 + 0.5 * images
    assert _extrapolated(lambda count: 3.0, min(8, images), images) == 3


def test_a_run_s_configuration_is_that_of_its_command(tmp_path, images):
    for run in build(design(tmp_path, images)).runs:
        _, *arguments = run.arguments
        pairs = arguments[arguments.index(run.variant.arm) + 1 :]
        assert load_cfg(CLASSIFIER, pairs, run.variant.arm) == run.cfg
