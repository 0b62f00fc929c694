"""The output layers of classifiers and detectors."""

import pytest
from torch import nn

from tests.tract.meta import meta
from tract_det.modeling.classification_loss import ClassifierWithLoss
from tract_det.modeling.classifiers import build_classifier
from tract_det.modeling.faster_rcnn import build_faster_rcnn
from tract_det.modeling.outputs import output_layers


@pytest.mark.parametrize(
    ("name", "outputs"),
    [
        ("resnet10", ["model.fc"]),
        ("vgg11", ["model.classifier.6"]),
        ("vit_b_16", ["model.heads.head"]),
        ("squeezenet1_1", ["model.classifier.1"]),
        ("timm:deit3_small_patch16_224", ["model.head"]),
        ("timm:deit_tiny_distilled_patch16_224", ["model.head", "model.head_dist"]),
        ("timm:legacy_seresnet18", ["model.last_linear"]),
    ],
)
def test_a_classifier_ends_in_its_head(name, outputs):
    with meta():
        model = build_classifier(name, 5)
    assert output_layers(ClassifierWithLoss(model)) == outputs


@pytest.mark.parametrize("backbone", ["resnet18_fpn", "vgg16"])
def test_a_detector_has_two_in_each_of_its_stages(backbone):
    with meta():
        model = build_faster_rcnn(backbone=backbone, num_classes=3)
    assert output_layers(model) == [
        "rpn.head.cls_logits",
        "rpn.head.bbox_pred",
        "roi_heads.box_predictor.cls_score",
        "roi_heads.box_predictor.bbox_pred",
    ]


def test_a_model_of_one_layer_is_its_output():
    assert output_layers(nn.Linear(2, 2)) == [""]
