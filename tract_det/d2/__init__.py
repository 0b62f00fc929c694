"""TrAct in detectron2's models, in detectron2's own programs and in this project's trainer.

The only folder that imports detectron2, which is optional: nothing else needs it.
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

from tract_det.d2.config import add_tract_config
from tract_det.d2.modifier import apply_tract

__all__ = ["add_tract_config", "apply_tract"]
