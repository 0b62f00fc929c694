"""This project's detector interface in front of detectron2's models changes no result of theirs."""

import copy

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from tests.d2.models import CONFIGS, pixels, tract_cfg
from tract_det.d2 import add_tract_config, apply_tract, config_file
from tract_det.d2.config_models import build_detector
from tract_det.d2.detector import as_detector
from tract_det.engine import ds
from tract_det.engine.loop import StopSignal, train
from tract_det.errors import UserError

R_18 = "BCCD-Detection/faster_rcnn_R_18_FPN.yaml"
SMALL = [
    *("MODEL.FPN.OUT_CHANNELS", 16, "MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.RESNETS.NORM"),
    *("FrozenBN", "MODEL.RPN.POST_NMS_TOPK_TRAIN", 40, "MODEL.RPN.POST_NMS_TOPK_TEST", 20),
]


def made_up(generator, count=2):
    """Images and targets in this project's format, and the same batch in detectron2's."""
    images, targets, inputs = [], [], []
    for record in pixels(generator, *[(64, 96)] * count):
        corner = torch.rand(3, 2, generator=generator) * torch.tensor([50.0, 30.0])
        boxes = torch.cat([corner, corner + 20], 1)
        labels = torch.randint(1, 4, (3,), generator=generator)
        images.append(record["image"])
        targets.append({"boxes": boxes, "labels": labels, "image_id": "x"})
        instances = Instances((64, 96), gt_boxes=Boxes(boxes.clone()), gt_classes=labels - 1)
        inputs.append({**record, "instances": instances})
    return (images, targets), inputs


def pair(format="RGB", *pairs):
    """A detector, and the detectron2 model with the same weights and its cfg."""
    torch.manual_seed(0)
    opts = [*SMALL, "INPUT.FORMAT", format, *pairs]
    detector = build_detector(R_18, opts, num_classes=3, freeze_at=0, min_size=0)
    cfg = get_cfg()
    add_tract_config(cfg)
    cfg.merge_from_file(config_file(R_18))
    cfg.merge_from_list([*opts, "MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.NUM_CLASSES", 3])
    model = build_model(cfg)
    model.load_state_dict(detector.state_dict())
    return detector, model, cfg


@pytest.mark.parametrize("format", ["RGB", "BGR"])
def test_losses_and_detections_are_the_models_own(format, generator):
    detector, model, _ = pair(format)
    (images, targets), inputs = made_up(generator)
    for record in inputs if format == "BGR" else ():
        record["image"] = record["image"].flip(0)
    torch.manual_seed(1)
    losses = detector.train()(images, targets)
    torch.manual_seed(1)
    with EventStorage():
        expected = model.train()(inputs)
    assert losses.keys() == expected.keys()
    assert all(torch.equal(losses[key], expected[key]) for key in losses)
    with torch.no_grad():
        detections = detector.eval()(images)
        outputs = model.eval()(inputs)
    for image_detections, output in zip(detections, outputs, strict=True):
        instances = output["instances"]
        assert len(instances)
        assert torch.equal(image_detections["boxes"], instances.pred_boxes.tensor)
        assert torch.equal(image_detections["scores"], instances.scores)
        assert torch.equal(image_detections["labels"], instances.pred_classes + 1)


def test_detections_are_in_the_pixels_of_the_input_image(generator):
    """If the model sees an image at half size, boxes come back at full size."""
    detector, _, _ = pair()
    detector.eval().test_size = (32, 1333)
    (images, _), _ = made_up(generator, 1)
    with torch.no_grad():
        boxes = detector(images)[0]["boxes"]
    assert boxes[:, 2].max() > 60 and boxes[:, 0::2].max() <= 96 and boxes[:, 1::2].max() <= 64


def test_floating_point_images_are_in_the_unit_interval(generator):
    detector, _, _ = pair()
    (images, _), _ = made_up(generator, 1)
    with torch.no_grad():
        (a,), (b,) = (detector.eval()([x]) for x in (images[0], images[0].float() / 255))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_keys_and_class_names_stay_detectron2s():
    detector, model, _ = pair()
    assert list(detector.state_dict()) == list(model.state_dict())
    assert type(detector).__name__ == "GeneralizedRCNN" and isinstance(detector, type(model))
    assert as_detector(detector, min_size=0, max_size=0) is detector
    copy.deepcopy(detector)


@pytest.fixture(scope="module")
def process():
    """A process group of this process alone; DeepSpeed accepts only one in a process."""
    ds.start("cpu")
    yield
    ds.stop()


