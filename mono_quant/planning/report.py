"""What happened to every parameter, as data and as a table.

A `QuantReport` has one row for each parameter and persistent buffer of the model. Each row is exactly one of
*quantized*, *kept* (with the reason) or *shared* (with the name it shares memory with), so the rows add up to the
whole model; `QuantReport.check` proves it.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch

from mono_quant.errors import CorruptCheckpointError, Words
from mono_quant.io.disk.json_text import canonical_json
from mono_quant.kernels import AUTO, SCHEMES
from mono_quant.kernels.weights import FP16_MAX
from mono_quant.planning.tables import Columns, Part, plain

Action = Literal["quantized", "kept", "shared"]


@dataclass(frozen=True)
class TensorReport:
    """What happened to one parameter or buffer.

    Attributes:
        name: full name in the model.
        module: name of the module that owns it.
        kind: `linear`, `conv2d`, `embedding`, ... for a layer that could be quantized, else the class name.
        shape: of the tensor.
        dtype_before, dtype_after: names without `torch.`.
        bytes_before, bytes_after: with scales counted in `bytes_after`; 0 for a shared tensor.
        action: `quantized`, `kept` or `shared`.
        reason: why it was kept, or the name it is shared with.
        is_buffer: True for a buffer, which is not counted as a parameter.
        is_layer: True for the weight of a layer that int8 could hold, so that being kept is a choice.
        sqnr_db: weight SQNR in dB, for quantized tensors; None when nothing was lost.
        gap_db: distance to what 8 bits reach on Gaussian rows of this length, in dB; negative is better.
        flushed: non-zero values that became zero (fp16).
        narrowed: kept in float, but stored in half precision on request.
        activations: scheme of the inputs of an int8 layer; `auto` where it is left open, and of no meaning for others.
        why: it is that scheme; empty where it is left open.
    """

    name: str
    module: str
    kind: str
    shape: tuple[int, ...]
    dtype_before: str
    dtype_after: str
    bytes_before: int
    bytes_after: int
    action: Action
    reason: str = ""
    is_buffer: bool = False
    is_layer: bool = False
    sqnr_db: float | None = None
    gap_db: float | None = None
    flushed: int = 0
    narrowed: bool = False
    activations: str = AUTO
    why: str = ""

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class KeptLayer:
    """A layer that could have been quantized and stays in float, or one such weight of a quantized layer.

    Attributes:
        name: of the layer; of a single weight its own.
        dtype: that it has now.
        weights: how many.
        reason: why.
    """

    name: str
    dtype: str
    weights: int
    reason: str


@dataclass(frozen=True, repr=False)
class QuantReport:
    """The account of one conversion; see the module docstring.

    Attributes:
        dtype: `int8` or `fp16`.
        rows: one per parameter and persistent buffer.
        activations: what was asked for: a scheme, `auto`, `measured` or `by pattern`; empty for fp16, and in reports of older
            versions.
        kernel: the path that ran when fidelity was measured.
        fidelity: measured output fidelity, see `mono_quant.fidelity`; None when the model was not run.
        fidelity_note: why fidelity is None.
        notes: other facts the user should know.
        planned: True when nothing was converted.
        auto_activations: what `auto` is on the path that ran when fidelity was measured, or that would have run.
    """

    dtype: str
    rows: tuple[TensorReport, ...]
    activations: str = ""
    kernel: str = ""
    fidelity: Mapping[str, Any] | None = None
    fidelity_note: str = ""
    notes: tuple[str, ...] = field(default=())
    planned: bool = False
    auto_activations: str = ""

    def __repr__(self) -> str:
        return f"<QuantReport: {self.summary}>"

    @property
    def summary(self) -> str:
        """The dtype, how much of the model it holds, and the sizes, in a few words."""
        return (
            f"{self.dtype}{' (plan)' if self.planned else ''}, {self.parameters:,} parameters, {self.coverage:.1%} of them "
            f"quantized, {human_bytes(self.bytes_before)} -> {human_bytes(self.bytes_after)}"
        )

    @property
    def parameters(self) -> int:
        """Parameters of the model, shared ones counted once."""
        return sum(r.numel for r in self.rows if not r.is_buffer and r.action != "shared")

    @property
    def quantized_parameters(self) -> int:
        """Parameters that changed their dtype."""
        return sum(r.numel for r in self.rows if not r.is_buffer and r.action == "quantized")

    @property
    def coverage(self) -> float:
        """Share of the parameters that are quantized, 0 to 1."""
        return self.quantized_parameters / self.parameters if self.parameters else 0.0

    @property
    def bytes_before(self) -> int:
        """Bytes of all tensors before."""
        return sum(r.bytes_before for r in self.rows)

    @property
    def bytes_after(self) -> int:
        """Bytes of all tensors after, scales included."""
        return sum(r.bytes_after for r in self.rows)

    @property
    def quantized(self) -> tuple[TensorReport, ...]:
        """Rows that were quantized."""
        return tuple(r for r in self.rows if r.action == "quantized")

    @property
    def skipped(self) -> tuple[TensorReport, ...]:
        """Weights of layers that could have been quantized and were kept, each with its reason."""
        return tuple(r for r in self.rows if r.is_layer and r.action == "kept")

    @property
    def kept_layers(self) -> tuple[KeptLayer, ...]:
        """The layers that `skipped` has the weights of, each once."""
        converted = {r.module for r in self.quantized}
        layers: dict[str, list[TensorReport]] = defaultdict(list)
        for r in self.skipped:
            layers[r.name if r.module in converted else r.module or r.name].append(r)
        return tuple(
            KeptLayer(name, rows[0].dtype_after, _params(rows), rows[0].reason)
            for name, rows in layers.items()
        )

    @property
    def worst(self) -> TensorReport | None:
        """The quantized tensor with the lowest weight SQNR."""
        return min(
            (r for r in self.quantized if r.sqnr_db is not None), key=lambda r: r.sqnr_db or 0, default=None
        )

    def measured(self) -> list[tuple[str, str]]:
        """Return the measured fidelity as pairs of a name and a number, both as text."""
        facts = self.fidelity or {}
        found = [(name, number(facts[k])) for k, name in _MEASURES.items() if facts.get(k) is not None]
        errors = facts.get("relative_error_by_scheme") or {}
        # in the order of the schemes: a file sorts them by name
        found[1:1] = [
            (f"relative error, {scheme} everywhere", number(errors[scheme]))
            for scheme in SCHEMES
            if errors.get(scheme) is not None
        ]
        bad = facts.get("non_finite_positions")
        return found + ([("positions with NaN or infinity", str(bad))] if bad else [])

    @property
    def overflow_warning(self) -> str:
        """What happens to the measured activations in float16 arithmetic, where they do not fit; else empty."""
        peak = (self.fidelity or {}).get("peak_activation") or 0.0
        if peak <= FP16_MAX:
            return ""
        return (
            f"activations reach {number(peak)}, beyond {FP16_MAX:.0f}: the float32 arithmetic used here holds them, "
            f"float16 arithmetic (.half(), a loader that computes in float16) overflows"
        )

    def schemes(self) -> list[tuple[str, str, list[str]]]:
        """Return the int8 layers by the scheme of their activations and its reason, those that are left open first."""
        found: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
        for row in self.quantized if self.activations else ():
            if row.dtype_after == "int8" and row.kind != "embedding":
                found[row.activations, row.why][row.module] = None
        ordered = sorted(found.items(), key=lambda item: (item[0][0] != AUTO, -len(item[1]), item[0]))
        return [(scheme, why, list(layers)) for (scheme, why), layers in ordered]

    def groups(self) -> list[tuple[Action, str, list[TensorReport]]]:
        """Return the rows by action and kind or reason, quantized ones first, then the largest."""
        groups: dict[tuple[Action, str], list[TensorReport]] = defaultdict(list)
        for row in self.rows:
            labels = {"quantized": row.kind, "kept": row.reason, "shared": "shared with another tensor"}
            groups[row.action, labels[row.action]].append(row)
        order = {"quantized": 0, "kept": 1, "shared": 2}
        ordered = sorted(groups.items(), key=lambda g: (order[g[0][0]], -_params(g[1]), g[0][1]))
        return [(action, label, rows) for (action, label), rows in ordered]

    def check(self, names: Iterable[str]) -> None:
        """Prove that the rows account for exactly these tensors, each once.

        Args:
            names: all parameter and persistent buffer names of the model, shared ones included.

        Raises:
            CorruptCheckpointError: a name is missing, unknown or listed twice.
        """
        listed = Counter(r.name for r in self.rows)
        expected = set(names)
        wrong = sorted((listed.keys() ^ expected) | {n for n, count in listed.items() if count > 1})
        if wrong:
            raise CorruptCheckpointError(
                f"the report does not account for every tensor once: {', '.join(wrong[:8])}"
                f"{' ...' if len(wrong) > 8 else ''} ({len(wrong)} in all). This is a bug in mono_quant; please report it."
            )

    def with_fidelity(
        self, fidelity: Mapping[str, Any] | None, note: str = "", kernel: str = ""
    ) -> "QuantReport":
        """Return a copy that carries measured fidelity, or the reason why there is none."""
        return replace(self, fidelity=fidelity, fidelity_note=note, kernel=kernel or self.kernel)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; `from_dict` gives back an equal report."""
        data = asdict(self)
        data["rows"] = [_drop_defaults(row) for row in data["rows"]]
        data["notes"] = list(self.notes)
        data["totals"] = {
            "parameters": self.parameters,
            "quantized_parameters": self.quantized_parameters,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }
        return data

    def to_json(self) -> str:
        """Return `to_dict` as canonical JSON."""
        return canonical_json(self.to_dict(), "the report")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "QuantReport":
        """Rebuild a report from `to_dict`.

        Raises:
            CorruptCheckpointError: a field is missing or has the wrong type.
        """
        try:
            # `activation_bits` is of older versions
            fields = {k: v for k, v in data.items() if k not in ("totals", "activation_bits")}
            if fields.get("fidelity") is not None:
                _ = [fields["fidelity"][key] for key in ("output", "probe", "positions")]
            rows = tuple(TensorReport(**{**row, "shape": tuple(row["shape"])}) for row in fields.pop("rows"))
            return cls(rows=rows, **{**fields, "notes": tuple(fields.get("notes", ()))})
        except (TypeError, KeyError, AttributeError) as e:
            raise CorruptCheckpointError(
                f"the report has an unexpected form ({e}); save the model again"
            ) from e

    def table(self) -> str:
        """Return the report as text for a terminal: groups of equal layers, sizes, reasons, fidelity."""
        return plain(self.parts())

    def parts(self) -> Iterator[Part]:
        """Yield the same in parts, for a front end that lays out its tables itself."""
        return _parts(self)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without `torch.`."""
    return str(dtype).removeprefix("torch.")


_MEASURES = {
    "relative_error": "relative error",
    "relative_error_8_bit": "relative error, 8-bit activations",
    "cosine_mean": "cosine similarity, mean",
    "cosine_min": "cosine similarity, lowest",
    "kl_mean": "KL divergence, mean (nats)",
    "kl_p99": "KL divergence, 99 % (nats)",
    "top1_agreement": "top-1 agreement",
    "peak_activation": "largest activation",
}
_ROW_DEFAULTS = {
    "reason": "",
    "is_buffer": False,
    "is_layer": False,
    "sqnr_db": None,
    "gap_db": None,
    "flushed": 0,
    "narrowed": False,
    "activations": AUTO,
    "why": "",
}


def _drop_defaults(row: dict[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in row.items() if k not in _ROW_DEFAULTS or v != _ROW_DEFAULTS[k]}
    return {**kept, "shape": list(row["shape"])}


def number(value: float) -> str:
    """Return four digits, and six where the distance to 1 is what matters."""
    return f"{value:.4g}" if abs(value) < 0.9 else f"{value:.6g}"


def gap_text(row: TensorReport) -> str:
    """Say how far a quantized tensor is from what 8 bits reach on Gaussian rows of its length."""
    gap = row.gap_db or 0.0
    return f"{abs(gap):.1f} dB {'below' if gap >= 0 else 'above'} what 8 bits reach on Gaussian rows"


def human_bytes(count: int) -> str:
    """Return a byte count in the unit people read, e.g. `86.7 MB` (decimal units)."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < (1000 if unit == "B" else 999.95) or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


