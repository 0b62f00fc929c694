"""Detectors and classifiers on several ranks, through the real launchers."""

import signal

import pytest
import torch

from tests.conftest import REPO, run_python, tiny_options
from tests.training import test_channels as four_channels
from tests.training import test_classifier_channels as four_channel_classes
from tests.training.image_folder import options
from tests.training.runs import (
    TwoRanks,
    assert_close,
    assert_same_bits,
    free_port,
    interrupt,
    log,
    results,
    run_apart,
    run_here,
    samples,
)

TRAIN, PRETRAIN = REPO / "tools/train_net.py", REPO / "tools/pretrain_net.py"

# All that meets in a step: the stem by another rule, micro-batches, clipping, a moving lambda.
# Adam's eps is large, since it divides by the root of squared gradients that may be rounding alone.
STEP = {
    "SOLVER__OPTIMIZER": "Adam",
    "SOLVER__EPS": 0.01,
    "SOLVER__BASE_LR": 0.01,
    "SOLVER__STEM__OPTIMIZER": "SGD",
    "SOLVER__STEM__BASE_LR": 0.05,
    "SOLVER__ACCUMULATION": 2,
    "SOLVER__CLIP_GRADIENTS__ENABLED": True,
    "SOLVER__CLIP_GRADIENTS__CLIP_VALUE": 0.5,
    "MODEL__TRACT__SCHEDULE": "linear",
    "MODEL__TRACT__LAMBDA_END": 0.2,
    "SOLVER__MAX_ITER": 5,
}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    ranks = TwoRanks(tmp_path_factory.mktemp("two_ranks"))
    yield ranks
    ranks.close()


# Detectors


@pytest.fixture(scope="module")
def one_step(tmp_path_factory, voc_tree):
    """A step of one process and the whole batch, with TrAct."""
    output = tmp_path_factory.mktemp("one_step")
    changes = {"SOLVER__MAX_ITER": 1, "MODEL__TRACT__ENABLED": True}
    run_here("train", *tiny_options(voc_tree, output, **changes))
    return output


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), 2])
def test_two_ranks_make_a_detectors_update_of_one_process(
    two_ranks, one_step, voc_tree, tmp_path, stage
):
    changes = {"SOLVER__MAX_ITER": 1, "MODEL__TRACT__ENABLED": True}
    changes["DEEPSPEED__zero_optimization__stage"] = stage
    two_ranks.run("train", *tiny_options(voc_tree, tmp_path, **changes))
    assert_close(tmp_path, one_step)


def test_two_ranks_make_the_update_of_one_process_on_images_of_four_channels(two_ranks, tmp_path):
    tree, folder = tmp_path / "tree", tmp_path / "folder"
    four_channels.write_tree(tree, train=4, test=3)
    four_channel_classes.write_folder(folder, 4, ".png")
    detector = {**four_channels.FOUR, "SOLVER__MAX_ITER": 1, "MODEL__TRACT__ENABLED": True}
    classifier = {**STEP, **four_channel_classes.statistics(4), "SOLVER__MAX_ITER": 2}
    for verb, data, make_options, keys in (
        ("train", tree, tiny_options, detector),
        ("pretrain", folder, options, classifier),
    ):
        one, two = tmp_path / f"{verb}1", tmp_path / f"{verb}2"
        run_here(verb, *make_options(data, one, **keys))
        two_ranks.run(verb, *make_options(data, two, **keys))
        assert_close(two, one)
        assert results(two)["images"] == results(one)["images"] > 0


