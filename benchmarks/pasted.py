r"""Makes a detection set of natural pixels that can be varied in one thing at a time.

    tract-det bench pasted OUTPUT --pictures CIFAR10 --photographs FOLDER
    tract-det bench pasted OUTPUT --pictures CIFAR10 --photographs FOLDER --contrast 0.3
    tract-det train --config-file quickstart/shapes.yaml --arm plain DATASETS.ROOT OUTPUT \
        DATASETS.TRAIN "[train]" DATASETS.TEST "[test]" OUTPUT_DIR output/pasted

Pictures of an image folder (CIFAR10/train/<class>/*.jpg and CIFAR10/test/<class>/*.jpg) are pasted
on crops of photographs (.jpg and .png below FOLDER): a picture's class is the object's class, its
edges are the box. Test images use test pictures, and every fifth photograph, which no training
image uses. OUTPUT is a tree in VOC layout with the splits `train` and `test`.

What the options of the second group change is all they change. Classes, pictures, places, sizes,
photographs and their crops are a function of the seed, the split, the image's number, --size,
--objects, --object-size and the two folders. So two sets differ in --contrast alone if their
commands do, and a set with fewer images is the beginning of one with more.

Images are made in floating point, in this order: paste, --smooth, --colour, --contrast,
--brightness; then they are rounded to 8 bits once, and stored as PNG, which keeps that. Contrast is
scaled about mid-grey, by the same map for every image: but for rounding and padding a first layer
could undo it, so that what differs is how it learns. Values beyond black and white are clipped;
their share is printed. The trainer standardises pixels with MODEL.PIXEL_MEAN and MODEL.PIXEL_STD,
which do not follow the set. Pictures of 32 x 32 pixels have no finer detail than that, however
large they are pasted.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2.functional import gaussian_blur

from tract_det.cli import run
from tract_det.data.classification import ClassificationSplit, read_classification
from tract_det.data.images import read_rgb
from tract_det.data.shapes import SHAPES_CLASSES, draw_background, paint_shape, place_shape
from tract_det.data.voc_tree import TreeObject, add_image, add_split, new_tree
from tract_det.errors import UserError

# Part of the settings: raise it whenever the images change.
VERSION = 1
SETTINGS = "pasted.json"
SPLITS = ("train", "test")
SUFFIXES = (".jpg", ".jpeg", ".png")
# Two objects share at most this part of the smaller one.
OVERLAP = 0.15
TRIES = 50  # for each object, before an image has one less
LUMA = (0.299, 0.587, 0.114)
MAX_ROTATION = 0.35  # of drawn shapes, in radians
# What the random numbers of a stream decide.
PLACES, BACKGROUND, SHAPE = range(3)


class Sources(NamedTuple):
    """What one split's images are made of.

    Attributes:
        pictures: To paste; None if shapes are drawn instead.
        photographs: For the background; empty if it is drawn.
    """

    pictures: ClassificationSplit | None
    photographs: list[Path]


class Place(NamedTuple):
    """One object before it is made.

    Attributes:
        kind: In 0..1, the position of its class in the list of classes.
        which: In 0..1, the position of its picture among those of the class.
        left: Pixels to its left.
        top: Pixels above it.
        size: Width and height in pixels.
    """

    kind: float
    which: float
    left: int
    top: int
    size: int


def stream(args: argparse.Namespace, split: str, number: int, *use: int) -> np.random.Generator:
    """The random numbers for one use in one image: no use disturbs another."""
    return np.random.default_rng((VERSION, args.seed, SPLITS.index(split), number, *use))


def places(args: argparse.Namespace, split: str, number: int) -> list[Place]:
    """The objects of an image, from back to front."""
    rng = stream(args, split, number, PLACES)
    wanted = int(rng.integers(args.objects[0], args.objects[1] + 1))
    placed: list[Place] = []
    for _ in range(TRIES * wanted):
        if len(placed) == wanted:
            break
        kind, which = rng.random(2)
        size = round(float(np.exp(rng.uniform(*np.log(args.object_size)))))
        left, top = (int(v) for v in rng.integers(0, args.size - size + 1, 2))
        new = Place(kind, which, left, top, size)
        if all(overlap(new, other) <= OVERLAP for other in placed):
            placed.append(new)
    return placed


def overlap(a: Place, b: Place) -> float:
    """The shared area, as a part of the smaller object."""
    width = min(a.left + a.size, b.left + b.size) - max(a.left, b.left)
    height = min(a.top + a.size, b.top + b.size) - max(a.top, b.top)
    return max(0, width) * max(0, height) / min(a.size, b.size) ** 2


def background(args: argparse.Namespace, sources: Sources, split: str, number: int) -> np.ndarray:
    """(size, size, 3) float in 0..1: a square of a photograph, its mean colour, or drawn.

    The square is as large as the image at least and as the photograph allows at most, unless the
    photograph is smaller than the image.
    """
    rng = stream(args, split, number, BACKGROUND)
    if args.drawn_background:
        return draw_background(rng, args.size, args.size)
    path = sources.photographs[int(rng.random() * len(sources.photographs))]
    pixels = read_rgb(path).permute(1, 2, 0).numpy()
    height, width = pixels.shape[:2]
    short = min(height, width)
    side = round(float(np.exp(rng.uniform(np.log(min(args.size, short)), np.log(short)))))
    left, top = (int(rng.integers(0, length - side + 1)) for length in (width, height))
    crop = resized(pixels[top : top + side, left : left + side], args.size)
    return np.broadcast_to(crop.mean((0, 1)), crop.shape) if args.flat_background else crop


def resized(pixels: np.ndarray, size: int) -> np.ndarray:
    """(size, size, 3) float in 0..1 from uint8; bicubic, over all pixels when it shrinks."""
    square = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(square) / 255


def paste(image: np.ndarray, place: Place, pictures: ClassificationSplit) -> TreeObject:
    """Writes a picture into the image."""
    label = int(place.kind * len(pictures.class_names))
    of_class = np.flatnonzero(pictures.labels == label)
    index = int(of_class[int(place.which * len(of_class))])
    left, top, right, bottom = *place[2:4], place.left + place.size, place.top + place.size
    image[top:bottom, left:right] = resized(
        pictures.read(index).permute(1, 2, 0).numpy(), place.size
    )
    return TreeObject(pictures.class_names[label], (left + 1, top + 1, right, bottom))


def draw(image: np.ndarray, place: Place, rng: np.random.Generator) -> TreeObject:
    """Draws a shape of the quick start's set into the image, within the place of a picture."""
    name = SHAPES_CLASSES[int(place.kind * len(SHAPES_CLASSES))]
    centre = np.array([place.left, place.top]) + place.size / 2
    angle = rng.uniform(-MAX_ROTATION, MAX_ROTATION)
    shape = place_shape(name, place.size, angle, centre, image.shape[:2])
    image[:] = paint_shape(rng, image, shape)
    return TreeObject(name, shape.box, difficult=shape.difficult)


