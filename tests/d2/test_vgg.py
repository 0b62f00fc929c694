"""VGG in detectron2 is torchvision's network, and is frozen, loaded and trained as others are."""

import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyCall, get_cfg, instantiate
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    build_model,
)
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from tests.conftest import photo_like
from tests.reference import conv_gradient
from tract_det.cli import call
from tract_det.d2 import VGG, VGGBoxHead, add_tract_config, apply_tract, config_file
from tract_det.errors import UserError
from tract_det.modeling.backbones import build_vgg, freeze
from tract_det.modeling.faster_rcnn import build_faster_rcnn
from tract_det.modeling.loading import load_into
from tract_det.modeling.weight_files import read_weights
from tract_det.pixels import IMAGENET_MEAN, IMAGENET_STD
from tract_det.tract import TrActConv2d, TrActError

STATISTICS = ["--pixel-mean", *map(str, IMAGENET_MEAN), "--pixel-std", *map(str, IMAGENET_STD)]


def config(name, *pairs):
    """A config of the package, on the CPU and changed by `KEY, VALUE` pairs."""
    cfg = get_cfg()
    add_tract_config(cfg)
    cfg.merge_from_file(config_file(f"PascalVOC-Detection/{name}.yaml"))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *pairs])
    return cfg


SMALL = ("MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 50)
LEVELS = [[16], [32], [64], [96], [128]]
PYRAMID = (
    *("MODEL.BACKBONE.NAME", "build_tract_vgg_fpn_backbone", "MODEL.VGG.DEPTH", 11),
    *("MODEL.VGG.OUT_FEATURES", ["conv3", "conv4", "conv5", "pool5"]),
    *("MODEL.FPN.IN_FEATURES", ["conv3", "conv4", "conv5", "pool5"]),
    *("MODEL.ANCHOR_GENERATOR.SIZES", LEVELS),
    *("MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"]),
    *("MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"]),
)  # fmt: skip
RETINANET = (
    *("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.VGG.DEPTH", 11),
    *("MODEL.BACKBONE.NAME", "build_tract_retinanet_vgg_fpn_backbone"),
    *("MODEL.VGG.OUT_FEATURES", ["conv4", "conv5", "pool5"]),
    *("MODEL.FPN.IN_FEATURES", ["conv4", "conv5", "pool5"], "MODEL.ANCHOR_GENERATOR.SIZES", LEVELS),
)


def build(cfg):
    torch.manual_seed(0)
    return build_model(cfg)


def photographs(*sizes):
    """RGB images in [0, 255], as from a data loader but not rounded, each with a box."""
    generator = torch.Generator().manual_seed(0)
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    batch = []
    for size in sizes:
        image = photo_like(generator, 3, *size) * std + mean
        instances = Instances(size)
        instances.gt_boxes = Boxes(torch.tensor([[8.0, 8, 40, 40]]))
        instances.gt_classes = torch.tensor([3])
        batch.append({"image": image, "instances": instances})
    return batch


def features(model, image):
    """Features of a detectron2 model, whose `backbone` may be a feature pyramid."""
    pixels = model.preprocess_image([{"image": image}]).tensor
    with torch.no_grad():
        return getattr(model.backbone, "bottom_up", model.backbone)(pixels)


def torchvision_features(detector, image):
    """Features of a detector on torchvision's parts."""
    pixels = detector.transform.normalize(image / 255)[None]
    backbone = detector.backbone
    with torch.no_grad():
        return (backbone.body if hasattr(backbone, "body") else backbone)(pixels)


def assert_close(actual, expected):
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert expected.abs().max() > 1e-2


@pytest.fixture(scope="module")
def vgg16(tmp_path_factory):
    """The paths of a torchvision `.pth` of VGG-16 and of the `.pkl` converted from it."""
    folder = tmp_path_factory.mktemp("vgg16")
    torch.manual_seed(0)
    model = torchvision.models.vgg16(weights=None, num_classes=2)
    torch.save(model.state_dict(), folder / "w.pth")
    call("convert", [str(folder / "w.pth"), str(folder / "w.pkl"), *STATISTICS])
    yield str(folder / "w.pth"), str(folder / "w.pkl")
    for path in folder.iterdir():  # half a gigabyte each
        path.unlink()


