"""Classifiers of images of other channels than three: trained, used, and loaded into a detector."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from tests import reference
from tests.conftest import tiny_options
from tests.training.image_folder import options
from tests.training.runs import assert_same_bits, results, run_here, weights
from tests.training.test_channels import write_tree
from tract_det import load_classifier
from tract_det.cli import call
from tract_det.config.classification import load_cfg
from tract_det.engine.checkpoint import save_weights
from tract_det.errors import UserError
from tract_det.modeling.classifiers import build_classifier
from tract_det.modeling.weight_files import read_weights
from tract_det.training import classification, session

RGB = {"pixel_mean": [124.0, 116.0, 104.0], "pixel_std": [58.0, 57.0, 57.0]}


def statistics(channels):
    mean, std = [110.0 + c for c in range(channels)], [70.0 + c for c in range(channels)]
    return {"MODEL__PIXEL_MEAN": mean, "MODEL__PIXEL_STD": std}


def save_as(path, pixels):
    if path.suffix == ".npy":
        np.save(path, pixels)
    elif pixels.shape[2] == 5:  # TIFF of grey pages
        first, *others = (Image.fromarray(pixels[..., c]) for c in range(5))
        first.save(path, save_all=True, append_images=others)
    else:
        Image.fromarray(pixels.squeeze()).save(path)


def write_folder(root, channels, suffix, *, train=8, val=3, size=32):
    """Noise, whose last channel is dark in the class `dark`."""
    rng = np.random.default_rng(0)
    for name in ("dark", "light"):
        for part, count in (("train", train), ("val", val)):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (size, size, channels), dtype=np.uint8)
                pixels[..., -1] //= 8 if name == "dark" else 1
                save_as(root / part / name / f"{i:03d}{suffix}", pixels)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("four") / "images", 4, ".png")


@pytest.fixture(scope="module")
def rgb(tmp_path_factory):
    """A classifier's weights for RGB."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("rgb") / "classifier.pth"
    model = build_classifier("resnet10", 5, small_images=True, norm="GN", width=16)
    save_weights(path, model, RGB)
    return path


@pytest.fixture(scope="module")
def step(folder, rgb, tmp_path_factory):
    """One step from RGB weights with TrAct; its folder, options and what it printed."""
    output = tmp_path_factory.mktemp("step") / "out"
    keys = options(
        folder, output, **statistics(4), MODEL__WEIGHTS=rgb, SOLVER__MAX_ITER=1,
        SOLVER__MOMENTUM=0.0, SOLVER__WEIGHT_DECAY=0.0,
    )  # fmt: skip
    return output, keys, run_here("pretrain", *keys)