def make_image(
    args: argparse.Namespace, sources: Sources, split: str, number: int
) -> tuple[np.ndarray, list[TreeObject]]:
    """(size, size, 3) float pixels, black 0 and white 255, not yet clipped; and the objects."""
    image = background(args, sources, split, number).copy()
    objects = []
    for i, place in enumerate(places(args, split, number)):
        if sources.pictures is None:
            objects.append(draw(image, place, stream(args, split, number, SHAPE, i)))
        else:
            objects.append(paste(image, place, sources.pictures))
    return 255 * vary(image, args), objects


def vary(image: np.ndarray, args: argparse.Namespace) -> np.ndarray:
    """(H, W, 3) in 0..1 with another sharpness, saturation, contrast and brightness."""
    if args.smooth:
        planes = torch.from_numpy(image).permute(2, 0, 1)
        kernel = 2 * reach(args.smooth) + 1
        image = gaussian_blur(planes, [kernel, kernel], [args.smooth]).permute(1, 2, 0).numpy()
    grey = image @ np.array(LUMA)[:, None]
    coloured = grey + args.colour * (image - grey)
    return 0.5 + args.contrast * (coloured - 0.5) + args.brightness


def reach(sigma: float) -> int:
    """Pixels to either side that blurring takes in."""
    return int(np.ceil(3 * sigma))


def write_tree(args: argparse.Namespace, sources: dict[str, Sources]) -> str:
    """Writes OUTPUT; returns what is in it, in one line."""
    counts, totals, clipped, objects = (args.images, args.test_images), np.zeros(3), 0, 0
    with new_tree(args.output) as tree:
        for split, count in zip(SPLITS, counts, strict=True):
            ids = [f"{split}_{number:06d}" for number in range(count)]
            for number, image_id in enumerate(ids):
                exact, pasted = make_image(args, sources[split], split, number)
                pixels = np.rint(exact).clip(0, 255).astype(np.uint8)
                add_image(tree, f"{image_id}.png", pixels, pasted, source="pasted")
                clipped += int((np.abs(exact - 127.5) > 128).sum())
                objects += len(pasted)
                values = pixels.astype(np.float64)
                totals += (values.size, values.sum(), (values**2).sum())
            add_split(tree, split, ids)
        (tree / SETTINGS).write_text(json.dumps(settings(args), indent=2) + "\n")
    mean, square = totals[1:] / totals[0]
    return (
        f"{args.output}: {counts[0]} + {counts[1]} images, {objects} objects; pixels {mean:.1f} +- "
        f"{max(0.0, square - mean**2) ** 0.5:.1f}, {clipped / totals[0]:.2%} clipped"
    )


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """All that decides what the images are, as JSON has it."""
    options = {key: value for key, value in vars(args).items() if key != "output"}
    text = json.dumps({"version": VERSION, **options}, default=lambda path: str(path.resolve()))
    return json.loads(text)


