"""Networks for CIFAR have their published shapes, and TrAct finds their stems."""

import pytest
import torch
from torch import nn

from tract_det import TrActConv2d, apply_tract, find_stem
from tract_det.errors import UserError
from tract_det.modeling.cifar_models import CIFAR_MODELS
from tract_det.modeling.classifiers import build_classifier

# Stem, millions of parameters with 100 classes, and the sizes of the feature maps.
SHAPES = {
    "vit_cifar": ("patch_embed.proj", 6.3, [8]),
    "resnext152_cifar": ("conv1", 57.0, [32, 16, 8, 4]),
    "wide_resnet40_10": ("stem.conv", 55.9, [32, 16, 8]),
    "inception_resnet_v2_cifar": ("conv2d_1a.conv", 32.4, [32, 15, 7]),
    "shufflenet_g3": ("conv1.0", 1.0, [32, 16, 8, 4]),
}


def build(name, num_classes=100, **options):
    return build_classifier(name, num_classes, small_images=True, image_size=32, **options)


def sizes(model, images):
    """The distinct heights of the feature maps, from large to small."""
    found = set()
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda *x: found.add(x[2].shape[-1]))
    assert model.eval()(images).shape == (len(images), 100)
    return sorted(found - {1}, reverse=True)


def test_every_network_is_described_here():
    assert tuple(SHAPES) == CIFAR_MODELS


@pytest.mark.parametrize("name", CIFAR_MODELS)
def test_a_network_has_its_parameters_and_sizes_and_tract_finds_its_stem(name):
    stem, millions, maps = SHAPES[name]
    with torch.device("meta"):
        model = build(name)
        assert find_stem(model) == stem
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
        assert sizes(model, torch.randn(2, 3, 32, 32)) == maps
        apply_tract(model)
    assert isinstance(model.get_submodule(stem), TrActConv2d)


@pytest.mark.parametrize("name", ["vit_cifar", "shufflenet_g3"])
def test_tract_learns_in_the_stem(name, generator):
    model = build(name)
    apply_tract(model)
    model(torch.randn(2, 3, 32, 32, generator=generator)).square().sum().backward()
    assert model.get_submodule(SHAPES[name][0]).weight.grad.abs().sum() > 0


def test_inception_resnet_has_5_10_and_5_blocks():
    with torch.device("meta"):
        model = build("inception_resnet_v2_cifar")
    assert [len(model.repeat), len(model.repeat_1), len(model.repeat_2) + 1] == [5, 10, 5]


def test_a_wide_resnet_drops_between_the_convolutions_of_every_block():
    with torch.device("meta"):
        model = build("wide_resnet40_10", drop_rate=0.5)
    rates = {n: m.p for n, m in model.named_modules() if isinstance(m, nn.Dropout)}
    assert rates == {f"stages.{s}.blocks.{b}.norm2.drop": 0.5 for s in range(3) for b in range(6)}


def test_channels_of_a_shuffle_unit_reach_every_group(generator):
    """Without the shuffle, an output would depend on a third of the inputs alone."""
    model = build("shufflenet_g3").eval()
    unit = model.stage2[1]
    images = torch.randn(1, 240, 8, 8, generator=generator, requires_grad=True)
    residual = nn.Sequential(unit.reduce, nn.ChannelShuffle(3), unit.depthwise, unit.expand)
    assert torch.equal(unit(images), (images + residual(images)).relu())
    (gradient,) = torch.autograd.grad(residual(images)[:, 0].sum(), images)
    assert all(part.abs().sum() > 0 for part in gradient.chunk(3, dim=1))


def test_a_halving_shuffle_unit_keeps_its_averaged_input(generator):
    unit = build("shufflenet_g3").eval().stage2[0]
    images = torch.rand(1, 24, 8, 8, generator=generator)
    averaged = nn.functional.avg_pool2d(images, 3, 2, 1)
    out = unit(images)
    assert out.shape == (1, 240, 4, 4) and torch.equal(out[:, :24], averaged)


@pytest.mark.parametrize("name", ["timm:resnet18", "timm:resnet50"])
def test_stochastic_depth_grows_linearly_from_the_first_block_to_the_last(name):
    """As in https://github.com/weiaicunzai/pytorch-cifar100, where blocks survive with 1 to 0.5."""
    with torch.device("meta"):
        model = build(name, drop_path_rate=0.5)
    blocks = [*model.layer1, *model.layer2, *model.layer3, *model.layer4]
    rates = [block.drop_path.drop_prob if block.drop_path else 0.0 for block in blocks]
    assert rates == pytest.approx(torch.linspace(0, 0.5, len(blocks)).tolist())


@pytest.mark.parametrize("name", ["resnet18", "resnet10", "wide_resnet50_2", "resnext152_cifar"])
def test_a_small_pool_halves_the_size_after_the_stem_and_changes_no_key(name):
    with torch.device("meta"):
        without, pooled = build(name), build(name, small_pool=True)
        assert list(pooled.state_dict()) == list(without.state_dict())
        images = torch.randn(2, 3, 32, 32)
        assert sizes(without, images) == [32, 16, 8, 4]
        assert sizes(pooled, images) == [32, 16, 8, 4, 2]
        assert pooled.maxpool(pooled.conv1(images)).shape == (2, 64, 16, 16)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet18", {"small_images": False, "small_pool": True}, r"MODEL\.SMALL_POOL True needs"),
        ("densenet121", {"small_pool": True}, r"MODEL\.SMALL_POOL True .* not densenet121"),
        ("timm:resnet18", {"small_pool": True}, r"MODEL\.SMALL_POOL True .* not timm:resnet18"),
        ("vit_cifar", {"small_pool": True}, r"MODEL\.SMALL_POOL True .* not vit_cifar"),
        ("vit_cifar", {"small_images": False}, r"vit_cifar needs MODEL\.SMALL_IMAGES True"),
        ("vit_cifar", {"width": 32}, r"MODEL\.WIDTH is 32, but vit_cifar has"),
        ("vit_cifar", {"drop_path_rate": 0.1}, r"MODEL\.DROP_PATH_RATE is 0\.1, which vit_cifar"),
        ("wide_resnet40_10", {"norm": "GN"}, r"MODEL\.NORM is GN but the norms of wide_resnet"),
        ("vit_cifa", {}, r"MODEL\.NAME vit_cifa: .* similar names: vit_cifar"),
        ("shufflenet_g3", {"checkpointing": True}, r"MODEL\.CHECKPOINTING True: shufflenet_g3 has"),
    ],
)  # fmt: skip
def test_what_a_network_does_not_have_is_refused_in_one_line(name, options, message):
    options = {"small_images": True, "image_size": 32, **options}
    with torch.device("meta"), pytest.raises(UserError, match=message) as caught:
        build_classifier(name, 10, **options)
    assert "\n" not in str(caught.value)


def test_networks_take_the_other_options(generator):
    images = torch.randn(2, 3, 32, 32, generator=generator)
    for name, options in (
        ("shufflenet_g3", {"norm": "GN"}),
        ("vit_cifar", {"patch_norm": "dual"}),
        ("vit_cifar", {"checkpointing": True}),
    ):
        model = build(name, **options)
        model(images).sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
