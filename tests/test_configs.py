"""Every config file loads, builds and says how to run it."""

import shlex
from pathlib import Path

import pytest
import torch

from tests.conftest import REPO
from tract_det.config import classification, detection
from tract_det.config.detection import load_cfg
from tract_det.config.files import find_config
from tract_det.config.shared import DERIVED_DEEPSPEED_KEYS
from tract_det.errors import UserError
from tract_det.modeling.weight_files import Weights
from tract_det.training.assembly import freeze_at
from tract_det.training.detectors import build_detector

CLASSIFIERS = ("CIFAR", "ImageNet-Classification", "Transfer")
DETECTORS = ("BCCD-Detection", "PascalVOC-Detection", "detectron2", "quickstart")


def files(folders):
    """The experiments in these folders, which are not bases of others alone."""
    paths = [path for name in folders for path in (REPO / "configs" / name).glob("*.yaml")]
    return sorted(path for path in paths if not path.name.startswith("Base-"))


CONFIGS = files(DETECTORS)
RECIPES = files(CLASSIFIERS)
ARMS = sorted((REPO / "configs/arms").glob("*.yaml"))
GREY = ["MODEL.PIXEL_MEAN", "[100]", "MODEL.PIXEL_STD", "[50]", "DATASETS.NAME", "imagefolder"]
QUICK = REPO / "configs/quickstart/shapes.yaml"


def loader(path):
    """The `load_cfg` of a file's tool."""
    return load_cfg if path in CONFIGS else classification.load_cfg


def test_there_are_fewer_than_60_files_and_none_is_forgotten():
    every = {path.relative_to(REPO / "configs") for path in (REPO / "configs").rglob("*.yaml")}
    bases = {path for path in every if path.name.startswith("Base-")}
    others = {path for path in every if path.parts[0] in ("arms", "schedules", "paper.yaml")}
    detectron2s = {path for path in every if path.parts[0] == "detectron2" and len(path.parts) > 2}
    known = {path.relative_to(REPO / "configs") for path in CONFIGS + RECIPES}
    assert every == known | bases | others | detectron2s
    assert len(every) < 60


@pytest.mark.parametrize("path", CONFIGS + RECIPES, ids=lambda p: p.stem)
def test_a_config_opens_with_its_command_and_says_what_it_is_in_three_lines(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    words = shlex.split(header[0].removeprefix("# "))
    tool = "train_net.py" if path in CONFIGS else "pretrain_net.py"
    assert words[0] in ("python", "deepspeed") and f"tools/{tool}" in words
    assert 2 <= len(header) <= 3 and all(line.isascii() for line in header)
    if path != QUICK:  # the default
        assert words[words.index("--config-file") + 1] == str(path.relative_to(REPO))
        arm = words[words.index("--arm") + 1]
        pairs = words[words.index("--arm") + 2 :]
        assert (arm == "tract") == loader(path)(path, pairs, arm).MODEL.TRACT.ENABLED


@pytest.mark.parametrize("path", CONFIGS + RECIPES, ids=lambda p: p.stem)
def test_a_run_is_named_after_its_config_and_its_arm(path):
    name = path.relative_to(REPO / "configs").with_suffix("")
    declared = "tract" if path == QUICK else "plain"
    assert f"output/{name}/{declared}" == loader(path)(path).OUTPUT_DIR
    assert f"output/{name}/frozen" == loader(path)(path, arm="frozen").OUTPUT_DIR
    assert loader(path)(path, ["OUTPUT_DIR", "here"], "tract").OUTPUT_DIR == "here"


OWN = [p for p in CONFIGS if p.parent.name != "detectron2"]  # the others need detectron2: tests/d2


@pytest.mark.parametrize("arm", ["frozen", "plain", "tract"])
@pytest.mark.parametrize("path", OWN, ids=lambda p: p.stem)
def test_a_config_builds_the_model_of_its_arm(path, arm):
    cfg = load_cfg(path, arm=arm)
    weights = Weights("made up", {}, {}) if cfg.MODEL.WEIGHTS else None
    stages = freeze_at(cfg, weights, strict=False, default=2)
    cfg.defrost()
    cfg.MODEL.WEIGHTS, cfg.MODEL.BACKBONE.FREEZE_AT = "", stages
    with torch.device("meta"):
        built = build_detector(cfg, None, ("a", "b"), False)
    stem = built.network.backbone.get_parameter(
        "body.conv1.weight" if "resnet" in cfg.MODEL.BACKBONE.NAME else "features.0.weight"
    )
    assert stem.requires_grad == (arm != "frozen") and (arm == "tract") == cfg.MODEL.TRACT.ENABLED
    assert built.meta["class_names"] == ["a", "b"]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["SOLVER.BASE_LRR", "1"], "unknown key 'SOLVER.BASE_LRR': did you mean 'SOLVER.BASE_LR'"),
        (["solver.max_iter", "1"], "unknown key .*did you mean 'SOLVER.MAX_ITER'"),
        (["BASE_LR", "1"], "did you mean 'SOLVER.BASE_LR'"),
        (["XYZ", "1"], "unknown key 'XYZ'"),
        (["SOLVER.MAX_ITER", "many"], "'SOLVER.MAX_ITER' takes int, like 600, not 'many'"),
        (["SOLVER.MAX_ITER", "1.5"], "takes int"),
        (["SOLVER", "1"], "'SOLVER' is a section"),
        (["SOLVER.MAX_ITER"], "has no value"),
        (["MODEL.BACKBONE.NAME", "resnet9"], "MODEL.BACKBONE.NAME is 'resnet9': it takes one of"),
        (["MODEL.TRACT.LAMBDA", "0"], "MODEL.TRACT.LAMBDA is 0.0"),
        (["MODEL.BACKBONE.FREEZE_AT", "2"], "freezes the stem .* set MODEL.BACKBONE.FREEZE_AT 0"),
        (["MODEL.TRACT.RELATIVE", "True"], "RELATIVE' is no more: set MODEL.TRACT.UNIT trace"),
        (["MODEL.TRACT.RELATIVE", "False"], "RELATIVE' is no more: leave it out, and MODEL.TRACT"),
        (["MODEL.TRACT.UNIT", "pixels"], "MODEL.TRACT.UNIT is 'pixels': it takes one of standard"),
        (["SOLVER.IMS_PER_BATCH", "0"], "SOLVER.IMS_PER_BATCH is 0"),
        (["MODEL.PIXEL_MEAN", "[1,2]"], "must be set together"),
        (
            ["MODEL.PIXEL_MEAN", "[1, 2]", "MODEL.PIXEL_STD", "[1, 2, 3]"],
            r"PIXEL_MEAN has 2 numbers and MODEL\.PIXEL_STD 3",
        ),
        (["MODEL.PIXEL_MEAN", "[1,2,3]"], "must be set together"),
        (["DEEPSPEED.zero_optimization.stage", "3"], "takes 0, 1 or 2"),
        (["TEST.VOC_RULE", "coco"], "TEST.VOC_RULE is 'coco'"),
        (
            ["SOLVER.PATIENCE", "3", "TEST.EVAL_PERIOD", "0"],
            "SOLVER.PATIENCE 3 counts evaluations, and TEST.EVAL_PERIOD 0 makes none",
        ),
        (["TEST.BEST_METRIC", "ema.coco.AP"], r"ema\.coco\.AP needs MODEL\.EMA\.ENABLED True"),
        (["TEST.BEST_METRIC", "mAP"], "TEST.BEST_METRIC is 'mAP': it takes one of voc_07.mAP"),
        (["MODEL.DEVICE", "cuda:1"], "MODEL.DEVICE is 'cuda:1'"),
        (["DATASETS.CLASSES", "[0, 1]"], r"DATASETS.CLASSES takes names, not \[0, 1\]: quote"),
        (["SEED", "-1"], "SEED is -1"),
        (["SOLVER.STEPS", "[0.5]"], r"SOLVER.STEPS is \[0.5\]: a detector takes steps, whole"),
        (["SOLVER.STEPS", "[-5]"], "a detector takes steps, whole numbers from 1"),
        (["SOLVER.STEPS", "[a]"], r"SOLVER.STEPS takes numbers, not \['a'\]"),
        (["SOLVER.BETAS", "[a, b]"], "SOLVER.BETAS takes numbers"),
        (["ARM", "1"], "ARM takes the name of an arm, not 1"),
        (["ARM.X", "1"], "ARM takes the name of an arm"),
        (["INPUT.FLIP_PROB", "1.5"], "INPUT.FLIP_PROB is 1.5: it takes 0 to 1"),
        (["INPUT.COLOR_JITTER", "-0.1"], "INPUT.COLOR_JITTER is -0.1: it takes 0 to 1"),
        (["INPUT.MIN_SIZE_TRAIN", "[-1]"], "INPUT.MIN_SIZE_TRAIN -1: it takes 0 to"),
        (
            ["INPUT.MIN_SIZE_TRAIN", "[32]", "INPUT.MAX_SIZE_TRAIN", "31"],
            "INPUT.MIN_SIZE_TRAIN 32: it takes 0 to INPUT.MAX_SIZE_TRAIN 31",
        ),
        (["INPUT.MIN_SIZE_TEST", "-1"], "INPUT.MIN_SIZE_TEST -1: it takes 0 to"),
    ],
)
def test_a_bad_override_is_refused_by_name(pairs, message):
    with pytest.raises(UserError, match=message) as caught:
        load_cfg(QUICK, pairs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", DERIVED_DEEPSPEED_KEYS)
def test_what_solver_says_cannot_be_said_again_to_deepspeed(key):
    with pytest.raises(UserError, match=rf"DEEPSPEED\.{key} is derived: set SOLVER"):
        load_cfg(QUICK, [f"DEEPSPEED.{key}", "1"])


def test_deepspeeds_own_keys_pass_through():
    cfg = load_cfg(QUICK, ["DEEPSPEED.zero_optimization.reduce_bucket_size", "5000000"])
    assert cfg.DEEPSPEED.zero_optimization == {"stage": 0, "reduce_bucket_size": 5000000}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SOLVR: {BASE_LR: 1}", "unknown key 'SOLVR.BASE_LR': did you mean 'SOLVER.BASE_LR'"),
        ("SOLVER: {BASE_LR: [", "cannot be read"),
        ("_BASE_: nowhere.yaml", r"its _BASE_ .*nowhere\.yaml does not exist$"),
        ("MODEL: {1: {2: 3}}", r"unknown key 'MODEL\.1\.2'"),
        ("SOLVER: 3", "'SOLVER' is a section"),
        ("", "cannot be read"),
        ("- a", "cannot be read"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, text, message):
    path: Path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"bad\.yaml.*{message}"):
        load_cfg(path)


