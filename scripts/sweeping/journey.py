"""The whole way of one model in one dtype, through public names alone, with everything that must hold on it."""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

import mono_quant
from mono_quant.artifact.inspection import verify
from sweeping.findings import Findings
from sweeping.outputs import differences, error_of, run
from sweeping.subject import Subject
from sweeping.untouched import changes, state_of

# Sums in float32 may take another order; times the number of layers.
_FLOAT_NOISE = 32 * 2.0**-24
_BF16 = 16 * 2.0**-8


def travel(subject: Subject, dtype: str, home: Path) -> Findings:
    """Plan, quantize, save, load, compare and verify.

    Args:
        subject: to convert.
        dtype: `int8` or `fp16`.
        home: an empty folder to work in.
    """
    found = Findings()
    if subject.own_road:
        found.notes.append(f"transformers alone: {subject.own_road}")
    if subject.inputs is None:
        found.notes.append(f"not run: {subject.silence}")
    before = state_of(subject.model)
    planned = found.attempt("plan the object", mono_quant.plan, subject.model, dtype)
    result = found.attempt("quantize the object", mono_quant.quantize, subject.model, dtype)
    found.check("the original is untouched", changes(before, subject.model))
    if result is not None:
        found.check("the plan of the object is what was done", _other_rows(planned, result.report))
        found.check("the report accounts for every tensor", _unaccounted(subject.model, result.report))
        _follow(found, subject, result, home)
    if subject.folder is not None:
        _take_the_folder_road(found, subject, result, dtype)
    return found


def _take_the_folder_road(found: Findings, subject: Subject, from_object: Any, dtype: str) -> None:
    planned = found.attempt("plan the folder", mono_quant.plan, subject.folder, dtype)
    result = found.attempt("quantize the folder", mono_quant.quantize, subject.folder, dtype)
    if result is None:
        return
    found.check("the plan of the folder is what was done", _other_rows(planned, result.report))
    if from_object is not None and not subject.own_road:
        found.check(
            "object and folder give equal tensors", differences(_held(from_object.model), _held(result.model))
        )


def _follow(found: Findings, subject: Subject, result: Any, home: Path) -> None:
    """Everything that comes after a conversion."""
    output = None
    if subject.inputs is not None:
        output = found.attempt("run the result", run, result.model, subject.inputs)
    if output is not None:
        found.check("the output is close", _far(subject, result, output))
    if result.report.dtype == "fp16" and subject.own_half is not None:
        found.check("float16 where transformers has float16", _other_dtypes(subject.own_half, result.report))
    folder = found.attempt("save", result.save, home / "saved")
    if folder is None:
        return
    found.check("the report has the bytes of the file", _other_bytes(folder, result.report))
    loaded = found.attempt("load", mono_quant.load, folder, may_refuse=False)
    if loaded is not None:
        found.check("load gives the class that was saved", _other_class(result.model, loaded))
        found.check("load gives every tensor bit for bit", differences(_held(result.model), _held(loaded)))
    if loaded is not None and output is not None and subject.inputs is not None:
        again = found.attempt("run what was loaded", run, loaded, subject.inputs)
        if again is not None:
            found.check("load gives the output bit for bit", differences(output, again))
    found.attempt("verify", verify, folder, may_refuse=False)
    _save_again(found, result, folder, home)
    _leave_us(found, subject, result, folder, output)


def _save_again(found: Findings, result: Any, folder: Path, home: Path) -> None:
    first = _files(folder)
    second = found.attempt("save again", result.save, home / "again", may_refuse=False)
    if second is not None:
        found.check("a second save has the same bytes", _other_files(first, _files(second)))
        shutil.rmtree(second)
    reopened = found.attempt("reopen", mono_quant.QuantizedModel.from_folder, folder, may_refuse=False)
    third = reopened and found.attempt(
        "save what was loaded", reopened.save, home / "third", may_refuse=False
    )
    if third:
        weights = {n: b for n, b in first.items() if n.endswith(".safetensors") or n == "config.json"}
        found.check(
            "what was loaded is saved with the same bytes",
            _other_files(weights, {n: b for n, b in _files(third).items() if n in weights}),
        )
        shutil.rmtree(third)


