"""Loads weights into models: a classifier's into detectors and classifiers, a detector's into one.

Whatever does not fit is refused by name before the model is changed.
"""

import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn
from torchvision.models import VisionTransformer
from torchvision.models.vision_transformer import interpolate_embeddings

from tract_det.errors import UserError
from tract_det.modeling.backbones import VGGBackbone
from tract_det.modeling.channels import fit_channels
from tract_det.modeling.forms import State, to_timm, to_torchvision
from tract_det.modeling.weight_files import Weights


@dataclass(frozen=True)
class LoadReport:
    """The names of the tensors that were loaded, and of those that were not.

    Attributes:
        used: tensors of the file that are in the model now.
        random: tensors of the model that keep their values, since the file has none for them.
        left: tensors of the file that the model does not have.
        resampled: those of `used` that were resampled for another image size.
        widened: what was done to the stem for images of another number of channels; "" = nothing.
    """

    used: list[str]
    random: list[str]
    left: list[str]
    resampled: Sequence[str] = ()
    widened: str = ""

    def __str__(self) -> str:
        lines = [f"{len(self.used)} tensors used"]
        for label, keys in (
            ("stay random", self.random),
            ("left", self.left),
            ("resampled", self.resampled),
        ):
            if keys:
                names = ", ".join(keys[:6]) + (", ..." if len(keys) > 6 else "")
                lines.append(f"{len(keys)} {label} ({names})")
        return "; ".join([*lines, *[self.widened] * bool(self.widened)])


def load_into(
    detector: nn.Module, weights: Weights, class_names: Sequence[str], *, strict: bool = False
) -> LoadReport:
    """Copies weights into a detector, in place: a classifier's into its backbone, or a detector's.

    A stem for RGB is widened for a detector of other channels, by `channels.widened_stem`.

    Args:
        detector: as `build_faster_rcnn` makes it.
        weights: a ResNet or VGG with torchvision's names or timm's, or a detector of this project.
        class_names: the detector's classes. The box predictor of a detector with other classes is
            not loaded.
        strict: every tensor of the model must be in the file (for evaluation).

    Raises:
        UserError: the weights are of another architecture, norm or (strict) other classes.
    """
    if weights.is_detector:
        state = _detector_state(weights, class_names, strict)
    else:
        state = _classifier_state(weights, detector.get_submodule("backbone"), strict)
    state = {
        key: tensor
        for key, tensor in state.items()
        # VGG16_Weights.IMAGENET1K_FEATURES has no classifier and fills these tensors with NaN.
        if not (key.startswith("roi_heads.box_head.") and not tensor.isfinite().all())
    }
    model_state = detector.state_dict()
    _check_norm(model_state, state, weights, "MODEL.BACKBONE.NORM to BN, FrozenBN or SyncBN")
    _check_stem(model_state, state, weights)
    state, widened = (state, "") if strict else fit_channels(model_state, state)
    body = ("backbone.body.", "backbone.features.")
    needed = [key for key in model_state if strict or key.startswith(body)]
    _check_fit(
        model_state,
        state,
        weights,
        needed,
        missing="MODEL.BACKBONE.NAME and NORM",
        shape="MODEL.BACKBONE.NAME and DATASETS.CLASSES",
    )
    return replace(load_matching(detector, model_state, state), widened=widened)


def load_into_classifier(
    model: nn.Module, weights: Weights, class_names: Sequence[str] = (), *, strict: bool = False
) -> LoadReport:
    """Copies a classifier's weights into a classifier, in place.

    Position embeddings for another image size are resampled, as timm and torchvision do it. A stem
    for RGB is widened for a classifier of other channels, by `channels.widened_stem`.

    Args:
        model: as `build_classifier` makes it.
        weights: of the same architecture, with torchvision's names or timm's.
        class_names: of the data set. The head of weights for other classes is not loaded.
        strict: every tensor of the model must be in the file (for evaluation).

    Raises:
        UserError: the weights are a detector's, of another architecture, or (strict) other classes.
    """
    if weights.is_detector:
        raise UserError(
            f"MODEL.WEIGHTS {weights.source} is a whole detector: give a classifier's weights"
        )
    model_state = model.state_dict()
    state = to_torchvision(weights.state)
    if "pre_logits.fc1.weight" in model_state:
        state = to_timm(state)
    heads = _heads(model)
    in_head = tuple(f"{head}." for head in heads)
    if _has_other_classes(model_state, state, weights, class_names, in_head):
        if strict:
            raise _other_classes(weights, class_names)
        state = {key: tensor for key, tensor in state.items() if not key.startswith(in_head)}
    _check_norm(model_state, state, weights, "MODEL.NORM to BN or SyncBN")
    state, resampled = _fit_positions(model, model_state, state)
    state, widened = (state, "") if strict else fit_channels(model_state, state)
    tops = tuple(f"{head.split('.')[0]}." for head in heads)  # a VGG's fc6 and fc7 are in it
    needed = [key for key in model_state if strict or not key.startswith(tops)]
    keys = "MODEL.NAME, SMALL_IMAGES, NORM, PATCH_NORM and WIDTH"
    _check_fit(model_state, state, weights, needed, missing=keys, shape=f"{keys}, and INPUT.SIZE")
    return replace(load_matching(model, model_state, state, resampled), widened=widened)


