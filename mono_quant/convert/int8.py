"""Putting int8 layers in the place of float ones: what that would make, doing it, and empty layers for loading."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from mono_quant.convert.int8_layers import (
    Int8Conv1d,
    Int8Conv2d,
    Int8Embedding,
    Int8Experts,
    Int8Linear,
    Int8Module,
    Int8MultiheadAttention,
    Int8TransposedLinear,
)
from mono_quant.convert.surgery import Progress, disable_float_fast_paths_, put_
from mono_quant.errors import NonFiniteWeightError
from mono_quant.kernels import encode_rows
from mono_quant.kernels.weights import RowCodes, weight_limit_db
from mono_quant.planning.kinds import WEIGHTS, kind_of
from mono_quant.planning.rows import Converted
from mono_quant.planning.rules import Decision, Layer, Rules, keep_also, select
from mono_quant.planning.walk import module_aliases

_BUILDERS: Mapping[str, Callable[..., Int8Module]] = {
    "linear": Int8Linear,
    "transposed_linear": Int8TransposedLinear,
    "conv1d": Int8Conv1d,
    "conv2d": Int8Conv2d,
    "embedding": Int8Embedding,
    "experts": Int8Experts,
    "attention": Int8MultiheadAttention,
}


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
        old = modules[layer.name]
        put_(model, (layer.name, *layer.aliases), old, build(old, layer.kind, encoded))
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
            encoded[name] = encode_rows(
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
    return _BUILDERS[kind](module, plain)


def install_(model: nn.Module, names: Sequence[str]) -> None:
    """Put empty int8 layers (codes on meta) in place of the named float layers, for loading."""
    aliases = module_aliases(model)
    for name in names:
        module = model.get_submodule(name)
        put_(model, (name, *aliases[id(module)]), module, build(module, kind_of(module), None))
    disable_float_fast_paths_(model)


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


def _record(layer: Layer, encoded: Mapping[str, RowCodes], done: dict[str, Converted]) -> None:
    for name, rows in encoded.items():
        gap = None if rows.sqnr_db == float("inf") else weight_limit_db(rows.codes.shape[1]) - rows.sqnr_db
        done[f"{layer.name}.{name}".lstrip(".")] = Converted(
            rows.codes.numel() + rows.scale.numel() * 4,
            torch.int8,
            None if gap is None else round(rows.sqnr_db, 3),
            None if gap is None else round(gap, 3),
        )
