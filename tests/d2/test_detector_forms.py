"""A Faster R-CNN converted to detectron2 computes there, part by part, what it computed before."""

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from tests.d2.models import tract_cfg
from tract_det.cli import call
from tract_det.d2 import config_file
from tract_det.engine.checkpoint import save_weights
from tract_det.errors import UserError
from tract_det.modeling.faster_rcnn import build_faster_rcnn
from tract_det.modeling.heads import BoxHeadOptions, ProposalOptions
from tract_det.modeling.weight_files import read_weights
from tract_det.pixels import IMAGENET_MEAN, IMAGENET_STD

META = {
    "class_names": ["a", "b", "c"],
    "pixel_mean": list(IMAGENET_MEAN),
    "pixel_std": list(IMAGENET_STD),
    "aspect_ratios": [0.5, 1.0, 2.0],
}
SIZES = {"resnet18_fpn": [16, 32, 64, 96, 128], "vgg16_bn": [32, 64, 128]}


def pair(backbone):
    """This project's detector and detectron2's, whose weights are random."""
    torch.manual_seed(0)
    ours = build_faster_rcnn(
        backbone=backbone,
        num_classes=3,
        fpn_channels=16,
        norm="FrozenBN",
        box_head=BoxHeadOptions(fc_dim=32),
        proposals=ProposalOptions(anchor_sizes=SIZES[backbone]),
    )
    name = "BCCD-Detection/faster_rcnn_R_18_FPN.yaml"
    if backbone == "vgg16_bn":
        name = "PascalVOC-Detection/faster_rcnn_VGG_16_BN.yaml"
    cfg = tract_cfg(config_file(name), "MODEL.FPN.OUT_CHANNELS", 16, "MODEL.WEIGHTS", "")
    cfg.MODEL.TRACT.ENABLED, cfg.MODEL.ROI_HEADS.NUM_CLASSES = False, 3
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32 if "fpn" in backbone else 4096
    cfg.MODEL.RESNETS.NORM = "FrozenBN"
    sizes = [[size] for size in SIZES[backbone]]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = sizes if "fpn" in backbone else [SIZES[backbone]]
    return ours.eval(), build_model(cfg).eval()


@pytest.mark.parametrize(
    "backbone", ["resnet18_fpn", pytest.param("vgg16_bn", marks=pytest.mark.slow)]
)
def test_features_logits_deltas_scores_and_boxes_are_the_same(backbone, tmp_path, generator):
    ours, theirs = pair(backbone)
    save_weights(tmp_path / "w.pth", ours, META)
    call("convert", [str(tmp_path / "w.pth"), str(tmp_path / "w.pkl")])
    (tmp_path / "w.pth").unlink()
    loaded = DetectionCheckpointer(theirs).load(str(tmp_path / "w.pkl"))
    (tmp_path / "w.pkl").unlink()  # of a VGG half a gigabyte
    assert loaded["__author__"] == "tract_det"
    image = torch.randn(1, 3, 64, 96, generator=generator)
    with torch.no_grad():
        features = ours.backbone(image)
        features = [features] if torch.is_tensor(features) else list(features.values())
        others = theirs.backbone(image)
        others = [others[name] for name in theirs.proposal_generator.in_features]
        for feature, other in zip(features, others, strict=True):
            torch.testing.assert_close(feature, other, rtol=1e-4, atol=1e-5)
        check_proposals(ours, theirs, features)
        pooled = torch.randn(5, features[0].shape[1], 7, 7, generator=generator)
        scores, boxes = ours.roi_heads.box_predictor(ours.roi_heads.box_head(pooled))
        head = theirs.roi_heads
        other_scores, other_boxes = head.box_predictor(head.box_head(pooled))
    torch.testing.assert_close(scores.roll(-1, 1), other_scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(boxes[:, 4:], other_boxes, rtol=1e-4, atol=1e-5)


def check_proposals(ours, theirs, features):
    """Each anchor has the same logit and deltas, in whatever order the anchors are."""
    logits, deltas = ours.rpn.head(features)
    other_logits, other_deltas = theirs.proposal_generator.rpn_head(features)
    cells = ours.rpn.anchor_generator.cell_anchors
    other_cells = list(theirs.proposal_generator.anchor_generator.cell_anchors)
    for level, (cell, other_cell) in enumerate(zip(cells, other_cells, strict=True)):
        distance = torch.cdist(other_cell - other_cell.mean(0), cell - cell.mean(0))
        order = distance.argmin(1)  # torchvision rounds its anchors
        assert sorted(order.tolist()) == list(range(len(cell))) and distance.amin(1).max() < 2
        torch.testing.assert_close(logits[level][:, order], other_logits[level])
        per_anchor = deltas[level].unflatten(1, (-1, 4))[:, order].flatten(1, 2)
        torch.testing.assert_close(per_anchor, other_deltas[level])


def test_what_detectron2s_checkpointer_saves_comes_back(tmp_path):
    _, theirs = pair("resnet18_fpn")
    DetectionCheckpointer(theirs, str(tmp_path)).save("model_final", iteration=3)
    source, back = str(tmp_path / "model_final.pth"), str(tmp_path / "w.pth")
    statistics = ["--pixel-mean", *map(str, IMAGENET_MEAN), "--pixel-std", *map(str, IMAGENET_STD)]
    with pytest.raises(UserError, match=r"does not say whether it takes RGB or BGR: .*--input-f"):
        call("convert", [source, back, *statistics])
    call("convert", [source, back, *statistics, "--input-format", "RGB"])
    weights = read_weights(back)
    assert not weights.state["roi_heads.box_predictor.bbox_pred.weight"][:4].any()
    call("convert", [back, str(tmp_path / "again.pkl")])
    _, again = pair("resnet18_fpn")
    for parameter in again.parameters():
        parameter.data.zero_()
    DetectionCheckpointer(again).load(str(tmp_path / "again.pkl"))
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key
