"""detectron2's models from its own configuration files, yacs and LazyConfig."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import detectron2
import yaml
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.modeling import build_model
from torch import nn

from tract_det.d2.config import add_tract_config
from tract_det.d2.detector import as_detector
from tract_det.errors import UserError

_OPTS = "MODEL.DETECTRON2.OPTS"


def find_config(name: str) -> Path:
    """A file of detectron2's: as given, else of this package's `d2/configs`, else its model zoo's.

    Raises:
        UserError: there is none.
    """
    zoo = Path(detectron2.__file__).parent / "model_zoo" / "configs"
    places = [Path(name), Path(__file__).parent / "configs" / name, zoo / name]
    for path in places:
        if path.is_file():
            return path
    raise UserError(
        f"MODEL.DETECTRON2.CONFIG_FILE {name} does not exist: name a file, or one of detectron2's "
        "model zoo, such as COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
    )


def build_detector(
    config_file: str,
    opts: Sequence[Any] = (),
    *,
    num_classes: int,
    freeze_at: int | None = None,
    min_size: int = 800,
    max_size: int = 1333,
) -> nn.Module:
    """The model that a configuration of detectron2's describes, with random weights.

    It has the one detector interface; see `detector.as_detector`.

    Args:
        config_file: see `find_config`. `.yaml` or a LazyConfig `.py`, which is run.
        opts: `KEY VALUE` pairs for a `.yaml`; `key=value`, relative to `model`, for a `.py`.
        num_classes: K, without background; the file's own number does not count.
        freeze_at: stages to freeze, 0 = none; None = what the file says.
        min_size: shorter side in evaluation, pixels; 0 = as they are. The file's does not count.
        max_size: longer side's bound in evaluation, pixels.

    Raises:
        UserError: the file or an override is wrong, or the model does not learn from boxes.
    """
    path = find_config(config_file)
    make = _from_lazy if path.suffix == ".py" else _from_yacs
    model, input_format = make(path, list(opts), num_classes, freeze_at)
    return as_detector(model, min_size=min_size, max_size=max_size, input_format=input_format)


def _from_yacs(
    path: Path, opts: list[Any], num_classes: int, freeze_at: int | None
) -> tuple[nn.Module, str]:
    cfg = get_cfg()
    add_tract_config(cfg)
    try:
        cfg.merge_from_file(str(path))
    except (KeyError, ValueError, AssertionError, yaml.YAMLError) as error:
        raise UserError(f"MODEL.DETECTRON2.CONFIG_FILE {path}: {_line(error)}") from error
    try:
        cfg.merge_from_list(opts)
    except (KeyError, ValueError, AssertionError) as error:
        raise UserError(f"{_OPTS} {opts}: {_line(error)}") from error
    for node in ("ROI_HEADS", "RETINANET"):
        cfg.MODEL[node].NUM_CLASSES = num_classes
    if freeze_at is not None:
        cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    # The caller's to decide.
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.VIS_PERIOD = "cpu", "", 0
    cfg.MODEL.TRACT.ENABLED = False
    return _built(lambda: build_model(cfg), path), cfg.INPUT.FORMAT


def _from_lazy(
    path: Path, opts: list[Any], num_classes: int, freeze_at: int | None
) -> tuple[nn.Module, str]:
    try:
        config = LazyConfig.load(str(path))
        model = config["model"]
    except (KeyError, TypeError) as error:
        raise UserError(f"MODEL.DETECTRON2.CONFIG_FILE {path} has no `model`") from error
    try:
        model = LazyConfig.apply_overrides(model, [str(option) for option in opts])
    except Exception as error:  # hydra's own, of many classes
        raise UserError(f"{_OPTS} {opts}: {_line(error)}") from error
    (model.roi_heads if "roi_heads" in model else model).num_classes = num_classes
    if freeze_at is not None:
        backbone = model.backbone
        for name in ("bottom_up", "net"):
            backbone = backbone.get(name, backbone)
        if freeze_at or "freeze_at" in backbone:
            backbone.freeze_at = freeze_at
    return _built(lambda: instantiate(model), path), ""


def _built(make: Any, path: Path) -> nn.Module:
    try:
        return make()
    except (KeyError, ValueError, AssertionError, TypeError) as error:
        raise UserError(
            f"MODEL.DETECTRON2.CONFIG_FILE {path} builds no model: {_line(error)}"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