def _parts(report: QuantReport) -> Iterator[Part]:
    verb = "would become" if report.planned else "became"
    yield (
        f"{report.quantized_parameters:,} of {report.parameters:,} parameters ({report.coverage:.1%}) "
        f"{verb} {report.dtype}"
    )
    ratio = report.bytes_before / report.bytes_after if report.bytes_after else 1.0
    yield (
        f"size    {human_bytes(report.bytes_before)} -> {human_bytes(report.bytes_after)} ({ratio:.2f}x smaller)"
    )
    yield ""
    head = ("", "tensors", "parameters", "before", "after", "why")
    yield Columns(list(_group_rows(report)), head, right=frozenset({1, 2, 3, 4}))
    yield from _layer_parts(report)
    yield from _scheme_lines(report)
    yield from _fidelity_lines(report)
    yield from (Words("note    ", note) for note in report.notes)


def _group_rows(report: QuantReport) -> Iterable[list[str]]:
    for action, label, rows in report.groups():
        yield [
            action,
            str(len(rows)),
            f"{_params(rows):,}",
            human_bytes(sum(r.bytes_before for r in rows)),
            human_bytes(sum(r.bytes_after for r in rows)),
            label,
        ]


def _params(rows: list[TensorReport]) -> int:
    return sum(r.numel for r in rows)


