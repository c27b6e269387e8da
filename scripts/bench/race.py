"""Sentence encoders in processes of their own, told in turn to run."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from bench.timing import Row

# Which backends run in an environment of their own, by the option that names it.
ELSEWHERE = {"openvino-static": "peers", "openvino-weights": "peers", "onnx": "onnx_python"}
BACKENDS = ("fp32", "ours", "ours-fused", *ELSEWHERE)


def raced(backends: list[str], file: Path, options: argparse.Namespace) -> list[Row]:
    """Return a row for each backend: texts per second, the fastest of some rounds in which each had its turn.

    Args:
        backends: names of `encoder.BACKENDS`.
        file: the job for all of them; embeddings come to lie beside it.
        options: `rounds`, and the interpreters of the environments.
    """
    rows: dict[str, Row] = {}
    started: dict[str, subprocess.Popen[str]] = {}
    for backend in backends:
        python = getattr(options, ELSEWHERE[backend]) if backend in ELSEWHERE else sys.executable
        if python is None:
            rows[backend] = {"skipped": f"needs --{ELSEWHERE[backend].replace('_', '-')} PYTHON"}
            continue
        started[backend] = _start(python, backend, file)
        # one after another, so that no first call disturbs another
        rows[backend] = _answer(started[backend])
    seconds: dict[str, list[float]] = {name: [] for name, row in rows.items() if "skipped" not in row}
    for _ in range(options.rounds):
        for name in list(seconds):
            stdin = started[name].stdin
            if stdin is not None:
                stdin.write("go\n")
                stdin.flush()
            seconds[name].append(_answer(started[name]).get("seconds", float("inf")))
    for process in started.values():
        process.communicate()
    count = len(json.loads(file.read_text(encoding="utf-8"))["texts"])
    for name, times in seconds.items():
        rows[name] |= {"per_s": count / min(times), "all_s": times}
    return [{"model": name, **row} for name, row in rows.items()]


def _start(python: str, backend: str, file: Path) -> subprocess.Popen[str]:
    variables = dict(os.environ)
    if backend in ELSEWHERE:
        # what is importable here need not suit the other environment
        variables.pop("PYTHONPATH", None)
    log = file.with_name(f"{backend}.log").open("w", encoding="utf-8")
    script = str(Path(__file__).with_name("encoder.py"))
    pipe = subprocess.PIPE
    return subprocess.Popen([python, script, backend, str(file)], env=variables, stdin=pipe, stdout=pipe, stderr=log, text=True)  # fmt: skip


def _answer(process: "subprocess.Popen[str]") -> Row:
    line = process.stdout.readline() if process.stdout is not None else ""
    if not line:
        log = Path(process.args[-1]).with_name(f"{process.args[-2]}.log")  # type: ignore[index]
        lines = log.read_text(encoding="utf-8").strip().splitlines() or ["no message"]
        return {"skipped": f"failed: {lines[-1][:160]}"}
    row: Row = json.loads(line)
    return row
