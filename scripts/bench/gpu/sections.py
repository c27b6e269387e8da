"""The sections in order of importance, each in a process of its own: what one breaks, or does not finish, costs the others nothing."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench.gpu import tables
from bench.gpu.clock import Clock
from bench.gpu.experts import run_experts
from bench.gpu.facts import run_facts
from bench.gpu.hosting import run_capture, run_host, run_steps
from bench.gpu.jobs import Job
from bench.gpu.journal import ERROR, JOURNAL, SKIPPED, Journal, read
from bench.gpu.layers import run_layer_peers, run_layers, run_schemes
from bench.gpu.model import run_inductor, run_model, run_model_peers
from bench.gpu.ours import path
from bench.gpu.outliers import run_outliers
from bench.gpu.sizes import DRY, FULL, Sizes
from bench.timing import Row

SCRIPTS = Path(__file__).parents[2]
TABLE, SUMMARY = "gpu.md", "gpu.json"
# Between the end that a section knows of and the one it is given.
_GRACE = 6
# A CPU that interprets is slow whatever the size.
_DRY_SECONDS = 300


@dataclass(frozen=True)
class Section:
    """What is measured.

    Attributes:
        run: measures it.
        seconds: that it may take.
        grows: with the layers of the model.
    """

    run: Callable[[Journal, Clock, Sizes], None]
    seconds: float
    grows: bool = False

    def limit(self, layers: int) -> float:
        """Return the seconds for a model of so many layers."""
        return self.seconds * max(1, layers / FULL.layers) if self.grows else self.seconds


SECTIONS: Mapping[str, Section] = {
    "facts": Section(run_facts, 15),
    "layers": Section(run_layers, 45),
    "model": Section(run_model, 90, grows=True),
    "experts": Section(run_experts, 25),
    "steps": Section(run_steps, 30),
    "host": Section(run_host, 12),
    "outliers": Section(run_outliers, 30),
    "schemes": Section(run_schemes, 15),
    "model_peers": Section(run_model_peers, 45, grows=True),
    "layer_peers": Section(run_layer_peers, 30),
    "capture": Section(run_capture, 90),
    "inductor": Section(run_inductor, 60, grows=True),
}


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        folder: for the results.
        names: of the sections, which run in the order of `SECTIONS`.
        seconds: for all of them; a section that finds none left is skipped.
        layers: of the model.
        dry: walk through everything on a CPU, tiny, on this path of its kernels; empty for a GPU.
    """

    folder: Path
    names: Sequence[str] = tuple(SECTIONS)
    seconds: float = 240
    layers: int = FULL.layers
    dry: str = ""


def run_plan(plan: Plan) -> Row:
    """Run the sections, write the results after each, and return them."""
    end = time.monotonic() + plan.seconds
    for name in SECTIONS:
        if name not in plan.names:
            continue
        seconds = min(
            _DRY_SECONDS if plan.dry else SECTIONS[name].limit(plan.layers), end - time.monotonic() - _GRACE
        )
        journal = Journal(name, plan.folder / JOURNAL, seconds)
        if not journal.enough(name, 5):
            continue
        print(f"== {name}, at most {seconds:.0f} s", flush=True)
        start = time.monotonic()
        problem = _in_process(name, plan, seconds)
        if problem:
            journal.row(ERROR, where=name, what=problem)
        journal.row("ended", seconds=round(time.monotonic() - start, 1))
        write_results(plan.folder)
    return write_results(plan.folder)


def run_gpu(options: argparse.Namespace) -> Row:
    """Run the sections that were asked for, from scripts/benchmark.py."""
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / JOURNAL).unlink(missing_ok=True)
    folder = options.out.resolve()
    result = run_plan(Plan(folder, options.sections, options.limit, options.layers, options.dry))
    print(f"\n{(folder / TABLE).read_text(encoding='utf-8')}\nwritten to {folder}")
    return result


def _in_process(name: str, plan: Plan, seconds: float) -> str:
    """Run a section in a process that is killed when its time is over; say what went wrong, if anything."""
    command = [sys.executable, "-m", "bench.gpu", name, str(plan.folder), f"{seconds:.1f}", str(plan.layers)]
    paths = [str(SCRIPTS.parent), str(SCRIPTS), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    if plan.dry:
        command += ["--dry", plan.dry]
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    code = Job(command, environment).wait(seconds + _GRACE)
    if code is None:
        return f"ended after {seconds + _GRACE:.0f} s: a kernel hangs, or there was too much to do"
    return f"its process ended with code {code}; see the output" if code else ""


def run_section(name: str, folder: Path, seconds: float, layers: int, dry: str) -> None:
    """Measure one section here."""
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    sizes = DRY if dry else replace(FULL, layers=layers)
    journal = Journal(name, folder / JOURNAL, seconds)
    device = torch.device("cpu" if dry else "cuda")
    with path(dry):
        SECTIONS[name].run(journal, Clock(device), sizes)


def write_results(folder: Path) -> Row:
    """Write what the journal holds as one JSON and as tables."""
    rows = read(folder / JOURNAL)
    result = tables.summary(rows)
    tables.write(folder / SUMMARY, folder / TABLE, result)
    return result


def problems(result: Row) -> list[Row]:
    """Return the rows that say that something was not measured."""
    return [row for row in result["rows"] if row["kind"] in (ERROR, SKIPPED)]
