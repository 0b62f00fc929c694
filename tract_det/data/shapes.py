"""Draws the quick start's data: a small devkit of coloured shapes on textured backgrounds.

The class of an object is its shape; colour, size, rotation and background are independent of it.
Objects overlap, the border cuts some of them off, and a few are `difficult`: mostly hidden, or with
little contrast to the background. The tree is read by the same reader as PASCAL VOC.

Every image is a pure function of its number, so that every machine draws the same tree.
"""

import colorsys
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from tract_det.data.voc_tree import TreeObject, add_image, add_split, new_tree
from tract_det.errors import UserError

SHAPES_CLASSES = ("circle", "cross", "ring", "square", "star", "triangle")

# Part of the folder's name: raise it whenever the drawn images change.
_VERSION = 2
_IMAGES = {"train": 400, "test": 100}
_CANVASES = ((128, 128), (160, 128), (128, 160))  # width, height
_CANVAS_SHARES = (0.6, 0.2, 0.2)
_SIZES = (22.0, 62.0)  # smallest and largest diameter of a circle in pixels
_SCALE = {"circle": 1.0, "cross": 1.1, "ring": 1.05, "square": 1.3, "star": 1.25, "triangle": 1.25}
_MARGIN = 80  # pixels around the image; more than half of any object
# Largest rotation to either side, in radians. With any rotation, four epochs of training do not
# tell squares from triangles.
_MAX_ROTATION = 0.35
_OVERSAMPLING = 4
# A pixel belongs to an object if at least half of it is covered.
_COVERED = 0.5
# Share of an object's pixels that must stay visible when others are drawn over it.
_VISIBLE = 0.7
_VISIBLE_DIFFICULT = 0.25  # if the object is marked difficult


@dataclass
class Shape:
    """One drawn object.

    Attributes:
        name: Its class.
        alpha: (H, W) float32, share of each pixel of the image that it covers.
        area: Number of its pixels, including those beyond the image's border.
        difficult: Mostly hidden, or of low contrast.
    """

    name: str
    alpha: np.ndarray
    area: int
    difficult: bool = False

    @property
    def mask(self) -> np.ndarray:
        """(H, W) bool, its pixels, including hidden ones."""
        return self.alpha >= _COVERED

    @property
    def box(self) -> tuple[int, int, int, int]:
        """xmin, ymin, xmax, ymax as in a devkit: 1-based, the last pixel included."""
        rows, columns = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        return tuple(int(v) + 1 for v in (columns[0], rows[0], columns[-1], rows[-1]))  # type: ignore[return-value]

    @property
    def truncated(self) -> bool:
        """Whether the image's border cuts part of it off."""
        return int(self.mask.sum()) < self.area


def ensure_shapes(cache: Path | None = None) -> Path:
    """The root of the drawn devkit, with splits `train` (400 images) and `test` (100).

    The first call draws the tree, later ones find it. It is drawn elsewhere and renamed when it is
    complete, so that several processes may call this at once.

    Args:
        cache: The folder that holds the tree; None: $TRACT_DET_CACHE or ~/.cache/tract_det.

    Raises:
        UserError: The folder cannot be written, or the tree in it is incomplete.
    """
    cache = cache or Path(os.environ.get("TRACT_DET_CACHE") or "~/.cache/tract_det").expanduser()
    root = Path(cache) / f"shapes-v{_VERSION}"
    try:
        if not root.exists():
            _draw_tree(root)
    except OSError as error:
        raise UserError(
            f"{root} cannot be written ({error}): set TRACT_DET_CACHE to a folder with free space"
        ) from None
    for folder in ("Annotations", "JPEGImages"):
        count = len(list((root / folder).glob("*"))) if (root / folder).is_dir() else 0
        if count != sum(_IMAGES.values()):
            raise UserError(
                f"{root / folder} is not complete: delete {root}, it will be drawn again"
            )
    return root


