"""The trainer through its command line and the real launcher."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.conftest import REPO, run_python, tiny_options, write_voc_tree
from tract_det.engine.checkpoint import save_weights
from tract_det.errors import UserError
from tract_det.modeling.classifiers import build_classifier

TOOL = REPO / "tools/train_net.py"
LAUNCHERS = {
    "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_gpus", 2, "--master_port"],
    "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port"],
}


def train(root, output, *flags, launcher=None, env=None, **changes):
    """One process, or two of a launcher."""
    launch = [*LAUNCHERS[launcher], port()] if launcher else []
    done = run_python(*launch, TOOL, *flags, *tiny_options(root, output, **changes), env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def weights(output, name="model_final.pth"):
    return torch.load(output / name, weights_only=True)["model"]


def losses(output):
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["iteration"]: line["loss"] for line in lines if "loss" in line}


def results(output):
    return json.loads((output / "results.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory, voc_tree):
    """A run with TrAct, BatchNorm, a worker process, bf16 and a best checkpoint."""
    output = tmp_path_factory.mktemp("trained") / "out"
    done = train(
        voc_tree, output, MODEL__TRACT__ENABLED=True, MODEL__BACKBONE__NORM="BN",
        SOLVER__AMP__ENABLED=True, SOLVER__CLIP_GRADIENTS__ENABLED=True, DATALOADER__NUM_WORKERS=1,
        MODEL__BACKBONE__FREEZE_AT=0, TEST__EVAL_PERIOD=2,
    )  # fmt: skip
    return output, done


def test_a_run_leaves_results_weights_detections_and_a_picture(trained):
    output, done = trained
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
    for name in ("model_final.pth", "model_best.pth", "config.yaml", "last_checkpoint"):
        assert (output / name).is_file()
    assert list(output.glob("events.out.tfevents*"))
    assert sorted(losses(output)) == [1, 2, 3, 4]
    assert all(math.isfinite(value) for value in losses(output).values())
    assert not list(output.rglob(".*")), "a temporary file stayed"
    assert "TrAct on 'backbone.body.conv1', lambda 0.1 of standardised pixels" in done.stdout
    assert "images/s, peak memory" in done.stdout


def test_the_weights_are_fp32_and_know_their_classes_and_pixels(trained):
    content = torch.load(trained[0] / "model_final.pth", weights_only=True)
    assert content["meta"]["class_names"] == ["box", "disc"]
    assert content["meta"]["pixel_std"] == pytest.approx([58.395, 57.12, 57.375])
    assert all(v.dtype == torch.float32 for v in content["model"].values() if v.is_floating_point())


def test_a_training_from_a_classifier_lists_all_that_it_took_and_left(voc_tree, tmp_path):
    classifier = build_classifier("resnet18", 5)
    statistics = {"pixel_mean": [124.0, 116.0, 104.0], "pixel_std": [58.0, 57.0, 57.0]}
    save_weights(tmp_path / "classifier.pth", classifier, statistics)
    done = train(
        voc_tree, tmp_path / "out", MODEL__WEIGHTS=tmp_path / "classifier.pth", SOLVER__MAX_ITER=1,
        MODEL__BACKBONE__NORM="FrozenBN",
    )  # fmt: skip
    assert f"all names in {tmp_path / 'out/weights_report.json'}" in done.stdout
    report = json.loads((tmp_path / "out/weights_report.json").read_text())
    assert report["source"] == str(tmp_path / "classifier.pth")
    own = {key for key in classifier.state_dict() if not key.startswith("fc.")}
    counted = {key for key in own if "num_batches" not in key}
    assert set(report["used"]) == {f"backbone.body.{key}" for key in counted}
    assert report["left"] == ["backbone.body.fc.weight", "backbone.body.fc.bias"]
    saved = {key for key in weights(tmp_path / "out") if "num_batches" not in key}
    assert {*report["used"], *report["random"]} == saved and len(report["random"]) > 6


def test_evaluating_the_saved_weights_gives_the_same_bits(trained, voc_tree, tmp_path):
    train(
        voc_tree, tmp_path, "--eval-only", MODEL__WEIGHTS=trained[0] / "model_final.pth",
        MODEL__BACKBONE__NORM="BN", SOLVER__AMP__ENABLED=True,
    )  # fmt: skip
    assert results(tmp_path) == results(trained[0])
    for file in (trained[0] / "detections").iterdir():
        assert (tmp_path / "detections" / file.name).read_bytes() == file.read_bytes()


def test_the_challenges_files_evaluate_to_the_same_mean(trained, voc_tree, tmp_path):
    done = run_python(
        REPO / "tools/evaluate_voc.py", "--root", voc_tree, "--split", "test",
        "--detections", trained[0] / "detections", "--json", tmp_path / "r.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "r.json").read_text())
    assert again["voc_07"]["mAP"] == pytest.approx(results(trained[0])["voc_07"]["mAP"], abs=1e-6)
    assert again["voc_area"]["mAP"] == pytest.approx(results(trained[0])["voc_area"]["mAP"], abs=1e-6)  # fmt: skip  # noqa: E501


# The same step, whatever the processes: exact sums but for their order.
@pytest.fixture(scope="module")
def one_step(tmp_path_factory, voc_tree):
    """One process and the whole batch, without and with TrAct."""
    folders = {}
    for tract in (False, True):
        folders[tract] = tmp_path_factory.mktemp("one_step")
        train(voc_tree, folders[tract], SOLVER__MAX_ITER=1, MODEL__TRACT__ENABLED=tract)
    return folders


@pytest.mark.parametrize(
    ("launcher", "tract", "changes"),
    [
        ("deepspeed", False, {}),
        ("deepspeed", True, {"DEEPSPEED__zero_optimization__stage": 1}),
        ("deepspeed", True, {"DEEPSPEED__zero_optimization__stage": 2}),
        (None, True, {"SOLVER__ACCUMULATION": 2}),
        ("torchrun", True, {"SOLVER__ACCUMULATION": 2, "DATALOADER__NUM_WORKERS": 1}),
    ],
    ids=["plain", "zero1", "zero2", "accumulation", "torchrun-accumulation"],
)
def test_ranks_and_micro_batches_make_the_same_update(
    one_step, voc_tree, tmp_path, launcher, tract, changes
):
    train(
        voc_tree, tmp_path, SOLVER__MAX_ITER=1, launcher=launcher, MODEL__TRACT__ENABLED=tract,
        **changes,
    )  # fmt: skip
    expected = weights(one_step[tract])
    for key, value in weights(tmp_path).items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-5)
    assert losses(tmp_path)[1] == pytest.approx(losses(one_step[tract])[1], rel=1e-5)


def test_tract_changes_the_first_update_of_the_stem_alone(one_step):
    plain, ours = weights(one_step[False]), weights(one_step[True])
    differ = [key for key in plain if not torch.equal(plain[key], ours[key])]
    assert differ == ["backbone.body.conv1.weight"]


def test_two_ranks_evaluate_what_one_does_to_the_last_bit(one_step, voc_tree, tmp_path):
    model = one_step[False] / "model_final.pth"
    train(voc_tree, tmp_path, "--eval-only", launcher="deepspeed", MODEL__WEIGHTS=model)
    assert results(tmp_path) == results(one_step[False])


def test_interrupted_and_resumed_is_uninterrupted(voc_tree, tmp_path):
    """SIGTERM in the middle of a log period; the worker process draws augmentations as well."""
    changes = {"SOLVER__MAX_ITER": 8, "LOG_PERIOD": 3, "DATALOADER__NUM_WORKERS": 1, "INPUT__COLOR_JITTER": 0.3}  # fmt: skip  # noqa: E501
    train(voc_tree, tmp_path / "whole", **changes)
    output = tmp_path / "parts"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    process = subprocess.Popen(
        [sys.executable, str(TOOL), *tiny_options(voc_tree, output, **changes)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=REPO,
    )  # fmt: skip
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith("step 3/8"):
            process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM, said
    stopped = int(said.split("stopped after step ")[1].split(":")[0])
    assert 3 <= stopped < 8
    assert not (output / "model_final.pth").exists()
    train(voc_tree, output, "--resume", **changes)
    assert losses(output) == losses(tmp_path / "whole")
    whole = weights(tmp_path / "whole")
    assert all(torch.equal(value, whole[key]) for key, value in weights(output).items())


@pytest.fixture(scope="module")
def fail(train_net, voc_tree):
    """Calls the tool in this process; what it refuses is refused before DeepSpeed starts."""

    def call(tmp_path, *flags, root=voc_tree, **changes):
        train_net.main([*flags, *tiny_options(root, tmp_path / "out", **changes)])

    return call


@pytest.mark.parametrize(
    ("flags", "changes", "message"),
    [
        (["--resume"], {}, "--resume: there is no checkpoint in .*out"),
        (["--eval-only"], {}, "--eval-only: set MODEL.WEIGHTS"),
        (["--eval-only"], {"MODEL__WEIGHTS": "no.pth"}, "MODEL.WEIGHTS no.pth is no file"),
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
def test_what_cannot_work_is_refused_before_anything_is_written(fail, tmp_path, flags, changes, message):  # fmt: skip  # noqa: E501
    with pytest.raises(UserError, match=message):
        fail(tmp_path, *flags, **changes)
    assert not (tmp_path / "out").exists()


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
    done = run_python(TOOL, *tiny_options(voc_tree, tmp_path / "out", SOLVER__BASE_LR=1e30))
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "the loss is not finite at step" in last and "images: a0" in last
    assert not (tmp_path / "out/model_final.pth").exists()


def test_an_unwritable_checkpoint_is_not_mistaken_for_one(trained, voc_tree, tmp_path, fail):
    output = tmp_path / "out"
    output.mkdir()
    (output / "last_checkpoint").write_text("iter_0000009\n")  # names what is not there
    with pytest.raises(UserError, match="--resume: there is no checkpoint"):
        fail(tmp_path, "--resume")


def test_help_shows_the_commands():
    done = run_python(TOOL, "--help")
    assert done.returncode == 0 and "--eval-only" in done.stdout and "--resume" in done.stdout


def test_a_config_is_found_from_another_folder(train_net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "configs/BCCD-Detection/faster_rcnn_R_18_FPN.yaml"
    assert train_net.find_config(name) == REPO / name
    assert train_net.find_config("nowhere.yaml") == Path("nowhere.yaml")
