"""Weights enter the right layer, with the right pixels, or not at all."""

import pytest
import torch
import torchvision
from torch import nn

from tract_det.engine.checkpoint import save_weights
from tract_det.errors import UserError
from tract_det.modeling.classifiers import build_classifier
from tract_det.modeling.faster_rcnn import build_faster_rcnn
from tract_det.modeling.heads import BoxHeadOptions, VGGHead
from tract_det.modeling.loading import load_into, load_into_classifier
from tract_det.modeling.weight_files import Weights, read_weights

CLASSES = ["a", "b"]


def small(**keywords):
    small_head = BoxHeadOptions(fc_dim=16)
    options = {"backbone": "resnet18_fpn", "num_classes": 2, "fpn_channels": 16, **keywords}
    return build_faster_rcnn(**options, box_head=small_head)


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(3)
    return torchvision.models.resnet18(weights=None)


@pytest.fixture
def file(classifier, tmp_path):
    path = tmp_path / "resnet18.pth"
    torch.save(classifier.state_dict(), path)
    return str(path)


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_a_classifier_enters_the_backbone_and_nothing_else(classifier, file, norm):
    detector = small(norm=norm)
    before = {k: v.clone() for k, v in detector.state_dict().items()}
    report = load_into(detector, read_weights(file), CLASSES)
    after = detector.state_dict()
    for key, tensor in classifier.state_dict().items():
        if not key.startswith("fc.") and f"backbone.body.{key}" in after:
            assert torch.equal(after[f"backbone.body.{key}"], tensor)
    others = [key for key in after if not key.startswith("backbone.body.")]
    assert all(torch.equal(after[key], before[key]) for key in others)
    assert report.left == ["backbone.body.fc.weight", "backbone.body.fc.bias"]
    assert all(key in report.random for key in others)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        features = detector.eval().backbone.body(images)["3"]
        trunk = nn.Sequential(*list(classifier.eval().children())[:-2])
        torch.testing.assert_close(features, trunk(images))


@pytest.mark.parametrize("wrapped", ["model", "state_dict"])
def test_wrapped_and_prefixed_state_dicts_are_read(classifier, tmp_path, wrapped):
    state = {f"module.{k}": v for k, v in classifier.state_dict().items()}
    torch.save({wrapped: state, "epoch": 3}, tmp_path / "w.pth")
    weights = read_weights(str(tmp_path / "w.pth"))
    assert list(weights.state) == list(classifier.state_dict())


def test_a_vgg_classifier_fills_convolutions_fc6_and_fc7():
    shapes = {}
    with torch.device("meta"):
        detector = build_faster_rcnn(backbone="vgg16", num_classes=2)
        state = torchvision.models.vgg16(weights=None).state_dict()
        shapes = {k: v.shape for k, v in detector.state_dict().items()}
    full = {k: torch.zeros(()).expand(v.shape) for k, v in state.items()}
    detector.to_empty(device="cpu")
    report = load_into(detector, Weights("vgg", full, {}), CLASSES)
    assert {"roi_heads.box_head.fc6.weight", "roi_heads.box_head.fc7.bias"} <= set(report.used)
    assert len(report.used) == 26 + 4
    assert shapes["roi_heads.box_head.fc6.weight"] == state["classifier.0.weight"].shape
    assert report.left == ["backbone.classifier.6.weight", "backbone.classifier.6.bias"]
    assert isinstance(detector.roi_heads.box_head, VGGHead)


def test_a_classifier_full_of_nan_leaves_the_head_random():
    # As VGG16_Weights.IMAGENET1K_FEATURES has it.
    with torch.device("meta"):
        detector = build_faster_rcnn(backbone="vgg16", num_classes=2)
        state = torchvision.models.vgg16(weights=None).state_dict()
    value = {True: torch.tensor(torch.nan), False: torch.tensor(0.5)}
    full = {k: value[k.startswith("classifier")].expand(v.shape) for k, v in state.items()}
    detector.to_empty(device="cpu")
    report = load_into(detector, Weights("features", full, {}), CLASSES)
    assert "roi_heads.box_head.fc6.weight" in report.random
    assert len(report.used) == 26


def test_a_saved_detector_round_trips_to_the_bit(tmp_path):
    one, other = small(), small()
    meta = {"pixel_mean": [1.0, 2, 3], "pixel_std": [4.0, 5, 6], "class_names": CLASSES}
    save_weights(tmp_path / "m.pth", one, meta)
    weights = read_weights(str(tmp_path / "m.pth"))
    assert weights.is_detector and weights.meta == meta
    report = load_into(other, weights, CLASSES, strict=True)
    assert not report.left and not report.random
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))  # fmt: skip  # noqa: E501
    assert not list(tmp_path.glob(".*"))  # no temporary file stays


