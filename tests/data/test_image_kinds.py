"""What becomes of the pixels of every kind of image file, by formulas instead of a library."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tract_det.data.classification import read_classification
from tract_det.data.datasets import read_dataset
from tract_det.data.detection import DetectionDataset
from tract_det.errors import UserError

H, W = 12, 10
RNG = np.random.default_rng(0)
RGB, RGBA, LA, CMYK = (RNG.integers(0, 256, (H, W, n), dtype=np.uint8) for n in (3, 4, 2, 4))
GREY = RNG.integers(0, 256, (H, W), dtype=np.uint8)
GREY16 = RNG.integers(0, 2**16, (H, W), dtype=np.uint16)
RGB16 = RNG.integers(0, 2**16, (H, W, 3), dtype=np.uint16)
BITS = RNG.integers(0, 2, (H, W)).astype(bool)
NUMBERS = RNG.integers(0, 4, (H, W), dtype=np.uint8)
COLOURS = RNG.integers(0, 256, (4, 3), dtype=np.uint8)


def three(grey):
    return np.repeat(grey[..., None], 3, axis=2)


def palette(path):
    image = Image.fromarray(NUMBERS, "P")
    image.putpalette(COLOURS.tobytes())
    image.save(path, **({"transparency": 1} if path.suffix == ".png" else {}))


def png16(path):
    """Pillow does not write 16 bits of three channels."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in RGB16)
    head = struct.pack(">IIBBBBB", W, H, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


def pages(path):
    first, second = Image.fromarray(RGB), Image.fromarray(255 - RGB)
    more = {"lossless": True} if path.suffix == ".webp" else {}
    first.save(path, save_all=True, append_images=[second], **more)


def saver(pixels, mode=None, **options):
    def save(path):
        Image.fromarray(pixels, mode).save(path, **options)

    return save


LOSSLESS = {"lossless": True, "exact": True}
KINDS = {
    "rgb.png": (saver(RGB), RGB),
    "rgb.bmp": (saver(RGB), RGB),
    "rgb.tif": (saver(RGB), RGB),
    "rgb.tiff": (saver(RGB, compression="tiff_lzw"), RGB),
    "rgb.webp": (saver(RGB, **LOSSLESS), RGB),
    "grey.png": (saver(GREY), three(GREY)),
    "grey.bmp": (saver(GREY), three(GREY)),
    "grey.tif": (saver(GREY), three(GREY)),
    "bits.png": (saver(BITS), three(BITS * np.uint8(255))),
    "bits.tif": (saver(BITS), three(BITS * np.uint8(255))),
    "palette.png": (palette, COLOURS[NUMBERS]),
    "palette.bmp": (palette, COLOURS[NUMBERS]),
    "palette.tif": (palette, COLOURS[NUMBERS]),
    "alpha.png": (saver(RGBA), RGBA[..., :3]),
    "alpha.tif": (saver(RGBA), RGBA[..., :3]),
    "alpha.webp": (saver(RGBA, **LOSSLESS), RGBA[..., :3]),
    "greyalpha.png": (saver(LA), three(LA[..., 0])),
    "cmyk.tif": (
        saver(CMYK, "CMYK"),
        np.rint((255.0 - CMYK[..., :3]) * (255.0 - CMYK[..., 3:]) / 255).astype(np.uint8),
    ),
    "grey16.png": (saver(GREY16), three((GREY16 >> 8).astype(np.uint8))),
    "grey16.tif": (saver(GREY16), three((GREY16 >> 8).astype(np.uint8))),
    "rgb16.png": (png16, (RGB16 >> 8).astype(np.uint8)),
    "pages.tif": (pages, RGB),
    "pages.webp": (pages, RGB),
}


def as_detection(root, save, name):
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    save(root / "JPEGImages" / name)
    box = "<xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax>"
    image_object = f"<object><name>x</name><bndbox>{box}</bndbox></object>"
    xml = root / "Annotations" / f"{name.partition('.')[0]}.xml"
    xml.write_text(f"<annotation>{image_object}</annotation>")
    (root / "ImageSets/Main/train.txt").write_text(xml.stem)
    return DetectionDataset(read_dataset(["train"], root, None))[0][0]


def as_classification(root, save, name):
    for part in ("train", "val"):
        (root / part / "x").mkdir(parents=True)
        save(root / part / "x" / name)
    return read_classification("imagefolder", root, train=True).read(0)


READERS = {"detector": as_detection, "classifier": as_classification}


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_image_is_the_same_rgb_to_detectors_and_classifiers(tmp_path, read, name):
    save, expected = KINDS[name]
    pixels = read(tmp_path, save, name).permute(1, 2, 0).numpy()
    assert pixels.dtype == np.uint8 and pixels.shape == (H, W, 3)
    tolerance = 1 if name.startswith("cmyk") else 0
    assert np.abs(pixels.astype(int) - expected.astype(int)).max() <= tolerance


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (GREY.astype(np.float32) / 255, "floating-point numbers: save it with 8 bits"),
        (GREY16.astype(np.int32) * 5, r"whole numbers from \d+ to \d+: save it with 8 or 16 bits"),
        (GREY16.astype(np.int32) - 2**15, r"whole numbers from -\d+ to \d+: save it"),
    ],
    ids=["float", "beyond 16 bits", "signed"],
)
def test_pixels_of_an_unknown_range_are_refused(tmp_path, read, pixels, message):
    with pytest.raises(
        UserError, match=rf"a\.tif: the image cannot be read \(its pixels are {message}"
    ):
        read(tmp_path, saver(pixels), "a.tif")
