"""One conversion, from a source to a measured result with its report."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import nn

from mono_quant import kernels
from mono_quant.api.result import QuantizedModel
from mono_quant.convert import half
from mono_quant.convert.fidelity import Output, compare, digits, peak_activation, run
from mono_quant.convert.int8 import decide, to_int8_
from mono_quant.convert.probes import Probe, ProbeError, given_probe, make_probe
from mono_quant.convert.surgery import Progress, own_memory_, rollback, structural_copy
from mono_quant.errors import ConfigError
from mono_quant.hf.quantizer import mark_int8_
from mono_quant.planning.config import QuantizationConfig
from mono_quant.planning.layers import find_layers
from mono_quant.planning.report import QuantReport
from mono_quant.planning.rows import Converted, account, int8_notes, layer_reasons, survey
from mono_quant.planning.rules import Decision, Layer
from mono_quant.planning.walk import is_transformers_model, tensor_names
from mono_quant.sources.source import Source

# Above this the output is not measured unless asked for: two forward passes of a large model take minutes.
AUTO_FIDELITY_PARAMETERS = 10**9


def convert_source(
    source: Source, request: QuantizationConfig, *, inplace: bool, probe: Any
) -> QuantizedModel:
    layers = layers_of(source)
    names = [name for name, _, _ in tensor_names(source.model)]
    decisions = decide(layers, request.rules(), source.model)
    rows = survey(source.model, layers)
    work = source if inplace else _copy(source)
    reference, note = _reference(work, request, probe)
    with rollback(work.model), _bar(type(source.core).__name__) as progress:
        done, reasons = _apply(work, request, decisions, rows, progress)
        own_memory_(work.model, None if inplace else source.model)
        if request.dtype == "fp16":
            half.compute_in_float_(work.model, work.core_name)
    bits = kernels.activation_bits() if request.dtype == "int8" else None
    complete = account(rows, done, reasons)
    found = int8_notes(complete, work.model) if request.dtype == "int8" else ()
    notes = (*source.notes, *_memory_notes(work.model, done, request), *found)
    report = QuantReport(request.dtype, complete, bits, notes=notes)
    report.check(names)
    report = _measured(report, work, reference, note)
    return QuantizedModel(work.model, report, request, work)


def layers_of(source: Source) -> list[Layer]:
    """Find the layers of the whole model; only those of its core can be converted."""
    prefix = source.core_name
    if not prefix:
        return find_layers(source.model)
    inside = [replace(x, name=f"{prefix}.{x.name}") for x in find_layers(source.core)]
    outside = [
        replace(x, unsupported=f"outside the transformer of the {type(source.model).__name__}")
        for x in find_layers(source.model)
        if not x.name.startswith(f"{prefix}.")
    ]
    return inside + outside


def _copy(source: Source) -> Source:
    model = structural_copy(source.model)
    return replace(source, model=model, core=model.get_submodule(source.core_name))


def _apply(
    work: Source,
    request: QuantizationConfig,
    decisions: Mapping[str, Decision],
    rows: Mapping[str, Any],
    progress: Progress,
) -> tuple[Mapping[str, Converted], Mapping[str, str]]:
    if request.dtype == "fp16":
        reasons, done = half.to_half_(
            work.model,
            request.rules(),
            within=work.core_name,
            on_nonfinite=request.on_nonfinite,
            on_overflow=request.on_overflow,
            progress=progress,
        )
        return done, reasons
    final, done = to_int8_(work.model, decisions, on_nonfinite=request.on_nonfinite, progress=progress)
    if is_transformers_model(work.core):
        mark_int8_(work.core)
    return done, layer_reasons(rows, final)


def _reference(
    work: Source, request: QuantizationConfig, given: Any
) -> tuple[tuple[Probe, Output] | None, str]:
    """Run the float model on the probe, or say why not."""
    if request.fidelity is False:
        return None, "not asked for"
    parameters = sum(p.numel() for p in work.core.parameters())
    if request.fidelity == "auto" and given is None and parameters > AUTO_FIDELITY_PARAMETERS:
        return None, f"{parameters:,} parameters; ask for it with fidelity=True"
    try:
        if given is not None:
            probe, model = given_probe(given), work.model
        else:
            model = work.core
            probe = make_probe(model, _processor(work))
        return (probe, run(model, probe)), ""
    except ProbeError as e:
        if request.fidelity is True or given is not None:
            raise ConfigError(
                f"the output cannot be measured: {e}; pass other inputs as probe=, or fidelity=False"
            ) from e
        return None, str(e)


def _processor(work: Source) -> Any:
    if work.processor is None and work.kind == "sentence_transformer":
        return getattr(work.model, "tokenizer", None)
    return work.find_processor()


def _measured(
    report: QuantReport,
    work: Source,
    reference: tuple[Probe, Output] | None,
    note: str,
) -> QuantReport:
    if reference is None:
        return report.with_fidelity(None, note)
    probe, expected = reference
    device = next((p.device for p in work.model.parameters()), torch.device("cpu"))
    model = work.model if probe.args or probe.name == "the given inputs" else work.core
    try:
        if report.dtype == "int8":
            facts = compare(expected, run(model, probe), probe.name)
            if kernels.activation_bits(device) > 8:
                with kernels.using(bits=8):
                    narrow = compare(expected, run(model, probe), probe.name)
                facts["relative_error_8_bit"] = narrow["relative_error"]
            return report.with_fidelity(facts, kernel=kernels.describe(device))
        with peak_activation(model) as peak:
            output = run(model, probe)
        facts = compare(expected, output, probe.name) | {"peak_activation": digits(peak[0])}
        return report.with_fidelity(facts, kernel=kernels.describe_half(device))
    except ProbeError as e:
        return report.with_fidelity(None, f"the converted model: {e}")


def _memory_notes(
    model: nn.Module, done: Mapping[str, Converted], request: QuantizationConfig
) -> Iterator[str]:
    """Say where a float16 model needs more memory than its file."""
    if request.dtype != "fp16":
        return
    count, classes = half.widened(model, done)
    if classes:
        yield (
            f"in memory {count:,} of the float16 values are float32, because {', '.join(classes)} runs in float32"
        )


@contextmanager
def _bar(name: str) -> Iterator[Progress]:
    """Show a progress bar on a terminal; `HF_HUB_DISABLE_PROGRESS_BARS` switches it off."""
    with tqdm(desc=f"Converting {name}", unit="layer", disable=None, leave=False, name="mono_quant") as bar:

        def progress(layer: str, done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress
