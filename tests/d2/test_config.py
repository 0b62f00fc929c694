"""MODEL.TRACT in detectron2's configuration: a model has TrAct on its stem, or is not built."""

import copy
import pickle

import pytest
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    GeneralizedRCNN,
    RetinaNet,
    build_backbone,
    build_model,
)
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from detectron2.utils.registry import Registry
from torch import nn

from tests.conftest import run_python
from tests.d2.models import CONFIGS, pixels, tract_cfg
from tract_det import TrActConv2d, TrActError
from tract_det import remove_tract as remove_layers
from tract_det.d2 import add_tract_config, remove_tract

R_50 = CONFIGS / "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
RETINANET = CONFIGS / "COCO-Detection/retinanet_R_50_FPN_1x.yaml"


def has_tract(model):
    return any(isinstance(layer, TrActConv2d) for layer in model.modules())


def test_spawned_workers_follow_the_cfg_that_they_receive(tmp_path):
    process = run_python("tests/d2/worker.py", tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    stems = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert stems == {"rank0": "TrActConv2d", "rank1": "TrActConv2d"}


def on_meta(cfg):
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)


def file(path, **model):
    """A configuration file with these keys of MODEL."""
    path.write_text(yaml.safe_dump({"VERSION": 2, "MODEL": model}))
    return str(path)


def by_assignment(cfg, tmp_path):
    cfg.merge_from_file(str(RETINANET))
    cfg.MODEL.TRACT.ENABLED = True


def by_list(cfg, tmp_path):
    cfg.merge_from_file(str(RETINANET))
    cfg.merge_from_list(["MODEL.TRACT.ENABLED", "True"])


def by_a_file_before(cfg, tmp_path):
    cfg.merge_from_file(file(tmp_path / "a.yaml", TRACT={"ENABLED": True}))
    assert cfg.MODEL.META_ARCHITECTURE == "TrAct"  # looked at in between
    cfg.merge_from_file(str(RETINANET))


def by_the_names(cfg, tmp_path):
    cfg.merge_from_file(str(RETINANET))
    names = {"META_ARCHITECTURE": "TrAct", "TRACT": {"META_ARCHITECTURE": "RetinaNet"}}
    cfg.merge_from_file(file(tmp_path / "a.yaml", **names))


def by_what_a_run_has_written(cfg, tmp_path):
    written = tract_cfg(RETINANET)
    written.freeze()
    (tmp_path / "config.yaml").write_text(written.dump())
    cfg.merge_from_file(str(tmp_path / "config.yaml"))


WAYS = [by_assignment, by_list, by_a_file_before, by_the_names, by_what_a_run_has_written]


@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("travel", [copy.deepcopy, lambda cfg: pickle.loads(pickle.dumps(cfg))])
def test_however_the_key_is_set_the_model_is_its_own_class_with_tract(way, travel, tmp_path):
    cfg = get_cfg()
    add_tract_config(cfg)
    way(cfg, tmp_path)
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg = travel(cfg)
    assert cfg.MODEL.META_ARCHITECTURE == "TrAct"
    assert cfg.MODEL.TRACT.META_ARCHITECTURE == "RetinaNet"
    model = on_meta(cfg)
    assert type(model) is RetinaNet and has_tract(model)
    cfg.freeze()
    assert has_tract(on_meta(cfg))
    cfg.defrost()
    cfg.MODEL.TRACT.ENABLED = False
    assert cfg.MODEL.META_ARCHITECTURE == "RetinaNet" and cfg.MODEL.TRACT.META_ARCHITECTURE == ""
    assert not has_tract(on_meta(cfg))
    off = tract_cfg(RETINANET, "MODEL.TRACT.ENABLED", False)
    assert (cfg.MODEL.TRACT, cfg.MODEL.BACKBONE) == (off.MODEL.TRACT, off.MODEL.BACKBONE)


class Mine(GeneralizedRCNN):
    """A user's subclass, registered only by some tests."""


def test_a_users_own_architecture_gets_tract():
    META_ARCH_REGISTRY.register(Mine)
    try:
        model = on_meta(tract_cfg(R_50, "MODEL.META_ARCHITECTURE", "Mine"))
    finally:
        del META_ARCH_REGISTRY._obj_map["Mine"]
    assert type(model) is Mine and has_tract(model)


