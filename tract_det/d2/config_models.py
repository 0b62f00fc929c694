"""Builds detectron2's models from its own configuration files, yacs or LazyConfig."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import detectron2
import yaml
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.modeling import build_model
from detectron2.modeling.proposal_generator.rrpn import RRPN
from detectron2.modeling.roi_heads import RROIHeads
from torch import nn

from tract_det.d2.config import add_tract_config
from tract_det.d2.config_files import FOLDER
from tract_det.d2.detector import as_detector
from tract_det.errors import UserError

_FILE, _OPTS = "MODEL.DETECTRON2.CONFIG_FILE", "MODEL.DETECTRON2.OPTS"
_FREEZE_AT = f"{_OPTS} sets FREEZE_AT: set MODEL.BACKBONE.FREEZE_AT in this config instead"
_ZOO = Path(detectron2.__file__).parent / "model_zoo" / "configs"


def find_config(name: str) -> Path:
    """The path of a detectron2 configuration file.

    Args:
        name: a path; or a path below `configs/detectron2`, or below detectron2's model zoo.

    Raises:
        UserError: there is no such file, or its suffix is neither .yaml nor .py.
    """
    places = [Path(name), FOLDER / name, _ZOO / name]
    for path in places:
        if path.is_file() and path.suffix not in (".yaml", ".yml", ".py"):
            raise UserError(f"{_FILE} {path} has another suffix: name a .yaml or a LazyConfig .py")
        if path.is_file():
            return path
    raise UserError(
        f"{_FILE} {name} does not exist: name a file, or a config of detectron2's model zoo, such "
        "as COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
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
    """The model that a detectron2 configuration describes, with random weights.

    It has this project's detector interface; see `detector.as_detector`.

    Args:
        config_file: as for `find_config`: a `.yaml`, or a LazyConfig `.py`, which is executed.
        opts: `KEY VALUE` pairs for a `.yaml`; `key=value`, relative to `model`, for a `.py`.
        num_classes: K, without background; replaces the number in the file.
        freeze_at: number of stages to freeze, 0 = none; None = as the file says.
        min_size: shorter side in evaluation, pixels, instead of the file's; 0 = no resizing.
        max_size: upper bound of the longer side in evaluation, pixels, likewise.

    Raises:
        UserError: the file or an override is wrong, or sets what the caller's configuration
            decides (TrAct, frozen stages); or the model does not learn from RGB images and boxes.
    """
    path = find_config(config_file)
    make = _from_lazy if path.suffix == ".py" else _from_yacs
    model, input_format = make(path, list(opts), num_classes, freeze_at)
    order = getattr(model, "input_format", None) or input_format or "BGR"
    _check_data(model, order)
    return as_detector(model, min_size=min_size, max_size=max_size, input_format=order)


class _Cfg(CfgNode):
    """A yacs configuration that lets only detectron2's own files run code; some of them do."""

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> Any:
        is_from_zoo = Path(filename).resolve().is_relative_to(_ZOO.resolve())
        try:
            loaded = super().load_yaml_with_base(filename, allow_unsafe=is_from_zoo)
        except yaml.constructor.ConstructorError as error:
            raise ValueError(f"{_line(error)}: write plain values, since no code is run") from error
        except TypeError:  # the file holds no mapping
            loaded = None
        if not isinstance(loaded, dict):
            raise ValueError(f"{filename} holds no KEY: VALUE")
        return loaded


def _from_yacs(
    path: Path, opts: list[Any], num_classes: int, freeze_at: int | None
) -> tuple[nn.Module, str]:
    cfg = get_cfg()
    add_tract_config(cfg)
    cfg = _Cfg(cfg)
    tract_defaults = cfg.MODEL.TRACT.clone()
    if "MODEL.BACKBONE.FREEZE_AT" in opts[::2]:
        raise UserError(_FREEZE_AT)
    with _in_one_line(f"{_FILE} {path} cannot be read"):
        cfg.merge_from_file(str(path))
    with _in_one_line(f"{_OPTS} {opts}"):
        cfg.merge_from_list(opts)
    if tract_defaults != cfg.MODEL.TRACT:
        raise UserError(
            f"{_FILE} {path} or its OPTS set MODEL.TRACT: set MODEL.TRACT.ENABLED in this config, "
            "not in MODEL.DETECTRON2, and name a file without it"
        )
    for node in ("ROI_HEADS", "RETINANET"):
        cfg.MODEL[node].NUM_CLASSES = num_classes
    if freeze_at is not None:
        cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    # The caller decides these.
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.VIS_PERIOD = "cpu", "", 0
    with _in_one_line(f"{_FILE} {path} builds no model"):
        return build_model(cfg), cfg.INPUT.FORMAT


def _from_lazy(
    path: Path, opts: list[Any], num_classes: int, freeze_at: int | None
) -> tuple[nn.Module, str]:
    options = [str(option) for option in opts]
    if any(option.split("=")[0].endswith("freeze_at") for option in options):
        raise UserError(_FREEZE_AT)
    with _in_one_line(f"{_FILE} {path} cannot be read"):
        model = LazyConfig.load(str(path)).get("model")
    target = getattr(model, "_target_", None)
    if target is not None and str(getattr(target, "__name__", target)).endswith("apply_tract"):
        raise UserError(
            f"{_FILE} {path} puts apply_tract around its model: leave it out, and set "
            "MODEL.TRACT.ENABLED in this config"
        )
    if target is None or "backbone" not in model:
        raise UserError(f"{_FILE} {path} has no `model` with a `backbone` (a LazyCall): add it")
    with _in_one_line(f"{_OPTS} {opts}"):
        model = LazyConfig.apply_overrides(model, options)
    with _in_one_line(f"{_FILE} {path} builds no model"):
        (model.roi_heads if "roi_heads" in model else model).num_classes = num_classes
        if freeze_at is not None:
            backbone = model.backbone
            for name in ("bottom_up", "net"):
                backbone = backbone.get(name, backbone)
            if freeze_at or "freeze_at" in backbone:
                backbone.freeze_at = freeze_at
        return instantiate(model), ""


def _check_data(model: nn.Module, order: str) -> None:
    """Refuses models for another kind of images or boxes than the data have."""
    if order not in ("RGB", "BGR"):
        raise UserError(
            f"INPUT.FORMAT (LazyConfig: input_format) is {order}: the images are RGB, so set RGB "
            f"or BGR in {_OPTS}"
        )
    parts = [getattr(model, name, None) for name in ("proposal_generator", "roi_heads")]
    if any(isinstance(part, RRPN | RROIHeads) for part in parts):
        raise UserError(
            "MODEL.PROPOSAL_GENERATOR.NAME RRPN and MODEL.ROI_HEADS.NAME RROIHeads are for rotated "
            "boxes, which the data do not have: set RPN and StandardROIHeads"
        )


@contextmanager
def _in_one_line(prefix: str) -> Iterator[None]:
    """Turns every error into a UserError of one line that begins with `prefix`.

    The errors have no class in common: parsers, hydra, torch and the code of a LazyConfig file
    raise their own.
    """
    try:
        yield
    except Exception as error:
        raise UserError(f"{prefix}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
