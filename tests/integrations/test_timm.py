"""timm's models; test_trainers_page.py has the loop of its train.py."""

import pytest
import timm

from tract_det import TrActConv2d, apply_tract


@pytest.mark.parametrize("saved_with", [True, False])
def test_checkpoints_of_timms_models_fit_with_and_without_tract(saved_with):
    models = [timm.create_model("resnet10t", num_classes=5) for _ in range(2)]
    apply_tract(models[0])
    source, target = models if saved_with else models[::-1]
    target.load_state_dict(source.state_dict())
    stem = models[0].get_submodule(models[0].pretrained_cfg["first_conv"])
    assert isinstance(stem, TrActConv2d)
