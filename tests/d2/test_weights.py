"""Weights of any origin enter a detectron2 model if its pixels and strides fit, or not at all."""

import pickle
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from tests.conftest import run_python
from tests.d2.models import CONFIGS
from tract_det.d2 import add_tract_config
from tract_det.d2.config_models import build_detector
from tract_det.d2.weights import load_into, meta_of
from tract_det.d2.weights import read as read_weights
from tract_det.errors import UserError
from tract_det.modeling.faster_rcnn import build_faster_rcnn
from tract_det.modeling.loading import load_into as into_ours
from tract_det.modeling.weight_files import Weights
from tract_det.modeling.weight_files import read_weights as read_ours
from tract_det.pixels import IMAGENET_MEAN, IMAGENET_STD

CLASSES = ("a", "b")
R_50 = "PascalVOC-Detection/faster_rcnn_R_50_FPN.yaml"
ZOO = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
BGR = ["MODEL.PIXEL_MEAN", [103.53, 116.28, 123.675], "MODEL.PIXEL_STD", [57.375, 57.12, 58.395]]
BGR += ["INPUT.FORMAT", "BGR", "MODEL.RESNETS.STRIDE_IN_1X1", False]
STATISTICS = {"pixel_mean": IMAGENET_MEAN, "pixel_std": IMAGENET_STD}


def detector(name=R_50, opts=(), num_classes=2):
    return build_detector(name, opts, num_classes=num_classes, freeze_at=0, min_size=0)


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    model = torchvision.models.resnet50(weights=None)
    for module in model.modules():  # norms that are not the identity
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.2, 0.6)
    return model.eval()