@pytest.mark.slow
def test_torchrun_with_micro_batches_makes_the_update_of_one_process(one_step, voc_tree, tmp_path):
    changes = {"SOLVER__MAX_ITER": 1, "MODEL__TRACT__ENABLED": True, "SOLVER__ACCUMULATION": 2}
    changes["DATALOADER__NUM_WORKERS"] = 1
    run_apart(TRAIN, *tiny_options(voc_tree, tmp_path, **changes), launcher="torchrun")
    assert_close(tmp_path, one_step)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launch",
    [
        ["-m", "deepspeed.launcher.runner", "--num_gpus", 2, "--module"],
        ["-m", "torch.distributed.run", "--nproc-per-node", 2, "-m"],
    ],
    ids=["deepspeed", "torchrun"],
)
def test_launchers_start_the_installed_package_by_its_name(launch, one_step, voc_tree, tmp_path):
    launch.insert(-1, "--master_port" if "--num_gpus" in launch else "--master-port")
    launch.insert(-1, free_port())
    options = tiny_options(voc_tree, tmp_path, SOLVER__MAX_ITER=1, MODEL__TRACT__ENABLED=True)
    done = run_python(*launch, "tract_det.cli", "train", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_close(tmp_path, one_step)


def test_two_ranks_evaluate_what_one_does_to_the_last_bit(two_ranks, one_step, voc_tree, tmp_path):
    model = one_step / "model_final.pth"
    options = tiny_options(voc_tree, tmp_path, MODEL__WEIGHTS=model)
    two_ranks.run("train", "--eval-only", *options)
    assert results(tmp_path) == results(one_step)
    assert samples(tmp_path) == samples(one_step) and len(samples(tmp_path)) == 11


@pytest.mark.slow
@pytest.mark.parametrize("first", ["one rank", "two ranks"])
@pytest.mark.parametrize("stages", [(0, 0), (1, 2), (2, 0)])
def test_a_detector_goes_on_with_another_number_of_ranks(
    two_ranks, voc_tree, tmp_path, first, stages
):
    """And, where they differ, with another stage of ZeRO; the moving average goes on as well."""
    changes = {
        "SOLVER__MAX_ITER": 4, "SOLVER__CHECKPOINT_PERIOD": 1, "SOLVER__CHECKPOINT_KEEP": 9,
        "MODEL__TRACT__ENABLED": True, "LOG_PERIOD": 1, "MODEL__EMA__ENABLED": True,
        "MODEL__EMA__DECAY": 0.5,
        "SOLVER__BASE_LR": 1e-3,  # larger steps make more of rounding
    }  # fmt: skip
    run_here("train", *tiny_options(voc_tree, tmp_path / "whole", **changes))
    runs = [run_here, two_ranks.run] if first == "one rank" else [two_ranks.run, run_here]
    for run, stage, flags in zip(runs, stages, ([], ["--resume"]), strict=True):
        changes["DEEPSPEED__zero_optimization__stage"] = stage
        printed = run("train", *flags, *tiny_options(voc_tree, tmp_path / "parts", **changes))
        (tmp_path / "parts/last_checkpoint").write_text("iter_0000002")
    assert "at step 2" in printed
    names = ["model_final.pth", "model_final_ema.pth"]
    assert_close(tmp_path / "parts", tmp_path / "whole", names=names)


def test_patience_ends_a_detectors_training_on_both_ranks_at_once(two_ranks, voc_tree, tmp_path):
    changes = {"SOLVER__MAX_ITER": 9, "SOLVER__BASE_LR": 1e-30, "SOLVER__PATIENCE": 1}
    two_ranks.run("train", *tiny_options(voc_tree, tmp_path, TEST__EVAL_PERIOD=1, **changes))
    assert results(tmp_path)["stopped"]["step"] == 2


# Classifiers


@pytest.fixture(scope="module")
def whole(tmp_path_factory, folder):
    """One process, the whole batch at once."""
    output = tmp_path_factory.mktemp("whole")
    run_here("pretrain", *options(folder, output, **{**STEP, "SOLVER__ACCUMULATION": 1}))
    return output


@pytest.mark.parametrize(
    "stage", [pytest.param(s, marks=pytest.mark.slow) for s in (0, 1, 2)] + [3]
)
def test_every_zero_stage_makes_the_steps_of_one_process(two_ranks, folder, whole, tmp_path, stage):
    changes = {**STEP, "DEEPSPEED__zero_optimization__stage": stage}
    # Else stage 3 keeps whatever is small on every rank, which here is everything.
    changes["DEEPSPEED__zero_optimization__stage3_param_persistence_threshold"] = 0
    two_ranks.run("pretrain", *options(folder, tmp_path, **changes))
    assert_close(tmp_path, whole)
    turns = (log(run, "stem_turn") for run in (tmp_path, whole))
    assert next(turns) == pytest.approx(next(turns), rel=1e-3)
    lambdas = list(log(tmp_path, "tract_lambda").values())
    assert lambdas == pytest.approx([0.1, 0.12, 0.14, 0.16, 0.18])


def test_two_ranks_count_what_one_process_counts(two_ranks, folder, whole, tmp_path):
    """23 images in batches of 5."""
    model = whole / "model_final.pth"
    two_ranks.run("pretrain", "--eval-only", *options(folder, tmp_path, MODEL__WEIGHTS=model))
    assert results(tmp_path) == results(whole)
    assert results(tmp_path)["images"] == 23
    assert samples(tmp_path) == samples(whole)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [3, 4])
