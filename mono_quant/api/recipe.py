"""One conversion, from a source to a measured result with its report."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mono_quant.api.measuring import probe_for, suggestion
from mono_quant.api.result import QuantizedModel
from mono_quant.artifact.keeping import keep_
from mono_quant.convert.contract import Decisions, Outcome, Progress, Scheme, Task, device_of
from mono_quant.convert.fidelity import Output, run
from mono_quant.convert.int8 import keep_unfinite
from mono_quant.convert.int8_layers import layers_with_schemes, put_scheme_
from mono_quant.convert.probes import Probe, ProbeError
from mono_quant.convert.schemes import ARRIVALS, SCHEMES
from mono_quant.convert.surgery import own_memory_, recast_, rollback, structural_copy
from mono_quant.errors import ConfigError, Option, Words
from mono_quant.hf.models import given_dtypes
from mono_quant.io.memory import uncollected
from mono_quant.io.phases import phase
from mono_quant.planning.config import QuantizationConfig
from mono_quant.planning.layers import declared_float32
from mono_quant.planning.report import QuantReport
from mono_quant.planning.rows import as_shared
from mono_quant.planning.schemes import MEASURED
from mono_quant.planning.suggestion import Suggestion
from mono_quant.planning.walk import common_dtype, tensor_names
from mono_quant.sources.source import Source, Stored, Subject

# Above this the output is not measured unless asked for: two forward passes of a large model take minutes.
AUTO_FIDELITY_PARAMETERS = 10**9
NOT_ASKED = "not asked for"


@uncollected()
def plan_source(source: Source, request: QuantizationConfig) -> QuantReport:
    """Return the report of what a conversion would do, as far as it can be told without the values."""
    scheme = SCHEMES[request.dtype]
    task, decisions = decided(source, source.subject, request)
    rows = scheme.planned(task, decisions).rows(task)
    asked = request.activations_summary if request.dtype == "int8" else ""
    notes = (*source.notes, *scheme.notes(task, rows, None))
    return QuantReport(request.dtype, rows, asked, notes=notes, planned=True)


def decided(source: Source, work: Subject, request: QuantizationConfig) -> tuple[Task, Decisions]:
    """Return the task of a conversion, and what is decided about every layer.

    Args:
        source: what the user gave.
        work: the model that will be changed, which is built like it.
        request: what the user asks for.
    """
    scheme = SCHEMES[request.dtype]
    task = Task.of(work.model, work.core_name, request, _floats(source, scheme, request))
    return task, scheme.decide(task)


def convert_source(
    source: Source, request: QuantizationConfig, *, inplace: bool, probe: Any
) -> QuantizedModel:
    """Convert a source and measure the result.

    Args:
        source: is left as it is, unless `inplace`.
        request: what the user asks for.
        inplace: convert the model of the source itself; it is put back when that fails.
        probe: inputs that the user gave to measure with, or None.
    """
    scheme, stored = SCHEMES[request.dtype], source.stored
    if stored is not None and request.dtype not in ARRIVALS:
        with phase("Loading the model"):
            source, stored, inplace = source.read(), None, True
    work = source.subject if inplace or stored else _copy(source.subject)
    task, decisions = decided(source, work, request)
    names = [name for name, _, _ in tensor_names(work.model)]
    seen: set[str] = set()
    reference, note = None, why_unmeasured(work.core, request, probe)
    if not note:
        # of weights that are in files, the float copy goes before the int8 one is made
        original = work if stored is None else _loaded(work, stored)
        opened = nullcontext(_as_loaded(original, source.dtypes))
        reference, note = reference_of(opened, request, probe, seen)
        del opened
        work = replace(original, model=work.model)
        del original
    if seen:
        task = replace(task, written=task.written | seen)
        decisions = scheme.decide(task)
    # what nobody else holds need not come back, and goes as it is converted
    guard = nullcontext() if source.owned else rollback(work.model)
    with guard:
        with _bar(type(work.core).__name__) as progress:
            if stored is None:
                outcome = scheme.apply_(task, decisions, progress)
            else:
                work.model, outcome = _arrived(stored, task, decisions, progress)
                task = replace(task, model=work.model)
        own_memory_(work.model, None if inplace or stored else source.subject.model)
        report = finished(task, outcome, names, source.notes)
        if request.activations == MEASURED:
            report = _widened_(work, report, suggestion(work, probe))
    report = measured(report, scheme, nullcontext(work), reference, note)
    keep_(work, request.dtype, report, request)
    return QuantizedModel(work.model, report, request, work)


def finished(task: Task, outcome: Outcome, names: Sequence[str], notes: Sequence[str]) -> QuantReport:
    """Make a converted model run, and return the report of what became of it.

    Args:
        task: with the converted model.
        outcome: of the conversion.
        names: of the tensors that the model had before.
        notes: what the user should know of the source.
    """
    scheme = SCHEMES[task.request.dtype]
    task = replace(task, rows=as_shared(task.rows, task.model))
    rows = scheme.finish_(task, outcome).rows(task)
    auto = scheme.auto(device_of(task.model))
    report = QuantReport(
        task.request.dtype,
        rows,
        task.request.activations_summary if auto else "",
        auto_activations=auto,
        notes=(*notes, *scheme.notes(task, rows, task.model)),
    )
    report.check(names)
    return report


def _loaded(work: Subject, stored: Stored) -> Subject:
    """Read the float model, to be measured."""
    with phase("Loading the original"):
        return replace(work, model=stored.fill(None))


def _arrived(
    stored: Stored, task: Task, decisions: Decisions, progress: Progress
) -> tuple[nn.Module, Outcome]:
    """Convert weights while they are read from their files."""
    if task.request.on_nonfinite == "keep":
        decisions = keep_unfinite(decisions, stored.unfinite())
    arrival = ARRIVALS[task.request.dtype](task, decisions, progress)
    return stored.fill(arrival), arrival.outcome()


def _floats(source: Source, scheme: Scheme, request: QuantizationConfig) -> dict[str, torch.dtype]:
    """Return the dtype of the tensors that get another one than the scheme gives them, by name."""
    core, prefix = source.subject.core, source.subject.core_name
    lifted = "keep_in_fp32" in request.disable_defaults
    if scheme.floats is None and source.dtypes:
        found = dict(source.dtypes)
    elif lifted:
        found = {}
    elif scheme.floats is not None:
        found = given_dtypes(core, scheme.floats)
    else:
        common = common_dtype((p.dtype, p.numel()) for p in core.parameters())
        found = dict.fromkeys(declared_float32(core, common), torch.float32)
    known = {name for name, tensor, _ in tensor_names(core) if tensor.is_floating_point()}
    return {f"{prefix}.{name}".lstrip("."): dtype for name, dtype in found.items() if name in known}


def _as_loaded(subject: Subject, dtypes: Mapping[str, torch.dtype]) -> Subject:
    """Return a model that runs, where a mixture of dtypes in the files would not: as transformers loads it."""
    if all(dtypes.get(name, tensor.dtype) == tensor.dtype for name, tensor, _ in tensor_names(subject.core)):
        return subject
    twin = _copy(subject)
    recast_(twin.core, dtypes)
    return twin


def _copy(subject: Subject) -> Subject:
    return replace(subject, model=structural_copy(subject.model))


def why_unmeasured(core: nn.Module, request: QuantizationConfig, given: Any) -> str:
    """Return why the output is not measured; empty when it is."""
    if request.fidelity is False:
        return NOT_ASKED
    parameters = sum(p.numel() for p in core.parameters())
    if request.fidelity == "auto" and given is None and parameters > AUTO_FIDELITY_PARAMETERS:
        return Words(f"{parameters:,} parameters; ask for it with ", Option("fidelity", True))
    return ""


def reference_of(
    opened: AbstractContextManager[Subject], request: QuantizationConfig, given: Any, written: set[str]
) -> tuple[tuple[Probe, Output] | None, str]:
    """Run the float model on a probe, or say why not.

    Args:
        opened: gives it, in the dtypes that it runs in.
        request: what the user asks for.
        given: inputs that the user gave to measure with, or None.
        written: gets the names of the tensors that the model writes into.

    Raises:
        ConfigError: it cannot be measured, and the request insists on it.
    """
    try:
        with opened as original:
            probe, model = probe_for(original, given)
            return (probe, _run(original, model, probe, written)), ""
    except ProbeError as e:
        if request.fidelity is True or given is not None:
            raise ConfigError(
                f"the output cannot be measured: {e}; pass other inputs as ",
                Option("probe"),
                ", or ",
                Option("fidelity", False),
            ) from e
        return None, str(e)


def _run(subject: Subject, model: nn.Module, probe: Probe, written: set[str]) -> Output:
    prefix = "" if model is subject.model else f"{subject.core_name}."
    found: set[str] = set()
    try:
        with phase("Measuring the original"):
            return run(model, probe, found)
    finally:
        written |= {prefix + name for name in found}


def measured(
    report: QuantReport,
    scheme: Scheme,
    opened: AbstractContextManager[Subject],
    reference: tuple[Probe, Output] | None,
    note: str,
) -> QuantReport:
    """Return a report with how close the converted model is, or why that was not measured.

    Args:
        report: of the conversion.
        scheme: of its dtype.
        opened: gives the converted model; is asked only where there is something to compare with.
        reference: what the float model was run on, and gave; see `reference_of`.
        note: why there is none.
    """
    if reference is None:
        return report.with_fidelity(None, note)
    probe, expected = reference
    try:
        with opened as work, phase("Measuring the result"):
            model = work.model if probe.args or probe.name == "the given inputs" else work.core
            facts = scheme.measure(model, probe, expected)
            kernel = scheme.kernel(device_of(model))
    except ProbeError as e:
        return report.with_fidelity(None, f"the converted model: {e}")
    return report.with_fidelity(facts, kernel=kernel)


def _widened_(work: Subject, report: QuantReport, found: Suggestion) -> QuantReport:
    """Give the layers of a suggestion their scheme, and return the report that says so."""
    choices, layers = found.choices(), layers_with_schemes(work.model)
    for name, choice in choices.items():
        put_scheme_(layers[name], choice.scheme)
    rows = (
        replace(row, activations=choices[row.module].scheme, why=choices[row.module].reason)
        if row.action == "quantized" and row.module in choices
        else row
        for row in report.rows
    )
    note = f"activations were measured on {found.probe}: {found.verdict}"
    return replace(report, rows=tuple(rows), notes=(*report.notes, note))


@contextmanager
def _bar(name: str) -> Iterator[Progress]:
    with phase(f"Converting {name}") as went:
        yield lambda layer, done, total: went(done, total)
