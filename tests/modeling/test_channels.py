"""Models of other channels than three, and RGB weights in them."""

import pytest
import torch
import torch.nn.functional as F

from tract_det.errors import UserError
from tract_det.modeling.backbones import build_vgg
from tract_det.modeling.channels import set_channels, widened_stem, widens
from tract_det.modeling.classifiers import build_classifier, check_image_size
from tract_det.modeling.faster_rcnn import build_faster_rcnn
from tract_det.modeling.loading import load_into, load_into_classifier
from tract_det.modeling.weight_files import Weights

STEM = "backbone.body.conv1.weight"


def detector(channels):
    torch.manual_seed(0)
    return build_faster_rcnn(
        backbone="resnet18_fpn",
        num_classes=2,
        fpn_channels=8,
        pixel_mean=[100.0] * channels,
        pixel_std=[50.0] * channels,
    )


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(1)
    return Weights("rgb.pth", build_classifier("resnet18", 5).state_dict(), {})


def test_a_stem_of_one_channel_gives_for_grey_what_three_equal_channels_gave(generator):
    weight = torch.randn(8, 3, 7, 7, generator=generator)
    grey = torch.randn(1, 1, 30, 30, generator=generator)
    expected = F.conv2d(grey.expand(-1, 3, -1, -1), weight)
    for channels in (1, 2):
        out = F.conv2d(grey.expand(-1, channels, -1, -1), widened_stem(weight, channels))
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [4, 6])
def test_further_channels_get_the_mean_of_rgb_and_the_report_says_so(classifier, channels):
    model = detector(channels)
    assert widens(classifier, channels) and not widens(classifier, 3)
    report = load_into(model, classifier, ["a", "b"])
    rgb, stem = classifier.state["conv1.weight"], model.state_dict()[STEM]
    assert torch.equal(stem[:, :3], rgb)
    assert torch.equal(stem[:, 3:], rgb.mean(1, keepdim=True).expand(-1, channels - 3, -1, -1))
    assert f"'{STEM}' widened from 3 to {channels} channels (RGB kept" in str(report)


def test_weights_of_as_many_channels_load_as_they_are():
    trained, model = detector(4), detector(4)
    torch.nn.init.normal_(trained.backbone.body.conv1.weight)
    weights = Weights("own.pth", trained.state_dict(), {"class_names": ["a", "b"]})
    assert not widens(weights, 4)
    for strict in (True, False):
        report = load_into(model, weights, ["a", "b"], strict=strict)
        assert torch.equal(model.state_dict()[STEM], trained.state_dict()[STEM])
        assert not report.widened and not report.random
    with pytest.raises(UserError, match=rf"'{STEM}' is \(64, 4, 7, 7\) in the file and \(64, 5"):
        load_into(detector(5), weights, ["a", "b"])


def test_an_evaluation_widens_nothing():
    weights = Weights("rgb.pth", detector(3).state_dict(), {"class_names": ["a", "b"]})
    with pytest.raises(UserError, match=rf"'{STEM}' is \(64, 3, 7, 7\) in the file"):
        load_into(detector(4), weights, ["a", "b"], strict=True)


def test_a_detector_takes_images_of_its_channels(generator):
    model = detector(5).eval()
    images = [torch.randint(0, 256, (5, 64, 80), generator=generator).byte()]
    with torch.no_grad():
        assert set(model(images)[0]) == {"boxes", "scores", "labels"}


def test_a_vggs_stem_has_the_channels_too(generator):
    backbone = build_vgg("vgg16", "BN")
    set_channels(backbone, 2)
    assert (
        backbone.features[0].weight.shape == (64, 2, 3, 3) and not backbone.features[0].bias.any()
    )
    with torch.no_grad():
        assert backbone(torch.randn(1, 2, 32, 32, generator=generator)).shape == (1, 512, 2, 2)


def test_three_channels_leave_the_random_state_and_the_weights_as_torchvision_makes_them():
    torch.manual_seed(0)
    three = build_faster_rcnn(backbone="resnet18_fpn", num_classes=2, fpn_channels=8)
    same = detector(3).state_dict()
    assert all(torch.equal(value, same[key]) for key, value in three.state_dict().items())


# Name, options, and the stem.
CLASSIFIERS = [
    ("resnet10", {"small_images": True, "width": 8}, "conv1"),
    ("resnet18", {}, "conv1"),
    ("vgg11_bn", {"small_images": True}, "features.0"),
    ("vit_b_32", {"patch_norm": "dual"}, "conv_proj"),
    ("convnext_tiny", {}, "features.0.0"),
    ("shufflenet_v2_x0_5", {"small_images": True}, "conv1.0"),
    ("vit_cifar", {"small_images": True, "image_size": 32}, "patch_embed.proj"),
    ("wide_resnet40_10", {"small_images": True}, "stem.conv"),
    ("timm:test_vit", {"patch_norm": "layer_norm", "image_size": 160}, "patch_embed.proj"),
    ("timm:resnet18", {"small_images": True}, "conv1"),
    ("timm:tf_efficientnet_b0", {}, "conv_stem"),
]


@pytest.mark.parametrize(
    ("name", "options", "stem"), CLASSIFIERS, ids=lambda value: str(value)[:20]
)
def test_only_the_stem_of_a_classifier_depends_on_the_channels(name, options, stem):
    with torch.device("meta"):
        rgb, many = (build_classifier(name, 3, channels=n, **options).state_dict() for n in (3, 7))
        model = build_classifier(name, 3, channels=7, **options)
    assert rgb.keys() == many.keys()
    other = {key for key, value in rgb.items() if value.shape != many[key].shape}
    assert {key for key in other if "patch_norm" not in key} == {f"{stem}.weight"}
    assert many[f"{stem}.weight"].shape[1] == 7
    side = options.get("image_size", 224)
    assert model.eval()(torch.empty(1, 7, side, side, device="meta")).shape == (1, 3)


def test_the_size_of_images_is_tried_with_their_channels():
    model = build_classifier("resnet10", 2, small_images=True, width=8, channels=5)
    check_image_size(model, "resnet10", 32, 5)
    with pytest.raises(UserError, match=r"PIXEL_MEAN for 4 channels, .*5 channels, but got 4"):
        check_image_size(model, "resnet10", 32, 4)


@pytest.mark.parametrize("name", ["resnet18", "vit_b_32"])
def test_a_random_stem_has_the_spread_of_its_librarys(name):
    stems = []
    for channels in (3, 10):
        torch.manual_seed(0)
        model = build_classifier(name, 2, channels=channels)
        stems.append(next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d)))
    rgb, many = stems
    assert float(many.weight.detach().std() / rgb.weight.detach().std()) == pytest.approx(
        1, abs=0.02
    )
    assert rgb.bias is None or torch.equal(many.bias, rgb.bias)


@pytest.mark.parametrize("name", ["resnet10", "timm:test_vit"])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_rgb_weights_are_widened_in_a_classifier_too_but_not_for_an_evaluation(name, channels):
    options = {"image_size": 32, **({"width": 8} if name == "resnet10" else {})}
    weights = Weights("rgb.pth", build_classifier(name, 2, **options).state_dict(), {})
    model = build_classifier(name, 2, channels=channels, **options)
    report = load_into_classifier(model, weights, ["a", "b"])
    assert f"widened from 3 to {channels} channels" in str(report) and not report.random
    (key,) = [key for key in report.used if key in ("conv1.weight", "patch_embed.proj.weight")]
    expected = widened_stem(weights.state[key], channels)
    assert torch.equal(model.state_dict()[key], expected)
    with pytest.raises(UserError, match=rf"'{key}' is \(.*, 3, .*\) in the file"):
        load_into_classifier(model, weights, ["a", "b"], strict=True)
