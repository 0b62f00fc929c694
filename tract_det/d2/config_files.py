"""Finds this package's configs in detectron2's own format by name, for detectron2's programs."""

import difflib
from pathlib import Path

from tract_det.errors import UserError

_FOLDER = Path(__file__).resolve().parent / "configs"


def config_file(name: str) -> str:
    """The path of a config of this package, for `cfg.merge_from_file` after `add_tract_config`.

    Args:
        name: includes the folder, as in "PascalVOC-Detection/faster_rcnn_VGG_16_tract.yaml".

    Raises:
        UserError: there is no such config; the message suggests the nearest name.
    """
    known = {path.relative_to(_FOLDER).as_posix(): str(path) for path in _FOLDER.rglob("*.yaml")}
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
        raise UserError(f"tract_det.d2 has no config '{name}': did you mean '{nearest}'?")
    return known[name]
