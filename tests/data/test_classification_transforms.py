"""Augmentation and mixing of images to classify."""

import pickle
import random
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import v2

from tract_det.data import classification_transforms
from tract_det.data.classification_transforms import (
    Blur,
    CenterCrop,
    Mix,
    PadCrop,
    ToModel,
)
from tract_det.errors import UserError

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
classification_train, classification_test = (
    partial(function, mean=MEAN, std=STD)
    for function in (
        classification_transforms.classification_train,
        classification_transforms.classification_test,
    )
)
RAW = {"standardize": False, "value_range": 255.0}


def pixels(height=40, width=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def smooth(height=60, width=80):
    """An image whose neighbouring pixels differ, but only by little."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([y + x, 2 * y, 3 * x]).clamp(max=255).to(torch.uint8)


def draw(transform, image, seed=0):
    torch.manual_seed(seed)
    return transform(image)


EVERYTHING = [
    {},
    {"crop": "pad"},
    {"crop": "simple", "interpolation": "bicubic"},
    {"crop": "none"},
    {"auto_augment": "randaugment", "magnitude": 15, "num_ops": 3},
    {"auto_augment": "trivialaugment", "interpolation": "bicubic"},
    {"auto_augment": "three_augment"},
    {"crop": "pad", "rotation": 15.0},
    {"auto_augment": "autoaugment_cifar10"},
    {"color_jitter": 0.4, "erasing": 1.0},
    {"erasing": 1.0, **RAW},
    {"standardize": False, "flip": 0.0},
]


@pytest.mark.parametrize("options", EVERYTHING, ids=str)
def test_every_recipe_gives_float32_of_the_size_and_leaves_its_argument_alone(options):
    transform = classification_train(32, **options)
    for layout in (pixels(), pixels().permute(1, 2, 0).contiguous().permute(2, 0, 1)):
        before = layout.clone()
        for seed in range(12):
            out = draw(transform, layout, seed)
            assert out.dtype == torch.float32
            assert out.shape == (3, 32, 32)
            assert type(out) is torch.Tensor
        assert torch.equal(layout, before)


@pytest.mark.parametrize("options", EVERYTHING, ids=str)
def test_every_recipe_draws_from_torch_alone(options):
    transform = pickle.loads(pickle.dumps(classification_train(32, **options)))
    image = pixels()
    first = [draw(transform, image, seed) for seed in range(8)]
    random.seed(1)
    np.random.seed(1)
    assert all(torch.equal(draw(transform, image, s), first[s]) for s in range(8))
    changed = {tuple(out.flatten().tolist()) for out in first}
    assert len(changed) > 1 or options == {"standardize": False, "flip": 0.0}


def test_padding_and_cropping_is_cropping_the_padded_image():
    image = pixels(32, 30)
    padded = torch.nn.functional.pad(image, (4, 4, 4, 4))
    crop = PadCrop(32, 4)
    corners = set()
    for seed in range(300):
        out = draw(crop, image, seed)
        top, left = next(
            (t, c)
            for t in range(padded.shape[1] - 31)
            for c in range(padded.shape[2] - 31)
            if torch.equal(padded[:, t : t + 32, c : c + 32], out)
        )
        corners.add((top, left))
    assert {t for t, _ in corners} == set(range(9))
    assert {c for _, c in corners} == set(range(7))


def test_every_crop_is_as_likely():
    image = torch.arange(1, 5, dtype=torch.uint8).repeat(3, 4, 1)  # columns 1 2 3 4
    torch.manual_seed(0)
    firsts = [int(PadCrop(4, 1)(image)[0, 2, 0]) for _ in range(3000)]
    counts = [firsts.count(value) for value in (0, 1, 2)]  # one black column, none, one cut off
    assert sum(counts) == 3000
    assert min(counts) > 900


def test_a_margin_of_nothing_keeps_the_image():
    assert torch.equal(PadCrop(40, 0)(pixels(40, 40)), pixels(40, 40))


def test_random_resized_crops_are_torchvisions():
    image = smooth()
    options = {"scale": (0.3, 0.6), "ratio": (0.9, 1.2), "flip": 0.0, **RAW}
    for mode in ("bilinear", "bicubic"):
        transform = classification_train(24, interpolation=mode, **options)
        reference = v2.RandomResizedCrop(
            24, (0.3, 0.6), (0.9, 1.2), v2.InterpolationMode(mode), antialias=True
        )
        for seed in range(5):
            assert torch.equal(draw(transform, image, seed), draw(reference, image, seed).float())


def test_simple_crops_show_nearly_all_of_the_shorter_side():
    transform = classification_train(32, crop="simple", flip=0.0, **RAW)
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    image[:, 20:44, 20:44] = 255  # 12 x 12 of 32 x 32, at 10: reflections of 4 pixels miss it
    for seed in range(20):
        out = draw(transform, image, seed)
        assert 120 < (out[0] > 127).sum() < 170


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_flipping_mirrors_left_and_right(flip):
    transform = classification_train(40, crop="none", flip=flip, **RAW)
    image = pixels(40, 40)
    assert torch.equal(transform(image), (image.flip(-1) if flip else image).float())


def test_rotations_reach_the_angle_to_both_sides_and_leave_black_corners():
    transform = classification_train(63, crop="none", flip=0.0, rotation=15.0, **RAW)
    image = torch.zeros(3, 63, 63, dtype=torch.uint8)
    image[:, 31, 31:] = 255  # a clock's hand, from the center to the right
    angles = []
    for seed in range(200):
        rows, columns = torch.nonzero(draw(transform, image, seed)[0], as_tuple=True)
        tip = columns.argmax()
        angles.append(float(torch.rad2deg(torch.atan2(31.0 - rows[tip], columns[tip] - 31.0))))
    assert -16 < min(angles) < -13 and 13 < max(angles) < 16
    white = draw(transform, torch.full_like(image, 255), seed=1)
    assert set(white.unique().tolist()) == {0, 255} and white[0, 0, 0] == 0


def test_rotations_follow_the_flip():
    image = pixels(32, 32)
    transform = classification_train(32, crop="none", rotation=15.0, **RAW)
    reference = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomRotation(15)])
    for seed in range(5):
        assert torch.equal(draw(transform, image, seed), draw(reference, image, seed).float())


def test_without_rotation_no_random_number_is_drawn():
    options = {"crop": "none", "flip": 0.0, "rotation": 0.0}
    torch.manual_seed(0)
    before = torch.get_rng_state()
    classification_train(40, **options)(pixels(40, 40))
    assert torch.equal(torch.get_rng_state(), before)


def test_autoaugment_follows_the_flip_with_cifars_policy_and_fills_with_grey():
    image = pixels(32, 32)
    transform = classification_train(32, crop="none", auto_augment="autoaugment_cifar10", **RAW)
    policy = v2.AutoAugment(
        v2.AutoAugmentPolicy.CIFAR10, v2.InterpolationMode.BILINEAR, fill=[128.0] * 3
    )
    reference = v2.Compose([v2.RandomHorizontalFlip(), policy])
    for seed in range(40):
        assert torch.equal(draw(transform, image, seed), draw(reference, image, seed).float())


def test_standardised_pixels_are_those_of_v2():
    image = pixels()
    reference = v2.Compose(
        [
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([m / 255 for m in MEAN], [s / 255 for s in STD]),
        ]
    )
    torch.testing.assert_close(
        classification_test(40)(image), reference(image)[:, :, 5:45], rtol=1e-5, atol=1e-5
    )


def test_without_standardisation_pixels_are_in_the_range():
    image = pixels(32, 32)
    for value_range in (1.0, 255.0):
        options = {"standardize": False, "value_range": value_range}
        for transform in (
            classification_test(32, **options),
            classification_train(32, crop="none", flip=0.0, **options),
        ):
            torch.testing.assert_close(transform(image), image.float() * value_range / 255)


@pytest.mark.parametrize("options", [{}, {"standardize": False}, RAW], ids=str)
def test_erasing_leaves_the_mean_colour(options):
    mean = (10.0, 100.0, 200.0)
    plain, erasing = (
        classification_train(64, crop="none", flip=0.0, erasing=e, mean=mean, **options)
        for e in (0.0, 1.0)
    )
    image = pixels(64, 64)
    colour = ToModel(mean, STD, options.get("value_range", 1.0), options == {})(
        torch.tensor(mean)[:, None, None].to(torch.uint8)
    )
    original, erased = plain(image), draw(erasing, image)
    changed = (erased != original).any(0)
    assert 0.01 < changed.float().mean() < 0.34
    torch.testing.assert_close(
        erased[:, changed], colour[:, 0].expand(-1, int(changed.sum())), atol=1e-6, rtol=1e-5
    )


def test_three_augment_chooses_grey_solarised_or_blurred_equally_often():
    (choice,) = (
        step
        for step in classification_train(32, auto_augment="three_augment").transforms
        if isinstance(step, v2.RandomChoice)
    )
    image = pixels(32, 32)
    as_pil = Image.fromarray(image.permute(1, 2, 0).numpy())
    solarised = torch.from_numpy(np.array(ImageOps.solarize(as_pil))).permute(2, 0, 1)
    counts = {"grey": 0, "solarised": 0, "blurred": 0}
    torch.manual_seed(0)
    for _ in range(600):
        out = choice(image)
        if torch.equal(out[0], out[1]) and torch.equal(out[1], out[2]):
            counts["grey"] += 1
        elif torch.equal(out, solarised):
            counts["solarised"] += 1
        else:
            counts["blurred"] += 1
    assert min(counts.values()) > 160


def test_three_augment_brings_its_colour_jitter():
    for configured, expected in ((0.0, 0.3), (0.1, 0.1)):
        steps = classification_train(
            32, auto_augment="three_augment", color_jitter=configured
        ).transforms
        (jitter,) = (step for step in steps if isinstance(step, v2.ColorJitter))
        assert jitter.brightness == (1 - expected, 1 + expected)
        assert jitter.hue is None
    assert not any(isinstance(s, v2.ColorJitter) for s in classification_train(32).transforms)


def test_blurring_is_pillows():
    image = pixels(32, 32)
    out = draw(Blur(), image, 3)
    torch.manual_seed(3)
    sigma = float(torch.empty(()).uniform_(0.1, 2.0))
    as_pil = Image.fromarray(image.permute(1, 2, 0).numpy())
    expected = np.array(as_pil.filter(ImageFilter.GaussianBlur(sigma)))
    assert np.array_equal(out.permute(1, 2, 0).numpy(), expected)


def test_in_evaluation_the_shorter_side_is_resized_and_the_center_cut():
    image = smooth(60, 80)
    out = classification_test(20, resize=30, **RAW)(image)
    resized = v2.functional.resize(image, [30, 40], antialias=True)
    assert torch.equal(out, resized[:, 5:25, 10:30].float())


def test_an_image_that_is_too_small_is_refused_not_padded():
    for transform in (CenterCrop(32), classification_test(32), PadCrop(32, 4)):
        with pytest.raises(UserError, match=r"smaller than INPUT\.SIZE 32"):
            transform(pixels(20, 40))


@pytest.mark.parametrize("options", [{"crop": "center"}, {"auto_augment": "augmix"}], ids=str)
def test_an_unknown_name_is_refused(options):
    with pytest.raises(ValueError, match="it takes one of"):
        classification_train(32, **options)


# Mixing.


def batch(n=6, classes=4, size=16):
    labels = torch.arange(n) % classes
    return torch.arange(1.0, n + 1)[:, None, None, None].expand(n, 3, size, size).clone(), labels


def one_hot(labels, classes=4):
    return torch.nn.functional.one_hot(labels, classes).float()


def test_mixup_mixes_targets_as_pixels():
    images, labels = batch()
    mix = Mix(4, mixup_alpha=1.0)
    shares = set()
    for seed in range(10):
        torch.manual_seed(seed)
        mixed, targets = mix(images, labels)
        # Pixel values tell the share: image i is i + 1 everywhere, and is mixed with image i - 1.
        share = mixed[1:, 0, 0, 0] - images[:-1, 0, 0, 0]
        assert torch.allclose(share, share[0].expand_as(share), atol=1e-5)
        expected = share[0] * one_hot(labels) + (1 - share[0]) * one_hot(labels).roll(1, 0)
        torch.testing.assert_close(targets, expected, atol=1e-5, rtol=0)
        shares.add(round(float(share[0]), 3))
    assert len(shares) > 5


def test_cutmix_mixes_targets_by_area():
    images, labels = batch()
    mix = Mix(4, cutmix_alpha=1.0)
    for seed in range(10):
        torch.manual_seed(seed)
        mixed, targets = mix(images, labels)
        foreign = (mixed != images).float().mean((1, 2, 3))
        rows = torch.arange(6)
        torch.testing.assert_close(targets[rows, labels], 1 - foreign, atol=1e-5, rtol=0)
        assert ((mixed == images) | (mixed == images.roll(1, 0))).all()


@pytest.mark.parametrize("prob", [0.0, 0.3, 1.0])
def test_a_batch_is_mixed_with_its_probability_and_cut_with_the_other(prob):
    mix = Mix(4, 0.8, 1.0, prob, switch_prob=0.25)
    images, labels = batch()
    torch.manual_seed(0)
    kinds = {"same": 0, "cut": 0, "mixed": 0}
    for _ in range(600):
        mixed, _ = mix(images, labels)
        is_same = torch.equal(mixed, images)
        has_old_values = torch.equal(mixed, mixed.round())
        kinds["same" if is_same else "cut" if has_old_values else "mixed"] += 1
    assert kinds["mixed"] == pytest.approx(600 * prob * 0.75, abs=60)
    # A cut without area changes nothing.
    assert kinds["cut"] == pytest.approx(600 * prob * 0.25, abs=60)


@pytest.mark.parametrize("alphas", [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
def test_smoothed_targets_are_distributions_with_cross_entropys_smoothing(alphas):
    images, labels = batch()
    _, targets = Mix(4, *alphas, smoothing=0.1)(images, labels)
    torch.testing.assert_close(targets.sum(1), torch.ones(6))
    assert targets.min() >= 0.025 - 1e-6
    if alphas == (0.0, 0.0):
        logits = torch.randn(6, 4)
        entropy = torch.nn.functional.cross_entropy
        torch.testing.assert_close(
            entropy(logits, targets), entropy(logits, labels, label_smoothing=0.1)
        )


def test_nothing_to_mix_leaves_one_hot_targets_and_the_images():
    images, labels = batch()
    same, targets = Mix(4)(images, labels)
    assert same is images
    assert torch.equal(targets, one_hot(labels))


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
@pytest.mark.parametrize("crop", ["random_resized", "pad", "simple", "none"])
def test_geometric_steps_treat_channels_of_any_number_alike(channels, crop):
    image = pixels()[:1]
    options = {"rotation": 20, "erasing": 1.0, "crop": crop}
    out = []
    for count in (3, channels):
        transform = classification_transforms.classification_train(
            32, mean=[100.0] * count, std=[50.0] * count, **options
        )
        out.append(draw(transform, image.expand(count, -1, -1)))
    rgb, many = out
    assert many.shape == (channels, 32, 32)
    torch.testing.assert_close(many, rgb[:1].expand(channels, -1, -1), rtol=0, atol=1e-6)
    test = classification_transforms.classification_test(
        32, resize=36, mean=range(channels), std=[2.0] * channels
    )
    means = torch.arange(channels)[:, None, None] / 2
    both = test(image.expand(channels, -1, -1)) + means
    assert torch.equal(both, both[:1].expand_as(both))
