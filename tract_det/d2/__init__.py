"""TrAct in detectron2's models, in detectron2's own programs and in this project's trainer.

No other folder imports detectron2, which is optional.
"""

try:
    import detectron2  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "detectron2":
        raise
    raise ModuleNotFoundError(
        "tract_det.d2 needs detectron2, which is not installed: build it as its INSTALL page says, "
        "https://github.com/facebookresearch/detectron2/blob/main/INSTALL.md",
        name="detectron2",
    ) from error

from tract_det.d2 import config_vgg  # noqa: F401  # registers the VGG backbones and box head
from tract_det.d2.config import add_tract_config
from tract_det.d2.config_files import config_file
from tract_det.d2.config_models import build_detector
from tract_det.d2.data import VOCEvaluator, register_voc
from tract_det.d2.detector import as_detector, as_detectron2
from tract_det.d2.modifier import apply_tract, remove_tract
from tract_det.d2.vgg import VGG, VGGBoxHead
from tract_det.d2.weights import check_pixels, load_into, meta_of, pixel_statistics_of
from tract_det.d2.weights import read as read_weights

__all__ = [
    "VGG",
    "VGGBoxHead",
    "VOCEvaluator",
    "add_tract_config",
    "apply_tract",
    "as_detector",
    "as_detectron2",
    "build_detector",
    "check_pixels",
    "config_file",
    "load_into",
    "meta_of",
    "pixel_statistics_of",
    "read_weights",
    "register_voc",
    "remove_tract",
]
