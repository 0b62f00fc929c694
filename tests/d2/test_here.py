"""Whether detectron2 is installed, and the errors if it is not."""

import subprocess
import sys

import pytest

from tests.conftest import run_python
from tests.d2.conftest import REASON


def test_the_other_tests_of_detectron2_run():
    pytest.importorskip("detectron2", reason=REASON)


def test_without_detectron2_the_package_imports_and_d2_says_what_is_missing():
    """An import finder that refuses detectron2 stands for a machine without it."""
    code = """
import sys

class NoDetectron2:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "detectron2":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)

sys.meta_path.insert(0, NoDetectron2())
import tract_det
try:
    import tract_det.d2
except ModuleNotFoundError as error:
    print(error)
"""
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "tract_det.d2 needs detectron2, which is not installed" in process.stdout
    assert "INSTALL" in process.stdout and process.stdout.count("\n") == 1


def test_without_detectron2_the_trainer_says_so_in_one_line(tmp_path):
    (tmp_path / "detectron2.py").write_text(
        "raise ModuleNotFoundError('No module named detectron2', name='detectron2')"
    )
    arguments = ["--config-file", "configs/detectron2/faster_rcnn_R_18_FPN.yaml", "--arm", "tract"]
    process = run_python("tools/train_net.py", *arguments, env={"PYTHONPATH": str(tmp_path)})
    assert process.returncode == 1
    expected = "error: MODEL.DETECTRON2.CONFIG_FILE: tract_det.d2 needs detectron2, which is not"
    assert process.stderr.startswith(expected) and process.stderr.count("\n") == 1
