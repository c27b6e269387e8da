"""What waits for a neighbour to be imported."""

import importlib
import sys

import pytest

from mono_quant.hf.late import when_imported


@pytest.fixture
def neighbour(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "late_neighbour").mkdir()
    (tmp_path / "late_neighbour" / "__init__.py").write_text(
        "from late_neighbour import inner\nDONE = True\n"
    )
    (tmp_path / "late_neighbour" / "inner.py").write_text("VALUE = 7\n")
    yield "late_neighbour"
    for name in [n for n in sys.modules if n.startswith("late_neighbour")]:
        del sys.modules[name]


def test_it_runs_when_the_module_is_whole_and_once(neighbour):
    seen = []
    when_imported(f"{neighbour}.inner", lambda: seen.append(sys.modules[f"{neighbour}.inner"].VALUE))
    when_imported(neighbour, lambda: seen.append(sys.modules[neighbour].DONE))
    assert seen == []
    module = importlib.import_module(neighbour)
    assert seen == [7, True]
    importlib.reload(module)
    assert seen == [7, True]


def test_it_runs_at_once_where_the_module_is_there_already(neighbour):
    importlib.import_module(neighbour)
    seen = []
    when_imported(neighbour, lambda: seen.append("now"))
    assert seen == ["now"]


def test_everybody_who_waits_is_told_and_the_loader_stays_what_it_was(neighbour):
    seen = []
    for word in ("a", "b"):
        when_imported(neighbour, lambda word=word: seen.append(word))
    module = importlib.import_module(neighbour)
    assert seen == ["a", "b"]
    assert "exec_module" not in vars(module.__spec__.loader)
    assert module.__spec__.loader.get_source(neighbour).startswith("from late_neighbour")


def test_a_module_that_nobody_has_is_not_found_as_before():
    when_imported("late_nobody", lambda: pytest.fail("it is not there"))
    with pytest.raises(ModuleNotFoundError, match="late_nobody"):
        importlib.import_module("late_nobody")


def test_an_import_that_fails_may_be_tried_again(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    source = tmp_path / "late_broken.py"
    source.write_text("raise RuntimeError('not yet')\n")
    seen = []
    when_imported("late_broken", lambda: seen.append(True))
    with pytest.raises(RuntimeError, match="not yet"):
        importlib.import_module("late_broken")
    source.write_text("VALUE = 'longer, so that no cache is used'\n")
    importlib.invalidate_caches()
    importlib.import_module("late_broken")
    assert seen == [True]
    del sys.modules["late_broken"]