def test_more_ranks_count_what_one_process_counts(folder, whole, tmp_path, ranks):
    arguments = options(folder, tmp_path, MODEL__WEIGHTS=whole / "model_final.pth")
    run_apart(PRETRAIN, "--eval-only", *arguments, launcher="deepspeed", ranks=ranks)
    assert results(tmp_path) == results(whole)


def test_two_ranks_resume_as_if_they_had_not_stopped(two_ranks, folder, tmp_path):
    """The first part ends at its last step, with a checkpoint; no rate depends on the length."""
    changes = {**STEP, "DEEPSPEED__zero_optimization__stage": 2, "MODEL__EMA__ENABLED": True}
    changes |= {"MODEL__TRACT__SCHEDULE": "constant", "MODEL__TRACT__LAMBDA_END": -1}
    changes |= {"SOLVER__LR_SCHEDULER_NAME": "WarmupMultiStepLR", "SOLVER__STEPS": []}
    two_ranks.run("pretrain", *options(folder, tmp_path / "a", **changes))
    first = {**changes, "SOLVER__MAX_ITER": 3}
    two_ranks.run("pretrain", *options(folder, tmp_path / "b", **first))
    printed = two_ranks.run("pretrain", "--resume", *options(folder, tmp_path / "b", **changes))
    assert "at step 3" in printed
    assert log(tmp_path / "b") == log(tmp_path / "a")
    assert_same_bits(tmp_path / "a", tmp_path / "b", ["model_final.pth", "model_final_ema.pth"])


@pytest.mark.parametrize("first", ["one rank", "two ranks"])
@pytest.mark.parametrize(
    ("stage", "later"),
    [(0, 0), (2, 2), *(pytest.param(a, b, marks=pytest.mark.slow) for a, b in ((1, 3), (3, 1)))],
)
def test_a_run_goes_on_with_another_number_of_ranks(
    two_ranks, folder, whole, tmp_path, first, stage, later
):
    """And with another number of micro-batches; where they differ, another stage of ZeRO."""
    changes = {
        **STEP, "SOLVER__CHECKPOINT_EPOCHS": 0.01, "SOLVER__CHECKPOINT_KEEP": 9,
        "DEEPSPEED__zero_optimization__stage3_param_persistence_threshold": 0,
        "DEEPSPEED__zero_optimization__stage": stage,
    }  # fmt: skip
    runs = [run_here, two_ranks.run] if first == "one rank" else [two_ranks.run, run_here]
    runs[0]("pretrain", *options(folder, tmp_path, **changes))
    (tmp_path / "last_checkpoint").write_text("iter_0000003")
    changes |= {"DEEPSPEED__zero_optimization__stage": later, "SOLVER__ACCUMULATION": 1}
    printed = runs[1]("pretrain", "--resume", *options(folder, tmp_path, **changes))
    assert "at step 3" in printed
    assert_close(tmp_path, whole)


@pytest.mark.slow
def test_a_run_of_two_ranks_goes_on_with_four_and_ends_with_one(two_ranks, folder, whole, tmp_path):
    changes = {
        **STEP, "SOLVER__CHECKPOINT_EPOCHS": 0.01, "SOLVER__CHECKPOINT_KEEP": 9,
        "DEEPSPEED__zero_optimization__stage": 2,
    }  # fmt: skip
    arguments = options(folder, tmp_path, **changes)
    two_ranks.run("pretrain", *arguments)
    (tmp_path / "last_checkpoint").write_text("iter_0000002")
    printed = run_apart(PRETRAIN, "--resume", *arguments, launcher="deepspeed", ranks=4)
    assert "at step 2" in printed
    (tmp_path / "last_checkpoint").write_text("iter_0000004")
    assert "at step 4" in run_here("pretrain", "--resume", *arguments)
    assert_close(tmp_path, whole)