def _leave_us(
    found: Findings, subject: Subject, result: Any, folder: Path, output: Mapping[str, Tensor] | None
) -> None:
    """What transformers makes of the folder without us: the same model where the card says so, else an error."""
    cls: Any = type(subject.model)
    promised = "library_name: transformers" in (folder / "README.md").read_text(encoding="utf-8")
    half = result.report.dtype == "fp16"
    options = {"dtype": torch.float32} if half else {}
    if promised:
        theirs = found.attempt(
            "load with transformers, as the card says", cls.from_pretrained, folder, **options
        )
    else:
        try:
            theirs = cls.from_pretrained(folder, **options)
        except Exception:  # noqa: BLE001 - any error protects the user
            return
    if theirs is None or subject.inputs is None or output is None or subject.output is None:
        return
    other = found.attempt("run what transformers loaded", run, theirs.eval(), subject.inputs)
    if other is None:
        return
    layers = max(8, len(result.report.quantized))
    if half and result.report.rows:
        found.check(
            "transformers computes the same from the float16 file",
            _beyond(error_of(other, output), _FLOAT_NOISE * layers, "float noise"),
        )
    else:
        own, theirs_error = error_of(subject.output, output), error_of(subject.output, other)
        limit = max(4 * own, expected_error(result.report), 0.02)
        found.check(
            "transformers computes the same from the int8 file", _beyond(theirs_error, limit, "the limit")
        )


def expected_error(report: Any) -> float:
    """First-order bound: the relative errors of all layers add up, each passed on with a gain of one.

    int8: the measured noise of each weight, and that of activations of 8 bits or more whose rms is a tenth of the largest.
    fp16: half a unit in the last place (2^-11) of weights, inputs and outputs of each weight matrix.
    """
    matrices = [r for r in report.quantized if len(r.shape) > 1]
    if report.dtype == "fp16":
        return len(matrices) * 3 * 2**-11
    activations = 1 / (127 * math.sqrt(12)) * 10
    return sum(math.hypot(10 ** (-(r.sqnr_db or 200) / 20), activations) for r in matrices)


def _far(subject: Subject, result: Any, output: Mapping[str, Tensor]) -> Iterator[str]:
    """Hold the error against the bound, and where that is passed against what as much noise does to the float model."""
    assert subject.output is not None and subject.inputs is not None
    error, limit = error_of(subject.output, output), expected_error(result.report)
    if any(t.dtype == torch.bfloat16 for t in subject.output.values()):
        limit += _BF16
    if error <= limit:
        return
    if result.report.dtype == "fp16" and subject.own_half is not None:
        peer = error_of(subject.output, run(subject.own_half, subject.inputs))
        yield from _beyond(
            error, max(limit, 4 * peer), f"the bound; transformers' own float16 has {peer:.1e}"
        )
    else:
        peer = _noisy_error(subject, result.report)
        yield from _beyond(
            error, max(limit, 4 * peer), f"the bound; as much noise on the float weights gives {peer:.1e}"
        )


def _noisy_error(subject: Subject, report: Any) -> float:
    """Return the error of the float model with random noise of the measured strength on every weight."""
    assert subject.output is not None and subject.inputs is not None
    state = dict(subject.model.named_parameters())
    generator = torch.Generator().manual_seed(3)
    kept = {r.name: state[r.name].detach().clone() for r in report.quantized if r.name in state}
    try:
        for row in report.quantized:
            if row.name in kept:
                weight = state[row.name].data
                noise = torch.randn(weight.shape, generator=generator)
                strength = float(weight.float().pow(2).mean().sqrt()) * 10 ** (-(row.sqnr_db or 40) / 20)
                weight += (noise * strength).to(weight.dtype)
        return error_of(subject.output, run(subject.model, subject.inputs))
    finally:
        for name, weight in kept.items():
            state[name].data.copy_(weight)