@pytest.fixture(scope="module")
def pth(classifier, tmp_path_factory):
    path = tmp_path_factory.mktemp("w") / "resnet50.pth"
    torch.save(classifier.state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def pkl(pth, tmp_path_factory):
    path = tmp_path_factory.mktemp("w") / "R-50.pkl"
    process = run_python(
        "tools/convert_weights.py", pth, path, "--pixel-mean", *IMAGENET_MEAN,
        "--pixel-std", *IMAGENET_STD,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return str(path)


def features(model, image):
    """The outputs of a ResNet's stages for an RGB image in [0, 255], in order of depth."""
    standardised = (image - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(
        IMAGENET_STD
    )[:, None, None]
    with torch.no_grad():
        return list(model(standardised[None]).values())


@pytest.mark.parametrize("source", ["pth", "pkl"])
@pytest.mark.parametrize("opts", [(), BGR], ids=["RGB", "BGR"])
def test_a_file_gives_the_features_of_torchvisions_back_end(
    source, opts, classifier, request, generator
):
    file = request.getfixturevalue(source)
    image = torch.rand(3, 64, 96, generator=generator) * 255
    model = detector(opts=opts).eval()
    weights = read_weights(file)
    if source == "pkl" and opts:  # the file is for RGB, and says so
        with pytest.raises(UserError, match=r"takes RGB and the model BGR: set INPUT\.FORMAT RGB"):
            load_into(model, weights, CLASSES)
        return
    report = load_into(model, weights, CLASSES, **(STATISTICS if source == "pth" else {}))
    assert len(report.used) == 53 * 5 and set(report.left) <= {"linear.weight", "linear.bias"}
    assert all("bottom_up" not in key for key in report.random)
    twin = build_faster_rcnn(backbone="resnet50_fpn", num_classes=2, norm="FrozenBN").eval()
    into_ours(twin, read_ours(file), CLASSES)
    expected = features(twin.backbone.body, image)
    stats = [
        torch.tensor(values)[:, None, None]
        for values in (meta_of(model)[f"pixel_{name}"] for name in ("mean", "std"))
    ]
    pixels = (image - stats[0]) / stats[1]
    with torch.no_grad():
        outputs = model.backbone.bottom_up((pixels.flip(0) if opts else pixels)[None])
    for output, other in zip(outputs.values(), expected, strict=True):
        torch.testing.assert_close(output, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_unknown_pixel_statistics_are_asked_for(pth):
    with pytest.raises(UserError, match=r"set MODEL\.PIXEL_MEAN and MODEL\.PIXEL_STD"):
        load_into(detector(), read_weights(pth), CLASSES)


def test_other_pixels_and_strides_are_refused_with_the_key_to_set(pth, pkl):
    for file, statistics in ((pth, STATISTICS), (pkl, {})):
        model = detector(opts=["MODEL.PIXEL_STD", [1.0, 1.0, 1.0]])
        with pytest.raises(UserError, match=r"MODEL\.PIXEL_STD \[58\.395, 57\.12, 57\.375\] in"):
            load_into(model, read_weights(file), CLASSES, **statistics)
        model = detector(opts=["MODEL.RESNETS.STRIDE_IN_1X1", True])
        with pytest.raises(UserError, match=r"set MODEL\.RESNETS\.STRIDE_IN_1X1 False in"):
            load_into(model, read_weights(file), CLASSES, **statistics)


def caffe2(model, path):
    """A file like MSRA's: Caffe2's names, norms folded into scale and shift, no metadata."""
    rng = np.random.default_rng(0)
    arrays = {"conv1_w_momentum": np.zeros(1, np.float32)}
    leaves = {"shortcut": "branch1", "conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c"}
    for key, tensor in model.backbone.bottom_up.state_dict().items():
        stage, *block, conv = key.replace(".norm", "").rpartition(".")[0].split(".")
        place = "_".join([stage, *block, leaves[conv]]) if block else "conv1"
        norm = f"{place}_bn" if block else "res_conv1_bn"
        named = {".norm.weight": f"{norm}_s", ".norm.bias": f"{norm}_b", ".weight": f"{place}_w"}
        ends = [end for end in named if key.endswith(end)]
        if ends:  # not a statistic
            arrays[named[ends[0]]] = rng.normal(size=tensor.shape).astype(np.float32)
    path.write_bytes(pickle.dumps(arrays, 2))
    return arrays


def test_a_caffe2_file_enters_detectron2s_default_model(tmp_path):
    model, path = detector(ZOO), tmp_path / "R-50.pkl"
    arrays = caffe2(model, path)
    report = load_into(model, read_weights(str(path)), CLASSES)
    stem = model.backbone.bottom_up.stem.conv1
    assert len(report.used) == 53 * 3 and not report.left
    assert torch.equal(stem.weight, torch.from_numpy(arrays["conv1_w"]))
    assert torch.equal(stem.norm.bias, torch.from_numpy(arrays["res_conv1_bn_b"]))


STD = [57.375, 57.12, 58.395]


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["INPUT.FORMAT", "RGB"], "takes BGR and the model RGB"),
        (["MODEL.PIXEL_STD", STD], r"MODEL\.PIXEL_STD \[1\.0, 1\.0, 1\.0\] in MODEL"),
        (["MODEL.RESNETS.STRIDE_IN_1X1", False], r"STRIDE_IN_1X1 True in .*stride_in_1x1=true"),
    ],
)
def test_a_caffe2_file_is_for_bgr_of_std_1_and_strides_in_the_1x1(opts, message, tmp_path):
    model, path = detector(ZOO, opts), tmp_path / "R-50.pkl"
    caffe2(model, path)
    with pytest.raises(UserError, match=message):
        load_into(model, read_weights(str(path)), CLASSES)


RESNEXT = ["MODEL.RESNETS.NUM_GROUPS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 8]


def test_fairs_resnexts_stride_in_the_3x3_and_the_user_states_their_pixels(tmp_path):
    opts = [*RESNEXT, "MODEL.RESNETS.STRIDE_IN_1X1", False, "MODEL.PIXEL_STD", STD]
    model, path = detector(ZOO, opts), tmp_path / "X.pkl"
    caffe2(model, path)
    load_into(model, read_weights(str(path)), CLASSES)
    load_into(model, read_weights(str(path)), CLASSES, **STATISTICS)
    with pytest.raises(UserError, match=r"STRIDE_IN_1X1 False"):
        load_into(detector(ZOO, RESNEXT), read_weights(str(path)), CLASSES)


@pytest.mark.parametrize(
    ("name", "opts", "message"),
    [
        (R_50, [], None),
        (R_50, ["MODEL.PIXEL_STD", [1.0] * 3], r"PIXEL_STD \[58\.395, 57\.12, 57\.375\] in"),
        (R_50, ["MODEL.RESNETS.STRIDE_IN_1X1", True], "STRIDE_IN_1X1 False"),
        (ZOO, [], "takes RGB and the model BGR"),
    ],
)
def test_a_file_of_detectron2s_own_converter_is_torchvisions(name, opts, message, tmp_path):
    """tools/convert-torchvision-to-d2.py writes its author, and nothing of pixels or strides."""
    model, path = detector(name, opts), tmp_path / "r50.pkl"
    arrays = {key: value.numpy() for key, value in model.backbone.bottom_up.state_dict().items()}
    content = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content, 2))
    if message is None:
        assert len(load_into(model, read_weights(str(path)), CLASSES).used) == 53 * 5
        return
    with pytest.raises(UserError, match=message):
        load_into(model, read_weights(str(path)), CLASSES)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.PIXEL_STD", [1.0] * 3], "was trained with other pixel statistics"),
        (BGR, "takes RGB and the model BGR.*LazyConfig: input_format"),
        (["MODEL.RESNETS.STRIDE_IN_1X1", True], "strides in the 3x3"),
    ],
)
def test_a_saved_model_is_refused_for_other_pixels_and_strides(opts, message, strict):
    """In training and with --eval-only alike, and before anything is loaded."""
    saved, model = detector(), detector(opts=opts)
    weights = Weights("model_final.pth", saved.state_dict(), meta_of(saved))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=message) as caught:
        load_into(model, weights, CLASSES, strict=strict)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    load_into(detector(), weights, CLASSES, strict=strict)


