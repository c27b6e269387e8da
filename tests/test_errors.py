"""An error carries the arguments that would help as values; each front end has its own words for them."""

import ast
import copy
import json
import pickle
import re
from pathlib import Path

import mono_quant
from mono_quant.errors import HubAuthError, MonoQuantError, Name, Option, Words, worded

PACKAGE = Path(mono_quant.__file__).parent


def test_a_message_is_python_unless_somebody_words_it() -> None:
    error = MonoQuantError("/x is full; pass ", Option("overwrite", True), ", or ", Option("origin", "hub"))
    assert str(error) == "/x is full; pass overwrite=True, or origin='hub'"
    assert error.worded(lambda o: o.name.upper()) == "/x is full; pass OVERWRITE, or ORIGIN"
    assert error.options == (Option("overwrite", True), Option("origin", "hub"))
    assert str(MonoQuantError("give a ", Option("token"))) == "give a token="
    assert str(MonoQuantError()) == ""
    assert str(MonoQuantError(Name("origin"), " is 7")) == "origin is 7"


def test_words_are_text_that_a_front_end_can_word_anew() -> None:
    inner = Words("only on request (", Option("embeddings", True), ")")
    words = Words("kept: ", inner, 3 * "!")
    assert words == "kept: only on request (embeddings=True)!!!"
    assert worded(words, lambda o: f"--{o.name}") == "kept: only on request (--embeddings)!!!"
    assert worded("embeddings=True", lambda o: "--") == "embeddings=True"
    assert json.loads(json.dumps([words])) == [str(words)]
    for twin in (pickle.loads(pickle.dumps(words)), copy.deepcopy(words)):
        assert type(twin) is Words
        assert (twin, twin.parts) == (words, words.parts)


def test_an_error_can_be_copied_and_sent() -> None:
    error = HubAuthError("pass ", Option("token"))
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is HubAuthError
        assert (str(twin), twin.options) == (str(error), error.options)


def test_no_message_of_an_error_spells_out_an_argument_that_the_command_line_calls_otherwise() -> None:
    words = re.compile(
        r"\b(overwrite|restart|private|create_pr|allow_pickle|trust_remote_code|embeddings|kept|origin|on_nonfinite|on_overflow|token"
        r"|fidelity)=(True|False|'\w+'|$)"
    )
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for text in ast.walk(node) if isinstance(node, ast.Raise) else ():
                if (
                    isinstance(text, ast.Constant)
                    and isinstance(text.value, str)
                    and words.search(text.value)
                ):
                    found.append(f"{path.relative_to(PACKAGE)}:{text.lineno} {text.value!r}")
    assert found == []
