"""Putting int8 layers in the place of float ones: what that would make, doing it, and empty layers for loading."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mono_quant import kernels
from mono_quant.convert import kept
from mono_quant.convert.contract import Decisions, Outcome, Progress, Scheme, Task, device_of, recast
from mono_quant.convert.fidelity import Output, compare, run
from mono_quant.convert.halves import memory_notes
from mono_quant.convert.int8_layers import (
    Int8Conv1d,
    Int8Conv2d,
    Int8Embedding,
    Int8Experts,
    Int8Linear,
    Int8Module,
    Int8MultiheadAttention,
    Int8TransposedLinear,
    layers_with_schemes,
    put_scheme_,
)
from mono_quant.convert.int8_recurrent import (
    Int8GRU,
    Int8GRUCell,
    Int8LSTM,
    Int8LSTMCell,
    Int8RNN,
    Int8RNNCell,
)
from mono_quant.convert.probes import Probe
from mono_quant.convert.surgery import clash, disable_float_fast_paths_, put_, recast_, relink_
from mono_quant.errors import CorruptCheckpointError, Name, NonFiniteWeightError, Option, Words
from mono_quant.kernels import encode_rows
from mono_quant.kernels.weights import RowCodes, stored_scale, weight_limit_db
from mono_quant.planning.kinds import as_rows, kind_of, obstacle, rows_of
from mono_quant.planning.report import TensorReport
from mono_quant.planning.rows import Converted, int8_notes, layer_reasons
from mono_quant.planning.rules import Decision, Layer, keep_also, select
from mono_quant.planning.schemes import Choice, blocks_of, check_patterns, choose, without_layer
from mono_quant.planning.walk import module_aliases
from mono_quant.planning.writes import WRITTEN

# Measured beside what a model runs with: what other engines do, and the most accurate; larger models get the first alone, as
# every one costs a forward pass.
COMPARED = ("int8", "int12")
CHEAP_PARAMETERS = 10**9

# By kind of layer.
INT8_LAYERS: Mapping[str, Callable[..., Int8Module]] = {
    layer.kind: layer
    for layer in (
        Int8Linear,
        Int8TransposedLinear,
        Int8Conv1d,
        Int8Conv2d,
        Int8Embedding,
        Int8Experts,
        Int8MultiheadAttention,
        Int8LSTM,
        Int8GRU,
        Int8RNN,
        Int8LSTMCell,
        Int8GRUCell,
        Int8RNNCell,
    )
}


def decide(task: Task) -> dict[str, Decision]:
    """Decide about every layer by the rules, with patterns checked against every module of the model."""
    names = {name: type(module).__name__ for name, module in task.model.named_modules()}
    possible = [layer for layer in task.layers if not layer.unsupported]
    check_patterns(_names(possible).values(), task.request.asked_activations)
    chosen = select(task.layers, task.request.rules(), names)
    reasons = {name: _why_not(task, d.layer) for name, d in chosen.items() if d.quantize}
    return keep_also(chosen, {name: reason for name, reason in reasons.items() if reason})


def _why_not(task: Task, layer: Layer) -> str:
    if task.writes_into((layer.name, *layer.aliases), layer.matrices):
        return WRITTEN
    return clash(task.model.get_submodule(layer.name), INT8_LAYERS[layer.kind])


def to_int8_(task: Task, decisions: Decisions, progress: Progress) -> Outcome:
    """Replace the chosen layers of a model by int8 ones, in place.

    Args:
        task: its model is changed.
        decisions: by layer name.
        progress: called as (layer name, done, total).

    Raises:
        NonFiniteWeightError: a chosen weight holds NaN or infinity, and the request does not keep such layers.
    """
    model = task.model
    recast_(model, task.floats)
    modules = dict(model.named_modules())
    if task.request.on_nonfinite == "keep":
        decisions = keep_unfinite(decisions, _non_finite(modules, decisions))
    done: dict[str, Converted] = {}
    replaced: dict[nn.Module, nn.Module] = {}
    chosen = [d.layer for d in decisions.values() if d.quantize]
    for count, layer in enumerate(chosen):
        progress(layer.name, count, len(chosen))
        old = modules[layer.name]
        encoded = encode(old, layer)
        record(old, layer, encoded, done)
        replaced[old] = put_int8_(model, (layer.name, *layer.aliases), old, layer.kind, encoded)
    relink_(model, replaced)
    return outcome_of(task, decisions, done)


def outcome_of(task: Task, decisions: Decisions, done: Mapping[str, Converted]) -> Outcome:
    """Return what becomes of the tensors of a model of which these became int8; the rest keeps the reasons decided on."""
    others = recast(task)
    return Outcome({**others.done, **done}, {**others.reasons, **layer_reasons(task.rows, decisions)})


def encode(module: nn.Module, layer: Layer) -> dict[str, RowCodes]:
    """Return the int8 codes of a layer's weights by parameter name.

    Raises:
        NonFiniteWeightError: naming the tensor.
    """
    return {name: encode_weight(module.get_parameter(name).detach(), layer, name) for name in layer.matrices}


def encode_weight(weight: torch.Tensor, layer: Layer, name: str) -> RowCodes:
    """Return the int8 codes of the parameter `name` of a layer.

    Raises:
        NonFiniteWeightError: naming the tensor.
    """
    try:
        return encode_rows(as_rows(weight, layer.kind))
    except NonFiniteWeightError as e:
        raise NonFiniteWeightError(
            f"{layer.name}.{name}: {e}. Repair the checkpoint, or keep the layer in float with ",
            Option("on_nonfinite", "keep"),
        ) from e


def _non_finite(modules: Mapping[str, nn.Module], decisions: Mapping[str, Decision]) -> set[str]:
    """Return the names of the weights chosen that hold NaN or infinity."""
    return {
        f"{name}.{weight}".lstrip(".")
        for name, decision in decisions.items()
        if decision.quantize
        for weight in decision.layer.matrices
        if not _is_finite(modules[name].get_parameter(weight).detach())
    }


def _is_finite(weight: torch.Tensor) -> bool:
    # of weights that are in files, whoever reads them says so
    return weight.is_meta or bool(torch.isfinite(weight.float()).all())


def keep_unfinite(decisions: Decisions, names: Collection[str]) -> Decisions:
    """Keep every layer that holds one of the named weights, which are not finite, and what is decided together with it."""
    found = {
        name: "its weight holds NaN or infinity"
        for name, decision in decisions.items()
        if decision.quantize
        if any(f"{name}.{weight}".lstrip(".") in names for weight in decision.layer.matrices)
    }
    return keep_also(decisions, found)


def build(module: nn.Module, kind: str, encoded: dict[str, RowCodes] | None) -> Int8Module:
    """Return the int8 layer for a float one; its codes are on meta when there are none yet."""
    # the layers with one weight take its codes alone
    only = None if encoded is None else encoded.get("weight")
    return INT8_LAYERS[kind](module, encoded if only is None else only)


def put_int8_(
    model: nn.Module, names: Sequence[str], old: nn.Module, kind: str, encoded: dict[str, RowCodes] | None
) -> Int8Module:
    """Put the int8 layer for a float one in its place, under all its names, and return it."""
    new = build(old, kind, encoded)
    put_(model, names, old, new)
    return new


def install_(model: nn.Module, names: Sequence[str]) -> None:
    """Put empty int8 layers (codes on meta) in place of the named float layers, for loading.

    Raises:
        CorruptCheckpointError: one of the layers cannot be int8.
    """
    aliases = module_aliases(model)
    replaced: dict[nn.Module, nn.Module] = {}
    for name in names:
        module = model.get_submodule(name)
        kind = kind_of(module)
        problem = obstacle(module, kind) or clash(module, INT8_LAYERS[kind])
        if problem:
            raise CorruptCheckpointError(
                f"{name} has int8 codes, but that layer of {type(model).__name__} cannot hold them: {problem}. "
                f"Load it into the architecture that was saved"
            )
        replaced[module] = put_int8_(model, (name, *aliases[id(module)]), module, kind, None)
    relink_(model, replaced)
    disable_float_fast_paths_(model)


def planned(task: Task, decisions: Decisions) -> Outcome:
    """Return what `to_int8_` would make of the chosen layers; needs shapes only."""
    done = {}
    for decision in decisions.values():
        layer = decision.layer
        module = task.model.get_submodule(layer.name)
        for name in layer.matrices if decision.quantize else ():
            weight = module.get_parameter(name)
            full = f"{layer.name}.{name}".lstrip(".")
            # see `stored_scale`; that float16 cannot hold them is seen in their values alone
            size = min(4, task.floats.get(full, weight.dtype).itemsize)
            scales = size * rows_of(weight.shape, layer.kind).numel()
            done[full] = Converted(weight.numel() + scales, torch.int8)
    chosen = [decision.layer for decision in decisions.values() if decision.quantize]
    return kept.planned(task, _with_schemes(task, chosen, outcome_of(task, decisions, done)))


def finish_(task: Task, outcome: Outcome) -> Outcome:
    """Store what stayed in float as it is asked for, choose how activations become codes, and make the model run; see `Scheme`."""
    outcome = kept.narrow_(task, outcome)
    disable_float_fast_paths_(task.model)
    made = layers_with_schemes(task.model)
    chosen = [layer for layer in task.layers if layer.name in made]
    for name, choice in _choices(task, chosen).items():
        put_scheme_(made[name], choice.scheme)
    return _with_schemes(task, chosen, outcome)


def _names(layers: Iterable[Layer]) -> dict[str, tuple[str, ...]]:
    """Return all names of the layers that quantize activations."""
    return {layer.name: (layer.name, *layer.aliases) for layer in layers if layer.kind != "embedding"}


def _choices(task: Task, layers: Iterable[Layer]) -> dict[str, Choice]:
    return choose(_names(layers), task.request.asked_activations, blocks_of(task.model))


def _with_schemes(task: Task, layers: Sequence[Layer], outcome: Outcome) -> Outcome:
    """Note the schemes of layers with what became of their weights."""
    choices, done = _choices(task, layers), dict(outcome.done)
    for layer in layers:
        for name in layer.matrices if layer.name in choices else ():
            full = f"{layer.name}.{name}".lstrip(".")
            done[full] = replace(done[full], choice=choices[layer.name])
    return Outcome(done, outcome.reasons)


def notes(task: Task, rows: Sequence[TensorReport], model: nn.Module | None) -> Iterator[str]:
    """Yield what a user must not overlook; see `Scheme`."""
    yield from int8_notes(rows, model, task.unsound)
    yield from memory_notes([row for row in rows if row.narrowed], model)
    became = {row.module for row in rows if row.action == "quantized"}
    chosen = _names(layer for layer in task.layers if layer.name in became)
    idle = list(without_layer(chosen, task.request.asked_activations))
    if idle:
        yield Words(f"no layer that {', '.join(idle)} of ", Name("activations"), " names became int8")


def measure(model: nn.Module, probe: Probe, expected: Output) -> dict[str, Any]:
    """Compare the output with the original's, and what it would be with other schemes in all layers.

    These are the one that other engines run, and the most accurate one.
    """
    facts = compare(expected, run(model, probe), probe.name)
    used = schemes_that_run(model)
    errors = {}
    for scheme in COMPARED if used else ():
        if used == {scheme}:
            errors[scheme] = facts["relative_error"]
        elif scheme == COMPARED[0] or sum(p.numel() for p in model.parameters()) <= CHEAP_PARAMETERS:
            with all_as(model, scheme):
                errors[scheme] = compare(expected, run(model, probe), probe.name)["relative_error"]
    return facts | ({"relative_error_by_scheme": errors} if errors else {})


def schemes_that_run(model: nn.Module) -> set[str]:
    """Return the schemes by which activations become codes in a model where it is."""
    device = device_of(model)
    layers = layers_with_schemes(model).values()
    return {kernels.activation_scheme(layer.activations, device) for layer in layers}


@contextmanager
def all_as(model: nn.Module, scheme: str) -> Iterator[None]:
    """Let all layers make codes by one scheme while the context lasts."""
    layers = layers_with_schemes(model).values()
    before = [(layer, layer.activations) for layer in layers]
    try:
        for layer in layers:
            put_scheme_(layer, scheme)
        yield
    finally:
        for layer, own in before:
            put_scheme_(layer, own)


def record(old: nn.Module, layer: Layer, encoded: Mapping[str, RowCodes], done: dict[str, Converted]) -> None:
    """Note what became of the weights of a float layer, by their names in the model."""
    for name, rows in encoded.items():
        scale = stored_scale(rows.scale, old.get_parameter(name).dtype)
        done[f"{layer.name}.{name}".lstrip(".")] = Converted(
            rows.codes.numel() + scale.numel() * scale.element_size(),
            torch.int8,
            *lost(rows.sqnr_db, rows.codes.shape[1]),
        )


def lost(sqnr: float, depth: int) -> tuple[float | None, float | None]:
    """Return what a report says of codes: their SQNR in dB, and how far it is from what Gaussian rows reach; None for no loss.

    Args:
        sqnr: of the whole weight.
        depth: length of its rows.
    """
    if sqnr == float("inf"):
        return None, None
    return round(sqnr, 3), round(weight_limit_db(depth) - sqnr, 3)


INT8 = Scheme(
    "int8",
    floats=None,
    decide=decide,
    planned=planned,
    apply_=to_int8_,
    finish_=finish_,
    notes=notes,
    measure=measure,
    kernel=kernels.describe,
    auto=lambda device: kernels.activation_scheme(kernels.AUTO, device),
)
