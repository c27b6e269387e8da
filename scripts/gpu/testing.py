"""The tests of the GPU's kernels, run where they are: on the device, or in Triton's interpreter."""

import importlib.util
import re
import sys
from pathlib import Path

from bench.gpu.journal import ERROR, Journal

# Bit for bit against the reference; then whole models on a device.
TESTS = ("tests/kernels/gpu", "tests/journeys/test_on_a_gpu.py")
# Most of the time goes into compiling kernels for ever other shapes.
_WORKERS = 10
# As `pytest -v` says it of each test, alone or with xdist; and of failures at the end.
_ALONE = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b", re.MULTILINE)
_AT_ONCE = re.compile(r"^\[gw\d+\].*? (PASSED|FAILED|ERROR|SKIPPED|XFAIL) (\S+::.+?)\s*$", re.MULTILINE)
_WHY = re.compile(r"^(?:FAILED|ERROR) (\S+::.+?) - (.+)$", re.MULTILINE)


def command(root: Path) -> list[str]:
    """Return what runs the tests; in some processes at once where xdist is installed."""
    at_once = ["-n", str(_WORKERS)] if importlib.util.find_spec("xdist") else []
    # what another environment's packages warn of is no fault of ours
    options = ["-v", "--color=no", "-p", "no:cacheprovider", "-W", "default", f"--rootdir={root}"]
    return [sys.executable, "-m", "pytest", *options, *at_once, *(str(root / path) for path in TESTS)]


def write_down(journal: Journal, log: Path, code: int | None) -> None:
    """Write what the tests said as rows: the counts, and each that failed; of a run that was cut off, as far as it came."""
    text = log.read_text(encoding="utf-8", errors="replace")
    found = dict(_ALONE.findall(text)) | {name: word for word, name in _AT_ONCE.findall(text)}
    words = list(found.values())
    failed = [name for name, word in found.items() if word in ("FAILED", "ERROR")]
    passed, skipped = words.count("PASSED"), words.count("SKIPPED") + words.count("XFAIL")
    journal.row("tests", passed=passed, failed=len(failed), skipped=skipped, finished=code is not None)
    why = dict(_WHY.findall(text))
    for name in failed:
        journal.row(ERROR, where=name, what=why.get(name, "failed; see tests.txt")[:300])
    if code is None:
        journal.row(ERROR, where="tests", what="not done in time: what was not run is not counted")
    elif code != 0 and not failed:
        journal.row(ERROR, where="tests", what=f"pytest ended with code {code}; see tests.txt")
