"""Finds this package's configs in detectron2's own format by name, for detectron2's programs."""

import difflib
from pathlib import Path

from tract_det.errors import UserError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
FOLDER = CONFIGS / "detectron2"


def config_file(name: str) -> str:
    """The path of a config of this package, for `cfg.merge_from_file` after `add_tract_config`.

    Args:
        name: a whole recipe, as "PascalVOC-Detection/faster_rcnn_VGG_16.yaml"; or a few keys to
            merge after one: an arm ("arms/tract.yaml") or "schedules/VGG_16_0712.yaml".

    Raises:
        UserError: there is no such config; the message suggests the nearest name.
    """
    recipes = FOLDER.glob("*-Detection/*.yaml")
    known = {path.relative_to(FOLDER).as_posix(): str(path) for path in recipes}
    for path in [*CONFIGS.glob("arms/*.yaml"), *CONFIGS.glob("schedules/*.yaml")]:
        known[path.relative_to(CONFIGS).as_posix()] = str(path)
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
        arm = next((arm for arm in ("tract", "frozen") if f"_{arm}" in name), "")
        after = f", and after it 'arms/{arm}.yaml'" if arm else ""
        raise UserError(f"tract_det.d2 has no config '{name}': did you mean '{nearest}'{after}?")
    return known[name]
