import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps
from torchvision import tv_tensors
from torchvision.transforms import v2

from tract_det.data import images
from tract_det.data.detection import DetectionDataset, aspect_groups, drop_empty
from tract_det.data.voc import read_split
from tract_det.errors import UserError

CAT = ("cat", (2, 3, 10, 8))


def read(tree, *ids, **options):
    tree.split("train", ids or ["a"])
    return DetectionDataset(read_split(tree.root, "train", ["cat", "dog"]), **options)


def test_a_sample_is_an_image_and_boxes_with_labels_from_one(tree):
    tree.add("a", CAT, ("dog", (1, 1, 20, 10)))
    dataset = read(tree)
    assert len(dataset) == 1
    image, target = dataset[0]
    assert isinstance(image, tv_tensors.Image)
    assert (image.dtype, tuple(image.shape)) == (torch.uint8, (3, 10, 20))
    assert isinstance(target["boxes"], tv_tensors.BoundingBoxes)
    assert target["boxes"].canvas_size == (10, 20)
    assert target["boxes"].dtype == torch.float32
    assert target["boxes"].tolist() == [[1, 2, 10, 8], [0, 0, 20, 10]]
    assert target["labels"].tolist() == [1, 2]
    assert target["labels"].dtype == torch.int64
    assert (target["image_id"], target["index"]) == ("a", 0)


def test_labels_and_classes_round_trip(tree):
    tree.add("a", CAT, ("dog", (1, 1, 20, 10)))
    dataset = read(tree)
    names = [dataset.split.class_names[k - 1] for k in dataset[0][1]["labels"]]
    assert names == ["cat", "dog"]


def test_boxes_are_clipped_to_the_image_and_those_outside_warned_about(tree):
    tree.add("a", ("cat", (-3, 0, 12, 30)), ("dog", (25, 2, 30, 8)))
    with pytest.warns(UserWarning, match=r"train: 1 boxes.*first: a"):
        dataset = read(tree)
    target = dataset[0][1]
    assert target["boxes"].tolist() == [[0, 0, 12, 10]]
    assert target["labels"].tolist() == [1]


def test_boxes_thinner_than_a_pixel_after_the_transform_are_dropped(tree):
    tree.add("a", ("cat", (1, 1, 20, 10)), ("dog", (3, 3, 5, 9)), size=(20, 10))
    _, target = read(tree, transform=v2.Resize((3, 6)))[0]
    assert target["boxes"].tolist() == [[0, 0, 6, 3]]
    assert target["boxes"].canvas_size == (3, 6)
    assert target["labels"].tolist() == [1]


def test_an_image_without_objects_has_empty_boxes(tree):
    tree.add("a")
    _, target = read(tree, transform=v2.RandomHorizontalFlip(1.0))[0]
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)


def test_difficult_objects_are_used_or_not(tree):
    tree.add("a", (*CAT, True), ("dog", (1, 1, 9, 9)))
    assert read(tree)[0][1]["labels"].tolist() == [1, 2]
    assert read(tree, use_difficult=False)[0][1]["labels"].tolist() == [2]


@pytest.mark.parametrize(
    ("name", "mode"),
    [("a.jpg", mode) for mode in ("RGB", "L", "CMYK")]
    + [("a.png", mode) for mode in ("RGB", "L", "P", "RGBA", "LA", "1")],
)
def test_images_of_every_mode_become_the_rgb_of_pillow(tree, write_annotation, name, mode):
    path = tree.image(name, mode=mode)
    tree.xml("a", write_annotation(CAT))
    image, _ = read(tree)[0]
    expected = np.array(Image.open(path).convert("RGB")).transpose(2, 0, 1)
    assert image.dtype == torch.uint8
    # Decoders of different libjpeg builds may round differently.
    assert np.abs(image.numpy().astype(int) - expected).max() <= 2


def test_sixteen_bit_pngs_keep_their_high_byte(tree, write_annotation):
    grey = np.arange(200, dtype=np.uint16).reshape(10, 20) * 300
    Image.fromarray(grey).save(tree.root / "JPEGImages" / "a.png")
    tree.xml("a", write_annotation(CAT))
    image, _ = read(tree)[0]
    assert image.dtype == torch.uint8
    assert image[1].tolist() == (grey >> 8).tolist()


def _not_compiled(*_):
    raise RuntimeError("decode_jpeg: torchvision not compiled with libjpeg support")


@pytest.mark.parametrize("decoder", [_not_compiled, None])
def test_pillow_reads_what_torchvision_was_not_built_for(tree, monkeypatch, decoder):
    tree.add("a", CAT)
    dataset = read(tree)
    expected, _ = dataset[0]
    monkeypatch.setattr(images, "decode_jpeg", decoder)
    image, _ = dataset[0]
    assert (image.int() - expected.int()).abs().max() <= 2


def oriented(tree, value, size=(20, 10), name="a.png"):
    """An image file whose EXIF orientation is `value`; the format keeps every pixel."""
    exif = Image.Exif()
    exif[0x0112] = value
    return tree.image(name, size=size, exif=exif.tobytes())


