"""Where a run's figures go beside `metrics.jsonl`: TensorBoard, Weights & Biases, Trackio.

A tracker is imported only when it is named. What keeps one from starting is an error; one that
fails later is left out with a warning, since the training does not depend on it.
"""

import importlib
import json
import os
import threading
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tract_det.errors import UserError, shortened
from tract_det.files import write_text

_IDS = "trackers.json"  # in the run's folder: the id of its run in each tracker
_PROJECT = "tract_det"
_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}

Values = Mapping[str, float]


class Tracker(Protocol):
    """A run in a tracker."""

    def log(self, values: Values, step: int) -> None:
        """Takes in figures of a step."""

    def results(self, values: Values, step: int) -> None:
        """Takes in the figures of the final evaluation."""

    def close(self) -> None:
        """Writes what is left."""


def require(names: Sequence[str]) -> None:
    """Refuses trackers that are not installed.

    Raises:
        UserError: names the tracker and how to get it.
    """
    for name in names:
        try:
            importlib.import_module(_MODULES[name])
        except ImportError as error:
            raise UserError(
                f"LOGGERS {name}: the package cannot be imported ({shortened(str(error), 200)}): "
                f"pip install {name}, or leave it out of LOGGERS"
            ) from error


class Trackers:
    """The trackers of a run. The main rank has them.

    Args:
        names: of `choices.TRACKERS`.
        output: the run's folder.
        config: of the run, plain values.
        start: number of steps done before.
        is_resumed: go on in the same runs of the trackers.

    Raises:
        UserError: a tracker does not start; names it.
    """

    def __init__(
        self,
        names: Sequence[str],
        output: Path,
        *,
        config: Mapping[str, Any],
        start: int = 0,
        is_resumed: bool = False,
    ) -> None:
        ids = _ids(output) if is_resumed else {}
        self._trackers: dict[str, Tracker] = {}
        for name in names:
            ids.setdefault(name, f"{output.name}-{uuid.uuid4().hex[:8]}")
            try:
                self._trackers[name] = _KINDS[name](output, ids[name], config, start)
            except Exception as error:  # each has its own: no login, no network, a full disk
                self.close()
                raise UserError(
                    f"LOGGERS {name}: it does not start ({_reason(error)}): mend that, or leave it "
                    "out of LOGGERS"
                ) from error
        if names:
            write_text(output / _IDS, json.dumps(ids, indent=2) + "\n")

    def log(self, values: Values, step: int) -> None:
        """Passes on figures of a step."""
        self._each(lambda tracker: tracker.log(values, step))

    def results(self, values: Values, step: int) -> None:
        """Passes on the figures of the final evaluation."""
        self._each(lambda tracker: tracker.results(values, step))

    def close(self) -> None:
        """Lets each write what is left."""
        self._each(lambda tracker: tracker.close())
        self._trackers = {}

    def _each(self, work: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                work(tracker)
            except Exception as error:
                del self._trackers[name]
                warnings.warn(
                    f"LOGGERS {name}: it has failed and gets no more figures ({_reason(error)}); "
                    "metrics.jsonl has them all",
                    stacklevel=2,
                )


def _reason(error: Exception) -> str:
    return shortened(str(error) or type(error).__name__, 200)


def _ids(output: Path) -> dict[str, str]:
    """The ids of the runs in each tracker; none where they are not recorded."""
    with suppress(OSError, ValueError):
        ids = json.loads((output / _IDS).read_text())
        if isinstance(ids, dict) and all(isinstance(name, str) for name in ids.values()):
            return ids
    return {}


class _TensorBoard:
    """Events in the run's folder; those of steps that come again are dropped."""

    def __init__(self, output: Path, _: str, config: Mapping[str, Any], start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._hook = threading.excepthook
        threading.excepthook = partial(_without_board, self._hook)
        self._board = SummaryWriter(str(output), purge_step=start + 1)
        self._add_text("config", config, start)

    def _add_text(self, tag: str, content: Mapping[str, Any], step: int) -> None:
        lines = json.dumps(content, indent=2, default=str).splitlines()
        self._board.add_text(tag, "\n".join(f"    {line}" for line in lines), step)

    def log(self, values: Values, step: int) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def results(self, values: Values, step: int) -> None:
        self._add_text("results", values, step)

    def close(self) -> None:
        threading.excepthook = self._hook
        self._board.close()


def _without_board(
    hook: Callable[[threading.ExceptHookArgs], object], args: threading.ExceptHookArgs
) -> None:
    """Leaves it to the next figure to say that TensorBoard's thread could not write."""
    is_board = type(args.thread).__module__.startswith("tensorboard.")
    if not (is_board and isinstance(args.exc_value, OSError)):
        hook(args)


class _WandB:
    """A run of Weights & Biases; its own variables (WANDB_MODE, WANDB_PROJECT, ...) hold."""

    def __init__(self, output: Path, run_id: str, config: Mapping[str, Any], start: int) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=os.environ.get("WANDB_NAME", str(output)),
            id=run_id,
            resume="allow",
            dir=str(output),
            config=dict(config),
            allow_val_change=True,  # a resumed run may be longer
            reinit="create_new",  # another run may be open in this process
        )

    def log(self, values: Values, step: int) -> None:
        self._run.log(dict(values), step=step)

    def results(self, values: Values, step: int) -> None:
        self._run.summary.update({"step": step, "results": dict(values)})

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    """A run of Trackio, in its own folder (TRACKIO_DIR)."""

    def __init__(self, output: Path, run_id: str, config: Mapping[str, Any], start: int) -> None:
        import trackio

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", _PROJECT),
            name=run_id,
            resume="allow",
            config=dict(config),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, values: Values, step: int) -> None:
        self._run.log(dict(values), step=step)

    def results(self, values: Values, step: int) -> None:
        self._run.log({f"results/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


_KINDS: dict[str, Callable[[Path, str, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "trackio": _Trackio,
}
