"""The configuration of a classifier's training, `tract-det pretrain`; `shared.py` has common keys.

An epoch has as many images as the training split, whatever the batch size and the number of ranks:
90 epochs of 1,000 images are 90,000 images.
"""

from collections.abc import Sequence
from typing import Any

from fvcore.common.config import CfgNode

from tract_det.config.machinery import ConfigFiles, load, one_of, require
from tract_det.config.ranges import (
    BELOW_ONE,
    COUNT,
    COUNT_OR_NONE,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
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
from tract_det.data.choices import AUTO_AUGMENTS, CLASSIFICATION_SETS, CROPS, INTERPOLATIONS
from tract_det.evaluation.metrics import CLASSIFICATION_METRICS
from tract_det.modeling.choices import CLASSIFIER_NORMS, LOSSES, PATCH_NORMS


def _model() -> CfgNode:
    return CfgNode(
        {
            # One of torchvision's classifiers; "resnet10", with one basic block per stage; or one
            # of timm's, as "timm:<name>". Networks for CIFAR, with SMALL_IMAGES: vit_cifar,
            # resnext152_cifar, wide_resnet40_10, inception_resnet_v2_cifar, shufflenet_g3.
            "NAME": "resnet50",
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
            # True: the model sees (pixels - PIXEL_MEAN) / PIXEL_STD. False: it sees pixels in
            # [0, VALUE_RANGE], which for other channels than three is True with PIXEL_MEAN of zeros
            # and PIXEL_STD of 255 / VALUE_RANGE.
            "STANDARDIZE": True,
            "VALUE_RANGE": 1.0,  # what 255 becomes if STANDARDIZE is False, usually 1.0 or 255.0
            # BN = the norms that the model comes with; SyncBN (needs cuda) or GN replaces its batch
            # norms.
            "NORM": "BN",
            # True: the model's form for images of CIFAR's size. That is a 3x3 stem of stride 1
            # without pooling (ResNets, DenseNets, Inceptions, ...: modeling/small_images.py lists
            # them), a classifier of one linear layer (VGGs), or 8 x 8 patches (timm's ViTs).
            "SMALL_IMAGES": False,
            # True, with SMALL_IMAGES: keep the 3x3/2 max-pooling after the stem of a ResNet of
            # torchvision, as the TrAct authors' CIFAR-10 code does.
            "SMALL_POOL": False,
            # For ViTs: "" = none, layer_norm = LayerNorm of each raw patch, dual = DualPatchNorm.
            "PATCH_NORM": "",
            "WIDTH": 64,  # channels of a ResNet's stem
            "DROP_RATE": 0.0,  # probability of every dropout; VGGs were published with 0.5
            "DROP_PATH_RATE": 0.0,  # stochastic depth, for timm's models only
            # True: compute activations again in the backward pass, which saves memory.
            "CHECKPOINTING": False,
            # True: channels_last memory format, of the images and, under ZeRO 0, of the weights.
            "CHANNELS_LAST": False,
            "COMPILE": False,  # True: torch.compile
            "LOSS": "ce",  # ce = cross-entropy, bce = one sigmoid per class (DeiT-III)
            "EMA": ema_keys(),
            # How the first layer is initialised: "" = as its library does; whitened = by filters
            # that whiten the patches of 256 training images. Not with WEIGHTS.
            "STEM_INIT": "",
            "TRACT": tract_keys(),
            # Number of frozen stages: 0 = none, 1 = the stem, 2 = also the first stage or block,
            # ..., 5; -1 = 0.
            "BACKBONE": {"FREEZE_AT": -1},
        }
    )


def _data() -> dict[str, Any]:
    return {
        "INPUT": {
            # An image with more is refused, by its header: a small file can ask for any memory.
            "MAX_PIXELS": 100_000_000,
            "SIZE": 224,  # height and width of the images that the model sees, pixels
            # random_resized = a part of random area and shape, resized to SIZE. pad (CIFAR) =
            # PADDING black pixels on each side, then a random part. simple (DeiT-III) = the shorter
            # side resized to SIZE, PADDING reflected pixels on each side, then a random part.
            # none = the center, without resizing.
            "CROP": "random_resized",
            # For random_resized, smallest and largest: fraction of the area, and width / height.
            "SCALE": [0.08, 1.0],
            "RATIO": [0.75, 1.3333333333],
            "PADDING": 4,  # for pad and simple, pixels
            "FLIP_PROB": 0.5,  # probability of a horizontal flip
            # Largest angle of a random rotation to either side, degrees, 0 to 180; 0 = off.
            "ROTATION": 0.0,
            # "" = none, randaugment, trivialaugment, three_augment (DeiT-III), autoaugment_cifar10.
            "AUTO_AUGMENT": "",
            "MAGNITUDE": 9,  # strength of RandAugment's operations, 0 to 30
            "NUM_OPS": 2,  # number of RandAugment's operations per image
            # Brightness, contrast and saturation change by up to this fraction, 0 to 1. 0 = off,
            # but with three_augment DeiT-III's 0.3.
            "COLOR_JITTER": 0.0,
            "ERASING": 0.0,  # probability of erasing a random rectangle
            "INTERPOLATION": "bilinear",  # bilinear or bicubic, in training and evaluation
            # Shorter side in evaluation before the center crop of SIZE, pixels; 0 = no resizing,
            # -1 = SIZE * 256 / 224.
            "RESIZE_TEST": -1,
            # Number of times in turn that each image is drawn, every time augmented anew (repeated
            # augmentation); 1 = off.
            "REPEATS": 1,
        },
        "MIX": {
            "MIXUP_ALPHA": 0.0,  # of mixup's Beta distribution; 0 = no mixup
            "CUTMIX_ALPHA": 0.0,  # of CutMix's Beta distribution; 0 = no CutMix
            "PROB": 1.0,  # probability that a batch is mixed at all
            "SWITCH_PROB": 0.5,  # probability of CutMix instead of mixup, if both are on
            "SMOOTHING": 0.0,  # label smoothing, also of batches that are not mixed
        },
        "DATASETS": {
            # imagefolder = train/<class>/*.jpg and val/<class>/*.jpg (or test/<class>/*.jpg), or
            # other images, also of other channels in .npy; or one of torchvision's data sets:
            # cifar10, cifar100, flowers102, stanford_cars.
            "NAME": "imagefolder",
            "ROOT": "",  # folder of the data set; must be set
            # Fraction of the training images of each class to evaluate on, if an imagefolder has
            # neither val nor test; 0 = such a folder is refused.
            "HOLDOUT": 0.0,
            "HOLDOUT_SEED": 0,  # seed that chooses the images to evaluate on
            "LIMIT": 0,  # number of training images, spread evenly over the classes; 0 = all
            # True: an image that does not decode is replaced by another one in training and left
            # out in evaluation, and counted in both. False: it is an error.
            "SKIP_CORRUPT": False,
            "CACHE": 0,  # MiB of decoded images that each worker process keeps; 0 = none
        },
        # Worker processes on each rank that read images; 0 = the training process reads them.
        "DATALOADER": {"NUM_WORKERS": 2},
    }


def _solver() -> dict[str, Any]:
    return {
        "SOLVER": {
            **solver_keys(),
            "IMS_PER_BATCH": 256,  # images per step, over all ranks and micro-batches
            "BASE_LR": 0.1,  # learning rate after the warm-up
            # Weight decay of the scales and shifts of norms, and of biases (also of LayerScale, and
            # of ViTs' tokens and position embeddings). With both at 0, only weights decay.
            "WEIGHT_DECAY_NORM": 1e-4,
            "WEIGHT_DECAY_BIAS": 1e-4,
            "EPOCHS": 90.0,  # length of the training
            "MAX_ITER": 0,  # length of the training in steps, instead of EPOCHS; 0 = as EPOCHS says
            # When the learning rate is multiplied by GAMMA: fractions of the training, or epochs if
            # they are 1 and above.
            "STEPS": [1 / 3, 2 / 3],
            "WARMUP_EPOCHS": 0.0,  # epochs of linear growth of the learning rate; 0 = no warm-up
            "CHECKPOINT_EPOCHS": 1.0,  # epochs between checkpoints for --resume
        },
        "TEST": {
            "EVAL_EPOCHS": 1.0,  # epochs between evaluations; 0 = only at the end
            "IMS_PER_BATCH": 100,  # images per batch on each rank, in evaluation
            # Samples of the images, in samples.npz, for `tract-det compare`; 0 = none.
            "BOOTSTRAP": 1000,
            # model_best.pth has the weights with the highest value of this figure: top1, top5, or
            # with EMA ema.top1, ema.top5.
            "BEST_METRIC": "top1",
        },
    }


def get_cfg() -> CfgNode:
    """The defaults. The source of this file and of `shared.py` explains every key beside it."""
    cfg = CfgNode({**_data(), **_solver()})
    cfg.MODEL = _model()
    return with_run_keys(cfg)


def load_cfg(config_files: ConfigFiles, overrides: Sequence[str] = (), arm: str = "") -> CfgNode:
    """The configuration that files, an arm and `KEY VALUE` pairs make; see `machinery.load`."""
    return load(get_cfg(), validate, config_files, overrides, arm, task="a classifier")


RANGES: dict[str, Rule] = {
    **SHARED_RANGES,
    "MODEL.VALUE_RANGE": POSITIVE,
    "MODEL.WIDTH": COUNT,
    "MODEL.DROP_RATE": BELOW_ONE,
    "MODEL.DROP_PATH_RATE": BELOW_ONE,
    "INPUT.SIZE": COUNT,
    "INPUT.SCALE": Numbers(),
    "INPUT.RATIO": Numbers(),
    "INPUT.PADDING": COUNT_OR_NONE,
    "INPUT.ROTATION": Number(0, 180),
    "INPUT.MAGNITUDE": Number(0, 30, whole=True),
    "INPUT.NUM_OPS": COUNT,
    "INPUT.ERASING": FRACTION,
    "INPUT.RESIZE_TEST": Number(-1, 2**31 - 1, whole=True),
    "INPUT.REPEATS": COUNT,
    "MIX.MIXUP_ALPHA": NOT_NEGATIVE,
    "MIX.CUTMIX_ALPHA": NOT_NEGATIVE,
    "MIX.PROB": FRACTION,
    "MIX.SWITCH_PROB": FRACTION,
    "MIX.SMOOTHING": FRACTION,
    "DATASETS.HOLDOUT": BELOW_ONE,
    "DATASETS.HOLDOUT_SEED": Number(0, 2**32 - 1, whole=True),
    "DATASETS.LIMIT": COUNT_OR_NONE,
    "DATASETS.CACHE": COUNT_OR_NONE,
    "SOLVER.EPOCHS": NOT_NEGATIVE,
    "SOLVER.MAX_ITER": COUNT_OR_NONE,
    "SOLVER.WARMUP_EPOCHS": NOT_NEGATIVE,
    "SOLVER.CHECKPOINT_EPOCHS": POSITIVE,
    "TEST.EVAL_EPOCHS": NOT_NEGATIVE,
    "TEST.BOOTSTRAP": COUNT_OR_NONE,
}


def validate(cfg: CfgNode) -> None:
    """Refuses values out of range and contradictions.

    Raises:
        UserError: the message names the key.
    """
    check(cfg, RANGES)
    check_common(cfg)
    check_patience(cfg, "TEST.EVAL_EPOCHS")
    _check_data(cfg)
    one_of(cfg, "MODEL.NORM", CLASSIFIER_NORMS)
    one_of(cfg, "MODEL.PATCH_NORM", PATCH_NORMS)
    one_of(cfg, "MODEL.LOSS", LOSSES)
    one_of(cfg, "TEST.BEST_METRIC", CLASSIFICATION_METRICS)
    model, solver = cfg.MODEL, cfg.SOLVER
    require(
        model.STANDARDIZE or not model.PIXEL_MEAN,
        "MODEL.PIXEL_MEAN is set, but MODEL.STANDARDIZE False does not use it: leave one out",
    )
    _check_channels(cfg)
    require(
        not (model.COMPILE and model.CHECKPOINTING),
        "MODEL.COMPILE and MODEL.CHECKPOINTING do not work together: set one of them False",
    )
    require(
        model.NORM != "SyncBN" or model.DEVICE != "cpu",
        "MODEL.NORM SyncBN needs MODEL.DEVICE cuda: on a CPU set BN or GN",
    )
    require(
        solver.MAX_ITER > 0 or solver.EPOCHS > 0,
        f"SOLVER.EPOCHS is {solver.EPOCHS}: it must be positive",
    )
    require(
        all(step > 0 for step in solver.STEPS) and len({step < 1 for step in solver.STEPS}) < 2,
        f"SOLVER.STEPS is {list(solver.STEPS)}: it takes either fractions of the training (above 0 "
        "and below 1) or epochs",
    )
    _check_zero(cfg)


def _check_channels(cfg: CfgNode) -> None:
    """With other images than RGB, refuses what is for RGB alone; colour jitter is shared."""
    channels = len(cfg.MODEL.PIXEL_MEAN)
    if channels in (0, 3):
        return
    require(
        not cfg.INPUT.AUTO_AUGMENT,
        f"INPUT.AUTO_AUGMENT {cfg.INPUT.AUTO_AUGMENT} changes colours, and MODEL.PIXEL_MEAN is for "
        f"{channels} channels: set INPUT.AUTO_AUGMENT ''",
    )
    require(
        cfg.DATASETS.NAME == "imagefolder",
        f"DATASETS.NAME {cfg.DATASETS.NAME} has RGB images, and MODEL.PIXEL_MEAN is for {channels} "
        "channels: give three numbers, or take imagefolder",
    )


def _check_data(cfg: CfgNode) -> None:
    inputs = cfg.INPUT
    one_of(cfg, "DATASETS.NAME", CLASSIFICATION_SETS)
    one_of(cfg, "INPUT.CROP", CROPS)
    one_of(cfg, "INPUT.AUTO_AUGMENT", AUTO_AUGMENTS)
    one_of(cfg, "INPUT.INTERPOLATION", INTERPOLATIONS)
    require(
        inputs.RESIZE_TEST in (-1, 0) or inputs.RESIZE_TEST >= inputs.SIZE,
        f"INPUT.RESIZE_TEST {inputs.RESIZE_TEST} is less than INPUT.SIZE {inputs.SIZE}: the center "
        f"crop does not fit, set at least {inputs.SIZE}",
    )
    for key in ("SCALE", "RATIO"):
        require(
            len(inputs[key]) == 2 and 0 < inputs[key][0] <= inputs[key][1],
            f"INPUT.{key} is {inputs[key]}: it takes two positive numbers, the smaller one first",
        )


def _check_zero(cfg: CfgNode) -> None:
    stage = cfg.DEEPSPEED.zero_optimization.stage
    key = f"DEEPSPEED.zero_optimization.stage {stage}"
    require(stage in (0, 1, 2, 3), f"{key}: it takes 0, 1, 2 or 3")
    for other, is_on in (("EMA.ENABLED", cfg.MODEL.EMA.ENABLED), ("COMPILE", cfg.MODEL.COMPILE)):
        require(
            stage < 3 or not is_on,
            f"{key} leaves no rank with whole weights, which MODEL.{other} needs: set a stage "
            f"below 3, or MODEL.{other} False",
        )
