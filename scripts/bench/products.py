"""The grid of single products: ours against fp32 and FBGEMM, and against the limits of the machine."""

import argparse
import functools
import math
from collections.abc import Callable, Iterable

import torch
from torch.nn import functional as F

from bench.limits import Limits, last_level_cache, machine_limits
from bench.timing import Calls, Row, geometric_mean, measure
from mono_quant import kernels

SHAPES = [
    (384, 384), (1536, 384), (384, 1536), (768, 768), (3072, 768), (768, 3072), (1024, 1024), (4096, 1024),
    (4096, 4096), (11008, 4096), (4096, 11008),
]  # fmt: skip
TOKENS = [1, 4, 16, 64, 128, 512, 2048]
WIDE, NARROW, HALF = "wide", "8-bit", "half"
# A large product: what the share of the machine's limit is asked for.
LARGE_TOKENS, LARGE_WEIGHT = 512, 1 << 20
# Not even `--shapes` may fill the memory with copies of weights.
MOST_COPIES = 64


def fbgemm(weight: torch.Tensor, bias: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor] | None:
    try:
        coded = torch.quantize_per_tensor(weight, float(weight.abs().max()) / 127, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(coded, bias)
    except (RuntimeError, AttributeError):
        return None
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed, False)


def contexts(path: str | None) -> dict[str, Callable[[], object]]:
    return {
        name: functools.partial(kernels.using, path, scheme)
        for name, scheme in ((WIDE, "int12"), (NARROW, "int8"), (HALF, "int8"))
    }


def int8_gain(path: str) -> dict[str, int]:
    """Return how many int8 operations fit where one fp32 operation does, by width of the activation codes."""
    return {WIDE: 2, NARROW: 4 if path.endswith("vnni") else 2}


