"""Phases are shown on a terminal once they take longer than a moment; warnings are lines in words of the command line."""

import logging
import re
import sys
import time
from contextlib import suppress

import pytest

from mono_quant.apps import interrupt, progress, screen
from mono_quant.errors import Option
from mono_quant.io.phases import phase


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """stderr is taken for a terminal."""
    monkeypatch.setattr(progress, "is_watched", lambda stream: stream is sys.stderr)
    monkeypatch.setattr(progress, "are_progress_bars_disabled", lambda: False)
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "60"}.items():
        monkeypatch.setenv(name, value)


def shown(text: str) -> list[str]:
    """Return what stood on each line that was drawn, without control characters."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    return [line.strip() for line in re.split(r"[\r\n]", plain) if line.strip()]


def test_phases_that_last_are_shown_while_they_run_and_leave_nothing(terminal, monkeypatch, capsys):
    monkeypatch.setattr(progress, "DELAY", 0.01)
    with progress.seen(str):
        with phase("Outer") as went:
            with phase("Inner"):
                time.sleep(0.3)
            went(1, 2)
            time.sleep(0.3)
        middle = capsys.readouterr()
        sys.stderr.write("a bar of somebody else\n")
        time.sleep(0.2)
        between = capsys.readouterr()
    drawn = shown(middle.err)
    assert any("Inner" in line for line in drawn)
    assert "Inner" not in drawn[-1] and "Outer" in drawn[-1]
    assert "━" not in drawn[0] and "━" in drawn[-1]  # a bar once something is counted
    assert middle.err.endswith("\x1b[2K") or "\x1b[?25h" in middle.err[-20:]
    assert middle.out == ""
    assert (between.out, between.err) == ("", "a bar of somebody else\n")


def test_a_phase_that_is_over_at_once_is_not_shown(terminal, capsys):
    with progress.seen(str), phase("Short"):
        pass
    assert capsys.readouterr() == ("", "")


def test_a_phase_that_fails_is_over(terminal, monkeypatch, capsys):
    monkeypatch.setattr(progress, "DELAY", 0.01)
    with progress.seen(str):
        with suppress(KeyboardInterrupt), phase("Broken"):
            time.sleep(0.2)
            raise KeyboardInterrupt
        assert "\x1b[?25h" in capsys.readouterr().err  # the cursor is back
        time.sleep(0.2)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("how", ["no terminal", "switched off"])
def test_nothing_is_shown_where_nobody_looks(how, terminal, monkeypatch, capsys):
    monkeypatch.setattr(progress, "DELAY", 0.01)
    if how == "no terminal":
        monkeypatch.setattr(progress, "is_watched", lambda stream: False)
    else:
        monkeypatch.setattr(progress, "are_progress_bars_disabled", lambda: True)
    with progress.seen(str), phase("Unseen") as went:
        went(1, 2)
        time.sleep(0.1)
    assert capsys.readouterr() == ("", "")


def test_a_warning_is_one_line_in_words_of_the_command_line(capsys):
    logger = logging.getLogger("mono_quant.some.room")
    place = f"/a/hub/models--org--m/snapshots/{'0123456789' * 4}"
    with progress.seen(lambda option: f"--{option.name}"):
        logger.warning("%s has\n  %d; pass %s", place, 7, Option("origin", "hub"))
        logger.warning("100 % plain")
        logger.info("nobody asked")
    logger.warning("after it")
    assert capsys.readouterr() == (
        "",
        "mono-quant: note: org/m@012345678901 has 7; pass --origin\nmono-quant: note: 100 % plain\n",
    )


def test_somebody_who_watches_sees_that_it_starts(monkeypatch, capsys):
    with screen.starting():
        pass
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(screen, "is_watched", lambda stream: stream is sys.stderr)
    with screen.starting():
        assert capsys.readouterr() == ("", "starting ...")
    assert capsys.readouterr() == ("", interrupt.CLEARED)


@pytest.mark.parametrize(("term", "watched"), [("xterm", True), ("dumb", False), ("unknown", False)])
def test_a_terminal_that_cannot_move_its_cursor_is_none(term, watched, monkeypatch):
    class Stream:
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", term)
    assert interrupt.is_watched(Stream()) is watched
    assert not interrupt.is_watched(None)
