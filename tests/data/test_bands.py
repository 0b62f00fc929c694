"""Images of other channels than three: what a file has is taken as it is, or refused in a line."""

import struct

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.conftest import Tree, annotation
from tract_det.data.datasets import read_dataset
from tract_det.data.detection import DetectionDataset
from tract_det.data.exif import check_headers
from tract_det.data.images import read_header, read_stored, read_upright, shown
from tract_det.errors import UserError

H, W = 12, 10
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (H, W, 6), dtype=np.uint8)
WIDE = RNG.integers(0, 2**16, (H, W, 2), dtype=np.uint16)
GREY16 = RNG.integers(0, 2**16, (H, W), dtype=np.uint16)
KEY = r"MODEL\.PIXEL_MEAN"


def picture(pixels, **options):
    return lambda path: Image.fromarray(pixels).save(path, **options)


def array(pixels):
    return lambda path: np.save(path, pixels)


def pages(*pixels, **options):
    first, *others = map(Image.fromarray, pixels)
    return lambda path: first.save(path, save_all=True, append_images=others, **options)


def unexplained(pixels):
    """A TIFF of RGB with samples that it says nothing of, such as near infrared."""

    def save(path):
        Image.fromarray(pixels[..., :4], "RGBA").save(path)
        data = bytearray(path.read_bytes())
        extra = data.index(b"\x52\x01\x03\x00\x01\x00\x00\x00") + 8  # tag 338, one short
        data[extra] = 0
        path.write_bytes(data)

    return save


