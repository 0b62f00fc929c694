"""Detectors: trained, resumed and evaluated, in one process."""

import json
import math
import signal

import pytest
import torch
from PIL import Image

from tests.conftest import REPO, run_python, tiny_options, write_voc_tree
from tests.training.runs import (
    assert_close,
    assert_same_bits,
    interrupt,
    log,
    results,
    run_apart,
    run_here,
    weights,
)
from tract_det.cli import call
from tract_det.config.detection import load_cfg
from tract_det.engine.checkpoint import save_weights
from tract_det.errors import DivergedError, UserError
from tract_det.modeling.classifiers import build_classifier
from tract_det.modeling.weight_files import Weights
from tract_det.training.assembly import freeze_at

TOOL = REPO / "tools/train_net.py"


def train(root, output, *flags, **changes):
    return run_here("train", *flags, *tiny_options(root, output, **changes))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, voc_tree):
    """A run with TrAct, BatchNorm, a moving average, a worker process, bf16 and evaluations."""
    output = tmp_path_factory.mktemp("trained") / "out"
    printed = train(
        voc_tree, output, MODEL__TRACT__ENABLED=True, MODEL__BACKBONE__NORM="BN",
        SOLVER__AMP__ENABLED=True, SOLVER__CLIP_GRADIENTS__ENABLED=True, DATALOADER__NUM_WORKERS=1,
        MODEL__BACKBONE__FREEZE_AT=0, TEST__EVAL_PERIOD=2, MODEL__EMA__ENABLED=True,
        MODEL__EMA__DECAY=0.5, TEST__BEST_METRIC="ema.voc_area.mAP",
    )  # fmt: skip
    return output, printed


def test_a_run_leaves_results_weights_detections_and_a_picture(trained):
    output, printed = trained
    found = results(output)
    assert found["images"] == 5 and found["rule"] == "devkit"
    for rule in ("voc_07", "voc_area"):
        per_class = found[rule]["AP"]
        assert set(per_class) == {"disc", "box"}
        assert found[rule]["mAP"] == pytest.approx(sum(per_class.values()) / 2)
    assert {"AP", "AP50", "AP75"} <= set(found["coco"])
    assert {p.name for p in (output / "detections").iterdir()} == {
        "comp4_det_test_disc.txt", "comp4_det_test_box.txt",
    }  # fmt: skip
    with Image.open(output / "detections.png") as picture:
        assert picture.width > 500
    for name in ("config.yaml", "last_checkpoint"):
        assert (output / name).is_file()
    for name in ("final", "final_ema", "best", "best_ema"):
        assert (output / f"model_{name}.pth").is_file()
    assert list(output.glob("events.out.tfevents*"))
    assert sorted(log(output)) == [1, 2, 3, 4]
    assert all(math.isfinite(value) for value in log(output).values())
    assert sorted(log(output, "ema.voc_area.mAP")) == [2, 4]
    assert not list(output.rglob(".*")), "a temporary file stayed"
    assert json.loads((output / "classes.json").read_text())["classes"] == ["box", "disc"]
    assert "TrAct on 'backbone.body.conv1', lambda 0.1 of standardised pixels" in printed
    assert "images/s, peak memory" in printed


def test_the_weights_are_fp32_and_know_their_classes_and_pixels(trained):
    content = torch.load(trained[0] / "model_final.pth", weights_only=True)
    assert content["meta"]["class_names"] == ["box", "disc"]
    assert content["meta"]["pixel_std"] == pytest.approx([58.395, 57.12, 57.375])
    assert all(v.dtype == torch.float32 for v in content["model"].values() if v.is_floating_point())


def test_a_training_from_a_classifier_lists_all_that_it_took_and_left(voc_tree, tmp_path):
    classifier = build_classifier("resnet18", 5)
    statistics = {"pixel_mean": [124.0, 116.0, 104.0], "pixel_std": [58.0, 57.0, 57.0]}
    save_weights(tmp_path / "classifier.pth", classifier, statistics)
    printed = train(
        voc_tree, tmp_path / "out", MODEL__WEIGHTS=tmp_path / "classifier.pth", SOLVER__MAX_ITER=1,
        MODEL__BACKBONE__NORM="FrozenBN",
    )  # fmt: skip
    assert f"all names in {tmp_path / 'out/weights_report.json'}" in printed
    report = json.loads((tmp_path / "out/weights_report.json").read_text())
    assert report["source"] == str(tmp_path / "classifier.pth")
    own = {key for key in classifier.state_dict() if not key.startswith("fc.")}
    counted = {key for key in own if "num_batches" not in key}
    assert set(report["used"]) == {f"backbone.body.{key}" for key in counted}
    assert report["left"] == ["backbone.body.fc.weight", "backbone.body.fc.bias"]
    saved = {key for key in weights(tmp_path / "out") if "num_batches" not in key}
    assert {*report["used"], *report["random"]} == saved and len(report["random"]) > 6


