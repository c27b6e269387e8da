"""The conversion loops against a copy of the same memory."""

import argparse

import torch

from bench.limits import last_level_cache
from bench.timing import Calls, Row, measure
from mono_quant import kernels
from mono_quant.kernels.choice import loaded

HEADER = """\
GB/s, read + written, and the share of a copy of the same source counted the same way: the stricter way, since a conversion
reads more than it writes and reading is the cheaper half. `fresh` writes to new memory, as converting a model does, and includes
the operating system's work on it; otherwise the target is there already. int8 rows include absmax, scales, error sums and the
check for NaN; half counts what overflows. `source` is GB/s of the float weights alone: what a user waits for."""


def run_convert(options: argparse.Namespace) -> Row:
    """Compare the conversion loops with a copy, at a source well beyond the last-level cache."""
    rows = []
    print(HEADER)
    print(f"{'source':>9} {'loop':>19} {'GB/s':>6} {'of a copy':>9} {'source GB/s':>11}")
    for dtype in (torch.float32, torch.bfloat16):
        count = max(128 << 20, 4 * last_level_cache()) // dtype.itemsize // 4096
        source = torch.randn(count, 4096).to(dtype)
        target, half = torch.empty_like(source), torch.empty_like(source, dtype=torch.float16)
        calls: Calls = {
            "copy": lambda s=source, t=target: t.copy_(s),
            "torch to half": lambda s=source, h=half: h.copy_(s),
            **_in_place(source, half),
            "copy fresh": source.clone,
            "to half fresh": lambda s=source: kernels.cast_half(s),
            "to int8 fresh": lambda s=source: kernels.encode_rows(s),
            "torch to int8 fresh": lambda s=source: _torch_int8(s),
        }
        times = measure(calls, options.seconds, options.best)
        written = {"copy": source.nbytes, "half": 2 * source.numel(), "int8": source.numel()}
        for name, seconds in times.items():
            size = source.nbytes + written[next(k for k in ("half", "int8", "copy") if k in name)]
            rows.append({
                "dtype": str(dtype)[6:],
                "loop": name,
                "gb_per_s": size / 1e9 / seconds,
                "source_gb_per_s": source.nbytes / 1e9 / seconds,
            })
        rates = {row["loop"]: row["gb_per_s"] for row in rows if row["dtype"] == str(dtype)[6:]}
        for row in rows[-len(times) :]:
            row["of_copy"] = row["gb_per_s"] / rates["copy fresh" if "fresh" in row["loop"] else "copy"]
            print(
                f"{row['dtype']:>9} {row['loop']:>19} {row['gb_per_s']:6.1f} {row['of_copy']:9.0%} "
                f"{row['source_gb_per_s']:11.1f}"
            )
    return {"rows": rows}


def _torch_int8(source: torch.Tensor) -> torch.Tensor:
    scale = source.abs().amax(1, keepdim=True) / 127
    return (source / scale).round_().to(torch.int8)


def _in_place(source: torch.Tensor, half: torch.Tensor) -> Calls:
    """The two loops writing to memory that is there already, called through the C interface."""
    library = loaded.library
    if library is None:
        return {}
    rows, depth = source.shape
    codes, scale = torch.zeros(rows, depth, dtype=torch.int8), torch.zeros(rows)
    energy, counts = torch.zeros(rows, 2, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    code, threads = {torch.float32: 0, torch.bfloat16: 2}[source.dtype], torch.get_num_threads()
    out = (codes.data_ptr(), scale.data_ptr(), energy.data_ptr())

    def to_int8() -> None:
        library.mq_quantize_rows(threads, rows, depth, source.data_ptr(), code, depth, code, *out)

    def to_half() -> None:
        library.mq_to_half(
            threads, source.numel(), source.data_ptr(), code, half.data_ptr(), counts.data_ptr()
        )

    # `out` holds addresses only
    to_int8.kept = (codes, scale, energy)  # type: ignore[attr-defined]
    return {"to half": to_half, "to int8": to_int8}
