"""Each different recipe and model of the paper takes two steps on tiny made data."""

import gc
import math

import pytest
import torch

from tests.test_configs import RECIPES
from tests.training.image_folder import write_image_folder
from tests.training.runs import log, run_here, weights
from tract_det import find_stem, tract_diagnostics
from tract_det.config import arms
from tract_det.config.classification import load_cfg as classification_cfg
from tract_det.config.detection import load_cfg as detection_cfg
from tract_det.config.paper import read_rows
from tract_det.engine import ds
from tract_det.engine.loop import StopSignal, train
from tract_det.training import assembly, classification, classifiers, session
from tract_det.training.detectors import build_detector

pytestmark = pytest.mark.slow


def runs():
    """Every recipe file, and each row of the paper whose model or recipe is another one."""
    for path in RECIPES:
        yield pytest.param(classification_cfg(path, arm="tract"), id=path.stem)
    seen = set()
    for row in read_rows().values():
        if row.verb == "train" or row.not_carried:
            continue
        cfg = classification_cfg(row.config, row.arguments()[4:], row.arm)
        key = shortened(cfg.clone()).dump()
        if (row.arm == "tract" and key not in seen) or cfg.MODEL.PATCH_NORM:
            seen.add(key)
            yield pytest.param(cfg, id=row.name)


def shortened(cfg):
    """Without what two steps do not show: lengths, rates, lambda, data, where weights come from."""
    cfg.defrost()
    cfg.DATASETS.NAME, cfg.DATASETS.ROOT, cfg.DATALOADER.NUM_WORKERS = "imagefolder", "", 0
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE, cfg.OUTPUT_DIR = "", "cpu", ""
    cfg.MODEL.TRACT.LAMBDA = 0.1
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.EPOCHS = 2, 2, 1.0
    cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_EPOCHS, cfg.SOLVER.BASE_LR = [], 0.0, 1e-3
    return cfg


@pytest.fixture(scope="module")
def take(tmp_path_factory):
    """Two steps by a recipe; recipes that differ in their length alone share them."""
    ds.start("cpu")
    folder = write_image_folder(tmp_path_factory.mktemp("images"), train=2, val=4, size=40)
    known = {}

    def two_steps(cfg):
        cfg = shortened(cfg)
        cfg.DATASETS.ROOT = str(folder)
        key = cfg.dump()
        if key not in known:
            known[key] = _two_steps(cfg)
            gc.collect()
        return known[key]

    return two_steps


def _two_steps(cfg):
    """The losses, the parameters that have moved, the stem's name, and what TrAct did."""
    split, _ = classification.read_data(cfg)
    torch.manual_seed(0)
    built = classifiers.build_classifier(cfg, None, split.class_names, False)
    assembly.put_tract(cfg, built.model, built.input_variance)
    before = {name: p.detach().clone() for name, p in built.model.named_parameters()}
    engine, _ = session.prepare(cfg, built, torch.device("cpu"))
    steps = []
    with StopSignal() as stop:
        train(
            engine, classification.build_loader(cfg, split, built.meta, 0), start=0, max_iter=2,
            accumulation=cfg.SOLVER.ACCUMULATION, after_step=steps.append, stop=stop,
            lr_at=assembly.build_schedule(cfg, classification.make_plan(cfg, len(split))),
        )  # fmt: skip
    after = dict(built.model.named_parameters())
    moved = {name for name, p in before.items() if not torch.equal(after[name].detach(), p)}
    stem = f"{find_stem(built.model)}.weight" if cfg.MODEL.PATCH_NORM == "" else ""
    return [step.losses["loss"] for step in steps], moved, stem, tract_diagnostics(built.network)


@pytest.mark.parametrize("cfg", [*runs()])
def test_a_recipe_builds_its_model_and_optimizer_and_takes_two_steps(cfg, take):
    losses, moved, stem, diagnostics = take(cfg.clone())
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    assert len(moved) > 1 and stem in {*moved, ""}
    assert bool(diagnostics) == cfg.MODEL.TRACT.ENABLED


VIT = ["MODEL.NAME", "timm:vit_tiny_patch16_224", "MODEL.WIDTH", "64"]


@pytest.mark.parametrize("arm", [*arms.names(), "tract+muon", "tract+strong", "tract+whitened"])
@pytest.mark.parametrize("model", ["resnet10", "vit"])
def test_every_arm_takes_two_steps_with_a_classifier(model, arm, tmp_path):
    root = write_image_folder(tmp_path / "images", train=8, val=4)
    if model == "resnet10" and "patch_norm" in arm:
        pytest.skip("for ViTs")
    pairs = ["DATASETS.ROOT", root, "OUTPUT_DIR", tmp_path / "out", "SOLVER.MAX_ITER", "2"]
    small = ["SOLVER.IMS_PER_BATCH", "8", "DATALOADER.NUM_WORKERS", "0", "LOG_PERIOD", "1"]
    names = VIT if model == "vit" else []
    run_here("pretrain", "--arm", arm, *pairs, *small, *names)
    assert all(math.isfinite(loss) for loss in log(tmp_path / "out").values())


@pytest.mark.parametrize(
    ("backbone", "arm"),
    [
        *(("resnet18_fpn", arm) for arm in ("early", "muon", "sigma_p", "whitened", "tract+muon")),
        ("vgg16", "whitened_frozen"),  # Muon takes minutes for its fc6 on a CPU
    ],
)
def test_every_arm_for_detectors_takes_two_steps(backbone, arm, voc_tree, tmp_path):
    """From random weights on images of 64 pixels."""
    pairs = [
        "MODEL.BACKBONE.NAME", backbone, "DATASETS.ROOT", voc_tree, "DATASETS.TRAIN", "train",
        "DATASETS.TEST", "test", "DATALOADER.NUM_WORKERS", 0, "INPUT.MIN_SIZE_TRAIN", "[64]",
        "INPUT.MIN_SIZE_TEST", 64, "SOLVER.MAX_ITER", 2, "LOG_PERIOD", 1, "OUTPUT_DIR", tmp_path,
    ]  # fmt: skip
    run_here("train", "--arm", arm, *pairs)
    assert all(math.isfinite(loss) for loss in log(tmp_path).values())


@pytest.mark.parametrize("arm", ["frozen", "plain", "tract"])
def test_the_detectors_of_the_paper_take_two_steps_and_only_the_frozen_stem_stays(
    arm, voc_tree, tmp_path
):
    """From random weights on images of 64 pixels."""
    row = read_rows()[f"voc2007/vgg16/{arm}"]
    changes = {
        "MODEL.WEIGHTS": "", "DATASETS.ROOT": voc_tree, "DATASETS.TRAIN": "train",
        "DATASETS.TEST": "test", "DATALOADER.NUM_WORKERS": 0, "INPUT.MIN_SIZE_TRAIN": "[64]",
        "INPUT.MIN_SIZE_TEST": 64, "SOLVER.MAX_ITER": 2, "SOLVER.WARMUP_ITERS": 0,
        "TEST.EVAL_PERIOD": 0, "LOG_PERIOD": 1, "OUTPUT_DIR": tmp_path,
    }  # fmt: skip
    run_here("train", *row.arguments(), *(part for pair in changes.items() for part in pair))
    assert all(math.isfinite(loss) for loss in log(tmp_path).values())
    torch.manual_seed(0)
    stem = weights(tmp_path)["backbone.features.0.weight"]
    cfg = detection_cfg(row.config, ["MODEL.WEIGHTS", ""], arm)
    start = build_detector(cfg, None, ("box", "disc"), False).network
    assert torch.equal(stem, start.backbone.features[0].weight) == (arm == "frozen")