@pytest.mark.parametrize("orientation", range(10))
def test_an_image_is_turned_upright_as_pillow_turns_it(tree, write_annotation, orientation):
    path = oriented(tree, orientation)
    with Image.open(path) as file:
        expected = np.array(ImageOps.exif_transpose(file))
    height, width, _ = expected.shape
    assert (width, height) == ((10, 20) if 5 <= orientation <= 8 else (20, 10))
    tree.xml("a", write_annotation(("cat", (2, 3, 10, 8)), size=(width, height)))
    image, _ = read(tree)[0]
    assert np.array_equal(image.permute(1, 2, 0), expected)
    assert images.upright_size(path) == (width, height)


def test_an_orientation_behind_the_pixels_of_a_png_counts_as_well(tree):
    """Encoders may write it there, and Pillow finds it there."""
    data, silent = oriented(tree, 6).read_bytes(), tree.image("b.png", size=(20, 10)).read_bytes()
    start = data.index(b"eXIf") - 4
    length = 12 + int.from_bytes(data[start : start + 4], "big")
    end = silent.index(b"IEND") - 4
    path = tree.root / "JPEGImages" / "c.png"
    path.write_bytes(silent[:end] + data[start : start + length] + silent[end:])
    assert images.orientation_of(path) == 6 and images.upright_size(path) == (10, 20)


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_to_look_for_an_orientation_decodes_no_pixels(tree, monkeypatch, name):
    path = tree.image(name, size=(20, 10), dpi=(72, 72))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
    assert images.orientation_of(path) == 1 and images.upright_size(path) == (20, 10)


def test_a_missing_size_is_that_of_the_upright_image(tree):
    oriented(tree, 6)
    tree.xml("a", "<annotation></annotation>")
    dataset = read(tree)
    assert (dataset.split.annotations[0].width, dataset.split.annotations[0].height) == (10, 20)
    assert dataset[0][0].shape == (3, 20, 10)


@pytest.mark.parametrize(
    ("orientation", "size", "message"),
    [
        (6, (20, 10), "is 10 x 20, upright by its EXIF orientation 6, .* 20 x 10: .*as stored"),
        (1, (10, 20), "is 20 x 10 but .* 10 x 20: width and height are swapped in <size>"),
        (3, (10, 20), "is 20 x 10 but .* 10 x 20: width and height are swapped in <size>"),
        (6, (10, 21), "is 10 x 20, upright .* 10 x 21: restore the annotated image"),
    ],
)
def test_a_size_that_disagrees_is_refused_with_its_cause(
    tree, write_annotation, orientation, size, message
):
    path = oriented(tree, orientation)
    tree.xml("a", write_annotation(CAT, size=size))
    with pytest.raises(UserError, match=f"{path}: the image {message}") as caught:
        read(tree)[0]
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_is_no_orientation(tree):
    tree.add("a", CAT)
    tree.image("a.jpg", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert read(tree)[0][0].shape == (3, 10, 20)


def _cut(path, share):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: _cut(path, 0.6),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"<html>not found</html>"),
        lambda path: path.unlink(),
    ],
    ids=["cut off", "empty", "no image", "removed"],
)
def test_an_unreadable_image_is_one_line_that_names_the_file(tree, write_annotation, name, damage):
    path = tree.image(name)
    tree.xml("a", write_annotation(CAT))
    dataset = read(tree)
    damage(path)
    with pytest.raises(UserError) as caught:
        dataset[0]
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_size_than_annotated_is_one_line_that_names_the_file(tree):
    tree.add("a", CAT)
    dataset = read(tree)
    path = tree.image("a.jpg", size=(21, 10))
    with pytest.raises(UserError, match=f"{path}.*21 x 10.*20 x 10"):
        dataset[0]


def test_aspect_groups_are_landscape_and_portrait(tree):
    for name, size in (("a", (20, 10)), ("b", (10, 20)), ("c", (10, 10))):
        tree.add(name, CAT, size=size)
    assert aspect_groups(read(tree, "a", "b", "c").split).tolist() == [0, 1, 0]


@pytest.mark.filterwarnings("ignore:.*less than a pixel")
def test_drop_empty_keeps_the_images_that_give_a_box(tree):
    tree.add("a", CAT)
    tree.add("b")
    tree.add("c", ("cat", (50, 50, 60, 60)))  # outside
    tree.add("d", (*CAT, True))
    split = read(tree, "a", "b", "c", "d").split
    assert [a.image_id for a in drop_empty(split).annotations] == ["a", "d"]
    assert [a.image_id for a in drop_empty(split, use_difficult=False).annotations] == ["a"]
    assert len(split.annotations) == 4


def test_a_dataset_can_be_sent_to_another_process(tree):
    tree.add("a", CAT)
    dataset = pickle.load(io.BytesIO(pickle.dumps(read(tree))))
    assert dataset[0][1]["labels"].tolist() == [1]


def test_bccd_boxes_are_within_their_images(bccd):
    dataset = DetectionDataset(read_split(bccd, "test"))
    for index in range(0, len(dataset), 8):
        image, target = dataset[index]
        assert image.shape == (3, 480, 640)
        boxes = target["boxes"]
        assert len(boxes) == len(dataset.split.annotations[index].boxes)
        assert bool((boxes >= 0).all())
        assert bool((boxes[:, 2:] <= torch.tensor([640, 480])).all())
