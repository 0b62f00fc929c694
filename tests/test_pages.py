"""The code of the pages runs: every command, in order, as a reader would give it.

A command is run as it stands but for what `STAND_INS` replaces, and what `SHORT` adds to make a
training short. One that cannot be run is in `NOT_RUN`, with the reason.
"""

import configparser
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import REPO, write_voc_tree
from tests.pages import PAGES, blocks, read
from tests.training.image_folder import write_image_folder
from tests.training.runs import free_port

# What begins so is not run.
NOT_RUN = {
    "python -m pip ": "the network",
    "pip install ": "the network",
    "datum convert ": "a package of others, which only converts",
    "pre-commit install": "changes the checkout",
    "python -m pytest": "these tests themselves",
    "TRACT_DET_KILLS=50 python -m pytest ": "these tests themselves",
    "ruff ": "CI runs it",
    "mypy ": "CI runs it",
    "sphinx-build ": "CI runs it",
    "bash .ci/": "CI itself",
    "jupyter execute ": "tests/test_tour.py executes the notebook",
    "tract-det bench paper": "writes a page of the checkout; tests/test_paper_page.py compares it",
    "tract-det bench train": "needs detectron2",
    "python benchmarks/train.py ": "needs detectron2",
    "deepspeed tools/train_net.py --config-file configs/detectron2/": "needs detectron2",
    "python tools/train_net.py --config-file configs/detectron2/": "needs detectron2",
    "python plain_train_net.py ": "needs detectron2: tests/d2/test_readme.py",
    "python lazyconfig_train_net.py ": "needs detectron2: tests/d2/test_readme.py",
    "from tract_det.d2 import add_tract_config\n": "needs detectron2, and is on its page as well",
    "from tract_det.d2 import VOCEvaluator, ": "needs detectron2: tests/d2/test_readme.py",
    "add_tract_config(cfg)": "needs detectron2: tests/d2/test_readme.py",
    "def get_evaluator(cfg, ": "needs detectron2: tests/d2/test_readme.py",
    "from detectron2.config import ": "needs detectron2: tests/d2/test_readme.py",
    "python tools/convert_weights.py VGG16_Weights.IMAGENET1K_V1 ": "the network",
    "dZ^T X (G + lambda_ I)^-1": "a formula",
}
# Sphinx makes them, with warnings as errors, in CI.
DIRECTIVES = ("{toctree}", "{eval-rst}")
# Their Python blocks are run where their packages are tested.
ELSEWHERE = {"docs/trainers.md": "tests/integrations/test_trainers_page.py"}

CELLS = "BCCD-Detection/faster_rcnn_R_18_FPN.yaml"
EVALUATE = "--detections output/cells/detections --json evaluated.json"
STAND_INS = {
    "VERB": "train",
    "--config-file FILE": f"--config-file {CELLS}",
    "tools/train_net.py ...": f"tools/train_net.py --config-file {CELLS}",
    "tract_det.cli train ...": f"tract_det.cli train --config-file {CELLS}",
    "--detections DIR --json OUT": EVALUATE,
    "IN OUT": "output/CIFAR/resnet18_64px/tract/model_final.pth converted.pth",
    "--num_gpus 8": "--num_gpus 1",
    "--nproc-per-node 8": "--nproc-per-node 1",
    "--nnodes 2": "--nnodes 1",
    "node1": "127.0.0.1",
    "--arms plain,tract,tract+fast_stem --seeds 5": "--arms plain,tract,tract+fast_stem --seeds 1",
    "bench gpu": "bench gpu --device cpu --small --minutes 0",
    "bench stem": "bench stem --repeats 1 --stems 3x3-cifar --no-memory",
}
SHORT = {
    "detection": "SOLVER.MAX_ITER 2 SOLVER.IMS_PER_BATCH 2 DATALOADER.NUM_WORKERS 0 "
    "INPUT.MIN_SIZE_TRAIN [96] INPUT.MIN_SIZE_TEST 96 MODEL.ROI_BOX_HEAD.FC_DIM 32 "
    "MODEL.RPN.POST_NMS_TOPK_TEST 20 TEST.BOOTSTRAP 20",
    "classification": "SOLVER.MAX_ITER 2 SOLVER.IMS_PER_BATCH 8 DATALOADER.NUM_WORKERS 0",
}


