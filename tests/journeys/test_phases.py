"""Whatever may take its time says so, from a folder to a repository and back."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from models import tiny_llama

import mono_quant
from mono_quant.io.phases import Went, phase, shown


@pytest.fixture
def seen() -> Iterator[list[tuple[str, list[tuple[int, int]]]]]:
    """What was said while a test ran: each phase, and how much of how much it counted."""
    told: list[tuple[str, list[tuple[int, int]]]] = []

    @contextmanager
    def show(what: str, in_bytes: bool) -> Iterator[Went]:
        counted: list[tuple[int, int]] = []
        told.append((what, counted))
        yield lambda done, total: counted.append((done, total))

    with shown(show):
        yield told


def test_each_step_of_the_road_is_said(tmp_path: Path, seen) -> None:
    tiny_llama().save_pretrained(tmp_path / "llama")
    result = mono_quant.quantize(tmp_path / "llama")
    result.save(tmp_path / "out")
    expected = [
        "Reading the model",
        "Loading the original",
        "Measuring the original",
        "Converting LlamaForCausalLM",
        "Measuring the result",
        "Saving",
    ]
    assert [what for what, _ in seen] == expected
    counts = dict(seen)
    layers = len(result.report.quantized)
    assert counts["Converting LlamaForCausalLM"] == [(done, layers) for done in range(layers)]
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    done, total = counts["Saving"][-1]
    assert done == total < size
    assert all(
        a < b or a == b == total
        for (a, _), (b, _) in zip(counts["Saving"], counts["Saving"][1:], strict=False)
    )
    seen.clear()
    mono_quant.load(tmp_path / "out")
    assert [what for what, _ in seen] == ["Checking the files", "Loading the model"]


def test_a_bar_of_the_library_is_for_terminals_alone(capfd: pytest.CaptureFixture[str]) -> None:
    with phase("Converting") as went:
        went(1, 2)
    assert capfd.readouterr() == ("", "")


def test_a_front_end_shows_what_happens_inside_of_it_alone(seen) -> None:
    told: list[str] = []

    @contextmanager
    def show(what: str, in_bytes: bool) -> Iterator[Went]:
        told.append(what)
        yield lambda done, total: None

    with shown(show), phase("inner"):
        pass
    with phase("outer"):
        pass
    assert (told, [what for what, _ in seen]) == (["inner"], ["outer"])