def test_the_moving_average_has_weights_and_statistics_of_its_own(trained):
    plain, average = weights(trained[0]), weights(trained[0], "model_final_ema.pth")
    assert plain.keys() == average.keys()
    for key in ("conv1.weight", "bn1.running_mean", "bn1.running_var"):
        assert not torch.equal(plain[f"backbone.body.{key}"], average[f"backbone.body.{key}"])


def of_model(output):
    """The results without those of the moving average."""
    found = results(output)
    del found["ema"]
    return found


@pytest.mark.parametrize("suffix", ["", "_ema"])
def test_evaluating_the_saved_weights_gives_the_same_bits(trained, voc_tree, tmp_path, suffix):
    train(
        voc_tree, tmp_path, "--eval-only", MODEL__WEIGHTS=trained[0] / f"model_final{suffix}.pth",
        MODEL__BACKBONE__NORM="BN", SOLVER__AMP__ENABLED=True,
    )  # fmt: skip
    assert results(tmp_path) == (results(trained[0])["ema"] if suffix else of_model(trained[0]))
    if suffix:
        return
    for file in (trained[0] / "detections").iterdir():
        assert (tmp_path / "detections" / file.name).read_bytes() == file.read_bytes()


def test_weights_are_not_evaluated_as_a_detector_with_other_anchors(trained, voc_tree, tmp_path):
    changes = {
        "MODEL__WEIGHTS": trained[0] / "model_final.pth",
        "MODEL__BACKBONE__NORM": "BN",
        "MODEL__ANCHOR_GENERATOR__ASPECT_RATIOS": [0.4, 1.0, 2.0],
    }
    with pytest.raises(UserError, match=r"ASPECT_RATIOS is \[0\.4, .* trained with \[0\.5, "):
        train(voc_tree, tmp_path / "out", "--eval-only", **changes)
    assert not (tmp_path / "out").exists()


def test_a_picture_that_cannot_be_written_costs_a_warning_and_no_result(
    trained, voc_tree, tmp_path
):
    (tmp_path / "detections.png").mkdir()
    with pytest.warns(UserWarning, match=r"detections\.png is not drawn: .* cannot be written"):
        train(
            voc_tree, tmp_path, "--eval-only", MODEL__WEIGHTS=trained[0] / "model_final.pth",
            MODEL__BACKBONE__NORM="BN", SOLVER__AMP__ENABLED=True,
        )  # fmt: skip
    assert results(tmp_path) == of_model(trained[0])


def test_the_challenges_files_evaluate_to_the_same_mean(trained, voc_tree, tmp_path):
    run_here(
        "evaluate", "--root", voc_tree, "--split", "test", "--json", tmp_path / "r.json",
        "--detections", trained[0] / "detections",
    )  # fmt: skip
    again = json.loads((tmp_path / "r.json").read_text())
    for rule in ("voc_07", "voc_area"):
        assert again[rule]["mAP"] == pytest.approx(results(trained[0])[rule]["mAP"], abs=1e-6)


@pytest.fixture(scope="module")
def plain_step(tmp_path_factory, voc_tree):
    """One step of the whole batch, without TrAct."""
    output = tmp_path_factory.mktemp("plain")
    train(voc_tree, output, SOLVER__MAX_ITER=1)
    return output


@pytest.fixture(scope="module")
def tract_step(tmp_path_factory, voc_tree):
    """The same step with TrAct."""
    output = tmp_path_factory.mktemp("tract")
    train(voc_tree, output, SOLVER__MAX_ITER=1, MODEL__TRACT__ENABLED=True)
    return output


