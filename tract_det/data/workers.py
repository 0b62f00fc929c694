"""The DataLoader whose readers leave signals and random numbers alone."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset


def data_loader(
    dataset: Dataset,
    batches: Any,
    collate_fn: Callable[[list[Any]], Any],
    num_workers: int,
    *,
    persistent: bool,
) -> DataLoader:
    """A DataLoader of `batches` of keys, whose readers leave signals and random numbers alone."""
    return _Loader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate_fn,
        num_workers=num_workers,
        persistent_workers=persistent and num_workers > 0,
        prefetch_factor=4 if num_workers > 0 else None,
        pin_memory=torch.cuda.is_initialized(),  # not on a CPU run beside a GPU
        worker_init_fn=_init_worker,
        # DataLoader draws a number at every start of an iteration. From a generator of its own:
        # evaluating must not change the training's random numbers.
        generator=torch.Generator(),
    )


class _Loader(DataLoader):
    """A DataLoader whose readers have SIGTERM blocked from their first instruction on.

    Blocked later, in `_init_worker`, it would reach the threads that libraries start in a reader
    before.
    """

    def __iter__(self) -> Any:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _init_worker(worker: int) -> None:
    """Readers outlive Ctrl-C and SIGTERM: the training process finishes its step and saves.

    A terminal and the deepspeed launcher send both signals to readers too; a reader that dies of
    one makes the DataLoader raise in the middle of the step. SIGTERM from the training process
    itself is how Python ends its readers at exit: that one is obeyed. (torch has set readers to one
    thread each already.)
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_with, args=(parent.pid,), daemon=True).start()


def _exit_with(parent: int) -> None:
    """Ends this process at the first SIGTERM that `parent` sends; others are ignored."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)
