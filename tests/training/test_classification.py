"""Classifiers: trained, fine-tuned and evaluated, in one process."""

import json
import math
import shutil

import pytest
import torch

from tests.training.image_folder import options, write_image_folder
from tests.training.runs import log, results, run_here, weights
from tract_det.cli import call
from tract_det.config.classification import load_cfg
from tract_det.errors import UserError
from tract_det.training.classification import make_plan
from tract_det.training.classifiers import build_classifier


def train(root, output, *flags, **changes):
    return run_here("pretrain", *flags, *options(root, output, **changes))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, folder):
    """A run with batch norm, a moving average, a reader, bf16, channels_last and evaluations."""
    output = tmp_path_factory.mktemp("trained") / "out"
    printed = train(
        folder, output, MODEL__NORM="BN", SOLVER__AMP__ENABLED=True, DATALOADER__NUM_WORKERS=1,
        MODEL__EMA__ENABLED=True, MODEL__EMA__DECAY=0.5, MODEL__CHANNELS_LAST=True,
        TEST__EVAL_EPOCHS=0.5, TEST__BEST_METRIC="ema.top1", SOLVER__NESTEROV=True,
        SOLVER__MAX_ITER=6,
    )  # fmt: skip
    return output, printed


def test_a_run_leaves_results_weights_and_classes(trained):
    output, printed = trained
    found = results(output)
    assert found["images"] == found["ema"]["images"] == 23
    for one in (found, found["ema"]):
        for k in ("top1", "top5"):
            assert one[k] == pytest.approx(100 * one["correct"][k] / 23)
    assert found["top5"] == 100  # of four classes
    for name in ("final", "final_ema", "best", "best_ema"):
        assert (output / f"model_{name}.pth").is_file()
    assert json.loads((output / "classes.json").read_text()) == {
        "classes": ["ant", "bee", "cat", "dog"],
        "index": {"ant": 0, "bee": 1, "cat": 2, "dog": 3},
    }
    assert sorted(log(output)) == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(value) for value in log(output).values())
    assert sorted(log(output, "ema.top1")) == [2, 4, 6]  # half epochs of 4 steps
    assert min(log(output, "images_per_second").values()) > 0
    assert min(log(output, "peak_memory_gib").values()) > 0
    assert "TrAct on 'conv1', lambda 0.1 of standardised pixels" in printed
    assert "images/s, peak memory" in printed
    assert f"top-1 {found['top1']:.2f} %" in printed


def test_the_weights_are_torchvisions_and_know_classes_pixels_and_form(trained):
    content = torch.load(trained[0] / "model_final.pth", weights_only=True)
    meta = content["meta"]
    assert meta["model"] == "resnet10" and meta["num_classes"] == 4 and meta["width"] == 16
    assert meta["class_names"] == ["ant", "bee", "cat", "dog"] and meta["small_images"]
    assert meta["small_pool"] is False
    assert meta["pixel_std"] == pytest.approx([58.395, 57.12, 57.375])
    assert {"conv1.weight", "bn1.running_mean", "layer4.0.conv1.weight", "fc.bias"} <= set(
        content["model"]
    )
    values = content["model"].values()
    assert all(v.dtype == torch.float32 for v in values if v.is_floating_point())


def test_the_moving_average_has_statistics_of_its_own(trained):
    plain, average = weights(trained[0]), weights(trained[0], "model_final_ema.pth")
    assert plain.keys() == average.keys()
    for key in ("conv1.weight", "bn1.running_mean", "bn1.running_var", "fc.bias"):
        assert not torch.equal(plain[key], average[key])


@pytest.mark.parametrize("suffix", ["", "_ema"])
def test_evaluating_the_saved_weights_gives_the_same_counts(trained, folder, tmp_path, suffix):
    train(
        folder, tmp_path, "--eval-only", MODEL__WEIGHTS=trained[0] / f"model_final{suffix}.pth",
        MODEL__NORM="BN", SOLVER__AMP__ENABLED=True, MODEL__CHANNELS_LAST=True,
    )  # fmt: skip
    assert not (tmp_path / "weights_report.json").exists()
    expected = results(trained[0])
    average = expected.pop("ema")
    actual = results(tmp_path)
    if suffix:
        assert actual.pop("classes").keys() == expected["classes"].keys()  # of the weights alone
    assert actual == (average if suffix else expected)


