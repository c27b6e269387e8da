"""The rows of a report: what a model holds before, and what became of it."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor, nn

from mono_quant.errors import Words
from mono_quant.io.text import listed
from mono_quant.planning.kinds import RECURRENT_KINDS
from mono_quant.planning.report import TensorReport, dtype_name
from mono_quant.planning.rules import DEFAULTS, Decision, Layer, short_rows
from mono_quant.planning.schemes import OPEN, Choice
from mono_quant.planning.walk import tensor_names


@dataclass(frozen=True)
class Converted:
    """What became of one float tensor.

    `kept` when it only got another float dtype, for a reason other than the request; `narrowed` when what stays in float is to be
    stored so; `choice` is the scheme of what an int8 weight is multiplied with.
    """

    bytes_after: int
    dtype_after: torch.dtype
    sqnr_db: float | None = None
    gap_db: float | None = None
    flushed: int = 0
    kept: bool = False
    narrowed: bool = False
    choice: Choice = OPEN


def account(
    original: Mapping[str, TensorReport], done: Mapping[str, Converted], reasons: Mapping[str, str]
) -> tuple[TensorReport, ...]:
    """Complete the rows of `survey` with what was done."""
    rows: dict[str, TensorReport] = {}
    for name, row in original.items():
        c = done.get(name)
        if row.action == "shared":
            rows[name] = replace(row, dtype_after=rows[row.reason].dtype_after)
            continue
        rows[name] = replace(row, reason=reasons.get(name, row.reason))
        if c is not None:
            rows[name] = replace(
                rows[name],
                action="kept" if c.kept else "quantized",
                reason=rows[name].reason if c.kept else "",
                bytes_after=c.bytes_after,
                dtype_after=dtype_name(c.dtype_after),
                sqnr_db=c.sqnr_db,
                gap_db=c.gap_db,
                flushed=c.flushed,
                narrowed=c.narrowed,
                activations=c.choice.scheme,
                why=c.choice.reason,
            )
    return tuple(rows.values())


def survey(model: nn.Module, layers: Sequence[Layer]) -> dict[str, TensorReport]:
    """Return one row per tensor of a float model, all of them kept or shared so far."""
    by_tensor = {f"{x.name}.{w}".lstrip("."): x for x in layers for w in x.matrices}
    by_module = {x.name: x for x in layers}
    modules = dict(model.named_modules(remove_duplicate=False))
    first: dict[int, str] = {}
    rows = {}
    for name, tensor, is_buffer in tensor_names(model):
        owner, _, _ = name.rpartition(".")
        layer = by_tensor.get(name) or (by_module.get(owner) if tensor.dim() > 1 else None)
        shared_with = first.setdefault(id(tensor), name)
        dtype = dtype_name(tensor.dtype)
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
            reason=shared_with if shared_with != name else _plain_reason(name, tensor, is_buffer, layer),
            is_buffer=is_buffer,
            is_layer=layer is not None,
        )
    return rows


def as_shared(rows: Mapping[str, TensorReport], model: nn.Module) -> dict[str, TensorReport]:
    """Return the rows of `survey` with the ties that a model really has: a checkpoint may hold two tensors for what a config ties."""
    tensors = {name: tensor for name, tensor, _ in tensor_names(model)}
    found = dict(rows)
    for name, row in rows.items():
        if row.action == "shared" and tensors[name] is not tensors[row.reason]:
            size, other = tensors[name].numel() * tensors[name].element_size(), rows[row.reason]
            found[name] = replace(
                row,
                action="kept",
                reason=DEFAULTS["tied"],
                bytes_before=size,
                bytes_after=size,
                is_layer=other.is_layer,
            )
    return found


def _plain_reason(name: str, tensor: Tensor, is_buffer: bool, layer: Layer | None) -> str:
    if not tensor.is_floating_point():
        return f"{str(tensor.dtype).removeprefix('torch.')} values, not floating point"
    if is_buffer:
        return "buffer"
    if layer is not None and layer.kind in RECURRENT_KINDS and tensor.dim() > 1:
        # what is not converted with the other weights of its layer
        return short_rows(tensor.shape[-1])
    last = name.rpartition(".")[2]
    is_bias = last == "bias" or last.endswith("_bias") or last.startswith("bias_")
    return "bias" if is_bias else "vector (norm, gain or offset)"


def layer_reasons(rows: Mapping[str, TensorReport], decisions: Mapping[str, Decision]) -> dict[str, str]:
    """Return the reasons of kept layers by tensor name."""
    kept = {name: d.reason for name, d in decisions.items() if d.reason}
    return {name: kept[row.module] for name, row in rows.items() if row.is_layer and row.module in kept}


def int8_notes(
    rows: Sequence[TensorReport],
    model: nn.Module | None = None,
    unsound: Mapping[str, bool] = MappingProxyType({}),
) -> Iterator[str]:
    """Yield what a user must not overlook in an int8 conversion.

    Args:
        rows: complete, as `account` gives them.
        model: the converted model; None for a plan, which knows no values.
        unsound: tensors that are known to hold NaN or infinity, where their values are not in the model: whether NaN is among them.
    """
    if not any(row.action == "quantized" for row in rows):
        layers = {row.module or row.name: row.reason for row in rows if row.is_layer and row.action == "kept"}
        reasons = Counter(layers.values())
        total = reasons.total()
        reason, count = next(iter(reasons.most_common(1)), ("it holds no layer with a weight matrix", 0))
        yield Words("NO LAYER BECAME INT8: ", f"{count} of {total} layers kept: " if count else "", reason)
    bad = _non_finite(rows, model, unsound) if model is not None else []
    if bad:
        yield f"NaN or infinity in tensors that stay in float: {listed(bad)}; check the original model"


def _non_finite(rows: Sequence[TensorReport], model: nn.Module, unsound: Mapping[str, bool]) -> list[str]:
    kept = {row.name for row in rows if row.action == "kept"}
    found = []
    for name, tensor, is_buffer in tensor_names(model):
        if name in kept and tensor.is_floating_point() and tensor.numel():
            has_nan = unsound.get(name) if tensor.is_meta else _has_nan(tensor.detach())
            # a buffer may be a mask, where infinity is meant
            if has_nan or (has_nan is not None and not is_buffer):
                found.append(name)
    return found


def _has_nan(values: Tensor) -> bool | None:
    """Tell whether NaN is among values that are not finite; None where all are."""
    # the extremes need no copy of a large table, and NaN is both
    extremes = torch.stack((values.float() if values.element_size() == 1 else values).aminmax())
    return None if bool(extremes.isfinite().all()) else bool(extremes.isnan().any())
