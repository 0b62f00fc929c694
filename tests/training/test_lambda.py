"""The lambda that the stem uses, for each family of configurations and each unit."""

import pytest
import torch

from tract_det import find_stem
from tract_det.config import classification as classification_config
from tract_det.config import detection as detection_config
from tract_det.config.paper import read_rows
from tract_det.training import assembly, classification, detection

CIFAR10 = (62.985, 62.0925, 66.708)  # the standard deviation of its pixels
IMAGENET = (58.395, 57.12, 57.375)


def on_the_layer(file, *pairs):
    """The damping of the stem, and whether it is relative, by the arm `tract`."""
    is_detector = "Detection" in file or "quickstart" in file
    config = detection_config if is_detector else classification_config
    cfg = config.load_cfg(file, pairs, "tract")
    task = detection.TASK if is_detector else classification.TASK
    cfg.defrost()
    cfg.MODEL.WEIGHTS = ""
    with torch.device("meta") if is_detector else torch.device("cpu"):
        built = task.build_model(cfg, None, ("a", "b"), False)
    assembly.put_tract(cfg, built.model, built.input_variance)
    state = built.model.get_submodule(find_stem(built.model)).tract
    schedule = assembly.build_lambda(cfg, built.input_variance, 10)
    assert schedule(0) == state.lambda_
    return state.lambda_, state.relative


def ratio(data_std, std):
    return sum((a / b) ** 2 for a, b in zip(data_std, std, strict=True)) / 3


@pytest.mark.parametrize(
    "row",
    [
        "cifar10-resnet18-sgd/100/tract-0.05",
        "cifar10-resnet18-adam-stem-sgd/100/tract-0.2",
        "cifar10-vit-lambda/200/tract-0.00625",
        "cifar10-vit-not-standardised/0-to-1/tract-0.8",
        "cifar10-vit-not-standardised/0-to-255/tract-0.1",
        "cifar100-resnet18-sgd/100/tract-0.1",
        "cifar100/ResNet18/tract-133",
        "imagenet-resnet18/30/tract-0.2",
        "deit3-small/800/tract",
        "transfer/cifar10/tract",
    ],
)
def test_a_row_of_the_paper_has_the_papers_number_whatever_the_pixels_are_divided_by(row):
    row = read_rows()[row]
    _, file, _, _, *pairs = row.arguments()
    number = row.settings.get("MODEL.TRACT.LAMBDA", 0.1)
    assert on_the_layer(file, *pairs) == (number, False)


@pytest.mark.parametrize(
    ("file", "pairs", "variance"),
    [
        ("quickstart/shapes.yaml", [], 1),
        ("BCCD-Detection/faster_rcnn_R_18_FPN.yaml", [], 1),
        ("PascalVOC-Detection/faster_rcnn_R_50_FPN.yaml", [], 1),
        ("CIFAR/cpu_small.yaml", [], 1),  # a folder: ImageNet's statistics for lambda as well
        ("CIFAR/cifar10_resnet18_strong.yaml", [], 1),  # divided by the data's own
        ("CIFAR/cpu_small.yaml", ["DATASETS.NAME", "cifar10"], ratio(CIFAR10, IMAGENET)),
    ],
)
def test_the_others_have_lambda_in_units_of_the_datas_own_standardised_pixels(
    file, pairs, variance
):
    number, relative = on_the_layer(file, *pairs)
    assert number == pytest.approx(0.1 * variance, rel=1e-12) and not relative


def test_weights_that_expect_pixels_as_they_come_scale_lambda_by_their_variance():
    pixels = ["MODEL.PIXEL_MEAN", "[103, 116, 123]", "MODEL.PIXEL_STD", "[1, 1, 1]"]
    for file in ("BCCD-Detection/faster_rcnn_R_18_FPN.yaml", "CIFAR/cpu_small.yaml"):
        assert on_the_layer(file, *pixels)[0] == pytest.approx(332.1, rel=1e-3)
        assert on_the_layer(file, *pixels, "MODEL.TRACT.UNIT", "input") == (0.1, False)


def test_a_unit_of_the_trace_is_relative_and_a_schedule_ends_in_the_same_unit():
    assert on_the_layer("CIFAR/cpu_small.yaml", "MODEL.TRACT.UNIT", "trace") == (0.1, True)
    cfg = classification_config.load_cfg(
        "CIFAR/cpu_small.yaml",
        ["MODEL.TRACT.SCHEDULE", "linear", "MODEL.TRACT.LAMBDA_END", "0.3"],
        "tract",
    )
    assert assembly.build_lambda(cfg, 2.0, 11)(11) == pytest.approx(0.6)
    cfg.defrost()
    cfg.MODEL.TRACT.UNIT = "input"
    assert assembly.build_lambda(cfg, 2.0, 11)(11) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("stop_at", "steps_with_tract"),
    [(0, 30), (7, 7), (0.5, 15), (0.01, 1), (0.99, 30), (30, 30)],
)
def test_tract_stops_after_a_fraction_of_the_training_or_at_a_step(stop_at, steps_with_tract):
    pairs = ["MODEL.TRACT.STOP_AT", str(stop_at)]
    cfg = classification_config.load_cfg("CIFAR/cpu_small.yaml", pairs, "tract")
    schedule = assembly.build_lambda(cfg, 1.0, 30)
    assert [schedule(step) is not None for step in range(30)].count(True) == steps_with_tract


@pytest.mark.parametrize("config", [detection_config, classification_config])
def test_the_arm_early_has_tract_for_the_first_third(config):
    file = "quickstart/shapes.yaml" if config is detection_config else "CIFAR/cpu_small.yaml"
    schedule = assembly.build_lambda(config.load_cfg(file, arm="early"), 1.0, 300)
    assert schedule(99) is not None and schedule(100) is None
