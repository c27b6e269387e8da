"""Which test runs which line, and how long it takes: measured once for each test file, and kept until something changes."""

import functools
import json
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import coverage
import pytest

from mutation.processes import Deadline, loaded, run_forked, warm
from mutation.workspace import PACKAGE, Workspace

# Plugins are imported before they are forked, too late for their own assertions to be rewritten.
PYTEST = ["-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
PYTEST += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
_CACHED = type(functools.cache(print))


class Recorder:
    """Give each test a coverage context of its own, and each piece of work that tests share.

    A fixture of a module and a cached function of a test file run in whichever test comes first, and the others rely on them.
    """

    def __init__(self, measured: coverage.Coverage, deadline: Deadline) -> None:
        self._measured = measured
        self._deadline = deadline
        self._contexts = [""]
        self.test = ""
        self.seconds: dict[str, float] = {}
        self.shared: dict[str, list[str]] = {}
        self.failed: list[str] = []

    @contextmanager
    def under(self, context: str) -> Iterator[None]:
        self._contexts.append(context)
        self._measured.switch_context(context)
        try:
            yield
        finally:
            self._contexts.pop()
            self._measured.switch_context(self._contexts[-1])

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        for module in {item.module for item in items}:
            for name, value in list(vars(module).items()):
                if isinstance(value, _CACHED):
                    setattr(module, name, Cached(self, value))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Generator[None, object, object]:
        self._deadline.put_off(600)
        self.test = item.nodeid
        self.shared[item.nodeid] = [f"shared {name}" for name in item.fixturenames]
        start = time.monotonic()
        with self.under(item.nodeid):
            result = yield
        self.seconds[item.nodeid] = round(time.monotonic() - start, 4)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Generator[None, object, object]:
        if fixturedef.scope == "function":
            return (yield)
        with self.under(f"shared {fixturedef.argname}"):
            return (yield)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


class Cached:
    """Stands in for a cached function of a test file."""

    def __init__(self, recorder: Recorder, function: Callable[..., object]) -> None:
        self._recorder = recorder
        self._function = function

    def __call__(self, *args: object, **kwargs: object) -> object:
        context = f"shared {self._function.__name__} {args} {kwargs}"
        self._recorder.shared[self._recorder.test].append(context)
        with self._recorder.under(context):
            return self._function(*args, **kwargs)

    def __getattr__(self, name: str) -> object:
        return getattr(self._function, name)


class Record:
    """What was measured: seconds of each test, and the tests that run a line; `failed` fail without any change."""

    def __init__(self, parts: list[Path]) -> None:
        self._parts = []
        self.seconds: dict[str, float] = {}
        self.failed: list[str] = []
        self.modules: set[str] = set()
        for part in parts:
            facts = json.loads(part.read_text(encoding="utf-8"))
            self.seconds |= facts["seconds"]
            self.failed += facts["failed"]
            self.modules |= set(facts["modules"])
            users = defaultdict(set)
            for test, contexts in facts["shared"].items():
                for context in contexts:
                    users[context].add(test)
            data = coverage.CoverageData(str(part.with_suffix(".coverage")))
            data.read()
            self._parts.append((data, users))

    @functools.cache  # noqa: B019  there is one record
    def lines(self, file: str) -> dict[int, set[str]]:
        """Return the tests that run each line of a file; "" among them means that importing it does."""
        found: dict[int, set[str]] = defaultdict(set)
        for data, users in self._parts:
            # the copy lay elsewhere when this was measured
            for measured in data.measured_files():
                if measured.endswith(f"/tree/{file}"):
                    for line, contexts in data.contexts_by_lineno(measured).items():
                        for context in contexts:
                            found[line] |= users[context] if context.startswith("shared ") else {context}
        return found


def record(workspace: Workspace, cache: Path, say: Callable[[str], None]) -> Record:
    """Measure the test files whose measurement is not in the cache.

    Args:
        workspace: whose package is unchanged.
        cache: folder for the measurements.
        say: prints a line.
    """
    folder = cache / workspace.fingerprint()
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for file in workspace.test_files():
        part = folder / f"{workspace.digest(file)}.json"
        parts.append(part)
        if not part.is_file():
            ended = run_forked(workspace, functools.partial(_measure, workspace, file, part))
            if not part.is_file():
                raise RuntimeError(f"{file} could not be measured:\n{ended.log}")
            say(f"measured {file} in {ended.seconds:.0f} s")
            warm(json.loads(part.read_text(encoding="utf-8"))["modules"])
    return Record(parts)


def _measure(workspace: Workspace, file: str, part: Path, deadline: Deadline) -> int:
    measured = coverage.Coverage(
        data_file=part.with_suffix(".coverage"),
        include=[f"{workspace.tree / PACKAGE}/*"],
        config_file=False,
        messages=False,
    )
    recorder = Recorder(measured, deadline)
    measured.start()
    try:
        return int(pytest.main([*PYTEST, file], plugins=[recorder]))
    finally:
        measured.stop()
        measured.save()
        facts = {
            "file": file,
            "seconds": recorder.seconds,
            "shared": recorder.shared,
            "failed": recorder.failed,
            "modules": loaded(),
        }
        part.write_text(json.dumps(facts), encoding="utf-8")
