"""What a conversion from files to files will write: the same decisions, names and layouts as for a model in memory.

The model is a skeleton on meta. It is converted as any other model, codes and scales being on meta as well; what `save` would
put into the weight files of the result is then looked up in the source, tensor by tensor.
"""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from mono_quant.api.origins import find_origins
from mono_quant.api.recipe import decided, finished
from mono_quant.artifact.saving import MAX_SHARD_SIZE, weights_to_save
from mono_quant.convert.contract import Decisions, Outcome, Task
from mono_quant.convert.halves import overflow, unfinite
from mono_quant.convert.int8 import keep_unfinite, lost
from mono_quant.convert.schemes import SCHEMES
from mono_quant.convert.surgery import structural_copy
from mono_quant.errors import ConfigError, Name, NonFiniteWeightError, Option
from mono_quant.hf.sentence import settings_of
from mono_quant.io.memory import uncollected
from mono_quant.kernels.weights import sqnr_db
from mono_quant.planning.config import HALVES, QuantizationConfig
from mono_quant.planning.kinds import rows_of
from mono_quant.planning.report import QuantReport, dtype_name
from mono_quant.planning.schemes import MEASURED
from mono_quant.planning.walk import tensor_names
from mono_quant.sources.source import Source, Subject
from mono_quant.stream.layout import shards_of
from mono_quant.stream.spec import Found, Piece, Seen, ShardPlan, summed


@dataclass(frozen=True)
class StreamPlan:
    """A conversion from files to files.

    Attributes:
        task: with the converted skeleton.
        subject: the skeleton with what belongs to it.
        outcome: of the conversion, without what only values say.
        report: of it.
        request: what the user asks for.
        shards: the files with weights.
        stem: of their names.
    """

    task: Task
    subject: Subject
    outcome: Outcome
    report: QuantReport
    request: QuantizationConfig
    shards: tuple[ShardPlan, ...]
    stem: str

    def weight_map(self) -> dict[str, str]:
        """Return which file holds which tensor."""
        return {name: shard.file for shard in self.shards for name in shard.tensors}

    def total_bytes(self) -> int:
        """Return the size of all tensors together."""
        return sum(shard.size - len(shard.header) for shard in self.shards)


@uncollected()
def plan_stream(
    source: Source,
    pieces: Mapping[str, Piece],
    request: QuantizationConfig,
    found: Found,
    seen: Mapping[str, Seen],
    max_shard_size: int | str = MAX_SHARD_SIZE,
    written: Iterable[str] = (),
) -> StreamPlan:
    """Decide what a conversion from files to files writes.

    Args:
        source: with a skeleton in it; stays as it is.
        pieces: where the tensors of the checkpoint lie, by name.
        request: what the user asks for.
        found: what is known of the values.
        seen: sums over the values of the tensors that `found` names.
        max_shard_size: see `save`.
        written: names of the tensors that a run has written into.

    Raises:
        NonFiniteWeightError, Fp16RangeError: values were found that the request does not let pass.
        UnsupportedModelError: a tensor of the result is not made of one of the source.
        ConfigError: the request needs the model in memory.
    """
    if request.activations == MEASURED:
        raise ConfigError(
            Name("activations"),
            " is 'measured', which needs the model in memory; name a scheme, or leave out ",
            Option("stream", True),
        )
    scheme = SCHEMES[request.dtype]
    work = replace(source.subject, model=structural_copy(source.subject.model))
    if work.kind == "sentence_transformer":
        # they name its tokenizer, of which a copy has another one
        work = replace(work, settings=settings_of(work.model))
    task, decisions = decided(source, work, request)
    if written:
        task = replace(task, written=task.written.union(written))
        decisions = scheme.decide(task)
    _refuse(decisions, found, seen, request)
    task = replace(task, unfit=_unfit(found, seen, request))
    decisions = keep_unfinite(decisions, found.unfinite) if request.dtype == "int8" else decisions
    names = tuple(name for name, _, _ in tensor_names(work.model))
    outcome = scheme.apply_(task, decisions, _silent)
    report = finished(task, outcome, names, source.notes)
    entries, stem = weights_to_save(work, report)
    # what is tied has codes under the name of one layer
    kinds = {row.name: row.kind for row in report.rows if row.action == "quantized"}
    codes = {entry.name for entry in entries if entry.dtype == torch.int8}
    scales = {f"{name}_scale" for name in codes}
    names_in_file = {entry.name for entry in entries} - scales
    pieces = _as_loaded(source, pieces, kinds, task.floats)
    origins = find_origins(source, pieces, names_in_file, kinds)
    entries = [replace(e, dtype=torch.float32) if e.name in found.wide else e for e in entries]
    fits = _would_be_cast(task, decisions, report) if request.dtype == "fp16" else {}
    shards = shards_of(entries, origins, kinds, max_shard_size, stem, fits)
    wide = {part.weight for name in found.wide for part in origins[name.removesuffix("_scale")].parts}
    report = _widened(report, wide)
    return StreamPlan(task, work, outcome, report, request, shards, stem)


