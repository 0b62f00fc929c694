"""Images in a page: photographs with boxes, and filters of the first layer."""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from tract_det.data.bands import array_pixels, array_shape, is_array
from tract_det.pixels import shown_channels

_SIDE = 440  # pixels of a picture's longer side
_QUALITY = 72  # of its JPEG
_FILTERS = 64


def picture(path: Path) -> tuple[str, tuple[int, int]]:
    """An image as a data URI, upright and small, and its size as stored in the annotation."""
    with _opened(path) as image:
        upright = ImageOps.exif_transpose(image)
        size = upright.size
        upright = upright.convert("RGB")
        upright.thumbnail((_SIDE, _SIDE))
        buffer = io.BytesIO()
        upright.save(buffer, "JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(), size


def _opened(path: Path) -> Image.Image:
    """The image; of an array the channels that a picture shows."""
    if not is_array(path):
        return Image.open(path)
    array_shape(path)
    pixels = array_pixels(path)
    return Image.fromarray(pixels[..., shown_channels(pixels.shape[2])])


def drawn_boxes(entries: Sequence[dict[str, Any]], class_names: Sequence[str], width: int) -> str:
    """Rectangles in the image's own pixels, with class and score."""
    scale = width / _SIDE
    parts = []
    for entry in entries:
        x1, y1, x2, y2 = entry["box"]
        kind = entry.get("verdict", "difficult" if entry.get("difficult") else "object")
        text = class_names[entry["label"]] if entry["label"] < len(class_names) else "?"
        if "score" in entry:
            text += f" {entry['score']:.2f}"
        parts.append(
            f'<rect class="box {kind}" x="{x1:.1f}" y="{y1:.1f}" width="{x2 - x1:.1f}" '
            f'height="{y2 - y1:.1f}" stroke-width="{2 * scale:.2f}">'
            f"<title>{escape(text)}</title></rect>"
        )
        if len(entries) <= 12:
            parts.append(
                f'<text class="name {kind}" x="{x1 + 2 * scale:.1f}" y="{y1 + 11 * scale:.1f}" '
                f'font-size="{11 * scale:.1f}">{escape(text)}</text>'
            )
    return "".join(parts)


def filter_sheet(weight: np.ndarray) -> str:
    """The first filters as one PNG, each scaled to its own range.

    Args:
        weight: `(M, C, kh, kw)`; of other than three channels those that a picture shows.
    """
    filters = weight[:_FILTERS, shown_channels(weight.shape[1])].astype(float)
    low = filters.min(axis=(1, 2, 3), keepdims=True)
    span = np.maximum(filters.max(axis=(1, 2, 3), keepdims=True) - low, 1e-12)
    pixels = ((filters - low) / span * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    count, height, width, _ = pixels.shape
    columns = min(16, count)
    rows = -(-count // columns)
    sheet = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1, 3), 255, dtype=np.uint8)
    for i, filter_ in enumerate(pixels):
        y, x = (i // columns) * (height + 1) + 1, (i % columns) * (width + 1) + 1
        sheet[y : y + height, x : x + width] = filter_
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img class="filters" alt="filters of the first layer" src="data:image/png;base64,{data}">'
    )
