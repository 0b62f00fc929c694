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

FOLDER = REPO / "tract_det/d2/configs"
CONFIGS = sorted(FOLDER.rglob("*.yaml"))
NAMES = [path.relative_to(FOLDER).as_posix() for path in CONFIGS]


def load(name):
    cfg = get_cfg()
    add_tract_config(cfg)
    cfg.merge_from_file(config_file(name))
    return cfg


def test_there_are_three_arms_of_four_models_on_two_training_sets_and_their_bases():
    arms = [f"{arm}{years}" for arm in ("", "_tract", "_frozen") for years in ("", "_0712")]
    models = ("VGG_16", "VGG_16_BN", "R_50_FPN", "R_50_C4")
    expected = {f"faster_rcnn_{model}{arm}" for model in models for arm in arms}
    expected |= {f"Base-{model}" for model in (*models, "R_50")}
    expected |= {"faster_rcnn_R_18_FPN", "faster_rcnn_R_18_FPN_tract"}  # for BCCD
    assert {path.stem for path in CONFIGS} == expected


@pytest.mark.parametrize("name", NAMES)
def test_the_command_in_a_configs_first_lines_works(name):
    header = Path(config_file(name)).read_text().splitlines()
    cfg = get_cfg()
    exec(
        header[1].removeprefix("#").strip(),
        {"cfg": cfg, "add_tract_config": add_tract_config, "config_file": config_file},
    )
    assert f"output/detectron2/{name.removesuffix('.yaml')}" == cfg.OUTPUT_DIR
    gpus = int(re.search(r"--num-gpus (\d)", header[0])[1])
    assert cfg.SOLVER.IMS_PER_BATCH % gpus == 0


@pytest.mark.parametrize("name", [n for n in NAMES if n != "PascalVOC-Detection/Base-R_50.yaml"])
def test_a_config_builds_its_model(name):
    cfg = load(name)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    weight = next(p for k, p in model.named_parameters() if re.search(r"features\.0\.|stem\.", k))
    assert weight.requires_grad == ("_frozen" not in name and "Base" not in name)


@pytest.mark.parametrize("name", [n for n in NAMES if "_tract" in n])
def test_a_tract_config_differs_from_its_control_by_tract_alone(name):
    tract, control = load(name), load(name.replace("_tract", ""))
    assert tract.MODEL.TRACT.ENABLED and not control.MODEL.TRACT.ENABLED
    for cfg in (tract, control):
        cfg.MODEL.TRACT.ENABLED, cfg.OUTPUT_DIR = False, ""
    assert tract == control


SHARED = {
    "DATASETS": ("TRAIN", "TEST"),
    "DATALOADER": ("ASPECT_RATIO_GROUPING",),
    "INPUT": ("MIN_SIZE_TRAIN", "MAX_SIZE_TRAIN", "MIN_SIZE_TEST", "MAX_SIZE_TEST"),
    "MODEL.TRACT": ("ENABLED", "LAMBDA"),
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
    if "Base" not in name:  # the twin of a base has -1, the default
        assert d2_cfg.MODEL.BACKBONE.FREEZE_AT == twin.MODEL.BACKBONE.FREEZE_AT
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
    with pytest.raises(UserError, match=r"no config 'VGG_16_tract\.yaml': did you mean '.*VGG_16"):
        config_file("VGG_16_tract.yaml")
    with pytest.raises(UserError, match=r"did you mean"):
        config_file("")


TRAINER_CONFIGS = sorted((REPO / "configs/detectron2").glob("*.yaml"))


@pytest.mark.parametrize("path", TRAINER_CONFIGS, ids=lambda p: p.stem)
def test_a_config_of_this_projects_trainer_builds_its_detectron2_model(path):
    cfg = load_cfg(path)
    cfg.defrost()
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.BACKBONE.FREEZE_AT = max(0, cfg.MODEL.BACKBONE.FREEZE_AT)
    built = build_detector(cfg, None, ("a", "b"), False)
    put_tract(cfg, built.model, built.input_variance)
    weight = next(
        p for k, p in built.network.named_parameters() if re.search(r"features\.0\.|stem\.", k)
    )
    assert weight.requires_grad == ("_frozen" not in path.stem)
    assert any(hasattr(m, "tract") for m in built.network.modules()) == ("_tract" in path.stem)
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
