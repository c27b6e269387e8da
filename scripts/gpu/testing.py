"""The tests of the GPU's kernels, run where they are: on the device, or in Triton's interpreter."""

import importlib.util
import sys
from pathlib import Path
from xml.etree import ElementTree

from bench.gpu.journal import ERROR, Journal

# Bit for bit against the reference; then whole models on a device.
TESTS = ("tests/kernels/gpu", "tests/journeys/test_on_a_gpu.py")
_WORKERS = 6


def command(root: Path, xml: Path) -> list[str]:
    """Return what runs the tests; in some processes at once where xdist is installed."""
    at_once = ["-n", str(_WORKERS)] if importlib.util.find_spec("xdist") else []
    # what another environment's packages warn of is no fault of ours
    options = ["-q", "-p", "no:cacheprovider", "-W", "default", f"--junitxml={xml}", f"--rootdir={root}"]
    return [sys.executable, "-m", "pytest", *options, *at_once, *TESTS]


def write_down(journal: Journal, xml: Path, code: int | None) -> None:
    """Write what the tests said as rows: the counts, and each that failed."""
    if code is None or not xml.exists():
        why = "not done in time" if code is None else f"pytest ended with code {code}; see tests.txt"
        journal.row(ERROR, where="tests", what=why)
        return
    cases = list(ElementTree.parse(xml).getroot().iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    journal.row("tests", passed=len(cases) - len(failed) - skipped, failed=len(failed), skipped=skipped)
    for case in failed:
        found = case.find("failure") if case.find("failure") is not None else case.find("error")
        message = "" if found is None else found.get("message", "")
        journal.row(ERROR, where=f"{case.get('classname')}::{case.get('name')}", what=message[:300])
