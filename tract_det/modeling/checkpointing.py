"""Activation checkpointing: a stage keeps its input, and computes the rest again in backward."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import VGG, ResNet, VisionTransformer

from tract_det.errors import UserError


class CheckpointedSequential(nn.Sequential):
    """`nn.Sequential` whose `spans` of layers keep their input alone in training.

    Attributes:
        spans: first layer and the one after the last, each; the layers between the spans keep their
            activations.
    """

    spans: tuple[tuple[int, int], ...] = ()

    def forward(self, input: Tensor) -> Tensor:
        """The parent's."""
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(input)
        done, layers = 0, list(self)
        for start, stop in self.spans:
            input = _run(layers[done:start], input)
            part = layers[start:stop]
            input = checkpoint(
                partial(_run, part), input, use_reentrant=False, context_fn=partial(_contexts, part)
            )
            done = stop
        return _run(layers[done:], input)


def _run(layers: list[nn.Module], input: Tensor) -> Tensor:
    for layer in layers:
        input = layer(input)
    return input


def _contexts(
    layers: list[nn.Module],
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Those of the forward pass and of its repetition."""
    return nullcontext(), _without_counting(layers)


@contextmanager
def _without_counting(layers: list[nn.Module]) -> Iterator[None]:
    """Batch norms leave their running statistics as they are: these have seen the batch already."""
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
    """The blocks up to each pooling. The stem and its activation stay out: TrAct sums once."""
    start = next(i for i, layer in enumerate(features) if isinstance(layer, nn.ReLU)) + 1
    ends = [i + 1 for i, layer in enumerate(features) if isinstance(layer, nn.MaxPool2d)]
    return tuple(zip([start, *ends[:-1]], ends, strict=True))


def checkpoint_activations(model: nn.Module, name: str) -> None:
    """Makes one of torchvision's classifiers checkpoint its activations, in place.

    ResNets and ViTs keep the input of each block, VGGs that of each stage, other models that of
    each part of their `features`. The stem is never run twice. Keys, outputs, gradients and batch
    norm statistics stay as they are.

    Raises:
        UserError: the model has none of these.
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