def check_settings(args: argparse.Namespace) -> None:
    """Refuses a tree that was made otherwise."""
    path = args.output / SETTINGS
    try:
        there = json.loads(path.read_text())
    except (OSError, ValueError):
        raise UserError(
            f"{args.output} exists and has no readable {SETTINGS}: name a new folder"
        ) from None
    for key, value in settings(args).items():
        if there.get(key) != value:
            raise UserError(
                f"{path}: made with {key} {there.get(key)}, not {value}: name a new folder, or "
                "delete this one"
            )


def read_sources(args: argparse.Namespace) -> dict[str, Sources]:
    """What the images of each split are made of."""
    pictures: dict[str, ClassificationSplit | None] = dict.fromkeys(SPLITS)
    if not args.drawn:
        for split in SPLITS:
            if not (args.pictures / split).is_dir():
                raise UserError(f"{args.pictures}: no folder {split} here (--pictures)")
            pictures[split] = read_classification(
                "imagefolder", args.pictures, train=split == "train"
            )
    photographs: list[Path] = []
    if not args.drawn_background:
        for folder in args.photographs:
            files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
            if not files:
                raise UserError(f"{folder}: no {', '.join(SUFFIXES)} here (--photographs)")
            photographs += files
        if len(photographs) < 2:
            raise UserError(f"{photographs[0]}: --photographs must have two images or more")
    test = photographs[::5]
    parts = {"train": [p for p in photographs if p not in test], "test": test}
    return {split: Sources(pictures[split], parts[split]) for split in SPLITS}


def check(args: argparse.Namespace) -> None:
    """Refuses arguments that no image can be made with."""
    if not args.drawn and not args.pictures:
        raise UserError("--pictures is missing: name an image folder, or choose --drawn")
    if not args.drawn_background and not args.photographs:
        raise UserError("--photographs is missing: name folders, or choose --drawn-background")
    for name, bad, rule in (
        ("images", args.images < 1, "be 1 or more"),
        ("test-images", args.test_images < 1, "be 1 or more"),
        ("seed", args.seed < 0, "be 0 or more"),
        ("objects", not 1 <= args.objects[0] <= args.objects[1], "be A-B with 1 <= A <= B"),
        (
            "object-size",
            not 8 <= args.object_size[0] <= args.object_size[1] <= args.size,
            f"be A-B with 8 <= A <= B <= --size, {args.size}",
        ),
        ("contrast", not 0 < args.contrast < np.inf, "be positive"),
        ("colour", not 0 <= args.colour < np.inf, "be 0 or more"),
        ("brightness", not -1 <= args.brightness <= 1, "be from -1 to 1"),
        ("smooth", not 0 <= args.smooth < args.size / 4, "be 0 or more, and below --size / 4"),
    ):
        if bad:
            value = getattr(args, name.replace("-", "_"))
            shown = "-".join(map(str, value)) if isinstance(value, tuple) else value
            raise UserError(f"--{name} {shown}: it must {rule}")


def interval(text: str) -> tuple[int, int]:
    """`1-4` or `3`."""
    first, _, last = text.partition("-")
    return int(first), int(last or first)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the folder to make")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="objects to paste")
    parser.add_argument("--photographs", type=Path, nargs="+", metavar="FOLDER", default=[])
    parser.add_argument("--images", type=int, default=400, help="training images (400)")
    parser.add_argument("--test-images", type=int, default=100, help="test images (100)")
    parser.add_argument("--size", type=int, default=128, help="width and height, pixels (128)")
    parser.add_argument(
        "--objects", type=interval, default=(1, 4), metavar="1-4", help="in an image"
    )
    parser.add_argument(
        "--object-size", type=interval, default=(22, 62), metavar="22-62", help="pixels"
    )
    parser.add_argument("--seed", type=int, default=0, help="another set of the same kind (0)")
    group = parser.add_argument_group("what may differ between sets, one at a time")
    group.add_argument("--contrast", type=float, default=1.0, help="factor about mid-grey (1)")
    group.add_argument("--colour", type=float, default=1.0, help="saturation; 0: grey (1)")
    group.add_argument(
        "--brightness", type=float, default=0.0, help="shift; 1 is from black to white (0)"
    )
    group.add_argument(
        "--smooth", type=float, default=0.0, help="sigma of a Gaussian blur, pixels (0)"
    )
    ground = group.add_mutually_exclusive_group()
    ground.add_argument(
        "--flat-background", action="store_true", help="the crop's mean colour instead of the crop"
    )
    ground.add_argument(
        "--drawn-background", action="store_true", help="the quick start's instead of photographs"
    )
    group.add_argument(
        "--drawn", action="store_true", help="the quick start's shapes instead of pictures"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Makes the tree, or finds it."""
    args = parse(argv)
    check(args)
    if args.output.exists():
        check_settings(args)
        print(f"{args.output} is there already, made with these settings", file=sys.stderr)
        return
    sources = read_sources(args)
    try:
        print(write_tree(args, sources))
    except OSError as error:
        raise UserError(f"{args.output} cannot be written: {error}") from None
    check_settings(args)  # another process may have been quicker


if __name__ == "__main__":
    run(main)