def test_tract_changes_the_first_update_of_the_stem_alone(plain_step, tract_step):
    plain, tract = weights(plain_step), weights(tract_step)
    differ = [key for key in plain if not torch.equal(plain[key], tract[key])]
    assert differ == ["backbone.body.conv1.weight"]


def test_micro_batches_make_the_same_update(tract_step, voc_tree, tmp_path):
    train(
        voc_tree, tmp_path, SOLVER__MAX_ITER=1, MODEL__TRACT__ENABLED=True, SOLVER__ACCUMULATION=2
    )
    assert_close(tmp_path, tract_step)


def test_interrupted_and_resumed_is_uninterrupted(voc_tree, tmp_path):
    """SIGTERM in the middle of a log period; the worker process draws augmentations as well."""
    changes = {
        "SOLVER__MAX_ITER": 8, "LOG_PERIOD": 3, "DATALOADER__NUM_WORKERS": 1,
        "INPUT__COLOR_JITTER": 0.3, "MODEL__EMA__ENABLED": True, "MODEL__EMA__DECAY": 0.8,
        "MODEL__BACKBONE__NORM": "BN",
    }  # fmt: skip
    train(voc_tree, tmp_path / "whole", **changes)
    output = tmp_path / "parts"
    arguments = tiny_options(voc_tree, output, **changes)
    printed, code = interrupt(TOOL, *arguments, at="step 3/8", number=signal.SIGTERM)
    assert code == 128 + signal.SIGTERM, printed
    stopped = int(printed.split("stopped after step ")[1].split(":")[0])
    assert 3 <= stopped < 8
    assert not (output / "model_final.pth").exists()
    train(voc_tree, output, "--resume", **changes)
    assert log(output) == log(tmp_path / "whole")
    assert_same_bits(output, tmp_path / "whole", ["model_final.pth", "model_final_ema.pth"])


@pytest.mark.parametrize(
    ("flags", "changes", "message"),
    [
        (["--resume"], {}, "--resume: there is no checkpoint in .*out"),
        (["--eval-only"], {}, "--eval-only: set MODEL.WEIGHTS"),
        (["--eval-only"], {"MODEL__WEIGHTS": "no.pth"}, "MODEL.WEIGHTS no.pth is not a file"),
        ([], {"DATASETS__TRAIN": "trian"}, r"trian"),
        ([], {"DATASETS__ROOT": "/nowhere"}, "/nowhere"),
        ([], {"DATASETS__CLASSES": "[disc]"}, r"\.xml: class .box"),
        ([], {"DATASETS__TRAIN": "voc_2007_trainval"}, "VOC2007"),
        ([], {"SOLVER__ACCUMULATION": 3}, "SOLVER.IMS_PER_BATCH 4 does not divide"),
        ([], {"MODEL__BACKBONE__NORM": "SyncBN"}, "SyncBN needs CUDA"),
        ([], {"MODEL__DEVICE": "cuda"}, "MODEL.DEVICE is cuda"),
    ],
    ids=lambda value: next(iter(value.values()), None) if isinstance(value, dict) else None,
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="messages for a machine without CUDA")
def test_what_cannot_work_is_refused_before_anything_is_written(
    voc_tree, tmp_path, flags, changes, message
):
    with pytest.raises(UserError, match=message):
        call("train", [*flags, *tiny_options(voc_tree, tmp_path / "out", **changes)])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [(), ("--eval-only",)])
def test_data_are_checked_before_weights_are_downloaded(tmp_path, monkeypatch, flags):
    def download(*args, **kwargs):
        raise AssertionError("downloaded before the data were checked")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", download)
    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", download)
    options = tiny_options(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(UserError, match="nowhere"):
        call("train", [*flags, *options, "MODEL.WEIGHTS", "ResNet18_Weights.IMAGENET1K_V1"])


@pytest.mark.parametrize(
    ("pairs", "weights", "strict", "stages"),
    [
        ([], None, False, 0),
        ([], {}, False, 2),
        (["MODEL.TRACT.ENABLED", "True"], {}, False, 0),
        (["MODEL.BACKBONE.FREEZE_AT", "1"], {}, False, 1),
        (["MODEL.BACKBONE.FREEZE_AT", "1"], None, False, 1),
        (["MODEL.BACKBONE.FREEZE_AT", "1"], {"freeze_at": 3}, True, 3),
    ],
)
def test_stages_are_frozen_as_asked_or_by_default_where_weights_are_and_tract_is_not(
    pairs, weights, strict, stages
):
    cfg = load_cfg("PascalVOC-Detection/faster_rcnn_R_50_FPN.yaml", pairs)
    cfg.defrost()
    if "MODEL.BACKBONE.FREEZE_AT" not in pairs:
        cfg.MODEL.BACKBONE.FREEZE_AT = -1
    weights = None if weights is None else Weights("made up", {}, weights)
    assert freeze_at(cfg, weights, strict=strict, default=2) == stages


def test_a_users_error_is_one_line_and_exit_code_1(voc_tree, tmp_path):
    done = run_python(TOOL, *tiny_options(voc_tree, tmp_path / "out", SOLVER__MAX_ITERS=3))
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "error: unknown key 'SOLVER.MAX_ITERS': did you mean 'SOLVER.MAX_ITER'?"
    )
    assert "Traceback" not in done.stderr