def _as_loaded(
    source: Source, pieces: Mapping[str, Piece], codes: Container[str], floats: Mapping[str, torch.dtype]
) -> Mapping[str, Piece]:
    """Let weights that become codes be read in the dtype that they are loaded in, where a file has another one.

    Args:
        source: see `plan_stream`.
        pieces: see there.
        codes: names in the model of the weights that become int8.
        floats: dtype of tensors that get another one than the file has, by name in the model.
    """
    prefix = f"{source.subject.core_name}." if source.subject.core_name else ""
    found = dict(pieces)
    for name, keys in source.placed.sources.items():
        dtype = floats.get(f"{prefix}{name}")
        if dtype is None or f"{prefix}{name}" not in codes:
            continue
        for key in keys:
            if (pieces[key].read_as or pieces[key].dtype) != dtype_name(dtype):
                found[key] = pieces[key]._replace(read_as=dtype_name(dtype))
    return found


def with_values(plan: StreamPlan, seen: Sequence[Seen], notes: Sequence[str]) -> QuantReport:
    """Return the report of a conversion that was carried out.

    Args:
        plan: of it.
        seen: one per job.
        notes: of the source.
    """
    sums = summed(seen)
    rows = []
    for row in plan.report.rows:
        values = sums.get(row.name)
        if values is not None and row.action == "quantized" and row.dtype_after == "int8":
            depth = torch.Size(row.shape).numel() // max(1, rows_of(torch.Size(row.shape), row.kind).numel())
            sqnr, gap = lost(sqnr_db(values.signal, values.noise), depth)
            rows.append(replace(row, sqnr_db=sqnr, gap_db=gap))
        elif values is not None and row.dtype_after in _HALVES:
            rows.append(replace(row, flushed=values.flushed))
        else:
            rows.append(row)
    unsound = {name: values.nan > 0 for name, values in sums.items() if values.unfinite}
    task = replace(plan.task, unsound=unsound)
    said = (*notes, *SCHEMES[plan.request.dtype].notes(task, rows, plan.task.model))
    return replace(plan.report, rows=tuple(rows), notes=said)


_HALVES = {dtype_name(dtype) for dtype in HALVES.values()}


def _silent(name: str, done: int, total: int) -> None:
    del name, done, total


def _refuse(
    decisions: Decisions, found: Found, seen: Mapping[str, Seen], request: QuantizationConfig
) -> None:
    """Refuse values that the request does not let pass; what stays in float may hold anything."""
    if request.dtype != "int8" or request.on_nonfinite == "keep":
        return
    chosen = {
        f"{layer}.{weight}".lstrip(".")
        for layer, decision in decisions.items()
        for weight in decision.layer.matrices
        if decision.quantize
    }
    for name in sorted(found.unfinite & chosen):
        raise NonFiniteWeightError(
            f"{name}: {seen[name].unfinite} values are NaN or infinite. Repair the checkpoint, or keep the layer in float with ",
            Option("on_nonfinite", "keep"),
        )


def _unfit(found: Found, seen: Mapping[str, Seen], request: QuantizationConfig) -> dict[str, str]:
    """Return why tensors are not cast to half precision."""
    dtype = torch.float16 if request.dtype == "fp16" else HALVES.get(request.kept, torch.float16)
    # what stays in float beside int8 may hold anything
    asked = request if request.dtype == "fp16" else replace(request, on_nonfinite="keep")
    unfit = {
        name: unfinite(name, f"{seen[name].unfinite} values are NaN or infinite", asked)
        for name in sorted(found.unfinite)
    }
    for name in sorted(found.overflowed):
        unfit[name] = overflow(name, seen[name].overflowed, seen[name].largest, request, dtype)
    return unfit


def _would_be_cast(task: Task, decisions: Decisions, report: QuantReport) -> dict[str, str]:
    """Return the tensors that stay as they are for no other reason than values of tensors beside them, with the dtype otherwise."""
    chosen = {layer for layer, decision in decisions.items() if decision.quantize}
    names = {
        row.name
        for row in report.rows
        if row.action == "kept"
        and row.module in chosen
        and getattr(torch, row.dtype_before).is_floating_point
    }
    return dict.fromkeys(names - task.floats.keys() - task.unfit.keys(), dtype_name(torch.float16))


def _widened(report: QuantReport, wide: Container[str]) -> QuantReport:
    """Count the scales in float32 that the dtype of their weights cannot hold: of a weight, all or none."""
    rows = []
    for row in report.rows:
        scales = rows_of(torch.Size(row.shape), row.kind).numel() if row.name in wide else 0
        rows.append(replace(row, bytes_after=row.numel + 4 * scales) if scales else row)
    return replace(report, rows=tuple(rows))