def test_a_missing_file_is_refused_by_name_with_the_nearest():
    with pytest.raises(UserError, match=r"nowhere\.yaml does not exist$"):
        load_cfg("nowhere.yaml")
    with pytest.raises(UserError, match=r"did you mean configs/CIFAR/cpu_small\.yaml\?"):
        load_cfg("configs/CIFAR/cpu_smal.yaml")


@pytest.mark.parametrize("name", ["configs/CIFAR/cpu_small.yaml", "CIFAR/cpu_small.yaml"])
def test_a_config_is_found_from_another_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(name).samefile(REPO / "configs/CIFAR/cpu_small.yaml")


def test_numbers_take_the_type_of_their_default():
    pairs = ["SOLVER.BASE_LR", "1", "INPUT.MIN_SIZE_TRAIN", "64", "DATASETS.TEST", "val"]
    cfg = load_cfg(QUICK, pairs)
    assert cfg.SOLVER.BASE_LR == 1.0 and isinstance(cfg.SOLVER.BASE_LR, float)
    assert cfg.INPUT.MIN_SIZE_TRAIN == [64] and cfg.DATASETS.TEST == ["val"]
    assert load_cfg(QUICK, ["DATASETS.CLASSES", "[RBC, WBC]"]).DATASETS.CLASSES == ["RBC", "WBC"]
    assert load_cfg(QUICK, ["SOLVER.BASE_LR", "1e-3"]).SOLVER.BASE_LR == 1e-3


@pytest.mark.parametrize("module", [detection, classification])
def test_the_defaults_are_valid(module):
    module.validate(module.get_cfg())


