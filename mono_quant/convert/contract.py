"""What every dtype promises: how it decides, plans, converts and is measured, behind one set of names."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

from mono_quant.convert.fidelity import Output
from mono_quant.convert.probes import Probe
from mono_quant.planning.config import QuantizationConfig
from mono_quant.planning.layers import find_layers
from mono_quant.planning.report import TensorReport, dtype_name
from mono_quant.planning.rows import Converted, account, survey
from mono_quant.planning.rules import DEFAULTS, Decision, Layer
from mono_quant.planning.writes import written_by_code

Decisions = Mapping[str, Decision]
# Called as (name, done, total) before each layer or module.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Task:
    """One conversion: of which part of which model, and what is asked for.

    Attributes:
        model: the whole model.
        within: name of the part that is converted; everything when empty.
        request: what the user asks for.
        layers: of the whole model, as `find_layers` gives them.
        rows: one per tensor, as `survey` gives them before anything is changed.
        floats: dtype of tensors that get another one than the scheme would give them, by name.
        written: names of the tensors that a forward writes into, as its code says and as a run has shown.
        unfit: why tensors cannot be cast to half precision, by name, where that is known without their values.
        unsound: tensors that are known to hold NaN or infinity, where the values are not in the model: whether NaN is among them.
    """

    model: nn.Module
    within: str
    request: QuantizationConfig
    layers: Sequence[Layer]
    rows: Mapping[str, TensorReport]
    floats: Mapping[str, torch.dtype]
    written: frozenset[str] = frozenset()
    unfit: Mapping[str, str] = field(default_factory=dict)
    unsound: Mapping[str, bool] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        within: str,
        request: QuantizationConfig,
        floats: Mapping[str, torch.dtype] = MappingProxyType({}),
    ) -> "Task":
        """Look at a model that is to be converted; works on meta as well."""
        layers = find_layers(model, within)
        rows = survey(model, layers)
        first = {name: row.reason if row.action == "shared" else name for name, row in rows.items()}
        dtypes = {first[name]: dtype for name, dtype in floats.items()}
        return cls(model, within, request, layers, rows, dtypes, written_by_code(model))

    def writes_into(self, modules: Iterable[str], tensors: Iterable[str]) -> bool:
        """Tell whether a forward writes into one of the tensors of a module; `modules` are all its names."""
        own = list(tensors)
        return any(f"{name}.{tensor}".lstrip(".") in self.written for name in modules for tensor in own)


class Outcome(NamedTuple):
    """What became, or would become, of the tensors of a model.

    Attributes:
        done: the converted ones, by name.
        reasons: why others are kept, by name; the rest keeps the reason of `survey`.
    """

    done: Mapping[str, Converted]
    reasons: Mapping[str, str]

    def rows(self, task: Task) -> tuple[TensorReport, ...]:
        """Return the complete rows of the report."""
        return account(task.rows, self.done, self.reasons)


def recast(task: Task) -> Outcome:
    """Return what becomes of the tensors that `recast_` gives another float dtype."""
    done, reasons = {}, {}
    for name, dtype in task.floats.items():
        row = task.rows[name]
        if row.dtype_before != dtype_name(dtype):
            done[name] = Converted(row.numel * dtype.itemsize, dtype, kept=True)
            if done[name].bytes_after > row.bytes_before:
                reasons[name] = DEFAULTS["keep_in_fp32"]
    return Outcome(done, reasons)


@dataclass(frozen=True)
class Scheme:
    """How a dtype is made.

    Attributes:
        dtype: its name in a request.
        floats: dtype that it gives floating tensors; None where they stay as they are.
        decide: which layers or modules of a task are converted, and why others are not; from shapes and names alone.
        planned: what `apply_` would do, as far as it can be told without values.
        apply_: converts the model of a task in place; the caller puts it back when that fails.
        finish_: makes a converted model run, once its memory is its own, and returns the outcome with what it did to the rest.
        notes: what a user must not overlook, from the task, the rows of the report and the converted model (None for a plan).
        measure: runs the converted model on a probe; fidelity against the original's output.
        kernel: names the path that runs its products on a device.
        auto: what activations that are left open become on a device; empty where activations stay in float.
    """

    dtype: str
    floats: torch.dtype | None
    decide: Callable[[Task], Decisions]
    planned: Callable[[Task, Decisions], Outcome]
    apply_: Callable[[Task, Decisions, Progress], Outcome]
    finish_: Callable[[Task, Outcome], Outcome]
    notes: Callable[[Task, Sequence[TensorReport], nn.Module | None], Iterable[str]]
    measure: Callable[[nn.Module, Probe, Output], dict[str, Any]]
    kernel: Callable[[torch.device], str]
    auto: Callable[[torch.device], str]


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter; the CPU for a model without one, and for one whose weights are in files."""
    first = next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.device("cpu") if first.type == "meta" else first
