"""What a session has to know of a task: a handful of functions of the configuration."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from fvcore.common.config import CfgNode
from torch import nn

from tract_det.engine.run import Means
from tract_det.modeling.loading import LoadReport
from tract_det.modeling.weight_files import Weights

Meta = dict[str, Any]


class Split(Protocol):
    """The images of one part of a data set, with their classes."""

    @property
    def name(self) -> str:
        """For messages and file names."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """K names."""

    def __len__(self) -> int:
        """Number of images."""

    def first(self, count: int) -> "Split":
        """The first images, at most so many."""

    def fingerprint(self) -> str:
        """Equal for the same images with the same annotations, wherever they lie."""


class Evaluation(Protocol):
    """Evaluates a model on the evaluation split. Every rank must call it."""

    def __call__(self, model: nn.Module, average: nn.Module | None) -> Means:
        """The figures by name, of the model and of its moving average where there is one."""

    def report(
        self,
        model: nn.Module,
        average: nn.Module | None,
        output: Path,
        stopped: Mapping[str, Any] | None = None,
    ) -> Means:
        """The same; also prints the figures and writes `results.json` and its companions.

        `results.json` has `stopped`, where a training ended early and why, if it did.
        """


@dataclass(frozen=True)
class Plan:
    """The lengths of a run, in optimizer steps; a period of 0 means: only at the end."""

    max_iter: int
    milestones: Sequence[int]
    warmup_iters: int
    eval_period: int
    checkpoint_period: int


@dataclass(frozen=True)
class BuiltModel:
    """A network with its weights, and what training needs to know of it.

    Attributes:
        network: `network(images, targets)` gives losses by name, `network(images)` predictions.
        meta: saved with the weights; `pixel_mean` and `pixel_std` are in it.
        input_variance: of what the stem sees, in units of standardised pixels.
        report: which tensors came from MODEL.WEIGHTS; None where there are no weights.
        inner: the name of the submodule that is the model itself: its weights are saved, and
            MODEL.TRACT.STEM counts from it. "" = the whole network.
        memory_format: of the images, and of the weights where ZeRO does not flatten them.
        compile: compiles what is to be compiled of the network, in place; None = nothing.
    """

    network: nn.Module
    meta: Meta
    input_variance: float
    report: LoadReport | None
    inner: str = ""
    memory_format: torch.memory_format = torch.preserve_format
    compile: Callable[[], object] | None = None

    @property
    def model(self) -> nn.Module:
        """The submodule `inner`."""
        return self.network.get_submodule(self.inner)


@dataclass(frozen=True)
class Task:
    """The functions by which a detector's session differs from a classifier's.

    Attributes:
        check: refuses what this machine lacks, before anything is read.
        read_data: the training split and the evaluation split, with the same classes.
        read_evaluation_data: the evaluation split, given the classes that the weights know.
        read_weights: MODEL.WEIGHTS; None where it is empty.
        plan: the lengths of a run over so many training images.
        build_model: from the weights and the class names. `strict` (for evaluation): every tensor
            of the model must be in the weights.
        loader: this rank's micro-batches from a step on, given the model's meta.
        plain_images: the training images at these positions without random augmentation, each as a
            batch of one that the network takes, given the model's meta.
        evaluation: of the evaluation split, given the model's meta.
        defaults: the configuration's defaults.
        length: the keys, with their values, that make a run so many epochs of so many images long,
            and evaluate it at a period, in epochs.
        images_of: the images of a step, counted from 1, by their ids; None = the targets have them.
        closing: called with the loader when the training has ended.
    """

    check: Callable[[CfgNode], None]
    read_data: Callable[[CfgNode], tuple[Split, Split]]
    read_evaluation_data: Callable[[CfgNode, Sequence[str] | None], Split]
    read_weights: Callable[[CfgNode], Weights | None]
    plan: Callable[[CfgNode, int], Plan]
    build_model: Callable[[CfgNode, Weights | None, tuple[str, ...], bool], BuiltModel]
    loader: Callable[[CfgNode, Any, Meta, int], Iterable[Any]]
    plain_images: Callable[[CfgNode, Any, Meta, Sequence[int]], Iterable[Any]]
    evaluation: Callable[[CfgNode, Any, Meta, torch.device], Evaluation]
    defaults: Callable[[], CfgNode]
    length: Callable[[CfgNode, int, float, float], dict[str, Any]]
    images_of: Callable[[CfgNode, Any, int], list[str]] | None = None
    closing: Callable[[Any], None] = lambda loader: None
