"""Walking over a model: copy its structure, then put int8 layers in place of float ones."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mono_quant.account import Converted
from mono_quant.encoding import encode_rows
from mono_quant.errors import NonFiniteWeightError, UnsupportedModelError
from mono_quant.forwards import StoredModule
from mono_quant.layers import WEIGHTS, kind_of, module_aliases
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
from mono_quant.numerics import RowCodes, weight_limit_db
from mono_quant.selection import Decision, Layer, Rules, keep_also, select

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
    memo |= {id(tensor): tensor.detach().clone() for tensor in _computed(model)}
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, ValueError, AttributeError, NotImplementedError, copy.Error) as e:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be copied ({e}); remove what cannot be copied, or convert it where it is "
            f"with inplace=True"
        ) from e


def _computed(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yield what hooks (weight norm, pruning) keep as attributes: results of autograd, which cannot be deep-copied."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                yield value


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


def put_(model: nn.Module, names: Iterable[str], old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, under all its names, with its training flag and its hooks."""
    new.train(old.training)
    for name in _HOOKS:
        # kept, not dropped: users and libraries rely on them
        vars(new)[name] = vars(old)[name]
    for name in names:
        parent, _, last = name.rpartition(".")
        model.get_submodule(parent)._modules[last] = new


def install_(model: nn.Module, names: Sequence[str]) -> None:
    """Put empty int8 layers (codes on meta) in place of the named float layers, for loading."""
    aliases = module_aliases(model)
    for name in names:
        module = model.get_submodule(name)
        put_(model, (name, *aliases[id(module)]), module, build(module, kind_of(module), None))
    disable_float_fast_paths_(model)


def disable_float_fast_paths_(model: nn.Module) -> None:
    """Keep `nn.TransformerEncoder` from reading the weights of our layers and computing by itself."""
    for module in model.modules():
        if not isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder):
            continue
        if any(isinstance(m, StoredModule) for m in module.modules()):
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False
            else:
                module.activation_relu_or_gelu = 0


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
