"""Reading and augmenting images to classify against plain PIL + torchvision, in one run.

    python benchmarks/data.py
    python benchmarks/data.py --images FOLDER --workers 2 --rounds 8

Large images: JPEG files of 500 x 375 pixels (made up, or those under FOLDER), random resized crop
of 224, mirroring, standardising. Small images: 32 x 32 pixels in memory, padding by 4, random crop,
mirroring, standardising. All pipelines of a table take turns, so that a disturbance of the machine
meets all of them; the medians of the rounds are compared. OpenCV and simplejpeg are measured where
they are installed.
"""

import argparse
import importlib.util
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as v1
from torchvision.transforms import v2

from tract_det.cli import run
from tract_det.commands.bench import print_and_keep
from tract_det.data.classification import ClassificationDataset, ClassificationSplit
from tract_det.data.classification_loaders import classification_loader
from tract_det.data.classification_transforms import classification_train
from tract_det.data.images import read_rgb
from tract_det.errors import UserError
from tract_det.pixels import IMAGENET_MEAN as MEAN
from tract_det.pixels import IMAGENET_STD as STD

SIZE = 224
NORMALIZE = ([m / 255 for m in MEAN], [s / 255 for s in STD])
PLAIN = "plain: PIL + torchvision v1"
Pipelines = dict[str, Callable[[int, int], Iterator[Any]]]


class Pairs(Dataset):
    """(image, 0) of what `read` makes of every item."""

    def __init__(self, items: Any, read: Callable[[Any], Any], transform: Any) -> None:
        self.items, self.read, self.transform = items, read, transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.read(self.items[index])), 0


