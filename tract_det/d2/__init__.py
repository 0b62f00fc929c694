"""TrAct in detectron2's own programs: what they import. No other folder imports detectron2.

This project's trainer imports the modules that give it detectron2's models: `config_models`,
`detector` and `weights`.
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
from tract_det.d2.data import VOCEvaluator, register_voc
from tract_det.d2.modifier import apply_tract, remove_tract
from tract_det.d2.vgg import VGG, VGGBoxHead

__all__ = [
    "VGG",
    "VGGBoxHead",
    "VOCEvaluator",
    "add_tract_config",
    "apply_tract",
    "config_file",
    "register_voc",
    "remove_tract",
]
