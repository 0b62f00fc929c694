"""What TrAct costs on a GPU: the tests of CUDA, whole training steps, and the table of stems.

    tract-det bench gpu                                       # ten minutes; a page in benchmarks/
    tract-det bench gpu --minutes 3 --output gpu.md
    tract-det bench gpu --device cpu --small --output cpu.md  # that the program runs

Plain layer and TrAct layer take turns on the same tensors. A time is between two events of the
device's stream, so that what waits for the host counts; a ratio is the median over the turns of
(TrAct / plain of the same turn). Memory is the allocator's peak of a step above the plain one's.
What no time is left for, or no memory, is named as such.
"""

import argparse
import datetime
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from torch import Tensor, nn

from tract_det import apply_tract
from tract_det.cli import run
from tract_det.engine.provenance import hardware
from tract_det.errors import UserError
from tract_det.files import write_text
from tract_det.modeling.faster_rcnn import build_faster_rcnn

# Kernel, stride, padding, channels; image height and width; batches.
STEMS = {
    "7x7/2 -> 64, 224^2": ((7, 2, 3, 64), (224, 224), (2, 32, 256)),
    "3x3 -> 64, 224^2": ((3, 1, 1, 64), (224, 224), (2, 32, 256)),
    "3x3 -> 64, 32^2": ((3, 1, 1, 64), (32, 32), (128,)),
    "16x16/16 -> 384, 224^2": ((16, 16, 0, 384), (224, 224), (2, 32, 256)),
    "7x7/2 -> 64, 800 x 1333": ((7, 2, 3, 64), (800, 1333), (2, 16)),
    "3x3 -> 64, 600 x 1000": ((3, 1, 1, 64), (600, 1000), (2,)),
}
SMALL_STEMS = {"7x7/2 -> 64, 64^2": ((7, 2, 3, 64), (64, 64), (2, 4))}


class Mode(NamedTuple):
    """A precision and a memory format."""

    autocast: bool = False
    tf32: bool = False
    channels_last: bool = False


MODES = {
    "fp32": Mode(),
    "TF32": Mode(tf32=True),
    "bf16": Mode(autocast=True, tf32=True),
    "bf16, channels last": Mode(autocast=True, tf32=True, channels_last=True),
}


class Measured(NamedTuple):
    """Seconds of each turn, and the peak of the memory in bytes, of the two arms."""

    plain: list[float]
    tract: list[float]
    plain_peak: int
    tract_peak: int

    @property
    def ratio(self) -> float:
        """The median over the turns."""
        return statistics.median(t / p for t, p in zip(self.tract, self.plain, strict=True))


class Clock:
    """Times steps on a device, and knows when the time is up."""

    def __init__(self, device: torch.device, minutes: float) -> None:
        self.device = device
        self.end = time.monotonic() + 60 * minutes

    @property
    def is_over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self.end

    def seconds(self, step: Callable[[], object]) -> float:
        """Of one step."""
        if self.device.type != "cuda":
            began = time.perf_counter()
            step()
            return time.perf_counter() - began
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        step()
        events[1].record()
        events[1].synchronize()
        return events[0].elapsed_time(events[1]) / 1000

    def peak(self, step: Callable[[], object]) -> int:
        """Bytes that the allocator gives at most in one step; 0 on a CPU."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        step()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before


@contextmanager
def precision(mode: Mode) -> Iterator[None]:
    """TF32 for products and convolutions where the mode has it."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = mode.tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def autocast(mode: Mode, device: torch.device) -> AbstractContextManager[object]:
    """Bf16 where the mode has it."""
    return torch.autocast(device.type, torch.bfloat16) if mode.autocast else nullcontext()