def draw_scene(number: int) -> tuple[np.ndarray, list[Shape]]:
    """Image `number`: (H, W, 3) uint8 pixels, and its 1 to 5 objects from back to front."""
    rng = np.random.default_rng((_VERSION, number))
    width, height = _CANVASES[rng.choice(3, p=_CANVAS_SHARES)]
    image = draw_background(rng, height, width)
    shapes: list[Shape] = []
    wanted = rng.integers(1, 6)
    for _ in range(4 * wanted):  # an object that hides too much of another is replaced
        if len(shapes) == wanted:
            break
        shape = _random_shape(rng, height, width)
        if shape is None or not _may_be_drawn(rng, shapes, shape):
            continue
        image = paint_shape(rng, image, shape)
        shapes.append(shape)
    return np.rint(image * 255).astype(np.uint8), shapes


def place_shape(
    name: str, size: float, angle: float, centre: np.ndarray, canvas: tuple[int, int]
) -> Shape:
    """An object that is not painted yet.

    Args:
        name: Its class.
        size: Diameter in pixels of the circle through its corners.
        angle: Its rotation in radians; circles and rings have none.
        centre: (x, y) in pixels, counted from the image's upper left corner.
        canvas: Height and width of the image in pixels.
    """
    m = _MARGIN
    alpha = _alpha(name, size, angle, centre + m, (canvas[0] + 2 * m, canvas[1] + 2 * m))
    return Shape(name, alpha[m:-m, m:-m], int((alpha >= _COVERED).sum()))


def paint_shape(rng: np.random.Generator, image: np.ndarray, shape: Shape) -> np.ndarray:
    """(H, W, 3) float image with the bevelled shape over it, in a colour that stands out.

    One shape in 25 does not stand out and is marked difficult.
    """
    behind = image[shape.mask].mean(axis=0)
    shape.difficult = bool(rng.random() < 0.04)
    colour = _hsv(rng, saturation=(0.35, 0.95), value=(0.45, 1.0))
    for _ in range(20):
        if np.linalg.norm(colour - behind) > 0.45:
            break
        colour = _hsv(rng, saturation=(0.35, 0.95), value=(0.25, 1.0))
    if shape.difficult:
        colour = behind + 0.2 * (colour - behind)
    soft = _blur(shape.alpha, 2.0)
    bevel = sum(np.gradient(soft))  # light from the upper left
    shadow = np.zeros_like(soft)
    if not shape.difficult:
        shadow[2:, 2:] = 0.4 * _blur(shape.alpha, 2.5)[:-2, :-2]
    ground = image * (1 - shadow * (1 - shape.alpha))[..., None]
    surface = np.clip(
        colour + (0.9 * bevel + 0.015 * rng.standard_normal(soft.shape))[..., None], 0, 1
    )
    return ground + shape.alpha[..., None] * (surface - ground)


