"""What TrAct costs: stem forward + backward against the plain layer and torch_tract, in one run.

    python benchmarks/stem.py              # prints the table, writes it to benchmarks/
    python benchmarks/stem.py --device cuda --repeats 50
    python benchmarks/stem.py --stems 3x3-vgg 16x16-vit --no-memory

The layers take turns, so that a disturbance of the machine meets them all. A ratio is the median
over the turns of (layer / plain layer of the same turn). Memory is the peak of a process that knows
that layer alone, above that of the plain one. The input is noise with a photograph's spectrum,
standardised; the error is the residual `||g (G + lambda I) - dZ^T X|| / ||dZ^T X||` in float64.
"""

import argparse
import datetime
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tract_det import TrActConv2d
from tract_det.cli import run
from tract_det.engine.provenance import hardware
from tract_det.errors import UserError
from tract_det.files import write_text


class Stem(NamedTuple):
    """A first layer and its input."""

    title: str
    out_channels: int
    kernel: int
    stride: int
    padding: int
    bias: bool
    shape: tuple[int, int, int]  # batch, height, width


STEMS = {
    "7x7-resnet": Stem("7x7/2, 3->64, 16 x 224^2 (ResNet)", 64, 7, 2, 3, False, (16, 224, 224)),
    "3x3-vgg": Stem("3x3, 3->64, 16 x 224^2 (VGG)", 64, 3, 1, 1, True, (16, 224, 224)),
    "3x3-cifar": Stem("3x3, 3->64, 128 x 32^2 (CIFAR)", 64, 3, 1, 1, False, (128, 32, 32)),
    "16x16-vit": Stem("16x16/16, 3->384, 16 x 224^2 (ViT-S)", 384, 16, 16, 0, True, (16, 224, 224)),
    "7x7-detection": Stem("7x7/2, 2 x 608 x 800 (detection)", 64, 7, 2, 3, False, (2, 608, 800)),
    "3x3-detection": Stem("3x3, 2 x 608 x 800 (detection)", 64, 3, 1, 1, True, (2, 608, 800)),
    "7x7-large": Stem("7x7/2, 3->64, 256 x 224^2", 64, 7, 2, 3, False, (256, 224, 224)),
    "3x3-large": Stem("3x3, 3->64, 256 x 224^2", 64, 3, 1, 1, True, (256, 224, 224)),
}
TIMED = [name for name in STEMS if not name.endswith("-large")]
LAMBDA = 0.1


def photo_like(shape: tuple[int, ...]) -> Tensor:
    """Standardised noise with a 1/f spectrum."""
    height, width = shape[-2:]
    fy, fx = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]
    falloff = 1 / (fy**2 + fx**2).sqrt().clamp(min=1 / max(height, width))
    images = torch.empty(shape)
    for image in images:  # one by one: the memory of the transform is not what is measured
        noise = torch.fft.rfft2(torch.randn(image.shape)) * falloff
        pixels = torch.fft.irfft2(noise, s=(height, width))
        image.copy_((pixels - pixels.mean()) / pixels.std())
    return images


def build(arm: str, stem: Stem) -> nn.Module:
    """The layer of an arm: "plain", "torch_tract" or "tract_det"."""
    torch.manual_seed(0)
    keywords: dict[str, Any] = {
        "kernel_size": stem.kernel,
        "stride": stem.stride,
        "padding": stem.padding,
        "bias": stem.bias,
    }
    if arm == "tract_det":
        return TrActConv2d(3, stem.out_channels, **keywords, lambda_=LAMBDA)
    conv = nn.Conv2d(3, stem.out_channels, **keywords)
    if arm == "plain":
        return conv
    import torch_tract

    return torch_tract.TrAct(conv, l=LAMBDA)


