"""How a configuration is read: files that inherit with `_BASE_`, then `KEY VALUE` overrides.

It is fvcore's CfgNode, with detectron2's key names where they exist. Unknown keys and wrong types
are errors that name the key and the nearest known one. Nothing here imports torch, so that a
mistake is reported at once.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from tract_det.errors import UserError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def find_config(name: str | Path) -> Path:
    """The config file of this name, in the working directory or else in the installed package.

    Args:
        name: a path, or a path below `configs/` such as "CIFAR/cpu_small.yaml", with or without
            the leading "configs/".

    Raises:
        UserError: there is no such file; the message suggests the nearest name.
    """
    for path in (Path(name), CONFIGS.parent / name, CONFIGS / name):
        if path.is_file():
            return path
    known = [f"configs/{path.relative_to(CONFIGS)}" for path in CONFIGS.rglob("*.yaml")]
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    hint = f": did you mean {close[0]}?" if close else ""
    raise UserError(f"config file {name} does not exist{hint}")


def load(
    cfg: CfgNode,
    check: Callable[[CfgNode], None],
    config_file: str | Path,
    overrides: Sequence[str] = (),
) -> CfgNode:
    """The defaults, changed by the file with its bases, then by `KEY VALUE` pairs; frozen.

    Args:
        cfg: the defaults; changed in place.
        check: raises UserError for values out of range and contradictions.
        config_file: as for `find_config`.
        overrides: key, value, key, value, ...

    Raises:
        UserError: an unknown key, a value of the wrong type, or whatever `check` refuses; the
            message names the file or key.
    """
    config_file = find_config(config_file)
    try:
        loaded = CfgNode.load_yaml_with_base(str(config_file))
    except (OSError, yaml.YAMLError, AssertionError, TypeError, AttributeError) as error:
        message = " ".join(str(error).split())
        raise UserError(f"config file {config_file} cannot be read: {message}") from error
    if not isinstance(loaded, Mapping):
        raise UserError(f"config file {config_file} cannot be read: it holds no keys")
    _merge(cfg, loaded, where=f"{config_file}: ")
    _merge(cfg, pairs_to_tree(overrides), where="")
    check(cfg)
    cfg.freeze()
    return cfg


def pairs_to_tree(pairs: Sequence[str]) -> CfgNode:
    """`["A.B", "1"]` becomes `{"A": {"B": 1}}`."""
    if len(pairs) % 2:
        raise UserError(f"overrides are KEY VALUE pairs: '{pairs[-1]}' has no value")
    tree: dict[str, Any] = {}
    for key, text in zip(pairs[::2], pairs[1::2], strict=True):
        node = tree
        *parents, leaf = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UserError(f"override '{key}': '{parent}' is a value, not a section")
        node[leaf] = _decode(text)
    return CfgNode(tree)


def _decode(text: str) -> Any:
    """A Python literal, a list whose words need no quotes (`[RBC, WBC]`), or the text itself."""
    value = CfgNode._decode_cfg_value(text)
    if value == text and text.startswith("["):
        with suppress(yaml.YAMLError):
            return yaml.safe_load(text)
    return value


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield prefix + key
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")


def _merge(cfg: CfgNode, other: Mapping[str, Any], *, where: str) -> None:
    known = list(_leaves(cfg))
    _merge_node(cfg, other, "", known, where)


def _merge_node(
    node: CfgNode, other: Mapping[str, Any], prefix: str, known: list[str], where: str
) -> None:
    for key, value in other.items():
        full = prefix + key
        if key not in node:
            if not node.is_new_allowed():
                leaves = _leaves(value, f"{full}.") if isinstance(value, Mapping) else ()
                full = max(leaves, key=len, default=full)  # the name of the section may be misspelt
                raise UserError(f"{where}unknown key '{full}'{_nearest(full, known)}")
            node[key] = CfgNode(value, new_allowed=True) if isinstance(value, Mapping) else value
        elif isinstance(node[key], CfgNode):
            if not isinstance(value, Mapping):
                raise UserError(f"{where}'{full}' is a section: write '{full}.<KEY>'")
            _merge_node(node[key], value, f"{full}.", known, where)
        else:
            node[key] = _coerce(value, node[key], full, where)


def _nearest(key: str, known: list[str]) -> str:
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(key.lower(), by_lower, n=1, cutoff=0.5)
    if not close:  # the right name in the wrong section
        leaf = key.rsplit(".", 1)[-1].lower()
        close = [name for name in by_lower if name.rsplit(".", 1)[-1] == leaf][:1]
    return (
        f": did you mean '{by_lower[close[0]]}'?" if close else ": tract_det/config lists all keys"
    )


def _coerce(value: Any, default: Any, key: str, where: str) -> Any:
    """The value, converted to the type of its default: unlike yacs, it accepts 1 for 1.0."""
    value = CfgNode._decode_cfg_value(value)
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if isinstance(default, list):
        if isinstance(value, tuple | list):
            return list(value)
        if isinstance(value, str | int | float):  # a single split or size
            return [value]
    if type(value) is not type(default):
        raise UserError(
            f"{where}'{key}' takes {type(default).__name__}, like {default!r}, not {value!r}"
        )
    return value


def require(condition: bool, message: str) -> None:
    """Raises a UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


def value_at(cfg: CfgNode, key: str) -> Any:
    """The value at a dotted key such as "SOLVER.BASE_LR"."""
    value: Any = cfg
    for part in key.split("."):
        value = value[part]
    return value


def one_of(cfg: CfgNode, key: str, allowed: Sequence[str]) -> None:
    """Refuses a value of `cfg.<key>` that is not one of `allowed`."""
    value = value_at(cfg, key)
    require(value in allowed, f"{key} is '{value}': it takes one of {', '.join(allowed)}")


def plain(node: Any) -> Any:
    """A config node as a plain dict, also in its sections."""
    return {k: plain(v) for k, v in node.items()} if isinstance(node, dict) else node
