"""Whole models on every stack, each pair in a process of its own."""

import argparse
import functools
import importlib
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from bench import memory
from bench.cases import CASES, LENGTH, PROMPT, STEPS, load
from bench.runner import Runner
from bench.skip import Skip
from bench.stacks import STACKS, Graph, version
from bench.timing import Row, measure

HEADER = f"""\
Random weights but for minilm; decoders without their output head. Texts and prompts have {LENGTH} tokens; decode feeds {STEPS} more
one by one behind a prompt of {PROMPT} in the KV cache. Same weights and inputs for all; PyTorch is eager but for "compiled" and "fused".
ms: one pass, in decode one token. per s: samples, in decode tokens. error: |y - fp32| / |fp32| over the last hidden state.
first s: from what is ready (a converted model, a graph's file) to the end of the first call, with all that is compiled or opened on
the way; in decode with the prompt, which graphs get from fp32. run MiB: peak resident memory while it runs, less what the same process
holds without a model: weights as they are kept, activations and caches; anon MiB: that part of what it holds then which the system
cannot take back (files that a runtime maps are not in it). make MiB: the peak until it is ready, with float model, conversion and export."""
_REFERENCE = "fp32.pt"
# Written last beside a graph's files, which are whole then.
_MADE = "made.json"


def run_worker(options: argparse.Namespace) -> Row:
    """Do one step of one stack on one model; inputs and the fp32 output lie in a folder for the others."""
    step = _written if options.write else _measured
    try:
        return step(options)
    except Skip as e:
        return {"skipped": str(e)}
    except ModuleNotFoundError as e:
        return {"skipped": f"{e.name} is not installed"}


def _written(options: argparse.Namespace) -> Row:
    """Write the files of a graph, in a process whose memory nobody counts as the runtime's."""
    stack = STACKS[options.stack]
    if not isinstance(stack.way, Graph):
        return {}
    for name in ("transformers", *stack.imports):
        importlib.import_module(name)
    before = memory.resident()
    model, inputs = load(options.model, options.batch)
    folder = options.folder / stack.way.files
    # what a run that was interrupted left there
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    stack.way.write(model, CASES[options.model], inputs, folder)
    row = {"make_mib": memory.peak() - before}
    (folder / _MADE).write_text(json.dumps(row), encoding="utf-8")
    return row


def _measured(options: argparse.Namespace) -> Row:
    stack, case = STACKS[options.stack], CASES[options.model]
    row: Row = {}
    for name in stack.imports:
        importlib.import_module(name)
    if isinstance(stack.way, Graph):
        inputs = torch.load(options.folder / _REFERENCE)["inputs"]
        stack.way.open_nothing()
        memory.forget()
        before, anonymous = memory.resident(), memory.anonymous()
        opening = functools.partial(stack.way.open, options.folder / stack.way.files, case, inputs)
    else:
        importlib.import_module("transformers")
        _warm_up(options.model)
        before, anonymous = memory.resident(), memory.anonymous()
        # handed over, so that no name here keeps the float model alive
        made = [load(options.model, options.batch)]
        inputs = made[0][1]
        runner = stack.way(made.pop()[0], case)
        row["make_mib"] = memory.peak() - before
        memory.forget()
        opening = functools.partial(_ready, runner)
    with torch.inference_mode():
        start = time.perf_counter()
        runner = opening()
        runner.reset()
        out = runner.call(inputs)
        row["first_s"] = time.perf_counter() - start
        memory.forget()
        call = functools.partial(runner.call, inputs)
        # a second call in a row would start behind the end of the first
        warm = not case.decode
        seconds = measure({"run": call}, options.seconds, options.best, {"run": runner.ready}, warm=warm)[
            "run"
        ]
    row["run_mib"], row["anon_mib"] = memory.peak() - before, memory.anonymous() - anonymous
    if options.stack == "fp32":
        torch.save({"inputs": inputs, "out": out.clone()}, options.folder / _REFERENCE)
    expected = torch.load(options.folder / _REFERENCE)["out"]
    error = float((out - expected).norm() / expected.norm())
    passes = STEPS if case.decode else 1
    return row | {
        "ms": 1e3 * seconds / passes,
        "per_s": options.batch * passes / seconds,
        "error": error if math.isfinite(error) else None,
        "note": runner.note,
        "version": version(options.stack),
    }


