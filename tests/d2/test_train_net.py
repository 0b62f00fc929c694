"""This project's trainer on a detectron2 model, through its command line and the real launcher."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from tests.conftest import REPO, run_python
from tests.tools.test_train_net import LAUNCHERS, TOOL, losses, port, results, weights
from tract_det.config import load_cfg
from tract_det.d2 import add_tract_config, config_file
from tract_det.errors import UserError

CONFIG = "configs/detectron2/faster_rcnn_R_18_FPN_tract.yaml"
MODEL = [
    *("MODEL.FPN.OUT_CHANNELS", 16, "MODEL.ROI_BOX_HEAD.FC_DIM", 32),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", 40, "MODEL.RPN.POST_NMS_TOPK_TEST", 20),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),
]
CHANGES = {
    "DATASETS.CLASSES": [],
    "DATASETS.TRAIN": "train",
    "DATASETS.TEST": "test",
    "DATALOADER.NUM_WORKERS": 0,
    "INPUT.MIN_SIZE_TRAIN": [],
    "INPUT.MIN_SIZE_TEST": 0,
    "SOLVER.MAX_ITER": 4,
    "SOLVER.WARMUP_ITERS": 0,
    "TEST.EVAL_PERIOD": 0,
    "LOG_PERIOD": 1,
}


def command(root, output, *flags, **changes):
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    options = {"MODEL.DETECTRON2.OPTS": MODEL, "OUTPUT_DIR": output, **CHANGES, **changes}
    options["DATASETS.ROOT"] = root
    pairs = [str(part) for pair in options.items() for part in pair]
    return TOOL, "--config-file", CONFIG, *flags, *pairs


def run(root, output, *flags, launcher=None, fails=False, **changes):
    launch = [*LAUNCHERS[launcher], port()] if launcher else []
    done = run_python(*launch, *command(root, output, *flags, **changes))
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def trained(voc_tree, tmp_path_factory):
    output = tmp_path_factory.mktemp("d2") / "out"
    return output, run(voc_tree, output)


def test_a_run_leaves_what_every_run_leaves(trained):
    output, done = trained
    assert "TrAct on 'backbone.bottom_up.stem.conv1'" in done.stdout
    assert results(output)["images"] == 5 and set(losses(output)) == {1, 2, 3, 4}
    for name in ("model_final.pth", "results.json", "detections.png", "metrics.jsonl"):
        assert (output / name).is_file()
    meta = torch.load(output / "model_final.pth", weights_only=True)["meta"]
    assert meta["format"] == "RGB" and meta["stride_in_1x1"] is None  # no bottlenecks


def test_pixel_statistics_that_are_not_the_models_are_refused_without_weights_too(train_net):
    cfg = load_cfg(REPO / CONFIG, ["MODEL.PIXEL_MEAN", "[1, 2, 3]", "MODEL.PIXEL_STD", "[1, 1, 1]"])
    with pytest.raises(UserError, match=r"PIXEL_STD are other .*: set MODEL\.PIXEL_MEAN \[1"):
        train_net.build_model(cfg, None, ("a", "b"), strict=False)


def test_eval_only_finds_the_same_to_the_last_bit(trained, voc_tree, tmp_path):
    output, _ = trained
    run(voc_tree, tmp_path, "--eval-only", MODEL__WEIGHTS=output / "model_final.pth")
    assert results(tmp_path) == results(output)


def test_detectron2_reads_our_weights_and_we_read_detectron2s(trained, voc_tree, tmp_path):
    """model_final.pth has the model's own keys; a file of DetectionCheckpointer evaluates here."""
    output, _ = trained
    cfg = get_cfg()
    add_tract_config(cfg)
    cfg.merge_from_file(config_file("BCCD-Detection/faster_rcnn_R_18_FPN.yaml"))
    cfg.merge_from_list([*MODEL, "MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.NUM_CLASSES", 2])
    model = build_model(cfg)
    checkpointer = DetectionCheckpointer(model, str(tmp_path))
    checkpointer.load(str(output / "model_final.pth"))
    ours = weights(output)
    assert all(torch.equal(tensor, ours[key]) for key, tensor in model.state_dict().items())
    checkpointer.save("theirs")
    again = tmp_path / "again"
    run(voc_tree, again, "--eval-only", MODEL__WEIGHTS=tmp_path / "theirs.pth",
        DATASETS__CLASSES="[box, disc]")  # fmt: skip
    assert results(again) == results(output)


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(trained, voc_tree, tmp_path):
    """detectron2 samples anchors and proposals by torch's generator, which a checkpoint holds."""
    output, _ = trained
    process = subprocess.Popen(
        [sys.executable, *map(str, command(voc_tree, tmp_path))],
        stdout=subprocess.PIPE, text=True, cwd=REPO,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("step 1/4"):
            process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    run(voc_tree, tmp_path, "--resume")
    assert losses(tmp_path) == losses(output)
    whole = weights(output)
    assert all(torch.equal(tensor, whole[key]) for key, tensor in weights(tmp_path).items())


def test_weights_of_a_detectron2_model_are_told_from_torchvisions(trained, voc_tree, tmp_path):
    output, _ = trained
    quick = "configs/BCCD-Detection/faster_rcnn_R_18_FPN.yaml"
    done = run_python(
        TOOL, "--config-file", quick, "DATASETS.ROOT", voc_tree, "DATASETS.TRAIN", "train",
        "DATASETS.TEST", "test", "DATASETS.CLASSES", "[]", "OUTPUT_DIR", tmp_path,
        "MODEL.WEIGHTS", output / "model_final.pth",
    )  # fmt: skip
    assert done.returncode == 1 and "is a detectron2 model's: set MODEL.DETECTRON2" in done.stderr


def test_keys_of_torchvisions_model_are_refused(voc_tree, tmp_path):
    done = run(voc_tree, tmp_path, fails=True, MODEL__RPN__NMS_THRESH=0.5)
    assert "error: MODEL.RPN describes torchvision's model" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_ranks_train_and_evaluate_each_image_once(launcher, voc_tree, tmp_path):
    run(voc_tree, tmp_path, launcher=launcher, DEEPSPEED__zero_optimization__stage=1)
    found = results(tmp_path)
    assert found["images"] == 5
    again = tmp_path / "again"
    run(voc_tree, again, "--eval-only", MODEL__WEIGHTS=tmp_path / "model_final.pth")
    assert results(again) == found


def test_the_benchmark_takes_turns_with_detectron2s_plain_loop(voc_tree, tmp_path):
    _, *words = command(voc_tree, tmp_path, SOLVER__OPTIMIZER="SGD", INPUT__COLOR_JITTER=0.0)
    tool = "tools/benchmark_train.py"
    done = run_python(tool, *words[:2], "--rounds", 1, "--steps", 1, *words[2:])
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1].removeprefix("ratio ")) > 0
