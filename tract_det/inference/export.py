"""Writes models as ONNX, TorchScript or `torch.export` files, which need none of this project."""

import importlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tract_det.errors import UserError
from tract_det.files import atomically
from tract_det.inference.models import Classifier, Detector
from tract_det.modeling.graphs import ClassifierGraph, DetectorGraph, Size
from tract_det.version import __version__

Run = Callable[[Tensor], tuple[Tensor, ...]]  # an exported file in use

METADATA = "tract_det.json"  # in the files of torch; ONNX has a place of its own
_EXAMPLE = (160, 192)  # height and width of the image that a graph of any size is made with
# The shortest side of an image, pixels: torch.export takes sizes of 1 for constants, and a deepest
# feature map has that size for a side of up to 64 pixels, after the resizing.
_SMALLEST = 65
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Export:
    """What goes into a file.

    Attributes:
        graph: on the CPU, in evaluation mode.
        example: an input.
        inputs: their names.
        outputs: likewise.
        dynamic: for each dimension of the input that is not fixed, by its number, the least size.
        metadata: by name, plain values.
    """

    graph: nn.Module
    example: Tensor
    inputs: Sequence[str]
    outputs: Sequence[str]
    dynamic: Mapping[int, int]
    metadata: Mapping[str, Any]


def check_installed(form: str) -> None:
    """Refuses ONNX where its packages are not there.

    Raises:
        UserError: says how to install them.
    """
    for name in _ONNX_PACKAGES if form == "onnx" else ():
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise UserError(
                f"--format onnx needs {name}, which is not installed: pip install "
                "'tract-det[export]'"
            ) from error


def of(model: Detector | Classifier, form: str, size: Size | None) -> Export:
    """The export of a model; `modeling.graphs` says what it takes and gives.

    Args:
        model: on the CPU; a detector is one of torchvision's.
        form: one of `choices.EXPORT_FORMATS`; a detector's `torchscript` needs a size.
        size: height and width of all of a detector's images, pixels; None = any.
    """
    if isinstance(model, Detector):
        return _of_detector(model, size)
    return _of_classifier(model, form)


def _of_detector(detector: Detector, size: Size | None) -> Export:
    height, width = size or _EXAMPLE
    generator, channels = torch.Generator().manual_seed(0), detector.channels
    image = torch.randint(0, 256, (channels, height, width), dtype=torch.uint8, generator=generator)
    detector.detect([image])  # its pooling learns the scales of its levels
    graph = DetectorGraph(detector.network, size)  # type: ignore[arg-type]
    in_words = "of any size" if size is None else f"of {height} x {width} pixels (height x width)"
    metadata = {
        "task": "detection",
        "input": f"image: uint8 ({channels}, H, W), {_order(channels)}0 to 255, one image "
        f"{in_words}, as it is: it is resized and standardised within",
        "output": "boxes: float32 (n, 4), xyxy in pixels of the image; labels: int64 (n,), from 0, "
        "of class_names; scores: float32 (n,), falling",
        "size": "any" if size is None else [height, width],
    }
    return Export(
        graph,
        image,
        ("image",),
        ("boxes", "labels", "scores"),
        {1: _SMALLEST, 2: _SMALLEST} if size is None else {},
        {**metadata, **_common(detector)},
    )


def _of_classifier(classifier: Classifier, form: str) -> Export:
    side, is_batched = classifier.meta["image_size"], form != "torchscript"
    channels = classifier.channels
    to_input = classifier.to_input
    graph = ClassifierGraph(
        classifier.network,
        to_input.mean,
        to_input.std,
        has_sigmoid=classifier.meta["loss"] == "bce",
    )
    images = torch.zeros(2 if is_batched else 1, channels, side, side, dtype=torch.uint8)
    batch = "any number of them" if is_batched else "one of them, B = 1"
    metadata = {
        "task": "classification",
        "input": f"images: uint8 (B, {channels}, {side}, {side}), {_order(channels)}0 to 255, "
        f"{batch}: the shorter side resized to {classifier.meta['resize'] or 'no other size'} "
        f"({classifier.meta['interpolation']}, antialiased), then the center of {side} x {side}; "
        "standardised within",
        "output": "probabilities: float32 (B, K), in the order of class_names",
        "size": [side, side],
    }
    return Export(
        graph.eval(),
        images,
        ("images",),
        ("probabilities",),
        {0: 1} if is_batched else {},
        {**metadata, **_common(classifier)},
    )


def _order(channels: int) -> str:
    return "RGB, " if channels == 3 else ""


def _common(model: Detector | Classifier) -> dict[str, Any]:
    return {
        "producer": f"tract_det {__version__}",
        "class_names": list(model.class_names),
        "pixel_mean": list(model.meta["pixel_mean"]),
        "pixel_std": list(model.meta["pixel_std"]),
    }


def write(export: Export, form: str, path: Path) -> None:
    """Writes the file.

    Args:
        export: what goes into it.
        form: one of `choices.EXPORT_FORMATS`.
        path: the file.

    Raises:
        UserError: the model has operations that the format lacks, or the file cannot be written.
    """
    writers = {"onnx": _write_onnx, "torchscript": _write_torchscript, "pt2": _write_pt2}
    with _quiet(), torch.no_grad():
        save = writers[form](export)
        atomically(path, save)


def _write_torchscript(export: Export) -> Callable[[Path], object]:
    trace = torch.jit.trace(export.graph, (export.example,), check_trace=False)
    extra = {METADATA: json.dumps(export.metadata)}
    return lambda path: torch.jit.save(trace, str(path), _extra_files=extra)


def _program(export: Export) -> torch.export.ExportedProgram:
    auto = torch.export.Dim.DYNAMIC
    shapes = {axis: auto(min=least) for axis, least in export.dynamic.items()}
    try:
        return torch.export.export(
            export.graph, (export.example,), dynamic_shapes=(shapes or None,), strict=False
        )
    except Exception as error:  # of many classes, with pages of advice
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise UserError(
            f"torch.export cannot follow this model ({reason}): give --format torchscript"
        ) from error


def _write_pt2(export: Export) -> Callable[[Path], object]:
    program = _program(export)
    extra = {METADATA: json.dumps(export.metadata)}
    return lambda path: torch.export.save(program, path, extra_files=extra)


def _write_onnx(export: Export) -> Callable[[Path], object]:
    program = torch.onnx.export(
        _program(export),
        (export.example,),
        dynamo=True,
        input_names=export.inputs,
        output_names=export.outputs,
        verbose=False,
    )
    assert program is not None
    for key, value in export.metadata.items():
        text = value if isinstance(value, str) else json.dumps(value)
        program.model.metadata_props[key] = text
    return program.save


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' warnings of what they will change in themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def reader(form: str, path: Path) -> Run:
    """The exported file in its own runtime, on the CPU.

    Returns:
        What runs it on an input. It raises a UserError if the file refuses the input.
    """
    run_it = _onnx_session(path) if form == "onnx" else _torch_program(form, path)

    def run(image: Tensor) -> tuple[Tensor, ...]:
        try:
            return run_it(image)
        except Exception as error:  # of many classes
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{path} refuses an input of shape {tuple(image.shape)} ({reason}): export it with "
                "--size, or in another format"
            ) from error

    return run


def _onnx_session(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda image: tuple(map(torch.from_numpy, session.run(None, {name: image.numpy()})))


def _torch_program(form: str, path: Path) -> Run:
    with _quiet():
        program: Any = (
            torch.jit.load(str(path)) if form == "torchscript" else torch.export.load(path).module()
        )

    def run(image: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            outputs = program(image)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    return run
