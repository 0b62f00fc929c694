"""What EXIF's orientation does to images and boxes, and what is refused because of it."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.conftest import tiny_options
from tests.data.formats import FORMS
from tests.training.runs import run_here
from tract_det.cli import call
from tract_det.data import images
from tract_det.data.datasets import read_dataset
from tract_det.data.detection import DetectionDataset
from tract_det.data.exif import check_headers, with_sizes
from tract_det.data.voc import read_split
from tract_det.errors import UserError
from tract_det.visualize import Picture, detection_grid

# Of each orientation, how a camera that holds the picture so stores it.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
SIZE = (24, 16)  # upright
BOX = (3, 2, 9, 13)  # edges of the object in the upright picture
LOSSLESS = {".png": {}, ".tiff": {}, ".webp": {"lossless": True}, ".jpg": {"quality": 95}}


def picture():
    """A bright object on noise."""
    pixels = np.random.default_rng(0).integers(0, 60, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    pixels[BOX[1] : BOX[3], BOX[0] : BOX[2]] = 220
    return Image.fromarray(pixels)


def save(path, orientation, **options):
    """Stores the picture as a camera does; returns what is stored."""
    turn = STORED[orientation]
    stored = picture() if turn is None else picture().transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(path, exif=exif, **options)
    return stored


@pytest.mark.parametrize("suffix", LOSSLESS)
@pytest.mark.parametrize("orientation", STORED)
def test_every_format_is_read_upright_or_as_stored(tmp_path, orientation, suffix):
    """TIFF too, which Pillow turns by itself."""
    path = tmp_path / f"a{suffix}"
    stored = save(path, orientation, **LOSSLESS[suffix])
    assert images.orientation_of(path) == orientation
    assert images.upright_size(path) == SIZE and images.stored_size(path) == stored.size
    tolerance = 60 if suffix == ".jpg" else 0
    for read, expected in ((images.read_upright, picture()), (images.read_stored, stored)):
        pixels = read(path).permute(1, 2, 0).numpy().astype(int)
        assert pixels.shape == np.asarray(expected).shape
        assert np.abs(pixels - np.asarray(expected)).max() <= tolerance


def tree_of(tree, write_annotation, *, orientation=6, size="upright", boxes="upright"):
    """One image with an orientation, and one without; what its size and its box mean varies."""
    stored = save(tree.root / "JPEGImages/a.png", orientation)
    picture().save(tree.root / "JPEGImages/b.png")
    x1, y1, x2, y2 = BOX
    upright = ("cat", (x1 + 1, y1 + 1, x2, y2))
    # Turned by 90 degrees against the clock, as orientation 6 is stored.
    as_stored = ("cat", (y1 + 1, SIZE[0] - x2 + 1, y2, SIZE[0] - x1))
    box = upright if boxes == "upright" else as_stored
    sizes = {"upright": SIZE, "stored": stored.size, "other": (SIZE[0], SIZE[1] + 1)}
    text = write_annotation(box, size=sizes.get(size, SIZE))
    if size == "none":
        text = text.partition("<size>")[0] + text.partition("</size>")[2]
    tree.xml("a", text)
    tree.xml("b", write_annotation(upright, size=SIZE))
    tree.split("train", ["a", "b"])
    tree.split("test", ["b"])
    return tree.root


def read(root, mode):
    split = read_split(root, "train", upright=mode != "ignore")
    headers = check_headers(split.annotations, mode)
    split.annotations, split.exif = with_sizes(split.annotations, headers), mode
    return DetectionDataset(split), headers


def is_on_the_object(dataset):
    """Whether the box of the first image holds the bright pixels and nothing else."""
    image, target = dataset[0]
    assert target["boxes"].canvas_size == tuple(image.shape[-2:])
    inside = np.zeros(image.shape[-2:], dtype=bool)
    x1, y1, x2, y2 = map(int, target["boxes"][0].tolist())
    inside[y1:y2, x1:x2] = True
    return bool(((image[0].numpy() > 100) == inside).all())


@pytest.mark.parametrize("mode", ["auto", "apply"])
@pytest.mark.parametrize("size", ["upright", "none"])
def test_an_image_is_turned_where_its_annotation_agrees_or_says_nothing(
    tree, write_annotation, mode, size
):
    dataset, headers = read(tree_of(tree, write_annotation, size=size), mode)
    assert headers.oriented == 1 and is_on_the_object(dataset)


@pytest.mark.parametrize("size", ["stored", "none"])
def test_boxes_of_the_stored_pixels_fit_under_ignore(tree, write_annotation, size):
    root = tree_of(tree, write_annotation, size=size, boxes="stored")
    dataset, headers = read(root, "ignore")
    assert headers.oriented == 1 and is_on_the_object(dataset)


def test_boxes_of_the_upright_image_with_the_stored_size_fit_under_apply(tree, write_annotation):
    dataset, headers = read(tree_of(tree, write_annotation, size="stored"), "apply")
    assert dict(headers.sizes) == {0: SIZE} and is_on_the_object(dataset)


@pytest.mark.parametrize(
    ("mode", "size", "message"),
    [
        ("auto", "stored", r"^1 of 2 .* as stored \(a\.png\): set INPUT\.EXIF .*ignore .* apply"),
        (
            "ignore",
            "upright",
            r"^1 of 2 .* turns it \(a\.png\), and INPUT\.EXIF .*: set it to auto",
        ),
        ("refuse", "upright", r"^1 of 2 .* an EXIF orientation \(a\.png\), and INPUT\.EXIF"),
        ("auto", "other", r"a\.png: the image is 24 x 16, upright by its EXIF orientation 6"),
        ("apply", "other", r"a\.png: the image is 24 x 16, upright by its EXIF orientation 6"),
        ("ignore", "other", r"a\.png: the image is 16 x 24, as stored, without its EXIF"),
    ],
)
def test_what_disagrees_is_refused_with_the_key(tree, write_annotation, mode, size, message):
    root = tree_of(tree, write_annotation, size=size)
    with pytest.raises(UserError, match=message) as caught:
        read(root, mode)
    assert "\n" not in str(caught.value)


def test_all_images_that_disagree_are_counted_at_once(tree, write_annotation):
    for number in range(9):
        save(tree.root / f"JPEGImages/i{number}.png", 8)
        tree.xml(f"i{number}", write_annotation(("cat", (1, 1, 5, 5)), size=SIZE[::-1]))
    tree.xml("z", write_annotation(("cat", (1, 1, 5, 5)), size=(7, 7)))
    tree.image("z.png")
    tree.split("train", [*(f"i{number}" for number in range(9)), "z"])
    with pytest.raises(
        UserError, match=r"^9 of 10 images .*i0\.png, i1\.png, i2\.png, \.\.\.\)"
    ) as e:
        read(tree.root, "auto")
    assert "z.png: the image is 20 x 10 but its annotation says 7 x 7" in str(e.value)


@pytest.mark.parametrize("orientation", [2, 3, 4])
def test_without_exchanged_sides_the_size_says_nothing_and_auto_turns(
    tree, write_annotation, orientation
):
    root = tree_of(tree, write_annotation, orientation=orientation, size="stored")
    assert is_on_the_object(read(root, "auto")[0])


@pytest.mark.parametrize("form", ["coco_roboflow", "yolo_ultralytics", "voc_roboflow"])
def test_the_rule_is_the_same_in_every_format(tree, write_annotation, tmp_path, form):
    split = read_split(tree_of(tree, write_annotation), "train")
    FORMS[form](tmp_path / form, [split])
    copy = read_dataset(["train"], tmp_path / form, None)
    assert check_headers(copy.annotations).oriented == 1 and is_on_the_object(
        DetectionDataset(copy)
    )


def test_in_coco_the_size_decides_too(tree, write_annotation, tmp_path):
    out = tmp_path / "out"
    FORMS["coco_beside"](out, [read_split(tree_of(tree, write_annotation), "train")])
    content = json.loads((out / "train.json").read_text())
    content["images"][0] |= {"width": SIZE[1], "height": SIZE[0]}
    (out / "train.json").write_text(json.dumps(content))
    split = read_dataset(["train"], out, None)
    with pytest.raises(UserError, match=r"^1 of 2 images .*set INPUT\.EXIF"):
        check_headers(split.annotations)
    assert dict(check_headers(split.annotations, "apply").sizes) == {0: SIZE}


def test_boxes_in_yolos_fractions_are_of_the_image_as_it_is_read(tree, write_annotation, tmp_path):
    root = tree_of(tree, write_annotation, size="stored", boxes="stored")
    FORMS["yolo_ultralytics"](tmp_path / "out", [read_split(root, "train")])
    split = read_dataset(["train"], tmp_path / "out", None, upright=False)
    assert dict(check_headers(split.annotations, "ignore").sizes) == {}
    split.exif = "ignore"
    assert is_on_the_object(DetectionDataset(split))


def test_pictures_of_detections_are_drawn_as_the_boxes_mean_them(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.imshow", lambda self, image: drawn.append(image))
    none = np.zeros((0, 4)), np.zeros((0, 4)), np.zeros(0), np.zeros(0)
    for suffix in (".png", ".tiff"):
        save(tmp_path / f"a{suffix}", 6)
    pictures = [Picture(tmp_path / f"a{suffix}", *none) for suffix in (".png", ".tiff")]
    detection_grid(tmp_path / "grid.png", pictures, ["cat"])
    for image in drawn:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(picture()))
    assert len(drawn) == 2


def test_a_training_counts_what_it_turned_and_names_the_key_where_it_cannot_know(
    tree, write_annotation, tmp_path
):
    root = tree_of(tree, write_annotation, size="stored")
    options = {"SOLVER__MAX_ITER": 1, "SOLVER__IMS_PER_BATCH": 1}
    with pytest.raises(UserError, match=r"^1 of 2 images .* set INPUT\.EXIF"):
        call("train", tiny_options(root, tmp_path / "out", **options))
    assert not list((tmp_path / "out").glob("*.pth"))
    printed = run_here(
        "train", *tiny_options(root, tmp_path / "out", INPUT__EXIF="apply", **options)
    )
    assert "train: 1 of 2 images have an EXIF orientation, which turns them upright" in printed
    assert (tmp_path / "out/detections.png").is_file()
    with pytest.raises(UserError, match=r"INPUT\.EXIF is 'turn': it takes one of auto, apply"):
        call("train", tiny_options(root, tmp_path / "o", INPUT__EXIF="turn"))


def test_the_look_at_the_data_follows_the_same_rule(tree, write_annotation, capsys):
    root = str(tree_of(tree, write_annotation, size="stored"))
    assert call("check", [root]) == 1
    printed = capsys.readouterr().out
    assert "error: 1 of 2 images have" in printed and "a training cannot start" in printed
    assert call("check", [root, "--exif", "apply"]) == 0
    printed = capsys.readouterr().out
    assert "1 images have an EXIF orientation and are turned upright" in printed
    assert "outside their image" not in printed
