"""The detector: what it shares with torchvision's, and what it adds."""

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import FrozenBatchNorm2d

from tract_det import apply_tract, find_stem
from tract_det.errors import UserError
from tract_det.modeling.backbones import build_vgg
from tract_det.modeling.faster_rcnn import build_faster_rcnn
from tract_det.modeling.heads import BalancedSampler, BoxHeadOptions, ProposalOptions

ANCHORS = (16, 32, 48, 64, 96)
SMALL = {
    "num_classes": 3,
    "fpn_channels": 32,
    "proposals": ProposalOptions(anchor_sizes=ANCHORS, post_nms=(60, 20)),
    "box_head": BoxHeadOptions(fc_dim=32, batch_size=32),
    "min_size": 0,
}


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return build_faster_rcnn(backbone="resnet18_fpn", norm="GN", **SMALL)


def batch(n, size=(96, 96)):
    generator = torch.Generator().manual_seed(1)
    images = [torch.randint(0, 256, (3, *size), generator=generator).byte() for _ in range(n)]
    targets = [
        {
            "boxes": torch.tensor([[5.0 + i, 8, 50, 60], [40, 30, 90, 80 - i]]),
            "labels": torch.tensor([1, 3]),
            "seed": 100 + i,
            "image_id": f"{i}",
        }
        for i in range(n)
    ]
    return images, targets


def test_the_loss_of_a_batch_is_the_mean_of_its_images(detector):
    detector.train()
    images, targets = batch(3)
    whole = detector(images, targets)
    parts = [detector(images[i : i + 1], targets[i : i + 1]) for i in range(3)]
    for name, value in whole.items():
        torch.testing.assert_close(value, sum(part[name] for part in parts) / 3)


def test_where_every_image_fills_its_quota_the_loss_is_torchvisions(detector):
    # The same modules in torchvision's own classes, with one sampling for both.
    images, targets = batch(2)
    detector.train()
    torch.manual_seed(0)
    ours = detector(images, targets)
    classes = type(detector.rpn), type(detector.roi_heads)
    try:
        detector.rpn.__class__, detector.roi_heads.__class__ = RegionProposalNetwork, RoIHeads
        theirs = detector(images, targets)
    finally:
        detector.rpn.__class__, detector.roi_heads.__class__ = classes
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name])


class ImageByImage:
    """The losses as the definition has them: torchvision's own, of one image after the other."""

    @staticmethod
    def of_anchors(rpn, objectness, deltas, labels, targets):
        n = len(labels)
        images = zip(
            objectness.reshape(n, -1, 1), deltas.reshape(n, -1, 4), labels, targets, strict=True
        )
        losses = [
            RegionProposalNetwork.compute_loss(rpn, scores, boxes, [label], [target])
            for scores, boxes, label, target in images
        ]
        return tuple(torch.stack(part).mean() for part in zip(*losses, strict=True))

    @staticmethod
    def of_proposals(heads, features, proposals, shapes, targets):
        proposals, _, labels, deltas = heads.select_training_samples(proposals, targets)
        found = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, proposals, shapes)))
        counts = [len(image) for image in labels]
        images = zip(*(part.split(counts) for part in found), labels, deltas, strict=True)
        losses = [fastrcnn_loss(a, b, [label], [target]) for a, b, label, target in images]
        classifier, box = (torch.stack(part).mean() for part in zip(*losses, strict=True))
        return [], {"loss_classifier": classifier, "loss_box_reg": box}


@pytest.mark.parametrize("objects", [2, 0])
def test_losses_and_gradients_are_those_of_image_by_image_to_the_bit(
    detector, monkeypatch, objects
):
    """And so is the choice of proposals; `objects` are in the last image."""
    detector.train()
    images, targets = batch(3)
    for key in ("boxes", "labels"):
        targets[-1][key] = targets[-1][key][:objects]

    def step():
        detector.zero_grad()
        losses = detector(images, targets)
        sum(losses.values()).backward()
        return losses, [p.grad.clone() for p in detector.parameters()]

    losses, gradients = step()
    rpn, heads = type(detector.rpn), type(detector.roi_heads)
    monkeypatch.setattr(rpn, "compute_loss", ImageByImage.of_anchors)
    monkeypatch.setattr(rpn, "filter_proposals", RegionProposalNetwork.filter_proposals)
    monkeypatch.setattr(heads, "forward", ImageByImage.of_proposals)
    expected, expected_gradients = step()
    assert losses.keys() == expected.keys()
    assert all(torch.equal(losses[name], value) for name, value in expected.items())
    assert all(map(torch.equal, gradients, expected_gradients))
    detector.zero_grad()


def test_a_seed_fixes_the_sampling_whatever_the_global_generator(detector):
    detector.train()
    images, targets = batch(2)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        results.append(detector(images, targets))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_uint8_and_float_images_are_the_same_image(detector):
    detector.eval()
    images, _ = batch(1)
    with torch.no_grad():
        a, b = detector(images)[0], detector([images[0].float() / 255])[0]
    torch.testing.assert_close(a["scores"], b["scores"])


def test_boxes_come_back_in_the_given_images_pixels():
    model = build_faster_rcnn(backbone="resnet18_fpn", **{**SMALL, "min_size": 64}).eval()
    with torch.no_grad():
        found = model([torch.rand(3, 100, 300)])[0]
    assert found["boxes"][:, 2].max() > 150  # beyond the resized width of 192 / 2


