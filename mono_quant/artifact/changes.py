"""What a report may still say of a model that was changed after the conversion: merged, cast, resized, or of another class."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor, nn

from mono_quant.convert.int8_layers import layers_with_schemes
from mono_quant.convert.stored import StoredModule
from mono_quant.errors import UnsupportedModelError
from mono_quant.hf.names import grouped
from mono_quant.io.text import listed
from mono_quant.planning.config import QuantizationConfig
from mono_quant.planning.report import QuantReport, TensorReport, dtype_name
from mono_quant.planning.walk import tensor_names

_NONE: Mapping[str, Tensor] = MappingProxyType({})
# Why a layer has a scheme that it did not have when it was converted.
_OTHERWISE = "changed after the conversion"
# Values of a tensor by which it is known again.
_SAMPLES = 16
# Of an encoder of sentence-transformers, the part that is its transformer.
_WITHIN = re.compile(r"^\d+\.\w+\.")


def as_it_is(
    report: QuantReport, model: nn.Module, core_name: str = "", samples: Mapping[str, Tensor] = _NONE
) -> QuantReport:
    """Return what is true of a report now; itself where nothing was changed since the conversion.

    Args:
        report: of the conversion, or of the folder that the model was loaded from.
        model: as it will be saved.
        core_name: of the transformer in it.
        samples: of its tensors, as they were when it was converted or loaded.

    Raises:
        UnsupportedModelError: a layer that was int8 is float now.
    """
    tensors = _tensors(model)
    if {row.name for row in report.rows} != tensors.keys():
        report = _of_its_tensors(report, tensors, model, core_name)
    _refuse_replaced(report, tensors)
    report = _with_schemes(_cast_or_resized(report, tensors), model)
    report = _without_stale_measures(report, model, samples)
    report.check(tensors)
    return report


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what a report accounts for, by name: not the scales of what is stored."""
    scales = {
        f"{name}.{held}_scale".lstrip(".")
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, StoredModule)
        for held in module.held
    }
    return {name: tensor for name, tensor, _ in tensor_names(model) if name not in scales}


def _of_its_tensors(
    report: QuantReport, tensors: dict[str, Tensor], model: nn.Module, core_name: str
) -> QuantReport:
    """Return the rows of the tensors that a model has, of a report on another class of model with the same layers."""
    rows = {row.name: row for row in report.rows}
    rows |= {_WITHIN.sub("", name): row for name, row in rows.items() if _WITHIN.sub("", name) not in rows}
    base = getattr(model.get_submodule(core_name), "base_model_prefix", "")
    buffers = {name for name, _, is_buffer in tensor_names(model) if is_buffer}
    now: dict[str, str] = {}
    found: list[TensorReport] = []
    first: dict[int, str] = {}
    fresh = []
    for name, tensor in tensors.items():
        old = next((rows[n] for n in _other_names(name, core_name, base) if n in rows), None)
        shared_with = first.setdefault(id(tensor), name)
        if shared_with != name:
            found.append(_shared(name, found, shared_with))
            continue
        if old is None or old.action == "shared":
            old = rows[old.reason] if old is not None else _new(name, tensor, name in buffers)
            fresh += [name] if old.name == name and name not in rows else []
        now[old.name] = name
        cut = len(old.name) - len(old.module)
        found.append(replace(old, name=name, module=name[:-cut] if old.module else name.rpartition(".")[0]))
    gone = [row.name for row in report.rows if row.name not in now and row.action != "shared"]
    notes = (
        [f"left out, because {type(model).__name__} has no place for them: {grouped(gone)}"] if gone else []
    )
    notes += [f"made anew, not converted: {grouped(fresh)}"] if fresh else []
    return replace(
        report,
        rows=tuple(found),
        fidelity=None,
        fidelity_note="the model that was converted and measured is of another class",
        notes=(*report.notes, *notes),
    )


def _other_names(name: str, core_name: str, base: str) -> Iterator[str]:
    """Yield the names that a tensor may have had in a model with another head, or inside or outside of an encoder."""
    inner = name.removeprefix(f"{core_name}.") if core_name else name
    yield from (name, inner)
    if base:
        yield from (f"{base}.{inner}", inner.removeprefix(f"{base}."))


def _new(name: str, tensor: Tensor, is_buffer: bool) -> TensorReport:
    size, dtype = tensor.numel() * tensor.element_size(), dtype_name(tensor.dtype)
    return TensorReport(
        name=name,
        module=name.rpartition(".")[0],
        kind="added",
        shape=tuple(tensor.shape),
        dtype_before=dtype,
        dtype_after=dtype,
        bytes_before=size,
        bytes_after=size,
        action="kept",
        reason="made anew, not converted",
        is_buffer=is_buffer,
    )


def _shared(name: str, rows: list[TensorReport], shared_with: str) -> TensorReport:
    other = next(row for row in rows if row.name == shared_with)
    return replace(
        other,
        name=name,
        module=name.rpartition(".")[0],
        action="shared",
        reason=shared_with,
        bytes_before=0,
        bytes_after=0,
    )


