"""The results as pictures; matplotlib is imported when one is asked for."""

import importlib
from pathlib import Path
from typing import Any

from bench.timing import Row

OURS, FLOAT, TORCH, GRAPH, EDGE = "#d1495b", "#9aa0a6", "#5b8db8", "#3a7d5c", "#444444"


def _figure(rows: int, columns: int, size: tuple[float, float], title: str, **options: Any) -> Any:
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    matplotlib.rcParams.update({
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": EDGE,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
    })
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(
        rows, columns, figsize=size, squeeze=False, layout="constrained", **options
    )
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    return figure, axes


def _title(result: Row) -> str:
    limited = ", restricted to AVX2" if result["restricted"] else ""
    where = result["environment"]
    return f"{result['processor']}, {where['threads']} threads{limited}; mono_quant path {where['path']}"


def plot_kernels(result: Row, file: Path) -> None:
    """Draw the gains and shares against the number of tokens, one line per shape."""
    rows = result["rows"]
    shapes = sorted(dict.fromkeys((row["N"], row["K"]) for row in rows), key=lambda s: (s[0] * s[1], s))
    figure, axes = _figure(2, 3, (15, 8.5), _title(result))
    colors = importlib.import_module("matplotlib").colormaps["viridis"]
    panels = [
        (axes[0, 0], "vs_fp32", "wide", "12-bit activations: times faster than fp32"),
        (axes[0, 1], "vs_fp32", "8-bit", "8-bit activations: times faster than fp32"),
        (axes[0, 2], "vs_fp32", "half", "float16 weights: times faster than fp32"),
        (axes[1, 0], "vs_linear_dynamic", "wide", "12-bit: times faster than FBGEMM linear_dynamic"),
        (axes[1, 1], "vs_linear_dynamic", "8-bit", "8-bit: times faster than FBGEMM linear_dynamic"),
    ]
    for axis, key, name, title in panels:
        for index, shape in enumerate(shapes):
            points = [(r["M"], r[key][name]) for r in rows if (r["N"], r["K"]) == shape and key in r]
            color = colors(0.92 * index / max(1, len(shapes) - 1))
            label = f"{shape[0]} x {shape[1]}"
            axis.plot(
                *zip(*points, strict=True) if points else ([], []),
                "o-",
                color=color,
                label=label,
                ms=3.5,
                lw=1.3,
            )
        axis.axhline(1.0, color=EDGE, linewidth=0.8, linestyle="--")
        ticks = sorted({row["M"] for row in rows})
        axis.set_xscale("log")
        axis.set_xticks(ticks, labels=[str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.set(xlabel="tokens", title=title)
        axis.grid(axis="y", color="#e4e4e4", linewidth=0.6)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    _plot_shares(axes[1, 2], result)
    figure.savefig(file, dpi=130)


def _plot_shares(axis: Any, result: Row) -> None:
    """Draw how near the machine's limits the large products and the streamed ones come."""
    bars: list[tuple[str, float, str]] = []
    for name, color in (("wide", OURS), ("8-bit", "#e9a3ad")):
        large = [row for row in result["rows"] if "share_of_limit" in row]
        bars += [
            (f"{r['N']}x{r['K']}, M {r['M']}, {name}", r["share_of_limit"][name], color) for r in large[-3:]
        ]
        bars += [
            (f"{r['N']}x{r['K']}, M 1, {name}", r["share_of_read"][name], color)
            for r in result["stream"][-3:]
        ]
    if not bars:
        axis.set_visible(False)
        return
    axis.barh([label for label, _, _ in bars], [share for _, share, _ in bars], color=[c for _, _, c in bars])
    for index, (_, share, _) in enumerate(bars):
        axis.text(share + 0.01, index, f"{share:.0%}", va="center", fontsize=7.5)
    axis.tick_params(axis="y", labelsize=7.5)
    axis.invert_yaxis()
    axis.axvline(1.0, color=EDGE, linewidth=0.8, linestyle="--")
    axis.set(
        xlim=(0, max(1.15, *(1.15 * share for _, share, _ in bars))),
        title="share of the int8 limit; at M 1, of the read bandwidth",
    )
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def plot_convert(result: Row, file: Path) -> None:
    """Draw the share of a copy's bandwidth, one panel per source dtype."""
    sources = list(dict.fromkeys(row["dtype"] for row in result["rows"]))
    figure, axes = _figure(1, len(sources), (6.2 * len(sources), 3.6), _title(result), sharex=True)
    for axis, dtype in zip(axes[0], sources, strict=True):
        rows = [row for row in result["rows"] if row["dtype"] == dtype]
        colors = [
            FLOAT if "copy" in row["loop"] else TORCH if "torch" in row["loop"] else OURS for row in rows
        ]
        axis.barh([row["loop"] for row in rows], [row["of_copy"] for row in rows], color=colors)
        for index, row in enumerate(rows):
            label = f"{row['of_copy']:.0%}  ({row['gb_per_s']:.1f} GB/s)"
            axis.text(row["of_copy"] + 0.01, index, label, va="center", fontsize=8)
        axis.axvline(0.6, color=EDGE, linewidth=0.8, linestyle="--")
        axis.set(
            title=f"from {dtype}: share of a copy's bandwidth (dashed: 60 %)",
            xlim=(0, 1.35 * max(1.0, *(row["of_copy"] for row in result["rows"]))),
        )
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axis.invert_yaxis()
    figure.savefig(file, dpi=130)


def _color(stack: str) -> str:
    if stack.startswith("ours"):
        return OURS
    if stack in ("fp32", "bf16", "fp16"):
        return FLOAT
    return GRAPH if stack.startswith(("onnxruntime", "openvino")) else TORCH


def plot_models(result: Row, file: Path) -> None:
    """Draw the gain over fp32, one panel per model and batch, with the error beside each bar."""
    pairs = list(dict.fromkeys((row["batch"], row["model"]) for row in result["rows"]))
    stacks = list(dict.fromkeys(row["stack"] for row in result["rows"]))
    columns = min(4, len(pairs))
    lines = -(-len(pairs) // columns)
    height = 0.2 * len(stacks) + 0.85
    title = f"{_title(result)}\nTimes faster than eager fp32, and the relative error of the output"
    figure, axes = _figure(lines, columns, (4.2 * columns + 0.8, height * lines + 0.4), title, sharey=True)
    for axis in axes.flat[len(pairs) :]:
        axis.set_visible(False)
    for axis, (batch, model) in zip(axes.flat, pairs, strict=False):
        rows = [row for row in result["rows"] if (row["batch"], row["model"]) == (batch, model)]
        gains = [row.get("vs_fp32", 0.0) for row in rows]
        axis.barh([row["stack"] for row in rows], gains, color=[_color(row["stack"]) for row in rows])
        for index, (row, gain) in enumerate(zip(rows, gains, strict=True)):
            if "skipped" in row:
                axis.text(0.02, index, "skipped", va="center", fontsize=7.5, color=FLOAT, style="italic")
                continue
            error = "nan" if row["error"] is None else f"{row['error']:.2g}"
            text = f" {gain:.2f}x" + ("" if row["stack"] == "fp32" else f"  err {error}")
            axis.text(gain, index, text, va="center", fontsize=7.5)
        axis.axvline(1.0, color=EDGE, linewidth=0.8, linestyle="--")
        fp32 = next((row["ms"] for row in rows if row["stack"] == "fp32" and "ms" in row), None)
        unit = " a token" if model.endswith("decode") else ""
        axis.set(
            title=f"{model}, batch {batch}" + (f" (fp32 {fp32:.3g} ms{unit})" if fp32 else ""),
            xlim=(0, 1.6 * max(1.0, *gains)),
        )
        axis.tick_params(axis="y", labelsize=8)
    axes[0, 0].invert_yaxis()
    figure.savefig(file, dpi=130)


def plot_sentences(result: Row, file: Path) -> None:
    """Draw what becomes of the nearest neighbours, one group of bars per measure."""
    figure, axes = _figure(1, 1, (7, 3.2), _title(result))
    measures = {"overlap": "same neighbours", "recall": "within 1 %", "retrieval": "found by its first half"}
    width = 0.8 / len(result["rows"])
    for place, row in enumerate(result["rows"]):
        known = [key for key in measures if key in row]
        where = [list(measures).index(key) + width * place for key in known]
        label = f"{row['model']}, {row['per_s']:.0f} a second" if known else f"{row['model']}, skipped"
        axes[0][0].bar(where, [row[key] for key in known], 0.9 * width, label=label)
    axes[0][0].set_xticks([i + 0.4 for i in range(len(measures))], list(measures.values()))
    axes[0][0].set_ylim(0.8, 1.0)
    axes[0][0].legend(frameon=False)
    figure.savefig(file, dpi=130)


def plot_loading(result: Row, file: Path) -> None:
    """Draw the memory and the time of every way, one bar each."""
    rows = [row for row in result["rows"] if "skipped" not in row]
    figure, axes = _figure(1, 2, (9, 3.6), _title(result))
    for place, (key, label) in enumerate((("anonymous", "MiB that cannot be given back"), ("seconds", "s"))):
        axes[0][place].barh([row["way"] for row in rows], [row[key] for row in rows])
        axes[0][place].invert_yaxis()
        axes[0][place].set_xlabel(label)
    figure.savefig(file, dpi=130)


def plot_stream(result: Row, file: Path) -> None:
    """Draw the time until the files are on the disk and the memory of every way, one panel per checkpoint and cache."""
    pairs = list(dict.fromkeys((row["checkpoint"], row["cache"]) for row in result["rows"]))
    figure, axes = _figure(len(pairs), 2, (9, 1.7 * len(pairs) + 0.6), _title(result))
    for line, pair in zip(axes, pairs, strict=True):
        rows = [r for r in result["rows"] if (r["checkpoint"], r["cache"]) == pair and "skipped" not in r]
        colors = [FLOAT if r["way"].startswith("cp") else TORCH if "llm" in r["way"] else OURS for r in rows]
        for axis, key, label in zip(
            line, ("durable", "anonymous"), ("s until on the disk", "MiB"), strict=True
        ):
            axis.barh([row["way"] for row in rows], [row[key] for row in rows], color=colors)
            axis.invert_yaxis()
            axis.set(title=f"{rows[0]['gigabytes']:.1f} GB, {pair[1]}" if rows else "", xlabel=label)
    figure.savefig(file, dpi=130)


def plot_gpu(result: Row, file: Path) -> None:
    """Draw the gains of single layers on a GPU against the number of tokens, one line per shape."""
    rows = [row for row in result["rows"] if row["kind"] == "layer" and row["section"] == "layers"]
    device = next((row["name"] for row in result["rows"] if row["kind"] == "device"), "")
    figure, axes = _figure(1, 1, (7, 4.5), f"{device}: int8 layers, times faster than bf16, in a graph")
    axis = axes[0, 0]
    for shape in dict.fromkeys((row["N"], row["K"]) for row in rows):
        points = [(row["M"], row["ratio"]) for row in rows if (row["N"], row["K"]) == shape]
        axis.plot(*zip(*points, strict=True), "o-", label=f"{shape[0]} x {shape[1]}")
    axis.axhline(1, color=FLOAT)
    axis.set(xscale="log", xlabel="tokens", ylim=(0, None))
    axis.legend()
    figure.savefig(file, dpi=130)