@pytest.mark.parametrize(
    "build",
    [
        GeneralizedRCNN,
        Mine,
        lambda cfg: GeneralizedRCNN(cfg=cfg),
        lambda cfg: GeneralizedRCNN(**GeneralizedRCNN.from_config(cfg)),
        META_ARCH_REGISTRY.get("GeneralizedRCNN"),
        build_backbone,
    ],
)
def test_a_model_that_is_built_past_build_model_is_an_error_not_a_plain_one(build):
    cfg = tract_cfg(R_50)
    with pytest.raises(TrActError, match=r"build_model\(cfg\).* call that; or .*apply_tract\("):
        build(cfg)
    cfg.MODEL.TRACT.ENABLED = False
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        assert not has_tract(build(cfg))


def test_the_registries_of_detectron2_are_its_own():
    assert META_ARCH_REGISTRY.get("GeneralizedRCNN") is GeneralizedRCNN
    assert type(META_ARCH_REGISTRY) is type(BACKBONE_REGISTRY) is Registry


WITHOUT_IMPORT = """
import sys
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import GeneralizedRCNN, build_model
cfg = get_cfg()
try:
    cfg.merge_from_file(sys.argv[1])
except KeyError as error:
    print("read:", error)
cfg = CfgNode(cfg.load_yaml_with_base(sys.argv[1]))
for build in (build_model, GeneralizedRCNN):
    try:
        build(cfg)
    except KeyError as error:
        print("built:", error)
assert "tract_det" not in sys.modules
"""


def test_a_process_without_the_import_is_a_key_error_not_a_plain_training(tmp_path):
    """Whether it reads the file that a run has written by get_cfg(), or as it is."""
    cfg = tract_cfg(R_50)
    cfg.freeze()
    (tmp_path / "config.yaml").write_text(cfg.dump())
    (tmp_path / "program.py").write_text(WITHOUT_IMPORT)
    process = run_python(tmp_path / "program.py", tmp_path / "config.yaml")
    assert process.returncode == 0, process.stderr[-3000:]
    read, *built = process.stdout.splitlines()
    assert read.startswith("read: ") and "Non-existent config key: MODEL.TRACT" in read
    assert "'TrAct'" in built[0] and "'build_tract_backbone'" in built[1] and len(built) == 2


@pytest.mark.parametrize("name", ["", "TrAct"])
def test_an_architecture_without_its_own_name_is_refused(name):
    cfg = tract_cfg(R_50, "MODEL.META_ARCHITECTURE", "TrAct")
    cfg.MODEL.TRACT.META_ARCHITECTURE = name
    with pytest.raises(TrActError, match=r"MODEL\.TRACT\.META_ARCHITECTURE does not name"):
        build_model(cfg)
    bare = get_cfg()
    bare.MODEL.META_ARCHITECTURE = "TrAct"
    with pytest.raises(TrActError, match=r"call add_tract_config\(cfg\)"):
        build_model(bare)


def test_plug_ins_may_add_their_keys_before_and_after():
    cfg = get_cfg()
    cfg.MODEL.BEFORE = CfgNode({"A": 1})
    add_tract_config(cfg)
    cfg.MODEL.AFTER = CfgNode({"B": {"C": 2}})
    other = CfgNode({"MODEL": {"BEFORE": {"A": 3}, "AFTER": {"B": {"C": 4}}}})
    cfg.merge_from_other_cfg(other)
    assert (cfg.MODEL.BEFORE.A, cfg.MODEL.AFTER.B.C) == (3, 4)
    assert all(type(node) is CfgNode for node in (cfg.MODEL, cfg.MODEL.TRACT, cfg.MODEL.AFTER))


def test_a_cfg_of_another_kind_is_refused():
    class Other(CfgNode):
        pass

    with pytest.raises(TrActError, match=r"takes the cfg of .* this is a tests\..*Other: give"):
        add_tract_config(Other(get_cfg()))


def replace_stem(model):
    model.backbone.stem.conv1 = nn.Conv2d(3, 64, 7, 2, 3)


def freeze_stem(model):
    model.backbone.freeze(1)


def set_to_eval(model):
    model.backbone.eval()


@pytest.mark.parametrize(
    "change", [replace_stem, freeze_stem, set_to_eval, remove_layers], ids=lambda f: f.__name__
)
def test_a_training_step_without_a_tract_stem_is_an_error(change, generator):
    torch.manual_seed(0)
    model = build_model(tract_cfg(CONFIGS / "COCO-Detection/rpn_R_50_C4_1x.yaml")).train()
    batch = pixels(generator, (64, 64))
    batch[0]["instances"] = Instances((64, 64), gt_boxes=Boxes(torch.tensor([[8.0, 8, 40, 40]])))
    with EventStorage():
        model(batch)
        change(model)
        with pytest.raises(TrActError, match=r"Network learns by TrAct any more.*d2.remove_tract"):
            model(batch)
        with torch.no_grad():
            model(batch)
            model.eval()(batch)
        remove_tract(model).train()(batch)


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