def test_a_detector_of_other_classes_keeps_its_predictor_to_itself(tmp_path):
    save_weights(tmp_path / "m.pth", small(num_classes=3), {"class_names": ["x", "y", "z"]})
    weights = read_weights(str(tmp_path / "m.pth"))
    report = load_into(small(), weights, CLASSES)
    assert {key.rsplit(".", 2)[0] for key in report.random} == {"roi_heads.box_predictor"} or all(
        key.startswith("roi_heads.box_predictor.") for key in report.random
    )
    with pytest.raises(UserError, match=r"detects x, y, z; the data set's classes are a, b"):
        load_into(small(), weights, CLASSES, strict=True)


def test_torchvisions_presets_give_their_statistics(monkeypatch):
    entry = torchvision.models.VGG16_Weights.IMAGENET1K_FEATURES
    monkeypatch.setattr(type(entry), "get_state_dict", lambda *_, **__: {})
    meta = read_weights("VGG16_Weights.IMAGENET1K_FEATURES").meta
    assert meta["pixel_std"] == [1.0, 1.0, 1.0]
    assert meta["pixel_mean"] == pytest.approx([123.0, 117.0, 104.0], abs=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "is not a file"),
        (lambda p: p.write_bytes(b"not a checkpoint"), "cannot be read"),
        (lambda p: torch.save([1, 2], p), "no state dict"),
        (lambda p: torch.save(nn.Linear(2, 2), p), "cannot be read"),  # would run code
    ],
    ids=["missing", "garbage", "list", "pickled-module"],
)
def test_a_file_that_is_no_state_dict_is_refused_by_name(tmp_path, make, message):
    path = tmp_path / "weights.pth"
    make(path)
    with pytest.raises(UserError, match=rf"weights\.pth.*{message}"):
        read_weights(str(path))


def test_an_unknown_torchvision_name_is_refused():
    with pytest.raises(UserError, match="torchvision has no such weights"):
        read_weights("ResNet50_Weights.NOPE")


def test_another_architecture_is_refused(file):
    with pytest.raises(UserError, match="is not for this model"):
        load_into(small(backbone="resnet34_fpn"), read_weights(file), CLASSES)
    with pytest.raises(UserError, match=r"trained with batch norm: set MODEL\.BACKBONE"):
        load_into(small(norm="GN"), read_weights(file), CLASSES)
    with pytest.raises(UserError, match="is a classifier"):
        load_into(small(), read_weights(file), CLASSES, strict=True)


def classifier_weights(model, **meta):
    return Weights("w.pth", dict(model.state_dict()), meta)


def test_a_pretrained_resnet_enters_the_detector_and_one_for_small_images_does_not():
    own = build_classifier("resnet18", 5)
    report = load_into(small(), classifier_weights(own, class_names=list("abcde")), CLASSES)
    assert report.left == ["backbone.body.fc.weight", "backbone.body.fc.bias"]
    other = build_classifier("resnet18", 5, small_images=True)
    with pytest.raises(
        UserError, match=r"3x3 stem .*MODEL\.BACKBONE\.NAME .* MODEL\.SMALL_IMAGES False"
    ):
        load_into(small(), classifier_weights(other), CLASSES)


@pytest.mark.parametrize("form", ["small", "timm"])
def test_a_vgg_of_another_form_fills_what_it_has(form):
    with torch.device("meta"):
        detector = build_faster_rcnn(backbone="vgg16", num_classes=2)
        if form == "small":
            model = build_classifier("vgg16", 2, small_images=True)
        else:
            model = build_classifier("timm:vgg16", 2)
        state = model.state_dict()
    full = {k: torch.zeros(()).expand(v.shape) for k, v in state.items()}
    detector.to_empty(device="cpu")
    report = load_into(detector, Weights("vgg", full, {}), CLASSES)
    fc = [key for key in report.random if key.startswith("roi_heads.box_head.")]
    assert len(fc) == (4 if form == "small" else 0)
    assert len(report.used) == (26 if form == "small" else 30) and len(report.left) == 2


def test_a_classifier_goes_on_with_its_own_classes_and_keeps_no_head_of_others():
    one, other = build_classifier("resnet10", 2, width=8), build_classifier("resnet10", 2, width=8)
    weights = classifier_weights(one, class_names=CLASSES)
    report = load_into_classifier(other, weights, CLASSES, strict=True)
    assert not report.random and not report.left
    for key, value in one.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)
    head = other.fc.weight.clone()
    with torch.no_grad():
        one.fc.weight.zero_()
    weights = classifier_weights(one, class_names=["b", "a"])
    assert load_into_classifier(other, weights, CLASSES).random == ["fc.weight", "fc.bias"]
    assert torch.equal(other.fc.weight, head)
    with pytest.raises(
        UserError, match=r"w\.pth knows other classes .* b, a, \.\.\.: set DATASETS"
    ):
        load_into_classifier(other, weights, CLASSES, strict=True)