class Draft:
    """Pillow decodes at a half, a quarter or an eighth where the crop has still `SIZE` pixels."""

    def __init__(self) -> None:
        self.crop = v1.RandomResizedCrop(SIZE)
        self.rest = v1.Compose([v1.RandomHorizontalFlip(), v1.ToTensor(), v1.Normalize(*NORMALIZE)])

    def __call__(self, path: Path) -> torch.Tensor:
        """(3, SIZE, SIZE) float32."""
        with Image.open(path) as image:
            width, height = image.size
            whole = torch.empty(1, height, width)
            top, left, h, w = self.crop.get_params(whole, self.crop.scale, self.crop.ratio)
            factor = max(1, min(h, w) // SIZE)
            image.draft("RGB", (width // factor, height // factor))
            scale = image.size[0] / width
            edges = (left * scale, top * scale, (left + w) * scale, (top + h) * scale)
            part = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR, edges)
        return self.rest(part)


def read_pillow(path: Path) -> Image.Image:
    """As torchvision's ImageFolder."""
    with Image.open(path) as image:
        return image.convert("RGB")


def pillow_tensor(path: Path) -> torch.Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(np.array(read_pillow(path))).permute(2, 0, 1)


def opencv_tensor(path: Path) -> torch.Tensor:
    """(3, H, W) uint8."""
    import cv2

    bgr = cv2.imread(str(path))
    assert bgr is not None, path
    return torch.from_numpy(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)).permute(2, 0, 1)


def simplejpeg_tensor(path: Path) -> torch.Tensor:
    """(3, H, W) uint8; libjpeg-turbo without anything around it."""
    import simplejpeg

    return torch.from_numpy(simplejpeg.decode_jpeg(path.read_bytes())).permute(2, 0, 1)


def itself(item: Any) -> Any:
    """No reading."""
    return item


def endless(items: Any, read: Any, transform: Any, workers: int, batch: int) -> Iterator[Any]:
    """A shuffled DataLoader, over and over."""
    loader = DataLoader(
        Pairs(items, read, transform),
        batch,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        prefetch_factor=4 if workers else None,
        persistent_workers=workers > 0,
    )
    while True:
        yield from loader


def ours(split: ClassificationSplit, transform: Any, workers: int, batch: int) -> Iterator[Any]:
    """This project's, as `tools/pretrain_net.py` has it."""
    dataset = ClassificationDataset(split, transform)
    yield from classification_loader(dataset, micro_batch=batch, seed=0, num_workers=workers)


def make_photographs(folder: Path, count: int) -> list[Path]:
    """JPEG files of 500 x 375 pixels with a photograph's 1/f spectrum and a little noise."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(375)[:, None], np.fft.rfftfreq(500)[None])
    paths = []
    for i in range(count):
        spectrum = np.fft.rfft2(rng.normal(size=(3, 375, 500))) / frequency.clip(1 / 500)
        planes = np.fft.irfft2(spectrum, s=(375, 500))
        grey, colours = planes[:1], planes * 0.3  # colour varies less than brightness
        pixels = (grey + colours) / planes.std() * 45 + rng.normal(scale=2, size=planes.shape) + 118
        paths.append(folder / f"{i:04d}.jpg")
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
        image.save(paths[-1], quality=90)
    return paths


def large_images(paths: list[Path]) -> Pipelines:
    """The pipelines for JPEG files."""
    steps = [v1.RandomResizedCrop(SIZE), v1.RandomHorizontalFlip()]
    plain = v1.Compose([*steps, v1.ToTensor(), v1.Normalize(*NORMALIZE)])
    library = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(*NORMALIZE),
        ]
    )
    transform = classification_train(SIZE, mean=MEAN, std=STD)
    files = np.array([os.fsencode(path) for path in paths])
    labels = np.zeros(len(paths), dtype=np.int64)
    split = ClassificationSplit(
        "made", ("image",), labels, np.arange(len(paths)), Path(), files=files
    )
    loaders: Pipelines = {
        PLAIN: partial(endless, paths, read_pillow, plain),
        "tract_det": partial(ours, split, transform),
        "torchvision.io + v2's own steps": partial(endless, paths, read_rgb, library),
        "PIL + tract_det's steps": partial(endless, paths, pillow_tensor, transform),
        "PIL at 1/2, 1/4, 1/8 + v1": partial(endless, paths, itself, Draft()),
    }
    for module, name, read in (
        ("cv2", "OpenCV + tract_det's steps", opencv_tensor),
        ("simplejpeg", "simplejpeg + tract_det's steps", simplejpeg_tensor),
    ):
        if importlib.util.find_spec(module):
            loaders[name] = partial(endless, paths, read, transform)
    return loaders


def small_images(count: int) -> Pipelines:
    """The pipelines for 32 x 32 pixels in memory."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    flip, normalize = v1.RandomHorizontalFlip(), v1.Normalize(*NORMALIZE)
    plain = v1.Compose([v1.RandomCrop(32, padding=4), flip, v1.ToTensor(), normalize])
    labels = np.zeros(count, dtype=np.int64)
    split = ClassificationSplit("made", ("image",), labels, np.arange(count), Path(), pixels=pixels)
    return {
        PLAIN: partial(endless, pixels, Image.fromarray, plain),
        "tract_det": partial(ours, split, classification_train(32, crop="pad", mean=MEAN, std=STD)),
    }


def rate(pipeline: Iterator[Any], batches: int, warm: int) -> float:
    """Images a second, from the arrival of one batch to that of another.

    Readers work side by side: both batches are the last of a round of theirs.
    """
    for _ in islice(pipeline, warm):
        pass
    began = time.perf_counter()
    images = sum(len(batch[0]) for batch in islice(pipeline, batches))
    return images / (time.perf_counter() - began)


def measure(pipelines: Pipelines, workers: int, batch: int, batches: int, rounds: int) -> list[str]:
    """A table's lines. Readers start anew for every turn, so that none reads in another's."""
    rates: dict[str, list[float]] = {name: [] for name in pipelines}
    turn = max(1, workers)
    for _ in range(rounds):
        for name, start in pipelines.items():
            pipeline = start(workers, batch)
            rates[name].append(rate(pipeline, batches * turn, turn))
            del pipeline
    plain = statistics.median(rates[PLAIN])
    lines = []
    for name, seen in rates.items():
        middle = statistics.median(seen)
        spread = f"{min(seen):.0f} to {max(seen):.0f}"
        lines.append(f"  {name:34}{middle:8.0f} images/s ({spread})  ratio {middle / plain:.2f}")
    return lines


def report(args: argparse.Namespace, paths: list[Path]) -> Iterator[str]:
    """The whole output, as it is measured."""
    cores = len(os.sched_getaffinity(0))
    yield f"{platform.processor() or platform.machine()}, {cores} cores, medians of {args.rounds}"
    versions = f"torchvision {torchvision.__version__}, Pillow {PIL.__version__}"
    yield f"Python {platform.python_version()}, torch {torch.__version__}, {versions}"
    with Image.open(paths[0]) as image:
        width, height = image.size
    size = f"{'the first ' if args.images else ''}{width} x {height}"
    yield f"{len(paths)} JPEG files ({size}) to {SIZE}, {args.workers} readers"
    yield from measure(large_images(paths), args.workers, args.batch, args.batches, args.rounds)
    for workers in (0, 1):
        yield f"32 x 32 in memory, {workers} readers"
        yield from measure(small_images(10_000), workers, 128, 40, args.rounds)


def main(argv: list[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="JPEG files to read")
    parser.add_argument("--workers", type=int, default=2, help="readers of the large images")
    parser.add_argument("--batch", type=int, default=32, help="large images")
    parser.add_argument("--batches", type=int, default=6, help="of each reader in a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write what is printed")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        if args.images:
            paths = sorted(
                p for p in args.images.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg")
            )
        else:
            paths = make_photographs(Path(made), 256)
        if len(paths) < args.batch:
            raise UserError(f"{args.images}: {len(paths)} JPEG files, a batch takes {args.batch}")
        print_and_keep(report(args, paths), args.output)


if __name__ == "__main__":
    run(main)