BANDS = [PIXELS[..., c] for c in range(5)]
KINDS = {
    "grey.png": (picture(PIXELS[..., 0]), PIXELS[..., :1]),
    "grey.tif": (picture(PIXELS[..., 0]), PIXELS[..., :1]),
    "bits.png": (picture(PIXELS[..., 0] > 99), 255 * (PIXELS[..., :1] > 99)),
    "greyalpha.png": (picture(PIXELS[..., :2]), PIXELS[..., :1]),
    "grey16.png": (picture(GREY16), GREY16[..., None] >> 8),
    "alpha.png": (picture(PIXELS[..., :4]), PIXELS[..., :4]),
    "alpha.tif": (picture(PIXELS[..., :4]), PIXELS[..., :4]),
    "fourth.tif": (unexplained(PIXELS), PIXELS[..., :4]),
    "pages.tif": (pages(*BANDS), PIXELS[..., :5]),
    "pages16.tiff": (pages(GREY16, GREY16 // 2), np.stack([GREY16 >> 8, GREY16 >> 9], -1)),
    "flat.npy": (array(PIXELS[..., 0]), PIXELS[..., :1]),
    "one.npy": (array(PIXELS[..., :1]), PIXELS[..., :1]),
    "rgb.npy": (array(PIXELS[..., :3]), PIXELS[..., :3]),
    "six.NPY": (lambda path: np.save(path.open("wb"), PIXELS), PIXELS),
    "columns.npy": (array(np.asfortranarray(PIXELS)), PIXELS),
    "sixteen.npy": (array(WIDE), WIDE >> 8),
}


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_as_many_channels_is_taken_as_it_is_and_any_other_number_is_refused(
    tmp_path, name
):
    save, expected = KINDS[name]
    save(tmp_path / name)
    count = expected.shape[2]
    for read in (read_upright, read_stored):
        image = read(tmp_path / name, channels=count)
        assert image.dtype == torch.uint8 and image.is_contiguous()
        assert np.array_equal(image.permute(1, 2, 0), expected)
    assert read_header(tmp_path / name, count) == read_header(tmp_path / name) == ((W, H), 1)
    for look in (read_header, lambda path, n: read_upright(path, channels=n)):
        with pytest.raises(UserError, match=rf"{name}: the image has {count} channels.*{KEY}.* 7"):
            look(tmp_path / name, 7)


REFUSED = {
    "float.npy": (array(PIXELS / 255), 6, "float64: save it as uint8 or uint16"),
    "signed.npy": (array(PIXELS.astype(np.int16)), 6, "int16: save it"),
    "deep.npy": (array(PIXELS[None]), 6, r"shape is \(1, 12, 10, 6\), not \(H, W\)"),
    "empty.npy": (array(PIXELS[:0]), 6, "empty.npy: the image cannot be read"),
    "objects.npy": (
        lambda path: np.save(path, np.array([{}]), allow_pickle=True),
        1,
        "Python objects",
    ),
    "cut.npy": (lambda path: path.write_bytes(b"\x93NUMPY\x01\x00"), 1, "cannot be read"),
    "float.tif": (picture(PIXELS[..., 0].astype(np.float32)), 1, "floating-point numbers"),
    "sizes.tif": (pages(PIXELS[..., 0], PIXELS[:5, :, 0]), 2, "pages differ in size"),
    "turned.tif": (pages(*BANDS, tiffinfo={274: 6}), 5, "have an EXIF orientation"),
    "rgb.jpg": (picture(PIXELS[..., :3]), 1, f"has 3 channels.*{KEY}"),
    "cmyk.tif": (lambda path: Image.new("CMYK", (W, H)).save(path), 4, "has 3 channels"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_in_a_line_that_names_the_file(tmp_path, name):
    save, channels, message = REFUSED[name]
    save(tmp_path / name)
    with pytest.raises(UserError, match=message) as refusal:
        read_upright(tmp_path / name, channels=channels)
    assert str(refusal.value).startswith(f"{tmp_path / name}: ") and "\n" not in str(refusal.value)


def interleaved(pixels, photometric):
    """The bytes of a TIFF whose samples lie side by side; Pillow writes four at most."""
    height, width, count = pixels.shape
    extra = count - (3 if photometric == 2 else 1)
    shorts = {
        256: [width], 257: [height], 258: [8] * count, 259: [1], 262: [photometric],
        277: [count], 278: [height], 284: [1], 338: [0] * extra,
    }  # fmt: skip
    far = 8 + 2 + 12 * (len(shorts) + 2) + 4  # behind the directory: what does not fit into it
    entries, behind = [], b""
    for tag, values in shorts.items():
        data = struct.pack(f"<{len(values)}H", *values)
        if len(data) > 4:
            place, behind = struct.pack("<I", far + len(behind)), behind + data
        entries.append((tag, 3, len(values), place if len(data) > 4 else data.ljust(4, b"\0")))
    entries.append((273, 4, 1, struct.pack("<I", far + len(behind))))
    entries.append((279, 4, 1, struct.pack("<I", pixels.size)))
    directory = b"".join(struct.pack("<HHI4s", *entry) for entry in sorted(entries))
    head = b"II*\0" + struct.pack("<IH", 8, len(entries))
    return head + directory + bytes(4) + behind + pixels.tobytes()


@pytest.mark.parametrize(("count", "photometric"), [(3, 1), (4, 1), (8, 1), (5, 2), (6, 2), (7, 2)])
def test_a_tiff_of_more_samples_than_pillow_reads_is_refused_with_the_way_out(
    tmp_path, count, photometric
):
    pixels = RNG.integers(0, 256, (H, W, count), dtype=np.uint8)
    path = tmp_path / "bands.tif"
    path.write_bytes(interleaved(pixels, photometric))
    for look in (read_header, lambda path, n: read_upright(path, channels=n)):
        with pytest.raises(UserError) as refusal:
            look(path, count if count != 3 else 4)
        assert str(refusal.value) == (
            f"{path}: a TIFF with {count} samples in each pixel cannot be read: save it as .npy of "
            f"shape (H, W, {count}) and 8 or 16 bits, or as TIFF with a grey page for each channel"
        )


def test_a_damaged_tiff_of_few_samples_is_refused_as_an_image_that_is_damaged(tmp_path):
    path = tmp_path / "bands.tif"
    path.write_bytes(interleaved(PIXELS[..., :3], 2)[:100])
    with pytest.raises(UserError, match=r"bands\.tif: the image cannot be read .*: replace it"):
        read_upright(path)


def test_an_array_has_a_bound_of_pixels_too(tmp_path):
    np.save(tmp_path / "a.npy", PIXELS)
    with pytest.raises(UserError, match=r"INPUT\.MAX_PIXELS 100"):
        read_upright(tmp_path / "a.npy", 100, 6)


def test_a_split_has_the_channels_that_it_is_given_and_names_all_files_with_others(tmp_path):
    tree = Tree(tmp_path)
    for name in ("a", "b", "c"):
        np.save(tree.root / f"JPEGImages/{name}.npy", PIXELS)
        tree.xml(name, annotation(("x", (1, 1, 9, 9)), size=(W, H)))
    tree.split("train", ["a", "b", "c"])
    split = read_dataset(["train"], tree.root, None)
    split.channels = 6
    assert check_headers(split.annotations, channels=6).oriented == 0
    assert np.array_equal(DetectionDataset(split)[1][0].permute(1, 2, 0), PIXELS)
    with pytest.raises(UserError, match=r"(?s)a\.npy: the image has 6 channels.*c\.npy"):
        check_headers(split.annotations)


def test_a_picture_shows_the_first_three_channels_or_the_first_in_grey():
    bands = torch.from_numpy(PIXELS).permute(2, 0, 1)
    for count, expected in ((1, [0, 0, 0]), (2, [0, 0, 0]), (3, [0, 1, 2]), (6, [0, 1, 2])):
        assert torch.equal(shown(bands[:count]), bands[expected])