def compare(
    clock: Clock, plain: Callable[[], object], tract: Callable[[], object], turns: int
) -> Measured:
    """The two steps in turns, after three to warm up."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns + 3):
        for arm, step in enumerate((plain, tract)):
            taken = clock.seconds(step)
            if turn >= 3:
                seconds[arm].append(taken)
    return Measured(*seconds, clock.peak(plain), clock.peak(tract))


# Stems


def stem_step(layer: nn.Module, images: Tensor, dZ: Tensor, mode: Mode) -> None:
    """A forward and a backward pass of one layer."""
    layer.zero_grad(set_to_none=True)
    with autocast(mode, images.device):
        Z = layer(images)
    Z.backward(dZ.to(Z.dtype))


def measure_stem(
    clock: Clock,
    layer: tuple[int, int, int, int],
    shape: tuple[int, int, int],
    mode: Mode,
    turns: int,
) -> Measured:
    """One row of the table of stems."""
    (kernel, stride, padding, channels), (batch, height, width) = layer, shape
    torch.manual_seed(0)
    images = torch.randn(batch, 3, height, width, device=clock.device)
    convs = [nn.Conv2d(3, channels, kernel, stride, padding, bias=False) for _ in range(2)]
    apply_tract(convs[1])
    form = torch.channels_last if mode.channels_last else torch.contiguous_format
    images = images.to(memory_format=form)
    convs = [conv.to(clock.device).to(memory_format=form) for conv in convs]
    with torch.no_grad(), autocast(mode, clock.device):
        dZ = torch.randn_like(convs[0](images))
    with precision(mode):
        plain, tract = (partial(stem_step, conv, images, dZ, mode) for conv in convs)
        return compare(clock, plain, tract, turns)


def stem_rows(clock: Clock, small: bool, turns: int) -> Iterator[str]:
    """The rows of the table of stems, the largest batches first."""
    stems = SMALL_STEMS if small else STEMS
    cases = [(name, batch) for name, (_, _, batches) in stems.items() for batch in batches]
    for name, batch in sorted(cases, key=lambda case: -case[1]):
        layer, size, _ = stems[name]
        for mode_name, mode in MODES.items():
            title = f"{batch} x {name}, {mode_name}"
            yield row(
                clock, title, partial(measure_stem, clock, layer, (batch, *size), mode, turns)
            )


# Whole steps


def classifier_step(
    name: str, batch: int, size: int, device: torch.device, *, tract: bool
) -> Callable[[], None]:
    """A training step of timm's classifier: bf16, channels last, SGD with momentum."""
    torch.manual_seed(0)
    images = torch.randn(batch, 3, size, size, device=device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (batch,), device=device)
    model = timm.create_model(name).to(device).to(memory_format=torch.channels_last)
    if tract:
        apply_tract(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    return step


def detector_step(
    backbone: str, batch: int, size: tuple[int, int], device: torch.device, *, tract: bool
) -> Callable[[], None]:
    """A training step of this project's Faster R-CNN on images of one size: bf16, SGD."""
    torch.manual_seed(0)
    height, width = size
    model = build_faster_rcnn(backbone=backbone, num_classes=20).to(device).train()
    if tract:
        apply_tract(model)
    corner = torch.rand(8, 2, device=device) * torch.tensor([width / 2, height / 2], device=device)
    boxes = torch.cat((corner, corner + torch.rand(8, 2, device=device) * height / 3 + 20), 1)
    images = [torch.rand(3, height, width, device=device) * 255 for _ in range(batch)]
    labels = torch.randint(1, 21, (8,), device=device)
    targets = [{"boxes": boxes, "labels": labels, "image_id": i} for i in range(batch)]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            loss = sum(model(images, targets).values())
        loss.backward()
        optimizer.step()

    return step


STEPS: dict[str, Callable[..., Callable[[], None]]] = {
    "ResNet-50, 256 x 224^2": partial(classifier_step, "resnet50", 256, 224),
    "ViT-S/16, 256 x 224^2": partial(classifier_step, "vit_small_patch16_224", 256, 224),
    "Faster R-CNN R-50-FPN, 2 x 800 x 1333": partial(detector_step, "resnet50_fpn", 2, (800, 1333)),
    "Faster R-CNN R-50-FPN, 4 x 800 x 1333": partial(detector_step, "resnet50_fpn", 4, (800, 1333)),
    "Faster R-CNN VGG-16, 2 x 600 x 1000": partial(detector_step, "vgg16", 2, (600, 1000)),
}
SMALL_STEPS: dict[str, Callable[..., Callable[[], None]]] = {
    "ResNet-18, 4 x 64^2": partial(classifier_step, "resnet18", 4, 64),
    "Faster R-CNN R-18-FPN, 1 x 64 x 96": partial(detector_step, "resnet18_fpn", 1, (64, 96)),
}


def measure_step(clock: Clock, make: Callable[..., Callable[[], None]], turns: int) -> Measured:
    """One row of the table of whole steps."""
    plain, tract = (make(clock.device, tract=arm) for arm in (False, True))
    return compare(clock, plain, tract, turns)


def step_rows(clock: Clock, small: bool, turns: int) -> Iterator[str]:
    """The rows of the table of whole steps."""
    for title, make in (SMALL_STEPS if small else STEPS).items():
        yield row(clock, title, partial(measure_step, clock, make, turns))


def row(clock: Clock, title: str, measure: Callable[[], Measured]) -> str:
    """A row of either table."""
    if clock.is_over:
        return f"| {title} | no time left | | | |"
    try:
        measured = measure()
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return f"| {title} | out of memory | | | |"
    plain, tract = (1000 * statistics.median(seconds) for seconds in measured[:2])
    more = (measured.tract_peak - measured.plain_peak) / 2**20
    line = f"| {title} | {plain:.3f} | {tract:.3f} | {measured.ratio:.3f} | {more:+.0f} |"
    print(line, flush=True)
    return line


# The page

HEAD = "| what | plain, ms | TrAct, ms | ratio | memory more, MiB |\n|---|---|---|---|---|\n"


def cuda_tests() -> str:
    """The last line of the suite's tests that need CUDA."""
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "tests/tract/test_cuda.py"]
    root = Path(__file__).resolve().parent.parent
    if not (root / "tests").is_dir():
        return "not run: this installation has no tests; run the program in a checkout"
    try:
        printed = subprocess.run(
            command, check=False, cwd=root, capture_output=True, text=True, timeout=180
        )
    except subprocess.TimeoutExpired:
        return "not finished in three minutes"
    lines = (printed.stdout + printed.stderr).strip().splitlines()
    return lines[-1] if lines else "nothing printed"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--minutes", type=float, default=9.0, help="after which nothing begins (9)")
    parser.add_argument("--turns", type=int, default=20, help="of each row (20)")
    parser.add_argument("--small", action="store_true", help="tiny cases: does the program run?")
    parser.add_argument("--output", metavar="FILE", help="default: benchmarks/gpu_<...>.md")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measures, prints and writes."""
    args = parse(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch sees no CUDA device: run this where there is one, or --device cpu")
    device = torch.device(args.device)
    clock = Clock(device, args.minutes)
    tests = cuda_tests() if device.type == "cuda" else "not run: on a CPU"
    # Whole steps first: they decide what a user notices.
    steps = list(step_rows(clock, args.small, args.turns))
    stems = list(stem_rows(clock, args.small, args.turns))
    today, card = datetime.date.today().isoformat(), hardware(device)
    command = " ".join(["tract-det bench gpu", *(sys.argv[1:] if argv is None else argv)])
    text = (
        f"# What TrAct costs on a GPU, {today}\n\n{card}. Python {platform.python_version()}, "
        f"torch {torch.__version__}, CUDA {torch.version.cuda}, lambda 0.1.\n\n`{command}`: "
        f"{args.turns} turns of plain and TrAct; medians of the times and of the ratios.\n\n"
        f"Tests of CUDA: {tests}.\n\n## Whole training steps, bf16\n\n{HEAD}"
        + "\n".join(steps)
        + f"\n\n## Stems, forward + backward\n\n{HEAD}"
        + "\n".join(stems)
        + "\n"
    )
    slug = "-".join(card.split()).replace("/", "-").lower()
    output = Path(args.output or f"benchmarks/gpu_{slug}_{today}.md")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, text)
    print(f"\n{text}\nwrote {output}")


if __name__ == "__main__":
    run(main)
