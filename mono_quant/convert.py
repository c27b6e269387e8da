"""Walking over a model: copy its structure, then put int8 layers or float16 tensors in place of float ones."""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mono_quant.errors import Fp16RangeError, NonFiniteWeightError, UnsupportedModelError
from mono_quant.layers import WEIGHTS, fp32_patterns, kind_of, module_aliases, tensor_names
from mono_quant.modules import (
    Int8Conv1d,
    Int8Conv2d,
    Int8Embedding,
    Int8Experts,
    Int8Linear,
    Int8Module,
    Int8MultiheadAttention,
    Int8TransposedLinear,
)
from mono_quant.numerics import HalfCast, RowCodes, cast_half, quantize_rows, weight_limit_db
from mono_quant.report import TensorReport
from mono_quant.selection import DEFAULTS, Decision, Layer, Rules, keep_also, select, user_reason

_BUILDERS: Mapping[str, Callable[..., Int8Module]] = {
    "linear": Int8Linear,
    "transposed_linear": Int8TransposedLinear,
    "conv1d": Int8Conv1d,
    "conv2d": Int8Conv2d,
    "embedding": Int8Embedding,
    "experts": Int8Experts,
    "attention": Int8MultiheadAttention,
}
_HOOKS = tuple(
    name
    for name in vars(nn.Module())
    if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))
)
_REGISTRIES = (
    "_modules",
    "_buffers",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Converted:
    """What became of one float tensor."""

    bytes_after: int
    dtype_after: torch.dtype
    sqnr_db: float | None = None
    gap_db: float | None = None
    flushed: int = 0


def structural_copy(model: nn.Module) -> nn.Module:
    """Copy a model without copying its weights: new modules and Parameters on the same memory.

    Raises:
        UnsupportedModelError: something in the model cannot be copied.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        twin = nn.Parameter(parameter.detach(), requires_grad=False)
        twin.requires_grad_(parameter.requires_grad)
        twin.__dict__.update(parameter.__dict__)
        memo[id(parameter)] = twin
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, ValueError, AttributeError, NotImplementedError, copy.Error) as e:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be copied ({e}); remove what cannot be copied, or convert it where it is "
            f"with inplace=True"
        ) from e


def own_memory_(model: nn.Module, original: nn.Module | None) -> None:
    """Give every float parameter of `model` contiguous memory, and its own where it shares it with `original`.

    A saved tensor comes back contiguous, and products may differ in their last bit with the strides.
    """
    shared = {p.data_ptr() for p in original.parameters() if p.numel()} if original is not None else set()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            if parameter.numel() and parameter.data_ptr() in shared:
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
            else:
                parameter.data = parameter.data.contiguous()


@contextmanager
def rollback(model: nn.Module) -> Iterator[None]:
    """Put modules, parameter data, buffers and hooks of `model` back when the block fails."""
    modules = [(m, {n: dict(vars(m)[n]) for n in _REGISTRIES}, dict(vars(m))) for m in model.modules()]
    data = [(p, p.data) for p in model.parameters()]
    try:
        yield
    except BaseException:
        for module, registries, attributes in modules:
            for name in set(vars(module)) - set(attributes):
                del module.__dict__[name]
            module.__dict__.update(attributes)
            for name, before in registries.items():
                registry = vars(module)[name]
                registry.clear()
                registry.update(before)
        for parameter, tensor in data:
            parameter.data = tensor
        raise


def decide(layers: Sequence[Layer], rules: Rules, model: nn.Module) -> dict[str, Decision]:
    """Select among `layers`, with patterns checked against every module of `model`."""
    return select(layers, rules, {name: type(m).__name__ for name, m in model.named_modules()})


def to_int8_(
    model: nn.Module,
    decisions: Mapping[str, Decision],
    *,
    on_nonfinite: str = "error",
    progress: Progress | None = None,
) -> tuple[dict[str, Decision], dict[str, Converted]]:
    """Replace the chosen layers of `model` by int8 ones, in place.

    Args:
        model: is changed.
        decisions: by layer name.
        on_nonfinite: `error` or `keep`.
        progress: called as (layer name, done, total).

    Returns:
        The decisions, with layers kept for non-finite weights among them, and what became of each float tensor by
        parameter name.

    Raises:
        NonFiniteWeightError: a chosen weight holds NaN or infinity.
    """
    modules = dict(model.named_modules())
    final = dict(decisions)
    if on_nonfinite == "keep":
        final = keep_also(decisions, _non_finite(modules, decisions))
    done: dict[str, Converted] = {}
    chosen = [d.layer for d in final.values() if d.quantize]
    for count, layer in enumerate(chosen):
        if progress:
            progress(layer.name, count, len(chosen))
        encoded = encode(modules[layer.name], layer)
        _record(layer, encoded, done)
        _swap(model, layer, build(modules[layer.name], layer.kind, encoded))
    disable_float_fast_paths_(model)
    return final, done


def encode(module: nn.Module, layer: Layer) -> dict[str, RowCodes]:
    """Return the int8 codes of a layer's weights by parameter name.

    Raises:
        NonFiniteWeightError: naming the tensor.
    """
    encoded = {}
    for name in WEIGHTS[layer.kind]:
        weight = module.get_parameter(name).detach()
        matrix = weight.t() if layer.kind == "transposed_linear" else weight
        try:
            encoded[name] = quantize_rows(
                matrix.flatten(0, 1) if layer.kind == "experts" else matrix.flatten(1)
            )
        except NonFiniteWeightError as e:
            raise NonFiniteWeightError(
                f"{layer.name}.{name}: {e}. Repair the checkpoint, or keep the layer in float with on_nonfinite='keep'"
            ) from e
    return encoded


def _non_finite(modules: Mapping[str, nn.Module], decisions: Mapping[str, Decision]) -> dict[str, str]:
    """Return a reason for every chosen layer whose weight holds NaN or infinity."""
    return {
        name: "its weight holds NaN or infinity"
        for name, decision in decisions.items()
        if decision.quantize
        for weight in WEIGHTS[decision.layer.kind]
        if not bool(torch.isfinite(modules[name].get_parameter(weight).detach().float()).all())
    }


def build(module: nn.Module, kind: str, encoded: dict[str, RowCodes] | None) -> Int8Module:
    """Return the int8 layer for a float one; its codes are on meta when there are none yet."""
    plain = encoded if kind in ("experts", "attention") or encoded is None else encoded["weight"]
    new = _BUILDERS[kind](module, plain)
    new.train(module.training)
    for name in _HOOKS:
        # kept, not dropped: users and libraries rely on them
        vars(new)[name] = vars(module)[name]
    return new


def install_(model: nn.Module, names: Sequence[str]) -> None:
    """Put empty int8 layers (codes on meta) in place of the named float layers, for loading."""
    aliases = module_aliases(model)
    for name in names:
        module = model.get_submodule(name)
        layer = Layer(name, kind_of(module), type(module).__name__, 0, 0, aliases=aliases[id(module)])
        _swap(model, layer, build(module, layer.kind, None))
    disable_float_fast_paths_(model)


def disable_float_fast_paths_(model: nn.Module) -> None:
    """Keep `nn.TransformerEncoder` from reading int8 layers' weights and computing in float by itself."""
    for module in model.modules():
        has_int8 = any(isinstance(m, Int8Module) for m in module.modules())
        if isinstance(module, nn.TransformerEncoderLayer) and has_int8:
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder) and has_int8:
            module.use_nested_tensor = False