def _beyond(error: float, limit: float, what: str) -> Iterator[str]:
    if not error <= limit:
        yield f"the error is {error:.1e}, beyond {limit:.1e}, {what}"


def _other_rows(planned: Any, report: Any) -> Iterator[str]:
    """Yield where a plan and what was done differ."""
    if planned is None:
        yield "the plan was refused, the conversion was not"
        return
    rows, done = ({row.name: row for row in r.rows} for r in (planned, report))
    for name in sorted(rows.keys() ^ done.keys()):
        yield f"only the {'plan' if name in rows else 'result'} has {name}"
    for name in sorted(rows.keys() & done.keys()):
        for fact in (
            "action",
            "reason",
            "dtype_before",
            "dtype_after",
            "bytes_before",
            "bytes_after",
            "shape",
        ):
            a, b = getattr(rows[name], fact), getattr(done[name], fact)
            if a != b:
                yield f"{name}: {fact} is {a!r} in the plan and {b!r} in the result"


def _unaccounted(model: nn.Module, report: Any) -> Iterator[str]:
    state = model.state_dict(keep_vars=True)
    rows = {row.name: row for row in report.rows}
    for name in sorted(state.keys() ^ rows.keys()):
        yield f"only the {'model' if name in state else 'report'} has {name}"
    count = sum(p.numel() for p in model.parameters())
    if report.parameters != count:
        yield f"the report counts {report.parameters} parameters, the model has {count}"
    for name in sorted(state.keys() & rows.keys()):
        dtype = str(state[name].dtype).removeprefix("torch.")
        if rows[name].dtype_before != dtype or rows[name].shape != tuple(state[name].shape):
            yield f"{name} is {dtype} {tuple(state[name].shape)}, the report has {rows[name].dtype_before} {rows[name].shape}"


def _other_dtypes(theirs: nn.Module, report: Any) -> Iterator[str]:
    """Yield the tensors that transformers keeps in another dtype when it loads the float folder as float16."""
    state = theirs.state_dict()
    for row in report.rows:
        if row.name in state and state[row.name].is_floating_point() and row.action != "shared":
            dtype = str(state[row.name].dtype).removeprefix("torch.")
            if dtype != row.dtype_after:
                yield f"{row.name} is {row.dtype_after} ({row.reason or row.action}), transformers has {dtype}"


def _other_bytes(folder: Path, report: Any) -> Iterator[str]:
    size = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            size += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    if size != report.bytes_after:
        yield f"{size} bytes of tensors in the file, {report.bytes_after} in the report"


def _other_class(model: nn.Module, loaded: nn.Module) -> Iterator[str]:
    if type(loaded) is not type(model):
        yield f"{type(model).__name__} became {type(loaded).__name__}"
    if any(m.training for m in loaded.modules()):
        yield "it is in training mode"


def _held(model: nn.Module) -> dict[str, Tensor]:
    """Return every tensor that a model holds, with the buffers that are not saved."""
    return {**model.state_dict(), **dict(model.named_buffers())}


def _files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _other_files(first: Mapping[str, bytes], second: Mapping[str, bytes]) -> Iterator[str]:
    for name in sorted(first.keys() ^ second.keys()):
        yield f"{name} is on one side only"
    for name in sorted(first.keys() & second.keys()):
        if first[name] != second[name]:
            where = ", ".join(_other_fields(first[name], second[name])) if name.endswith(".json") else ""
            yield f"{name} differs{f' in {where}' if where else ''}"


def _other_fields(first: bytes, second: bytes) -> list[str]:
    a, b = (dict(_fields(json.loads(text))) for text in (first, second))
    return [k for k in sorted(a.keys() | b.keys()) if a.get(k, "absent") != b.get(k, "absent")][:5]


def _fields(data: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(data, dict) and data:
        for key, value in data.items():
            yield from _fields(value, f"{place}.{key}".lstrip("."))
    else:
        yield place, data
