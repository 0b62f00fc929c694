"""Ranks that lose another rank or their launcher, in processes of their own."""

import json
import signal
import subprocess
import sys

import pytest

from tests.conftest import REPO

# Forks three ranks for each case, and prints the exit code and the output of each.
PROGRAM = r"""
import json, os, signal, sys, tempfile, time
import torch.distributed as dist
from tests.training.runs import free_port
from tract_det.engine import watch
from tract_det.engine.watch import watched
from tract_det.errors import UserError

class Diverged(UserError):
    exit_code = 3

def wait_in_a_collective():
    dist.barrier()

def work_alone():
    time.sleep(300)

def kill_myself():
    os.kill(os.getpid(), signal.SIGKILL)

def leave_without_a_word():
    os._exit(0)

def fail():
    raise Diverged("a loss is not finite")

def crash():
    raise RuntimeError("a bug")

def finish():
    pass

def wait_a_little():
    time.sleep(3)

CASES = {
    "killed, collective": [wait_in_a_collective, kill_myself, wait_in_a_collective],
    "killed, alone": [work_alone, kill_myself, work_alone],
    "hub killed": [kill_myself, wait_in_a_collective, work_alone],
    "left": [work_alone, leave_without_a_word, work_alone],
    "error": [wait_in_a_collective, fail, work_alone],
    "error of all": [fail, fail, fail],
    "crash": [crash, work_alone, wait_in_a_collective],
    "done": [finish, finish, finish],
    "unreachable": [finish, finish, wait_a_little],
}

def rank_of(case, rank, port, output):
    os.dup2(output, 1), os.dup2(output, 2)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank))
    os.environ.update(WORLD_SIZE="3", LOCAL_RANK=str(rank))
    dist.init_process_group("gloo")
    if case == "unreachable":
        watch._CONNECT_SECONDS = 2
        if rank == 1:
            os.environ["MASTER_ADDR"] = "255.255.255.255"
    code = 0
    try:
        with watched("go on with --resume"):
            dist.barrier()
            CASES[case][rank]()
    except UserError as error:
        os.write(2, f"error: {error}\n".encode())
        code = error.exit_code
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        code = 1
    os._exit(code)

def main():
    processes = []
    for case in CASES:
        port = free_port()
        for rank in range(3):
            output = tempfile.TemporaryFile()
            process = os.fork()
            if process == 0:
                rank_of(case, rank, port, output.fileno())
            processes.append((case, process, output))
    results = {case: [] for case in CASES}
    for case, process, output in processes:
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        output.seek(0)
        results[case].append([code, output.read().decode()])
    print(json.dumps(results))

main()
"""


@pytest.fixture(scope="module")
def ended():
    """The exit code and the output of every rank, by case."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=REPO, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("case", "lost"),
    [("killed, collective", 1), ("killed, alone", 1), ("hub killed", 0), ("left", 1)],
)
def test_a_lost_rank_ends_the_others_in_a_line_that_names_it(ended, case, lost):
    lost_code, _ = ended[case].pop(lost)
    assert lost_code == (0 if case == "left" else -signal.SIGKILL)
    ranks = [rank for rank in range(3) if rank != lost]
    for rank, (code, printed) in zip(ranks, ended[case], strict=True):
        assert code == 1
        assert printed == (
            f"[rank {rank}] error: rank {lost} is lost: it was killed, or its machine is down; "
            "go on with --resume\n"
        )


def test_an_error_is_printed_by_the_rank_that_has_it_and_its_exit_code_is_that_of_all(ended):
    assert ended["error"] == [[3, ""], [3, "error: a loss is not finite\n"], [3, ""]]


def test_ranks_with_the_same_error_all_print_it(ended):
    assert ended["error of all"] == [[3, "error: a loss is not finite\n"]] * 3


def test_a_bug_in_one_rank_shows_in_that_rank_alone(ended):
    assert ended["crash"] == [[1, "RuntimeError: a bug\n"], [1, ""], [1, ""]]


def test_ranks_that_end_in_order_are_not_missed(ended):
    assert ended["done"] == [[0, ""]] * 3


def test_a_rank_that_has_no_connection_is_a_warning_and_is_not_taken_for_lost(ended):
    assert [code for code, _ in ended["unreachable"]] == [0, 0, 0]
    hub, unreachable, other = (printed for _, printed in ended["unreachable"])
    assert "warning: rank 0 is not told when another one is lost: 1 of them have not" in hub
    assert "warning: rank 1 is not told when another one is lost: " in unreachable
    assert other == ""


# Its command line ends with that of the rank which it starts, as a launcher's does.
LAUNCHER = [sys.executable, "-c", "import subprocess, sys; subprocess.run(sys.argv[1:])"]
# Its own does not.
SHELL = ["/bin/sh", "-c", '"$@"; :', "sh"]
RANK = """
import os, signal, time
from tract_det.engine.watch import watched
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), os._exit(0)))
with watched(""):
    print("ready", flush=True)
    time.sleep(5)
print("not stopped", flush=True)
"""


@pytest.mark.slow
def test_a_rank_stops_when_its_launcher_is_gone_and_only_then(tmp_path):
    program = tmp_path / "rank.py"
    program.write_text(RANK)
    paths = {"PATH": "/bin:/usr/bin", "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    cases = [  # and what the process that is left prints at last
        (LAUNCHER, {"RANK": "0"}, "saved"),
        (SHELL, {"RANK": "0"}, "not stopped"),
        (LAUNCHER, {}, "not stopped"),  # a process that no launcher of ranks has started
    ]
    parents = [
        subprocess.Popen(
            [*command, sys.executable, program, "--key", "value"],
            text=True, cwd=REPO, stdout=subprocess.PIPE, env=paths | environment,
        )
        for command, environment, _ in cases
    ]  # fmt: skip
    for parent in parents:
        assert parent.stdout.readline() == "ready\n"
        parent.kill()
    assert [p.communicate()[0] for p in parents] == [f"{last}\n" for *_, last in cases]
