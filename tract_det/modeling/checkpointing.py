"""Activation checkpointing: a stage keeps only its input, and runs again in the backward pass."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import VGG, ResNet, VisionTransformer

from tract_det.errors import UserError


class CheckpointedSequential(nn.Sequential):
    """An `nn.Sequential` that checkpoints spans of its layers in training.

    Attributes:
        spans: `(start, stop)` indices of layers, in order. Layers outside of every span keep their
            activations.
    """

    spans: tuple[tuple[int, int], ...] = ()

    def forward(self, input: Tensor) -> Tensor:
        """The parent's output."""
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(input)
        position, layers = 0, list(self)
        for start, stop in self.spans:
            input = _run(layers[position:start], input)
            span = layers[start:stop]
            input = checkpoint(
                partial(_run, span), input, use_reentrant=False, context_fn=partial(_contexts, span)
            )
            position = stop
        return _run(layers[position:], input)


def _run(layers: list[nn.Module], input: Tensor) -> Tensor:
    for layer in layers:
        input = layer(input)
    return input


def _contexts(
    layers: list[nn.Module],
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of the forward pass, and of its repetition in the backward pass."""
    return nullcontext(), _frozen_statistics(layers)


@contextmanager
def _frozen_statistics(layers: list[nn.Module]) -> Iterator[None]:
    """Keeps the running statistics of batch norms: they have counted this batch already."""
    norms = [
        (module, module.momentum, module.num_batches_tracked)
        for layer in layers
        for module in layer.modules()
        if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm)
    ]
    for norm, _, _ in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, count in norms:
            norm.momentum, norm.num_batches_tracked = momentum, count


def _vgg_spans(features: nn.Sequential) -> tuple[tuple[int, int], ...]:
    """The layers up to each pooling, without the stem and its activation: the stem runs once."""
    start = next(i for i, layer in enumerate(features) if isinstance(layer, nn.ReLU)) + 1
    ends = [i + 1 for i, layer in enumerate(features) if isinstance(layer, nn.MaxPool2d)]
    return tuple(zip([start, *ends[:-1]], ends, strict=True))


def checkpoint_activations(model: nn.Module, name: str) -> None:
    """Makes one of torchvision's classifiers checkpoint its activations, in place.

    ResNets and ViTs keep the input of each block, VGGs of each stage, and other models of each part
    of their `features`. The stem never runs twice. Names, outputs, gradients and batch norm
    statistics do not change.

    Raises:
        UserError: the model has none of these parts.
    """
    if isinstance(model, VGG):
        stages = [(model.features, _vgg_spans(model.features))]
    else:
        first = 0
        if isinstance(model, ResNet):
            parts = [model.layer1, model.layer2, model.layer3, model.layer4]
        elif isinstance(model, VisionTransformer):
            parts = [model.encoder.layers]
        else:
            parts, first = [getattr(model, "features", None)], 1  # the stem is the first
        stages = [
            (part, tuple((i, i + 1) for i in range(first, len(part))))
            for part in parts
            if type(part) is nn.Sequential
        ]
    if not stages:
        raise UserError(f"MODEL.CHECKPOINTING True: {name} has no stages to checkpoint; set False")
    for part, spans in stages:
        part.__class__ = CheckpointedSequential
        part.spans = spans


def checkpoint_timm(model: Any, name: str) -> None:
    """Makes one of timm's classifiers checkpoint its activations, in place, as timm does it.

    Its batch norms then count every batch twice.

    Raises:
        UserError: timm does not checkpoint this model.
    """
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        raise UserError(
            f"MODEL.CHECKPOINTING True: timm does not checkpoint {name}; set False"
        ) from error