def _refuse_replaced(report: QuantReport, tensors: dict[str, Tensor]) -> None:
    lost = [
        row.name
        for row in report.quantized
        if row.dtype_after == "int8" and tensors[row.name].dtype != torch.int8
    ]
    if lost:
        raise UnsupportedModelError(
            f"{listed(lost)}: in float now, but int8 when the model was converted or saved. Something replaced the layer, such as "
            f"resize_token_embeddings, or the folder that it was loaded from lacks its codes. Change the float model and convert "
            f"that one (model.dequantize() makes a float model), or fetch the folder again"
        )


def _cast_or_resized(report: QuantReport, tensors: dict[str, Tensor]) -> QuantReport:
    """Take the shape and dtype of what stays in float from the model; of a float16 model the file has other dtypes than memory."""
    if report.dtype != "int8":
        return report
    rows = []
    for row in report.rows:
        tensor = tensors[row.name]
        dtype = row.dtype_after if row.narrowed else dtype_name(tensor.dtype)
        if row.action == "quantized" or (tuple(tensor.shape), dtype) == (row.shape, row.dtype_after):
            rows.append(row)
            continue
        shared = row.action == "shared"
        before, after = (
            0 if shared else tensor.numel() * getattr(torch, d).itemsize for d in (row.dtype_before, dtype)
        )
        rows.append(
            replace(row, shape=tuple(tensor.shape), dtype_after=dtype, bytes_before=before, bytes_after=after)
        )
    return report if list(report.rows) == rows else replace(report, rows=tuple(rows))


def _with_schemes(report: QuantReport, model: nn.Module) -> QuantReport:
    """Take the schemes of activations from the layers, which may have been given others since."""
    layers = layers_with_schemes(model)
    rows = [
        replace(row, activations=layers[row.module].activations, why=_OTHERWISE)
        if row.action == "quantized"
        and row.module in layers
        and layers[row.module].activations != row.activations
        else row
        for row in report.rows
    ]
    if list(report.rows) == rows:
        return report
    note = "" if report.fidelity is None else "the schemes of activations were changed after it was measured"
    schemes = {layer.activations for layer in layers.values()}
    return replace(
        report,
        rows=tuple(rows),
        fidelity=None,
        fidelity_note=note or report.fidelity_note,
        activations="by pattern" if len(schemes) > 1 else schemes.pop(),
    )


def asked_again(config: QuantizationConfig, before: QuantReport, now: QuantReport) -> QuantizationConfig:
    """Return the request that would make a model as it is now.

    Args:
        config: the request that made it.
        before: the report of the conversion, or of the folder that the model was loaded from.
        now: what `as_it_is` made of it.
    """
    if all(row.why != _OTHERWISE for row in now.rows) or now.rows == before.rows:
        return config
    schemes = {row.module: row.activations for row in now.quantized}
    if len(set(schemes.values())) == 1:
        return replace(config, activations=next(iter(schemes.values())))
    return replace(config, activations=tuple(schemes.items()))


def samples_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a few values of every tensor of a model, by name, so that it can be told later whether they are the same.

    What merges, trains or replaces a tensor changes all of it; reading all of it would take as long as loading.
    """
    return {
        name: _sample(tensor)
        for name, tensor, _ in tensor_names(model)
        # values of one byte in floating point have no `take`
        if not tensor.is_meta and tensor.numel() and (tensor.itemsize > 1 or not tensor.is_floating_point())
    }


def _sample(tensor: Tensor) -> Tensor:
    step = max(1, tensor.numel() // _SAMPLES)
    places = torch.arange(0, tensor.numel(), step, device=tensor.device)[:_SAMPLES]
    return torch.take(tensor.detach(), places).cpu()


def _is_as(before: Tensor, tensor: Tensor) -> bool:
    """Tell whether a tensor has the values of a sample still, in whatever dtype."""
    now = _sample(tensor)
    if now.shape != before.shape:
        return False
    return bool(
        torch.isclose(before.to(now.dtype), now, rtol=0, atol=0, equal_nan=now.is_floating_point()).all()
    )


def _written(samples: Mapping[str, Tensor], model: nn.Module) -> set[str]:
    """Return the names of the tensors that have other values than their samples; of scales, that of their codes."""
    now = {name: tensor for name, tensor, _ in tensor_names(model) if not tensor.is_meta}
    other = {name for name in samples.keys() & now.keys() if not _is_as(samples[name], now[name])}
    return {name.removesuffix("_scale") if name.removesuffix("_scale") in now else name for name in other}


def _without_stale_measures(
    report: QuantReport, model: nn.Module, samples: Mapping[str, Tensor]
) -> QuantReport:
    """Drop what was measured before tensors of the model got other values."""
    merged = {
        f"{name}.{held}".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, StoredModule)
        for held in module.changed
    }
    written = sorted(_written(samples, model) - merged)
    if not merged and not written:
        return report
    changed = {*merged, *written}
    rows = (replace(row, sqnr_db=None, gap_db=None) if row.name in changed else row for row in report.rows)
    notes = [f"adapters were merged into {len(merged)} of its weights after the conversion"] if merged else []
    notes += [f"changed after the conversion: {listed(written)}"] if written else []
    return replace(
        report,
        rows=tuple(rows),
        fidelity=None,
        fidelity_note="the model was changed after it was converted and measured",
        notes=(*report.notes, *notes),
    )
