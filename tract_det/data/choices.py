"""Names that a configuration can choose from.

A module of its own that imports nothing: a configuration is checked before torch is loaded.
"""

CLASSIFICATION_SETS = ("imagefolder", "cifar10", "cifar100", "flowers102", "stanford_cars")
DETECTION_FORMATS = ("auto", "voc", "coco", "yolo")
EXIF_MODES = ("auto", "apply", "ignore", "refuse")
CROPS = ("random_resized", "pad", "simple", "none")
AUTO_AUGMENTS = ("", "randaugment", "trivialaugment", "three_augment", "autoaugment_cifar10")
INTERPOLATIONS = ("bilinear", "bicubic")