def step(layer: nn.Module, images: Tensor, dZ: Tensor) -> float:
    """Seconds of a forward and backward pass."""
    layer.zero_grad(set_to_none=True)
    synchronize(images.device)
    began = time.perf_counter()
    layer(images).backward(dZ)
    synchronize(images.device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    """Waits for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tensors(stem: Stem, device: torch.device) -> tuple[Tensor, Tensor]:
    """The images, and a gradient by the layer's output."""
    torch.manual_seed(1)
    batch, height, width = stem.shape
    images = photo_like((batch, 3, height, width)).to(device)
    size = [(n + 2 * stem.padding - stem.kernel) // stem.stride + 1 for n in (height, width)]
    return images, torch.randn(batch, stem.out_channels, *size, device=device)


def time_stem(
    arms: list[str], stem: Stem, device: torch.device, repeats: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each turn, and the residual, of each arm."""
    images, dZ = tensors(stem, device)
    layers = {arm: build(arm, stem).to(device) for arm in arms}
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for turn in range(repeats + 2):
        for arm, layer in layers.items():
            taken = step(layer, images, dZ)
            if turn >= 2:
                seconds[arm].append(taken)
    gradients = {arm: next(layer.parameters()).grad for arm, layer in layers.items()}
    return seconds, residuals(gradients, stem, images, dZ)


def residuals(
    gradients: dict[str, Tensor | None], stem: Stem, images: Tensor, dZ: Tensor
) -> dict[str, float]:
    """Of each arm but the plain one, against float64 and unfolded patches."""
    K = 3 * stem.kernel**2
    total = torch.zeros(K, K, dtype=torch.float64)
    plain = torch.zeros(stem.out_channels, K, dtype=torch.float64)
    count = 0
    for image, z in zip(images.cpu(), dZ.cpu(), strict=True):
        X = F.unfold(image[None].double(), stem.kernel, 1, stem.padding, stem.stride)[0]
        total += X @ X.T
        plain += z.flatten(1).double() @ X.T
        count += X.shape[1]
    damped = total / count + LAMBDA * torch.eye(K, dtype=torch.float64)
    by_arm = {}
    for arm, gradient in gradients.items():
        if arm != "plain" and gradient is not None:
            solved = gradient.cpu().double().flatten(1)
            by_arm[arm] = float((solved @ damped - plain).norm() / plain.norm())
    return by_arm


def peak_memory(arm: str, name: str, device: torch.device) -> float:
    """MiB that two steps take at most, the images and `dZ` included. For a process of its own."""
    images, dZ = tensors(STEMS[name], device)
    layer = build(arm, STEMS[name]).to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(2):
        step(layer, images, dZ)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # Not getrusage, whose figure a new process takes over from the one that started it.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


def peak_memory_apart(arm: str, name: str, device: torch.device, threads: int) -> float:
    """`peak_memory`, in a process of its own."""
    command = [sys.executable, __file__, "--measure", arm, name, "--device", str(device)]
    done = subprocess.run(
        [*command, "--threads", str(threads)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"measuring {arm} on {name} failed: {done.stderr.strip()[-300:]}")
    return float(done.stdout.split()[-1])


def table(header: list[str], rows: list[list[str]]) -> str:
    """In Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def measure(arms: list[str], names: list[str], args: argparse.Namespace) -> str:
    """The tables, in Markdown."""
    device, others = torch.device(args.device), [arm for arm in arms if arm != "plain"]
    times, memory = [], []
    for name in names:
        stem = STEMS[name]
        if name in TIMED:
            seconds, errors = time_stem(arms, stem, device, args.repeats)
            row = [stem.title, f"{statistics.median(seconds['plain']) * 1e3:.1f}"]
            for arm in others:
                ratios = [a / b for a, b in zip(seconds[arm], seconds["plain"], strict=True)]
                row += [f"{statistics.median(ratios):.2f}", f"{errors[arm]:.0e}"]
            times.append(row)
            print("  ".join(row), flush=True)
        if args.memory:
            plain, *used = (peak_memory_apart(a, name, device, args.threads) for a in arms)
            memory.append([stem.title, f"{plain:.0f}", *(f"{m - plain:+.0f}" for m in used)])
            print("  ".join(memory[-1]), flush=True)
    tables = []
    if times:
        columns = [f"{arm}{what}" for arm in others for what in (", ratio", ", residual")]
        tables.append(table(["stem, input", "plain, ms", *columns], times))
    if memory:
        columns = [f"{arm}, above it" for arm in others]
        tables.append(table(["stem, input", "plain, peak MiB", *columns], memory))
    return "\n\n".join(tables) + "\n"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=15, help="turns of each layer")
    parser.add_argument("--stems", nargs="+", choices=STEMS, default=list(STEMS))
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--output", metavar="FILE", help="default: benchmarks/tract_<...>.md")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measures, prints and writes."""
    args = parse(argv)
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    if args.measure:
        arm, name = args.measure
        print(peak_memory(arm, name, device))
        return
    try:
        import torch_tract  # noqa: F401

        arms = ["plain", "torch_tract", "tract_det"]
    except ImportError:
        print("torch_tract is not installed, so it is left out: pip install torch-tract")
        arms = ["plain", "tract_det"]
    today = datetime.date.today().isoformat()
    kind = "cuda" if device.type == "cuda" else f"{args.threads}-threads"
    output = Path(args.output or f"benchmarks/tract_{kind}_{today}.md")
    command = " ".join(["python benchmarks/stem.py", *(argv or sys.argv[1:])])
    head = (
        f"# What TrAct costs, {today}\n\n{hardware(device)}. Python "
        f"{platform.python_version()}, torch {torch.__version__}, float32, lambda {LAMBDA}.\n\n"
        f"`{command}`: stem forward + backward, {args.repeats} turns of each layer after two to "
        "warm up; ratio to the plain layer, median over the turns; residual of the gradient "
        "against float64; peak memory of a process.\n\n"
    )
    text = head + measure(arms, args.stems, args)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, text)
    print(f"\n{text}\nwrote {output}")


if __name__ == "__main__":
    run(main)
