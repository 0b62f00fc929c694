"""Forms for small images change what their stems do to the size, and nothing else."""

import pytest
import timm
import torch
import torchvision
from torch import nn

from tract_det import TrActConv2d, apply_tract, find_stem
from tract_det.modeling.classifiers import build_classifier

# A model, the last layer of what must keep the size, and the size of the last feature map.
FORMS = [
    ("resnet18", "layer1", 4),
    ("timm:seresnet18", "layer1", 4),
    ("timm:resnetv2_18", "stages.0", 4),
    ("timm:resnext101_32x4d", "layer1", 4),
    ("timm:mobilenetv1_100", "blocks.0", 2),
    ("densenet121", "features.denseblock1", 4),
    ("googlenet", "conv3", 4),
    ("shufflenet_v2_x0_5", "maxpool", 4),
    ("mobilenet_v2", "features.1", 4),
    ("squeezenet1_0", "features.1", 4),
    ("squeezenet1_1", "features.1", 4),
    ("inception_v3", "Mixed_5d", 7),
    ("timm:legacy_xception", "bn2", 2),
    ("timm:inception_v4", "features.9", 7),
    ("timm:inception_resnet_v2", "repeat", 7),
]


def published(name):
    """The library's own model."""
    if name.startswith("timm:"):
        return timm.create_model(name.removeprefix("timm:"), num_classes=7)
    options = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, num_classes=7, **options)


@pytest.mark.parametrize(("name", "stage", "last"), FORMS, ids=[name for name, *_ in FORMS])
def test_the_first_stage_keeps_the_size_and_the_keys_are_the_librarys(name, stage, last):
    with torch.device("meta"):
        small, theirs = build_classifier(name, 7, small_images=True, image_size=32), published(name)
        sizes, ends = [], []
        small.get_submodule(stage).register_forward_hook(lambda *x: sizes.append(x[2].shape[-2:]))
        for layer in small.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(lambda *x: ends.append(x[2].shape[-1]))
        assert small.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert sizes == [(32, 32)]
    assert [size for size in ends if size > 1][-1] == last  # squeeze and excitation is of size 1
    ours = {key: value.shape for key, value in small.state_dict().items()}
    stem = find_stem(theirs)
    assert find_stem(small) == stem
    assert ours.pop(f"{stem}.weight")[-2:] == (3, 3)
    assert ours == {k: v.shape for k, v in theirs.state_dict().items() if k != f"{stem}.weight"}


def test_a_stem_that_is_3x3_already_keeps_its_weight_and_others_are_drawn_anew():
    for name, kept in (("mobilenet_v2", True), ("squeezenet1_0", False)):
        torch.manual_seed(0)
        theirs = published(name)
        torch.manual_seed(0)
        small = build_classifier(name, 7, small_images=True)
        stem = find_stem(small)
        ours, before = small.get_submodule(stem).weight, theirs.get_submodule(stem).weight
        assert (ours.shape == before.shape and torch.equal(ours, before)) == kept
        assert 0 < ours.std().item() < 1 and not ours.is_meta


@pytest.mark.parametrize("name", ["densenet121", "shufflenet_v2_x0_5", "timm:seresnet18"])
def test_tract_learns_in_the_small_stem(name, generator):
    model = build_classifier(name, 7, small_images=True, image_size=32)
    apply_tract(model)
    stem = model.get_submodule(find_stem(model))
    model(torch.randn(2, 3, 32, 32, generator=generator)).square().sum().backward()
    assert isinstance(stem, TrActConv2d) and stem.weight.grad.abs().sum() > 0
