"""In every model that detectron2 ships, TrAct changes the stem's gradient, not outputs or keys."""

import copy
from collections import OrderedDict

import pytest
import torch
from detectron2 import model_zoo  # noqa: F401 - registers nothing, but must import
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    FPN,
    META_ARCH_REGISTRY,
    MViT,
    SwinTransformer,
    build_backbone,
    build_model,
    build_resnet_backbone,
)
from torch import nn

from tests.d2.models import CONFIGS, error_of_stem, pixels, tract_cfg, watched
from tract_det import TrActConv2d, TrActError, find_stem, remove_tract
from tract_det.d2 import add_tract_config, apply_tract
from tract_det.d2 import remove_tract as remove_tract_of_a_model

YAML = sorted(CONFIGS.rglob("*.yaml"))
LAZY = [path for path in sorted(CONFIGS.rglob("*.py")) if {"common", "Misc"}.isdisjoint(path.parts)]
STEMS = ("backbone.bottom_up.stem.conv1", "backbone.stem.conv1")


def backbone_of(cfg):
    """The settings that determine the backbone and its pixels, as text."""
    model = cfg.MODEL
    parts = (model.BACKBONE, model.RESNETS, model.FPN, model.PIXEL_STD, cfg.INPUT.FORMAT)
    return "\n".join(map(str, parts))


def several_backbones():
    """The first file with each backbone."""
    files = {}
    for path in YAML:
        files.setdefault(backbone_of(tract_cfg(path)), path)
    return sorted(files.values())


def test_there_are_configs():
    assert len(YAML) > 60 and len(LAZY) > 15


