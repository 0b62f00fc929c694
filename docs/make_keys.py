"""Writes `docs/keys.md`: every configuration key, with its default, its bounds and its comment.

    python docs/make_keys.py

Defaults and bounds come from the configurations themselves, meanings from the comments beside the
keys in `tract_det/config/`. A test holds the page to what this makes.
"""

import ast
import inspect
import io
import math
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from tract_det.config import classification, detection, shared
from tract_det.config.ranges import Number, Numbers, Rule
from tract_det.files import write_text

PAGE = Path(__file__).resolve().parent / "keys.md"

_INTRODUCTION = """# Configuration keys

Written by `docs/make_keys.py` from `tract_det/config/`; do not edit it by hand.

Any key can be set in a file (`--config-file`) or behind all options as `KEY VALUE`. A value out of
its bounds is refused in one line that names the key.
"""


def page() -> str:
    """The text of the page, Markdown."""
    detector = _rows(detection)
    classifier = _rows(classification)
    common = [row for row in detector if row in classifier]
    parts = [
        _INTRODUCTION,
        "## Of detectors and classifiers\n",
        *_tables(common),
        "## Of detectors: `tract-det train`\n",
        *_tables(row for row in detector if row not in common),
        "## Of classifiers: `tract-det pretrain`\n",
        *_tables(row for row in classifier if row not in common),
    ]
    return "\n".join(parts)


def _tables(rows: Any) -> Iterator[str]:
    """A table for each section, which is what stands before a key's first dot."""
    sections: dict[str, list[tuple[str, str, str]]] = {}
    for key, *cells in rows:
        section = key.partition(".")[0] if "." in key else ""
        sections.setdefault(section, []).append((key, *cells))
    for section in sorted(sections):
        yield f"| {section or 'key'} | default | meaning |\n|---|---|---|"
        for key, default, meaning in sections[section]:
            name = key.removeprefix(f"{section}.")
            yield f"| `{name}` | {default} | {meaning} |"
        yield ""


def _rows(module: ModuleType) -> list[tuple[str, str, str]]:
    """Key, default and meaning of every key that a task's configuration has."""
    cfg = module.get_cfg()
    comments = dict(_comments(module))
    rows = []
    for key, value in _leaves(cfg):
        bounds = _bounds(module.RANGES.get(key))
        meaning = " ".join(part for part in (comments.get(key, ""), bounds) if part)
        default = yaml.safe_dump(value, default_flow_style=True, width=1000)
        default = default.removesuffix("\n").removesuffix("\n...").strip()
        rows.append((key, f"`{_cell(default)}`", _cell(meaning)))
    return rows


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, CfgNode):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _bounds(rule: Rule | None) -> str:
    number = rule.each if isinstance(rule, Numbers) else rule
    if not isinstance(number, Number) or math.isinf(number.low):
        return ""
    return f"({number.words().removeprefix('it ')})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


# Comments of the source


def _comments(module: ModuleType) -> Iterator[tuple[str, str]]:
    """The keys of a configuration, each with the comment that stands above it or behind it.

    A key without a comment has that of the section that it is in, or of the key above it.
    """
    sources = [_Source(module), _Source(shared)]
    for name in ("_data", "_solver"):
        yield from _of_function(name, sources, "", "")
    yield from _of_function("_model", sources, "MODEL.", "")
    source = sources[-1]
    for statement in source.functions["with_run_keys"].body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Attribute):
            key, value = statement.targets[0].attr, statement.value
            comment = source.comment(statement)
            yield key, comment
            if isinstance(value, ast.Call):
                yield from _of_value(value, [source], f"{key}.", comment)


class _Source:
    """The functions of a module, and its comments by their lines."""

    def __init__(self, module: ModuleType) -> None:
        text = inspect.getsource(module)
        functions = (node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef))
        self.functions = {function.name: function for function in functions}
        self.behind: dict[int, str] = {}
        self.alone: dict[int, str] = {}
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                is_alone = not token.line[: token.start[1]].strip()
                lines = self.alone if is_alone else self.behind
                lines[token.start[0]] = token.string.removeprefix("#").strip()

    def comment(self, node: ast.expr | ast.stmt) -> str:
        """What is said above and behind the first line of a key or statement."""
        first = line = node.lineno
        while line - 1 in self.alone:
            line -= 1
        above = [self.alone[above] for above in range(line, first)]
        return " ".join([*above, self.behind.get(first, "")]).strip()


def _of_function(
    name: str, sources: list[_Source], prefix: str, inherited: str
) -> Iterator[tuple[str, str]]:
    source = next(source for source in sources if name in source.functions)
    returned = source.functions[name].body[-1]
    assert isinstance(returned, ast.Return) and returned.value is not None
    order = [source, *(other for other in sources if other is not source)]
    yield from _of_value(returned.value, order, prefix, inherited)


def _of_value(
    value: ast.expr, sources: list[_Source], prefix: str, inherited: str
) -> Iterator[tuple[str, str]]:
    """The keys below a value; `sources` begins with the one that the value is in."""
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
        if value.func.id == "CfgNode":
            yield from _of_value(value.args[0], sources, prefix, inherited)
        elif any(value.func.id in source.functions for source in sources):
            yield from _of_function(value.func.id, sources, prefix, inherited)
    if not isinstance(value, ast.Dict):
        return
    comment = inherited
    for key, item in zip(value.keys, value.values, strict=True):
        if key is None:
            yield from _of_value(item, sources, prefix, inherited)
            continue
        assert isinstance(key, ast.Constant)
        # A comment may speak of the keys that follow as well.
        comment = sources[0].comment(key) or inherited or comment
        yield f"{prefix}{key.value}", comment
        yield from _of_value(item, sources, f"{prefix}{key.value}.", comment)


if __name__ == "__main__":
    write_text(PAGE, page())
    print(f"wrote {PAGE}")