def test_an_image_without_objects_gives_a_loss_and_a_gradient(detector):
    detector.train()
    target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "seed": 1}
    losses = detector([torch.rand(3, 64, 64)], [target])
    sum(losses.values()).backward()
    assert all(torch.isfinite(value) for value in losses.values())
    detector.zero_grad()


@pytest.mark.parametrize("seeds", [[], [3, 4]])
def test_the_sampler_keeps_its_quotas(seeds):
    sampler = BalancedSampler(8, 0.5, salt=0)
    labels = torch.tensor([1] * 10 + [0] * 20 + [-1] * 5)
    sampler.seeds = list(seeds)
    positive, negative = sampler([labels, torch.zeros(5)])
    assert [int(mask.sum()) for mask in (*positive, *negative)] == [4, 0, 4, 5]
    assert (labels[positive[0]] == 1).all() and (labels[negative[0]] == 0).all()


@pytest.mark.parametrize(("freeze_at", "trainable"), [(0, "conv1"), (1, "layer1"), (2, "layer2")])
def test_freeze_at_freezes_the_first_stages_and_their_norms(freeze_at, trainable):
    body = build_faster_rcnn(backbone="resnet18_fpn", freeze_at=freeze_at, **SMALL).backbone.body
    stages = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]
    first = stages.index(trainable)
    for name in stages[:first]:
        assert not any(p.requires_grad for p in body[name].parameters())
        assert not any(isinstance(m, nn.BatchNorm2d) for m in body[name].modules())
    for name in stages[first:]:
        assert all(p.requires_grad for p in body[name].parameters())
        assert not any(isinstance(m, FrozenBatchNorm2d) for m in body[name].modules())


def test_vgg_freeze_at_two_is_the_published_recipe():
    # conv1_1 to conv2_2, as in py-faster-rcnn.
    from tract_det.modeling.backbones import freeze

    with torch.device("meta"):
        backbone = build_vgg("vgg16", "BN")
        freeze(backbone, 2)
    convs = [m for m in backbone.modules() if isinstance(m, nn.Conv2d)]
    assert [c.weight.requires_grad for c in convs] == [False] * 4 + [True] * 9


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "GN"])
def test_vgg16_bn_takes_every_norm(norm):
    with torch.device("meta"):
        backbone = build_vgg("vgg16_bn", norm)
    kinds = {"BN": nn.BatchNorm2d, "FrozenBN": FrozenBatchNorm2d, "GN": nn.GroupNorm}
    norms = [m for m in backbone.modules() if isinstance(m, kinds[norm])]
    assert len(norms) == 13


def test_vgg_is_conv5_3_at_stride_16_with_fc6_and_fc7():
    with torch.device("meta"):
        model = build_faster_rcnn(backbone="vgg16", num_classes=2)
        features = model.backbone(torch.empty(1, 3, 64, 96))
        hidden = model.roi_heads.box_head(torch.empty(5, 512, 7, 7))
    assert features.shape == (1, 512, 4, 6)
    assert hidden.shape == (5, 4096)
    vgg = torchvision.models.vgg16
    with torch.device("meta"):
        convs = len([m for m in vgg().features if isinstance(m, nn.Conv2d)])
    assert len([m for m in model.backbone.modules() if isinstance(m, nn.Conv2d)]) == convs


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (
            {"backbone": "resnet18_fpn", "proposals": ProposalOptions(anchor_sizes=(32, 64))},
            "SIZES has 2 entries",
        ),
        ({"backbone": "vgg16", "norm": "GN"}, "take vgg16_bn"),
    ],
)
def test_a_combination_that_does_not_exist_is_refused(keywords, message):
    with pytest.raises(UserError, match=message), torch.device("meta"):
        build_faster_rcnn(num_classes=2, **keywords)


@pytest.mark.skipif(torch.cuda.is_available(), reason="SyncBN exists with CUDA")
def test_syncbn_without_cuda_is_refused():
    with pytest.raises(UserError, match="SyncBN needs CUDA"):
        build_faster_rcnn(backbone="resnet18_fpn", norm="SyncBN", **SMALL)


def test_tract_moves_only_the_stems_gradient(detector):
    detector.train()
    images, targets = batch(2)
    gradients = []
    for tract in (False, True):
        if tract:
            apply_tract(detector)
        detector.zero_grad()
        sum(detector(images, targets).values()).backward()
        gradients.append({n: p.grad.clone() for n, p in detector.named_parameters()})
    stem = find_stem(detector) + ".weight"
    differ = [n for n in gradients[0] if not torch.equal(gradients[0][n], gradients[1][n])]
    assert differ == [stem]
    detector.zero_grad()


def test_bf16_autocast_trains_and_detects_with_boxes_in_float32(detector):
    """Eight significant bits place a corner to a pixel in 256."""
    images, targets = batch(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = detector.train()(images, targets)
        assert all(torch.isfinite(value) for value in losses.values())
        found = detector.eval()(images)
    boxes = torch.cat([image["boxes"] for image in found])
    assert boxes.dtype == torch.float32 and torch.isfinite(boxes).all()
    inside = boxes[(boxes > 0) & (boxes < 96)]
    assert (inside.bfloat16() != inside).float().mean() > 0.9


def test_an_evaluation_may_come_before_a_training_that_needs_the_pixels_gradient():
    detector = build_faster_rcnn(backbone="resnet18_fpn", norm="GN", **SMALL).eval()
    images, targets = batch(1)
    with torch.inference_mode():
        detector(images)
    image = (images[0].float() / 255).requires_grad_()
    sum(detector.train()([image], targets).values()).backward()
    assert image.grad.abs().max() > 0
