"""Detectors trained on images of four channels: from RGB weights, with TrAct, by the tools."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests import reference
from tests.conftest import tiny_options
from tests.training.runs import results, run_here, weights
from tract_det import load_detector
from tract_det.cli import call
from tract_det.config.detection import load_cfg
from tract_det.engine.checkpoint import save_weights
from tract_det.errors import UserError
from tract_det.modeling.classifiers import build_classifier
from tract_det.modeling.weight_files import read_weights
from tract_det.training import detection, session

STEM = "backbone.body.conv1.weight"
CLASSES = ("hot", "plain")  # one is visible in the fourth channel alone, one in RGB
FOUR = {"MODEL__PIXEL_MEAN": [60, 60, 60, 60], "MODEL__PIXEL_STD": [50, 50, 50, 50]}
THREE = {key: values[:3] for key, values in FOUR.items()}


def write_tree(root, *, train, test, side=96, suffix=".png"):
    """Discs on noise, in VOC layout: pictures of four channels, one object of each class."""
    rng = np.random.default_rng(0)
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    yy, xx = np.mgrid[:side, :side]
    for split, count in (("train", train), ("test", test)):
        names = [f"{split}{i:03d}" for i in range(count)]
        (root / f"ImageSets/Main/{split}.txt").write_text("\n".join(names))
        for name in names:
            pixels, objects = rng.integers(0, 80, (side, side, 4), dtype=np.uint8), ""
            for label, channels in zip(CLASSES, ([3], [0, 1, 2]), strict=True):
                d = rng.integers(24, 44)
                x, y = rng.integers(0, side - d, 2)
                disc = (xx + 0.5 - x - d / 2) ** 2 + (yy + 0.5 - y - d / 2) ** 2 <= d * d / 4
                pixels[np.ix_(*[range(side)] * 2, channels)] = np.where(
                    disc[..., None], rng.integers(180, 256), pixels[..., channels]
                )
                box = f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + d}</xmax>"
                objects += (
                    f"<object><name>{label}</name><bndbox>{box}<ymax>{y + d}</ymax></bndbox>"
                    "</object>"
                )
            path = root / f"JPEGImages/{name}{suffix}"
            np.save(path, pixels) if suffix == ".npy" else Image.fromarray(pixels).save(path)
            size = f"<size><width>{side}</width><height>{side}</height><depth>4</depth></size>"
            (root / f"Annotations/{name}.xml").write_text(
                f"<annotation>{size}{objects}</annotation>"
            )
    return root


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("four") / "tree", train=4, test=3)


@pytest.fixture(scope="module")
def rgb(tmp_path_factory):
    """A classifier's weights for RGB."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("rgb") / "classifier.pth"
    statistics = {"pixel_mean": [124.0, 116.0, 104.0], "pixel_std": [58.0, 57.0, 57.0]}
    save_weights(path, build_classifier("resnet18", 5), statistics)
    return path


@pytest.fixture(scope="module")
def step(tree, rgb, tmp_path_factory):
    """One step from RGB weights with TrAct; its folder, options and what it printed."""
    output = tmp_path_factory.mktemp("step")
    options = tiny_options(
        tree, output, **FOUR, MODEL__WEIGHTS=rgb, MODEL__TRACT__ENABLED=True,
        MODEL__BACKBONE__NORM="BN", SOLVER__MAX_ITER=1, SOLVER__MOMENTUM=0.0,
        SOLVER__WEIGHT_DECAY=0.0,
    )  # fmt: skip
    return output, options, run_here("train", *options)


