"""The acceptance list of the issue, held against what was measured."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bench.timing import Row, geometric_mean

# From here on a layer is large: smaller ones are bound by launches, whatever the kernel.
_LARGE = 4096


@dataclass(frozen=True)
class Verdict:
    """One line of the list.

    Attributes:
        what: it asks for.
        bar: the number.
        found: what was measured, None where nothing was.
        at_most: the bar is an upper one.
    """

    what: str
    bar: float
    found: float | None
    at_most: bool = False

    @property
    def text(self) -> str:
        """Say met, missed or not measured."""
        if self.found is None:
            return "not measured"
        met = self.found <= self.bar if self.at_most else self.found >= self.bar
        return "met" if met else "missed"


def verdicts(rows: Iterable[Row]) -> list[Verdict]:
    """Return every line for which there is a bar; a walk through on a CPU says nothing about any."""
    rows = list(rows)
    if not measured_on_device(rows):
        rows = []
    return [*_layers(rows), *_model(rows), *_experts(rows), *_host(rows)]


def measured_on_device(rows: Iterable[Row]) -> bool:
    """Say whether rows were measured on a GPU."""
    return any(row["kind"] == "device" and "capability" in row for row in rows)


def _layers(rows: list[Row]) -> list[Verdict]:
    large = [
        r for r in rows if r["kind"] == "layer" and r["section"] == "layers" and min(r["N"], r["K"]) >= _LARGE
    ]

    def mean(inside: Callable[[int], bool]) -> float | None:
        ratios = [r["ratio"] for r in large if inside(r["M"])]
        return geometric_mean(ratios) if ratios else None

    wrong = [r["wrong"] for r in rows if r["kind"] == "layer"]
    return [
        Verdict(
            "results of layers that differ from the reference", 0, max(wrong, default=None), at_most=True
        ),
        Verdict("layers of N, K >= 4096, M = 1, geometric mean", 1.7, mean(lambda m: m == 1)),
        Verdict("layers of N, K >= 4096, M = 4 to 64, geometric mean", 1.45, mean(lambda m: 4 <= m <= 64)),
        Verdict("layers of N, K >= 4096, M >= 1024, geometric mean", 1.4, mean(lambda m: m >= 1024)),
        Verdict("layers of N, K >= 4096, worst point", 1.1, min((r["ratio"] for r in large), default=None)),
    ]


def _model(rows: list[Row]) -> list[Verdict]:
    fused = "int8, backend mono_quant"
    bars = {1: 1.65, 4: 1.5, 16: 1.35}
    return [
        Verdict("prompt of 2048 tokens, eager", 1.3, _ratio(rows, "prefill", what="int8", tokens=2048)),
        Verdict("prompt of 2048 tokens, backend", 1.6, _ratio(rows, "prefill", what=fused, tokens=2048)),
        *(
            Verdict(f"decoding in a graph, batch {batch}", bar, _best(rows, batch))
            for batch, bar in bars.items()
        ),
        Verdict(
            "bytes of the weights of 32 layers, of bf16's",
            0.57,
            _value(rows, "weights", "ratio_of_32_layers"),
            at_most=True,
        ),
    ]


def _best(rows: list[Row], batch: int) -> float | None:
    found = [
        r["ratio"] for r in rows if r["kind"] == "decode" and r["section"] == "model" and r["batch"] == batch
    ]
    # the first is bf16 itself
    return max(found[1:], default=None)


def _experts(rows: list[Row]) -> list[Verdict]:
    return [
        Verdict(
            f"Mixtral's experts, {count} token{'s' if count > 1 else ''}, graph",
            bar,
            _ratio(rows, "experts", shape="Mixtral", T=count, what="int8", mode="graph"),
        )
        for count, bar in ((1024, 1.7), (1, 2.5))
    ]


def _host(rows: list[Row]) -> list[Verdict]:
    worst = min((r["ratio"] for r in rows if r["kind"] == "host"), default=None)
    whole = [r for r in rows if r["kind"] == "fullgraph"]
    return [
        Verdict("host time of nn.Linear, of ours", 1.0, worst),
        Verdict("backends that capture the model whole", 2, float(len(whole)) if whole else None),
        Verdict(
            "steps of 1,000 in a graph that differ from eager mode",
            0,
            _value([r for r in rows if r.get("steps") == 1000], "steps", "differ"),
            at_most=True,
        ),
    ]


def _ratio(rows: list[Row], kind: str, **wanted: object) -> float | None:
    return _value([r for r in rows if all(r.get(k) == v for k, v in wanted.items())], kind, "ratio")


def _value(rows: list[Row], kind: str, key: str) -> float | None:
    return next((r[key] for r in rows if r["kind"] == kind), None)
