"""Frozen stages of classifiers: what learns, what counts, and what stays loadable."""

import pytest
import torch

from tract_det.errors import UserError
from tract_det.modeling.classifiers import build_classifier
from tract_det.modeling.freezing import freeze_stages

# A model, and the beginnings of the names that two frozen stages have.
MODELS = [
    ("resnet18", ("conv1.", "bn1.", "layer1.")),
    ("vgg11_bn", ("features.0.", "features.1.", "features.4.", "features.5.")),
    ("timm:seresnet18", ("conv1.", "bn1.", "layer1.")),
    ("timm:vit_tiny_patch16_224", ("cls_token", "pos_embed", "patch_embed.", "blocks.0.")),
]


@pytest.mark.parametrize(("name", "frozen"), MODELS, ids=[name for name, _ in MODELS])
def test_two_stages_are_the_stem_and_the_first_stage_and_stay_as_they_are(name, frozen, generator):
    model = build_classifier(name, 5, image_size=64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    freeze_stages(model, 2, name)
    model.train()(torch.randn(2, 3, 64, 64, generator=generator)).square().sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and not any(key.startswith(frozen) for key in moved)
    assert set(before) - set(model.state_dict()) == {
        key for key in before if key.startswith(frozen) and "num_batches" in key
    }


def test_nothing_is_frozen_by_default_and_a_stem_alone_in_other_models():
    for stages in (-1, 0):
        model = build_classifier("densenet121", 5)
        freeze_stages(model, stages, "densenet121")
        assert all(parameter.requires_grad for parameter in model.parameters())
    freeze_stages(model, 1, "densenet121")
    frozen = [key for key, value in model.named_parameters() if not value.requires_grad]
    assert frozen == ["features.conv0.weight"]


def test_more_stages_than_a_model_has_are_refused():
    with pytest.raises(UserError, match=r"FREEZE_AT is 2, but densenet121 can .* up to stage 1:"):
        freeze_stages(build_classifier("densenet121", 5), 2, "densenet121")