@pytest.mark.slow
def test_interrupted_and_resumed_is_uninterrupted(folder, tmp_path):
    """SIGTERM in the middle of a log period, with micro-batches, a moving average, batch norm."""
    changes = {
        "SOLVER__MAX_ITER": 9, "LOG_PERIOD": 3, "SOLVER__ACCUMULATION": 2, "MODEL__NORM": "BN",
        "MODEL__EMA__ENABLED": True, "MODEL__EMA__DECAY": 0.8, "DATALOADER__NUM_WORKERS": 1,
        "INPUT__AUTO_AUGMENT": "trivialaugment", "MIX__MIXUP_ALPHA": 0.2, "MODEL__DROP_RATE": 0.0,
        "TEST__EVAL_EPOCHS": 1,
    }  # fmt: skip
    run_here("pretrain", *options(folder, tmp_path / "a", **changes))
    printed, code = interrupt(
        PRETRAIN, *options(folder, tmp_path / "b", **changes), at="step 3/9", number=signal.SIGTERM
    )
    assert code == 128 + signal.SIGTERM, printed
    stopped = int(printed.split("stopped after step ")[1].split(":")[0])
    assert 3 <= stopped < 9 and not (tmp_path / "b/model_final.pth").exists()
    run_here("pretrain", "--resume", *options(folder, tmp_path / "b", **changes))
    assert log(tmp_path / "b") == log(tmp_path / "a")
    assert results(tmp_path / "b") == results(tmp_path / "a")
    names = [f"model_{which}{ema}.pth" for which in ("final", "best") for ema in ("", "_ema")]
    assert_same_bits(tmp_path / "a", tmp_path / "b", names)


@pytest.mark.slow
def test_two_ranks_killed_and_resumed_are_uninterrupted(two_ranks, folder, tmp_path):
    """Nothing is saved on a SIGKILL: the run goes on from the checkpoint of step 4."""
    changes = {
        **STEP, "SOLVER__MAX_ITER": 6, "SOLVER__CHECKPOINT_EPOCHS": 1, "MODEL__EMA__ENABLED": True,
        "DEEPSPEED__zero_optimization__stage": 2,
    }  # fmt: skip
    two_ranks.run("pretrain", *options(folder, tmp_path / "a", **changes))
    interrupt(
        PRETRAIN, *options(folder, tmp_path / "b", **changes), at="step 5/6",
        number=signal.SIGKILL, launcher="deepspeed",
    )  # fmt: skip
    assert (tmp_path / "b/last_checkpoint").read_text() == "iter_0000004\n"
    printed = two_ranks.run("pretrain", "--resume", *options(folder, tmp_path / "b", **changes))
    assert "at step 4" in printed
    assert_same_bits(tmp_path / "a", tmp_path / "b", ["model_final.pth", "model_final_ema.pth"])


@pytest.mark.slow
def test_two_ranks_stopped_and_resumed_keep_batch_norm_statistics_of_their_own(
    two_ranks, folder, tmp_path
):
    """An evaluation before the signal averages the statistics; the checkpoint is after it."""
    changes = {
        "MODEL__NORM": "BN", "SOLVER__MAX_ITER": 12, "LOG_PERIOD": 1, "TEST__EVAL_EPOCHS": 1,
        "MODEL__EMA__ENABLED": True, "MODEL__EMA__DECAY": 0.8,
    }  # fmt: skip
    two_ranks.run("pretrain", *options(folder, tmp_path / "a", **changes))
    printed, code = interrupt(
        PRETRAIN, *options(folder, tmp_path / "b", **changes), at="step 5/12",
        number=signal.SIGTERM, launcher="deepspeed",
    )  # fmt: skip
    assert code != 0 and not (tmp_path / "b/model_final.pth").exists(), printed
    tag = (tmp_path / "b/last_checkpoint").read_text().strip()
    assert 5 <= int(tag.removeprefix("iter_")) < 12, printed
    folder_of = tmp_path / "b/checkpoints" / tag
    first, second = (
        torch.load(folder_of / f"rank_000{rank}.pt", weights_only=True)["buffers"]
        for rank in (0, 1)
    )
    assert not torch.equal(first["model.bn1.running_mean"], second["model.bn1.running_mean"])
    two_ranks.run("pretrain", "--resume", *options(folder, tmp_path / "b", **changes))
    assert log(tmp_path / "b") == log(tmp_path / "a")
    assert results(tmp_path / "b") == results(tmp_path / "a")
    names = [f"model_{which}{ema}.pth" for which in ("final", "best") for ema in ("", "_ema")]
    assert_same_bits(tmp_path / "a", tmp_path / "b", names)