def test_one_file_gives_both_back_ends_the_same_features_and_the_same_box_head(vgg16):
    pth, pkl = vgg16
    model = build(config("faster_rcnn_VGG_16")).eval()
    DetectionCheckpointer(model).load(pkl)
    (photo,) = photographs((96, 128))
    conv5 = features(model, photo["image"])["conv5"]
    pooled = torch.randn(3, 512, 7, 7).relu()
    detector = build_faster_rcnn(backbone="vgg16", num_classes=2).eval()
    for path in (pth, pkl):
        detector.load_state_dict({k: torch.zeros_like(v) for k, v in detector.state_dict().items()})
        report = load_into(detector, read_weights(path), ["a", "b"])
        assert len(report.used) == 26 + 4
        assert_close(conv5, torchvision_features(detector, photo["image"]))
        with torch.no_grad():
            assert_close(model.roi_heads.box_head(pooled), detector.roi_heads.box_head(pooled))


def test_a_file_of_features_alone_with_batch_norm_gives_both_the_same_features(tmp_path):
    torch.manual_seed(0)
    source = torchvision.models.vgg16_bn(weights=None, num_classes=2).features
    source(torch.randn(2, 3, 64, 64))  # updates the running statistics
    state = {f"features.{key}": value for key, value in source.state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    call("convert", [str(tmp_path / "w.pth"), str(tmp_path / "w.pkl"), *STATISTICS])
    model = build(config("faster_rcnn_VGG_16_BN", *SMALL)).eval()
    DetectionCheckpointer(model).load(str(tmp_path / "w.pkl"))
    detector = build_faster_rcnn(backbone="vgg16_bn", num_classes=2).eval()
    (photo,) = photographs((96, 96))
    for name in ("w.pth", "w.pkl"):
        load_into(detector, read_weights(str(tmp_path / name)), ["a", "b"])
        expected = torchvision_features(detector, photo["image"])
        assert_close(features(model, photo["image"])["conv5"], expected)


def test_a_bgr_file_gives_a_bgr_model_the_features_of_rgb(tmp_path):
    torch.manual_seed(0)
    source = torchvision.models.vgg16(weights=None, num_classes=2).features
    torch.save({f"features.{k}": v for k, v in source.state_dict().items()}, tmp_path / "w.pth")
    models = {}
    for order, step in (("RGB", 1), ("BGR", -1)):
        path = str(tmp_path / f"{order}.pkl")
        call("convert", [str(tmp_path / "w.pth"), path, *STATISTICS, "--format", order])
        statistics = []
        for key, values in (("PIXEL_MEAN", IMAGENET_MEAN), ("PIXEL_STD", IMAGENET_STD)):
            statistics += [f"MODEL.{key}", list(values)[::step]]
        cfg = config("faster_rcnn_VGG_16", *SMALL, "INPUT.FORMAT", order, *statistics)
        models[order] = build(cfg).eval()
        DetectionCheckpointer(models[order]).load(path)
    (photo,) = photographs((96, 96))
    flipped = features(models["BGR"], photo["image"].flip(0))["conv5"]
    assert_close(flipped, features(models["RGB"], photo["image"])["conv5"])


def test_one_file_of_resnet50_gives_both_back_ends_the_same_features(tmp_path):
    torch.manual_seed(0)
    source = torchvision.models.resnet50(weights=None)
    source(torch.randn(2, 3, 64, 64))
    torch.save(source.state_dict(), tmp_path / "w.pth")
    call("convert", [str(tmp_path / "w.pth"), str(tmp_path / "w.pkl"), *STATISTICS])
    model = build(config("faster_rcnn_R_50_FPN")).eval()
    DetectionCheckpointer(model).load(str(tmp_path / "w.pkl"))
    detector = build_faster_rcnn(backbone="resnet50_fpn", num_classes=2, norm="FrozenBN").eval()
    (photo,) = photographs((96, 128))
    for name in ("w.pth", "w.pkl"):
        load_into(detector, read_weights(str(tmp_path / name)), ["a", "b"])
        expected = torchvision_features(detector, photo["image"])
        for level, feature in enumerate(features(model, photo["image"]).values()):
            assert_close(feature, expected[str(level)])


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("faster_rcnn_VGG_16", SMALL),
        ("faster_rcnn_VGG_16_BN", SMALL),
        ("faster_rcnn_VGG_16", ("MODEL.VGG.NORM", "BN", *SMALL)),
        ("faster_rcnn_VGG_16", (*PYRAMID, *SMALL)),
        ("faster_rcnn_VGG_16", RETINANET),
    ],
    ids=["vgg16", "frozen-bn", "bn", "fpn", "retinanet"],
)
def test_tract_changes_only_the_stems_gradient_and_gives_it_the_references_value(name, pairs):
    cfg = config(name, "MODEL.BACKBONE.FREEZE_AT", 0, *pairs)
    plain = build(cfg)
    cfg.MODEL.TRACT.ENABLED = True
    model = build(cfg)
    assert list(model.state_dict()) == list(plain.state_dict())
    stem = next(m for m in model.modules() if isinstance(m, TrActConv2d))
    batch, record = photographs((64, 64), (64, 64)), {}

    def keep(layer, args, output):
        record["images"] = args[0].detach()
        output.register_hook(lambda gradient: record.update(dZ=gradient.clone()))

    stem.register_forward_hook(keep)
    losses = []
    for network in (plain, model):
        torch.manual_seed(1)
        with EventStorage():
            losses.append(network(batch))
        sum(losses[-1].values()).backward()
    assert losses[0].keys() == losses[1].keys()
    assert all(torch.equal(losses[0][key], losses[1][key]) for key in losses[0])
    tract_gradient, plain_gradient, _ = conv_gradient(stem, record["images"], record["dZ"], 0.1)
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    for key, parameter in plain.named_parameters():
        if key.endswith("features.0.weight"):
            for actual, expected in (
                (gradients[key], tract_gradient),
                (parameter.grad, plain_gradient),
            ):
                error = (actual.flatten(1).double() - expected[0]).norm() / expected.norm()
                assert error < 1e-5
        elif parameter.grad is not None:  # RetinaNet's differ from run to run by 1e-7
            difference = (gradients[key] - parameter.grad).norm()
            assert difference <= 1e-6 * parameter.grad.norm(), key


