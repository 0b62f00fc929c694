"""`load_detector` and `load_classifier`: from a file of weights to a model in use."""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tract_det.errors import UserError
from tract_det.inference.models import Classifier, Detector
from tract_det.modeling.backbones import batch_in_channels_last
from tract_det.modeling.saved import check_described, is_detectron2, load_saved
from tract_det.modeling.weight_files import Weights, read_weights


def load_detector(
    path: str | Path,
    device: str | torch.device | None = None,
    *,
    config_file: str | Path | None = None,
) -> Detector:
    """A detector from the file of weights that a training has left; nothing else is needed.

    No code of the file is run. Weights of a detectron2 model load where detectron2 is installed.

    Args:
        path: such as `model_final.pth` or `model_best.pth`.
        device: "cuda", "cpu", ...; None = a GPU if there is one.
        config_file: the run's `config.yaml`, for files of earlier versions, which do not say all.

    Raises:
        UserError: it is no such file, or a classifier's; says which settings it lacks.
    """
    model = load_model(path, device, config_file=config_file)
    if not isinstance(model, Detector):
        raise UserError(f"{path} has a classifier's weights: use load_classifier for it")
    return model


def load_classifier(
    path: str | Path,
    device: str | torch.device | None = None,
    *,
    config_file: str | Path | None = None,
) -> Classifier:
    """A classifier from the file of weights that a training has left; see `load_detector`."""
    model = load_model(path, device, config_file=config_file)
    if not isinstance(model, Classifier):
        raise UserError(f"{path} has a detector's weights: use load_detector for it")
    return model


def load_model(
    path: str | Path,
    device: str | torch.device | None = None,
    *,
    config_file: str | Path | None = None,
) -> Detector | Classifier:
    """A detector or a classifier, whichever the file has; see `load_detector`."""
    weights, chosen = _read(path, config_file), _device(device)
    check_described(weights)
    if not _detects(weights):
        return Classifier(load_saved(weights), weights.meta, chosen)
    is_foreign = is_detectron2(weights.meta)
    network = _load_detectron2(weights, config_file) if is_foreign else load_saved(weights)
    if weights.meta["channels_last"]:
        network.get_submodule("backbone").register_forward_pre_hook(batch_in_channels_last)
    return Detector(network, weights.meta, chosen)


def _detects(weights: Weights) -> bool:
    return weights.is_detector or is_detectron2(weights.meta)


def _read(path: str | Path, config_file: str | Path | None) -> Weights:
    """The weights, with what their file says completed by the configuration where it is given."""
    if not Path(path).is_file():
        raise UserError(f"{path} is not a file: give weights such as OUTPUT_DIR/model_final.pth")
    weights = read_weights(str(path), key="weights")
    if config_file is None:
        return weights
    task = "detection" if _detects(weights) else "classification"
    settings = importlib.import_module("tract_det.training.saved").settings_in(
        Path(config_file), task
    )
    if is_detectron2(settings) != is_detectron2(weights.meta):
        raise UserError(f"{config_file} describes another model than {path}: give its own")
    meta = {**settings, **weights.meta}
    if is_detectron2(settings):  # it may be a program: the user's word goes before the file's
        meta["detectron2"] = settings["detectron2"]
    return replace(weights, meta=meta)


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device {device} is unknown: give cuda, cuda:1 or cpu") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {device}: there is no such GPU here, give cpu")
    return chosen


def _load_detectron2(weights: Weights, config_file: str | Path | None) -> nn.Module:
    """The model that detectron2 builds.

    Raises:
        UserError: detectron2 is not installed, or its configuration is a program, which is run only
            if the user's own `config_file` names it.
    """
    meta, name = weights.meta, weights.meta["detectron2"]["CONFIG_FILE"]
    if name.endswith(".py") and config_file is None:
        raise UserError(
            f"{weights.source} is a model of detectron2's that the program {name} describes: to "
            "run it, give the run's config.yaml as config_file (--config-file)"
        )
    try:
        models: Any = importlib.import_module("tract_det.d2.config_models")
        files: Any = importlib.import_module("tract_det.d2.weights")
    except ModuleNotFoundError as error:
        if error.name != "detectron2":
            raise
        raise UserError(f"{weights.source} is a model of detectron2's: {error}") from error
    model = models.build_detector(
        name,
        meta["detectron2"]["OPTS"],
        num_classes=len(meta["class_names"]),
        freeze_at=None if meta["freeze_at"] == -1 else meta["freeze_at"],
        min_size=meta["min_size"],
        max_size=meta["max_size"],
    )
    files.load_into(model, weights, meta["class_names"], strict=True)
    return model.eval()
