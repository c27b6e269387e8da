"""A card keeps what its owner wrote, and says nothing false; where both cannot be, it is said why."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mono_quant.artifact import cards
from mono_quant.artifact.card_text import mark, split
from mono_quant.artifact.cards import CardFacts
from mono_quant.artifact.facts import read_card_facts
from mono_quant.artifact.merging import foresee, merge_card
from mono_quant.io.hub.metadata import MAX_CARD_BYTES, CardMetadata
from mono_quant.sources.origin import Origin

GOLDEN = Path(__file__).parents[2] / "model_cards"
INT8, FP16, CNN = (
    read_card_facts(GOLDEN / name, "me/model")
    for name in ("tiny-llama-int8", "tiny-llama-fp16", "small-cnn-int8")
)
A, B = cards.render(INT8), cards.render(FP16)
PAGE = "---\nlicense: mit\ntags:\n- mine\nwidget:\n- text: hi\n---\n\n# Page\n\nWords.\n"


def merged(there: str, facts: CardFacts, earlier: CardFacts | None = None, ours: str | None = None) -> str:
    """Merge, and prove that the outcome is true."""
    found = merge_card(
        there.encode(), earlier.origin if earlier else None, ours or cards.render(facts), facts
    )
    assert found.problems == ()
    assert cards.lint(found.text, facts) == []
    return found.text


def problems(
    there: str | bytes, facts: CardFacts, earlier: CardFacts | None = None, ours: str | None = None
) -> str:
    data = there if isinstance(there, bytes) else there.encode()
    found = merge_card(data, earlier.origin if earlier else None, ours or cards.render(facts), facts)
    assert found.problems
    return "; ".join(found.problems)


def head(text: str) -> dict[str, object]:
    data = yaml.safe_load(split(text).yaml)
    assert isinstance(data, dict)
    return data


# Marks


def test_our_lines_stand_between_marks_that_fit() -> None:
    parts = split(A)
    assert (parts.above.strip(), parts.below.strip()) == ("", "")
    assert parts.is_marked
    assert parts.ours.count("<!-- mono_quant ") == 2
    assert parts.opening + parts.yaml + parts.closing + parts.above + parts.ours + parts.below == A


@pytest.mark.parametrize(
    "edit", [lambda t: t.replace("\n", "\r\n"), lambda t: t.replace("\n", " \n")], ids=["crlf", "blanks"]
)
def test_an_editor_that_changes_line_ends_changes_nothing_of_ours(edit) -> None:
    assert split(edit(A)).ours


@pytest.mark.parametrize(
    "edit",
    [
        lambda t: t.replace("## How to load it", "## How to load"),
        lambda t: t.replace("## How to load it", "Mine.\n\n## How to load it"),
        lambda t: t.replace("<!-- mono_quant ends", "<!-- mono_quant end"),
        lambda t: t + mark("another"),
        lambda t: t.replace("sha256 ", "sha256 0"),
        lambda t: mark("swapped")[::-1] + t,
    ],
    ids=range(6),
)
def test_marks_that_do_not_fit_make_nothing_ours(edit) -> None:
    parts = split(edit(A))
    assert bool(parts.ours) is (edit(A).endswith(A))
    assert parts.is_marked
    assert parts.opening + parts.yaml + parts.closing + parts.above + parts.ours + parts.below == edit(A)


# Merging


def test_a_place_without_a_card_or_with_ours_gets_ours() -> None:
    assert merge_card(None, None, A, INT8).text == A
    for there in ("", "\n", A):
        assert merged(there, INT8, INT8) == A
    assert merged(A, FP16, INT8) == B
    assert merged(A.replace("\n", "\r\n"), FP16, INT8) == B


def test_a_page_of_the_owner_comes_first_and_its_metadata_stays() -> None:
    text = merged(PAGE, INT8)
    assert "\n\n# Page\n\nWords.\n\n<!-- mono_quant begins" in text
    assert {name: head(text)[name] for name in ("license", "widget", "base_model")} == {
        "license": "mit",
        "widget": [{"text": "hi"}],
        "base_model": "example/tiny-llama",
    }
    assert head(text)["tags"] == ["mine", "mono_quant", "int8", "w8a8"]
    assert head(merged("# No metadata\n", INT8)) == head(A)


def test_a_page_keeps_its_line_ends_and_no_byte_order_mark_stands_inside() -> None:
    for page in (PAGE, "# Page\n\nWords.\n"):
        windows = merged(page.replace("\n", "\r\n"), INT8)
        assert windows == merged(page, INT8).replace("\n", "\r\n")
        assert merged(windows, FP16, INT8) == merged(merged(page, INT8), FP16, INT8).replace("\n", "\r\n")
    assert merged("\ufeff# Page\n\nWords.\n", INT8) == merged("# Page\n\nWords.\n", INT8)
    assert merged(f"\ufeff{PAGE}", INT8) == f"\ufeff{merged(PAGE, INT8)}"


@pytest.mark.parametrize("marked", [False, True])
def test_tags_that_are_no_words_stay(marked: bool) -> None:
    page = PAGE.replace("- mine\n", "- mine\n- [a, b]\n- c: d\n")
    text = merged(merged(page, INT8), FP16, INT8) if marked else merged(page, INT8)
    assert head(text)["tags"][:3] == ["mine", ["a", "b"], {"c": "d"}]  # type: ignore[index]


def test_a_merged_card_goes_from_model_to_model_and_back() -> None:
    first = merged(PAGE, INT8)
    second = merged(first, FP16, INT8)
    assert head(second)["tags"] == ["mine", "mono_quant", "fp16"]
    assert "# Page\n\nWords.\n" in second
    assert merged(second, INT8, FP16) == first
    assert merged(first, INT8, INT8) == first


def test_metadata_that_we_wrote_of_an_earlier_model_gives_way() -> None:
    card = CardMetadata(license="apache-2.0", datasets=("x/y",), extra_gated={"extra_gated_prompt": "Old"})
    old = replace(INT8, origin=replace(INT8.origin, repo_id="org/old", card=card))
    there = cards.render(old).replace("library_name: transformers", "library_name: mono_quant\nmine: 1")
    there += "\nWords.\n"
    text = merged(there, INT8, old)
    assert head(text) == head(A) | {"mine": 1}
    # without knowing who wrote it, it is the owner's
    assert "license is 'apache-2.0', but the model's is 'mit'" in problems(there, INT8)


def test_what_the_source_does_not_say_the_owner_may_add_but_no_licence() -> None:
    silent = replace(INT8, origin=replace(INT8.origin, card=CardMetadata()))
    text = merged("---\nlanguage: de\ndatasets: [a/b]\npipeline_tag: fill-mask\n---\n", silent)
    assert (head(text)["language"], head(text)["datasets"]) == ("de", ["a/b"])
    assert "license is 'mit', but the model's is None" in problems("---\nlicense: mit\n---\n", silent)


def test_terms_of_the_owner_for_access_stay_and_ours_are_added() -> None:
    gated = CardMetadata(
        license="mit", extra_gated={"extra_gated_prompt": "Ours", "extra_gated_heading": "Look"}
    )
    facts = replace(INT8, origin=replace(INT8.origin, card=gated))
    text = merged(PAGE.replace("widget", "extra_gated_prompt: Theirs\nwidget"), facts)
    assert (head(text)["extra_gated_prompt"], head(text)["extra_gated_heading"]) == ("Theirs", "Look")


def test_of_a_local_model_the_owner_may_say_more() -> None:
    text = merged("---\nlicense: mit\nbase_model: org/net\n---\nWords.\n", replace(CNN, repo_id="me/x"))
    assert (head(text)["license"], head(text)["base_model"]) == ("mit", "org/net")


def test_a_true_card_stays_as_it_is_although_our_lines_were_edited() -> None:
    there = A.replace("## How to load it", "## Mine\n\nWords.\n\n## How to load it")
    assert merged(there, INT8, INT8) == there
    assert "above or below them; the tags lack fp16; this line is missing" in problems(there, FP16, INT8)


def test_without_marks_a_card_of_ours_is_not_taken_for_a_page() -> None:
    there = "\n".join(line for line in A.splitlines() if "<!-- mono_quant" not in line)
    assert merged(there, INT8, INT8) == A
    assert "above or below them" in problems(there, FP16, INT8)


def test_a_comment_that_the_owner_left_open_hides_nothing_of_ours() -> None:
    assert "never closed" in merged("Words.\n<!-- never closed\n", INT8)


@pytest.mark.parametrize(
    ("there", "says"),
    [
        ("---\nlicense: [\n---\nWords.\n", "its YAML head cannot be read"),
        ("---\n- a\n---\nWords.\n", "no list of 'name: value'"),
        (b"Words.\n\xff", "it is not UTF-8 text (invalid start byte at byte 7)"),
        (b"x" * (MAX_CARD_BYTES + 1), "it is longer than"),
        ("---\nlicense: gpl\n---\n", "license is 'gpl', but the model's is 'mit'"),
        ("---\nbase_model: me/model\n---\n", "base_model is 'me/model', the repository itself"),
        ("---\nlibrary_name: keras\n---\n", "library_name is 'keras'"),
    ],
    ids=range(7),
)
def test_what_cannot_be_merged_is_named(there: str | bytes, says: str) -> None:
    assert says in problems(there, INT8)


def test_two_cards_with_words_are_not_guessed_about() -> None:
    mine = A + "\nFolder.\n"
    assert merged(A, INT8, INT8, ours=mine) == mine
    assert merged(mine, INT8, INT8, ours=mine + "\nMore.\n") == mine + "\nMore.\n"
    assert merged(mine + "\nMore.\n", INT8, INT8, ours=mine) == mine + "\nMore.\n"
    said = problems(A + "\nHub.\n", INT8, INT8, ours=mine)
    assert said == "ours lacks the line 'Hub.', and it lacks the line 'Folder.'"
    tagged = A.replace("- w8a8\n", "- w8a8\n- mine\n").replace("---\n\n", "x: 1\n---\n\n", 1)
    assert "ours lacks the tag 'mine', x: '1'" in problems(tagged, INT8, INT8, ours=mine)


@pytest.mark.parametrize(
    ("there", "says"),
    [
        (None, ()),
        (b"", ()),
        (PAGE.encode(), ()),
        (A.encode(), ()),
        ((A + "\nWords.\n").encode(), ()),
        (b"---\nlicense: gpl\n---\n", ("license is 'gpl', but the model's is 'mit'",)),
        (b"---\nlicense_name: x\n---\n", ("license_name is 'x', but the model's is None",)),
        (b"---\ndatasets: [a/b]\n---\n", ()),
        (b"---\nlanguage: de\n---\n", ("language is 'de', but the model's is ['en']",)),
        (b"---\nlibrary_name: anything\n---\n", ()),
        (b"\xff", ("its metadata cannot be read: it is not UTF-8 text (invalid start byte at byte 0)",)),
    ],
    ids=range(11),
)
def test_what_is_certain_is_known_before_the_model(there: bytes | None, says: tuple[str, ...]) -> None:
    assert foresee(there, INT8.origin, INT8.origin, "me/model") == says
    assert foresee(there, None, INT8.origin, "me/model") == says


def test_an_earlier_model_stands_in_no_ones_way_before_the_work() -> None:
    old = replace(INT8.origin, repo_id="org/old", card=CardMetadata(license="gpl"))
    there = cards.render(replace(INT8, origin=old)).encode()
    assert foresee(there, old, INT8.origin, "me/model") == ()
    assert len(foresee(there, None, INT8.origin, "me/model")) == 2
    assert foresee(there, None, Origin("Net"), "me/model") == ()


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=12)
LINES = st.lists(WORDS.map(lambda line: f"w{line.strip()}"), max_size=4)
META = st.dictionaries(
    st.from_regex(r"x_[a-z]{1,5}", fullmatch=True), WORDS | st.integers() | st.lists(WORDS), max_size=3
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(LINES, LINES, META, st.lists(WORDS.filter(bool), max_size=3), st.booleans())
def test_whatever_the_owner_adds_outlives_two_models(
    above: list[str], below: list[str], meta: dict[str, object], tags: list[str], is_page: bool
) -> None:
    base = "" if is_page else A.split("---\n", 2)[2]
    data = (meta | {"tags": tags}) if is_page else head(A) | meta | {"tags": [*tags, *head(A)["tags"]]}  # type: ignore[misc]
    there = f"---\n{yaml.safe_dump(data, allow_unicode=True)}---\n"
    there += "".join(f"{line}\n" for line in above) + base + "".join(f"{line}\n" for line in below)
    text = merged(merged(there, FP16, INT8), INT8, FP16)
    parts = split(text)
    kept = [line.strip() for line in (parts.above + parts.below).splitlines() if line.strip()]
    assert kept == [line.strip() for line in above + below if line.strip()]
    assert meta.items() <= head(text).items()
    assert set(tags) <= set(head(text)["tags"])  # type: ignore[call-overload]
