"""The README's lines in detectron2's own programs: they train, resume and evaluate.

The programs are those of detectron2's source, which lies beside the package in an editable install;
elsewhere $DETECTRON2_SOURCE names it.
"""

import json
import os
import re
from pathlib import Path

import detectron2
import pytest

from tests.conftest import run_python, write_voc_tree
from tests.pages import python_blocks
from tract_det.d2 import config_file

SOURCE = Path(os.environ.get("DETECTRON2_SOURCE") or Path(detectron2.__file__).parents[1])
REASON = f"no tools/plain_train_net.py in {SOURCE}: set DETECTRON2_SOURCE to detectron2's checkout"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (SOURCE / "tools/plain_train_net.py").is_file(), reason=REASON),
]

TOP, IN_SETUP, EVALUATORS, LAZY = (block.code for block in python_blocks("tract_det/d2/README.md"))
SMALL = [
    *("MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 0, "SOLVER.IMS_PER_BATCH", 2),
    *("INPUT.MIN_SIZE_TRAIN", "[96]", "INPUT.MIN_SIZE_TEST", 96, "MODEL.FPN.OUT_CHANNELS", 16),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 32, "SOLVER.CHECKPOINT_PERIOD", 4, "SOLVER.STEPS", "[]"),
    *("TEST.EVAL_PERIOD", 0, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),
]
LAZY_SMALL = [
    *("train.device=cpu", "train.init_checkpoint=''", "dataloader.train.total_batch_size=2"),
    *("dataloader.train.num_workers=0", "dataloader.test.num_workers=0", "train.log_period=1"),
    *("dataloader.train.mapper.augmentations.0.short_edge_length=[64]", "optimizer.lr=0.0001"),
    *("dataloader.test.mapper.augmentations.0.short_edge_length=64", "train.eval_period=0"),
    "train.checkpointer.period=4",
]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A tree like BCCD, with the tags that detectron2's own evaluator cannot do without."""
    root = write_voc_tree(tmp_path_factory.mktemp("d2"), classes=("RBC", "WBC", "Platelets"))
    (root / "ImageSets/Main/train.txt").rename(root / "ImageSets/Main/trainval.txt")
    for xml in (root / "Annotations").iterdir():
        tags = "<pose>Unspecified</pose><truncated>0</truncated><difficult>"
        xml.write_text(xml.read_text().replace("<difficult>", tags))
    return root


def program(name, tree, folder, *, with_evaluator):
    """Their program with the README's lines."""
    text = (SOURCE / "tools" / name).read_text()
    text = text.replace("import logging\n", TOP + "import logging\n", 1)
    line = "    cfg = get_cfg()\n"
    assert text.count(line) == 1
    text = text.replace(line, line + IN_SETUP)
    if with_evaluator:
        text = text.replace(
            '\nif __name__ == "__main__":', f'\n{EVALUATORS}\n\nif __name__ == "__main__":'
        )
    path = folder / name
    path.write_text(text.replace("path/to/BCCD", str(tree)))
    return path


def run(*arguments):
    process = run_python(*arguments)
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout + process.stderr


def iterations(output):
    lines = (output / "metrics.json").read_text().splitlines()
    return [entry["iteration"] for entry in map(json.loads, lines) if "total_loss" in entry]


@pytest.mark.parametrize("with_evaluator", [True, False], ids=["VOCEvaluator", "theirs"])
@pytest.mark.parametrize("name", ["plain_train_net.py", "train_net.py"])
def test_a_program_with_a_cfg_trains_resumes_and_evaluates(name, with_evaluator, tree, tmp_path):
    path = program(name, tree, tmp_path, with_evaluator=with_evaluator)
    config = ["--config-file", config_file("BCCD-Detection/faster_rcnn_R_18_FPN.yaml")]
    output = tmp_path / "out"
    keys = ["MODEL.TRACT.ENABLED", True, *SMALL, "OUTPUT_DIR", output, "SOLVER.MAX_ITER"]
    said = run(path, *config, *keys, 8)
    assert "TrAct on backbone.bottom_up.stem.conv1, lambda 0.1" in said
    said = run(path, "--resume", *config, *keys, 15)  # it writes after six steps
    assert "Starting training from iteration 8" in said and iterations(output)[-1] == 14
    check_evaluation(said, with_evaluator)
    weights = ["MODEL.WEIGHTS", output / "model_final.pth"]
    check_evaluation(run(path, "--eval-only", *config, *keys, 15, *weights), with_evaluator)


def check_evaluation(said, with_evaluator):
    if with_evaluator:
        assert "VOC AP in per cent, devkit rule, 5 images" in said
        assert re.search(r"\nRBC +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+\n", said)
    assert re.search(r"copypaste: " + ("Task: voc_07" if with_evaluator else "Task: bbox"), said)


def test_the_lazy_program_trains_resumes_and_evaluates(tree, tmp_path):
    (tmp_path / "bccd.py").write_text(LAZY.replace("path/to/BCCD", str(tree)))
    path, output = SOURCE / "tools/lazyconfig_train_net.py", tmp_path / "out"
    config = ["--config-file", tmp_path / "bccd.py"]
    keys = [*LAZY_SMALL, f"train.output_dir={output}"]
    said = run(path, *config, *keys, "train.max_iter=4")
    assert "TrAct on backbone.bottom_up.stem.conv1, lambda 0.1" in said
    said = run(path, "--resume", *config, *keys, "train.max_iter=6")
    assert "Starting training from iteration 4" in said
    assert iterations(output) == [0, 1, 2, 3, 4, 5]
    check_evaluation(said, True)
    weights = f"train.init_checkpoint={output / 'model_final.pth'}"
    check_evaluation(run(path, "--eval-only", *config, *keys, weights), True)
