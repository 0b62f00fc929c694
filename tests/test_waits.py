"""A whole training step, as the trainers make it, does not wait for the device.

Counted on a CPU. What a test counts is first seen to be counted, in torchvision's own detector.
"""

from collections import Counter
from itertools import islice, pairwise

import pytest
import torch
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator

from tests.conftest import tiny_options, write_voc_tree
from tests.counts import Waits
from tests.training.image_folder import options, write_image_folder
from tract_det.config import classification as classification_config
from tract_det.config import detection as detection_config
from tract_det.engine import ds
from tract_det.engine.loop import StopSignal, train
from tract_det.training import assembly, classification, detection, session

IMAGES = 8  # of a step


def steps(task, load_cfg, config_file, arguments):
    """What each of three steps waits for: with log, moving average and all; none is logged."""
    cfg = load_cfg(config_file, [*arguments, "SOLVER.MAX_ITER", "4", "LOG_PERIOD", "4"])
    device = ds.start("cpu")
    training, test = task.read_data(cfg)
    torch.manual_seed(0)
    built = session.build(task, cfg, training, None)
    engine, ema = session.prepare(cfg, built, device)
    plan = task.plan(cfg, len(training))
    evaluation = task.evaluation(cfg, test, built.meta, device)
    this_run = session.build_run(task, cfg, plan, built, engine, ema, evaluation, training)
    this_run.start(None)
    loader = task.loader(cfg, training, built.meta, 0)
    batches = list(islice(loader, 3 * cfg.SOLVER.ACCUMULATION))  # what readers do does not count
    found = [Counter()]

    def after_step(step):
        this_run.after_step(step)
        found.append(Counter(waits.counts))

    lambda_at = assembly.build_lambda(cfg, built.input_variance, plan.max_iter)
    with StopSignal() as stop, Waits() as waits:
        train(
            engine, batches, start=0, max_iter=3,
            accumulation=cfg.SOLVER.ACCUMULATION, lr_at=assembly.build_schedule(cfg, plan),
            after_step=after_step, stop=stop,
            before_step=assembly.lambda_hook(engine.module, lambda_at),
            memory_format=built.memory_format,
        )  # fmt: skip
    this_run.writers.close()
    ds.stop()
    return [after - before for before, after in pairwise(found)]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stage", [0, 2])
def test_a_classifiers_step_waits_for_nothing(accumulation, stage, tmp_path):
    root = write_image_folder(tmp_path / "images")
    arguments = options(
        root, tmp_path / "out", SOLVER__ACCUMULATION=accumulation, MODEL__EMA__ENABLED=True,
        SOLVER__CLIP_GRADIENTS__ENABLED=stage == 0, MODEL__NORM="BN", MODEL__TRACT__STOP_AT=2,
        DEEPSPEED__zero_optimization__stage=stage,
    )  # fmt: skip
    counts = steps(
        classification.TASK, classification_config.load_cfg, "CIFAR/cpu_small.yaml", arguments
    )
    assert counts == [Counter()] * 3


def torchvisions(images):
    """What torchvision's own detector of the same shape waits for in a step."""
    from tract_det.modeling.backbones import build_resnet_fpn

    anchors = AnchorGenerator(((16,), (32,), (48,), (64,), (96,)), ((0.5, 1.0, 2.0),) * 5)
    model = FasterRCNN(
        build_resnet_fpn("resnet18", "BN", 32), 3, min_size=96, rpn_anchor_generator=anchors,
        box_batch_size_per_image=32,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    batch = [torch.rand(3, 96, 96, generator=generator) for _ in range(images)]
    targets = [
        {
            "boxes": torch.tensor([[5.0, 8, 50, 60], [40, 30, 90, 80]]),
            "labels": torch.tensor([1, 2]),
        }
        for _ in range(images)
    ]
    model(batch, targets)  # the first pass finds the scales of the levels
    with Waits() as waits:
        sum(model(batch, targets).values()).backward()
    return waits.counts


def test_a_detectors_step_waits_no_more_than_torchvisions(tmp_path):
    root = write_voc_tree(tmp_path / "voc", train=IMAGES)
    arguments = tiny_options(
        root, tmp_path / "out", SOLVER__IMS_PER_BATCH=IMAGES, MODEL__TRACT__ENABLED=True,
        MODEL__RPN__POST_NMS_TOPK_TRAIN=2000, MODEL__BACKBONE__NORM="BN",
        SOLVER__CLIP_GRADIENTS__ENABLED=True,
    )  # fmt: skip
    counts = steps(detection.TASK, detection_config.load_cfg, "quickstart/shapes.yaml", arguments)
    limit = torchvisions(IMAGES)
    assert limit["read"] == 2 * IMAGES and limit["nonzero"] > 9 * IMAGES
    for step in counts[1:]:
        assert step["read"] == step["constant"] == 0
        assert step["transfer"] == 3
        assert step["nonzero"] <= limit["nonzero"] - 7 * IMAGES
