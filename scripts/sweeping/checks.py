"""What must hold between a model, its report, its folder and its output: each check yields what is wrong."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sweeping.outputs import error_of, run
from sweeping.subject import Subject

_BF16 = 16 * 2.0**-8
# Sums in float32 may take another order; times the number of layers.
_FLOAT_NOISE = 32 * 2.0**-24
_DRAWS = 4


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


def far(subject: Subject, report: Any, output: Mapping[str, Tensor], half: nn.Module | None) -> Iterator[str]:
    """Hold an output's error against the bound, and where that is passed against what as much noise does elsewhere.

    Args:
        subject: the float model, with its output.
        report: of the conversion.
        output: to judge.
        half: what transformers itself makes of the model in float16; None for int8.
    """
    assert subject.output is not None and subject.inputs is not None
    error, limit = error_of(subject.output, output), expected_error(report)
    if any(t.dtype == torch.bfloat16 for t in subject.output.values()):
        limit += _BF16
    if error <= limit:
        return
    peer = _noisy_error(subject, report)
    what = f"the bound; as much noise on the float weights gives {peer:.1e}"
    if half is not None:
        own = error_of(subject.output, run(half, subject.inputs))
        peer, what = max(peer, own), f"{what}, transformers' own float16 has {own:.1e}"
    yield from _beyond(error, max(limit, 4 * peer), what)


def noisy(reference: Mapping[str, Tensor], output: Mapping[str, Tensor], report: Any) -> Iterator[str]:
    """Yield a difference that another order of float32 sums does not explain."""
    yield from _beyond(
        error_of(reference, output), _FLOAT_NOISE * max(8, len(report.quantized)), "float noise"
    )


def _noisy_error(subject: Subject, report: Any) -> float:
    """Return the error of the float model whose weights carry what the report says: float16 rounding, or noise of that strength.

    Of noise the worst of some draws: what matches or routes may change with one and not with another.
    """
    assert subject.output is not None and subject.inputs is not None
    errors = []
    for seed in range(1 if report.dtype == "fp16" else _DRAWS):
        model = subject.make()
        state = dict(model.named_parameters())
        generator = torch.Generator().manual_seed(seed)
        for row in report.quantized:
            if row.name in state:
                _disturb_(state[row.name].data, row, generator)
        errors.append(error_of(subject.output, run(model, subject.inputs)))
    return max(errors)


def _disturb_(weight: Tensor, row: Any, generator: torch.Generator) -> None:
    if row.dtype_after == "float16":
        weight.copy_(weight.half())
    else:
        strength = float(weight.float().pow(2).mean().sqrt()) * 10 ** (-(row.sqnr_db or 40) / 20)
        weight += strength * torch.randn(weight.shape, generator=generator).to(weight.dtype)


def _beyond(error: float, limit: float, what: str) -> Iterator[str]:
    if not error <= limit:
        yield f"the error is {error:.1e}, beyond {limit:.1e}, {what}"


def other_rows(planned: Any, report: Any) -> Iterator[str]:
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


def unaccounted(model: nn.Module, report: Any) -> Iterator[str]:
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


def other_dtypes(theirs: nn.Module, report: Any) -> Iterator[str]:
    """Yield the tensors that transformers keeps in another dtype when it loads the float folder as float16."""
    state = theirs.state_dict()
    for row in report.rows:
        # transformers makes floats of counters that lie in what it keeps in float32
        is_float = row.name in state and state[row.name].is_floating_point() and "int" not in row.dtype_before
        # float32 for a reason of ours: a forward writes into it
        is_ours = row.action == "kept" and "forward writes into it" in row.reason
        if is_float and row.action != "shared" and not is_ours:
            dtype = str(state[row.name].dtype).removeprefix("torch.")
            if dtype != row.dtype_after:
                yield f"{row.name} is {row.dtype_after} ({row.reason or row.action}), transformers has {dtype}"


def other_bytes(folder: Path, report: Any) -> Iterator[str]:
    size = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            size += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    if size != report.bytes_after:
        yield f"{size} bytes of tensors in the file, {report.bytes_after} in the report"


def other_class(model: nn.Module, loaded: nn.Module) -> Iterator[str]:
    if type(loaded) is not type(model):
        yield f"{type(model).__name__} became {type(loaded).__name__}"
    if any(m.training for m in loaded.modules()):
        yield "it is in training mode"


def held(model: nn.Module) -> dict[str, Tensor]:
    """Return every tensor that a model holds, with the buffers that are not saved."""
    return {**model.state_dict(), **dict(model.named_buffers())}


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def other_files(first: Mapping[str, bytes], second: Mapping[str, bytes]) -> Iterator[str]:
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
