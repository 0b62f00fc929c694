"""A DataLoader whose worker processes leave signals and the training's random numbers alone."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

_POLL_SECONDS = 1.0


def data_loader(
    dataset: Dataset,
    batches: Any,
    collate_fn: Callable[[list[Any]], Any],
    num_workers: int,
    *,
    persistent: bool,
) -> DataLoader:
    """A DataLoader of batches of keys.

    Args:
        dataset: Indexed by the keys.
        batches: An iterable of lists of keys: the batch sampler.
        collate_fn: Makes a batch of a list of samples.
        num_workers: Worker processes; 0: this process reads.
        persistent: Whether the worker processes stay for the next iteration over the loader.
    """
    return _Loader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate_fn,
        num_workers=num_workers,
        persistent_workers=persistent and num_workers > 0,
        prefetch_factor=4 if num_workers > 0 else None,
        pin_memory=torch.cuda.is_initialized(),  # not for a run on the CPU of a machine with a GPU
        worker_init_fn=_init_worker,
        # At the start of every iteration DataLoader draws a number. With a generator of its own,
        # an evaluation does not change the random numbers of the training.
        generator=torch.Generator(),
    )


class _Loader(DataLoader):
    """A DataLoader whose worker processes are started with SIGTERM blocked.

    If `_init_worker` blocked it, the signal would still reach the threads that libraries have
    started in the worker process before.
    """

    def __iter__(self) -> Any:
        previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)


def _init_worker(worker: int) -> None:
    """Lets a worker process survive Ctrl-C and SIGTERM, so that the training can finish its step.

    A terminal and the deepspeed launcher send both signals to worker processes too, and when one
    dies of a signal the DataLoader raises in the middle of the step that the training process
    wants to complete and save. A SIGTERM from the training process itself is obeyed: this is how
    Python ends its worker processes at exit. (torch has already limited each to one thread.)
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()


def _exit_with(parent: multiprocessing.process.BaseProcess) -> None:
    """Ends this process at the first SIGTERM from `parent`, or when that one is gone.

    All other SIGTERMs are ignored. torch itself notices a lost parent only between two batches, and
    not at all while it waits for room in a full queue.
    """
    while parent.is_alive():
        signal_info = signal.sigtimedwait([signal.SIGTERM], _POLL_SECONDS)
        if signal_info is not None and signal_info.si_pid == parent.pid:
            break
    os._exit(0)