def load_matching(
    model: nn.Module, model_state: State, state: State, resampled: Sequence[str] = ()
) -> LoadReport:
    """Copies the tensors whose names the model has, in place.

    Args:
        model: any module.
        model_state: the model's state dict.
        state: the tensors to copy; names that the model does not have are reported as `left`.
        resampled: for the report.
    """
    used = {key: tensor for key, tensor in state.items() if key in model_state}
    model.load_state_dict(used, strict=False)
    return LoadReport(
        used=list(used),
        random=[key for key in model_state if key not in used and not _is_counter(key)],
        left=[key for key in state if key not in model_state and not _is_counter(key)],
        resampled=resampled,
    )


def _is_counter(key: str) -> bool:
    """Batch norms count their batches; a file may lack the count."""
    return "num_batches_tracked" in key


def _detector_state(weights: Weights, class_names: Sequence[str], strict: bool) -> State:
    """A detector's tensors, without the box predictor of other classes."""
    trained = weights.meta.get("class_names")
    if trained is None or list(trained) == list(class_names):
        return weights.state
    if strict:
        raise UserError(
            f"MODEL.WEIGHTS {weights.source} detects {', '.join(trained)}; the data set's classes "
            f"are {', '.join(class_names)}: set DATASETS.CLASSES or other weights"
        )
    predictor = "roi_heads.box_predictor."
    return {key: tensor for key, tensor in weights.state.items() if not key.startswith(predictor)}


def _classifier_state(weights: Weights, backbone: nn.Module, strict: bool) -> State:
    """A classifier's tensors under the names that they have in a detector."""
    if strict:
        raise UserError(
            f"MODEL.WEIGHTS {weights.source} is a classifier: --eval-only takes a detector's"
        )
    state = to_torchvision(weights.state)
    return {_detector_key(key, backbone): tensor for key, tensor in state.items()}


def _detector_key(key: str, backbone: nn.Module) -> str:
    if not isinstance(backbone, VGGBackbone):
        return f"backbone.body.{key}"
    for index, layer in (("0", "fc6"), ("3", "fc7")):
        if key.startswith(f"classifier.{index}."):
            return key.replace(f"classifier.{index}.", f"roi_heads.box_head.{layer}.")
    return f"backbone.{key}"


def _check_norm(model_state: State, state: State, weights: Weights, mend: str) -> None:
    norms = [key for key in state if "running_mean" in key and not key.startswith("rpn.")]
    if norms and not any("running_mean" in key for key in model_state):
        raise UserError(f"MODEL.WEIGHTS {weights.source} was trained with batch norm: set {mend}")


def _check_stem(model_state: State, state: State, weights: Weights) -> None:
    key = "backbone.body.conv1.weight"
    if key not in model_state or key not in state:
        return
    if state[key].dim() == 4 and state[key].shape[-1] < model_state[key].shape[-1]:
        raise UserError(
            f"MODEL.WEIGHTS {weights.source} is a ResNet for small images, with a 3x3 stem and no "
            "pooling (MODEL.SMALL_IMAGES True); the detector's MODEL.BACKBONE.NAME has a 7x7 stem: "
            "pretrain with MODEL.SMALL_IMAGES False and larger images (INPUT.SIZE 64)"
        )


