"""The configuration of a detector's training, `tract-det train`; `shared.py` has the common keys.

Only `tract_det.training` reads a `cfg`. It passes plain arguments to everything else.
"""

from collections.abc import Sequence
from typing import Any

from fvcore.common.config import CfgNode

from tract_det.config.machinery import ConfigFiles, load, one_of, require, value_at
from tract_det.config.ranges import (
    BELOW_ONE,
    COUNT,
    COUNT_OR_NONE,
    FRACTION,
    POSITIVE,
    Anything,
    Names,
    Number,
    Numbers,
    Rule,
    check,
)
from tract_det.config.shared import (
    SHARED_RANGES,
    check_common,
    check_patience,
    ema_keys,
    solver_keys,
    tract_keys,
    with_run_keys,
)
from tract_det.data.choices import DETECTION_FORMATS, EXIF_MODES
from tract_det.evaluation.metrics import DETECTION_METRICS
from tract_det.evaluation.voc_ap import RULES
from tract_det.modeling.choices import BACKBONES, DETECTOR_NORMS


def _model() -> CfgNode:
    return CfgNode(
        {
            # "" = random weights. Otherwise the name of torchvision's weights, such as
            # "ResNet50_Weights.IMAGENET1K_V2", or a file: a classifier in the form of torchvision,
            # timm or detectron2, or a model_final.pth of this project.
            "WEIGHTS": "",
            "DEVICE": "",  # cuda or cpu; "" = cuda if there is a GPU, else cpu
            # Mean and standard deviation of the pixels, RGB, in units of [0, 255]. [] = those that
            # the weights were trained with, or ImageNet's if the weights are random. Set them for a
            # file that does not state them; values that contradict the weights are refused. Another
            # number of values than three is the number of channels of the images.
            "PIXEL_MEAN": [],
            "PIXEL_STD": [],
            "BACKBONE": {
                "NAME": "resnet50_fpn",  # resnet18_fpn (34, 50, 101, 152), vgg16 or vgg16_bn
                "NORM": "BN",  # BN, FrozenBN, SyncBN (needs cuda) or GN
                # Number of frozen stages: 0 = none, 1 = the stem (a VGG's conv1), 2 = also the
                # first stage (conv2), ..., 5. -1 = 0 if TrAct is on, the weights are random or the
                # stem is widened for other channels than RGB, else 2, which is detectron2's default
                # (with DETECTRON2: what its configuration says).
                "FREEZE_AT": -1,
            },
            # Trains a detectron2 model instead of torchvision's. The keys that describe
            # torchvision's model must then keep their defaults: BACKBONE.NAME, BACKBONE.NORM, FPN,
            # ANCHOR_GENERATOR, RPN, ROI_HEADS, ROI_BOX_HEAD and TEST.DETECTIONS_PER_IMAGE.
            "DETECTRON2": {
                # Its configuration, .yaml or LazyConfig .py: a path, or a name in
                # configs/detectron2 or in detectron2's model zoo. "" = torchvision's model.
                "CONFIG_FILE": "",
                # Changes to it: [KEY, VALUE, ...] for a .yaml; [key=value, ...], relative to
                # `model`, for a .py.
                "OPTS": [],
            },
            "FPN": {"OUT_CHANNELS": 256},  # channels of every level of the feature pyramid
            # True: channels_last memory format, of the batch and, under ZeRO 0, of the weights.
            "CHANNELS_LAST": False,
            "COMPILE": False,  # True: torch.compile of the backbone, with its feature pyramid
            "EMA": ema_keys(),
            # How the first layer is initialised: "" = as its library does; whitened = by filters
            # that whiten the patches of 256 training images. Not with WEIGHTS.
            "STEM_INIT": "",
            "TRACT": tract_keys(),
            "ANCHOR_GENERATOR": {
                # Side of the square anchor, pixels. An FPN takes five sizes, one per level; a VGG
                # has one level, which takes all sizes.
                "SIZES": [32, 64, 128, 256, 512],
                "ASPECT_RATIOS": [0.5, 1.0, 2.0],  # height / width
            },
            "RPN": {
                "PRE_NMS_TOPK_TRAIN": 2000,  # proposals per level before NMS, in training
                "PRE_NMS_TOPK_TEST": 1000,  # the same in evaluation
                "POST_NMS_TOPK_TRAIN": 2000,  # proposals per image after NMS, in training
                "POST_NMS_TOPK_TEST": 1000,  # the same in evaluation
                # IoU above which a proposal is dropped for one with a higher score.
                "NMS_THRESH": 0.7,
                "BATCH_SIZE_PER_IMAGE": 256,  # anchors per image in the loss
                "POSITIVE_FRACTION": 0.5,  # upper bound of the fraction of objects among them
            },
            "ROI_HEADS": {
                "BATCH_SIZE_PER_IMAGE": 512,  # proposals per image in the loss
                "POSITIVE_FRACTION": 0.25,  # upper bound of the fraction of objects among them
                "SCORE_THRESH_TEST": 0.05,  # detections with a lower score are dropped
                # IoU above which a detection is dropped for one of its class with a higher score.
                "NMS_THRESH_TEST": 0.5,
            },
            "ROI_BOX_HEAD": {
                "FC_DIM": 1024,  # width of the two layers of an FPN's head; a VGG's have 4096
                "DROPOUT": 0.5,  # probability, after a VGG's fc6 and fc7; an FPN's head has none
            },
        }
    )