def kernel_row(rows: int, depth: int, tokens: int, limits: Limits, options: argparse.Namespace) -> Row:
    """Time one product on every path, its data as warm as repeated calls make it."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, depth, generator=generator)
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes, bias = (weight / scale).round().to(torch.int8), torch.randn(rows, generator=generator)
    x, half = torch.randn(tokens, depth, generator=generator), weight.half()

    def ours() -> torch.Tensor:
        return kernels.int8_linear(x, codes, scale, bias)

    calls: Calls = {"fp32": lambda: F.linear(x, weight, bias)}
    peer = fbgemm(weight, bias)
    if peer is not None:
        calls["linear_dynamic"] = lambda: peer(x)
    calls |= {WIDE: ours, NARROW: ours, HALF: lambda: kernels.half_linear(x, half, bias)}
    large = tokens >= LARGE_TOKENS and weight.numel() >= LARGE_WEIGHT
    if large:
        calls["limit"] = limits.multiply_add
    around = contexts(options.path)
    with torch.inference_mode():
        times = measure(calls, options.seconds, options.best, around)
        exact = x.double() @ (codes.double() * scale.double()).t() + bias.double()
        error = {}
        for name in (WIDE, NARROW):
            with around[name]():
                error[name] = float((ours() - exact).norm() / exact.norm())
    operations = 2e-9 * tokens * rows * depth
    row: Row = {
        "N": rows,
        "K": depth,
        "M": tokens,
        "us": {name: 1e6 * t for name, t in times.items() if name != "limit"},
        "gops": {name: operations / t for name, t in times.items() if name != "limit"},
        "error": error,
        "vs_fp32": {name: times["fp32"] / times[name] for name in (WIDE, NARROW, HALF)},
    }
    if peer is not None:
        row["vs_linear_dynamic"] = {name: times["linear_dynamic"] / times[name] for name in (WIDE, NARROW)}
    if large:
        gain, peak = int8_gain(options.running), limits.flops / 1e9 / times["limit"]
        row["share_of_limit"] = {name: row["gops"][name] / (gain[name] * peak) for name in (WIDE, NARROW)}
    return row


def stream_row(rows: int, depth: int, limits: Limits, options: argparse.Namespace) -> Row:
    """Time one token through weights that no cache holds: copies of them, in turn, as the layers of a model are."""
    copies = min(MOST_COPIES, max(2, math.ceil(4 * last_level_cache() / (rows * depth))))
    weight, bias = torch.randn(rows, depth), torch.randn(rows)
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round().to(torch.int8)
    x = torch.randn(1, depth)
    many: dict[str, list[torch.Tensor]] = {
        "fp32": [weight.clone() for _ in range(copies)],
        WIDE: [codes.clone() for _ in range(copies)],
        HALF: [weight.half() for _ in range(copies)],
    }
    many[NARROW] = many[WIDE]
    peers = [fbgemm(weight, bias) for _ in range(copies)]

    def all_of(name: str) -> Callable[[], None]:
        def call() -> None:
            for w in many[name]:
                if name == "fp32":
                    F.linear(x, w, bias)
                elif name == HALF:
                    kernels.half_linear(x, w, bias)
                else:
                    kernels.int8_linear(x, w, scale, bias)

        return call

    calls: Calls = {"read": limits.read, **{name: all_of(name) for name in many}}
    if peers[0] is not None:
        calls["linear_dynamic"] = lambda: [peer(x) for peer in peers if peer is not None]
    with torch.inference_mode():
        times = measure(calls, options.seconds, options.best, contexts(options.path), warm=False)
    bandwidth = limits.nbytes / 1e9 / times["read"]
    size = {name: tensors[0].nbytes * copies for name, tensors in many.items()}
    size["linear_dynamic"] = size[WIDE]
    rates = {name: size[name] / 1e9 / times[name] for name in times if name != "read"}
    return {
        "N": rows,
        "K": depth,
        "copies": copies,
        "read_gb_per_s": bandwidth,
        "us": {name: 1e6 * times[name] / copies for name in rates},
        "gb_per_s": rates,
        "share_of_read": {name: rate / bandwidth for name, rate in rates.items()},
        "vs_fp32": {name: times["fp32"] / times[name] for name in (WIDE, NARROW, HALF)},
    }


def run_kernels(options: argparse.Namespace) -> Row:
    """Fill the grid and print it."""
    with kernels.using(options.path):
        options.running = kernels.environment()["path"]
    limits = machine_limits(options.running)
    times = measure({"fma": limits.multiply_add, "read": limits.read}, max(0.3, options.seconds), best=True)
    peak, bandwidth = limits.flops / 1e9 / times["fma"], limits.nbytes / 1e9 / times["read"]
    gain = int8_gain(options.running)
    print(f"limits: {limits.how}")
    print(
        f"fp32 {peak:.0f} GFLOP/s, so int8 {gain[WIDE] * peak:.0f} GOP/s at 12 bits and {gain[NARROW] * peak:.0f} at 8 "
        f"on {options.running}; read {bandwidth:.1f} GB/s. `limit`: share of that, measured beside each large product; "
        "`error`: against float64 on the same codes"
    )
    print(f"{'N x K':>12} {'M':>5} {'fp32 us':>9} | {'wide: fp32/x':>12} {'fbgemm/x':>8} {'GOP/s':>6} {'limit':>5} {'error':>8} "
          f"| {'8-bit: fp32/x':>13} {'fbgemm/x':>8} {'GOP/s':>6} {'limit':>5} {'error':>8} | {'half: fp32/x':>12}")  # fmt: skip
    table, stream = [], []
    for rows, depth in options.shapes:
        for tokens in options.tokens:
            table.append(kernel_row(rows, depth, tokens, limits, options))
            print(_line(table[-1]), flush=True)
    for rows, depth in options.shapes:
        if 1 in options.tokens and rows * depth > last_level_cache() // 4:
            if not stream:
                print(
                    f"\none token, weights read from memory (copies in turn, beyond the {last_level_cache() >> 20} MiB cache): "
                    "GB/s of weights, share of the read beside it, times faster than fp32"
                )
            stream.append(stream_row(rows, depth, limits, options))
            print(_stream_line(stream[-1]), flush=True)
    summary = _summary(table, stream)
    print()
    for name, value in summary.items():
        print(f"{name}: {value:.2f}")
    limit = {"fp32_gflops": peak, "read_gb_per_s": bandwidth, "int8_gain": gain, "how": limits.how}
    return {"limits": limit, "path": options.running, "rows": table, "stream": stream, "summary": summary}


def _line(row: Row) -> str:
    cells = [f"{row['N']}x{row['K']}".rjust(12), f"{row['M']:5d}", f"{row['us']['fp32']:9.0f}"]
    for name, width in ((WIDE, 12), (NARROW, 13)):
        versus = row.get("vs_linear_dynamic", {}).get(name, math.nan)
        share = f"{row['share_of_limit'][name]:5.0%}" if "share_of_limit" in row else " " * 5
        cells.append(
            f"| {row['vs_fp32'][name]:{width}.2f} {versus:8.2f} {row['gops'][name]:6.0f} {share} {row['error'][name]:8.1e}"
        )
    return " ".join([*cells, f"| {row['vs_fp32'][HALF]:12.2f}"])


def _stream_line(row: Row) -> str:
    cells = [f"{row['N']}x{row['K']}".rjust(12), f"read {row['read_gb_per_s']:.1f}"]
    for name, rate in row["gb_per_s"].items():
        versus = f" {row['vs_fp32'][name]:.2f}x" if name in row["vs_fp32"] else ""
        cells.append(f"| {name} {rate:.1f} {row['share_of_read'][name]:.0%}{versus}")
    return " ".join(cells)


def _summary(table: list[Row], stream: list[Row]) -> dict[str, float]:
    def collect(key: str, name: str) -> Iterable[float]:
        return [row[key][name] for row in table if key in row]

    found: dict[str, float] = {}
    for name in (WIDE, NARROW, HALF):
        found[f"{name} vs fp32, geometric mean"] = geometric_mean(collect("vs_fp32", name))
        found[f"{name} vs fp32, worst point"] = min(collect("vs_fp32", name))
        if name != HALF:
            found[f"{name} vs linear_dynamic, geometric mean"] = geometric_mean(
                collect("vs_linear_dynamic", name)
            )
            large = list(collect("share_of_limit", name))
            if large:
                found[f"{name} share of the int8 limit, large products, geometric mean"] = geometric_mean(
                    large
                )
                found[f"{name} share of the int8 limit, large products, worst"] = min(large)
        if stream:
            shares = [row["share_of_read"][name] for row in stream]
            found[f"{name} share of the read bandwidth at one token, worst"] = min(shares)
    return found
