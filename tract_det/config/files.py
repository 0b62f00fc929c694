"""Config files: found by name, also by the names of earlier versions, and read with their bases."""

import copy
import difflib
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tract_det.errors import UserError, shortened

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

# A configuration has some hundred values, three deep. A few bytes of YAML can stand for billions.
_LARGEST_FILE = 2**20
_MOST_VALUES = 10_000
_DEEPEST = 20

# A switch and a training set that were in a file's name before there were arms.
_OLD_NAME = re.compile(r"(?P<base>.*?)(_(?P<arm>tract|frozen))?(?P<years>_0712)?\.yaml$")


def find_config(name: str | Path) -> Path:
    """The config file of this name, in the working directory or else in the installed package.

    Args:
        name: a path, or a path below `configs/` such as "CIFAR/cpu_small.yaml", with or without
            the leading "configs/".

    Raises:
        UserError: there is no such file; the message suggests the nearest name.
    """
    path = _find(name)
    if path is not None:
        return path
    known = [f"configs/{path.relative_to(CONFIGS)}" for path in CONFIGS.rglob("*.yaml")]
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    hint = f": did you mean {close[0]}?" if close else ""
    raise UserError(f"config file {name} does not exist{hint}")


def _find(name: str | Path) -> Path | None:
    places = (Path(name), CONFIGS.parent / name, CONFIGS / name)
    return next((path for path in places if _is_file(path)), None)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file can have
        return False


def find_configs(name: str | Path) -> tuple[list[Path], str]:
    """The files that a name stands for, and the arm: "" but for a name of an earlier version.

    `X_tract.yaml` and `X_frozen.yaml` were copies of X.yaml with one switch, `X_0712.yaml` one with
    another training set. They are read as what they are now, with a warning that says so.

    Raises:
        UserError: as `find_config`.
    """
    path = _find(name)
    if path is not None:
        return [path], ""
    names, arm = _what_replaces(str(name))
    if names:
        now = " ".join(f"--config-file {name}" for name in names) + (f" --arm {arm}" if arm else "")
        warnings.warn(f"config file {name} is now: {now}", stacklevel=2)
    return [find_config(name) for name in names or [str(name)]], arm


def _what_replaces(name: str) -> tuple[list[str], str]:
    """The files and the arm that a name of an earlier version stands for; no files if none."""
    old = _OLD_NAME.match(name)
    base = _find(f"{old['base']}.yaml") if old is not None else None
    # A file of the user's own may have such a name, and never was anything else.
    if old is None or base is None or not base.resolve().is_relative_to(CONFIGS.resolve()):
        return [], ""
    names = [f"{old['base']}.yaml"]
    if old["years"]:
        names.append(f"schedules/{'VGG_16' if 'VGG' in old['base'] else 'R_50'}_0712.yaml")
    return names, old["arm"] or ""


def read_config(path: Path) -> Mapping[str, Any]:
    """The keys of a config file and of its bases.

    Raises:
        UserError: it cannot be read; the message names the file.
    """
    merged: dict[str, Any] = {}
    for _, tree in layers(path):
        _lay_over(merged, tree)
    return merged


def _lay_over(below: dict[str, Any], above: Mapping[str, Any]) -> None:
    """Changes `below`: sections are merged, other values replaced."""
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(below.get(key), dict):
            _lay_over(below[key], value)
        else:
            below[key] = copy.deepcopy(value)  # a later file may change the section


def layers(path: Path) -> list[tuple[Path, Mapping[str, Any]]]:
    """The bases of a config file, the deepest first, and the file itself, each with its own keys.

    Merged in this order they are what `read_config` gives.

    Raises:
        UserError: one cannot be read; the message names the file.
    """
    return _layers(path, ())


def _layers(path: Path, above: tuple[Path, ...]) -> list[tuple[Path, Mapping[str, Any]]]:
    if path.resolve() in above:
        raise UserError(f"config file {path} is a _BASE_ of itself: name another one")
    tree = _read_yaml(path)
    bases = tree.pop("_BASE_", [])
    names = [bases] if isinstance(bases, str) else bases
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"config file {path} cannot be read: _BASE_ takes the name of a file")
    layers = []
    for name in names:
        base = path.parent / (Path(name).expanduser() if name.startswith("~/") else name)
        if not _is_file(base):
            replacements, arm = _what_replaces(str(base))
            now = f": it is now {' and '.join(replacements)}" if replacements else ""
            now += f", with ARM: {arm}" if arm else ""
            where = shortened(str(base), 300)
            raise UserError(f"config file {path}: its _BASE_ {where} does not exist{now}")
        layers += _layers(base, (*above, path.resolve()))
    return [*layers, (path, tree)]


def _read_yaml(path: Path) -> dict[str, Any]:
    # Not imported with this module, which `--help` needs for the names of the arms.
    import yaml

    def unreadable(why: object) -> UserError:
        return UserError(f"config file {path} cannot be read: {' '.join(str(why).split())[:300]}")

    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_FILE + 1)
        tree = yaml.safe_load(data[:_LARGEST_FILE].decode("utf-8-sig"))
    except RecursionError:
        raise unreadable("it is nested too deeply") from None
    # ValueError: text that is not UTF-8, and dates and numbers that do not exist.
    except (OSError, yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        raise unreadable(error) from error
    if len(data) > _LARGEST_FILE:
        raise unreadable("it has more than a mebibyte, which no configuration needs")
    if not isinstance(tree, dict):
        raise unreadable("it holds no keys")
    try:
        check_values(tree)
    except UserError as error:
        raise unreadable(error) from None
    return tree


def check_values(tree: Any) -> None:
    """Refuses what no key takes: dates, bytes, keys that are no text, values without end.

    Raises:
        UserError: the message names the key.
    """
    left = _MOST_VALUES
    waiting: list[tuple[str, Any, int]] = [("", tree, 0)]
    while waiting:
        key, value, depth = waiting.pop()
        left -= 1
        if left < 0 or depth > _DEEPEST:
            raise UserError(f"'{shortened(key)}' has too many values, or holds itself")
        if isinstance(value, Mapping):
            prefix = f"{key}." if key else ""
            waiting += [(f"{prefix}{name}", item, depth + 1) for name, item in value.items()]
            numbers = [name for name in value if not isinstance(name, str)]
            if numbers and depth == 0:
                raise UserError(f"the key {shortened(str(numbers[0]))} is no text")
        elif isinstance(value, list | tuple):
            waiting += [(key, item, depth + 1) for item in value]
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise UserError(f"'{shortened(key)}' has a whole number beyond 64 bits")
        elif value is not None and not isinstance(value, str | int | float):
            raise UserError(
                f"'{shortened(key)}' is a {type(value).__name__}, which no key takes: quote it"
            )


def run_name(paths: list[Path]) -> str:
    """What a run of these files is called: `CIFAR/cpu_small`, or `CIFAR/cpu_small+mine`."""
    first, *others = paths
    name, ours = first.resolve(), CONFIGS.resolve()
    name = name.relative_to(ours) if name.is_relative_to(ours) else Path(name.name)
    return "+".join([str(name.with_suffix("")), *(path.stem for path in others)])


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a tree by their dotted keys: `{"A": {"B": 1}}` becomes `{"A.B": 1}`."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = value
    return values