@pytest.mark.parametrize("tract", [False, True])
def test_twenty_steps_have_the_losses_of_detectron2s_trainer(tract, generator, process):
    """The same model, batches and random numbers give SimpleTrainer's losses and weights."""
    detector, model, cfg = pair()
    if tract:
        apply_tract(detector)
        apply_tract(model)
    batches = [made_up(generator) for _ in range(20)]
    optimizer = torch.optim.SGD(detector.parameters(), lr=0.01, momentum=0.9)
    engine = ds.initialize(detector, optimizer, ds.ds_config(batch_size=2, accumulation=1))
    steps, expected = [], []
    torch.manual_seed(2)
    with StopSignal() as stop:
        train(
            engine,
            [batch for batch, _ in batches],
            start=0,
            max_iter=20,
            accumulation=1,
            lr_at=lambda step: 0.01,
            after_step=steps.append,
            stop=stop,
        )
    cfg.SOLVER.BASE_LR = 0.01
    cfg.SOLVER.WEIGHT_DECAY = 0.0

    class Recorder(SimpleTrainer):
        def _write_metrics(self, loss_dict, *_, **__):
            expected.append(float(sum(loss_dict.values())))

    trainer = Recorder(model, [batch for _, batch in batches], build_optimizer(cfg, model))
    torch.manual_seed(2)
    trainer.train(0, 20)
    losses = [step.losses["loss"] for step in steps]
    assert losses == pytest.approx(expected, rel=1e-4) and len(losses) == 20
    for key, tensor in detector.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[key], rtol=1e-4, atol=1e-5)


def test_proposals_that_are_not_finite_are_a_loss_that_is_not(generator):
    """detectron2's FloatingPointError would end the run in a traceback, without step and images."""
    detector, model, _ = pair()
    (images, targets), inputs = made_up(generator)
    for network in (detector, model):
        network.train().proposal_generator.rpn_head.objectness_logits.weight.data.fill_(torch.nan)
    with EventStorage(), pytest.raises(FloatingPointError):
        model(inputs)
    losses = detector(images, targets)
    assert losses.keys() == {"loss_proposals"} and losses["loss_proposals"].isnan()
    losses["loss_proposals"].backward()


def test_bf16_does_not_round_the_boxes_of_roialign(generator):
    """RoIAlign casts boxes to the type of its features; the backbone returns float32."""
    detector, _, _ = pair()
    dtypes = []
    pooler = detector.roi_heads.box_pooler
    pooler.register_forward_pre_hook(lambda _, args: dtypes.extend(x.dtype for x in args[0]))
    (images, targets), _ = made_up(generator)
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector.train()(images, targets)
    assert dtypes and set(dtypes) == {torch.float32}
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize(
    "name",
    [
        "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
        "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml",
        "COCO-Detection/fcos_R_50_FPN_1x.py",
        "COCO-Detection/retinanet_R_50_FPN_1x.py",
    ],
)
def test_other_detectors_train_and_detect(name, generator):
    torch.manual_seed(0)
    model = build_detector(name, num_classes=3, freeze_at=0, min_size=0)
    (images, targets), _ = made_up(generator, 1)
    losses = model.train()(images, targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    stem = [p for n, p in model.named_parameters() if "stem.conv1.weight" in n]
    assert stem[0].grad.norm() > 0
    with torch.no_grad():
        detections = model.eval()(images)[0]
    assert detections.keys() == {"boxes", "scores", "labels"}
    assert ((detections["labels"] >= 1) & (detections["labels"] <= 3)).all()


@pytest.mark.parametrize(
    ("name", "opts", "message"),
    [
        (
            "nowhere.yaml",
            [],
            "nowhere.yaml does not exist: name a file, or a config of detectron2's",
        ),
        (R_18, ["MODEL.NONSENSE", 1], r"MODEL\.DETECTRON2\.OPTS .*Non-existent"),
        (R_18, ["MODEL.RESNETS.DEPTH", 17], "builds no model"),
        ("Misc/semantic_R_50_FPN_1x.yaml", [], "learns to segment"),
        ("COCO-Detection/rpn_R_50_FPN_1x.yaml", [], "predicts proposals without classes"),
        ("COCO-Detection/fast_rcnn_R_50_FPN_1x.yaml", [], "takes proposals from a file"),
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", [], "MODEL.MASK_ON False"),
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py", [], "mask_in_features=null"),
        ("COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml", [], "MODEL.KEYPOINT_ON False"),
        ("COCO-Detection/fcos_R_50_FPN_1x.py", ["head.none=1"], "builds no model: .*'none'"),
    ],
)
def test_models_that_cannot_be_trained_here_are_refused_in_one_line(name, opts, message):
    with pytest.raises(UserError, match=message) as caught:
        build_detector(name, opts, num_classes=3)
    assert "\n" not in str(caught.value)


def test_a_lazy_mask_rcnn_without_its_mask_head_is_a_detector():
    name = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py"
    model = build_detector(name, ["roi_heads.mask_in_features=null"], num_classes=3)
    assert model.roi_heads.num_classes == 3


def test_the_file_or_the_argument_decides_what_is_frozen():
    name = str(CONFIGS / "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    for freeze_at, learns in ((None, False), (0, True), (1, False)):
        model = build_detector(name, num_classes=3, freeze_at=freeze_at)
        assert model.backbone.bottom_up.stem.conv1.weight.requires_grad is learns
    assert tract_cfg().MODEL.BACKBONE.FREEZE_AT == 0
