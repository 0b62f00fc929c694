"""The only module that imports DeepSpeed: processes, configuration and engine.

DeepSpeed is the training engine in every case, also for one process on a CPU: what is tested on a
laptop is what runs on many GPUs.
"""

import copy
import ctypes
import gc
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # now: it binds the group that exists at its import into defaults
from torch import nn

from tract_det import distributed
from tract_det.errors import UserError

_LINEAR = torch.nn.functional.linear
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
        UserError: CUDA is asked for, but there is none.
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
    import deepspeed  # noqa: F401  # before there is a group: it binds it into defaults

    backend = "nccl" if kind == "cuda" else "gloo"
    if not dist.is_initialized():
        if "MASTER_ADDR" in os.environ and "RANK" in os.environ:
            dist.init_process_group(backend)
        else:  # no launcher, and so no port either
            os.environ["LOCAL_RANK"] = "0"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    index = torch.cuda.current_device() if backend == "nccl" else None
    return torch.device("cpu") if index is None else torch.device("cuda", index)


def _keep_freed_memory() -> None:
    """Tells glibc to keep freed memory for the next step, as CUDA's allocator does.

    By default it returns large blocks to the system, and gets them back page by page in every
    step. DeepSpeed suffers most: it frees the gradients after a step, a plain loop only before the
    next backward pass. Measurements: benchmarks/pretraining_2-cores_2026-11-24.md. A user's own
    `MALLOC_...` variables go first.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    with suppress(OSError, AttributeError):  # a C library without mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def stop() -> None:
    """Leaves the process group and frees what refers to it: its threads must end before exit.

    Also gives torch its own `linear` back, which DeepSpeed replaces for good under ZeRO 3: the
    process may go on, and TorchScript cannot export the other one.
    """
    import deepspeed

    torch.nn.functional.linear = _LINEAR
    if not dist.is_initialized():
        return
    if deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()  # torch's group and DeepSpeed's references to it
    else:
        dist.destroy_process_group()
    gc.collect()  # discarded engines hold further references


def ds_config(
    *,
    batch_size: int,
    accumulation: int,
    clip_norm: float = 0.0,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """DeepSpeed's configuration.

    Args:
        batch_size: images per step, over all ranks and micro-batches.
        accumulation: micro-batches per step.
        clip_norm: bound of the global gradient norm; 0 = no clipping. Always written, because
            DeepSpeed 0.19 clips at 1.0 by default.
        extra: further keys of DeepSpeed's, such as `zero_optimization`.

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
    extra = dict(extra or {})
    zero = extra.pop("zero_optimization", {})
    return {
        "steps_per_print": 2**62,  # `Writers` prints
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice in every pass
        "zero_allow_untested_optimizer": True,  # DeepSpeed does not list torch's SGD
        **extra,
        "zero_optimization": _without_norm(zero) if clip_norm == 0 else zero,
        "train_batch_size": batch_size,
        "train_micro_batch_size_per_gpu": batch_size // parts,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip_norm,
    }


def _without_norm(zero: Mapping[str, Any]) -> dict[str, Any]:
    """`zero_optimization` without the norm of the gradients, if DeepSpeed offers it.

    DeepSpeed would read it in every step of stages 1 and 2 in order to leave out, silently, a step
    that is not finite. Stage 0 does not leave it out either; the next loss is then not finite.
    """
    if zero.get("stage") not in (1, 2) or "offload_optimizer" in zero:
        return dict(zero)
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    is_offered = "compute_grad_norm" in DeepSpeedZeroConfig.model_fields
    return {"compute_grad_norm": False, **zero} if is_offered else dict(zero)


def _join() -> None:
    """Makes DeepSpeed use the process group that there is; again, it does nothing."""
    import deepspeed

    # Training never calls DeepSpeed's shared-memory all-reduce, but would wait a minute for its
    # compilation.
    with suppress(AttributeError):
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)


class _Noting(dict[str, Any]):
    """A dict that notes which of its keys are asked for."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self.asked_for: set[object] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked_for.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked_for.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked_for.add(key)
        return super().__contains__(key)


def check_config(config: Mapping[str, Any]) -> None:
    """Refuses keys and values that DeepSpeed does not take.

    It refuses those of its sections itself, but ignores a key at the top that it does not know.

    Raises:
        UserError: names the key.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    _join()  # it asks how many ranks there are
    noting = _Noting(copy.deepcopy(dict(config)))
    try:
        DeepSpeedConfig(noting)
    except Exception as error:  # DeepSpeed's errors have no class in common
        reason = str(error)
        if hasattr(error, "errors"):  # pydantic's, of several lines
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise UserError(f"DEEPSPEED: DeepSpeed refuses it: {' '.join(reason.split())}") from error
    for key in set(config) - noting.asked_for:
        raise UserError(f"DEEPSPEED.{key}: this version of DeepSpeed knows no such key: correct it")


def initialize(model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    """DeepSpeed's engine around the model, which must be on its device.

    `engine(images, targets)`, `engine.backward(loss)`, `engine.step()`; the learning rate is set on
    `engine.optimizer.param_groups`, the weights are in `engine.module`.
    """
    import deepspeed

    _join()
    is_sharded = config.get("zero_optimization", {}).get("stage", 0) == 3
    # Before DeepSpeed puts its hooks on the model.
    template = _without_weights(model) if is_sharded else None
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, dist_init_required=False
    )
    if distributed.world_size() == 1 and not engine.zero_optimization():
        # With one process there is nothing to sum, but DeepSpeed would still copy all gradients.
        engine.enable_backward_allreduce = False
    engine.clip_fp32_gradients = partial(_clip, engine)
    engine.template = partial(copy.deepcopy, template) if is_sharded else None
    return engine


def _clip(engine: Any) -> None:
    """Scales the gradients so that the norm over all of them is at most the configured one.

    In place of DeepSpeed's own function for stage 0, with the same result: that one copies two
    numbers to the device, and so waits for it, and sums over the ranks what all of them know.
    """
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    norm = torch.stack(torch._foreach_norm(gradients)).square().sum().sqrt()
    factor = torch.full_like(norm, engine.gradient_clipping()) / (norm + 1e-6)
    torch._foreach_mul_(gradients, factor.clamp(max=1.0))


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy whose parameters are on the meta device."""
    empty = {
        id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()
    }
    return copy.deepcopy(model, empty)


def whole_model(engine: Any) -> nn.Module:
    """The model with all its weights on this rank: the engine's own, or a copy under ZeRO 3.

    Under ZeRO 3 every forward pass of the engine's own model needs all ranks, but the ranks do not
    evaluate the same number of batches. Every rank must call it.
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
    """Makes the model's forward run under bf16 autocast, in training and evaluation.

    An autocast around the engine would have no effect: on CUDA, DeepSpeed switches off any autocast
    but its own inside `engine(...)`, and its own would reduce gradients in bf16 as well.
    """
    # A partial object is deep-copied together with its model; a function would not be.
    model.forward = partial(_call_in_bf16, device.type, model.forward)


def _call_in_bf16(device_type: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with torch.autocast(device_type, dtype=torch.bfloat16):
        return function(*args, **kwargs)


def set_lr(engine: Any, lr: float) -> None:
    """Sets the learning rate of every parameter group, multiplied by the group's `lr_scale`."""
    groups: Iterable[dict[str, Any]] = engine.optimizer.param_groups
    for group in groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