def _data() -> dict[str, Any]:
    return {
        "INPUT": {
            # An image with more is refused, by its header: a small file can ask for any memory.
            "MAX_PIXELS": 100_000_000,
            # What an image's EXIF orientation does. auto = it turns the image upright, and images
            # whose annotation has the size of the pixels as stored are refused, since their boxes
            # may mean either: apply = turn these too, ignore = read all images as stored. refuse =
            # no image may have an orientation.
            "EXIF": "auto",
            # Shorter side in training, pixels, drawn from this list for each image; [] or 0 = no
            # resizing.
            "MIN_SIZE_TRAIN": [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800],
            "MAX_SIZE_TRAIN": 1333,  # upper bound of the longer side in training, pixels
            "MIN_SIZE_TEST": 800,  # shorter side in evaluation, pixels; 0 = no resizing
            "MAX_SIZE_TEST": 1333,  # upper bound of the longer side in evaluation, pixels
            "FLIP_PROB": 0.5,  # probability of a horizontal flip
            # Brightness, contrast and saturation change by up to this fraction, 0 to 1, and the hue
            # by up to a tenth of it; 0 = off.
            "COLOR_JITTER": 0.0,
        },
        "DATASETS": {
            # Splits to train on: voc_2007_trainval, voc_2012_train, ...; shapes_train (drawn on
            # first use); or the name of a split at ROOT: a file of ImageSets/Main without ".txt", a
            # COCO file, a folder, an entry of data.yaml (tract_det/data/datasets.py has them all).
            "TRAIN": ["shapes_train"],
            "TEST": ["shapes_test"],  # splits to evaluate on, named in the same way
            # Folder of data in VOC's, COCO's or YOLO's format, or of VOC2007/ and VOC2012/. "" =
            # $DETECTRON2_DATASETS, or ./datasets if it is not set.
            "ROOT": "",
            # Format of the data at ROOT: voc, coco, yolo, or auto for what lies there.
            "FORMAT": "auto",
            # Fraction of the images to evaluate on where the data at ROOT have no splits: TRAIN
            # [train] is then the rest of them, TEST [test] these; 0 = such data are refused.
            "HOLDOUT": 0.0,
            "HOLDOUT_SEED": 0,  # seed that chooses the images to evaluate on
            # Class names in the order of the labels. [] = VOC's twenty, or in your own data the
            # sorted classes of the training split (--eval-only: those that the weights know).
            "CLASSES": [],
        },
        "DATALOADER": {
            # Worker processes on each rank that read images; 0 = the training process reads them.
            "NUM_WORKERS": 2,
            # True: a batch holds either wide or tall images, which need less padding.
            "ASPECT_RATIO_GROUPING": True,
            "FILTER_EMPTY_ANNOTATIONS": False,  # True: do not train on images without objects
            "USE_DIFFICULT": True,  # train on objects marked difficult, as detectron2 does
        },
    }