def test_tract_changes_the_first_update_of_the_stem_alone_and_stops_where_it_should(
    folder, tmp_path
):
    for name, changes in (
        ("plain", {"MODEL__TRACT__ENABLED": False}),
        ("ours", {}),
        ("stopped", {"MODEL__TRACT__STOP_AT": 1, "SOLVER__MAX_ITER": 2}),
    ):
        train(folder, tmp_path / name, **{"SOLVER__MAX_ITER": 1, **changes})
    plain, ours = weights(tmp_path / "plain"), weights(tmp_path / "ours")
    assert [key for key in plain if not torch.equal(plain[key], ours[key])] == ["conv1.weight"]
    assert list(log(tmp_path / "stopped", "tract_lambda")) == [1]


def test_rotations_policies_and_the_small_pool_reach_the_run(folder, tmp_path):
    for name, changes in (
        ("plain", {}),
        ("rotated", {"INPUT__ROTATION": 90}),
        ("policy", {"INPUT__AUTO_AUGMENT": "autoaugment_cifar10"}),
        ("pooled", {"MODEL__SMALL_POOL": True}),
    ):
        train(folder, tmp_path / name, SOLVER__MAX_ITER=1, **changes)
    losses = {log(tmp_path / name)[1] for name in ("plain", "rotated", "policy", "pooled")}
    assert len(losses) == 4
    meta = torch.load(tmp_path / "pooled/model_final.pth", weights_only=True)["meta"]
    assert meta["small_pool"] is True


def test_weights_are_not_evaluated_in_a_form_that_their_tensors_do_not_show(
    trained, folder, tmp_path
):
    model = trained[0] / "model_final.pth"
    changes = {"MODEL__WEIGHTS": model, "MODEL__NORM": "BN", "MODEL__SMALL_POOL": True}
    with pytest.raises(UserError, match=r"SMALL_POOL is True, and it was trained with False"):
        train(folder, tmp_path / "out", "--eval-only", **changes)
    assert not (tmp_path / "out").exists()


