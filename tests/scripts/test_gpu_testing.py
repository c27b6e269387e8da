"""What the tests on a GPU said, read from their log, also of a run that was cut off."""

import subprocess
import sys
from pathlib import Path

from bench.gpu.journal import ERROR, JOURNAL, Journal, read
from gpu.testing import command, write_down

TESTS = """
import pytest

def test_good(): pass

@pytest.mark.parametrize("x", ["a b", 1])
def test_bad(x): assert x == 2, "not two"

@pytest.mark.skip(reason="no")
def test_skipped(): pass
"""


def written(tmp_path, text, code):
    log = tmp_path / "tests.txt"
    log.write_text(text)
    write_down(Journal("tests", tmp_path / JOURNAL, 60), log, code)
    return read(tmp_path / JOURNAL)


def test_counts_and_failures_of_a_real_run(tmp_path):
    file = tmp_path / "test_some.py"
    file.write_text(TESTS)
    line = [
        part for part in command(tmp_path) if "tests/" not in part and part != "-n" and not part.isdigit()
    ]
    done = subprocess.run(
        [*line, "-ra", str(file)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    counts, *failures = written(tmp_path, done.stdout, done.returncode)
    assert (counts["passed"], counts["failed"], counts["skipped"], counts["finished"]) == (1, 2, 1, True)
    assert {row["where"] for row in failures} == {
        "test_some.py::test_bad[a b]",
        "test_some.py::test_bad[1]",
    }
    assert all("not two" in row["what"] for row in failures)


def test_a_run_that_was_cut_off_counts_as_far_as_it_came(tmp_path):
    text = (
        "[gw3] [  1%] PASSED tests/kernels/gpu/test_a.py::test_x[torch.float16-1] \n"
        "[gw0] [  2%] FAILED tests/kernels/gpu/test_a.py::test_y \n"
        "tests/kernels/gpu/test_a.py::test_z \n"
    )
    rows = written(tmp_path, text, None)
    assert (rows[0]["passed"], rows[0]["failed"], rows[0]["finished"]) == (1, 1, False)
    assert [(row["kind"], row["where"]) for row in rows[1:]] == [
        (ERROR, "tests/kernels/gpu/test_a.py::test_y"),
        (ERROR, "tests"),
    ]


def test_tests_that_cannot_be_collected_are_an_error(tmp_path):
    rows = written(tmp_path, "ERROR: file or directory not found\n", 4)
    assert [row["kind"] for row in rows] == ["tests", ERROR] and "code 4" in rows[1]["what"]


def test_the_tests_are_there():
    root = Path(__file__).parents[2]
    paths = [Path(part) for part in command(root) if part.startswith(str(root / "tests"))]
    assert len(paths) == 2 and all(path.exists() for path in paths)
    assert command(root)[0] == sys.executable
