"""Damaged images are read or refused in a line, by a process with limits.

A decoder that crashes takes its process with it: so they have one of their own, which says where it
is. More cases than the suite has: `FUZZ_CASES=10000 python -m pytest -n0 tests/fuzz`.
"""

import base64
import random

import numpy as np
import pytest
from PIL import Image

from tests.fuzz.limits import SECONDS, assert_survives, run_limited
from tests.fuzz.mutations import damaged
from tests.fuzz.refusals import cases, refusal
from tract_det.data.images import (
    CorruptImageError,
    read_header,
    read_rgb,
    read_stored,
    read_upright,
    upright_size,
)

CASES = cases(50)
SUFFIXES = (".jpg", ".png", ".webp", ".bmp", ".tiff", ".gif")

# One pixel; a bit of its compressed data is flipped. libpng's error handler ends the process.
BROKEN = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAAAElEQVR4nGNgYGAAAAAEAAH2FzhVAAAAAElFTkSuQmCC"
)


def images(folder):
    """Damages an image of every kind; called in a process of its own."""
    for suffix in SUFFIXES:
        rng, path = random.Random(0), folder / f"image{suffix}"
        pixels = np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        whole = path.read_bytes()
        for case in range(CASES):
            print(suffix, case, flush=True)
            path.write_bytes(damaged(whole, rng))
            for read in (read_rgb, read_upright, upright_size):
                refusal(read, path)


def bands(folder):
    """Damages TIFF files of other than three channels; called in a process of its own."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 24, 36), dtype=np.uint8)
    pages = [Image.fromarray(page) for page in pixels]
    pages[0].save(folder / "pages.tiff", save_all=True, append_images=pages[1:])
    Image.merge("RGBA", pages[:4]).save(folder / "alpha.tiff")
    Image.fromarray(pixels[0].astype(np.uint16)).save(folder / "wide.tiff")
    for name, channels in (("pages.tiff", 5), ("alpha.tiff", 4), ("wide.tiff", 1)):
        rng, path = random.Random(1), folder / name
        whole = path.read_bytes()
        for case in range(CASES):
            print(name, case, flush=True)
            path.write_bytes(damaged(whole, rng))
            for read in (read_upright, read_stored):
                refusal(read, path, 10_000, channels)
            refusal(read_header, path, channels)


@pytest.mark.parametrize("kind", ["images", "bands"])
def test_a_damaged_image_is_read_or_refused_in_a_line(kind, tmp_path):
    assert_survives("test_images", kind, tmp_path)


def test_a_flipped_bit_in_a_png_is_a_line(tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(base64.b64decode(BROKEN))
    with pytest.raises(CorruptImageError, match=r"broken\.png: the image cannot be read"):
        read_rgb(path)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, suffix):
    path = tmp_path / f"large{suffix}"
    Image.new("RGB", (400, 300)).save(path)
    assert read_rgb(path, 120_000).shape == (3, 300, 400)
    with pytest.raises(CorruptImageError, match=r"400 x 300 pixels are more than INPUT.MAX_PIXELS"):
        read_rgb(path, 119_999)


if __name__ == "__main__":
    run_limited({"images": images, "bands": bands}, 20 + SECONDS * CASES // 10)
