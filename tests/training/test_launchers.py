"""What becomes of a run whose launcher, or one of whose ranks, is gone."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import REPO, tiny_options
from tests.training.runs import (
    LAUNCHERS,
    assert_close,
    free_port,
    log,
    results,
    run_apart,
    run_here,
)

TRAIN = REPO / "tools/train_net.py"
pytestmark = pytest.mark.slow

LONG = {
    "SOLVER__MAX_ITER": 2000, "LOG_PERIOD": 1, "DATALOADER__NUM_WORKERS": 1,
    "SOLVER__CHECKPOINT_PERIOD": 3,
}  # fmt: skip


class Launched:
    """A run under a launcher, or a machine's part of one, which the test does not wait for."""

    def __init__(self, launch, *arguments):
        command = [sys.executable, *launch, TRAIN, *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        self.process = subprocess.Popen(
            [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=environment, cwd=REPO, start_new_session=True,
        )  # fmt: skip
        self.printed = ""

    def read_until(self, text):
        for line in self.process.stdout:
            self.printed += line
            if text in line:
                return
        raise AssertionError(self.printed)

    def end(self):
        """What is printed until the last of all processes is gone, and the launcher's code."""
        began = time.monotonic()
        self.printed += self.process.stdout.read()
        code = self.process.wait()
        assert time.monotonic() - began < 60, self.printed
        return self.printed, code

    def children(self, parent=None):
        """The processes that the launcher, or another process, has started."""
        parent = str(parent or self.process.pid)
        task = Path(f"/proc/{parent}/task/{parent}/children")
        return [int(child) for child in task.read_text().split()]

    def rank(self, rank):
        """The process of a rank."""
        generation = [self.process.pid]
        while generation := [child for parent in generation for child in self.children(parent)]:
            for process in generation:
                if f"RANK={rank}".encode() in Path(f"/proc/{process}/environ").read_bytes().split(
                    b"\0"
                ):
                    return process
        raise AssertionError(f"no process of rank {rank}: {self.printed}")


def two_ranks(launcher):
    return [*LAUNCHERS[launcher], free_port()]


def of_rank_0_first(machines):
    """Two machines that have agreed among themselves which is which."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for order in (machines, machines[::-1]):
            with contextlib.suppress(AssertionError, OSError):
                order[0].rank(0)
                return order
        time.sleep(0.1)
    raise AssertionError("no machine has rank 0")


def two_machines(rendezvous):
    """What is started on each of two machines: one of `torchrun`'s agents, with one rank."""
    agent = ["-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1]
    port = free_port()
    if rendezvous == "agreed":
        meeting = ["--rdzv-id", "run", "--rdzv-backend", "c10d"]
        return [[*agent, *meeting, "--rdzv-endpoint", f"127.0.0.1:{port}"]] * 2
    master = ["--master-addr", "127.0.0.1", "--master-port", port]
    return [[*agent, *master, "--node-rank", number] for number in range(2)]


@pytest.mark.parametrize(
    ("launcher", "depth", "number"),
    [
        ("deepspeed", 0, signal.SIGTERM),
        ("deepspeed", 0, signal.SIGKILL),
        ("deepspeed", 1, signal.SIGTERM),
        ("deepspeed", 1, signal.SIGKILL),
        ("torchrun", 0, signal.SIGTERM),
        ("torchrun", 0, signal.SIGKILL),
    ],
)
def test_ranks_whose_launcher_gets_a_signal_save_and_stop(
    voc_tree, tmp_path, launcher, depth, number
):
    """`depth` 1 is the process between `deepspeed` and its ranks."""
    run = Launched(two_ranks(launcher), *tiny_options(voc_tree, tmp_path, **LONG))
    run.read_until("step 2/2000")
    target = run.process.pid if depth == 0 else run.children()[0]
    os.kill(target, number)
    printed, code = run.end()
    # For a launcher that was killed in between, `deepspeed` itself ends with 0.
    assert code != 0 or (depth, number) == (1, signal.SIGKILL)
    assert "the checkpoint is saved, go on with --resume" in printed, printed
    stopped = int(printed.split("stopped after step ")[1].split(":")[0])
    assert (tmp_path / "last_checkpoint").read_text() == f"iter_{stopped:07d}\n"


def test_ranks_go_on_when_the_shell_that_started_their_launcher_has_ended(voc_tree, tmp_path):
    options = tiny_options(voc_tree, tmp_path, SOLVER__MAX_ITER=8)
    command = [sys.executable, *LAUNCHERS["deepspeed"], free_port(), TRAIN, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with (tmp_path / "log").open("w") as file:
        shell = subprocess.Popen(
            ["/bin/sh", "-c", 'nohup "$@" & read line', "sh", *map(str, command)],
            stdin=subprocess.PIPE, stdout=file, stderr=file, env=environment, cwd=REPO,
            start_new_session=True,
            # Under nohup the tests themselves ignore it, and their children would inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # noqa: PLW1509
        )  # fmt: skip

    def wait_for(text):
        deadline = time.monotonic() + 120
        while text not in (printed := (tmp_path / "log").read_text()):
            assert time.monotonic() < deadline, printed
            time.sleep(0.1)

    wait_for("step 2/8")
    os.killpg(shell.pid, signal.SIGHUP)  # as when a terminal closes
    shell.wait()
    wait_for("detections.png")
    assert sorted(log(tmp_path)) == list(range(1, 9))


@pytest.mark.parametrize(
    ("launcher", "lost", "moment"),
    [
        ("deepspeed", 1, "loading"),
        ("deepspeed", 1, "step"),
        ("deepspeed", 0, "step"),
        ("deepspeed", 1, "evaluation"),
        ("deepspeed", 0, "evaluation"),
        ("deepspeed", 1, "save"),
        ("torchrun", 1, "step"),
        ("torchrun", 0, "evaluation"),
    ],
)
def test_the_ranks_end_in_a_line_that_names_the_one_that_is_lost(
    voc_tree, tmp_path, launcher, lost, moment
):
    changes = LONG | ({"TEST__EVAL_PERIOD": 3} if moment == "evaluation" else {})
    run = Launched(two_ranks(launcher), *tiny_options(voc_tree, tmp_path / "run", **changes))
    if moment == "loading":
        while not (tmp_path / "run").is_dir():
            time.sleep(0.01)
        time.sleep(0.7)  # in the middle of it: at its very start the launcher may be faster to tell
    elif moment == "save":
        while not (tmp_path / "run/checkpoints").is_dir():
            time.sleep(0.001)
    else:
        run.read_until("step 3/2000" if moment == "evaluation" else "step 2/2000")
    os.kill(run.rank(lost), signal.SIGKILL)
    printed, code = run.end()
    assert code != 0
    assert printed.count(" is lost") == 1, printed
    (line,) = (line for line in printed.splitlines() if " is lost" in line)
    assert line.startswith(f"[rank {1 - lost}] error: rank {lost} is lost: ")
    assert line.endswith("go on with --resume")
    assert "Connection closed by peer" not in printed, printed
    if moment == "step":
        changes["SOLVER__MAX_ITER"] = 3
        with_checkpoint = (tmp_path / "run/last_checkpoint").is_file()
        resume = ["--resume"] if with_checkpoint else []
        run_apart(TRAIN, *resume, *tiny_options(voc_tree, tmp_path / "run", **changes))


@pytest.mark.parametrize("rendezvous", ["numbered", "agreed"])
def test_two_machines_make_the_updates_and_results_of_one_process(voc_tree, tmp_path, rendezvous):
    changes = {"SOLVER__MAX_ITER": 2, "MODEL__TRACT__ENABLED": True, "LOG_PERIOD": 1}
    options = tiny_options(voc_tree, tmp_path / "two", **changes)
    machines = [Launched(launch, *options) for launch in two_machines(rendezvous)]
    for machine in machines:
        printed = machine.process.stdout.read()
        assert machine.process.wait() == 0, printed
    run_here("train", *tiny_options(voc_tree, tmp_path / "one", **changes))
    assert_close(tmp_path / "two", tmp_path / "one")
    assert results(tmp_path / "two") == results(tmp_path / "one")


@pytest.mark.parametrize("rendezvous", ["numbered", "agreed"])
def test_a_run_whose_second_machine_is_lost_ends_and_goes_on_with_the_first_alone(
    voc_tree, tmp_path, rendezvous
):
    options = tiny_options(voc_tree, tmp_path / "run", **LONG)
    machines = [Launched(launch, *options) for launch in two_machines(rendezvous)]
    left, lost = of_rank_0_first(machines)
    left.read_until("step 4/2000")
    for process in (lost.process.pid, lost.rank(1)):
        os.kill(process, signal.SIGKILL)
    lost.end()
    printed, code = left.end()
    assert code != 0
    (line,) = (line for line in printed.splitlines() if " is lost" in line)
    assert line.startswith("[rank 0] error: rank 1 is lost: "), printed
    saved = int((tmp_path / "run/last_checkpoint").read_text().removeprefix("iter_"))
    changes = LONG | {"SOLVER__MAX_ITER": saved + 2}
    options = tiny_options(voc_tree, tmp_path / "run", **changes)
    assert f"at step {saved}" in run_here("train", "--resume", *options)
    assert sorted(log(tmp_path / "run")) == list(range(1, saved + 3))
