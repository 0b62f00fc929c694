"""Who may import whom, read from the sources."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "tract_det"

# Folder or module -> what it may import of this project, and of other packages.
ALLOWED = {
    "tract": ({"tract"}, {"torch"}),
    "modeling": (
        {"modeling", "tract", "pixels", "errors", "files"},
        {"torch", "torchvision", "timm", "safetensors", "numpy"},
    ),
    "data": ({"data", "errors"}, {"torch", "torchvision", "numpy", "PIL", "matplotlib"}),
    "evaluation": (
        {"evaluation", "distributed", "errors", "files"},
        {"torch", "numpy", "pycocotools"},
    ),
    "engine": (
        {"engine", "distributed", "errors", "files"},
        {"torch", "fvcore", "tqdm", "deepspeed", "timm"},
    ),
    "d2": (
        {"d2", "tract", "modeling", "data", "evaluation", "engine", "pixels", "errors", "files"},
        {"torch", "torchvision", "numpy", "yaml", "detectron2"},
    ),
    "config": ({"config_common", "evaluation", "modeling.choices"}, {"fvcore"}),
    "config_classification": (
        {"config_common", "evaluation", "data.choices", "modeling.choices"},
        {"fvcore"},
    ),
    "config_common": ({"errors"}, {"fvcore", "yaml"}),
    "visualize": ({"errors", "files"}, {"torch", "torchvision", "numpy", "PIL", "matplotlib"}),
    "distributed": (set(), {"torch"}),
    "pixels": ({"errors"}, set()),
    "errors": (set(), set()),
    "files": ({"errors"}, set()),
    "version": (set(), set()),
    "cli": ({"errors", "tract"}, set()),
    "__init__": ({"tract", "version"}, set()),
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "tract_det":
                yield from (f"tract_det.{alias.name}" for alias in node.names)
            else:
                yield node.module


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_room_has_a_rule():
    assert {room(path) for path in FILES} == set(ALLOWED)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_what_its_room_may(path):
    own, others = ALLOWED[room(path)]
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "tract_det":
            assert {rest[0], ".".join(rest[:2])} & own, f"{path.name} imports {name}"
        elif top not in sys.stdlib_module_names:
            assert top in others, f"{path.name} imports {name}"


@pytest.mark.parametrize("name", ["metrics.py", "voc_ap.py"])
def test_the_names_that_a_config_takes_from_evaluation_need_numpy_at_most(name):
    needed = {module.split(".")[0] for module in imports(PACKAGE / "evaluation" / name)}
    assert needed - sys.stdlib_module_names <= {"numpy"}


def test_the_choices_of_a_configuration_import_nothing():
    assert not list(imports(PACKAGE / "data" / "choices.py"))


def test_deepspeed_has_one_door():
    doors = [p.name for p in FILES if any(n.split(".")[0] == "deepspeed" for n in imports(p))]
    assert doors == ["ds.py"]


def test_a_configuration_can_be_checked_against_the_choices_without_torch():
    assert not list(imports(PACKAGE / "modeling" / "choices.py"))