def is_run(code):
    return not any(code.strip().startswith(beginning) for beginning in NOT_RUN)


def units(page):
    """What a page's test does, in order: scripts for a shell, and the code of Python blocks."""
    for block in blocks(page):
        if block.language in ("", "inline"):
            commands = [command for command in block.commands() if is_run(command)]
            yield from [("shell", "\n".join(commands))] * bool(commands)
        elif block.language == "python" and page not in ELSEWHERE and is_run(block.code):
            yield "python", block.code


def test_every_block_is_of_a_kind_that_is_run():
    for page in PAGES:
        assert read(page).count("```") == 2 * sum(b.language != "inline" for b in blocks(page))
        for block in blocks(page):
            assert block.language in ("", "inline", "python", *DIRECTIVES), block


def test_what_is_not_run_is_on_a_page():
    every = [block for page in PAGES for block in blocks(page)]
    code = [command for block in every for command in [block.code.strip(), *block.commands()]]
    for beginning in NOT_RUN:
        assert any(one.startswith(beginning) for one in code), beginning


def test_what_commands_name_of_the_checkout_is_there():
    commands = [c for page in PAGES for block in blocks(page) for c in block.commands()]
    words = {word for command in commands for word in command.split()}
    places = ("tests/", "tools/", "benchmarks/", "docs/", ".ci/", "configs/")
    named = {word for word in words if word.startswith(places) and "FILE" not in word}
    assert len(named) > 10 and not [name for name in named if not (REPO / name).exists()]


def test_the_tests_of_trainers_and_of_detectron2_take_their_blocks_from_the_pages():
    for page, test in ELSEWHERE.items():
        assert f'python_blocks("{page}")' in read(test)
    assert 'python_blocks("tract_det/d2/README.md")' in read("tests/d2/test_readme.py")