def program_cfg(file, *pairs, on):
    """The cfg of detectron2's own program for its R-50-FPN, which takes BGR with a std of 1."""
    cfg = get_cfg()
    add_tract_config(cfg)
    cfg.merge_from_file(str(CONFIGS / ZOO))
    cfg.merge_from_list(["MODEL.WEIGHTS", str(file), "MODEL.DEVICE", "meta", *pairs])
    cfg.MODEL.TRACT.ENABLED, cfg.MODEL.BACKBONE.FREEZE_AT = on, 0
    return cfg


RGB = ["INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", list(IMAGENET_MEAN)]
STANDARDISED = [*RGB, "MODEL.PIXEL_STD", list(IMAGENET_STD)]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "takes RGB and the model BGR: set INPUT.FORMAT RGB and MODEL.PIXEL_MEAN"),
        (RGB, r"pixel statistics .*: set .* MODEL\.PIXEL_STD \[58\.395, 57\.12, 57\.375\] \(Lazy"),
        (STANDARDISED, r"strides in the 3x3 .*: set MODEL\.RESNETS\.STRIDE_IN_1X1 False \(Lazy"),
        ([*STANDARDISED, "MODEL.RESNETS.STRIDE_IN_1X1", False], None),
    ],
)
def test_detectron2s_own_program_refuses_a_file_for_other_images(pairs, message, pkl):
    """Where it freezes the cfg, with the key on and off; and where it builds with the key on."""
    for on in (False, True):
        cfg = program_cfg(pkl, *pairs, on=on)
        if message is None:
            cfg.freeze()
            continue
        with pytest.raises(UserError, match=message) as caught:
            cfg.freeze()
        assert "DETECTRON2" not in str(caught.value) and "\n" not in str(caught.value)
        assert not cfg.is_frozen()
    with (
        torch.device("meta"),
        pytest.raises(UserError, match=message) if message else nullcontext(),
    ):
        build_model(cfg)


def test_what_a_program_cannot_check_is_left_to_detectron2(tmp_path):
    (tmp_path / "broken.pkl").write_bytes(b"x")
    (tmp_path / "other.txt").write_text("x")
    torch.save({"model": {"a": torch.ones(1)}, "iteration": 3}, tmp_path / "model_0000003.pth")
    addresses = ["", "nowhere.pkl", "detectron2://ImageNetPretrained/torchvision/R-50.pkl"]
    for file in [*addresses, *tmp_path.iterdir()]:
        program_cfg(file, on=False).freeze()
    grey = program_cfg("", "INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", [1.0], on=False)
    grey.freeze()