@pytest.mark.parametrize("path", YAML, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_yacs_model_gets_tract_on_its_stem_and_keeps_its_keys(path):
    on = tract_cfg(path, "MODEL.DEVICE", "meta")
    off = on.clone()
    off.MODEL.TRACT.ENABLED = False
    with torch.device("meta"):
        model, plain = build_model(on), build_model(off)
    layers = [name for name, layer in model.named_modules() if isinstance(layer, TrActConv2d)]
    assert len(layers) == 1 and layers[0] in STEMS
    assert not any(isinstance(layer, TrActConv2d) for layer in plain.modules())
    assert list(model.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("path", several_backbones(), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_yacs_backbone_computes_the_same_and_its_stem_learns_by_tract(path, generator):
    torch.manual_seed(0)
    cfg = tract_cfg(path)
    if not torch.cuda.is_available():  # layers above the stem that detectron2 has only for GPUs
        cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False] * 4
        if cfg.MODEL.RESNETS.NORM == "SyncBN":
            cfg.MODEL.RESNETS.NORM = cfg.MODEL.FPN.NORM = "BN"
    model = build_model(cfg)
    images = model.preprocess_image(pixels(generator, (64, 96))).tensor
    check_backbone(model, images)


def check_backbone(model, images):
    """Outputs are the same to the last bit in training and evaluation; the gradient is TrAct's."""
    assert isinstance(model.get_submodule(find_stem(model)), TrActConv2d)
    plain = remove_tract(copy.deepcopy(model)).backbone
    for training in (True, False):
        torch.manual_seed(5)
        expected = plain.train(training)(images)
        torch.manual_seed(5)
        features = model.backbone.train(training)(images)
        assert features.keys() == expected.keys()
        assert all(torch.equal(features[key], expected[key]) for key in features)
    model.backbone.train()
    assert error_of_stem(model.backbone, images) < 1e-5


@pytest.mark.parametrize("path", LAZY, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_lazy_model_gets_tract_by_one_call(path):
    lazy = LazyConfig.load(str(path)).model
    unfreeze(lazy)
    with torch.device("meta"):
        plain = instantiate(lazy)
        model = instantiate(L(apply_tract)(model=lazy, pixel_std=lazy.pixel_std))
    layers = [name for name, layer in model.named_modules() if isinstance(layer, TrActConv2d)]
    assert len(layers) == 1 and layers[0].startswith(("backbone.bottom_up.stem.", "backbone.stem."))
    assert list(model.state_dict()) == list(plain.state_dict())


def unfreeze(lazy):
    bottom = lazy.backbone.bottom_up if "bottom_up" in lazy.backbone else lazy.backbone
    bottom.freeze_at = 0


def vitdet():
    lazy = LazyConfig.load(str(CONFIGS / "common/models/mask_rcnn_vitdet.py")).model
    lazy.backbone.net.update(img_size=64, embed_dim=32, depth=2, num_heads=2, window_size=2)
    lazy.backbone.net.window_block_indexes = [0]
    lazy.backbone.square_pad = 64
    return lazy


def pyramid_of(bottom_up, features):
    lazy = LazyConfig.load(str(CONFIGS / "common/models/mask_rcnn_vitdet.py")).model
    lazy.backbone = L(FPN)(bottom_up=bottom_up, in_features=features, out_channels=16)
    return lazy


def swin():
    bottom_up = L(SwinTransformer)(depths=[1, 1, 1, 1], embed_dim=16, num_heads=[1, 2, 4, 8])
    return pyramid_of(bottom_up, ["p0", "p1", "p2", "p3"])


def mvit():
    bottom_up = L(MViT)(
        embed_dim=16, depth=4, num_heads=1, last_block_indexes=(0, 1, 2, 3), img_size=64
    )
    return pyramid_of(bottom_up, ["scale2", "scale3", "scale4", "scale5"])


def regnet():
    lazy = LazyConfig.load(
        str(CONFIGS / "COCO-InstanceSegmentation/mask_rcnn_regnetx_4gf_dds_fpn_1x.py")
    ).model
    unfreeze(lazy)
    return lazy


@pytest.mark.parametrize("make", [vitdet, swin, mvit, regnet], ids=lambda f: f.__name__)
def test_a_lazy_backbone_computes_the_same_and_its_stem_learns_by_tract(make, generator):
    torch.manual_seed(0)
    model = instantiate(L(apply_tract)(model=make()))
    images = model.preprocess_image(pixels(generator, (64, 64))).tensor
    check_backbone(model, images)


def test_frozen_stems_are_refused_with_the_key_to_set():
    cfg = tract_cfg(CONFIGS / "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    cfg.MODEL.BACKBONE.FREEZE_AT = 2
    with pytest.raises(TrActError, match=r"set MODEL\.BACKBONE\.FREEZE_AT 0$"):
        build_model(cfg)
    lazy = LazyConfig.load(str(CONFIGS / "common/models/mask_rcnn_fpn.py")).model
    lazy.backbone.bottom_up.freeze_at = 2
    with pytest.raises(TrActError, match=r"FREEZE_AT 0"):
        instantiate(L(apply_tract)(model=lazy))


class Wrapped(nn.Module):
    """A meta-architecture that registers other layers before its backbone, as DETR does."""

    def __init__(self, cfg):
        super().__init__()
        self.transformer = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
        self.joiner = nn.Sequential(nn.Sequential(OrderedDict(backbone=build_backbone(cfg))))


@pytest.mark.parametrize(("file", "inner"), [("R_50_C4_1x", ""), ("R_50_FPN_1x", ".bottom_up")])
def test_the_stem_is_sought_in_the_first_backbone(file, inner):
    META_ARCH_REGISTRY.register(Wrapped)
    try:
        cfg = tract_cfg(CONFIGS / f"COCO-Detection/faster_rcnn_{file}.yaml")
        cfg.MODEL.META_ARCHITECTURE = "Wrapped"
        model = build_model(cfg)
    finally:
        del META_ARCH_REGISTRY._obj_map["Wrapped"]
    stem = f"joiner.0.backbone{inner}.stem.conv1"
    assert find_stem(model) == stem and isinstance(model.get_submodule(stem), TrActConv2d)


def build_unfreezable_backbone(cfg, input_shape):
    return build_resnet_backbone(cfg, input_shape).requires_grad_(True)


def test_a_backbone_that_freezes_nothing_needs_no_key():
    BACKBONE_REGISTRY.register(build_unfreezable_backbone)
    try:
        cfg = tract_cfg(CONFIGS / "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml")
        cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "build_unfreezable_backbone", 2
        model = build_model(cfg)
    finally:
        del BACKBONE_REGISTRY._obj_map["build_unfreezable_backbone"]
    assert isinstance(model.backbone.stem.conv1, TrActConv2d)


def test_without_the_key_nothing_changes():
    cfg = get_cfg()
    add_tract_config(cfg)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    assert not any(isinstance(layer, TrActConv2d) for layer in model.modules())
    bare = get_cfg()  # without MODEL.TRACT
    bare.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        build_model(bare)


def test_lambda_is_in_units_of_standardised_pixels_whatever_the_model_divides_by(generator):
    """Weights for BGR with std 1 and for standardised RGB are one network with the same step."""
    file = CONFIGS / "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml"
    std = [57.375, 57.12, 58.395]  # BGR
    raw = build_model(tract_cfg(file))
    scaled = build_model(tract_cfg(file, "MODEL.PIXEL_STD", std))
    uniform = build_model(tract_cfg(file, "MODEL.PIXEL_STD", [57.6] * 3))
    rgb = build_model(tract_cfg(file, "MODEL.PIXEL_STD", std[::-1], "INPUT.FORMAT", "RGB"))
    stems = [model.backbone.stem.conv1 for model in (raw, scaled, uniform, rgb)]
    assert stems[1].lambda_ == stems[3].lambda_ == pytest.approx(0.1)
    assert stems[0].lambda_ == pytest.approx(0.1 * 57.6**2, rel=2e-3)
    # With the same std for all channels the two are the same network, up to the digits of lambda.
    uniform.load_state_dict(raw.state_dict())
    stems[2].weight.data *= 57.6
    updates = []
    for model in (raw, uniform):
        model.double().train()
        model.pixel_mean, model.pixel_std = model.pixel_mean.double(), model.pixel_std.double()
        batch = model.preprocess_image(pixels(torch.Generator().manual_seed(0), (64, 64)))
        model.backbone(batch.tensor)["res4"].square().mean().backward()
        updates.append(model.backbone.stem.conv1.weight.grad)
    # If pixels are s times smaller, a step s times larger changes the outputs by the same amount.
    assert float((updates[1] / 57.6 - updates[0]).norm() / updates[0].norm()) < 1e-3


@pytest.mark.parametrize("keyword", [False, True])
def test_padding_adds_no_patches(keyword, generator):
    """In a batch of two image sizes, `N` counts the windows that see a part of an image."""
    cfg = tract_cfg(CONFIGS / "COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    torch.manual_seed(0)
    model = build_model(cfg).train()
    layer = model.backbone.bottom_up.stem.conv1
    sums = []
    layer_sums = layer._sums

    def record(images):
        sums.append(layer_sums(images))
        return sums[-1]

    layer._sums = record
    inputs = pixels(generator, (64, 90), (96, 60))

    class StopError(Exception):
        pass

    def stop(*_):
        raise StopError

    model.backbone.register_forward_hook(stop)
    for batch in (inputs, inputs[:1], inputs[1:]):
        with pytest.raises(StopError):
            model(batched_inputs=batch) if keyword else model(batch)
    counts = [n for _, n in sums]
    # Stride 2, padded to multiples of 32. Two more windows see an image's end if padding follows.
    assert counts == [34 * 47 + 48 * 32, 32 * 47, 48 * 32]
    model.eval()
    with torch.no_grad(), pytest.raises(StopError):
        model(inputs)
    assert layer.image_sizes is None


def test_remove_tract_leaves_nothing_behind():
    cfg = tract_cfg(CONFIGS / "COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    model = remove_tract_of_a_model(build_model(cfg))
    assert not model._forward_pre_hooks and not model._forward_hooks
    stem = model.backbone.bottom_up.stem.conv1
    assert type(stem) is Conv2d and not {"tract", "image_sizes", "edges"} & set(vars(stem))


def test_the_norm_inside_detectron2s_convolution_stays(generator):
    model = build_model(tract_cfg(CONFIGS / "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"))
    conv = model.backbone.bottom_up.stem.conv1
    assert isinstance(conv.norm, FrozenBatchNorm2d)
    assert "backbone.bottom_up.stem.conv1.norm.weight" in model.state_dict()
    copied = copy.deepcopy(model).backbone.bottom_up.stem.conv1
    assert type(copied) is type(conv) and copied.lambda_ == conv.lambda_
    record = watched(conv)
    assert not record


def test_a_layer_that_cannot_see_the_pixels_is_refused():
    cfg = tract_cfg(CONFIGS / "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    cfg.MODEL.TRACT.STEM = "backbone.fpn_lateral2"
    with pytest.raises(TrActError, match="takes 256 channels and the images have 3"):
        build_model(cfg)
    cfg.MODEL.TRACT.STEM = "nope"
    with pytest.raises(TrActError, match="has no module 'nope'; its children are: backbone, "):
        build_model(cfg)


def test_a_model_without_pixel_statistics_asks_for_them():
    backbone = build_model(tract_cfg(YAML[0])).backbone
    remove_tract(backbone)
    with pytest.raises(TrActError, match=r"has no pixel_std.*pixel_std=\[\.\.\.\]"):
        apply_tract(backbone)
    apply_tract(backbone, pixel_std=[1.0, 1.0, 1.0], pixel_format="BGR")
    assert backbone.get_submodule(find_stem(backbone)).lambda_ > 300