def test_what_pip_is_to_install_with_is_an_extra():
    setup = configparser.ConfigParser()
    setup.read(REPO / "setup.cfg")
    text = "".join(map(read, PAGES))
    named = set(re.findall(r"pip install -e \"\.\[(\w+)", text))
    assert named and named <= set(setup["options.extras_require"])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """What the pages assume to lie in the reader's folder."""
    root = tmp_path_factory.mktemp("reader")
    cells = write_voc_tree(root / "path/to/cells", classes=("RBC", "WBC", "Platelets"))
    (cells / "ImageSets/Main/train.txt").rename(cells / "ImageSets/Main/trainval.txt")
    voc = write_voc_tree(root / "datasets/VOC2007", classes=("car", "dog"))
    (voc / "ImageSets/Main/train.txt").rename(voc / "ImageSets/Main/trainval.txt")
    pictures = write_image_folder(root / "path/to/cifar10")
    (root / "path/to/imagenet").symlink_to(pictures)
    for place in (root / "path/to/BCCD", root / "datasets/BCCD"):
        place.symlink_to(cells)
    (root / "path/to/photographs").mkdir()
    for index, name in enumerate(("a.jpg", "b.jpg", "path/to/photographs/c.jpg")):
        picture = sorted((cells / "JPEGImages").iterdir())[index]
        with Image.open(picture) as image:
            image.save(root / name)
    (root / "photographs").symlink_to("path/to/photographs")
    write_bands(root / "path/to/data")
    (root / "hosts").write_text("localhost slots=1\n")
    for name in ("tools", "configs"):
        (root / name).symlink_to(REPO / name)
    (root / "bin").mkdir()
    for name, script in STARTERS.items():
        (root / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (root / "bin" / name).chmod(0o755)
    return root


def write_bands(root):
    """VOC's tree of images with five channels."""
    write_voc_tree(root)
    for path in (root / "JPEGImages").iterdir():
        pixels = np.random.default_rng(0).integers(0, 256, (96, 96, 5), dtype=np.uint8)
        np.save(path.with_suffix(".npy"), pixels)
        path.unlink()
    for path in (root / "Annotations").iterdir():
        path.write_text(path.read_text().replace(".png", ".npy").replace(">3<", ">5<"))


@pytest.fixture
def folder(data, tmp_path):
    """The reader's folder, in which the code of a page runs."""
    for path in data.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


# What starts programs on other machines, here on this one.
STARTERS = {
    "ssh": 'while [ "${1#-}" != "$1" ]; do shift 2; done; shift; exec "$@"',
    "srun": 'exec "$@"',
    "scontrol": "echo 127.0.0.1",
}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1"}


def as_run(script, number):
    """A script with its stand-ins, and its trainings made short; `number` tells it from others."""
    is_general = re.search(r"FILE|\.\.\.$", script, re.M)
    port = free_port()
    for text, stand_in in {**STAND_INS, ":29500": f":{port}", "port 29500": f"port {port}"}.items():
        script = script.replace(text, stand_in)
    script = re.sub(r"^deepspeed ", f"deepspeed --master_port {port} ", script, flags=re.M)
    return "\n".join(shortened(line, number, is_general) for line in script.splitlines())


def shortened(command, number, is_general):
    if re.search(r"pretrain_net|tract-det paper .* --run", command):
        added = [SHORT["classification"]]
    elif re.search(r"train_net|cli train|tract-det compare", command):
        added = [SHORT["detection"]]
    else:
        return command
    if "VGG_16" in command:
        added.append("MODEL.WEIGHTS ''")  # not from the network
    if is_general and "compare" not in command:
        added.append(f"OUTPUT_DIR output/{number}")
    return " ".join([command, *added])


def run(script, folder):
    programs = str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]
    environment = {
        **os.environ, **SLURM, "PATH": os.pathsep.join(programs), "PYTHONPATH": str(REPO),
        "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "DETECTRON2_DATASETS": "datasets",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{script}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def run_page(page, folder, monkeypatch):
    """Runs all of a page, first what is for a shell; returns the scripts as they were run."""
    parts = [*units(page)]
    scripts = [as_run(code, number) for number, (kind, code) in enumerate(parts) if kind == "shell"]
    for script in scripts:
        run(script, folder)
    scope = {}
    monkeypatch.chdir(folder)
    for kind, code in parts:
        if kind == "python":  # may use what a command further below makes
            exec(code, scope)
    return scripts


def assert_left(folder, *patterns):
    for pattern in patterns:
        assert [*folder.glob(pattern)], pattern


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if p != "README.md" and [*units(p)]])
def test_the_code_of_a_page_runs(page, folder, monkeypatch):
    run_page(page, folder, monkeypatch)
    if page == "docs/index.md":
        left = folder / "output/compare/BCCD-Detection/faster_rcnn_R_18_FPN"
        assert_left(left, *(f"comparison.{suffix}" for suffix in ("html", "md", "png", "json")))


@pytest.mark.slow
def test_the_code_of_the_readme_runs_and_leaves_what_it_says(folder, monkeypatch):
    scripts = run_page("README.md", folder, monkeypatch)
    (cells,) = (script for script in scripts if "OUTPUT_DIR output/cells" in script)
    (evaluate,) = (script for script in scripts if "tools/evaluate_voc.py" in script)
    # The rows that complete a command.
    run(cells.replace("--arm tract", "--arm tract --resume") + " SOLVER.MAX_ITER 3", folder)
    run(evaluate + " --against output/cells/detections", folder)
    run(cells.replace("--arm tract", "--arm tract --overwrite"), folder)
    output = folder / "output"
    weights = "model_final.pth", "model_best.pth"
    assert_left(
        output / "quickstart/shapes/tract", *weights, "results.json", "detections.png",
        "report.html", "metrics.jsonl", "events.out.tfevents.*",
    )  # fmt: skip
    assert_left(output / "cells", *weights, "previous-1/model_final.pth")
    assert_left(folder, "evaluated.json", "cells.onnx", "cells.pt", "converted.pth")
    assert_left(folder, "found/images/c.jpg", "found/coco.json")
    assert_left(folder, "checked/voc/c.xml", "checked/comp4/comp4_det_test_RBC.txt")
    assert_left(output / "CIFAR/cpu_small/tract", *weights, "results.json", "classes.json")
    assert_left(output / "BCCD-Detection/faster_rcnn_R_18_FPN/tract", "weights_report.json")