def test_the_first_update_of_a_widened_stem_is_the_float64_oracles(step, rgb):
    output, options, printed = step
    assert f"'{STEM}' widened from 3 to 4 channels (RGB kept, further channels the mean" in printed
    cfg = load_cfg("quickstart/shapes.yaml", options)
    torch.manual_seed(cfg.SEED)
    training, _ = detection.read_data(cfg)
    built = session.build(detection.TASK, cfg, training, read_weights(cfg.MODEL.WEIGHTS))
    stem = built.model.get_submodule(STEM.removesuffix(".weight"))
    before, seen = stem.weight.detach().clone(), []
    stem.register_forward_hook(lambda _, args, out: seen.extend((args[0], out)))
    images, targets = next(iter(detection.build_loader(cfg, training, built.meta, 0)))
    assert {tuple(image.shape) for image in images} == {(4, 96, 96)}
    losses = built.network.train()(images, targets)
    (dZ,) = torch.autograd.grad(sum(losses.values()), seen[1])
    gradient = reference.conv_gradient(stem, seen[0].detach(), dZ, 0.1)[0]
    expected = -cfg.SOLVER.BASE_LR * gradient.reshape(before.shape)
    update = weights(output)[STEM].double() - before.double()
    assert (update - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_run_of_four_channels_is_evaluated_detected_and_drawn(step, tree, tmp_path):
    output, options, _ = step
    assert (output / "detections.png").stat().st_size > 10_000
    assert "cannot be read" not in (output / "report.html").read_text()
    again = dict(zip(options[::2], options[1::2], strict=True))
    again |= {"OUTPUT_DIR": tmp_path / "again", "MODEL.WEIGHTS": output / "model_final.pth"}
    run_here("train", "--eval-only", *[part for pair in again.items() for part in pair])
    assert results(tmp_path / "again")["voc_area"] == results(output)["voc_area"]
    run_here(
        "detect", "--weights", output / "model_final.pth", "--out", tmp_path / "found",
        tree / "JPEGImages",
    )  # fmt: skip
    assert len(json.loads((tmp_path / "found/detect.json").read_text())["images"]) == 7
    assert len(list((tmp_path / "found/images").iterdir())) == 7


def test_a_loaded_detector_takes_arrays_and_pictures_of_its_channels_and_no_others(step, tree):
    detector = load_detector(step[0] / "model_final.pth", "cpu")
    path = tree / "JPEGImages/test000.png"
    pixels = np.array(Image.open(path))
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    found = [detector(image) for image in (path, Image.open(path), pixels, tensor)]
    assert all(torch.equal(other.boxes, found[0].boxes) for other in found)
    for image, message in (
        (pixels[..., :3], r"give a path.*\(H, W, 4\), or a tensor \(4, H, W\)"),
        (Image.fromarray(pixels[..., :3]), "mode RGB: it has 3 channels, not 4"),
    ):
        with pytest.raises(UserError, match=message):
            detector(image)


def test_an_exported_detector_takes_images_of_its_channels(step, tree, tmp_path):
    printed = run_here(
        "export", "--weights", step[0] / "model_final.pth", "--format", "torchscript", "--size",
        "96x96", "--out", tmp_path / "four.pt", "--images", tree / "JPEGImages", "--count", 1,
    )  # fmt: skip
    assert "uint8 (4, H, W), 0 to 255" in printed


def test_a_training_on_arrays_of_one_channel_shows_them_in_grey(tmp_path, rgb):
    tree = write_tree(tmp_path / "tree", train=4, test=2, suffix=".npy")
    for path in (tree / "JPEGImages").iterdir():
        np.save(path, np.load(path)[..., 3])
    changes = {"MODEL__PIXEL_MEAN": [60], "MODEL__PIXEL_STD": [50], "MODEL__WEIGHTS": rgb}
    changes |= {"MODEL__BACKBONE__NORM": "BN", "SOLVER__MAX_ITER": 1}
    output = tmp_path / "out"
    printed = run_here("train", *tiny_options(tree, output, **changes))
    assert "widened from 3 to 1 channels (the sum of RGB)" in printed
    assert (output / "detections.png").is_file()
    page = (output / "report.html").read_text()
    assert "cannot be read" not in page and page.count("data:image/jpeg") >= 1


def test_weights_of_four_channels_are_no_detectron2_model(step, tmp_path):
    message = r"takes images of 4 channels, and detectron2's models three"
    with pytest.raises(UserError, match=message):
        call("convert", [str(step[0] / "model_final.pth"), str(tmp_path / "a.pkl")])


def test_weights_of_four_channels_ask_for_four_numbers(step, tree, tmp_path):
    output, _, _ = step
    changes = {"MODEL__WEIGHTS": output / "model_final.pth"}
    cfg = load_cfg("quickstart/shapes.yaml", tiny_options(tree, tmp_path, **changes))
    with pytest.raises(UserError, match=r"takes images of 4 channels.*MODEL\.PIXEL_MEAN \[60"):
        detection.build_detector(cfg, read_weights(cfg.MODEL.WEIGHTS), CLASSES, False)


@pytest.mark.parametrize(
    ("is_on", "weights_of", "frozen"), [(False, "rgb", 0), (False, "own", 2), (True, "rgb", 0)]
)
def test_a_widened_stem_is_not_frozen_by_default(
    step, rgb, tree, tmp_path, is_on, weights_of, frozen
):
    path = rgb if weights_of == "rgb" else step[0] / "model_final.pth"
    changes = {"MODEL__WEIGHTS": path, "MODEL__TRACT__ENABLED": is_on, **FOUR}
    changes |= {"MODEL__BACKBONE__NORM": "BN", "MODEL__BACKBONE__FREEZE_AT": -1}
    cfg = load_cfg("quickstart/shapes.yaml", tiny_options(tree, tmp_path, **changes))
    built = detection.build_detector(cfg, read_weights(str(path)), CLASSES, False)
    assert built.meta["freeze_at"] == frozen


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MODEL__PIXEL_STD": [50, 50, 50]}, r"PIXEL_MEAN has 4 numbers and MODEL\.PIXEL_STD 3"),
        ({"INPUT__COLOR_JITTER": 0.2}, r"INPUT\.COLOR_JITTER changes colours.*4 channels"),
        (
            {"MODEL__DETECTRON2__CONFIG_FILE": "a.yaml"},
            r"MODEL\.DETECTRON2\.CONFIG_FILE take three",
        ),
    ],
)
def test_what_is_for_rgb_alone_is_refused_by_its_key(tree, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        load_cfg("quickstart/shapes.yaml", tiny_options(tree, tmp_path, **{**FOUR, **changes}))


@pytest.mark.slow
def test_what_only_the_fourth_channel_shows_is_learnt_with_it_and_not_without(tmp_path):
    tree = write_tree(tmp_path / "tree", train=60, test=30)
    changes = {
        "MODEL__TRACT__ENABLED": True, "SOLVER__OPTIMIZER": "AdamW", "SOLVER__BASE_LR": 0.001,
        "SOLVER__MAX_ITER": 200,
    }  # fmt: skip
    found = {}
    for name, statistics in (("four", FOUR), ("three", THREE)):
        run_here("train", *tiny_options(tree, tmp_path / name, **changes, **statistics))
        found[name] = results(tmp_path / name)["voc_area"]["AP"]
    assert found["four"]["hot"] > 70 and found["three"]["hot"] < 30, found
    assert found["four"]["plain"] > 70 and found["three"]["plain"] > 70, found