@pytest.mark.parametrize("strict", [False, True])
def test_pixels_that_the_user_states_are_refused_unless_they_are_the_models(strict):
    """For a file that states nothing, such as DetectionCheckpointer's."""
    model = detector(ZOO)
    weights = Weights("model.pth", model.state_dict(), {})
    load_into(model, weights, CLASSES, strict=strict)
    load_into(model, weights, CLASSES, pixel_mean=IMAGENET_MEAN, pixel_std=[1.0] * 3, strict=strict)
    with pytest.raises(UserError, match="other pixel statistics than the model's"):
        load_into(model, weights, CLASSES, **STATISTICS, strict=strict)


@pytest.mark.parametrize(
    ("name", "strides"),
    [
        (R_50, False),
        (ZOO, True),
        ("COCO-Detection/faster_rcnn_R_50_C4_1x.yaml", True),
        ("COCO-Detection/faster_rcnn_R_50_DC5_1x.yaml", True),
        ("BCCD-Detection/faster_rcnn_R_18_FPN.yaml", None),
        ("PascalVOC-Detection/faster_rcnn_VGG_16.yaml", None),
    ],
)
def test_meta_of_states_where_bottlenecks_stride(name, strides):
    assert meta_of(detector(name))["stride_in_1x1"] is strides


def test_the_predictor_of_a_detector_of_other_classes_is_not_loaded(tmp_path):
    zoo = detector(ZOO, num_classes=5)
    arrays = {key: tensor.numpy() for key, tensor in zoo.state_dict().items()}
    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}, 2))
    model = detector(ZOO, num_classes=2)
    report = load_into(model, read_weights(str(path)), CLASSES)
    assert sorted(report.left) == [
        f"roi_heads.box_predictor.{layer}.{kind}"
        for layer in ("bbox_pred", "cls_score")
        for kind in ("bias", "weight")
    ]
    key = "proposal_generator.rpn_head.conv.weight"
    assert torch.equal(model.state_dict()[key], zoo.state_dict()[key])


def test_a_file_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps({"model": {"a": Evil()}, "__author__": "x"}))
    with pytest.raises(UserError, match="only arrays and plain containers are read"):
        read_weights(str(path))
    assert not (tmp_path / "ran").exists()


def test_another_backbones_weights_are_refused(tmp_path):
    other = tmp_path / "resnet18.pth"
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), other)
    with pytest.raises(UserError, match="is not for this model"):
        load_into(detector(), read_weights(str(other)), CLASSES, **STATISTICS)
    vgg = tmp_path / "vgg.pkl"
    vgg.write_bytes(pickle.dumps({"model": {"fc6.bias": np.zeros(3)}, "__author__": "x"}))
    with pytest.raises(UserError, match="106 of its backbone's 106 weights are missing"):
        load_into(detector(), read_weights(str(vgg)), CLASSES)


def test_a_failed_download_is_reported():
    with pytest.raises(UserError, match="cannot be fetched"):
        read_weights("https://127.0.0.1:9/R-50.pkl")


def test_a_vggs_fully_connected_layers_enter_its_head(tmp_path):
    vgg = torchvision.models.vgg16(weights=None, init_weights=False)
    torch.save(vgg.state_dict(), tmp_path / "vgg16.pth")
    model = detector("PascalVOC-Detection/faster_rcnn_VGG_16.yaml")
    report = load_into(model, read_weights(str(tmp_path / "vgg16.pth")), CLASSES, **STATISTICS)
    assert report.left == ["fc8.bias", "fc8.weight"] and len(report.used) == 2 * (13 + 2)
    assert torch.equal(model.roi_heads.box_head.fc7.weight, vgg.classifier[3].weight)
    assert torch.equal(model.backbone.features[0].weight, vgg.features[0].weight)
