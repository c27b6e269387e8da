"""Compile what the benchmark will run, in many processes at once: `python -m gpu.warming FOLDER SECONDS [--dry PATH]`.

Each runs the layers and models themselves, once, so that what they compile is what will be asked for; Triton keeps it on the disk.
"""

import argparse
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import TimeoutError as Late
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from bench.gpu import ours
from bench.gpu.experts import new_experts, routed
from bench.gpu.journal import ERROR, JOURNAL, Journal
from bench.gpu.llama import Decoder, new_llama, prefill
from bench.gpu.sizes import DRY, FULL, Sizes

from mono_quant import kernels

_MOST_WORKERS = 10
# What a process that compiles Triton kernels holds beside the GPU's memory is small; two processors are for the tests beside it.
_LEFT_ALONE = 2

Task = tuple[str, Any]


def tasks(sizes: Sizes) -> Iterator[Task]:
    """Yield what is to be run once, what takes long to compile first."""
    for reads in (True, False):
        for backend in ("", "mono_quant"):
            for batch in (1,) if reads else sizes.batches:
                yield "model", (backend, reads, batch)
    for shape in sizes.experts:
        yield from (("experts", (shape, count)) for count in sizes.expert_tokens)
    for count in sorted({*sizes.tokens, *sizes.host_tokens}, reverse=True):
        yield from (("layer", (shape, count, "auto")) for shape in sizes.shapes)
    for count in reversed(sizes.scheme_tokens):
        for scheme in kernels.SCHEMES:
            yield from (("layer", (shape, count, scheme)) for shape in sizes.scheme_shapes)
    # more bits of a few layers, as the outlier model runs them
    yield from (("outliers", scheme) for scheme in kernels.SCHEMES)


def run_task(task: Task, sizes: Sizes, device: torch.device) -> None:
    """Run a task in this process."""
    kind, what = task
    if kind == "layer":
        shape, count, scheme = what
        layer = ours.quantized(ours.layers(shape, 1, device, sizes.dtype), scheme, inplace=True).model[0]
        layer(torch.randn(count, shape[1], device=device, dtype=sizes.dtype))
    elif kind == "experts":
        shape, count = what
        held = torch.nn.ModuleDict({"experts": new_experts(shape, device, sizes.dtype)})
        ours.quantized(held, inplace=True).model["experts"](*routed(shape, count, device, sizes.dtype))
    elif kind == "outliers":
        model = ours.quantized(new_llama(sizes, 1, device), what, inplace=True).model
        model(input_ids=torch.zeros(1, sizes.measured_tokens, dtype=torch.int64, device=device))
    else:
        backend, reads, batch = what
        # torch's compiler keeps whole graphs
        count = sizes.layers if backend else 1
        model = ours.quantized(new_llama(sizes, count, device), inplace=True).model
        forward = torch.compile(model.forward, backend=backend, dynamic=False) if backend else model
        if reads:
            prefill(model, forward, sizes.prefill)()
        else:
            Decoder(model, forward, batch, sizes.filled, sizes.room).step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def _work(given: tuple[Task, str, int]) -> tuple[Task, float, str]:
    task, dry, layers = given
    start = time.perf_counter()
    problem = ""
    try:
        with ours.path(dry), torch.no_grad():
            run_task(
                task, DRY if dry else replace(FULL, layers=layers), torch.device("cpu" if dry else "cuda")
            )
    except Exception as e:  # noqa: BLE001 - the benchmark will meet it again, and say so where it matters
        problem = f"{type(e).__name__}: {e}"[:300]
    return task, time.perf_counter() - start, problem


def _begin() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def warm(folder: Path, seconds: float, dry: str, layers: int) -> None:
    """Run all tasks, as far as the time goes, and write down how far it went."""
    journal = Journal("warming", folder / JOURNAL, seconds)
    todo = list(tasks(DRY if dry else FULL))
    workers = min(_MOST_WORKERS, max(1, (os.cpu_count() or 1) - _LEFT_ALONE))
    done, slowest, start = 0, (0.0, ""), time.perf_counter()
    pool = get_context("spawn").Pool(workers, _begin)
    try:
        results = pool.imap_unordered(_work, [(task, dry, layers) for task in todo])
        while done < len(todo):
            task, took, problem = results.next(timeout=max(0.1, journal.left()))
            done, slowest = done + 1, max(slowest, (took, str(task)))
            if problem:
                journal.row(ERROR, where=f"{task}", what=problem)
    except Late:
        pass
    finally:
        pool.terminate()
        pool.join()
    journal.row(
        "warmed",
        done=done,
        of=len(todo),
        workers=workers,
        seconds=round(time.perf_counter() - start, 1),
        slowest=f"{slowest[0]:.1f} s: {slowest[1]}",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--dry", default="")
    parser.add_argument("--layers", type=int, default=FULL.layers)
    chosen = parser.parse_args()
    warm(chosen.folder, chosen.seconds, chosen.dry, chosen.layers)
