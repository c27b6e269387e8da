"""Tables on a terminal say the same as the plain text, in its width and its colours."""

import re

import pytest

from mono_quant.apps import screen
from mono_quant.errors import Option, Words
from mono_quant.planning.tables import Columns

PARTS = [
    "10 of 20 parameters (50.0%) would become int8",
    "size    80 B -> 50 B (1.60x smaller)",
    "",
    Columns(
        [["quantized", "1", "linear"], ["kept", "12", Words("embedding (", Option("embeddings", True), ")")]],
        ("", "tensors", "why"),
        right=frozenset({1}),
    ),
    "layers kept in float",
    "weights lowest SQNR 33.5 dB [bold]not markup[/bold]",
    "        on 12 built-in sentences; kernel: native",
    "made by   mono_quant 0.1.0",
    Words("note    see ", Option("skip")),
]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Show the parts on a terminal with these settings; return what it gets."""

    def draw(**env: str) -> str:
        for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "80", **env}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(screen, "is_watched", lambda stream: True)
        screen.show(PARTS, lambda option: f"--{option.name}")
        return capsys.readouterr().out

    return draw


PLAIN = """\
10 of 20 parameters (50.0%) would become int8
size    80 B -> 50 B (1.60x smaller)

           tensors  why
quantized        1  linear
kept            12  embedding (--embeddings)
layers kept in float
weights lowest SQNR 33.5 dB [bold]not markup[/bold]
        on 12 built-in sentences; kernel: native
made by   mono_quant 0.1.0
note    see --skip
"""


def without_colours(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_a_pipe_gets_the_plain_text(capsys):
    screen.show(PARTS, lambda option: f"--{option.name}")
    assert capsys.readouterr().out == PLAIN


def test_a_wide_terminal_gets_the_same_words_in_colours(drawn):
    text = drawn()
    assert [line.rstrip() for line in without_colours(text).splitlines()] == PLAIN.splitlines()
    assert "\x1b[32mquantized\x1b[0m" in text
    assert "\x1b[33mnote    \x1b[0m" in text
    assert "\x1b[1mweights \x1b[0m" in text


def test_no_color_is_respected(drawn):
    text = drawn(NO_COLOR="1")
    assert re.findall(r"\x1b\[3[0-9]m", text) == []


def test_a_narrow_terminal_wraps_within_columns(drawn):
    lines = without_colours(drawn(COLUMNS="36")).splitlines()
    start = lines.index(next(line for line in lines if line.startswith("quantized")))
    table = lines[start : lines.index("layers kept in float")]
    assert max(map(len, table)) <= 36
    assert [line[:20].split() for line in table] == [["quantized", "1"], ["kept", "12"], []]
    assert [line[20:].strip() for line in table] == ["linear", "embedding", "(--embeddings)"]
    # what has no columns is for the terminal to wrap, so that it can be copied whole
    assert "10 of 20 parameters (50.0%) would become int8" in lines
