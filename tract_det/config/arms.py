"""The arms of a comparison: files of a few keys, laid over any experiment.

Every published VOC recipe freezes the stem, so that TrAct needs two controls: `frozen`, as
published, and `plain`, which trains the stem by its ordinary gradient.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tract_det.config.files import CONFIGS, flat, read_config
from tract_det.errors import UserError

FOLDER = CONFIGS / "arms"


def names() -> list[str]:
    """The arms there are."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def _listing() -> str:
    return f"the arms are {', '.join(names())}"


def is_arm(path: Path) -> bool:
    """Whether a config file is that of an arm."""
    return path.resolve().parent == FOLDER.resolve()


def the_one(asked: Iterable[str]) -> str:
    """The arm that is asked for, "" if none is.

    Raises:
        UserError: there is no such arm, or two are asked for.
    """
    arms = sorted({name for name in asked if name})
    for name in arms:
        if name not in names():
            raise UserError(f"arm {name}: there is no such arm; {_listing()}")
    if len(arms) > 1:
        raise UserError(
            f"a run has one arm, and {' and '.join(arms)} are asked for: name one; {_listing()}"
        )
    return arms[0] if arms else ""


def read(name: str) -> dict[str, Any]:
    """The values of an arm by their dotted keys.

    Raises:
        UserError: there is no such arm.
    """
    return flat(read_config(FOLDER / f"{the_one([name])}.yaml"))


def refuse_contradictions(
    arm: str,
    values: Mapping[str, Any],
    *,
    typed: Mapping[str, Any],
    stated: Mapping[str, tuple[Any, str]],
    usual: Mapping[str, tuple[Any, ...]],
) -> None:
    """Refuses an arm that would undo what the user has set.

    Args:
        arm: its name.
        values: what it sets, as `read` gives it.
        typed: values from the command line by their dotted keys.
        stated: values from the config files, each with the file's name.
        usual: values that an arm may change: the default, and that of the arm that a file declares.

    Raises:
        UserError: the message names the arm, the key and where it is set.
    """
    for key, value in values.items():
        if key in typed and typed[key] != value:
            where, other, mend = "the command line", typed[key], "leave one of them out"
        elif key in stated and stated[key][0] not in (value, *usual[key]):
            (other, where), mend = stated[key], "leave the key out of the file"
        else:
            continue
        raise UserError(
            f"arm {arm} sets {key} {value}, but {where} sets it {other}: {mend}; {_listing()}"
        )
