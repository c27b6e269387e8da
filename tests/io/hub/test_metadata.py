"""The metadata of strangers' cards is read as plain data, or not at all."""

import re
from pathlib import Path

import pytest

from mono_quant.io.hub.metadata import (
    NO_CARD,
    CardMetadata,
    edit_metadata,
    local_card,
    parse_metadata,
    split_metadata,
)

BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# Only a body\n",
        "---\nlicense: mit\n---\n# Body\n",
        "---\r\nlicense: mit\r\n---\r\n# Body\r\n",
        "\ufeff---\na: 1\n---",
        "---\n---\n# Nothing in it\n",
        "---\nunclosed: 1\n# Body\n",
        "---\na: |\n  ---\n---   \n\n---\nrule\n",
        "no\n---\na: 1\n---\n",
    ],
)
def test_a_card_is_split_without_losing_a_character(text: str) -> None:
    assert "".join(split_metadata(text)) == text


def test_metadata_stands_between_two_fences_at_the_start() -> None:
    assert split_metadata("---\nlicense: mit\n---\n# Body\n") == (
        "---\n",
        "license: mit\n",
        "---\n",
        "# Body\n",
    )
    assert split_metadata("# Body\n---\nlicense: mit\n---\n")[:3] == ("", "", "")
    assert split_metadata("---\nlicense: mit\n")[:3] == ("", "", "")


@pytest.mark.parametrize(
    "text",
    ["a: [", "- a\n- b\n", "just text", "1: x", "a: !!python/object:os.system x", "a: &a [*a]", "a: .nan", "a: !!set {x}",
     "a: !!binary eA==", "[" * 500, BOMB, "a: \x00"],
    ids=range(12),
)  # fmt: skip
def test_what_is_no_plain_data_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_metadata(text)


def test_a_date_is_the_text_that_it_is() -> None:
    assert parse_metadata("date: 2024-02-30\nnumber: 3\nnone: null\n") == {
        "date": "2024-02-30",
        "number": 3,
        "none": None,
    }


def test_fields_of_another_type_are_left_out(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    assert local_card(readme) == NO_CARD
    readme.write_bytes(
        b"---\nlicense: [mit]\nlanguage: [en, 3]\ndatasets: a/b\nextra_gated_prompt: Hi\nx: 1\n---\n"
    )
    assert local_card(readme) == CardMetadata(
        language=("en",), datasets=("a/b",), extra_gated={"extra_gated_prompt": "Hi"}
    )
    for broken in (b"---\nlicense: mit\n---\n\xff", b"---\nlicense: mit\na: [\n---\n"):
        readme.write_bytes(broken)
        assert local_card(readme) == NO_CARD


def test_a_large_table_of_results_is_read() -> None:
    text = "model-index:\n" + "".join(f"- {{type: t{i}, value: {i / 7}}}\n" for i in range(1000))
    assert len(parse_metadata(text)["model-index"]) == 1000


OWNER = """# from the web page
license: mit # as the original
tags: # ours
- a
- "b: c"

# where it came from
widget:
- text: |
    Hello

    you
  n: [1, 2]
"""


def test_an_entry_is_changed_and_every_other_character_stays() -> None:
    assert edit_metadata(OWNER, {"license": "apache-2.0"}) == OWNER.replace(
        "license: mit", "license: apache-2.0"
    )
    assert edit_metadata(OWNER, {"tags": ["a", "x"]}) == OWNER.replace('- "b: c"\n', "- x\n")
    assert edit_metadata(OWNER, {"widget": None}) == OWNER[: OWNER.index("widget")]
    assert edit_metadata(OWNER, {"new": "x: y", "n": 1}) == OWNER + "new: 'x: y'\nn: 1\n"
    assert edit_metadata(OWNER, {"nothing": None}) == OWNER
    assert edit_metadata("a: 1", {"b": 2}) == "a: 1\nb: 2\n"
    assert edit_metadata("", {"b": [2]}) == "b:\n- 2\n"
    assert edit_metadata("# only a comment\n", {"b": 2}) == "# only a comment\nb: 2\n"


TAGS = "tags: # of ours\n- a # first\n# between\n-  b # second\n# below\nn: 1 # last\n"


def test_a_comment_stays_beside_its_word() -> None:
    longer = TAGS.replace("# second\n", "# second\n- x\n- y\n")
    assert edit_metadata(TAGS, {"tags": ["a", "b", "x", "y"]}) == longer
    assert edit_metadata(longer, {"tags": ["a", "b", "z"]}) == TAGS.replace("# second\n", "# second\n- z\n")
    assert edit_metadata("tags:\n  - a # k", {"tags": ["a", "b"]}) == "tags:\n  - a # k\n  - b"


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        (TAGS, {"tags": ["b", "a"]}),
        (TAGS, {"tags": ["z"], "n": None}),
        (TAGS, {"tags": None}),
        ("  license: mit # one\n  n: 'a # no comment' # two\n", {"tags": ["a"]}),
        ("{license: mit, # one\n n: 1}\n", {"license": "gpl"}),
        ("license: mit # one\n... # two\n", {"tags": ["a"]}),
    ],
    ids=range(6),
)
def test_no_comment_gets_lost_where_an_entry_is_written_anew(text: str, changes: dict[str, object]) -> None:
    edited = edit_metadata(text, changes)
    for comment in re.findall("# (?!no)[a-z ]+", text):
        assert edited.count(comment) == text.count(comment)
    data = parse_metadata(text) | changes
    assert parse_metadata(edited) == {name: value for name, value in data.items() if value is not None}


@pytest.mark.parametrize(
    "text",
    [
        "{license: mit, tags: [a]}\n",
        "tags: &t [a]\nother: *t\nlicense: mit\n",
        "? license\n: mit\ntags: [a]\n",
        '"license": mit\n"tags": [a,\n  b]\n',
        "license:\n    mit\ntags:\n    - a\n    -   b\n",
        "license: >-\n  mit\n\ntags: []\n",
        "license:\ntags:\nnext: 1\n",
        "tags: [a]\r\nlicense: mit\r\nnext: 1\r\n",
        "license: mit\n...\n",
    ],
    ids=range(9),
)
@pytest.mark.parametrize(
    "changes", [{"license": "gpl"}, {"license": None, "tags": ["x", "y"]}, {"tags": None, "z": "w"}]
)
def test_whatever_its_form_the_entries_are_right_afterwards(text: str, changes: dict[str, object]) -> None:
    data = parse_metadata(text)
    wanted = {
        name: value for name, value in {**data, **changes}.items() if name not in changes or value is not None
    }
    assert parse_metadata(edit_metadata(text, changes)) == wanted
