"""Whether the tests notice a mutant: those that run its lines, in a process that imports the spoilt copy."""

import ast
import importlib.util
import re
import signal
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mutation.mutants import Mutant
from mutation.processes import FAULT, Deadline, Ended, run_forked
from mutation.recording import PYTEST, Record
from mutation.workspace import PACKAGE, Workspace


class Verdict(NamedTuple):
    """`kind` is failed, hung, died, survived or not run; `by` is the test that noticed it."""

    kind: str
    by: str
    tests: int
    seconds: float

    @property
    def is_noticed(self) -> bool:
        return self.kind in ("failed", "hung", "died")


def choose(mutant: Mutant, record: Record, workspace: Workspace, limit: float) -> list[str]:
    """Return the tests to run for a mutant: those of its room first, then file by file, what takes longer last.

    Args:
        limit: seconds after which no further file is begun, by the time that its tests took when they were measured.
    """
    tests = _that_run(mutant.file, mutant.statement, record, workspace)
    room = _test_file(mutant.file)
    by_file = defaultdict(list)
    for test in tests | {test for test in record.seconds if tests and test.startswith(f"{room}::")}:
        if test in record.seconds and test not in record.failed:
            by_file[test.split("::")[0]].append(test)
    for part in by_file.values():
        part.sort(key=lambda test: (record.seconds[test], test))
    order = sorted(
        by_file, key=lambda file: (file != room, sum(record.seconds[test] for test in by_file[file]))
    )
    spent, found = 0.0, []
    for file in order:
        if found and spent > limit:
            break
        found += by_file[file]
        spent += sum(record.seconds[test] for test in by_file[file])
    return found


def _test_file(file: str) -> str:
    path = Path(file).relative_to(PACKAGE)
    return (Path("tests") / path.parent / f"test_{path.name}").as_posix()


def _that_run(file: str, statement: range, record: Record, workspace: Workspace) -> set[str]:
    """Return the tests that run a statement; of one that runs at import those that run what it is for."""
    lines = record.lines(file)
    tests = set().union(*(lines.get(line, ()) for line in statement))
    if "" not in tests:
        return tests
    tree = ast.parse((workspace.tree / file).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.lineno <= statement.stop and node.lineno in statement:
            body = range(node.body[0].lineno, (node.end_lineno or 0) + 1)
            return set().union(*(lines.get(line, ()) for line in body)) - {""}
    names = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.lineno in statement
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    found = _that_mention(names, record, workspace) if names else set()
    return found or set().union(*lines.values()) - {""}


def _that_mention(names: set[str], record: Record, workspace: Workspace) -> set[str]:
    """Return the tests that run a line of the package that names one of `names`."""
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")
    found: set[str] = set()
    for path in workspace.package_files():
        text = path.read_text(encoding="utf-8")
        if not pattern.search(text):
            continue
        lines = record.lines(path.relative_to(workspace.tree).as_posix())
        for number, line in enumerate(text.splitlines(), 1):
            if pattern.search(line):
                found |= lines.get(number, set())
    return found - {""}


class Chosen:
    """Keep only the chosen tests, in their order, and write down what fails."""

    def __init__(self, seconds: dict[str, float], deadline: Deadline, told: Path) -> None:
        self._seconds = seconds
        self._deadline = deadline
        self._told = told

    def _tell(self, what: str) -> None:
        with self._told.open("a", encoding="utf-8") as file:
            file.write(f"{what}\n")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        found = {item.nodeid: item for item in items}
        items[:] = [found[test] for test in self._seconds if test in found]
        if not items:
            self._tell("none of its tests is collected")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._deadline.put_off(30 + 20 * self._seconds[nodeid])

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self._tell(report.nodeid)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._tell(f"{report.nodeid} cannot be imported")


def judge(mutant: Mutant, tests: list[str], record: Record, workspace: Workspace) -> Verdict:
    """Run tests on the spoilt copy until one fails."""
    if not tests:
        return Verdict("not run", "", 0, 0.0)
    with workspace.spoilt(mutant):
        ended, told = _run(tests, record, workspace, ["-x"])
    if ended.status == -signal.SIGTERM:
        raise RuntimeError("the tests were ended from outside; go on with --again")
    if ended.status == 0:
        kind = "survived"
    elif ended.status is None:
        kind = "hung"
    elif ended.status < 0:
        kind = "died"
    elif told:
        kind = "failed"
    else:
        raise RuntimeError(f"pytest ended with {ended.status} and named no test:\n{ended.log}")
    return Verdict(kind, told[0] if told else "", len(tests), round(ended.seconds, 1))


def unreliable(tests: list[str], record: Record, workspace: Workspace) -> list[str]:
    """Run tests on the good copy and return those that fail there."""
    ended, told = _run(tests, record, workspace, [])
    if ended.status not in (0, 1) and not told:
        raise RuntimeError(
            f"the tests cannot be run without a change (pytest ended with {ended.status}):\n{ended.log}"
        )
    return told


def _run(
    tests: list[str], record: Record, workspace: Workspace, options: list[str]
) -> tuple[Ended, list[str]]:
    told = workspace.scratch / "told"
    told.write_bytes(b"")
    seconds = {test: record.seconds[test] for test in tests}
    ended = run_forked(workspace, partial(_run_pytest, workspace, seconds, told, options))
    return ended, told.read_text(encoding="utf-8").splitlines()


def _run_pytest(
    workspace: Workspace, seconds: dict[str, float], told: Path, options: list[str], deadline: Deadline
) -> int:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not (spec.origin or "").startswith(str(workspace.tree)):
        print(f"{PACKAGE} would be imported from {spec and spec.origin}, not from the copy")
        return FAULT
    # most mutants fall in the first file, and the others need not be imported then
    files = list(dict.fromkeys(test.split("::")[0] for test in seconds))
    for part in (files[:1], files[1:]):
        chosen = {test: time for test, time in seconds.items() if test.split("::")[0] in part}
        status = (
            pytest.main([*PYTEST, *options, *part], plugins=[Chosen(chosen, deadline, told)]) if part else 0
        )
        if status and "-x" in options:
            break
    return int(status)
