"""Casting a model to float16, module by module, with everything that does not fit kept and named; and making it run.

Its large matrices stay float16 in memory, its arithmetic is float32.
"""

from collections import defaultdict
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mono_quant import kernels
from mono_quant.convert.contract import Decisions, Outcome, Progress, Scheme, Task
from mono_quant.convert.fidelity import Output, compare, digits, peak_activation, run
from mono_quant.convert.halves import cast, hold_, memory_notes
from mono_quant.convert.probes import Probe
from mono_quant.convert.stored import StoredModule
from mono_quant.kernels.weights import HalfCast
from mono_quant.planning.kinds import kind_of
from mono_quant.planning.rows import Converted
from mono_quant.planning.rules import DEFAULTS, Decision, Layer, container_reason, user_reason
from mono_quant.planning.walk import below, module_aliases, own_floats
from mono_quant.planning.writes import WRITTEN


def decide(task: Task) -> dict[str, Decision]:
    """Decide about every module that owns floats; one is cast or kept as a whole, so that its arithmetic stays in one dtype."""
    modules = _modules(task)
    keep = _kept_in_float(task, modules)
    _keep_partners(modules, keep)
    aliases = module_aliases(task.model)
    return {
        name: Decision(_as_layer(name, module, aliases[id(module)]), keep.get(name, ""))
        for name, module in modules.items()
    }


def to_half_(task: Task, decisions: Decisions, progress: Progress) -> Outcome:
    """Cast the floating tensors of the chosen modules to float16, in place.

    Buffers that are not saved (rotary tables and such) stay as they are. `compute_in_float_` then makes the model run.

    Args:
        task: its model is changed.
        decisions: by module name.
        progress: called as (module name, done, total).

    Raises:
        Fp16RangeError: a value does not fit, and the request does not keep such modules.
        NonFiniteWeightError: a tensor holds NaN or infinity, and the request does not keep such modules.
    """
    modules = _modules(task)
    keep = {name: decision.reason for name, decision in decisions.items() if decision.reason}
    wide, halves = _wide(task, modules), dict[int, HalfCast]()
    partners = {name for group in _groups(modules) for name in group}
    for count, (name, module) in enumerate(modules.items()):
        progress(name, count, len(modules))
        if name not in keep:
            reason = _cast_all(name, module, wide, halves, task)
            if reason:
                keep[name] = reason
            elif name not in partners:
                # decided: the float goes before the next module is cast
                for tensor in own_floats(module).values():
                    if id(tensor) in halves:
                        tensor.data = halves[id(tensor)].value
    _keep_partners(modules, keep)
    outcome = _outcome(task, modules, keep, {key: half.flushed for key, half in halves.items()})
    for name, tensor in _tensors(modules).items():
        if name in outcome.done:
            dtype = outcome.done[name].dtype_after
            tensor.data = halves[id(tensor)].value if dtype == torch.float16 else tensor.data.to(dtype)
    return outcome


def planned(task: Task, decisions: Decisions) -> Outcome:
    """Return what `to_half_` would do, as far as it can be told without the values."""
    keep = {name: decision.reason for name, decision in decisions.items() if decision.reason}
    return _outcome(task, _modules(task), keep, {})


def _outcome(
    task: Task, modules: Mapping[str, nn.Module], keep: Mapping[str, str], flushed: Mapping[int, int]
) -> Outcome:
    done, reasons = {}, {}
    wide = _wide(task, modules)
    for name, tensor in _tensors(modules).items():
        reason = keep.get(name.rpartition(".")[0], "")
        # what is written into has to stay a plain tensor, which a float16 matrix does not
        is_written = reason == WRITTEN and tensor.dtype == torch.float16
        own = torch.float32 if is_written else tensor.dtype
        dtype = wide.get(id(tensor), own if reason else torch.float16)
        if reason or id(tensor) in wide:
            reasons[name] = reason or DEFAULTS["keep_in_fp32"]
            if not reason or dtype.itemsize > tensor.dtype.itemsize:
                done[name] = Converted(tensor.numel() * dtype.itemsize, dtype, kept=True)
        else:
            done[name] = Converted(tensor.numel() * 2, dtype, flushed=flushed.get(id(tensor), 0))
    return Outcome(done, reasons)


def _wide(task: Task, modules: Mapping[str, nn.Module]) -> dict[int, torch.dtype]:
    """Return the dtype of the tensors that must not become float16, by id."""
    return {id(t): task.floats[name] for name, t in _tensors(modules).items() if name in task.floats}


