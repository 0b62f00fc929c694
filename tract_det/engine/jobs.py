"""Runs commands beside each other, each with its share of the machine, and stops them in order."""

import fcntl
import os
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tract_det.engine.loop import StopSignal
from tract_det.errors import UserError
from tract_det.files import cannot_write, is_running, make_folder

_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Job:
    """A command to run.

    Attributes:
        name: for messages.
        command: program and arguments.
        log: the file that its output is appended to.
    """

    name: str
    command: Sequence[str]
    log: Path


@dataclass(frozen=True)
class Ended:
    """A job that has ended.

    Attributes:
        job: the job.
        code: its exit code; negative for a signal that it did not catch.
        seconds: its wall time.
    """

    job: Job
    code: int
    seconds: float


def threads_of_each(jobs: int, cores: int) -> int:
    """Threads on the CPU of each of so many jobs: a user's own OMP_NUM_THREADS, or an equal part.

    More threads than free cores are many times slower, since they wait for each other in a loop;
    only the user knows what else the machine does.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdecimal() and int(wanted) else max(1, cores // jobs)


def shares(jobs: int, gpus: Sequence[str], threads: int) -> list[dict[str, str]]:
    """The environment of each of so many jobs beside each other.

    Args:
        jobs: number of jobs.
        gpus: those that may be used, as in CUDA_VISIBLE_DEVICES. A job gets one of them.
        threads: of a job, where there are no GPUs.
    """
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(jobs)]
    return [{"OMP_NUM_THREADS": str(threads)}] * jobs


def visible_gpus(count: int) -> list[str]:
    """The GPUs that this process may use, by their names in CUDA_VISIBLE_DEVICES.

    Args:
        count: how many torch sees.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in visible.split(",") if name.strip()]
    return names[:count] if names else [str(i) for i in range(count)]


@contextmanager
def sole_use(folder: Path, *, waits_for_orphans: bool = False) -> Iterator[IO[str]]:
    """Holds the folder's lock, which the jobs inherit: it is free when the last of them is gone.

    Args:
        folder: is made if need be.
        waits_for_orphans: if jobs of a process that was killed hold it, wait until they have ended.

    Raises:
        UserError: another process holds it, or the folder cannot be written into.
    """
    make_folder(folder)
    path = folder / ".lock"
    try:
        file = path.open("a+")
    except OSError as error:
        raise cannot_write(path, error) from error
    with file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not (waits_for_orphans and _was_killed(path.read_text())):
                raise UserError(
                    f"{folder} is in use by another process: wait for it, or for the runs that it "
                    "left behind"
                ) from None
            print(f"waiting for the runs that a killed process left in {folder}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            lock.truncate(0)
            lock.write(f"{os.getpid()} {socket.gethostname()}")
            lock.flush()
        except OSError as error:
            raise cannot_write(path, error) from error
        try:
            yield lock
        finally:
            lock.truncate(0)


def _was_killed(owner: str) -> bool:
    """Whether the process that wrote itself into a lock has been killed, on this machine."""
    process, _, host = owner.partition(" ")
    is_here = process.isdecimal() and host == socket.gethostname()
    return is_here and not is_running(int(process))


def run_jobs(
    jobs: Sequence[Job],
    environments: Sequence[Mapping[str, str]],
    *,
    lock: IO[str],
    on_end: Callable[[Ended], None],
) -> int:
    """Runs jobs to their end, as many beside each other as there are environments.

    SIGINT and SIGTERM are passed on to the jobs as SIGTERM, which trainers answer by a checkpoint.
    No further job starts then.

    Args:
        jobs: started in this order.
        environments: variables that a job gets beside those of this process.
        lock: as `sole_use` yields it.
        on_end: called for each job that has ended.

    Returns:
        0, or the number of the signal that stopped the jobs.

    Raises:
        UserError: a log cannot be written. After this and any other error no job is left running.
    """
    waiting, free = deque(jobs), deque(environments)
    running: list[tuple[_Process, Mapping[str, str]]] = []
    passed_on = False
    with StopSignal() as stop:
        try:
            while running or (waiting and not stop.number):
                while waiting and free and not stop.number:
                    environment = free.popleft()
                    running.append((_Process(waiting.popleft(), environment, lock), environment))
                if stop.number and not passed_on:
                    passed_on = True
                    for process, _ in running:
                        process.stop()
                ended = [pair for pair in running if pair[0].has_ended()]
                for process, environment in ended:
                    running.remove((process, environment))
                    free.append(environment)
                    on_end(process.result())
                if not ended:
                    time.sleep(_POLL_SECONDS)
        except Exception:  # such as a full disk: nobody would wait for the others
            for process, _ in running:
                process.stop()
            for process, _ in running:
                process.result()
            raise
    return stop.number


class _Process:
    """A job that runs, in a session of its own, so that Ctrl-C reaches it through `stop` alone."""

    def __init__(self, job: Job, environment: Mapping[str, str], lock: IO[str]) -> None:
        self.job, self.began = job, time.monotonic()
        make_folder(job.log.parent)
        try:
            file = job.log.open("a")
        except OSError as error:
            raise cannot_write(job.log, error) from error
        with file as log:
            self.process = subprocess.Popen(
                job.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
                pass_fds=[lock.fileno()],
            )

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def result(self) -> Ended:
        return Ended(self.job, self.process.wait(), time.monotonic() - self.began)
