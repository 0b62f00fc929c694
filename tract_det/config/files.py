"""Config files: found by name, also by the names of earlier versions, and read with their bases."""

import difflib
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tract_det.errors import UserError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

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
    return next((path for path in places if path.is_file()), None)


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
    if old is None or _find(f"{old['base']}.yaml") is None:
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
    # Not imported with this module, which `--help` needs for the names of the arms.
    import yaml
    from fvcore.common.config import CfgNode

    try:
        loaded = CfgNode.load_yaml_with_base(str(path))
    except FileNotFoundError as error:
        base = str(error.filename)
        names, arm = _what_replaces(base)
        now = f": it is now {' and '.join(names)}" if names else ""
        now += f", with ARM: {arm}" if arm else ""
        raise UserError(f"config file {path}: its _BASE_ {base} does not exist{now}") from error
    except (OSError, yaml.YAMLError, AssertionError, TypeError, AttributeError) as error:
        message = " ".join(str(error).split())
        raise UserError(f"config file {path} cannot be read: {message}") from error
    if not isinstance(loaded, Mapping):
        raise UserError(f"config file {path} cannot be read: it holds no keys")
    return loaded


def layers(path: Path) -> list[tuple[Path, Mapping[str, Any]]]:
    """The bases of a config file, the deepest first, and the file itself, each with its own keys.

    Merged in this order they are what `read_config` gives.

    Raises:
        UserError: as `read_config`.
    """
    read_config(path)
    return _layers(path)


def _layers(path: Path) -> list[tuple[Path, Mapping[str, Any]]]:
    import yaml

    tree = dict(yaml.safe_load(path.read_text()))
    bases = tree.pop("_BASE_", [])
    below = [bases] if isinstance(bases, str) else bases
    return [
        *(layer for base in below for layer in _layers(path.parent / Path(base).expanduser())),
        (path, tree),
    ]


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