def planned(model: nn.Module, decisions: Mapping[str, Decision]) -> dict[str, Converted]:
    """Return what `to_int8_` would make of the chosen layers; needs shapes only."""
    done = {}
    for decision in decisions.values():
        layer = decision.layer
        for name in WEIGHTS[layer.kind] if decision.quantize else ():
            weight = model.get_submodule(layer.name).get_parameter(name)
            rows = weight.shape[1] if layer.kind == "transposed_linear" else weight.shape[0]
            rows = weight.shape[:2].numel() if layer.kind == "experts" else rows
            done[f"{layer.name}.{name}".lstrip(".")] = Converted(weight.numel() + 4 * rows, torch.int8)
    return done


def planned_half(
    model: nn.Module, rules: Rules, within: str = ""
) -> tuple[dict[str, str], dict[str, Converted]]:
    """Return what `to_half_` would do, as far as it can be told without the values."""
    modules = {n: m for n, m in model.named_modules() if _own_floats(m) and _below(n, within)}
    keep = _kept_in_float(model, within, modules, rules)
    _keep_partners(modules, keep)
    reasons, done = {}, {}
    for name, module in modules.items():
        for own, tensor in _own_floats(module).items():
            full = f"{name}.{own}".lstrip(".")
            if name in keep:
                reasons[full] = keep[name]
            else:
                done[full] = Converted(tensor.numel() * 2, torch.float16)
    return reasons, done


