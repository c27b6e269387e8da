"""Foreign text on one line: quoted, cut at its limit, and without access tokens."""

import pytest

from mono_quant.io.text import listed, looks_like_token, one_line, printable, scrub


def test_a_quoted_text_is_cut_behind_its_limit_and_tells_its_length():
    assert printable("a" * 200) == f"'{'a' * 200}'"
    assert printable("a" * 201) == f"'{'a' * 200}… (201 characters)'"
    assert printable("abcd", 3) == "'abc… (4 characters)'" and printable(3.5) == "'3.5'"


@pytest.mark.parametrize(("text", "shown"), [("a\nb", r"'a\nb'"), ("\u202e", r"'\u202e'"), ("é'", "'é''")])
def test_what_would_move_the_cursor_is_escaped(text, shown):
    assert printable(text) == shown


def test_a_line_has_single_blanks_and_ends_at_its_limit():
    assert one_line("  a\n\tb \u202e c  ") == "a b c"
    assert one_line("a" * 200) == "a" * 200 and one_line("a" * 201) == "a" * 199 + "…"
    assert one_line("abcd", 4) == "abcd" and one_line("abcde", 4) == "abc…" and one_line(12) == "12"


def test_ten_names_are_listed_and_the_others_counted():
    names = [f"n{i}" for i in range(12)]
    ten = ", ".join(f"'n{i}'" for i in range(10))
    assert listed(names[:10]) == ten and listed(names[:11]) == f"{ten} and 1 more"
    assert listed(names) == f"{ten} and 2 more" and listed([]) == ""


@pytest.mark.parametrize("prefix", ["hf_", "api_org_"])
def test_a_token_is_a_prefix_with_sixteen_letters_and_digits(prefix):
    assert looks_like_token(f"x {prefix}{'aZ9' * 5}b y") and not looks_like_token(f"{prefix}{'a' * 15}")
    assert not looks_like_token("a" * 40)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("Bearer abc", "***"),
        ("basic abc,def", "***,def"),
        ("token=hf_12345678;x", "token=***;x"),
        ("api_org_ABC_4567", "***"),
        ("hf_1234567", "hf_1234567"),
        ("my secret\nline", "my *** line"),
        ("a" * 301, "a" * 299 + "…"),
    ],
)
def test_secrets_are_starred_before_a_text_is_cut(text, clean):
    assert scrub(text, "secret", None, "") == clean
