"""Time every way to cut up a product at many shapes, and print the table that follows: `scripts/tune_gpu`.

Each is held against the reference, bit for bit, before it is timed. Kernels are compiled in many processes first; a configuration
that hangs is the end of the run, but not of what was found.
"""

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import TimeoutError as Late
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from bench.gpu import ours
from bench.gpu.clock import Clock
from bench.gpu.journal import ERROR, Journal
from bench.gpu.layers import copies, timed

from gpu.candidates import Point, candidates, rows_of, source
from mono_quant.kernels import SCHEMES, reference
from mono_quant.kernels.activations import ActivationScheme
from mono_quant.kernels.gpu.features import INTERPRETED, features_of
from mono_quant.kernels.gpu.launch import launch
from mono_quant.kernels.gpu.products import call_of
from mono_quant.kernels.gpu.quantize import quantize
from mono_quant.kernels.gpu.tables import Config

JOURNAL, TABLE = "tuning.jsonl", "tuning.txt"
_WORKERS = 12
_MOST_COPIES = 64
# Of the one process that measures, what is for compiling before it.
_COMPILING = 0.4


@dataclass(frozen=True)
class Grid:
    """What is tried: every M with every N and every K, in every scheme."""

    tokens: Sequence[int]
    outputs: Sequence[int]
    depths: Sequence[int]
    schemes: Sequence[str]

    def points(self) -> Iterator[Point]:
        return ((m, n, k) for n in self.outputs for k in self.depths for m in self.tokens)


FULL = Grid(
    (1, 4, 16, 64, 256, 1024, 4096),
    (1024, 4096, 8192, 14336),
    (1024, 4096, 14336),
    ("int8", "int12", "int8-g128"),
)
DRY = Grid((1, 20), (16, 32), (128,), ("int8",))


@dataclass(frozen=True)
class Product:
    """One product, ready to be cut up in any way.

    Attributes:
        layers: int8 layers with a weight each.
        x: the tokens.
        scheme: what becomes of them.
    """

    layers: Sequence[Any]
    x: torch.Tensor
    scheme: ActivationScheme

    def run(self, config: Config, layer: Any) -> torch.Tensor:
        """Return the product with the weight of a layer, of codes made anew."""
        codes = quantize(self.x, self.scheme)
        out = self.x.new_empty(len(self.x), layer.out_features)
        device = self.x.device
        overlap = features_of(device).overlap
        call = call_of(config, codes, layer.codes(), layer.scale(), layer.bias, out, overlap)
        how = {"warps": call.warps, "stages": call.stages, "overlap": overlap}
        launch(call.kernel, call.grid, call.args, call.constants, device=device, **how)
        return out


def shape_of(scheme: ActivationScheme, depth: int) -> tuple[int, int]:
    """Return planes and group of the codes of rows so long."""
    return (1 if scheme.widest_code(depth) <= reference.QMAX else 2), (
        scheme.group if scheme.group < depth else 0
    )


def product(
    point: Point, scheme: ActivationScheme, device: torch.device, most: int = _MOST_COPIES
) -> Product:
    """Return a product of random numbers."""
    count, rows, depth = point
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    floats = ours.layers((rows, depth), copies((rows, depth), device, most), device, dtype)
    layers = ours.quantized(floats, scheme.name, inplace=True).model
    return Product(list(layers), torch.randn(count, depth, device=device, dtype=dtype), scheme)


def tune(
    journal: Journal, clock: Clock, grid: Grid, scheme: ActivationScheme, *, more: bool
) -> dict[Point, Config]:
    """Return what is fastest at each point, as far as the time goes."""
    features, best = features_of(clock.device), {}
    for point in grid.points():
        planes, group = shape_of(scheme, point[2])
        if not journal.enough(f"{scheme.name} {point}", 2):
            break
        ready = product(point, scheme, clock.device)
        expected = reference.linear(
            ready.x, ready.layers[0].codes(), ready.layers[0].scale(), ready.layers[0].bias, scheme
        )
        fastest = None
        for config in candidates(point, planes, group, features, more=more):
            seconds = _time(journal, clock, ready, config, expected)
            if seconds is not None and (fastest is None or seconds < fastest):
                fastest, best[point] = seconds, config
        if fastest is not None:
            values = {"M": point[0], "N": point[1], "K": point[2], "scheme": scheme.name}
            journal.row("best", **values, us=1e6 * fastest, config=str(best[point]))
    return best


