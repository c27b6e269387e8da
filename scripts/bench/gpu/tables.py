"""The results as one JSON and as tables in Markdown, from the rows of the journal alone."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.gpu.journal import ERROR, SKIPPED
from bench.gpu.verdicts import measured_on_device, verdicts
from bench.timing import Row

Column = tuple[str, Callable[[Row], Any]]


def summary(rows: list[Row]) -> Row:
    """Return everything that was found, and what it says about the acceptance list."""
    found = [
        {"what": v.what, "bar": v.bar, "at_most": v.at_most, "found": v.found, "verdict": v.text}
        for v in verdicts(rows)
    ]
    return {"rows": rows, "verdicts": found}


def write(json_path: Path, table_path: Path, result: Row) -> None:
    """Write both, whole or not at all: a run may be cut off at any time."""
    texts = {json_path: json.dumps(result, indent=1) + "\n", table_path: markdown(result)}
    for path, text in texts.items():
        beside = path.with_name(f"{path.name}.part")
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)


def markdown(result: Row) -> str:
    """Return the tables."""
    rows = result["rows"]
    parts = [
        "# int8 on a GPU, measured"
        if measured_on_device(rows)
        else "# A walk through on a CPU: the numbers mean nothing",
        _facts(rows),
        "## What the issue asks for",
        table(
            result["verdicts"],
            [
                ("", lambda r: r["what"]),
                ("bar", lambda r: f"{'at most' if r['at_most'] else 'at least'} {r['bar']:g}"),
                ("measured", lambda r: _number(r["found"])),
                ("", lambda r: r["verdict"]),
            ],
        ),
    ]
    for title, kind, columns in _TABLES:
        chosen = [row for row in rows if row["kind"] == kind]
        if chosen:
            parts += [f"## {title}", table(chosen, columns)]
    missing = [row for row in rows if row["kind"] in (ERROR, SKIPPED, "absent")]
    if missing:
        parts += ["## Not measured", table(missing, _MISSING)]
    return "\n\n".join(parts) + "\n"


def table(rows: Iterable[Row], columns: Sequence[Column]) -> str:
    """Return rows as a table of Markdown."""
    lines = ["| " + " | ".join(name for name, _ in columns) + " |", "|" + " --- |" * len(columns)]
    lines += [
        "| " + " | ".join(str(cell(row)).replace("|", "/") for _, cell in columns) + " |" for row in rows
    ]
    return "\n".join(lines)


def _facts(rows: list[Row]) -> str:
    kinds = ("device", "software", "path", "tests", "peak")
    lines = []
    for row in rows:
        if row["kind"] in kinds:
            values = {k: v for k, v in row.items() if k not in ("section", "kind") and v is not None}
            lines.append(f"- {row['kind']}: " + ", ".join(f"{k} {_number(v)}" for k, v in values.items()))
    return "\n".join(lines)


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _of(key: str, form: str = "") -> Callable[[Row], str]:
    # a row that lacks something must not cost the table
    return lambda row: "-" if row.get(key) is None else format(row[key], form)


_SHAPE: list[Column] = [("N x K", lambda r: f"{r.get('N')} x {r.get('K')}"), ("M", _of("M"))]
_TIMES: list[Column] = [
    ("bf16 us", _of("bf16_us", ".1f")),
    ("us", _of("us", ".1f")),
    ("of bf16", _of("ratio", ".2f")),
]
_MISSING: list[Column] = [
    ("section", _of("section")),
    ("what", lambda r: r.get("where", "")),
    (
        "why",
        lambda r: "not installed: " + r["what"] if r["kind"] == "absent" else r["what"].replace("\n", " "),
    ),
]
_TABLES: list[tuple[str, str, list[Column]]] = [
    (
        "Layers in a graph, quantization included (times bf16 `F.linear`; `wrong`: results that are not the reference's)",
        "layer",
        [*_SHAPE, ("scheme", _of("scheme")), *_TIMES, ("wrong", _of("wrong"))],
    ),
    ("Peers' layers", "peer", [*_SHAPE, ("what", _of("what")), *_TIMES]),
    (
        "Llama-3-8B's shape: a prompt",
        "prefill",
        [
            ("tokens", _of("tokens")),
            ("layers", _of("layers")),
            ("what", _of("what")),
            ("ms", _of("ms", ".2f")),
            ("of bf16", _of("ratio", ".2f")),
        ],
    ),
    (
        "Llama-3-8B's shape: decoding with a static cache in a graph",
        "decode",
        [
            ("batch", _of("batch")),
            ("layers", _of("layers")),
            ("what", _of("what")),
            ("ms a step", _of("ms", ".3f")),
            ("tokens/s", _of("tokens_per_s", ".0f")),
            ("of bf16", _of("ratio", ".2f")),
        ],
    ),
    (
        "Weights",
        "weights",
        [
            ("layers", _of("layers")),
            ("bf16 GB", lambda r: f"{r['bf16_bytes'] / 1e9:.2f}"),
            ("int8 GB", lambda r: f"{r['int8_bytes'] / 1e9:.2f}"),
            ("of bf16", _of("ratio", ".3f")),
            ("of bf16, 32 layers", _of("ratio_of_32_layers", ".3f")),
            ("quantized in s", _of("quantized_in_s", ".2f")),
        ],
    ),
    (
        "Experts",
        "experts",
        [
            ("shape", _of("shape")),
            ("T", _of("T")),
            ("what", _of("what")),
            ("mode", _of("mode")),
            ("ms", _of("ms", ".3f")),
            ("of bf16", _of("ratio", ".2f")),
        ],
    ),
    ("Experts: how far int8 is from bf16", "experts_error", [("shape", _of("shape")), ("T", _of("T")), ("error", _of("to_bf16", ".4f"))]),
    (
        "Host time of an eager call",
        "host",
        [*_SHAPE, ("nn.Linear us", _of("linear_us", ".1f")), ("ours us", _of("us", ".1f")), ("of ours", _of("ratio", ".2f"))],
    ),
    (
        "Error of the logits against fp32, norm channels scaled",
        "outliers",
        [
            ("scaled by", _of("scaled_by")),
            ("what", _of("what")),
            ("error", _of("error", ".4f")),
            ("same first token", _of("same_top", ".3f")),
        ],
    ),
    ("Captured whole", "fullgraph", [("backend", _of("backend")), ("error to eager", _of("error", ".1e")), ("equal", _of("equal"))]),
    (
        "generate with a static cache, compiled by transformers where there is a device",
        "generate",
        [("tokens", _of("tokens")), ("equal to eager mode's", _of("equal"))],
    ),
    (
        "Decoding in a graph against eager mode",
        "steps",
        [("steps", _of("steps")), ("layers", _of("layers")), ("steps that differ", _of("differ"))],
    ),
]  # fmt: skip