@pytest.mark.parametrize("norm", ["", "BN"])
@pytest.mark.parametrize("freeze_at", range(6))
def test_freeze_at_freezes_the_same_layers_as_with_torchvisions_vgg(freeze_at, norm):
    with torch.device("meta"):
        expected = build_vgg("vgg16_bn" if norm else "vgg16", "BN")
        vgg, whole = VGG(16, norm=norm, freeze_at=freeze_at), VGG(16, norm=norm)
    freeze(expected, freeze_at)
    trained = [{k for k, p in m.named_parameters() if p.requires_grad} for m in (vgg, expected)]
    assert trained[0] == trained[1]
    assert vgg.state_dict().keys() == whole.state_dict().keys()
    if norm:
        frozen = sum(isinstance(m, FrozenBatchNorm2d) for m in vgg.modules())
        assert frozen == [0, 2, 4, 7, 10, 13][freeze_at]


def test_tract_on_a_frozen_vgg_is_refused_with_the_key_to_set():
    frozen = ("MODEL.BACKBONE.FREEZE_AT", 2, "MODEL.TRACT.ENABLED", True)
    with pytest.raises(TrActError, match=r"FREEZE_AT 2 .* set MODEL\.BACKBONE\.FREEZE_AT 0"):
        build(config("faster_rcnn_VGG_16", *frozen))
    with pytest.raises(TrActError, match=r"'features\.0' is frozen"):
        apply_tract(VGG(11, freeze_at=1), pixel_std=IMAGENET_STD)