def _check_fit(
    model_state: State,
    state: State,
    weights: Weights,
    needed: Sequence[str],
    *,
    missing: str,
    shape: str,
) -> None:
    """Refuses weights that lack `needed` tensors, or have tensors of another shape.

    Args:
        model_state: the model's state dict.
        state: the tensors to load.
        weights: where they come from, for messages.
        needed: names that must be among them.
        missing: the configuration's keys to check when a tensor is missing, for the message.
        shape: the keys to check when a shape differs, likewise.
    """
    refusal = f"MODEL.WEIGHTS {weights.source} is not for this model"
    absent = [key for key in needed if key not in state and not _is_counter(key)]
    if absent:
        raise UserError(
            f"{refusal}: {len(absent)} of its tensors are missing, the first '{absent[0]}'; check "
            f"{missing}"
        )
    for key, tensor in state.items():
        if key in model_state and model_state[key].shape != tensor.shape:
            raise UserError(
                f"{refusal}: '{key}' is {tuple(tensor.shape)} in the file and "
                f"{tuple(model_state[key].shape)} in the model; check {shape}"
            )
        if key in model_state and not tensor.isfinite().all():
            raise UserError(
                f"MODEL.WEIGHTS {weights.source}: '{key}' has values that are not finite: the "
                "training that wrote the file has diverged, or it is damaged"
            )
    if deeper := _deeper_block(model_state, state, needed):
        raise UserError(f"{refusal}: it is deeper, with '{deeper}'; check {missing}")


def _deeper_block(model_state: State, state: State, body: Sequence[str]) -> str:
    """A tensor of a block that the model's stage lacks: ResNet-34's in a ResNet-18; "" if none.

    Args:
        model_state: the model's state dict.
        state: the tensors to load.
        body: names of the model's tensors that are not in its head.
    """
    blocks = {match.groups() for key in body if (match := _BLOCK.match(key))}
    stages = {stage for stage, _ in blocks}
    for key in state:
        match = _BLOCK.match(key)
        is_known = match is None or match[1] not in stages or match.groups() in blocks
        if key not in model_state and not is_known:
            return key
    return ""


# The stage and the number of the block that a tensor belongs to.
_BLOCK = re.compile(r"(.*?)\.(\d+)\.")


def _heads(model: nn.Module) -> list[str]:
    """The names of the layers that give the logits."""
    config = getattr(model, "pretrained_cfg", None)  # timm's
    head = config.get("classifier") if isinstance(config, Mapping) else None
    if head:
        return [head] if isinstance(head, str) else list(head)
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return layers[-1:]


def _has_other_classes(
    model_state: State,
    state: State,
    weights: Weights,
    class_names: Sequence[str],
    in_head: tuple[str, ...],
) -> bool:
    """By the names of the classes where they are known, else by their number."""
    trained = weights.meta.get("class_names")
    if trained and class_names:
        return list(trained) != list(class_names)
    shared = [key for key in state if key.startswith(in_head) and key in model_state]
    # A tensor without dimensions is not another number of classes: `_check_fit` refuses it.
    return any(state[key].dim() and len(state[key]) != len(model_state[key]) for key in shared)


def _other_classes(weights: Weights, class_names: Sequence[str]) -> UserError:
    trained = weights.meta.get("class_names")
    known = f"{', '.join(trained[:3])}, ..." if trained else "another number of classes"
    return UserError(
        f"MODEL.WEIGHTS {weights.source} knows other classes than the data set's "
        f"{len(class_names)} ({', '.join(class_names[:3])}, ...): {known}: set DATASETS.ROOT or "
        "other weights"
    )


def _fit_positions(model: nn.Module, model_state: State, state: State) -> tuple[State, list[str]]:
    """Resamples a ViT's position embeddings for the model's image size.

    Returns:
        The state dict, and the names of the resampled tensors: none or one.
    """
    is_torchvision = isinstance(model, VisionTransformer)
    key = "encoder.pos_embedding" if is_torchvision else "pos_embed"
    old, new = state.get(key), model_state.get(key)  # (1, tokens, channels)
    if old is None or new is None or old.shape == new.shape:
        return state, []
    if old.dim() != 3 or (old.shape[0], old.shape[2]) != (new.shape[0], new.shape[2]):
        return state, []  # for `_check_fit` to refuse
    if isinstance(model, VisionTransformer) and _is_square(old.shape[1] - 1):
        size, patch = model.image_size, model.patch_size
        return dict(interpolate_embeddings(size, patch, OrderedDict(state))), [key]
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    has_prefix = not getattr(model, "no_embed_class", False)
    prefix = getattr(model, "num_prefix_tokens", 1) if has_prefix else 0
    if is_torchvision or grid is None or not _is_square(old.shape[1] - prefix):
        return state, []
    from timm.layers import resample_abs_pos_embed  # a detector does not need timm

    resampled = resample_abs_pos_embed(old, list(grid), num_prefix_tokens=prefix)
    return {**state, key: resampled}, [key]


def _is_square(number: int) -> bool:
    return number >= 0 and math.isqrt(number) ** 2 == number
