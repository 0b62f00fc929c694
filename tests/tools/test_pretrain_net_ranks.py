"""The pretrainer on several ranks, and interrupted, through the real launcher."""

import signal

import pytest
import torch

from tests.tools.classification import (
    assert_same_bits,
    interrupt,
    log,
    results,
    train,
    weights,
    write_image_folder,
)

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
def folder(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, folder):
    """One process, the whole batch at once."""
    output = tmp_path_factory.mktemp("whole")
    train(folder, output, **{**STEP, "SOLVER__ACCUMULATION": 1})
    return output


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_zero_stage_makes_the_steps_of_one_process(folder, whole, tmp_path, stage):
    train(
        folder, tmp_path, ranks=2, **STEP, DEEPSPEED__zero_optimization__stage=stage,
        # Else stage 3 keeps whatever is small on every rank, which here is everything.
        DEEPSPEED__zero_optimization__stage3_param_persistence_threshold=0,
    )  # fmt: skip
    expected = weights(whole)
    for key, value in weights(tmp_path).items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-5)
    assert log(tmp_path) == pytest.approx(log(whole), rel=1e-5)
    lambdas = list(log(tmp_path, "tract_lambda").values())
    assert lambdas == pytest.approx([0.1, 0.12, 0.14, 0.16, 0.18])


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_count_what_one_process_counts(folder, whole, tmp_path, ranks):
    """23 images in batches of 5."""
    model = whole / "model_final.pth"
    train(folder, tmp_path, "--eval-only", ranks=ranks, MODEL__WEIGHTS=model)
    assert results(tmp_path) == results(whole)
    assert results(tmp_path)["images"] == 23


def test_interrupted_and_resumed_is_uninterrupted(folder, tmp_path):
    """SIGTERM in the middle of a log period, with micro-batches, a moving average, batch norm."""
    changes = {
        "SOLVER__MAX_ITER": 9, "LOG_PERIOD": 3, "SOLVER__ACCUMULATION": 2, "MODEL__NORM": "BN",
        "MODEL__EMA__ENABLED": True, "MODEL__EMA__DECAY": 0.8, "DATALOADER__NUM_WORKERS": 1,
        "INPUT__AUTO_AUGMENT": "trivialaugment", "MIX__MIXUP_ALPHA": 0.2, "MODEL__DROP_RATE": 0.0,
        "TEST__EVAL_EPOCHS": 1,
    }  # fmt: skip
    train(folder, tmp_path / "a", **changes)
    said, code = interrupt(folder, tmp_path / "b", "step 3/9", signal.SIGTERM, **changes)
    assert code == 128 + signal.SIGTERM, said
    stopped = int(said.split("stopped after step ")[1].split(":")[0])
    assert 3 <= stopped < 9 and not (tmp_path / "b/model_final.pth").exists()
    train(folder, tmp_path / "b", "--resume", **changes)
    assert log(tmp_path / "b") == log(tmp_path / "a")
    assert results(tmp_path / "b") == results(tmp_path / "a")
    names = [f"model_{which}{ema}.pth" for which in ("final", "best") for ema in ("", "_ema")]
    assert_same_bits(tmp_path / "a", tmp_path / "b", names)


def test_two_ranks_killed_and_resumed_are_uninterrupted(folder, tmp_path):
    """Nothing is saved on a SIGKILL: the run goes on from the checkpoint of step 4."""
    changes = {
        **STEP, "SOLVER__MAX_ITER": 6, "SOLVER__CHECKPOINT_EPOCHS": 1, "MODEL__EMA__ENABLED": True,
        "DEEPSPEED__zero_optimization__stage": 2,
    }  # fmt: skip
    train(folder, tmp_path / "a", ranks=2, **changes)
    interrupt(folder, tmp_path / "b", "step 5/6", signal.SIGKILL, ranks=2, **changes)
    assert (tmp_path / "b/last_checkpoint").read_text() == "iter_0000004\n"
    done = train(folder, tmp_path / "b", "--resume", ranks=2, **changes)
    assert "at step 4" in done.stdout
    assert_same_bits(tmp_path / "a", tmp_path / "b", ["model_final.pth", "model_final_ema.pth"])


def test_two_ranks_stopped_and_resumed_keep_batch_norms_statistics_of_their_own(folder, tmp_path):
    """An evaluation before the signal averages the statistics; the checkpoint is after it."""
    changes = {
        "MODEL__NORM": "BN", "SOLVER__MAX_ITER": 12, "LOG_PERIOD": 1, "TEST__EVAL_EPOCHS": 1,
        "MODEL__EMA__ENABLED": True, "MODEL__EMA__DECAY": 0.8,
    }  # fmt: skip
    train(folder, tmp_path / "a", ranks=2, **changes)
    said, code = interrupt(folder, tmp_path / "b", "step 5/12", signal.SIGTERM, ranks=2, **changes)
    assert code != 0 and not (tmp_path / "b/model_final.pth").exists(), said
    tag = (tmp_path / "b/last_checkpoint").read_text().strip()
    assert 5 <= int(tag.removeprefix("iter_")) < 12, said
    state = torch.load(
        next((tmp_path / "b/checkpoints" / tag).glob("mp_rank_*model_states.pt")),
        weights_only=False,
    )
    first, second = state["buffers"]
    assert not torch.equal(first["model.bn1.running_mean"], second["model.bn1.running_mean"])
    train(folder, tmp_path / "b", "--resume", ranks=2, **changes)
    assert log(tmp_path / "b") == log(tmp_path / "a")
    assert results(tmp_path / "b") == results(tmp_path / "a")
    names = [f"model_{which}{ema}.pth" for which in ("final", "best") for ema in ("", "_ema")]
    assert_same_bits(tmp_path / "a", tmp_path / "b", names)
