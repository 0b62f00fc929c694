"""The names that configurations and command lines can choose from.

This module imports nothing, so that they can be checked before torch is imported.
"""

BACKBONES = (  # of detectors
    *(f"resnet{depth}_fpn" for depth in (18, 34, 50, 101, 152)),
    "vgg16",
    "vgg16_bn",
)
DETECTOR_NORMS = ("BN", "FrozenBN", "SyncBN", "GN")
CLASSIFIER_NORMS = ("BN", "SyncBN", "GN")
PATCH_NORMS = ("", "layer_norm", "dual")  # of ViTs; "" = none
STEM_INITS = ("", "whitened")  # of the first layer; "" = as the model's library initialises it
LOSSES = ("ce", "bce")  # of classifiers: softmax or binary cross-entropy
LAMBDA_UNITS = ("standardised", "input", "trace")  # of TrAct's lambda; see `pixels.lambda_in_unit`
FORMS = ("torchvision", "timm", "detectron2")  # libraries whose names tensors can have
CHANNELS = ("RGB", "BGR")
