"""detectron2's models from its own configuration files, yacs and LazyConfig."""

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
from tract_det.d2.detector import as_detector
from tract_det.errors import UserError

_FILE, _OPTS = "MODEL.DETECTRON2.CONFIG_FILE", "MODEL.DETECTRON2.OPTS"
_FREEZE_AT = f"{_OPTS} sets FREEZE_AT, this config's: set MODEL.BACKBONE.FREEZE_AT in it instead"
_ZOO = Path(detectron2.__file__).parent / "model_zoo" / "configs"


def find_config(name: str) -> Path:
    """A file of detectron2's: as given, else of this package's `d2/configs`, else its model zoo's.

    Raises:
        UserError: there is none.
    """
    places = [Path(name), Path(__file__).parent / "configs" / name, _ZOO / name]
    for path in places:
        if path.is_file() and path.suffix not in (".yaml", ".yml", ".py"):
            raise UserError(f"{_FILE} {path} is of no known form: name a .yaml or a LazyConfig .py")
        if path.is_file():
            return path
    raise UserError(
        f"{_FILE} {name} does not exist: name a file, or one of detectron2's "
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
        UserError: the file or an override is wrong, or says what the caller's configuration says
            (TrAct, frozen stages); or the model does not learn from images of RGB and boxes.
    """
    path = find_config(config_file)
    make = _from_lazy if path.suffix == ".py" else _from_yacs
    model, input_format = make(path, list(opts), num_classes, freeze_at)
    order = getattr(model, "input_format", None) or input_format or "BGR"
    _check_data(model, order)
    return as_detector(model, min_size=min_size, max_size=max_size, input_format=order)


class _Cfg(CfgNode):
    """A yacs configuration of which detectron2's own files alone may run code, as they do."""

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> Any:
        is_own = Path(filename).resolve().is_relative_to(_ZOO.resolve())
        try:
            loaded = super().load_yaml_with_base(filename, allow_unsafe=is_own)
        except yaml.constructor.ConstructorError as error:
            raise ValueError(f"{_line(error)}: write plain values, no code is run") from error
        except TypeError as error:  # of what is no mapping
            raise ValueError(f"{filename} holds no KEY: VALUE") from error
        if not isinstance(loaded, dict):
            raise ValueError(f"{filename} holds no KEY: VALUE")
        return loaded


def _from_yacs(
    path: Path, opts: list[Any], num_classes: int, freeze_at: int | None
) -> tuple[nn.Module, str]:
    cfg = get_cfg()
    add_tract_config(cfg)
    cfg = _Cfg(cfg)
    no_tract = cfg.MODEL.TRACT.clone()
    if "MODEL.BACKBONE.FREEZE_AT" in opts[::2]:
        raise UserError(_FREEZE_AT)
    with _in_one_line(f"{_FILE} {path} cannot be read"):
        cfg.merge_from_file(str(path))
    with _in_one_line(f"{_OPTS} {opts}"):
        cfg.merge_from_list(opts)
    if no_tract != cfg.MODEL.TRACT:
        raise UserError(
            f"{_FILE} {path} or its OPTS set MODEL.TRACT: set MODEL.TRACT.ENABLED in this config, "
            "not in MODEL.DETECTRON2, and take a file without it (no _tract)"
        )
    for node in ("ROI_HEADS", "RETINANET"):
        cfg.MODEL[node].NUM_CLASSES = num_classes
    if freeze_at is not None:
        cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    # The caller's to decide.
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
        raise UserError(f"{_FILE} {path} has no `model` with a `backbone`, a LazyCall: add it")
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
    """Refuses models of other images and boxes than the data's."""
    if order not in ("RGB", "BGR"):
        raise UserError(
            f"INPUT.FORMAT (LazyConfig: input_format) is {order}: the images are RGB, set RGB or "
            f"BGR in {_OPTS}"
        )
    parts = [getattr(model, name, None) for name in ("proposal_generator", "roi_heads")]
    if any(isinstance(part, RRPN | RROIHeads) for part in parts):
        raise UserError(
            "MODEL.PROPOSAL_GENERATOR.NAME RRPN and MODEL.ROI_HEADS.NAME RROIHeads are for rotated "
            "boxes, which the data have not: take RPN and StandardROIHeads"
        )


@contextmanager
def _in_one_line(what: str) -> Iterator[None]:
    """Of errors of many classes: parsers', hydra's, torch's, those of a file that is run."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{what}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