def test_a_frozen_stem_stays_and_its_weights_evaluate_to_the_same_counts(folder, tmp_path):
    train(
        folder, tmp_path / "out", "--arm", "frozen", MODEL__NORM="BN", MODEL__TRACT__ENABLED=False,
        SOLVER__MAX_ITER=2,
    )  # fmt: skip
    frozen = weights(tmp_path / "out")
    cfg = load_cfg(tmp_path / "out/config.yaml")
    torch.manual_seed(0)
    start = build_classifier(cfg, None, ("ant", "bee", "cat", "dog"), False).model.state_dict()
    is_still = {key: torch.equal(value, start[key]) for key, value in frozen.items()}
    assert all(is_still[key] == key.startswith(("conv1", "bn1", "layer1")) for key in is_still)
    train(
        folder, tmp_path / "again", "--eval-only", MODEL__NORM="BN", MODEL__TRACT__ENABLED=False,
        MODEL__WEIGHTS=tmp_path / "out/model_final.pth",
    )  # fmt: skip
    assert results(tmp_path / "again") == results(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler")
def test_a_compiled_run_is_the_eager_one_but_for_rounding(folder, tmp_path, monkeypatch):
    """Relative 1e-4 after four steps; lambda moves, and TrAct is on in three of them."""
    changes = {
        "MODEL__TRACT__SCHEDULE": "linear",
        "MODEL__TRACT__LAMBDA_END": 0.2,
        "MODEL__TRACT__STOP_AT": 3,
        "SOLVER__BASE_LR": 0.01,
    }
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    for name, compiled in (("eager", False), ("compiled", True)):
        train(folder, tmp_path / name, MODEL__COMPILE=compiled, **changes)
        assert any((tmp_path / "inductor").rglob("*.py")) == compiled
    assert log(tmp_path / "compiled") == pytest.approx(log(tmp_path / "eager"), rel=1e-4)
    eager, compiled = weights(tmp_path / "eager"), weights(tmp_path / "compiled")
    assert compiled.keys() == eager.keys()
    for key, value in compiled.items():
        torch.testing.assert_close(value, eager[key], rtol=0, atol=1e-4)
    assert results(tmp_path / "compiled")["images"] == 23


def test_pixels_that_are_not_standardised_scale_lambda_and_are_known_to_the_weights(
    folder, tmp_path
):
    printed = train(folder, tmp_path, MODEL__STANDARDIZE=False, SOLVER__MAX_ITER=1)
    assert "0.00510807 of this model's" in printed  # 0.1 x the variance of pixels in [0, 1]
    meta = torch.load(tmp_path / "model_final.pth", weights_only=True)["meta"]
    assert meta["pixel_mean"] == [0, 0, 0] and meta["pixel_std"] == [255, 255, 255]


def test_pretrained_weights_are_fine_tuned_on_other_classes(trained, tmp_path):
    root = write_image_folder(tmp_path / "other", val=8, classes=("eel", "fox", "gnu"))
    model = trained[0] / "model_final.pth"
    printed = train(
        root, tmp_path / "out", MODEL__WEIGHTS=model, MODEL__NORM="BN", SOLVER__MAX_ITER=1,
        SOLVER__BASE_LR=1e-8,
    )  # fmt: skip
    assert f"all names in {tmp_path / 'out/weights_report.json'}" in printed
    report = json.loads((tmp_path / "out/weights_report.json").read_text())
    assert report["source"] == str(model) and report["random"] == ["fc.weight", "fc.bias"]
    assert report["left"] == report["resampled"] == []
    assert sorted(report["used"]) == sorted(set(weights(trained[0])) - {"fc.weight", "fc.bias"})
    ours, theirs = weights(tmp_path / "out"), weights(trained[0])
    assert ours["fc.weight"].shape[0] == 3
    torch.testing.assert_close(ours["conv1.weight"], theirs["conv1.weight"], rtol=0, atol=1e-5)


def test_the_stem_may_stand_still_while_the_rest_learns(folder, tmp_path):
    """Its own rate is 0, which no other setting gives."""
    changes = {"SOLVER__STEM__BASE_LR": 0.0, "SOLVER__OPTIMIZER": "AdamW"}
    train(folder, tmp_path / "a", SOLVER__MAX_ITER=1, **changes)
    train(folder, tmp_path / "b", SOLVER__MAX_ITER=2, **changes)
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert "conv1.weight" in a
    assert [key for key in a if torch.equal(a[key], b[key])] == ["conv1.weight"]


def test_the_factor_of_the_stem_multiplies_its_rate_and_no_other(folder, tmp_path):
    """A step of SGD; the stem's own rate, if it has one, is multiplied as well."""
    one_step = {"SOLVER__MAX_ITER": 1, "SOLVER__MOMENTUM": 0.0, "SOLVER__WEIGHT_DECAY": 0.0}
    after = {}
    for name, changes in {
        "still": {"SOLVER__STEM__LR_FACTOR": 0.0},
        "plain": {},
        "fast": {"SOLVER__STEM__LR_FACTOR": 10.0},
        "own": {"SOLVER__STEM__BASE_LR": 0.1, "SOLVER__STEM__LR_FACTOR": 5.0},  # 0.05 for others
    }.items():
        train(folder, tmp_path / name, **one_step, **changes)
        after[name] = weights(tmp_path / name)
    step = after["plain"]["conv1.weight"] - after["still"]["conv1.weight"]
    assert step.abs().max() > 0
    for name in ("fast", "own"):
        faster = after[name]["conv1.weight"] - after["still"]["conv1.weight"]
        torch.testing.assert_close(faster, 10 * step, rtol=1e-4, atol=1e-6)
        others = [key for key in after[name] if key != "conv1.weight"]
        assert all(torch.equal(after[name][key], after["plain"][key]) for key in others)


def test_a_run_whose_stem_had_no_rate_of_its_own_does_not_go_on_with_one(folder, tmp_path):
    train(folder, tmp_path / "out", SOLVER__MAX_ITER=2, SOLVER__CHECKPOINT_EPOCHS=0.25)
    (tmp_path / "out/last_checkpoint").write_text("iter_0000001")
    changed = options(folder, tmp_path / "out", SOLVER__MAX_ITER=2, SOLVER__STEM__LR_FACTOR=10.0)
    with pytest.raises(UserError, match=r"--resume: SOLVER\.STEM sets the stem's weight apart now"):
        call("pretrain", ["--resume", *changed])


def test_corrupt_images_are_replaced_or_left_out_and_counted(tmp_path):
    root = write_image_folder(tmp_path / "images", train=2, val=8)
    for name in ("train/bee/000.png", "val/cat/001.png"):
        (root / name).write_bytes(b"broken")
    with pytest.raises(UserError, match=r"000\.png|001\.png"):
        call("pretrain", options(root, tmp_path / "out"))
    printed = train(root, tmp_path / "out", DATASETS__SKIP_CORRUPT=True)
    assert "1 corrupt images were replaced, 4 times: train/bee/000.png" in printed
    assert results(tmp_path / "out")["images"] == 7
    assert results(tmp_path / "out")["skipped"] == 1


@pytest.mark.parametrize(
    ("flags", "changes", "message"),
    [
        (["--resume"], {}, "--resume: there is no checkpoint in .*out"),
        (["--eval-only"], {}, "--eval-only: set MODEL.WEIGHTS"),
        (["--eval-only"], {"MODEL__WEIGHTS": "no.pth"}, "MODEL.WEIGHTS no.pth is not a file"),
        ([], {"DATASETS__ROOT": ""}, "DATASETS.ROOT is empty"),
        ([], {"DATASETS__ROOT": "/nowhere"}, "/nowhere: no such folder: set DATASETS.ROOT"),
        ([], {"MODEL__NAME": "resnet9"}, "MODEL.NAME resnet9"),
        (
            [],
            {
                "MODEL__NAME": "alexnet",
                "MODEL__WIDTH": 64,
                "MODEL__NORM": "BN",
                "MODEL__SMALL_IMAGES": False,
            },
            "INPUT.SIZE is 32, which MODEL.NAME alexnet refuses",
        ),
        ([], {"SOLVER__ACCUMULATION": 3}, "SOLVER.IMS_PER_BATCH 8 does not divide"),
        (
            [],
            {"SOLVER__OPTIMIZER": "LAMB", "DEEPSPEED__zero_optimization__stage": 1},
            "SOLVER.OPTIMIZER LAMB",
        ),
        ([], {"INPUT__SIZE": 64, "INPUT__RESIZE_TEST": 64}, "INPUT.SIZE 64: set INPUT.CROP"),
    ],
)
def test_what_cannot_work_is_refused_by_name(folder, tmp_path, flags, changes, message):
    with pytest.raises(UserError, match=message):
        call("pretrain", [*flags, *options(folder, tmp_path / "out", **changes)])
    assert not (tmp_path / "out/model_final.pth").exists()


def test_epochs_are_counted_in_images():
    cfg = load_cfg("ImageNet-Classification/resnet50.yaml", ["SOLVER.EPOCHS", "30"])
    plan = make_plan(cfg, 1_281_167)
    assert plan.max_iter == round(30 * 1_281_167 / 256) == 150_137
    assert plan.milestones == [50_046, 100_091] and plan.warmup_iters == 0
    assert plan.eval_period == plan.checkpoint_period == 5005
    epochs = ["SOLVER.EPOCHS", "30", "SOLVER.STEPS", "[10, 20]"]
    assert make_plan(load_cfg("ImageNet-Classification/resnet50.yaml", epochs), 1_281_167) == plan
