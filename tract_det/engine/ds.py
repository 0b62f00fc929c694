"""The only door to DeepSpeed: processes, configuration, engine, save and load.

DeepSpeed is the training engine in every case, also for one process on a CPU, so that what is
tested on a laptop is what runs on many GPUs.
"""

import copy
import ctypes
import gc
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group, which it would write into defaults
from torch import nn

from tract_det import distributed
from tract_det.errors import UserError

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # as in glibc's malloc.h

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def start(device: str = "") -> torch.device:
    """Joins the process group of `deepspeed` or `torchrun`, or makes one of this process alone.

    Args:
        device: "cuda", "cpu", or "" for CUDA where there is one and `DS_ACCELERATOR` is not "cpu".

    Returns:
        This process's device.

    Raises:
        UserError: CUDA is asked for where there is none.
    """
    is_cpu = os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available()
    kind = device or ("cpu" if is_cpu else "cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("MODEL.DEVICE is cuda, but torch sees no CUDA device: leave it out")
    if kind == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        if "OMP_NUM_THREADS" not in os.environ:
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, cores // distributed.local_world_size()))
        _keep_freed_memory()
    else:
        torch.cuda.set_device(distributed.local_rank())
    import deepspeed  # noqa: F401  # now: it writes the group that is there into defaults

    backend = "nccl" if kind == "cuda" else "gloo"
    if not dist.is_initialized():
        if "MASTER_ADDR" in os.environ and "RANK" in os.environ:
            dist.init_process_group(backend)
        else:  # no launcher: no port is needed either
            os.environ["LOCAL_RANK"] = "0"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    index = torch.cuda.current_device() if backend == "nccl" else None
    return torch.device("cpu") if index is None else torch.device("cuda", index)


def _keep_freed_memory() -> None:
    """Tells glibc to keep what is freed, as CUDA's allocator does, for the next step to use again.

    It would give large tensors and the top of its heap back to the system and get them again page
    by page in every step: with ResNet-50 at batch 8 and 16, 3 % of a step, against 4 to 13 % more
    memory. DeepSpeed, which frees the gradients after a step, pays more of it than a loop that
    frees them before the next backward pass. `MALLOC_...` in the environment are the user's own.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def stop() -> None:
    """Leaves the process group, with all that holds it: its threads must not see the exit."""
    import deepspeed

    if not dist.is_initialized():
        return
    if deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()  # torch's, and DeepSpeed's own references
    else:
        dist.destroy_process_group()
    gc.collect()  # an engine that is no longer used has more of them


def ds_config(
    *,
    batch_size: int,
    accumulation: int,
    clip_norm: float = 0.0,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """DeepSpeed's configuration; everything in it that this project knows is derived here.

    Args:
        batch_size: images a step, over all ranks and micro-batches.
        accumulation: micro-batches a step.
        clip_norm: bound of the global gradient norm; 0 = no clipping. Always written, since
            DeepSpeed 0.19 clips at 1.0 by default.
        extra: DeepSpeed's own keys, such as `zero_optimization`.

    Raises:
        UserError: the batch does not divide into ranks and micro-batches.
    """
    parts = accumulation * distributed.world_size()
    if batch_size % parts:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {batch_size} does not divide into {distributed.world_size()} "
            f"ranks x {accumulation} micro-batches (SOLVER.ACCUMULATION): take a multiple of "
            f"{parts}"
        )
    return {
        "steps_per_print": 2**62,  # the console is ours
        "zero_allow_untested_optimizer": True,  # torch's SGD is not on DeepSpeed's list
        **(extra or {}),
        "train_batch_size": batch_size,
        "train_micro_batch_size_per_gpu": batch_size // parts,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip_norm,
    }


def initialize(model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    """DeepSpeed's engine around the model, which must be on its device.

    `engine(images, targets)`, `engine.backward(loss)`, `engine.step()`; the learning rate is set on
    `engine.optimizer.param_groups`, the weights are in `engine.module`.
    """
    import deepspeed

    # A shared-memory all-reduce for inference, compiled at first use (a minute, a C++ compiler).
    # Training never calls it.
    with suppress(AttributeError):
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)
    is_sharded = config.get("zero_optimization", {}).get("stage", 0) == 3
    # A copy made later would have DeepSpeed's hooks.
    template = _without_weights(model) if is_sharded else None
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, dist_init_required=False
    )
    if distributed.world_size() == 1 and not engine.zero_optimization():
        # One process has nothing to sum; DeepSpeed would copy all gradients to a bucket and back.
        engine.enable_backward_allreduce = False
    engine.template = partial(copy.deepcopy, template) if is_sharded else None
    return engine


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy whose parameters take no memory."""
    empty = {
        id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()
    }
    return copy.deepcopy(model, empty)


def whole_model(engine: Any) -> nn.Module:
    """The model with all its weights on this rank: the engine's own, or under ZeRO 3 a copy.

    Under ZeRO 3 every forward pass of the engine's own model needs all ranks, which do not evaluate
    the same number of batches. Every rank must call it.
    """
    if engine.template is None:
        return engine.module
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        state = {key: value.clone() for key, value in engine.module.state_dict().items()}
    model = engine.template()
    model.load_state_dict(state, assign=True)
    return model


def autocast_forward(model: nn.Module, device: torch.device) -> None:
    """Makes the model's own forward, in training and evaluation, run under bf16 autocast.

    Around the engine it would be lost: DeepSpeed turns an autocast that is not its own off, on
    CUDA, inside `engine(...)`. Its own one would reduce gradients in bf16 as well.
    """
    # A partial object, unlike a function, is copied with the model that it belongs to.
    model.forward = partial(_call_in_bf16, device.type, model.forward)


def _call_in_bf16(device_type: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with torch.autocast(device_type, dtype=torch.bfloat16):
        return function(*args, **kwargs)


def save(engine: Any, folder: Path, tag: str, state: Mapping[str, Any]) -> None:
    """Writes the engine's whole state and `state` under `folder/tag`. Every rank must call it."""
    engine.save_checkpoint(str(folder), tag=tag, client_state=dict(state), save_latest=False)
    distributed.barrier()


def load(engine: Any, folder: Path, tag: str) -> dict[str, Any]:
    """Restores the engine from `folder/tag`; returns the `state` saved with it.

    Every rank must call it.

    Raises:
        UserError: the checkpoint is incomplete. (DeepSpeed itself only warns, and trains from
            scratch.)
    """
    try:
        path, state = engine.load_checkpoint(str(folder), tag=tag)
    except Exception as error:  # DeepSpeed's own errors have no class in common
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"checkpoint {folder / tag} cannot be loaded: {reason}") from error
    if path is None:
        raise UserError(f"checkpoint {folder / tag} is incomplete: start again without --resume")
    return dict(state)


def set_lr(engine: Any, lr: float) -> None:
    """Sets the learning rate of every parameter group, each times its own `lr_scale`."""
    groups: Iterable[dict[str, Any]] = engine.optimizer.param_groups
    for group in groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