def _solver() -> dict[str, Any]:
    return {
        "SOLVER": {
            **solver_keys(),
            "IMS_PER_BATCH": 16,  # images per step, over all ranks and micro-batches
            "BASE_LR": 0.02,  # learning rate after the warm-up
            "WEIGHT_DECAY_BIAS": 1e-4,  # of biases
            "MAX_ITER": 18000,  # length of the training, steps
            "STEPS": [12000, 16000],  # steps at which the learning rate is multiplied by GAMMA
            "WARMUP_ITERS": 100,  # steps of linear growth of the learning rate; 0 = no warm-up
            "CHECKPOINT_PERIOD": 5000,  # steps between checkpoints for --resume
        },
        "TEST": {
            "EVAL_PERIOD": 0,  # steps between evaluations; 0 = only at the end
            "IMS_PER_BATCH": 1,  # images per batch on each rank, in evaluation
            "DETECTIONS_PER_IMAGE": 100,  # upper bound; those with the highest scores are kept
            "VOC_RULE": "devkit",  # devkit or detectron2: see tract_det/evaluation/voc_ap.py
            # Samples of the images for the intervals in results.json; 0 = no intervals.
            "BOOTSTRAP": 1000,
            # model_best.pth has the weights with the highest value of this figure; METRICS, in
            # evaluation/metrics.py, lists the choices, and with EMA each as ema.voc_area.mAP.
            "BEST_METRIC": "voc_area.mAP",
        },
    }


def get_cfg() -> CfgNode:
    """The defaults. The source of this file and of `shared.py` explains every key beside it."""
    cfg = CfgNode({**_data(), **_solver()})
    cfg.MODEL = _model()
    return with_run_keys(cfg)


def load_cfg(config_files: ConfigFiles, overrides: Sequence[str] = (), arm: str = "") -> CfgNode:
    """The configuration that files, an arm and `KEY VALUE` pairs make; see `machinery.load`."""
    return load(get_cfg(), validate, config_files, overrides, arm, task="a detector")


RANGES: dict[str, Rule] = {
    **SHARED_RANGES,
    "MODEL.DETECTRON2.OPTS": Anything(),
    "MODEL.FPN.OUT_CHANNELS": COUNT,
    "MODEL.ANCHOR_GENERATOR.SIZES": Numbers(POSITIVE, may_be_empty=False),
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": Numbers(POSITIVE, may_be_empty=False),
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": COUNT,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": COUNT,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": COUNT,
    "MODEL.RPN.POST_NMS_TOPK_TEST": COUNT,
    "MODEL.RPN.NMS_THRESH": FRACTION,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": COUNT,
    "MODEL.RPN.POSITIVE_FRACTION": FRACTION,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": COUNT,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": FRACTION,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": FRACTION,
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": FRACTION,
    "MODEL.ROI_BOX_HEAD.FC_DIM": COUNT,
    "MODEL.ROI_BOX_HEAD.DROPOUT": BELOW_ONE,
    "INPUT.MIN_SIZE_TRAIN": Numbers(Number(whole=True)),  # bounds: see `validate`
    "INPUT.MAX_SIZE_TRAIN": COUNT,
    "INPUT.MIN_SIZE_TEST": Number(whole=True),  # likewise
    "INPUT.MAX_SIZE_TEST": COUNT,
    "DATASETS.TRAIN": Names(),
    "DATASETS.TEST": Names(),
    "DATASETS.CLASSES": Names(),
    "DATASETS.HOLDOUT": BELOW_ONE,
    "DATASETS.HOLDOUT_SEED": Number(0, 2**32 - 1, whole=True),
    "SOLVER.MAX_ITER": COUNT,
    "SOLVER.WARMUP_ITERS": COUNT_OR_NONE,
    "SOLVER.CHECKPOINT_PERIOD": COUNT,
    "TEST.EVAL_PERIOD": COUNT_OR_NONE,
    "TEST.BOOTSTRAP": COUNT_OR_NONE,
    "TEST.DETECTIONS_PER_IMAGE": COUNT,
}