def draw_background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(H, W, 3) float in 0..1: two muted colours mixed by noise, a gradient or stripes."""
    noise = _noise(rng, height, width)
    y, x = np.mgrid[:height, :width]
    angle = rng.uniform(0, 2 * np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    kind = rng.choice(("noise", "gradient", "stripes"), p=(0.4, 0.25, 0.35))
    if kind == "noise":
        mix = noise
    elif kind == "gradient":
        mix = 0.7 * (along - along.min()) / np.ptp(along) + 0.3 * noise
    else:
        wave = np.sin(2 * np.pi * along / rng.uniform(8, 40) + rng.uniform(1, 8) * noise)
        mix = 0.5 + rng.uniform(0.2, 0.45) * wave + 0.3 * (noise - 0.5)
    value = rng.uniform(0.3, 0.9)
    first = _hsv(rng, saturation=(0.1, 0.5), value=(value, value))
    second = _hsv(rng, saturation=(0.1, 0.5), value=(value - 0.35, value + 0.2))
    grain = 0.02 * rng.standard_normal((height, width, 1))
    return np.clip(first + mix[..., None] * (second - first) + grain, 0, 1)


def _draw_tree(root: Path) -> None:
    with new_tree(root) as tree:
        number = 0
        for split, count in _IMAGES.items():
            ids = [f"{number + i:06d}" for i in range(count)]
            for i, image_id in enumerate(ids):
                image, shapes = draw_scene(number + i)
                objects = [TreeObject(s.name, s.box, s.truncated, s.difficult) for s in shapes]
                name = f"{image_id}.jpg"
                add_image(tree, name, image, objects, source="shapes", quality=92, subsampling=0)
            add_split(tree, split, ids)
            number += count


def _random_shape(rng: np.random.Generator, height: int, width: int) -> Shape | None:
    """An object at a random place; None if the border would cut off more than a fifth of it."""
    name = SHAPES_CLASSES[rng.integers(len(SHAPES_CLASSES))]
    size = float(np.exp(rng.uniform(*np.log(_SIZES)))) * _SCALE[name]
    angle = rng.uniform(-_MAX_ROTATION, _MAX_ROTATION)
    centre = rng.uniform(0.3 * size, (width - 0.3 * size, height - 0.3 * size))
    shape = place_shape(name, size, angle, centre, (height, width))
    return shape if shape.mask.sum() >= 0.8 * shape.area else None


def _alpha(
    name: str, size: float, angle: float, centre: np.ndarray, canvas: tuple[int, int]
) -> np.ndarray:
    """(H, W) float32 coverage by a shape of diameter `size` pixels around `centre` (x, y)."""
    s = _OVERSAMPLING
    left, top = (np.floor(centre - size / 2) - 2).astype(int)
    side = int(size) + 6
    drawing = Image.new("L", (side * s, side * s))
    draw = ImageDraw.Draw(drawing)
    middle = (centre - (left, top)) * s
    radius = size / 2 * s
    if name in ("circle", "ring"):
        draw.ellipse([*(middle - radius), *(middle + radius)], fill=255)
        if name == "ring":
            draw.ellipse([*(middle - 0.55 * radius), *(middle + 0.55 * radius)], fill=0)
    else:
        points = _polygon(name) @ _rotation(angle) * radius + middle
        draw.polygon([tuple(p) for p in points], fill=255)
    alpha = np.zeros(canvas, dtype=np.float32)
    alpha[top : top + side, left : left + side] = np.asarray(drawing.reduce(s)) / 255
    return alpha


def _polygon(name: str) -> np.ndarray:
    """(n, 2) corners of the upright shape within the unit circle; y points down."""
    if name == "cross":
        arm, half = 0.95, 0.3
        quarter = np.array([(half, arm), (half, half), (arm, half)])
        return np.concatenate([quarter @ _rotation(-k * np.pi / 2) for k in range(4)])
    corners = {"triangle": 3, "square": 4, "star": 10}[name]
    first = -np.pi / 4 if name == "square" else -np.pi / 2
    angles = first + np.arange(corners) * 2 * np.pi / corners
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    if name == "star":
        points[1::2] *= 0.42
    return points


def _rotation(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def _may_be_drawn(rng: np.random.Generator, shapes: list[Shape], new: Shape) -> bool:
    """Whether all objects remain visible below `new`; if so, marks those that become difficult."""
    strict = rng.random() < 0.9
    hidden = new.mask.copy()
    mostly_hidden = []
    for shape in reversed(shapes):  # front to back
        visible = (shape.mask & ~hidden).sum() / shape.area
        if visible < (_VISIBLE if strict and not shape.difficult else _VISIBLE_DIFFICULT):
            return False
        if visible < _VISIBLE:
            mostly_hidden.append(shape)
        hidden |= shape.mask
    for shape in mostly_hidden:
        shape.difficult = True
    return True


def _noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(H, W) in 0..1 with a power-law spectrum, like that of photographs."""
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.hypot(fy, fx)
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((height, width)))
    noise = np.fft.irfft2(spectrum / frequency ** rng.uniform(1.0, 1.8), s=(height, width))
    return (noise - noise.min()) / np.ptp(noise)


def _hsv(
    rng: np.random.Generator, *, saturation: tuple[float, float], value: tuple[float, float]
) -> np.ndarray:
    """(3,) RGB in 0..1 with a random hue."""
    h, s, v = rng.uniform(), rng.uniform(*saturation), rng.uniform(*value)
    return np.array(colorsys.hsv_to_rgb(h, s, min(max(v, 0.0), 1.0)))


def _blur(alpha: np.ndarray, sigma: float) -> np.ndarray:
    image = Image.fromarray(np.rint(alpha * 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(sigma)), dtype=np.float32) / 255