@pytest.mark.parametrize("name", ["vgg11", "timm:vgg11", "timm:test_vit", "timm:test_convnext"])
def test_the_head_of_another_number_of_classes_stays_random(name):
    with torch.device("meta"):
        theirs, ours = build_classifier(name, 3), build_classifier(name, 2)
    state = {k: torch.zeros(()).expand(v.shape) for k, v in theirs.state_dict().items()}
    ours.to_empty(device="cpu")
    report = load_into_classifier(ours, Weights("w", state, {}), CLASSES)
    head = {"vgg11": "classifier.6", "timm:vgg11": "head.fc", "timm:test_convnext": "head.fc"}
    expected = head.get(name, "head")
    assert report.random == [f"{expected}.weight", f"{expected}.bias"] and not report.left


def test_a_vgg_for_small_images_takes_the_convolutions_of_a_large_one():
    with torch.device("meta"):
        large = build_classifier("vgg11_bn", 2).state_dict()
        own = build_classifier("vgg11_bn", 2, small_images=True)
    state = {k: torch.zeros(()).expand(v.shape) for k, v in large.items()}
    own.to_empty(device="cpu")
    report = load_into_classifier(own, Weights("w", state, {}), CLASSES)
    assert report.random == ["classifier.weight", "classifier.bias"]
    assert len(report.left) == 6
    with pytest.raises(UserError, match="is not for this model"):
        load_into_classifier(own, Weights("w", state, {}), CLASSES, strict=True)


def vit(library, size):
    if library == "timm":
        return build_classifier("timm:test_vit", 2, image_size=size)
    return torchvision.models.VisionTransformer(size, 16, 1, 2, 32, 32, num_classes=2)


POSITIONS = {"timm": "pos_embed", "torchvision": "encoder.pos_embedding"}


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_position_embeddings_are_resampled_for_another_image_size(library):
    torch.manual_seed(0)
    small_one, large = vit(library, 32), vit(library, 64)
    key = POSITIONS[library]
    with torch.no_grad():
        small_one.get_parameter(key).fill_(0.5)
    report = load_into_classifier(large, classifier_weights(small_one), CLASSES, strict=True)
    assert list(report.resampled) == [key] and "1 resampled" in str(report)
    torch.testing.assert_close(
        large.state_dict()[key], torch.full_like(large.state_dict()[key], 0.5)
    )
    same = load_into_classifier(
        vit(library, 32), classifier_weights(small_one), CLASSES, strict=True
    )
    assert not same.resampled


@pytest.mark.parametrize("library", ["timm", "torchvision"])
@pytest.mark.parametrize("shape", ["", "c", "2 5 c", "1 7 c", "1 0 c", "1 5 1 c"])
def test_position_embeddings_that_are_no_grid_are_refused_by_name(library, shape):
    model, key = vit(library, 32), POSITIONS[library]
    weights, channels = classifier_weights(model), model.state_dict()[key].shape[-1]
    sizes = [channels if size == "c" else int(size) for size in shape.split()]
    weights.state[key] = torch.zeros(sizes)
    with pytest.raises(UserError, match=rf"'{key}' is \(.*\) in the file and \(1, \d+, "):
        load_into_classifier(model, weights, CLASSES)


@pytest.mark.parametrize("key", ["conv1.weight", "bn1.weight", "fc.weight", "fc.bias"])
@pytest.mark.parametrize("sizes", [(), (1,)])
def test_a_tensor_with_other_dimensions_is_refused_by_name_or_is_another_head(key, sizes):
    weights = classifier_weights(build_classifier("resnet18", 2))
    weights.state[key] = torch.zeros(sizes)
    if key.startswith("fc") and sizes:
        report = load_into_classifier(build_classifier("resnet18", 2), weights, CLASSES)
        assert report.random == ["fc.weight", "fc.bias"]
        return
    with pytest.raises(UserError, match=rf"'{key}' is \(1?,?\) in the file"):
        load_into_classifier(build_classifier("resnet18", 2), weights, CLASSES)
    if not key.startswith("fc"):
        with pytest.raises(UserError, match=rf"'backbone\.body\.{key}' is \("):
            load_into(small(norm="BN"), weights, CLASSES)


def test_another_classifier_is_refused_by_key():
    own = build_classifier("resnet10", 2, width=8)
    for model, message in (
        (build_classifier("resnet10", 2, width=16), r"'conv1\.weight' is .*check MODEL\.NAME"),
        (build_classifier("resnet10", 2, width=8, small_images=True), r"'conv1\.weight' is"),
        (build_classifier("resnet10", 2, width=8, norm="GN"), r"of its tensors are missing"),
    ):
        with pytest.raises(UserError, match=message):
            load_into_classifier(own, classifier_weights(model), CLASSES)
    groups = build_classifier("resnet10", 2, width=8, norm="GN")
    with pytest.raises(UserError, match=r"with batch norm: set MODEL\.NORM"):
        load_into_classifier(groups, classifier_weights(own), CLASSES)
    with pytest.raises(UserError, match=r"is a whole detector"):
        load_into_classifier(own, classifier_weights(small()), CLASSES)