def validate(cfg: CfgNode) -> None:
    """Refuses values out of range and contradictions.

    Raises:
        UserError: the message names the key.
    """
    check(cfg, RANGES)
    solver = cfg.SOLVER
    check_common(cfg)
    check_patience(cfg, "TEST.EVAL_PERIOD")
    one_of(cfg, "MODEL.BACKBONE.NAME", BACKBONES)
    one_of(cfg, "MODEL.BACKBONE.NORM", DETECTOR_NORMS)
    one_of(cfg, "DATASETS.FORMAT", DETECTION_FORMATS)
    one_of(cfg, "INPUT.EXIF", EXIF_MODES)
    one_of(cfg, "TEST.VOC_RULE", RULES)
    one_of(cfg, "TEST.BEST_METRIC", DETECTION_METRICS)
    for part, sizes in (("TRAIN", cfg.INPUT.MIN_SIZE_TRAIN), ("TEST", [cfg.INPUT.MIN_SIZE_TEST])):
        largest = cfg.INPUT[f"MAX_SIZE_{part}"]
        for size in sizes:
            require(
                0 <= size <= largest,
                f"INPUT.MIN_SIZE_{part} {size}: it takes 0 to INPUT.MAX_SIZE_{part} {largest}",
            )
    require(
        all(type(step) is int and step > 0 for step in solver.STEPS),
        f"SOLVER.STEPS is {list(solver.STEPS)}: a detector takes steps, whole numbers from 1",
    )
    require(bool(cfg.DATASETS.TEST), "DATASETS.TEST is empty: name a split to evaluate on")
    require(
        len(cfg.MODEL.TRACT.STEM) < 2 and cfg.MODEL.TRACT.STEM != ["all"],
        f"MODEL.TRACT.STEM {', '.join(cfg.MODEL.TRACT.STEM)}: a detector takes one name, that of "
        "its first layer, since the padding of a batch is known there alone and its heads run once "
        "for each level; leave the key or its arm (foof) out",
    )
    _check_channels(cfg)
    _check_detectron2(cfg)
    stage = cfg.DEEPSPEED.zero_optimization.stage
    require(
        stage in (0, 1, 2),
        f"DEEPSPEED.zero_optimization.stage is {stage}: a detector takes 0, 1 or 2 (stage 3 cannot "
        "see the tensors inside lists of images)",
    )


def _check_channels(cfg: CfgNode) -> None:
    """With other images than RGB, refuses what is for RGB alone."""
    channels = len(cfg.MODEL.PIXEL_MEAN)
    require(
        channels in (0, 3) or not cfg.MODEL.DETECTRON2.CONFIG_FILE,
        f"MODEL.PIXEL_MEAN is for {channels} channels, and models of MODEL.DETECTRON2.CONFIG_FILE "
        "take three: use torchvision's model, or give three numbers",
    )


# The keys that describe torchvision's model and have no effect on a detectron2 model.
_TORCHVISION_KEYS = (
    *("MODEL.BACKBONE.NAME", "MODEL.BACKBONE.NORM", "MODEL.FPN", "MODEL.ANCHOR_GENERATOR"),
    *("MODEL.RPN", "MODEL.ROI_HEADS", "MODEL.ROI_BOX_HEAD", "TEST.DETECTIONS_PER_IMAGE"),
)


def _check_detectron2(cfg: CfgNode) -> None:
    """With a detectron2 model, refuses keys that it would ignore."""
    settings, defaults = cfg.MODEL.DETECTRON2, get_cfg()
    if not settings.CONFIG_FILE:
        require(
            not settings.OPTS,
            "MODEL.DETECTRON2.OPTS is set without MODEL.DETECTRON2.CONFIG_FILE: set both or none",
        )
        return
    for key in _TORCHVISION_KEYS:
        require(
            value_at(cfg, key) == value_at(defaults, key),
            f"{key} describes torchvision's model, not that of MODEL.DETECTRON2.CONFIG_FILE: leave "
            "it out, and set detectron2's own key in MODEL.DETECTRON2.OPTS",
        )