def _tensors(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return {f"{n}.{own}".lstrip("."): t for n, m in modules.items() for own, t in own_floats(m).items()}


def _modules(task: Task) -> dict[str, nn.Module]:
    return {n: m for n, m in task.model.named_modules() if own_floats(m) and below(n, task.within)}


def _as_layer(name: str, module: nn.Module, aliases: tuple[str, ...]) -> Layer:
    cls = type(module).__name__
    size = sum(tensor.numel() for tensor in own_floats(module).values())
    return Layer(name, kind_of(module) or cls, cls, 1, size, aliases=aliases)


def _kept_in_float(task: Task, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    rules = task.request.rules()
    aliases = module_aliases(task.model)
    classes = {name: type(module).__name__ for name, module in task.model.named_modules()}
    keep = {}
    for name, module in modules.items():
        weights = sum(p.numel() for p in module.parameters(recurse=False)) if kind_of(module) else None
        every = (name, *aliases[id(module)])
        reason = user_reason(every, type(module).__name__, weights, rules) or container_reason(
            every, classes, rules
        )
        if not reason and task.writes_into(every, own_floats(module)):
            reason = WRITTEN
        if reason:
            keep[name] = reason
    return keep


def _cast_all(
    prefix: str,
    module: nn.Module,
    wide: Container[int],
    halves: dict[int, HalfCast],
    task: Task,
) -> str:
    """Cast all own tensors of a module but the `wide` ones into `halves` by id, or say why the module is kept.

    All of them are looked at, so that no value passes that the request refuses.
    """
    reasons = []
    for name, tensor in own_floats(module).items():
        if id(tensor) not in halves and id(tensor) not in wide:
            half, reason = cast(f"{prefix}.{name}".lstrip("."), tensor, task)
            if half is None:
                reasons.append(reason)
            else:
                halves[id(tensor)] = half
    return reasons[0] if reasons else ""


def _keep_partners(modules: Mapping[str, nn.Module], keep: dict[str, str]) -> None:
    """Keep every module that shares a tensor with a kept one."""
    groups = _groups(modules)
    for _ in groups:
        for names in groups:
            kept = next((n for n in names if n in keep), None)
            for name in names if kept else ():
                keep.setdefault(name, f"tied to {kept}, which is kept")


def _groups(modules: Mapping[str, nn.Module]) -> list[list[str]]:
    """Return the names of the modules that share a tensor, by tensor."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in modules.items():
        for tensor in own_floats(module).values():
            owners[id(tensor)].append(name)
    return [names for names in owners.values() if len(names) > 1]


def compute_in_float_(model: nn.Module, within: str = "") -> None:
    """Make a float16 model compute in float32, with its large matrices in float16; see `hold_`.

    A module in another dtype gets its inputs in it, and answers in float32, by hooks.

    Args:
        model: is changed.
        within: name of the part that is float16; everything when empty.
    """
    inside = [module for name, module in model.named_modules() if below(name, within)]
    hold_(
        model,
        {id(t): torch.float32 for m in inside for t in own_floats(m).values() if t.dtype == torch.float16},
    )
    # what lies outside gets float32 from the part that is float16
    for module in model.modules():
        if not isinstance(module, StoredModule):
            _cast_inputs_(module)


def finish_(task: Task, outcome: Outcome) -> Outcome:
    """Make a converted model run; see `Scheme`."""
    compute_in_float_(task.model, task.within)
    return outcome


def measure(model: nn.Module, probe: Probe, expected: Output) -> dict[str, Any]:
    """Compare the output with the original's, and watch how large activations become."""
    with peak_activation(model) as peak:
        output = run(model, probe)
    return compare(expected, output, probe.name) | {"peak_activation": digits(peak[0])}


def _cast_inputs_(module: nn.Module) -> None:
    """Let a module with matrices, or in a dtype of its own, take float inputs of any dtype."""
    own = own_floats(module).values()
    if any(t.dim() > 1 or t.dtype != torch.float32 for t in own):
        module.register_forward_pre_hook(_inputs_to_own_dtype, with_kwargs=True)
    if any(t.dtype != torch.float32 for t in own):
        module.register_forward_hook(_output_to_float)


def remove_casts_(model: nn.Module) -> None:
    """Take off what makes the modules of a float16 model take floats of any dtype."""
    for module in model.modules():
        for hooks, ours in (
            (module._forward_pre_hooks, _inputs_to_own_dtype),
            (module._forward_hooks, _output_to_float),
        ):
            for key in [key for key, hook in hooks.items() if hook is ours]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def _own_dtype(module: nn.Module) -> torch.dtype | None:
    return next((t.dtype for t in module.parameters(recurse=False) if t.is_floating_point()), None)


def _inputs_to_own_dtype(module: nn.Module, args: Any, kwargs: Any) -> Any:
    own = _own_dtype(module)
    return (args, kwargs) if own is None else (_cast_tree(args, own), _cast_tree(kwargs, own))


def _output_to_float(module: nn.Module, args: Any, output: Any) -> Any:
    return output if _own_dtype(module) == torch.float16 else _cast_tree(output, torch.float32)


def _cast_tree(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: _cast_tree(v, dtype) for k, v in value.items()}
    return type(value)(_cast_tree(v, dtype) for v in value) if type(value) in (tuple, list) else value


FP16 = Scheme(
    "fp16",
    floats=torch.float16,
    decide=decide,
    planned=planned,
    apply_=to_half_,
    finish_=finish_,
    notes=lambda task, rows, model: memory_notes(rows, model),
    measure=measure,
    kernel=kernels.describe_half,
    auto=lambda device: "",
)
