"""Mistakes in a detectron2 configuration are refused in one line, and nothing in it is ignored."""

import pytest

from tests.d2.models import CONFIGS
from tract_det.d2 import config_file
from tract_det.d2.config_models import build_detector
from tract_det.errors import UserError

R_18 = "BCCD-Detection/faster_rcnn_R_18_FPN.yaml"
FCOS = "COCO-Detection/fcos_R_50_FPN_1x.py"
LAZY = f"""
from detectron2.config import LazyCall as L, LazyConfig
from tract_det.d2 import apply_tract
inner = LazyConfig.load({str(CONFIGS / FCOS)!r}).model
"""
EVAL = 'MODEL: {MASK_ON: !!python/object/apply:eval [\'open("ran", "w")\']}'


def refusal(name, opts=()):
    with pytest.raises(UserError) as caught:
        build_detector(str(name), list(opts), num_classes=3)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", "_BASE_: nowhere.yaml", "nowhere.yaml"),
        ("a.yaml", "", "holds no KEY: VALUE"),
        ("a.yaml", "- 1\n- 2", "holds no KEY: VALUE"),
        ("a.yaml", "word", "holds no KEY: VALUE"),
        ("a.yaml", "MODEL: {", "cannot be read: "),
        ("a.yaml", "MODEL: 3", "cannot be read: "),
        ("a.yaml", "VERSION: 7", "cannot be read: "),
        ("a.yaml", EVAL, "write plain values, since no code is run"),
        ("a.txt", "MODEL: {}", "name a .yaml or a LazyConfig .py"),
        ("a.py", "def", "cannot be read: "),
        ("a.py", "import nowhere_at_all", "nowhere_at_all"),
        ("a.py", "1 / 0", "division by zero"),
        ("a.py", "x = 1", "no `model` with a `backbone`"),
        ("a.py", "model = 1", "no `model` with a `backbone`"),
        ("a.py", "model = dict(a=1)", "no `model` with a `backbone`"),
        ("a.py", LAZY + "model = inner.backbone", "no `model` with a `backbone`"),
        ("a.py", LAZY + "model = L(apply_tract)(model=inner)", "puts apply_tract around"),
    ],
)
def test_an_invalid_file_is_refused(name, content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(content)
    error = refusal(tmp_path / name)
    assert message in error and str(tmp_path / name) in error
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "opts", "message"),
    [
        (R_18, ["MODEL.FPN.OUT_CHANNELS", -1], "builds no model: "),
        (R_18, ["MODEL.FPN.OUT_CHANNELS"], "MODEL.DETECTRON2.OPTS ['MODEL.FPN"),
        (
            R_18,
            ["MODEL.BACKBONE.FREEZE_AT", 0],
            "set MODEL.BACKBONE.FREEZE_AT in this config instead",
        ),
        (
            FCOS,
            ["backbone.bottom_up.freeze_at=0"],
            "set MODEL.BACKBONE.FREEZE_AT in this config instead",
        ),
        (R_18, ["MODEL.TRACT.ENABLED", True], "set MODEL.TRACT.ENABLED in this config, not in"),
        (R_18, ["MODEL.TRACT.LAMBDA", 0.2], "set MODEL.TRACT.ENABLED in this config, not in"),
        (R_18, ["INPUT.FORMAT", "YUV-BT.601"], "is YUV-BT.601: the images are RGB"),
        (
            "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py",
            ["roi_heads.mask_in_features=null", "input_format=L"],
            "(LazyConfig: input_format) is L",
        ),
        (
            R_18,
            [
                *("MODEL.PROPOSAL_GENERATOR.NAME", "RRPN", "MODEL.ANCHOR_GENERATOR.NAME"),
                *("RotatedAnchorGenerator", "MODEL.ANCHOR_GENERATOR.ANGLES", [[-90, 0]]),
                *("MODEL.RPN.BBOX_REG_WEIGHTS", (1.0, 1.0, 1.0, 1.0, 1.0)),
            ],
            "are for rotated boxes",
        ),
    ],
)
def test_settings_that_contradict_this_config_or_the_data_are_refused(name, opts, message):
    assert message in refusal(name, opts)


def test_a_file_that_puts_tract_on_its_model_is_refused(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(f"_BASE_: {config_file(R_18)}\nMODEL: {{TRACT: {{ENABLED: True}}}}\n")
    assert "set MODEL.TRACT.ENABLED in this config, not in" in refusal(str(path), [])


def test_a_file_may_have_a_base_of_detectron2s_that_runs_code(tmp_path):
    base = CONFIGS / "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
    assert "!!python" in (CONFIGS / "Base-RetinaNet.yaml").read_text()
    (tmp_path / "a.yaml").write_text(f"_BASE_: {base}\nMODEL: {{FPN: {{OUT_CHANNELS: 16}}}}\n")
    model = build_detector(str(tmp_path / "a.yaml"), num_classes=3)
    assert model.head.cls_score.in_channels == 16


def test_a_config_of_this_package_may_be_named_by_its_path():
    assert build_detector(config_file(R_18), num_classes=3).roi_heads.num_classes == 3