def test_an_unreadable_image_is_one_line_that_names_it_also_from_a_worker(tmp_path):
    root = write_voc_tree(tmp_path / "tree", train=4)
    (root / "JPEGImages/a001.png").write_bytes(b"broken")
    done = run_python(TOOL, *tiny_options(root, tmp_path / "out", DATALOADER__NUM_WORKERS=1))
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "a001.png" in last


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_images(voc_tree, tmp_path):
    with pytest.raises(UserError, match=r"the loss is not finite at step .* images: a0"):
        call("train", tiny_options(voc_tree, tmp_path / "out", SOLVER__BASE_LR=1e30))
    assert not (tmp_path / "out/model_final.pth").exists()


@pytest.mark.parametrize("period", ["SOLVER__CHECKPOINT_PERIOD", "TEST__EVAL_PERIOD"])
def test_a_run_that_diverged_between_two_lines_of_the_log_leaves_no_weights(
    voc_tree, tmp_path, period
):
    changes = {"SOLVER__BASE_LR": 1e30, "SOLVER__MAX_ITER": 9, "LOG_PERIOD": 9, period: 4}
    with pytest.raises(DivergedError, match=r"the loss is not finite at step [234]: .* images: a0"):
        call("train", tiny_options(voc_tree, tmp_path, **changes))
    names = {path.name for path in tmp_path.iterdir()}
    assert not names & {"last_checkpoint", "checkpoints", "model_best.pth", "model_final.pth"}
    replay = json.loads((tmp_path / "diverged_rank_0.json").read_text())
    assert list(log(tmp_path)) == list(range(1, replay["step"])) and len(replay["images"]) > 0


def test_a_pointer_to_a_checkpoint_that_is_not_there_is_no_checkpoint(voc_tree, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "last_checkpoint").write_text("iter_0000009\n")
    with pytest.raises(UserError, match="--resume: there is no checkpoint"):
        call("train", ["--resume", *tiny_options(voc_tree, output)])


@pytest.mark.slow
def test_the_tool_and_the_console_command_train_alike(voc_tree, tmp_path):
    """A checkout's tool, the console command, and both launchers with the installed package."""
    changes = {"SOLVER__MAX_ITER": 1, "MODEL__TRACT__ENABLED": True}
    run_apart(TOOL, *tiny_options(voc_tree, tmp_path / "tool", **changes))
    options = tiny_options(voc_tree, tmp_path / "module", **changes)
    done = run_python("-m", "tract_det.cli", "train", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_bits(tmp_path / "tool", tmp_path / "module")


@pytest.mark.slow
@pytest.mark.parametrize("mebibytes", [0, 1])
def test_a_full_disk_ends_a_run_in_one_line(voc_tree, tmp_path, mebibytes):
    """A limit on the size of files stands for the disk: metrics fit into it, checkpoints do not."""
    arguments = tiny_options(voc_tree, tmp_path / "run", SOLVER__CHECKPOINT_PERIOD=2)
    program = (
        "import resource, sys\n"
        "from tract_det.cli import main\n"
        "limit, *sys.argv[1:] = sys.argv[1:]\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))\n"
        "main()\n"
    )
    limit = mebibytes * 2**20 + 100
    failed = run_python("-c", program, limit, "train", *arguments)
    assert failed.returncode == 1
    (line,) = (line for line in failed.stderr.splitlines() if line.startswith("error: "))
    assert "cannot be written" in line and "Traceback" not in failed.stderr
