"""Runs of the trainers for tests: in this process, in one of its own, or on two ranks.

A process of its own takes ten seconds to import torch and DeepSpeed, so only what needs one has it:
signals, launchers, the tools' command lines. Two ranks are launched once and serve many cases.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from tests.conftest import REPO, run_python
from tract_det.cli import call

LAUNCHERS = {
    "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_gpus", 2, "--master_port"],
    "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port"],
}
SERVER = REPO / "tests/training/serve_ranks.py"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_here(verb, *arguments):
    """Runs a verb in this process to its end; returns what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = call(verb, [str(argument) for argument in arguments])
    assert code == 0, printed.getvalue()
    return printed.getvalue()


def run_apart(tool, *arguments, launcher=None, ranks=2):
    """Runs a tool in a process of its own, or in several; returns what it printed."""
    launch = []
    if launcher:
        launch = [*LAUNCHERS[launcher], free_port()]
        launch[launch.index(2)] = ranks
    done = run_python(*launch, tool, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def interrupt(tool, *arguments, at, number, launcher=None):
    """Sends a signal to a run, and its launcher, once it prints `at`; returns output and code."""
    launch = [*LAUNCHERS[launcher], free_port()] if launcher else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    process = subprocess.Popen(
        [sys.executable, *map(str, [*launch, tool, *arguments])],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=REPO,
        start_new_session=True,
    )  # fmt: skip
    printed = ""
    for line in process.stdout:
        printed += line
        if at in line:
            os.killpg(process.pid, number)
    return printed, process.wait()


class TwoRanks:
    """Two ranks under the deepspeed launcher, which run one case after another."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cases = folder, 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, *LAUNCHERS["deepspeed"], free_port(), SERVER, folder]
        self.log = (folder / "log.txt").open("w")
        self.process = subprocess.Popen(
            [*map(str, command)], stdout=self.log, stderr=subprocess.STDOUT, env=environment,
            cwd=REPO, start_new_session=True,
        )  # fmt: skip

    def run(self, verb, *arguments):
        """Runs a verb on both ranks; returns what they printed."""
        start = (self.folder / "log.txt").stat().st_size
        done = [self.folder / f"{self.cases}.{rank}.done" for rank in (0, 1)]
        self._send({"verb": verb, "arguments": [*map(str, arguments)], "port": free_port()})
        while not all(path.exists() for path in done):
            code = self.process.poll()
            assert code is None, (self.folder / "log.txt").read_text()[start:]
            time.sleep(0.02)
        printed = (self.folder / "log.txt").read_text()[start:]
        assert [path.read_text() for path in done] == ["0", "0"], printed
        return printed

    def _send(self, case) -> None:
        half = self.folder / "half"
        half.write_text(json.dumps(case))
        half.rename(self.folder / f"{self.cases}.json")
        self.cases += 1

    def close(self) -> None:
        """Ends the ranks."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()
        shutil.rmtree(self.folder)


def weights(output, name="model_final.pth"):
    return torch.load(output / name, weights_only=True)["model"]


def results(output):
    return json.loads((output / "results.json").read_text())


def samples(output):
    """The bytes of the figures in samples of the images, by name."""
    with np.load(output / "samples.npz") as content:
        return {name: content[name].tobytes() for name in content.files}


def log(output, key="loss"):
    """The values of a figure in `metrics.jsonl`, by step."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["iteration"]: line[key] for line in lines if key in line}


def assert_same_bits(a, b, names=("model_final.pth",)):
    for name in names:
        first, second = weights(a, name), weights(b, name)
        assert first.keys() == second.keys()
        assert all(torch.equal(value, second[key]) for key, value in first.items()), name


def assert_close(a, b, tolerance=1e-5, names=("model_final.pth",)):
    """The weights of two runs are equal but for rounding, and so are their losses."""
    for name in names:
        expected = weights(b, name)
        for key, value in weights(a, name).items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=tolerance)
    assert log(a).keys() == log(b).keys()
    for step, loss in log(a).items():
        assert abs(loss - log(b)[step]) <= tolerance * abs(log(b)[step])
