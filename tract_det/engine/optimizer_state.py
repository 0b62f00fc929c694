"""The optimizer's state by the parameters' names, whatever the number of ranks and ZeRO's stage.

Under ZeRO a rank updates slices of flattened parameters. What it saves names each slice: the
parameter, its first element, and the optimizer's tensors over it. From the parts of all ranks,
each of any other number of ranks, under any other stage, picks what it updates.

DeepSpeed's own checkpoints fit one number of ranks, and they are pickles: reading one runs whatever
its author has written into it. These parts are plain values and tensors.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tract_det import distributed
from tract_det.errors import UserError

Part = dict[str, Any]


@dataclass(frozen=True)
class _Slice:
    """What the optimizer of this rank updates of a parameter.

    Attributes:
        name: of the parameter in the model.
        start: the first of its elements, in the flattened parameter.
        numel: how many they are.
        holder: the tensor that the optimizer updates: the parameter, or a flat one of many.
        offset: where in the flattened holder the elements begin.
    """

    name: str
    start: int
    numel: int
    holder: Tensor
    offset: int

    def of(self, values: Tensor) -> Tensor:
        """This slice of a tensor of the optimizer over the holder, flat."""
        return values.detach().reshape(-1)[self.offset : self.offset + self.numel]


def part_of(engine: Any) -> Part:
    """This rank's part of the optimizer's state: plain values, and tensors that share memory.

    Without ZeRO every rank has the whole state, and the main rank's part holds it.
    """
    optimizer = _optimizer(engine)
    is_spare = not engine.zero_optimization() and not distributed.is_main()
    parameters = {}
    for piece in [] if is_spare else _slices(engine):
        state = optimizer.state.get(piece.holder, {})
        values = {k: piece.of(v) for k, v in state.items() if _is_elementwise(k, v, piece)}
        parameters[piece.name] = {
            "start": piece.start,
            "values": values,
            "scalars": {k: v for k, v in state.items() if k not in values},
        }
    # What an optimizer counts for a whole group; all else in a group is set by the configuration.
    groups = [{k: v for k, v in group.items() if k == "step"} for group in optimizer.param_groups]
    return {"parameters": parameters, "groups": groups}


def restore(engine: Any, parts: Iterable[Part]) -> None:
    """Restores the optimizer from the parts of all ranks that saved it, in place.

    Args:
        engine: as `ds.initialize` makes it, before its first step. Learning rate, weight decay and
            the like stay as they are.
        parts: as `part_of` returned them, in any order.

    Raises:
        UserError: the stem's weight has a learning rate of its own now, and had none, or the
            reverse.
    """
    optimizer = _optimizer(engine)
    saved: dict[str, list[Mapping[str, Any]]] = {}
    for part in parts:
        for name, entry in part["parameters"].items():
            saved.setdefault(name, []).append(entry)
        if len(part["groups"]) != len(optimizer.param_groups):
            raise UserError(
                "--resume: SOLVER.STEM sets the stem's weight apart now and did not before, or the "
                "reverse: set it back, or start anew"
            )
        for group, values in zip(optimizer.param_groups, part["groups"], strict=True):
            group.update(values)
    for piece in _slices(engine):
        entries = saved.get(piece.name, [])
        for key in {key for entry in entries for key in entry["values"]}:
            _restore_values(optimizer.state[piece.holder], piece, key, entries)
        for entry in entries:
            for key, value in entry["scalars"].items():
                is_tensor = torch.is_tensor(value)
                optimizer.state[piece.holder][key] = value.clone() if is_tensor else value


def _restore_values(
    state: dict[str, Any], piece: _Slice, key: str, entries: Iterable[Mapping[str, Any]]
) -> None:
    """Fills a slice of one of the optimizer's tensors with what the entries have of it."""
    flat = torch.zeros(piece.numel)
    for entry in entries:
        values = entry["values"].get(key)
        if values is None:
            continue
        flat = flat.to(values.dtype)
        first = max(piece.start, entry["start"])
        end = min(piece.start + piece.numel, entry["start"] + values.numel())
        if first < end:
            part = values[first - entry["start"] : end - entry["start"]]
            flat[first - piece.start : end - piece.start] = part
    if key not in state:
        state[key] = torch.zeros_like(piece.holder, dtype=flat.dtype)
    whole = state[key]
    if piece.numel == whole.numel():  # in whatever memory format
        whole.copy_(flat.view(whole.shape))
    else:
        whole[piece.offset : piece.offset + piece.numel] = flat.to(whole.device)


def _is_elementwise(key: str, value: Any, piece: _Slice) -> bool:
    return key != "step" and torch.is_tensor(value) and value.shape == piece.holder.shape


def _optimizer(engine: Any) -> torch.optim.Optimizer:
    return engine.optimizer.optimizer if engine.zero_optimization() else engine.optimizer


def _slices(engine: Any) -> Iterator[_Slice]:
    """What this rank updates, in the order of the model's parameters."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if stage == 0:
            yield _Slice(name, 0, parameter.numel(), parameter, 0)
        elif stage == 3:
            index, offset, numel = zero.grad_position[zero.get_param_id(parameter)]
            start = distributed.rank() * numel  # the last ranks' slices are padded
            numel = min(numel, parameter.ds_numel - start)
            if numel > 0:
                holder = zero.fp32_partitioned_groups_flat[index]
                yield _Slice(name, start, numel, holder, int(offset))
        elif parameter._hp_mapping is not None:
            mapping = parameter._hp_mapping
            lies, held = mapping.lp_fragment_address, mapping.hp_fragment_address
            holder = zero.single_partition_of_fp32_groups[mapping.param_group_index]
            yield _Slice(name, lies.start, lies.numel, holder, held.start)