def test_the_first_update_of_a_classifiers_widened_stem_is_the_float64_oracles(step):
    output, keys, printed = step
    assert "'conv1.weight' widened from 3 to 4 channels (RGB kept, further channels" in printed
    cfg = load_cfg("CIFAR/cpu_small.yaml", keys)
    torch.manual_seed(cfg.SEED)
    training, _ = classification.read_data(cfg)
    built = session.build(classification.TASK, cfg, training, read_weights(cfg.MODEL.WEIGHTS))
    stem = built.model.get_submodule("conv1")
    before, seen = stem.weight.detach().clone(), []
    stem.register_forward_hook(lambda _, args, out: seen.extend((args[0], out)))
    images, labels = next(iter(classification.build_loader(cfg, training, built.meta, 0)))
    assert images.shape == (8, 4, 32, 32)
    losses = built.network.train()(images, labels)
    (dZ,) = torch.autograd.grad(losses["loss_cls"], seen[1])
    gradient = reference.conv_gradient(stem, seen[0].detach(), dZ, 0.1)[0]
    expected = -cfg.SOLVER.BASE_LR * gradient.reshape(before.shape)
    update = weights(output)["conv1.weight"].double() - before.double()
    assert (update - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_file_says_the_statistics_and_an_evaluation_of_it_gives_the_same(step, folder):
    output, keys, _ = step
    meta = torch.load(output / "model_final.pth", weights_only=True)["meta"]
    assert meta["pixel_mean"] == [110, 111, 112, 113] and meta["pixel_std"] == [70, 71, 72, 73]
    again = dict(zip(keys[::2], keys[1::2], strict=True))
    again |= {"OUTPUT_DIR": output.parent / "again", "MODEL.WEIGHTS": output / "model_final.pth"}
    run_here("pretrain", "--eval-only", *[part for pair in again.items() for part in pair])
    assert results(output.parent / "again") == results(output)
    assert "cannot be read" not in (output / "report.html").read_text()


def test_a_loaded_classifier_takes_files_and_arrays_of_its_channels_and_no_others(step, folder):
    classifier = load_classifier(step[0] / "model_final.pth", "cpu")
    path = folder / "val/dark/000.png"
    pixels = np.array(Image.open(path))
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    seen = classifier([path, Image.open(path), pixels, tensor])
    assert all(torch.equal(other.probabilities, seen[0].probabilities) for other in seen)
    with pytest.raises(UserError, match=r"\(H, W, 4\), or a tensor \(4, H, W\)"):
        classifier(pixels[..., :3])


def test_an_exported_classifier_takes_images_of_its_channels(step, folder, tmp_path):
    printed = run_here(
        "export", "--weights", step[0] / "model_final.pth", "--format", "torchscript",
        "--out", tmp_path / "four.pt", "--images", folder / "val/dark", "--count", 2,
    )  # fmt: skip
    assert "uint8 (B, 4, 32, 32), 0 to 255" in printed


def test_a_resumed_run_of_four_channels_goes_on_to_the_same_bits(folder, tmp_path):
    keys = statistics(4)
    keys |= {"SOLVER__LR_SCHEDULER_NAME": "WarmupMultiStepLR", "SOLVER__STEPS": [9.0]}
    for name, steps in (("whole", 3), ("cut", 2)):
        keys["SOLVER__MAX_ITER"] = steps
        run_here("pretrain", *options(folder, tmp_path / name, **keys))
    keys["SOLVER__MAX_ITER"] = 3
    run_here("pretrain", "--resume", *options(folder, tmp_path / "cut", **keys))
    assert_same_bits(tmp_path / "cut", tmp_path / "whole")


def filters_in(report):
    """The pictures of filters on a page, (H, W, 3) each."""
    found = re.findall(r'class="filters"[^>]*base64,([^"]*)"', report.read_text())
    return [np.array(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]


FORMS = {
    "grey": (1, ".png", {"MODEL__STEM_INIT": "whitened"}),
    "two": (2, ".npy", {"INPUT__CROP": "simple"}),
    "patch_norm": (
        5,
        ".tif",
        {
            "MODEL__NAME": "timm:test_vit", "MODEL__NORM": "BN", "MODEL__WIDTH": 64,
            "MODEL__PATCH_NORM": "dual", "INPUT__CROP": "random_resized", "INPUT__ROTATION": 10,
            "INPUT__ERASING": 1.0, "MIX__MIXUP_ALPHA": 0.2, "MIX__CUTMIX_ALPHA": 1.0,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_models_files_and_geometric_augmentations_go_with_any_number_of_channels(form, tmp_path):
    channels, suffix, changes = FORMS[form]
    folder = write_folder(tmp_path / "images", channels, suffix, train=4, val=2)
    output = tmp_path / "out"
    keys = {**statistics(channels), "SOLVER__MAX_ITER": 1, **changes}
    printed = run_here("pretrain", *options(folder, output, **keys))
    assert "TrAct on '" in printed and results(output)["images"] == 4
    filters = [value for value in weights(output).values() if value.dim() == 4]
    assert filters[0].shape[1] == channels
    assert ("is initialised by whitening filters" in printed) == (form == "grey")
    shown = filters_in(output / "report.html")
    assert len(shown) == 2  # at the start and now
    assert all((pixels == pixels[..., :1]).all() == (channels < 3) for pixels in shown)


def test_weights_of_four_channels_begin_a_detector_of_four_channels(folder, tmp_path):
    changes = {"MODEL__NAME": "resnet18", "MODEL__WIDTH": 64, "MODEL__NORM": "BN"}
    changes |= {"MODEL__SMALL_IMAGES": False, "SOLVER__MAX_ITER": 1, **statistics(4)}
    run_here("pretrain", *options(folder, tmp_path / "classifier", **changes))
    tree = write_tree(tmp_path / "tree", train=2, test=1)
    path = tmp_path / "classifier/model_final.pth"
    changes = {"MODEL__WEIGHTS": path, "MODEL__BACKBONE__NORM": "BN", **statistics(4)}
    changes |= {"MODEL__BACKBONE__FREEZE_AT": 1, "SOLVER__MAX_ITER": 1}
    printed = run_here("train", *tiny_options(tree, tmp_path / "detector", **changes))
    assert "widened" not in printed
    stem = weights(tmp_path / "detector")["backbone.body.conv1.weight"]
    assert torch.equal(stem, weights(tmp_path / "classifier")["conv1.weight"])
    changes |= {f"MODEL__PIXEL_{kind}": [90.0] * 4 for kind in ("MEAN", "STD")}
    with pytest.raises(UserError, match=r"differ from the statistics that .*model_final\.pth was"):
        call("train", tiny_options(tree, tmp_path / "other", **changes))


def test_images_of_other_channels_are_named_before_the_training(folder, tmp_path):
    with pytest.raises(UserError, match=r"000\.png: the image has 4 channels.* is for 5"):
        call("pretrain", options(folder, tmp_path / "out", **statistics(5)))
