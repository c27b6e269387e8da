"""The run on a GPU: tests and compiling at once, then the benchmark; what is found is on the disk all the while."""

import argparse
import shutil
import sys
import time
from pathlib import Path

from bench.gpu.jobs import Job
from bench.gpu.journal import ERROR, JOURNAL, Journal
from bench.gpu.sections import SECTIONS, SUMMARY, TABLE, Plan, problems, run_plan, write_results
from bench.gpu.sizes import FULL

from gpu import testing

ROOT = Path(__file__).parents[2]
# Of a run: the tests, and compiling beside them. The rest is for what is measured, for which nothing may run beside it.
_TESTS, _WARMING = 90, 75
# A CPU that interprets is slow whatever the size.
_DRY_SECONDS = 900
_LIBRARY = "mono_quant/kernels/libmono_quant.so"


def check(given: argparse.Namespace) -> int:
    """Run everything; return 0 only if all of it was measured and no test failed."""
    end = time.monotonic() + given.seconds
    folder = given.out.resolve()
    for name in (JOURNAL, SUMMARY, TABLE):
        (folder / name).unlink(missing_ok=True)
    _prepare(given, folder)
    write_results(folder)
    plan = Plan(
        folder,
        tuple(given.sections or SECTIONS),
        _DRY_SECONDS if given.dry else end - time.monotonic(),
        given.layers or FULL.layers,
        given.dry,
    )
    result = run_plan(plan)
    print(f"\n{(folder / TABLE).read_text(encoding='utf-8')}\nwritten to {folder}")
    return 1 if problems(result) else 0


def _prepare(given: argparse.Namespace, folder: Path) -> None:
    """Run the tests, and compile what the benchmark will run, at the same time."""
    allowed = _DRY_SECONDS if given.dry else max(_TESTS, _WARMING)
    journal = Journal("tests", folder / JOURNAL, allowed)
    if not (ROOT / _LIBRARY).exists():
        journal.row("note", what=f"{_LIBRARY} is not there: the CPU's side is plain torch")
    if not given.dry and shutil.which("nvidia-smi"):
        Job(["nvidia-smi"], {}, folder / "nvidia-smi.txt").wait(15)
    environment = {"OMP_NUM_THREADS": "1"}
    if given.dry:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    log = folder / "tests.txt"
    start, tests, warming = time.monotonic(), None, None
    if not given.no_tests:
        tests = Job(testing.command(ROOT), environment, log)
    if not given.no_warming:
        seconds = _DRY_SECONDS if given.dry else _WARMING
        command = [sys.executable, "-m", "gpu.warming", str(folder), str(seconds - 5)]
        command += ["--layers", str(given.layers or FULL.layers)]
        if given.dry:
            command += ["--dry", given.dry]
        warming = Job(command, environment, folder / "warming.txt")
    # whichever takes longer
    if warming is not None:
        code = warming.wait(_DRY_SECONDS if given.dry else _WARMING)
        if code != 0:
            journal.row(ERROR, where="warming", what=f"ended with code {code}; see warming.txt")
    if tests is not None:
        limit = _DRY_SECONDS if given.dry else _TESTS
        testing.write_down(journal, log, tests.wait(limit - (time.monotonic() - start)))
