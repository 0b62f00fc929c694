"""Where a run was made: command, commit, hardware, versions, date, images.

They are in `OUTPUT_DIR/provenance.json`.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tract_det import distributed
from tract_det.errors import UserError
from tract_det.files import write_text
from tract_det.version import __version__

NAME = "provenance.json"

_TEXTS = ("command", "date", "version", "commit", "hardware")
_MAPPINGS = ("versions", "images")
_PACKAGES = ("torch", "torchvision", "deepspeed", "timm", "detectron2")


def record(
    output: Path, device: torch.device, *, resume: bool, images: Mapping[str, str] | None = None
) -> None:
    """Writes how this run was started; a resumed run appends to what is there. One rank calls it.

    The file holds a list with an entry for each start.

    Args:
        output: the run's folder.
        device: that it trains on.
        resume: whether it goes on.
        images: fingerprints of its images, by the part that they are.
    """
    path = output / NAME
    starts = read(output) if resume else []
    start = {**describe(device), "images": dict(images or {})}
    write_text(path, json.dumps([*starts, start], indent=2) + "\n")


def read(output: Path) -> list[dict[str, Any]]:
    """The starts of the run in this folder; [] where nothing is recorded.

    What a start does not tell, such as one of an earlier version, is "" or empty.

    Raises:
        UserError: the file is damaged.
    """
    path = output / NAME
    if not path.is_file():
        return []
    try:
        starts = [_start(entry) for entry in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} is damaged: {error}: delete it; where the run was made, and on which images, "
            "is then unknown"
        ) from error
    return starts


def _start(entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise TypeError("a start is no mapping")
    start = {**dict.fromkeys(_TEXTS, ""), **{key: {} for key in _MAPPINGS}, **entry}
    for key in _TEXTS:
        if not isinstance(start[key], str):
            raise TypeError(f"{key} is no text")
    for key in _MAPPINGS:
        values = start[key]
        if not (isinstance(values, dict) and all(isinstance(v, str) for v in values.values())):
            raise TypeError(f"{key} is no mapping of texts")
    return start


def describe(device: torch.device) -> dict[str, Any]:
    """This process: `command`, `date` (UTC), `version`, `commit`, `hardware`, `versions`."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **code(),
        "processes": distributed.world_size(),
        "hardware": hardware(device),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def code() -> dict[str, str]:
    """`version` and `commit` of this code."""
    return {"version": __version__, "commit": _commit()}


def hardware(device: torch.device) -> str:
    """The GPU's name, or the CPU's with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu()}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _commit() -> str:
    """The commit of the checkout that this package is in, with "+" if files changed; "" if none."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return ""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(checkout), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):  # no git here, or a checkout it does not trust
        return ""