def _ready(runner: Runner) -> Runner:
    return runner


def _warm_up(name: str) -> None:
    """Run the float model once and let it go, so that what Python loads on the way is not counted as the model's."""
    model, inputs = load(name, 1)
    with torch.inference_mode():
        model(**inputs)
    del model
    memory.forget()


def spawn(
    model: str, stack: str, batch: int, folder: Path, options: argparse.Namespace, write: bool = False
) -> Row:
    command = [sys.executable, sys.argv[0], "worker", "--model", model, "--stack", stack]
    command += ["--batch", str(batch), "--folder", str(folder)]
    command += ["--seconds", str(options.seconds), "--threads", str(options.threads)]
    command += [*(["--best"] if options.best else []), *(["--write"] if write else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"skipped": f"took more than {options.timeout} s"}
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        told = [line for line in lines if "Error" in line] or lines
        return {"skipped": f"failed: {told[-1].strip()[:160]}"}
    row: Row = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def run_models(options: argparse.Namespace) -> Row:
    """Run every stack on every model, fp32 first."""
    rows = []
    print(HEADER)
    print(f"{'model':>14} {'batch':>5} {'stack':>20} {'ms':>9} {'fp32/x':>7} {'per s':>8} {'first s':>8} {'run MiB':>8} {'anon MiB':>8} {'make MiB':>8} {'error':>8}")  # fmt: skip
    for model in options.models:
        for batch in options.batches:
            for row in _raced(model, batch, options):
                rows.append(row)
                print(_line(row), flush=True)
    return {"rows": rows, "header": HEADER, "rounds": options.rounds}


def _raced(model: str, batch: int, options: argparse.Namespace) -> Iterator[Row]:
    """Start the stacks in turn, round after round, so that a slow hour of the machine hits all; yield the fastest runs."""
    stacks = ["fp32", *(name for name in options.stacks if name != "fp32")]
    runs: dict[str, list[Row]] = {stack: [] for stack in stacks}
    with tempfile.TemporaryDirectory() as name:
        folder, made = Path(name), dict[str, Row]()
        if options.keep is not None:
            folder = options.keep / f"{model}-{batch}"
            folder.mkdir(parents=True, exist_ok=True)
        for round_ in range(options.rounds):
            for stack in stacks:
                if stack != "fp32" and not (folder / _REFERENCE).exists():
                    runs[stack].append({"skipped": "fp32 did not run"})
                    continue
                if stack == "fp32" and round_ and options.fp32_once:
                    continue
                way = STACKS[stack].way
                files = way.files if isinstance(way, Graph) else ""
                if files and files not in made:
                    there = folder / files / _MADE
                    made[files] = (
                        json.loads(there.read_text(encoding="utf-8"))
                        if there.exists()
                        else spawn(model, stack, batch, folder, options, write=True)
                    )
                if "skipped" in made.get(files, {}):
                    runs[stack].append(made[files])
                elif round_ == 0 or "ms" in runs[stack][0]:
                    runs[stack].append(made.get(files, {}) | spawn(model, stack, batch, folder, options))
    for stack in stacks:
        row = _fastest_run(runs[stack])
        if "ms" in row:
            row["vs_fp32"] = _fastest_run(runs["fp32"])["ms"] / row["ms"]
        yield {"model": model, "batch": batch, "stack": stack, **row}


def _fastest_run(runs: list[Row]) -> Row:
    # a neighbour on the machine, or unlucky places in memory, only ever slow a process down
    timed = sorted((row for row in runs if "ms" in row), key=lambda row: row["ms"])
    return timed[0] | {"all_ms": [row["ms"] for row in timed]} if timed else runs[0]


def _line(row: Row) -> str:
    head = f"{row['model']:>14} {row['batch']:5d} {row['stack']:>20}"
    if "skipped" in row:
        return f"{head} skipped: {row['skipped']}"
    error = "nan" if row["error"] is None else f"{row['error']:.4f}"
    note = f"  {row['note']}" if row["note"] else ""
    return (
        f"{head} {row['ms']:9.2f} {row['vs_fp32']:7.2f} {row['per_s']:8.1f} {row['first_s']:8.2f} "
        f"{row['run_mib']:8.0f} {row['anon_mib']:8.0f} {row['make_mib']:8.0f} "
        f"{error:>8}{note}"
    )
