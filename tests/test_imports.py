"""Who may import whom, read from the sources."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "tract_det"

ROOMS = {"tract", "modeling", "data", "evaluation", "engine", "d2", "config", "report", "training"}
SMALL = {"errors", "files", "distributed", "pixels", "version"}

# Folder or module -> what it may import of this project, and of other packages.
ALLOWED = {
    "tract": ({"tract"}, {"torch"}),
    "modeling": (
        {"modeling", "tract", "pixels", "errors", "files"},
        {"torch", "torchvision", "timm", "safetensors", "numpy"},
    ),
    "data": (
        {"data", "pixels", "errors"},
        {"torch", "torchvision", "numpy", "PIL", "matplotlib", "yaml"},
    ),
    "evaluation": (
        {"evaluation", "distributed", "errors", "files"},
        {"torch", "numpy", "pycocotools"},
    ),
    "engine": (
        {"engine", "distributed", "errors", "files", "version"},
        {"torch", "fvcore", "tqdm", "deepspeed", "timm", "numpy", "wandb", "trackio"},
    ),
    "d2": (
        {"d2", "tract", "modeling", "data", "evaluation", "engine", "pixels", "errors", "files"},
        {"torch", "torchvision", "numpy", "yaml", "detectron2"},
    ),
    "integrations": (
        {"integrations", "tract", "pixels", "errors"},
        {"torch", "lightning", "accelerate", "transformers", "ultralytics", "mmengine"},
    ),
    # Names to choose from alone, see below: the rooms themselves are too heavy for it.
    "config": (
        {"config", "errors", "engine", "modeling", "data", "evaluation"},
        {"fvcore", "yaml"},
    ),
    "report": (
        {
            "report",
            "config",
            "data",
            "modeling",
            "tract",
            "evaluation",
            "errors",
            "files",
            "pixels",
            "version",
        },
        {"torch", "numpy", "PIL", "yaml", "jinja2", "markupsafe"},
    ),
    # `training` for a run's config.yaml alone, which completes what an old file says.
    "inference": (
        {"inference", "modeling", "data", "evaluation", "training", "d2", "errors", "files"}
        | {"version"},
        {"torch", "torchvision", "numpy", "PIL", "matplotlib", "tqdm"}
        | {"av", "onnx", "onnxruntime"},
    ),
    "training": ({*ROOMS, *SMALL, "visualize"}, {"torch", "fvcore"}),
    "commands": ({*ROOMS, *SMALL, "commands", "inference", "visualize"}, set()),
    "cli": ({"commands", "errors", "version"}, set()),
    "visualize": (
        {"errors", "files", "pixels"},
        {"torch", "torchvision", "numpy", "PIL", "matplotlib"},
    ),
    "distributed": ({"errors"}, {"torch"}),
    "files": ({"errors"}, set()),
    "pixels": ({"errors"}, set()),
    "errors": (set(), set()),
    "version": (set(), set()),
    "__init__": ({"tract", "inference", "version"}, set()),
}


def _submodules(node):
    """The modules that `from tract_det import ...` reaches; names of the method are `tract`'s."""
    for alias in node.names:
        is_module = (PACKAGE / alias.name).is_dir() or (PACKAGE / f"{alias.name}.py").is_file()
        yield alias.name if is_module else "version" if alias.name == "__version__" else "tract"


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "tract_det":
                yield from (f"tract_det.{name}" for name in _submodules(node))
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
            assert rest[0] in own, f"{path.name} imports {name}"
        elif top not in sys.stdlib_module_names:
            assert top in others, f"{path.name} imports {name}"


def test_deepspeed_has_one_door():
    doors = [p.name for p in FILES if any(n.split(".")[0] == "deepspeed" for n in imports(p))]
    assert doors == ["ds.py"]


LIGHT = {"choices", "metrics", "voc_ap"}  # import numpy at most


def test_the_config_imports_only_names_to_choose_from():
    """So that a mistake in a configuration is reported before torch is imported."""
    for path in (PACKAGE / "config").glob("*.py"):
        for name in imports(path):
            top, *rest = name.split(".")
            if top == "tract_det" and rest[0] not in ("config", "errors"):
                assert rest[-1] in LIGHT, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", [p for p in FILES if p.stem in LIGHT], ids=lambda p: p.stem)
def test_what_a_config_imports_needs_numpy_at_most(path):
    needed = {name.split(".")[0] for name in imports(path)}
    assert needed - sys.stdlib_module_names <= {"numpy", "tract_det"}


def _touches_a_cfg(path):
    for node in ast.walk(ast.parse(path.read_text())):
        name = getattr(node, "id", None) or getattr(node, "arg", None) or getattr(node, "name", "")
        if name in ("cfg", "CfgNode"):
            return True
    return False


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_training_and_config_touch_a_cfg(path):
    """And `d2/config*`, which reads detectron2's own."""
    place = path.relative_to(PACKAGE)
    may = place.parts[0] in ("training", "config") or place.match("d2/config*")
    assert may or not _touches_a_cfg(path)
