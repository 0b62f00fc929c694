"""Every config in detectron2's format loads, builds, and has the recipe of its twin in configs/."""

import re
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from tests.conftest import REPO
from tract_det.config.detection import load_cfg
from tract_det.d2 import add_tract_config, config_file
from tract_det.errors import UserError
from tract_det.training.assembly import put_tract
from tract_det.training.detectors import build_detector

FOLDER = REPO / "configs/detectron2"
CONFIGS = sorted(FOLDER.glob("*-Detection/faster_rcnn_*.yaml"))
NAMES = [path.relative_to(FOLDER).as_posix() for path in CONFIGS]
ARMS = {"frozen": (2, False), "plain": (0, False), "tract": (0, True)}


def load(name, *overlays):
    cfg = get_cfg()
    add_tract_config(cfg)
    for file in (name, *overlays):
        cfg.merge_from_file(config_file(file))
    return cfg


def test_there_are_four_models_for_voc_and_one_for_bccd():
    models = {"VGG_16", "VGG_16_BN", "R_50_FPN", "R_50_C4", "R_18_FPN"}
    assert {path.stem for path in CONFIGS} == {f"faster_rcnn_{model}" for model in models}


@pytest.mark.parametrize("name", NAMES)
def test_the_program_in_a_configs_first_lines_works(name):
    header = Path(config_file(name)).read_text().splitlines()
    cfg = get_cfg()
    exec(
        header[1].removeprefix("#").strip(),
        {"cfg": cfg, "add_tract_config": add_tract_config, "config_file": config_file},
    )
    assert f"output/detectron2/{name.removesuffix('.yaml')}" == cfg.OUTPUT_DIR
    assert cfg.MODEL.TRACT.ENABLED and cfg.MODEL.BACKBONE.FREEZE_AT == 0
    gpus = int(re.search(r"--num-gpus (\d)", header[0])[1])
    assert cfg.SOLVER.IMS_PER_BATCH % gpus == 0


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("name", NAMES)
def test_an_arm_sets_its_keys_alone_and_the_config_builds_its_model(name, arm):
    cfg, before = load(name, f"arms/{arm}.yaml"), load(name)
    assert ARMS[arm] == (cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.TRACT.ENABLED)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    weight = next(p for k, p in model.named_parameters() if re.search(r"features\.0\.|stem\.", k))
    assert weight.requires_grad == (arm != "frozen")
    assert any(hasattr(module, "tract") for module in model.modules()) == (arm == "tract")
    for each in (cfg, before):
        each.MODEL.BACKBONE.FREEZE_AT, each.MODEL.TRACT.ENABLED, each.MODEL.DEVICE = 0, False, ""
    assert cfg == before


@pytest.mark.parametrize(("schedule", "steps"), [("R_50", 18000), ("VGG_16", 110000)])
def test_a_schedule_changes_the_training_set_and_the_length_alone(schedule, steps):
    name = next(name for name in NAMES if schedule in name)
    cfg, before = load(name, f"schedules/{schedule}_0712.yaml"), load(name)
    assert list(cfg.DATASETS.TRAIN) == ["voc_2007_trainval", "voc_2012_trainval"]
    assert steps == cfg.SOLVER.MAX_ITER and max(cfg.SOLVER.STEPS) < steps
    for each in (cfg, before):
        each.DATASETS.TRAIN, each.SOLVER.MAX_ITER, each.SOLVER.STEPS = (), 0, ()
    assert cfg == before


SHARED = {
    "DATASETS": ("TRAIN", "TEST"),
    "DATALOADER": ("ASPECT_RATIO_GROUPING",),
    "INPUT": ("MIN_SIZE_TRAIN", "MAX_SIZE_TRAIN", "MIN_SIZE_TEST", "MAX_SIZE_TEST"),
    "MODEL.BACKBONE": ("FREEZE_AT",),
    "MODEL.TRACT": ("ENABLED", "LAMBDA", "UNIT"),
    "MODEL.RPN": (
        *(f"{when}_NMS_TOPK_{split}" for when in ("PRE", "POST") for split in ("TRAIN", "TEST")),
        *("NMS_THRESH", "BATCH_SIZE_PER_IMAGE", "POSITIVE_FRACTION"),
    ),
    "MODEL.ROI_HEADS": (
        *("BATCH_SIZE_PER_IMAGE", "POSITIVE_FRACTION", "SCORE_THRESH_TEST", "NMS_THRESH_TEST"),
    ),
    "SOLVER": (
        *("IMS_PER_BATCH", "BASE_LR", "MOMENTUM", "NESTEROV", "WEIGHT_DECAY", "WEIGHT_DECAY_NORM"),
        *("LR_SCHEDULER_NAME", "STEPS", "GAMMA", "MAX_ITER", "WARMUP_ITERS", "WARMUP_FACTOR"),
    ),
    "SOLVER.CLIP_GRADIENTS": ("ENABLED",),
    "SOLVER.AMP": ("ENABLED",),
    "TEST": ("EVAL_PERIOD", "DETECTIONS_PER_IMAGE"),
}