def _time(
    journal: Journal, clock: Clock, ready: Product, config: Config, expected: torch.Tensor
) -> float | None:
    try:
        wrong = int((ready.run(config, ready.layers[0]) != expected).sum())
        if wrong:
            journal.row(ERROR, where=str(config), what=f"{wrong} results are not the reference's")
            return None
        calls = [lambda x, layer=layer: ready.run(config, layer) for layer in ready.layers]
        seconds = timed(clock, calls, ready.x)
    except Exception as e:  # noqa: BLE001 - the others are timed
        journal.error(str(config), e)
        return None
    journal.row("config", M=len(ready.x), scheme=ready.scheme.name, us=1e6 * seconds, config=str(config))
    return seconds


def _compile(given: tuple[Config, str, int]) -> str:
    """Run a configuration once, in a process of its own, so that Triton keeps it."""
    config, name, count = given
    device, scheme = torch.device("cuda"), SCHEMES[name]
    try:
        with torch.no_grad():
            ready = product((count, 1024, 4096), scheme, device, 1)
            ready.run(config, ready.layers[0])
            torch.cuda.synchronize()
    except Exception as e:  # noqa: BLE001 - it will fail again where it is timed, and be written down there
        return f"{config}: {type(e).__name__}"
    return ""


def compile_all(grid: Grid, seconds: float, *, more: bool) -> None:
    """Compile in many processes what will be timed, as far as the time goes."""
    todo: dict[tuple[Config, str, int], None] = {}
    # by a device like the one that is here, which this process does not touch before the others have ended
    with get_context("spawn").Pool(1) as pool:
        features = pool.apply(_features)
    for name in grid.schemes:
        for point in grid.points():
            planes, group = shape_of(SCHEMES[name], point[2])
            for config in candidates(point, planes, group, features, more=more):
                # the number of tokens is a constant of a kernel only where there are few
                todo.setdefault((config, name, point[0] if point[0] <= 4 else 16))
    end = time.monotonic() + seconds
    pool = get_context("spawn").Pool(min(_WORKERS, max(1, (os.cpu_count() or 2) - 2)))
    try:
        results = pool.imap_unordered(_compile, todo)
        for done in range(len(todo)):
            problem = results.next(timeout=max(0.1, end - time.monotonic()))
            if problem:
                print(f"  {done + 1} of {len(todo)}: {problem}", flush=True)
    except Late:
        print("  the time for compiling is over", flush=True)
    finally:
        pool.terminate()
        pool.join()


def _features() -> Any:
    return features_of(torch.device("cuda", 0))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/tune_gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-results")))
    parser.add_argument("--seconds", type=float, default=285)
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--outputs", type=int, nargs="+", help="N; multiples of 16")
    parser.add_argument("--depths", type=int, nargs="+", help="K; multiples of 16")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES)
    parser.add_argument("--table-only", action="store_true", help="try what the table has, nothing more")
    parser.add_argument("--dry", action="store_true", help="tiny, on a CPU in Triton's interpreter")
    given = parser.parse_args(arguments)
    if given.dry and not INTERPRETED:
        parser.error("--dry needs TRITON_INTERPRET=1 in the environment")
    base = DRY if given.dry else FULL
    names = ("tokens", "outputs", "depths", "schemes")
    grid = Grid(*(getattr(given, name) or getattr(base, name) for name in names))
    return _run(given, grid)


def _run(given: argparse.Namespace, grid: Grid) -> int:
    torch.set_grad_enabled(False)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / JOURNAL).unlink(missing_ok=True)
    journal = Journal("tuning", given.out / JOURNAL, given.seconds)
    if not given.dry:
        compile_all(grid, _COMPILING * given.seconds, more=not given.table_only)
    clock = Clock(torch.device("cpu") if given.dry else torch.device("cuda", 0))
    text = ""
    for name in grid.schemes:
        scheme = SCHEMES[name]
        best = tune(journal, clock, grid, scheme, more=not given.table_only)
        if len(best) < len(list(grid.points())):
            journal.row(
                ERROR, where=name, what=f"{len(best)} points were measured; a table needs all of the grid"
            )
            continue
        planes, group = shape_of(scheme, max(grid.depths))
        text += f"    # {name}\n" + source(rows_of(best, planes, grouped=group > 0))
        (given.out / TABLE).write_text(text, encoding="utf-8")
    print(text)
    return 0 if text else 1


if __name__ == "__main__":
    raise SystemExit(main())
