"""How a configuration is read: files that inherit with `_BASE_`, an arm, `KEY VALUE` overrides.

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

from tract_det.config import arms
from tract_det.config.files import check_values, find_configs, flat, layers, run_name
from tract_det.config.pairs import refuse_half_pairs
from tract_det.errors import UserError, shortened

# Keys of earlier versions, and by their value what says the same now.
_REPLACED = {
    "MODEL.TRACT.RELATIVE": {
        True: "set MODEL.TRACT.UNIT trace instead",
        False: "leave it out, and MODEL.TRACT.UNIT standardised (the default) or input",
    }
}


# One config file, or several, of which later ones override.
ConfigFiles = str | Path | Sequence[str | Path]


def load(
    cfg: CfgNode,
    check: Callable[[CfgNode], None],
    config_files: ConfigFiles,
    overrides: Sequence[str] = (),
    arm: str = "",
    *,
    task: str,
) -> CfgNode:
    """The defaults, changed by files with their bases, an arm and `KEY VALUE` pairs; frozen.

    Args:
        cfg: the defaults; changed in place.
        check: raises UserError for values out of range and contradictions.
        config_files: as for `files.find_config`.
        overrides: key, value, key, value, ...
        arm: a file of `configs/arms`, by its name, or several as "A+B". "" = what a config file
            declares by ARM; it lies over the bases of that file and under the keys of its own.
        task: "a detector" or "a classifier", for messages.

    Raises:
        UserError: an unknown key or arm, a value of the wrong type, a key that contradicts the
            arm, or whatever `check` refuses; the message names the file, key or arm.
    """
    paths, old_arms = _find_all(config_files)
    pairs = pairs_to_tree(overrides)
    overlays = [path for path in paths if arms.is_arm(path)]
    typed_arm = pairs.pop("ARM", "")
    require(isinstance(typed_arm, str), f"ARM takes the name of an arm, not {typed_arm!r}")
    asked = [arm, typed_arm, *old_arms, *(path.stem for path in overlays)]
    chosen = arms.the_one(asked)
    paths = [path for path in paths if path not in overlays]
    require(bool(paths), f"arm {chosen} is laid over a config: name that by --config-file as well")
    defaults = cfg.clone()
    stated, above = _merge_files(cfg, paths)
    declared = _read_arm(cfg.ARM, cfg, task)
    values = _read_arm(chosen, cfg, task)
    if chosen:
        usual = {key: (value_at(defaults, key), declared.get(key)) for key in values}
        arms.refuse_contradictions(chosen, values, typed=flat(pairs), stated=stated, usual=usual)
        unset = {key: value_at(defaults, key) for key in declared}
        arms.refuse_remains(chosen, values, declared=declared, stated=stated, defaults=unset)
    else:
        values = {key: value for key, value in declared.items() if key not in above}
    _merge(cfg, _tree(values), where="")
    _merge(cfg, pairs, where="")
    is_another = any(value_at(cfg, key) != value for key, value in declared.items())
    cfg.ARM = chosen or ("" if is_another else arms.the_one([cfg.ARM]))
    cfg.OUTPUT_DIR = cfg.OUTPUT_DIR or str(Path("output", run_name(paths), cfg.ARM))
    check(cfg)
    cfg.freeze()
    return cfg


def _merge_files(
    cfg: CfgNode, paths: Sequence[Path]
) -> tuple[dict[str, tuple[Any, str]], set[str]]:
    """Merges config files and their bases, in place.

    Returns:
        The values that they state by their dotted keys, each with the file's name; and the keys
        that lie above the arm which one of them declares: its own and those of later files.
    """
    stated: dict[str, tuple[Any, str]] = {}
    above: set[str] = set()
    for name, tree in (layer for path in paths for layer in layers(path)):
        _merge(cfg, tree, where=f"{name}: ")
        keys = flat(tree)
        stated |= {key: (value_at(cfg, key), str(name)) for key in keys}
        above = {*keys} if "ARM" in keys else above | {*keys}
    return stated, above


def _read_arm(name: str, cfg: CfgNode, task: str) -> dict[str, Any]:
    """The values of an arm; none where the name is empty."""
    if not name:
        return {}
    values, known = arms.read(name), set(_leaves(cfg))
    arms.refuse_foreign_keys(arms.the_one([name]), known.__contains__, task)
    return values


def _find_all(config_files: ConfigFiles) -> tuple[list[Path], list[str]]:
    """All files that are named, and the arms in the names of earlier versions."""
    names = [config_files] if isinstance(config_files, str | Path) else config_files
    resolved = [find_configs(name) for name in names]
    return [path for files, _ in resolved for path in files], [arm for _, arm in resolved]


def pairs_to_tree(pairs: Sequence[str]) -> CfgNode:
    """`["A.B", "1"]` becomes `{"A": {"B": 1}}`."""
    refuse_half_pairs(pairs)
    values = {}
    for key, text in zip(pairs[::2], pairs[1::2], strict=True):
        try:
            values[key] = _decode(text)
            check_values({key: values[key]})
        except UserError as error:
            raise UserError(f"override {error}") from None
        except (ValueError, RecursionError, MemoryError, OverflowError):
            raise UserError(f"override '{key}': {shortened(text)} is no value") from None
    return _tree(values)


def _tree(values: Mapping[str, Any]) -> CfgNode:
    """The inverse of `flat`."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        node = tree
        *parents, leaf = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UserError(f"override '{key}': '{parent}' is a value, not a section")
        node[leaf] = value
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
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")


def _merge(cfg: CfgNode, other: Mapping[str, Any], *, where: str) -> None:
    known = list(_leaves(cfg))
    _merge_node(cfg, other, "", known, where)


def _merge_node(
    node: CfgNode, other: Mapping[str, Any], prefix: str, known: list[str], where: str
) -> None:
    for key, value in other.items():
        full = f"{prefix}{key}"
        if key not in node:
            if not node.is_new_allowed():
                leaves = _leaves(value, f"{full}.") if isinstance(value, Mapping) else ()
                full = max(leaves, key=len, default=full)  # the name of the section may be misspelt
                if full in _REPLACED:
                    raise UserError(f"{where}'{full}' is no more: {_REPLACED[full][value is True]}")
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
    with suppress(ValueError, RecursionError, MemoryError, OverflowError):
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
            f"{where}'{key}' takes {type(default).__name__}, like {default!r}, not "
            f"{shortened(repr(value))}"
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
