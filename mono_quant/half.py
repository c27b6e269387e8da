"""Casting a model to float16, module by module, with everything that does not fit kept and named; `widen` makes it run."""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mono_quant.account import Converted
from mono_quant.convert import Progress
from mono_quant.encoding import cast_half
from mono_quant.errors import Fp16RangeError, NonFiniteWeightError
from mono_quant.layers import below, fp32_patterns, kind_of, module_aliases, own_floats
from mono_quant.numerics import HalfCast
from mono_quant.selection import DEFAULTS, Rules, container_reason, user_reason


def to_half_(
    model: nn.Module,
    rules: Rules,
    *,
    within: str = "",
    on_nonfinite: str = "error",
    on_overflow: str = "keep",
    progress: Progress | None = None,
) -> tuple[dict[str, str], dict[str, Converted]]:
    """Cast the floating tensors of `model` to float16, in place.

    A module is cast or kept as a whole, so that its arithmetic stays in one dtype. Buffers that are not saved (rotary
    tables and such) stay as they are. `widen.compute_in_float_` then makes the model run.

    Args:
        model: is changed.
        rules: only what the user skips counts here.
        within: name of the part to cast; everything when empty.
        on_nonfinite, on_overflow: `error` or `keep`.
        progress: called as (module name, done, total).

    Returns:
        Reasons for the kept tensors, and what became of the others, both by tensor name.

    Raises:
        Fp16RangeError: a value does not fit and `on_overflow` is `error`.
        NonFiniteWeightError: a tensor holds NaN or infinity and `on_nonfinite` is `error`.
    """
    modules = {n: m for n, m in model.named_modules() if own_floats(m) and below(n, within)}
    keep = _kept_in_float(model, within, modules, rules)
    halves: dict[int, HalfCast] = {}
    for count, (name, module) in enumerate(modules.items()):
        if progress:
            progress(name, count, len(modules))
        if name not in keep:
            reason = _cast_all(name, module, halves, on_nonfinite, on_overflow)
            if reason:
                keep[name] = reason
    _keep_partners(modules, keep)
    reasons: dict[str, str] = {}
    done: dict[str, Converted] = {}
    for name, module in modules.items():
        for own, tensor in own_floats(module).items():
            full = f"{name}.{own}".lstrip(".")
            if name in keep:
                reasons[full] = keep[name]
            else:
                half = halves[id(tensor)]
                tensor.data = half.value
                done[full] = Converted(half.value.numel() * 2, torch.float16, flushed=half.flushed)
    return reasons, done


def planned_half(
    model: nn.Module, rules: Rules, within: str = ""
) -> tuple[dict[str, str], dict[str, Converted]]:
    """Return what `to_half_` would do, as far as it can be told without the values."""
    modules = {n: m for n, m in model.named_modules() if own_floats(m) and below(n, within)}
    keep = _kept_in_float(model, within, modules, rules)
    _keep_partners(modules, keep)
    reasons, done = {}, {}
    for name, module in modules.items():
        for own, tensor in own_floats(module).items():
            full = f"{name}.{own}".lstrip(".")
            if name in keep:
                reasons[full] = keep[name]
            else:
                done[full] = Converted(tensor.numel() * 2, torch.float16)
    return reasons, done


def _kept_in_float(
    model: nn.Module, within: str, modules: Mapping[str, nn.Module], rules: Rules
) -> dict[str, str]:
    core = model.get_submodule(within)
    patterns = fp32_patterns(core) if "keep_in_fp32" not in rules.disable_defaults else []
    aliases = module_aliases(model)
    classes = {name: type(module).__name__ for name, module in model.named_modules()}
    keep = {}
    for name, module in modules.items():
        weights = sum(p.numel() for p in module.parameters(recurse=False)) if kind_of(module) else None
        every = (name, *aliases[id(module)])
        reason = user_reason(every, type(module).__name__, weights, rules) or container_reason(
            every, classes, rules
        )
        if not reason and any(p.search(name) for p in patterns):
            reason = DEFAULTS["keep_in_fp32"]
        if reason:
            keep[name] = reason
    return keep


def _cast_all(
    prefix: str, module: nn.Module, halves: dict[int, HalfCast], on_nonfinite: str, on_overflow: str
) -> str:
    """Cast all own tensors of a module into `halves` by id, or say why the module is kept."""
    for name, tensor in own_floats(module).items():
        if id(tensor) not in halves:
            half, reason = _cast(f"{prefix}.{name}".lstrip("."), tensor, on_nonfinite, on_overflow)
            if half is None:
                return reason
            halves[id(tensor)] = half
    return ""


def _keep_partners(modules: Mapping[str, nn.Module], keep: dict[str, str]) -> None:
    """Keep every module that shares a tensor with a kept one."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in modules.items():
        for tensor in own_floats(module).values():
            owners[id(tensor)].append(name)
    groups = [names for names in owners.values() if len(names) > 1]
    for _ in groups:
        for names in groups:
            kept = next((n for n in names if n in keep), None)
            for name in names if kept else ():
                keep.setdefault(name, f"tied to {kept}, which is kept")


def _cast(name: str, tensor: Tensor, on_nonfinite: str, on_overflow: str) -> tuple[HalfCast | None, str]:
    try:
        half = cast_half(tensor)
    except NonFiniteWeightError as e:
        if on_nonfinite == "error":
            raise NonFiniteWeightError(
                f"{name}: {e}. Repair the checkpoint, or use on_nonfinite='keep'"
            ) from e
        return None, f"{name} holds NaN or infinity"
    if half.overflowed:
        largest = float(tensor.detach().abs().max())
        if on_overflow == "error":
            raise Fp16RangeError(
                f"{name}: {half.overflowed} values do not fit float16 (largest {largest:.6g}, limit 65504); "
                f"use int8, or keep the layer with on_overflow='keep'"
            )
        return None, f"{name} has values up to {largest:.4g}, which float16 cannot hold"
    return half, ""
