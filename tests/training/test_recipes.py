"""Every recipe builds its model and optimizer, and takes two steps on tiny made data."""

import gc
import math
import re

import pytest
import torch

from tests.test_configs import RECIPES
from tests.training.image_folder import write_image_folder
from tract_det import find_stem, tract_diagnostics
from tract_det.config.classification import load_cfg
from tract_det.engine import ds
from tract_det.engine.loop import StopSignal, train
from tract_det.training import assembly, classification, session

pytestmark = pytest.mark.slow


def runs():
    """Every recipe with each model that it is for: those of the loop in its command."""
    for path in RECIPES:
        loop = re.search(r"^# for model in (.+); do$", path.read_text(), re.MULTILINE)
        for name in loop.group(1).split() if loop else [""]:
            yield pytest.param(path, name, id=f"{path.stem}-{name}" if name else path.stem)


@pytest.fixture(scope="module")
def take(tmp_path_factory):
    """Two steps by a recipe; recipes that differ in their length alone share them."""
    ds.start("cpu")
    folder = write_image_folder(tmp_path_factory.mktemp("images"), train=2, val=4, size=40)
    known = {}

    def two_steps(cfg):
        cfg.defrost()
        cfg.DATASETS.NAME, cfg.DATASETS.ROOT = "imagefolder", str(folder)
        cfg.DATALOADER.NUM_WORKERS = 0
        cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE, cfg.OUTPUT_DIR = "", "cpu", ""
        cfg.MODEL.TRACT.LAMBDA = 0.1
        cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.EPOCHS = 2, 2, 1.0
        cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_EPOCHS = [], 0.0
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
    built = classification.build_model(cfg, None, split.class_names, False)
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


@pytest.mark.parametrize(("path", "name"), [*runs()])
def test_a_recipe_builds_its_model_and_optimizer_and_takes_two_steps(path, name, take):
    cfg = load_cfg(path, ["MODEL.NAME", name] if name else [])
    losses, moved, stem, diagnostics = take(cfg)
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    assert len(moved) > 1 and stem in {*moved, ""}
    assert bool(diagnostics) == cfg.MODEL.TRACT.ENABLED
