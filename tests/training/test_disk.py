"""Runs on a small disk of their own, which fills up while they go on."""

import contextlib
import os
import shutil
import subprocess
import threading
import time

import pytest

from tests.conftest import tiny_options
from tests.training.runs import assert_same_bits, log, results, run_here
from tract_det.cli import call
from tract_det.errors import UserError

pytestmark = pytest.mark.slow

MEBIBYTE = 2**20


@contextlib.contextmanager
def disk(folder, mebibytes):
    """A file system of this size; needs the rights to mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no rights to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(folder, path, left):
    """Fills the disk but for so many bytes, once the file is there."""
    while not path.exists():
        time.sleep(0.01)
    with (folder / "filler").open("wb") as file:
        while (more := shutil.disk_usage(folder).free - left) > 0:
            with contextlib.suppress(OSError):  # the run wrote something in the meantime
                os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, more)


def test_a_run_that_does_not_fit_is_refused_before_its_first_step(voc_tree, tmp_path):
    with disk(tmp_path / "disk", 64) as folder:
        message = (
            r"disk/run has 6\d\.\d MiB free, but checkpoints and weights of this run take "
            r"\d+\.\d MiB, \d+\.\d MiB more: free some space, or set OUTPUT_DIR"
        )
        with pytest.raises(UserError, match=message):
            call("train", tiny_options(voc_tree, folder / "run", SOLVER__CHECKPOINT_PERIOD=1))
        assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("left", "period", "message"),
    [
        # Some lines still go into blocks that the files have; TensorBoard's is full at first.
        # Between two checkpoints are steps enough for the disk to be full before the second.
        (
            0,
            14,
            r"run(/metrics.jsonl)? cannot be written: No space left on device: free some space",
        ),
        (MEBIBYTE, 6, r"run has .* MiB free, but the checkpoint of step 12 takes .* MiB"),
    ],
    ids=["figures", "checkpoint"],
)
def test_a_disk_that_fills_up_ends_a_run_in_a_line_and_it_can_go_on(
    voc_tree, tmp_path, left, period, message
):
    changes = {"SOLVER__MAX_ITER": 2 * period, "SOLVER__CHECKPOINT_PERIOD": period}
    with disk(tmp_path / "disk", 1024) as folder:
        arguments = tiny_options(voc_tree, folder / "run", **changes)
        pointer = folder / "run/last_checkpoint"
        filling = threading.Thread(target=fill, args=(folder, pointer, left), daemon=True)
        filling.start()
        with pytest.raises(UserError, match=message) as error:
            call("train", arguments)
        filling.join()
        assert str(error.value).rstrip(")").endswith("go on with --resume")
        assert not list((folder / "run").glob(".*"))
        (folder / "filler").unlink()
        run_here("train", "--resume", *arguments)
        run_here("train", *tiny_options(voc_tree, tmp_path / "whole", **changes))
        assert_same_bits(folder / "run", tmp_path / "whole")
        assert log(folder / "run") == log(tmp_path / "whole")
        assert results(folder / "run") == results(tmp_path / "whole")
