"""A process with limits for readers of damaged files: a crash or a hang ends it alone."""

import os
import resource
import subprocess
import sys
from pathlib import Path

from tests.conftest import REPO

SECONDS = 5  # that a case may take
MEMORY = 2**30  # bytes that reading may add


def assert_survives(module, kind, folder):
    """Runs one kind of a module's cases in a process of its own, which says where it is."""
    command = [sys.executable, "-W", "ignore", "-m", f"tests.fuzz.{module}", kind, folder]
    done = subprocess.run(
        [*map(str, command)], cwd=REPO, capture_output=True, text=True, check=False
    )
    last = done.stdout[-200:].splitlines()[-1:]
    assert done.returncode == 0, f"{last}: exit code {done.returncode}: {done.stderr[-2000:]}"
    return done.stdout


def run_limited(kinds, seconds):
    """The program of such a process: one of the kinds, by the command line's name and folder.

    Args:
        kinds: functions of a folder, by name.
        seconds: of processor time for all cases.
    """
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    folder = Path(sys.argv[2])
    os.chdir(folder)  # where code that a file brings would leave its trace
    kinds[sys.argv[1]](folder)
