"""Jobs beside each other: their shares of the machine, their order, signals and the lock."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from tests.conftest import REPO
from tract_det.engine.jobs import Job, run_jobs, shares, sole_use, threads_of_each, visible_gpus
from tract_det.errors import UserError


def job(folder, name, code):
    return Job(name, [sys.executable, "-c", textwrap.dedent(code)], folder / name / "log.txt")


def run_all(folder, jobs, environments):
    ended = []
    with sole_use(folder) as lock:
        code = run_jobs(jobs, environments, lock=lock, on_end=ended.append)
    return code, {end.job.name: end.code for end in ended}


def test_every_job_runs_once_and_its_exit_code_and_output_are_kept(tmp_path):
    jobs = [job(tmp_path, str(i), f"print('job', {i}); raise SystemExit({i})") for i in range(3)]
    code, ended = run_all(tmp_path, jobs, [{}, {}])
    assert code == 0 and ended == {"0": 0, "1": 1, "2": 2}
    assert (tmp_path / "2" / "log.txt").read_text() == "job 2\n"


def test_a_second_run_appends_to_the_log(tmp_path):
    for _ in range(2):
        run_all(tmp_path, [job(tmp_path, "a", "print('x')")], [{}])
    assert (tmp_path / "a" / "log.txt").read_text() == "x\nx\n"


def test_no_more_jobs_run_beside_each_other_than_there_are_shares(tmp_path):
    code = f"""
        import os, time
        path = {str(tmp_path)!r} + "/running-" + os.environ["SHARE"]
        open(path, "x").close()  # refused if another job has this share
        time.sleep(0.2)
        os.remove(path)
    """
    jobs = [job(tmp_path, str(i), code) for i in range(5)]
    _, ended = run_all(tmp_path, jobs, [{"SHARE": "a"}, {"SHARE": "b"}])
    assert set(ended.values()) == {0} and len(ended) == 5


def test_each_job_gets_a_gpu_or_a_part_of_the_cpu():
    assert shares(3, ["4", "7"], 8) == [
        {"CUDA_VISIBLE_DEVICES": "4"}, {"CUDA_VISIBLE_DEVICES": "7"}, {"CUDA_VISIBLE_DEVICES": "4"},
    ]  # fmt: skip
    assert shares(2, [], 4) == [{"OMP_NUM_THREADS": "4"}] * 2


@pytest.mark.parametrize(
    ("variable", "jobs", "cores", "threads"),
    [(None, 2, 8, 4), (None, 4, 2, 1), ("3", 2, 8, 3), ("", 2, 8, 4), ("4,2", 2, 8, 4)],
)
def test_a_users_own_number_of_threads_goes_before_an_equal_part(
    monkeypatch, variable, jobs, cores, threads
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert threads_of_each(jobs, cores) == threads


def test_only_gpus_that_this_process_may_use_are_shared(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5")
    assert visible_gpus(2) == ["2", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus(3) == ["0", "1", "2"]
    assert visible_gpus(0) == []


def test_a_folder_has_one_user_at_a_time(tmp_path):
    with sole_use(tmp_path), pytest.raises(UserError, match="in use by another process"):
        sole_use(tmp_path).__enter__()
    with sole_use(tmp_path):
        pass


PROGRAM = """
import sys
from pathlib import Path
from tract_det.engine.jobs import Job, run_jobs, sole_use
folder = Path(sys.argv[1])
code = '''
import os, signal, sys, time
def save(*_):
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
print("ready", os.getpid(), flush=True)
time.sleep(60)
'''
jobs = [Job(n, [sys.executable, "-c", code], folder / f"{n}.log") for n in ("a", "b")]
with sole_use(folder) as lock:
    print("code", run_jobs(jobs, [{}], lock=lock, on_end=lambda end: print("ended", end.code)))
"""


@contextlib.contextmanager
def program(folder):
    """`PROGRAM` with its first job ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder)], cwd=REPO, stdout=subprocess.PIPE, text=True
    )
    try:
        while not ((folder / "a.log").is_file() and (folder / "a.log").read_text().endswith("\n")):
            assert process.poll() is None
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_signal_lets_the_running_job_save_and_starts_no_other(tmp_path):
    with program(tmp_path) as process:
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=30)
    assert printed == f"ended 143\ncode {int(signal.SIGINT)}\n"
    assert (tmp_path / "a.log").read_text().endswith("\nsaved\n")
    assert not (tmp_path / "b.log").exists()


def test_the_lock_is_held_until_the_last_job_of_a_killed_program_is_gone(tmp_path):
    with program(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        with pytest.raises(UserError, match="the runs that it left"):
            sole_use(tmp_path).__enter__()
        orphan = (tmp_path / "a.log").read_text().split()[1]
        os.kill(int(orphan), signal.SIGTERM)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with contextlib.suppress(UserError), sole_use(tmp_path):
                return
            time.sleep(0.05)
    raise AssertionError("the lock was never free")


def test_the_jobs_of_a_killed_program_are_waited_for_where_asked(tmp_path, capsys):
    with program(tmp_path) as process:
        with pytest.raises(UserError, match="in use"):  # it lives
            sole_use(tmp_path, waits_for_orphans=True).__enter__()
        process.kill()
        process.wait()
        orphan = (tmp_path / "a.log").read_text().split()[1]
        stopper = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -TERM {orphan}"])
        with sole_use(tmp_path, waits_for_orphans=True):
            assert (tmp_path / "a.log").read_text().endswith("saved\n")
        stopper.wait()
    assert "waiting for the runs that a killed process left" in capsys.readouterr().out


def test_an_error_leaves_no_job_running(tmp_path):
    wait = f"""
        import signal, sys, time
        signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(143)))
        open({str(tmp_path / "ready")!r}, "w").close()
        time.sleep(60)
    """
    end = f"""
        import os, time
        while not os.path.exists({str(tmp_path / "ready")!r}): time.sleep(0.05)
    """

    def fail(ended):
        raise UserError(ended.job.name)

    jobs = [job(tmp_path, "waits", wait), job(tmp_path, "ends", end)]
    with sole_use(tmp_path) as lock, pytest.raises(UserError, match="ends"):
        run_jobs(jobs, [{}, {}], lock=lock, on_end=fail)
    assert (tmp_path / "waits/log.txt").read_text() == "saved\n"


def test_a_lock_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / ".lock").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"\.lock cannot be written"), sole_use(tmp_path):
        pass
