"""Converts one checkpoint into another, in a process of its own that is told when to begin: python -m bench.converting WAY ...

The process writes `ready` once everything is imported and a tiny checkpoint was converted where one is given, waits for a line,
and writes the seconds that the work took. Whoever started it watches its memory meanwhile.
"""

import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

import mono_quant
from mono_quant.api.streaming import StreamOrder, stream
from mono_quant.planning.config import QuantizationConfig
from mono_quant.sources.source import Access

Way = Callable[[Path, Path], object]


def _stream(source: Path, target: Path, *, fidelity: bool = False) -> object:
    order = StreamOrder(QuantizationConfig(fidelity=fidelity), target)
    return stream(source, Access(place="local"), order)


def _in_memory(source: Path, target: Path) -> object:
    return mono_quant.quantize(source, fidelity=False, origin="local").save(target)


WAYS: dict[str, Way] = {
    "stream": _stream,
    "stream, measured": lambda source, target: _stream(source, target, fidelity=True),
    "quantize(folder).save": _in_memory,
}


def main(way: str, source: str, target: str, threads: int) -> None:
    """Convert once, when told to."""
    torch.set_num_threads(threads)
    # what any of the ways imports of transformers' for a Llama
    importlib.import_module(f"{transformers.__name__}.models.llama.modeling_llama")
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    WAYS[way](Path(source), Path(target))
    print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