def _swap(model: nn.Module, layer: Layer, new: Int8Module) -> None:
    for name in (layer.name, *layer.aliases):
        parent, _, last = name.rpartition(".")
        model.get_submodule(parent)._modules[last] = new


def _record(layer: Layer, encoded: Mapping[str, RowCodes], done: dict[str, Converted]) -> None:
    for name, rows in encoded.items():
        gap = None if rows.sqnr_db == float("inf") else weight_limit_db(rows.codes.shape[1]) - rows.sqnr_db
        done[f"{layer.name}.{name}".lstrip(".")] = Converted(
            rows.codes.numel() + rows.scale.numel() * 4,
            torch.int8,
            None if gap is None else round(rows.sqnr_db, 3),
            None if gap is None else round(gap, 3),
        )


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

    A module is cast or kept as a whole, so that its arithmetic stays in one dtype; a kept one gets its inputs in its own
    dtype by a hook. Buffers that are not saved (rotary tables and such) stay as they are.

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
    modules = {n: m for n, m in model.named_modules() if _own_floats(m) and _below(n, within)}
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
        if name in keep and keep[name] != DEFAULTS["keep_in_fp32"]:
            cast_inputs_(module)
        for own, tensor in _own_floats(module).items():
            full = f"{name}.{own}".lstrip(".")
            if name in keep:
                reasons[full] = keep[name]
            else:
                half = halves[id(tensor)]
                tensor.data = half.value
                done[full] = Converted(half.value.numel() * 2, torch.float16, flushed=half.flushed)
    return reasons, done


def _below(name: str, within: str) -> bool:
    return not within or name == within or name.startswith(f"{within}.")


def _kept_in_float(
    model: nn.Module, within: str, modules: Mapping[str, nn.Module], rules: Rules
) -> dict[str, str]:
    core = model.get_submodule(within)
    patterns = fp32_patterns(core) if "keep_in_fp32" not in rules.disable_defaults else []
    aliases = module_aliases(model)
    keep = {}
    for name, module in modules.items():
        weights = sum(p.numel() for p in module.parameters(recurse=False)) if kind_of(module) else None
        reason = user_reason((name, *aliases[id(module)]), type(module).__name__, weights, rules)
        if not reason and any(p.search(name) for p in patterns):
            reason = DEFAULTS["keep_in_fp32"]
        if reason:
            keep[name] = reason
    return keep


def _cast_all(
    prefix: str, module: nn.Module, halves: dict[int, HalfCast], on_nonfinite: str, on_overflow: str
) -> str:
    """Cast all own tensors of a module into `halves` by id, or say why the module is kept."""
    for name, tensor in _own_floats(module).items():
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
        for tensor in _own_floats(module).values():
            owners[id(tensor)].append(name)
    groups = [names for names in owners.values() if len(names) > 1]
    for _ in groups:
        for names in groups:
            kept = next((n for n in names if n in keep), None)
            for name in names if kept else ():
                keep.setdefault(name, f"tied to {kept}, which is kept")


def cast_inputs_(module: nn.Module) -> None:
    """Make a module kept in float32 accept the float16 activations of the model around it, and answer in kind."""
    module.register_forward_pre_hook(_inputs_to_own_dtype, with_kwargs=True)
    module.register_forward_hook(_output_to_half)