VOC = [n for n in NAMES if n.startswith("PascalVOC") and (REPO / "configs" / n).is_file()]


@pytest.mark.parametrize("name", VOC)
def test_a_config_has_the_recipe_of_its_twin_in_configs(name):
    d2_cfg, twin = load(name), load_cfg(REPO / "configs" / name)

    def shared(cfg):
        for place, keys in SHARED.items():
            node = cfg
            for part in place.split("."):
                node = node[part]
            for key in keys:
                plain = list(node[key]) if isinstance(node[key], tuple | list) else node[key]
                yield f"{place}.{key}", plain

    assert dict(shared(d2_cfg)) == dict(shared(twin))
    anchors = d2_cfg.MODEL.ANCHOR_GENERATOR
    assert [size for level in anchors.SIZES for size in level] == twin.MODEL.ANCHOR_GENERATOR.SIZES
    assert anchors.ASPECT_RATIOS == [twin.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS]
    decay, bias = d2_cfg.SOLVER.WEIGHT_DECAY, d2_cfg.SOLVER.WEIGHT_DECAY_BIAS
    assert (decay if bias is None else bias) == twin.SOLVER.WEIGHT_DECAY_BIAS
    head = twin.MODEL.ROI_BOX_HEAD
    width = d2_cfg.MODEL.ROI_BOX_HEAD.FC_DIM
    assert width == (head.FC_DIM if "FPN" in name else 4096)
    assert d2_cfg.MODEL.VGG.DROPOUT == head.DROPOUT


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(
        UserError, match=r"did you mean 'PascalVOC-Detection/faster_rcnn_VGG_16\.yaml'\?"
    ):
        config_file("PascalVOC-Detection/faster_rcnn_VGG16.yaml")
    with pytest.raises(UserError, match=r"R_50_C4\.yaml', and after it 'arms/tract\.yaml'\?"):
        config_file("PascalVOC-Detection/faster_rcnn_R_50_C4_tract.yaml")
    with pytest.raises(UserError, match=r"did you mean"):
        config_file("")


def test_the_key_of_an_earlier_version_is_refused_by_what_says_it_now():
    with pytest.raises(KeyError, match=r"RELATIVE.*UNIT trace"):
        load(NAMES[0]).merge_from_list(["MODEL.TRACT.RELATIVE", True])


TRAINER_CONFIGS = sorted((REPO / "configs/detectron2").glob("*.yaml"))


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("path", TRAINER_CONFIGS, ids=lambda p: p.stem)
def test_a_config_of_this_projects_trainer_builds_its_detectron2_model(path, arm):
    cfg = load_cfg(path, arm=arm)
    cfg.defrost()
    cfg.MODEL.WEIGHTS = ""
    built = build_detector(cfg, None, ("a", "b"), False)
    put_tract(cfg, built.model, built.input_variance)
    weight = next(
        p for k, p in built.network.named_parameters() if re.search(r"features\.0\.|stem\.", k)
    )
    assert weight.requires_grad == (arm != "frozen")
    assert any(hasattr(m, "tract") for m in built.network.modules()) == (arm == "tract")
    assert built.meta["detectron2"]["CONFIG_FILE"] in NAMES


TWINS = REPO / "configs/PascalVOC-Detection"
WITH_TWIN = [path for path in TRAINER_CONFIGS if (TWINS / path.name).is_file()]


@pytest.mark.parametrize("path", WITH_TWIN, ids=lambda p: p.stem)
def test_a_config_has_the_recipe_of_its_twin_with_torchvisions_model(path):
    cfg, twin = load_cfg(path), load_cfg(TWINS / path.name)
    for each in (cfg, twin):
        each.defrost()
        assert each.MODEL.pop("WEIGHTS") is not None
        each.kept = [each.MODEL.BACKBONE.FREEZE_AT, each.MODEL.TRACT.ENABLED]
        each.MODEL, each.OUTPUT_DIR = None, ""
    assert cfg == twin
