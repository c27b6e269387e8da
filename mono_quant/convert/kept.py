"""What an int8 conversion leaves in float, stored in half precision on request: which tensors, and casting them."""

from collections import defaultdict
from collections.abc import Container, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from mono_quant.convert.contract import Outcome, Task
from mono_quant.convert.halves import cast, hold_
from mono_quant.convert.stored import StoredModule
from mono_quant.errors import Words
from mono_quant.planning.config import HALVES
from mono_quant.planning.layers import declared_float32
from mono_quant.planning.report import TensorReport, dtype_name
from mono_quant.planning.rows import Converted
from mono_quant.planning.walk import below, tensor_names


def planned(task: Task, outcome: Outcome) -> Outcome:
    """Add to an outcome what becomes of the matrices that stay in float, as far as it can be told without the values."""
    return _joined(
        task, outcome, {name: _narrowed(task, tensor) for name, tensor in _matrices(task, outcome)}, {}
    )


def narrow_(task: Task, outcome: Outcome) -> Outcome:
    """Cast the matrices that stay in float to half precision, in place, and make the model run with them.

    Args:
        task: its model is changed.
        outcome: what became of the rest.

    Returns:
        The outcome with these tensors.

    Raises:
        Fp16RangeError: a value does not fit, and the request does not keep such tensors.
    """
    found, problems, wide = {}, {}, {}
    # what stays in float may hold anything: the notes of the report name it
    task = replace(task, request=replace(task.request, on_nonfinite="keep"))
    for name, tensor in _matrices(task, outcome):
        half, problem = cast(name, tensor, task, _half(task))
        if half is None:
            problems[name] = f"not stored in {dtype_name(_half(task))}: {problem}"
        else:
            found[name], wide[id(tensor)] = _narrowed(task, tensor, half.flushed), tensor.dtype
            tensor.data = half.value
    if wide:
        hold_(task.model, wide)
    return _joined(task, outcome, found, problems)


def read_dtypes(model: nn.Module, names: Container[str]) -> dict[str, torch.dtype]:
    """Return the dtype that a forward sees of narrowed tensors, by name; without those of a model that was cast to half precision.

    Args:
        model: after `narrow_`.
        names: of the narrowed tensors.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found = {}
    for name, tensor, _ in tensor_names(model):
        owner = modules[name.rpartition(".")[0]]
        dtype = owner.float_dtype if isinstance(owner, StoredModule) else tensor.dtype
        if name in names and dtype.itemsize > 2:
            found[name] = dtype
    return found


def hold_named_(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Make a model run that was filled with narrowed tensors; see `read_dtypes`."""
    if dtypes:
        hold_(model, {id(t): dtypes[name] for name, t, _ in tensor_names(model) if name in dtypes})


def _half(task: Task) -> torch.dtype:
    return HALVES[task.request.kept]


def _narrowed(task: Task, tensor: Tensor, flushed: int = 0) -> Converted:
    dtype = _half(task)
    return Converted(tensor.numel() * dtype.itemsize, dtype, flushed=flushed, kept=True, narrowed=True)


def _matrices(task: Task, outcome: Outcome) -> Iterator[tuple[str, Tensor]]:
    """Yield the float matrices that stay as they are and may be stored in half precision."""
    if task.request.kept == "same":
        return
    names: dict[str, list[str]] = defaultdict(list)
    for name, known in task.rows.items():
        names[known.reason if known.action == "shared" else name].append(name)
    routers = {layer.name for layer in task.layers if "router" in layer.defaults}
    declared = (
        set()
        if "keep_in_fp32" in task.request.disable_defaults
        else declared_float32(task.model, _half(task))
    )
    fixed = declared | task.written | outcome.done.keys()
    for name, tensor, _ in tensor_names(task.model):
        row = task.rows.get(name)
        if row is None or row.action != "kept" or row.module in routers or not below(name, task.within):
            continue
        is_wide = tensor.dtype in (torch.float32, torch.float64)
        if is_wide and _is_matrix(row) and fixed.isdisjoint(names[name]):
            yield name, tensor


def _is_matrix(row: TensorReport) -> bool:
    # vectors and buffers are small, and what they hold (norms, statistics) has to be exact
    return not row.is_buffer and len(row.shape) > 1 and row.numel > max(row.shape)


def _joined(
    task: Task, outcome: Outcome, found: Mapping[str, Converted], problems: Mapping[str, str]
) -> Outcome:
    said = dict.fromkeys(found, f"stored in {dtype_name(_half(task))} on request") if found else {}
    reasons = {
        name: Words(outcome.reasons.get(name, task.rows[name].reason), f"; {what}")
        for name, what in {**said, **problems}.items()
    }
    return Outcome({**outcome.done, **found}, {**outcome.reasons, **reasons})
