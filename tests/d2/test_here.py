"""Whether detectron2 is there, and what is said where it is not."""

import subprocess
import sys

import pytest

from tests.d2.conftest import REASON


def test_the_other_tests_of_detectron2_run():
    pytest.importorskip("detectron2", reason=REASON)


def test_without_detectron2_the_package_imports_and_d2_says_what_is_missing():
    """A finder that knows no detectron2 stands for a machine without it."""
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
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "tract_det.d2 needs detectron2, which is not installed" in found.stdout
    assert "INSTALL" in found.stdout and found.stdout.count("\n") == 1
