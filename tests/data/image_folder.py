"""Small image folders for the tests of classification data."""

import numpy as np
from PIL import Image

COUNTS = {"cat": 5, "dog": 3, "eel": 8}
ALL = [f"train/{name}/{i:03d}.jpg" for name, count in COUNTS.items() for i in range(count)]


def photo(seed, size=(20, 10), mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def folder(root, part, counts=COUNTS, seed=0):
    """Makes root/part/<class>/<number>.jpg."""
    for name, count in counts.items():
        (root / part / name).mkdir(parents=True)
        for i in range(count):
            photo(seed + i).save(root / part / name / f"{i:03d}.jpg")
    return root


def ids(split):
    return [split.image_id(i) for i in range(len(split))]