def _inputs_to_own_dtype(module: nn.Module, args: Any, kwargs: Any) -> Any:
    own = next((t.dtype for t in module.parameters(recurse=False) if t.is_floating_point()), None)
    if own is None:
        return args, kwargs
    return _cast_tree(args, torch.float16, own), _cast_tree(kwargs, torch.float16, own)


def _output_to_half(module: nn.Module, args: Any, output: Any) -> Any:
    own = next((t.dtype for t in module.parameters(recurse=False) if t.is_floating_point()), None)
    return output if own is None else _cast_tree(output, own, torch.float16)


def _cast_tree(value: Any, old: torch.dtype, new: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(new) if value.dtype == old else value
    if isinstance(value, dict):
        return {k: _cast_tree(v, old, new) for k, v in value.items()}
    return type(value)(_cast_tree(v, old, new) for v in value) if type(value) in (tuple, list) else value


def _own_floats(module: nn.Module) -> dict[str, Tensor]:
    own = {n: p for n, p in module.named_parameters(recurse=False) if p.is_floating_point()}
    skip = module._non_persistent_buffers_set
    return own | {
        n: b for n, b in module.named_buffers(recurse=False) if b.is_floating_point() and n not in skip
    }


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


def account(
    original: Mapping[str, TensorReport], done: Mapping[str, Converted], reasons: Mapping[str, str]
) -> tuple[TensorReport, ...]:
    """Complete the rows of `survey` with what was done."""
    rows = []
    for name, row in original.items():
        if row.action == "shared":
            rows.append(row)
        elif name in done:
            c = done[name]
            rows.append(
                replace(
                    row,
                    action="quantized",
                    reason="",
                    bytes_after=c.bytes_after,
                    dtype_after=str(c.dtype_after).removeprefix("torch."),
                    sqnr_db=c.sqnr_db,
                    gap_db=c.gap_db,
                    flushed=c.flushed,
                )
            )
        else:
            rows.append(replace(row, reason=reasons.get(name, row.reason)))
    return tuple(rows)


def survey(model: nn.Module, layers: Sequence[Layer]) -> dict[str, TensorReport]:
    """Return one row per tensor of a float model, all of them kept or shared so far."""
    by_tensor = {f"{x.name}.{w}".lstrip("."): x for x in layers for w in WEIGHTS.get(x.kind, ())}
    by_module = {x.name: x for x in layers}
    modules = dict(model.named_modules(remove_duplicate=False))
    first: dict[int, str] = {}
    rows = {}
    for name, tensor, is_buffer in tensor_names(model):
        owner, _, _ = name.rpartition(".")
        layer = by_tensor.get(name) or (by_module.get(owner) if tensor.dim() > 1 else None)
        shared_with = first.setdefault(id(tensor), name)
        dtype = str(tensor.dtype).removeprefix("torch.")
        size = 0 if shared_with != name else tensor.numel() * tensor.element_size()
        rows[name] = TensorReport(
            name=name,
            module=layer.name if layer else owner,
            kind=layer.kind if layer else type(modules[owner]).__name__,
            shape=tuple(tensor.shape),
            dtype_before=dtype,
            dtype_after=dtype,
            bytes_before=size,
            bytes_after=size,
            action="kept" if shared_with == name else "shared",
            reason=_plain_reason(name, tensor, is_buffer) if shared_with == name else shared_with,
            is_buffer=is_buffer,
            is_layer=layer is not None,
        )
    return rows


def _plain_reason(name: str, tensor: Tensor, is_buffer: bool) -> str:
    if not tensor.is_floating_point():
        return f"{str(tensor.dtype).removeprefix('torch.')} values, not floating point"
    if is_buffer:
        return "buffer"
    last = name.rpartition(".")[2]
    return "bias" if last == "bias" or last.endswith("_bias") else "vector (norm, gain or offset)"


def layer_reasons(rows: Mapping[str, TensorReport], decisions: Mapping[str, Decision]) -> dict[str, str]:
    """Return the reasons of kept layers by tensor name."""
    kept = {name: d.reason for name, d in decisions.items() if d.reason}
    return {name: kept[row.module] for name, row in rows.items() if row.is_layer and row.module in kept}