SMALL = REPO / "configs/CIFAR/cpu_small.yaml"


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["SOLVER.EPOCH", "1"], "did you mean 'SOLVER.EPOCHS'"),
        (["SOLVER.EPOCHS", "0"], "SOLVER.EPOCHS is 0.0"),
        (["SOLVER.STEPS", "[0.5, 30]"], r"SOLVER.STEPS is \[0.5, 30\]: it takes either fractions"),
        (["SOLVER.STEPS", "[0, 0.5]"], "it takes either fractions"),
        (["SOLVER.STEM.OPTIMIZER", "sgd"], "SOLVER.STEM.OPTIMIZER is 'sgd': it takes one of"),
        (["SOLVER.BETAS", "0.9"], "SOLVER.BETAS takes two numbers"),
        (["MODEL.NORM", "FrozenBN"], "MODEL.NORM is 'FrozenBN'"),
        (["MODEL.PATCH_NORM", "triple"], "MODEL.PATCH_NORM is 'triple': it takes one of "),
        (["MODEL.PIXEL_MEAN", "[1,2,3]"], "must be set together"),
        (["MODEL.EMA.DECAY", "1"], "MODEL.EMA.DECAY is 1.0"),
        (["TEST.BEST_METRIC", "ema.top1"], r"ema\.top1 needs MODEL\.EMA\.ENABLED True"),
        (
            ["SOLVER.PATIENCE", "3", "TEST.EVAL_EPOCHS", "0"],
            "SOLVER.PATIENCE 3 counts evaluations, and TEST.EVAL_EPOCHS 0 makes none",
        ),
        (["INPUT.RESIZE_TEST", "16"], "INPUT.RESIZE_TEST 16 is less than INPUT.SIZE 32"),
        (["INPUT.SIZE", "0"], "INPUT.SIZE is 0: it must be positive"),
        (["INPUT.CROP", "center"], "INPUT.CROP is 'center': it takes one of random_resized, pad"),
        (["INPUT.SCALE", "[0.5, 0.2]"], r"INPUT.SCALE is \[0.5, 0.2\]: it takes two positive"),
        (["INPUT.RATIO", "[0, 1]"], r"INPUT.RATIO is \[0, 1\]: it takes two positive"),
        (["INPUT.RATIO", "[1]"], r"INPUT.RATIO is \[1\]: it takes two positive"),
        (["INPUT.PADDING", "-1"], "INPUT.PADDING is -1: it must not be negative"),
        (["INPUT.FLIP_PROB", "1.5"], "INPUT.FLIP_PROB is 1.5: it takes 0 to 1"),
        (["INPUT.AUTO_AUGMENT", "augmix"], "INPUT.AUTO_AUGMENT is 'augmix': it takes one of"),
        (["INPUT.ROTATION", "-15"], "INPUT.ROTATION is -15.0: it takes 0 to 180"),
        (["INPUT.ROTATION", "181"], "INPUT.ROTATION is 181.0: it takes 0 to 180"),
        (["INPUT.MAGNITUDE", "31"], "INPUT.MAGNITUDE is 31: it takes 0 to 30"),
        (["INPUT.NUM_OPS", "0"], "INPUT.NUM_OPS is 0: it must be positive"),
        (["INPUT.COLOR_JITTER", "2"], "INPUT.COLOR_JITTER is 2.0: it takes 0 to 1"),
        (["INPUT.INTERPOLATION", "nearest"], "INPUT.INTERPOLATION is 'nearest'"),
        (["INPUT.ERASING", "2"], "INPUT.ERASING is 2.0: it takes 0 to 1"),
        (["INPUT.ERASING", "-0.1"], "INPUT.ERASING is -0.1: it takes 0 to 1"),
        (
            [*GREY, "INPUT.AUTO_AUGMENT", "randaugment"],
            r"INPUT\.AUTO_AUGMENT randaugment changes colours.*for 1 channels: set",
        ),
        ([*GREY, "INPUT.COLOR_JITTER", "0.1"], r"INPUT\.COLOR_JITTER changes.*for 1 channels: set"),
        ([*GREY, "DATASETS.NAME", "cifar10"], r"DATASETS\.NAME cifar10 has RGB.*for 1 channels"),
        (
            ["MODEL.PIXEL_MEAN", "[1, 1, 1]", "MODEL.PIXEL_STD", "[1, 0, 1]"],
            "MODEL.PIXEL_STD must be positive",
        ),
        (["MODEL.VALUE_RANGE", "0"], "MODEL.VALUE_RANGE is 0.0: it must be positive"),
        (["MIX.MIXUP_ALPHA", "-1"], "MIX.MIXUP_ALPHA is -1.0"),
        (["MIX.PROB", "1.1"], "MIX.PROB is 1.1: it takes 0 to 1"),
        (["MIX.SWITCH_PROB", "-1"], "MIX.SWITCH_PROB is -1.0: it takes 0 to 1"),
        (["MIX.SMOOTHING", "2"], "MIX.SMOOTHING is 2.0: it takes 0 to 1"),
        (["DATASETS.NAME", "voc"], "DATASETS.NAME is 'voc': it takes one of imagefolder, cifar10"),
        (["DATASETS.HOLDOUT", "1"], "DATASETS.HOLDOUT is 1.0: it must be at least 0 and below 1"),
        (["DATASETS.LIMIT", "-1"], "DATASETS.LIMIT is -1: it must not be negative"),
        (["DEEPSPEED.zero_optimization.stage", "4"], "it takes 0, 1, 2 or 3"),
        (
            ["DEEPSPEED.zero_optimization.stage", "3", "MODEL.EMA.ENABLED", "True"],
            "no rank with whole weights, which MODEL.EMA.ENABLED needs",
        ),
        (["MODEL.TRACT.SCHEDULE", "linear"], "MODEL.TRACT.SCHEDULE linear and LAMBDA_END -1.0"),
        (["MODEL.TRACT.LAMBDA_END", "0"], "MODEL.TRACT.LAMBDA_END is 0.0"),
        (["MODEL.TRACT.POWER", "-0.5"], "MODEL.TRACT.POWER is -0.5: it must not be negative"),
        (["MODEL.TRACT.STOP_AT", "-1"], "MODEL.TRACT.STOP_AT is -1"),
        (["MODEL.TRACT.STOP_AT", "1.5"], r"STOP_AT is 1\.5: it takes a fraction of the training"),
    ],
)
def test_a_bad_override_of_a_recipe_is_refused_by_name(pairs, message):
    with pytest.raises(UserError, match=message) as caught:
        classification.load_cfg(SMALL, pairs)
    assert "\n" not in str(caught.value)
