"""MODEL.TRACT in detectron2's configuration and registry, which otherwise do not change."""

import copy
import pickle

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from torch import nn

from tests.conftest import run_python
from tests.d2.models import CONFIGS, tract_cfg
from tract_det import TrActConv2d, TrActError
from tract_det.d2 import add_tract_config

R_50 = CONFIGS / "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"


def has_tract(model):
    return any(isinstance(layer, TrActConv2d) for layer in model.modules())


def test_spawned_workers_follow_the_cfg_that_they_receive(tmp_path):
    process = run_python("tests/d2/worker.py", tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    stems = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert stems == {"rank0": "TrActConv2d", "rank1": "TrActConv2d"}


def test_the_registry_returns_an_object_that_acts_as_the_class():
    builder = META_ARCH_REGISTRY.get("GeneralizedRCNN")
    assert isinstance(builder, type) and issubclass(builder, nn.Module)
    assert builder == GeneralizedRCNN and builder.__name__ == "GeneralizedRCNN"
    assert {builder: 1}[GeneralizedRCNN] == 1

    class Derived(builder):
        pass

    assert Derived.__mro__[1] is GeneralizedRCNN and issubclass(Derived, builder)
    assert pickle.loads(pickle.dumps(builder)) == copy.deepcopy(builder) == builder
    with pytest.raises(KeyError, match="No object named 'X'"):
        META_ARCH_REGISTRY.get("X")


def test_the_class_can_be_called_with_a_cfg_or_with_its_parts():
    cfg = tract_cfg(R_50, "MODEL.DEVICE", "meta")
    builder = META_ARCH_REGISTRY.get("GeneralizedRCNN")
    with torch.device("meta"):
        parts = builder.from_config(cfg)
        plain = builder(**parts)
        models = [builder(cfg), builder(cfg=cfg)]
    assert not has_tract(plain) and all(map(has_tract, models))
    assert all(isinstance(model, builder) for model in (plain, *models))
    assert not isinstance(nn.Identity(), builder)


def test_a_function_may_be_registered():
    def build_mine(cfg):
        return nn.Identity()

    META_ARCH_REGISTRY.register(build_mine)
    try:
        assert isinstance(META_ARCH_REGISTRY.get("build_mine")(get_cfg()), nn.Identity)
    finally:
        del META_ARCH_REGISTRY._obj_map["build_mine"]


def test_existing_keys_keep_their_values():
    cfg = tract_cfg()
    cfg.MODEL.TRACT.LAMBDA, cfg.MODEL.VGG.DEPTH = 0.2, 19
    del cfg.MODEL.TRACT["STEM"]  # as if a file without it had been merged before
    add_tract_config(cfg)
    assert cfg.MODEL.TRACT.ENABLED and cfg.MODEL.TRACT.LAMBDA == 0.2
    assert cfg.MODEL.TRACT.STEM == "" and cfg.MODEL.VGG.DEPTH == 19
    cfg.freeze()
    add_tract_config(cfg)  # nothing to add


def test_a_frozen_cfg_is_refused_in_one_line():
    cfg = get_cfg()
    cfg.freeze()
    with pytest.raises(TrActError, match=r"call it before cfg\.freeze\(\), or cfg\.defrost\(\)"):
        add_tract_config(cfg)
