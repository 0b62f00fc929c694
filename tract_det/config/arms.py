"""The arms of a comparison: files of a few keys, laid over any experiment.

Most published VOC recipes freeze the stem, so that TrAct needs two controls: `frozen`, as they do,
and `plain`, which trains the stem by its ordinary gradient. Arms that say nothing of
TrAct lie on `plain`. `tract+muon` is an arm of two parts, whose keys must not contradict each
other; the order of the parts does not matter.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tract_det.config.files import CONFIGS, flat, read_config
from tract_det.errors import UserError

FOLDER = CONFIGS / "arms"

_SWITCH = "MODEL.TRACT.ENABLED"
_ON_PLAIN = "plain"  # what lies under the arms that do not set the switch

# Keys of the recipe, as opposed to those of the stem: nearly every config states a learning rate,
# and an arm about it would go with none of them if it did not win.
_RECIPE = ("SOLVER.", "INPUT.", "MIX.", "MODEL.EMA.", "MODEL.TRACT.UNIT")


def names() -> list[str]:
    """The arms there are, each of one part."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def _listing() -> str:
    return f"the arms are {', '.join(names())}"


def is_arm(path: Path) -> bool:
    """Whether a config file is that of an arm."""
    return path.resolve().parent == FOLDER.resolve()


def the_one(asked: Iterable[str]) -> str:
    """The arm that is asked for, "" if none is; its parts have one order, whatever was typed.

    Raises:
        UserError: there is no such arm, or two are asked for.
    """
    arms = sorted({_in_order(name) for name in asked if name})
    if len(arms) > 1:
        raise UserError(
            f"a run has one arm, and {' and '.join(arms)} are asked for: name one, or several as "
            f"A+B; {_listing()}"
        )
    return arms[0] if arms else ""


def _in_order(name: str) -> str:
    """The parts of an arm, those that switch TrAct on or off first, then by the alphabet."""
    parts = {part.strip() for part in name.split("+")}
    for part in sorted(parts):
        if part not in names():
            raise UserError(f"arm {part or name}: there is no such arm; {_listing()}")
    return "+".join(sorted(parts, key=lambda part: (_SWITCH not in _keys_of(part), part)))


@cache
def _keys_of(part: str) -> dict[str, Any]:
    return flat(read_config(FOLDER / f"{part}.yaml"))


def read(name: str) -> dict[str, Any]:
    """The values of an arm by their dotted keys, those of `plain` under it included.

    Raises:
        UserError: there is no such arm, or two of its parts set one key differently.
    """
    values: dict[str, Any] = {}
    setters: dict[str, str] = {}
    for part in the_one([name]).split("+"):
        for key, value in _keys_of(part).items():
            if values.setdefault(key, value) != value:
                raise UserError(
                    f"arm {name}: {setters[key]} sets {key} {values[key]}, but {part} sets it "
                    f"{value}: leave one of the two out"
                )
            setters.setdefault(key, part)
    return values if _SWITCH in values else _keys_of(_ON_PLAIN) | values


def refuse_foreign_keys(name: str, has_key: Callable[[str], bool], task: str) -> None:
    """Refuses an arm for another task.

    Args:
        name: of the arm.
        has_key: whether the task has this dotted key.
        task: "a detector" or "a classifier", for the message.

    Raises:
        UserError: the message names the part of the arm, its key and the task.
    """
    for part in name.split("+"):
        for key in _keys_of(part):
            if not has_key(key):
                raise UserError(
                    f"arm {part} sets {key}, which {task} does not have: leave {part} out"
                )


def refuse_contradictions(
    arm: str,
    values: Mapping[str, Any],
    *,
    typed: Mapping[str, Any],
    stated: Mapping[str, tuple[Any, str]],
    usual: Mapping[str, tuple[Any, ...]],
) -> None:
    """Refuses an arm that would undo what the user has set.

    A fractional number, such as a rate or a power, is only where the arm starts from: the command
    line may set another one. In a file, keys of the recipe give way to the arm.

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
        if key in typed and typed[key] != value and not isinstance(value, float):
            where, other, mend = "the command line", typed[key], "leave one of them out"
        elif (
            key in stated
            and stated[key][0] not in (value, *usual[key])
            and not key.startswith(_RECIPE)
        ):
            (other, where), mend = stated[key], "leave the key out of the file"
        else:
            continue
        raise UserError(
            f"arm {arm} sets {key} {value}, but {where} sets it {other}: {mend}; {_listing()}"
        )


def refuse_remains(
    arm: str,
    values: Mapping[str, Any],
    *,
    declared: Mapping[str, Any],
    stated: Mapping[str, tuple[Any, str]],
    defaults: Mapping[str, Any],
) -> None:
    """Refuses a file that spells out keys of another arm, which this one would leave as they are.

    The config that a run leaves behind is such a file: it does not say what its arm has replaced.

    Args:
        arm: the arm that is asked for.
        values: what it sets, as `read` gives it.
        declared: what the arm that the file declares sets.
        stated: values from the config files, each with the file's name.
        defaults: those of the declared keys.

    Raises:
        UserError: the message names the arm, the key and the file.
    """
    for key, value in declared.items():
        if key not in values and value != defaults[key] and stated.get(key, ("",))[0] == value:
            raise UserError(
                f"arm {arm} does not set {key}, and {stated[key][1]} sets it {value} as the arm "
                "that it declares does: start from the config that this file was made of, or leave "
                "the key out of it"
            )
