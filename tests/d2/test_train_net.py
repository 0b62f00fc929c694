"""This project's trainer on a detectron2 model, through its command line and the real launcher."""

import re
import signal

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from tests.conftest import REPO, run_python
from tests.training.runs import (
    LAUNCHERS,
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
from tract_det.d2 import add_tract_config, config_file
from tract_det.errors import DivergedError, UserError
from tract_det.training.detectors import build_detector

TOOL = REPO / "tools/train_net.py"
CONFIG = "configs/detectron2/faster_rcnn_R_18_FPN.yaml"
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


def options(root, output, *flags, **changes):
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    options = {"MODEL.DETECTRON2.OPTS": MODEL, "OUTPUT_DIR": output, **CHANGES, **changes}
    options["DATASETS.ROOT"] = root
    pairs = [str(part) for pair in options.items() for part in pair]
    return "--config-file", CONFIG, "--arm", "tract", *flags, *pairs


def run(root, output, *flags, **changes):
    return run_here("train", *options(root, output, *flags, **changes))


@pytest.fixture(scope="module")
def trained(voc_tree, tmp_path_factory):
    output = tmp_path_factory.mktemp("d2") / "out"
    return output, run(voc_tree, output)


def test_a_run_leaves_the_files_of_every_run(trained):
    output, printed = trained
    assert "TrAct on 'backbone.bottom_up.stem.conv1'" in printed
    assert results(output)["images"] == 5 and set(log(output)) == {1, 2, 3, 4}
    for name in ("model_final.pth", "results.json", "detections.png", "metrics.jsonl"):
        assert (output / name).is_file()
    meta = torch.load(output / "model_final.pth", weights_only=True)["meta"]
    assert meta["format"] == "RGB" and meta["stride_in_1x1"] is None  # no bottlenecks


def test_other_pixel_statistics_than_the_models_are_refused_without_weights_too():
    cfg = load_cfg(REPO / CONFIG, ["MODEL.PIXEL_MEAN", "[1, 2, 3]", "MODEL.PIXEL_STD", "[1, 1, 1]"])
    with pytest.raises(UserError, match=r"PIXEL_STD are other .*: set MODEL\.PIXEL_MEAN \[1"):
        build_detector(cfg, None, ("a", "b"), False)


def test_eval_only_gives_the_same_results_to_the_last_bit(trained, voc_tree, tmp_path):
    output, _ = trained
    run(voc_tree, tmp_path, "--eval-only", MODEL__WEIGHTS=output / "model_final.pth")
    assert results(tmp_path) == results(output)


def test_detectron2_reads_our_weights_and_we_read_detectron2s(trained, voc_tree, tmp_path):
    """model_final.pth has the model's own keys; --eval-only takes DetectionCheckpointer's file."""
    output, _ = trained
    cfg = get_cfg()
    add_tract_config(cfg)
    cfg.merge_from_file(config_file("BCCD-Detection/faster_rcnn_R_18_FPN.yaml"))
    cfg.merge_from_list([*MODEL, "MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.NUM_CLASSES", 2])
    model = build_model(cfg)
    checkpointer = DetectionCheckpointer(model, str(tmp_path))
    checkpointer.load(str(output / "model_final.pth"))
    final = weights(output)
    assert all(torch.equal(tensor, final[key]) for key, tensor in model.state_dict().items())
    checkpointer.save("detectron2")
    evaluated = tmp_path / "evaluated"
    run(voc_tree, evaluated, "--eval-only", MODEL__WEIGHTS=tmp_path / "detectron2.pth",
        DATASETS__CLASSES="[box, disc]")  # fmt: skip
    assert results(evaluated) == results(output)


def test_a_training_that_diverges_is_one_line_with_its_step_and_images(voc_tree, tmp_path):
    arguments = options(
        voc_tree, tmp_path, SOLVER__BASE_LR=1e12, SOLVER__CLIP_GRADIENTS__ENABLED=False
    )
    process = run_python(TOOL, *arguments)
    assert process.returncode == DivergedError.exit_code, process.stderr[-2000:]
    last = process.stderr.splitlines()[-1]
    assert re.match(
        r"error: the loss is not finite at step [2-4]: .*; images: .*; lower SOLVER", last
    )
    assert "Traceback" not in process.stderr


def test_an_interrupted_run_continues_as_if_it_had_not_stopped(trained, voc_tree, tmp_path):
    """detectron2 samples anchors and proposals with torch's generator, which a checkpoint saves."""
    output, _ = trained
    _, code = interrupt(TOOL, *options(voc_tree, tmp_path), at="step 1/4", number=signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    run(voc_tree, tmp_path, "--resume")
    assert log(tmp_path) == log(output)
    assert_same_bits(tmp_path, output)


def test_weights_of_a_detectron2_model_are_refused_in_torchvisions(trained, voc_tree, tmp_path):
    output, _ = trained
    with pytest.raises(UserError, match=r"is a detectron2 model's: set MODEL\.DETECTRON2"):
        call("train", [
            "--config-file", "BCCD-Detection/faster_rcnn_R_18_FPN.yaml",
            *("DATASETS.ROOT", str(voc_tree), "DATASETS.TRAIN", "train", "DATASETS.TEST", "test"),
            *("DATASETS.CLASSES", "[]", "OUTPUT_DIR", str(tmp_path)),
            *("MODEL.WEIGHTS", str(output / "model_final.pth")),
        ])  # fmt: skip


def test_keys_of_torchvisions_model_are_refused(voc_tree, tmp_path):
    with pytest.raises(UserError, match=r"MODEL\.RPN describes torchvision's model"):
        run(voc_tree, tmp_path, MODEL__RPN__NMS_THRESH=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_ranks_train_and_evaluate_each_image_once(launcher, voc_tree, tmp_path):
    arguments = options(voc_tree, tmp_path, DEEPSPEED__zero_optimization__stage=1)
    run_apart(TOOL, *arguments, launcher=launcher)
    figures = results(tmp_path)
    assert figures["images"] == 5
    evaluated = tmp_path / "evaluated"
    run(voc_tree, evaluated, "--eval-only", MODEL__WEIGHTS=tmp_path / "model_final.pth")
    assert results(evaluated) == figures


@pytest.mark.slow
def test_the_benchmark_takes_turns_with_detectron2s_plain_loop(voc_tree, tmp_path):
    changes = {"SOLVER__OPTIMIZER": "SGD", "INPUT__COLOR_JITTER": 0.0}
    flag, config, *pairs = options(voc_tree, tmp_path, **changes)
    length = ("--rounds", 1, "--steps", 1)
    printed = run_apart("benchmarks/train.py", flag, config, *length, *pairs)
    assert float(printed.splitlines()[-1].removeprefix("ratio ")) > 0