@pytest.mark.parametrize("norm", ["", "BN"])
@pytest.mark.parametrize("depth", [11, 13, 16, 19])
def test_features_are_torchvisions_before_each_pooling_in_the_announced_shapes(depth, norm):
    names = ["conv1", "conv2", "conv3", "conv4", "conv5", "pool5"]
    with torch.device("meta"):
        vgg = VGG(depth, norm=norm, out_features=names).eval()
        layers = torchvision.models.get_model(f"vgg{depth}{'_bn' if norm else ''}").features.eval()
    for tensor in vgg.to_empty(device="cpu").state_dict().values():
        tensor.normal_(0, 0.05) if tensor.dim() == 4 else tensor.fill_(1)
    layers.to_empty(device="cpu").load_state_dict(vgg.features.state_dict())
    images, expected = torch.randn(1, 3, 64, 96), {}
    with torch.no_grad():
        outputs, hidden = vgg(images), images
        for layer in layers:
            if isinstance(layer, torch.nn.MaxPool2d):
                expected[names[len(expected)]] = hidden.clone()
            hidden = layer(hidden)
    expected["pool5"] = hidden
    assert list(outputs) == list(vgg.output_shape()) == names
    for name, shape in vgg.output_shape().items():
        assert torch.equal(outputs[name], expected[name])
        size = (shape.channels, 64 // shape.stride, 96 // shape.stride)
        assert outputs[name].shape == (1, *size)


def test_layers_that_no_feature_needs_are_not_built():
    with torch.device("meta"):
        vggs = {name: VGG(16, out_features=[name]) for name in ("conv2", "conv5", "pool5")}
    assert [len(vgg.features) for vgg in vggs.values()] == [9, 30, 31]


def test_lazyconfig_builds_backbone_and_head():
    backbone = LazyCall(VGG)(depth=11, norm="GN", out_features=["conv4", "conv5"])
    pooled = LazyCall(ShapeSpec)(channels=512, height=7, width=7)
    head = LazyCall(VGGBoxHead)(input_shape=pooled, fc_dim=8, dropout=0.0)
    vgg, box_head = instantiate(backbone), instantiate(head)
    assert list(vgg.output_shape()) == list(vgg(torch.randn(1, 3, 32, 32))) == ["conv4", "conv5"]
    assert box_head(torch.randn(0, 512, 7, 7)).shape == (0, 8)
    assert box_head.output_shape.channels == 8
    tract = LazyCall(apply_tract)(model=backbone, pixel_std=[58.395, 57.12, 57.375])
    assert isinstance(instantiate(tract).features[0], TrActConv2d)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (("MODEL.VGG.DEPTH", 12), r"MODEL\.VGG\.DEPTH is 12: it takes one of \(11, 13, 16, 19\)"),
        (("MODEL.VGG.OUT_FEATURES", ["res5"]), r"OUT_FEATURES is \['res5'\]: .* conv5, pool5"),
        (("MODEL.VGG.OUT_FEATURES", []), r"MODEL\.VGG\.OUT_FEATURES is \[\]"),
        (("MODEL.BACKBONE.FREEZE_AT", -1), r"FREEZE_AT is -1: a VGG takes 0 \(nothing\) to 5"),
        (("MODEL.PIXEL_MEAN", [1.0], "MODEL.PIXEL_STD", [1.0]), r"a VGG takes three"),
        ((*PYRAMID, "MODEL.FPN.IN_FEATURES", ["conv4", "conv5"]), r"FPN\.IN_FEATURES .* pool5"),
        ((*PYRAMID, "MODEL.VGG.OUT_FEATURES", ["pool5"]), r"of MODEL\.VGG\.OUT_FEATURES \['pool5"),
    ],
)
def test_invalid_vgg_settings_are_refused_by_their_key(pairs, message):
    with pytest.raises(UserError, match=message) as caught:
        build(config("faster_rcnn_VGG_16", *pairs))
    assert "\n" not in str(caught.value)


def test_names_in_detectron2s_registries_carry_ours():
    """Others register names such as build_vgg_backbone, and a name can be registered only once."""
    for registry in (META_ARCH_REGISTRY, BACKBONE_REGISTRY, ROI_BOX_HEAD_REGISTRY):
        ours = [name for name, value in registry if value.__module__.startswith("tract_det.")]
        assert ours and all("tract" in name.lower() for name in ours)