def _layer_parts(report: QuantReport) -> Iterator[Part]:
    kept = report.kept_layers
    if kept:
        yield ""
        yield "layers kept in float"
        rows = [[f"  {layer.name}", f"{layer.weights:,}", layer.reason] for layer in kept[:20]]
        yield Columns(rows, right=frozenset({1}))
        if len(kept) > 20:
            yield f"  ... and {len(kept) - 20} more (all of them in the JSON report)"
    if report.worst and report.worst.sqnr_db is not None:
        worst = report.worst
        yield ""
        yield (f"weights lowest SQNR {worst.sqnr_db:.1f} dB ({worst.name}), {gap_text(worst)}")
    flushed = sum(r.flushed for r in report.rows)
    if flushed:
        yield f"weights {flushed:,} non-zero values ({flushed / report.parameters:.2%}) became zero in float16"


def _scheme_lines(report: QuantReport) -> Iterator[str]:
    label = "inputs"
    for scheme, why, layers in report.schemes():
        meant = f" (here {report.auto_activations})" if scheme == AUTO and report.auto_activations else ""
        yield f"{label:<7} {scheme}{meant} in {len(layers)} layer{'s' * (len(layers) != 1)}{f': {why}' if why else ''}"
        label = ""


def _fidelity_lines(report: QuantReport) -> Iterator[str]:
    if report.fidelity is None:
        if report.fidelity_note:
            yield Words("output  not measured: ", report.fidelity_note)
        return
    facts = [f"{name} {value}" for name, value in report.measured()]
    yield f"output  {report.fidelity['output']} against the original: {', '.join(facts)}"
    yield f"        on {report.fidelity['probe']}; kernel: {report.kernel}"
    if report.overflow_warning:
        yield f"warning {report.overflow_warning}"
