"""Json text: see the room of this name."""

import json

import pytest

from mono_quant.errors import (
    CorruptCheckpointError,
    LimitExceededError,
    MissingFileError,
    UnsafeInputError,
)
from mono_quant.io.disk.json_text import read_json, read_json_object

BAD_JSON = {
    "empty": (b"", "Expecting value"),
    "array of depth 900": (b"[" * 900 + b"]" * 900, "nested deeper than 64 levels"),
    "object of depth 65": (b'{"a":' * 65 + b"1" + b"}" * 65, "nested deeper than 64 levels"),
    "depth 100000": (b"[" * 100000, "nested deeper than 64 levels"),
    "digits": (b'{"a": ' + b"9" * 10000 + b"}", "an integer has 10000 digits, more than 1000"),
    "NaN": (b'{"a": NaN}', "NaN is not JSON"),
    "infinity": (b'{"a": -Infinity}', "-Infinity is not JSON"),
    "overflow": (b'{"a": 1e999}', "the number '1e999' is too large"),
    "duplicate": (b'{"a": 1, "a": 1}', "the key 'a' is there twice"),
    "inner duplicate": (b'[{"x\\n": 1, "x\\u000a": 1}]', r"the key 'x\\n' is there twice"),
    "byte order mark": (b"\xef\xbb\xbf{}", "starts with a byte order mark"),
    "UTF-16": ("{}".encode("utf-16"), "codec can't decode"),
    "Latin-1": (b'{"a": "\xe9"}', "codec can't decode"),
    "surrogate": (b'{"a": "\\uD800"}', "surrogates not allowed"),
    "trailing": (b"{} x", "Extra data"),
    "control": (b'{"a": "\n"}', "Invalid control character"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_json_that_breaks_a_rule_is_refused(tmp_path, case):
    data, words = BAD_JSON[case]
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(CorruptCheckpointError, match=rf"config\.json'.*{words}.*; fetch it again") as caught:
        read_json(tmp_path / "config.json")
    assert str(caught.value).isprintable()


def test_json_has_a_size_limit_and_a_name(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b'"' + b"x" * (8 << 20) + b'"')
    with pytest.raises(LimitExceededError, match=r"config\.json' is larger than 8388608 bytes; no such file"):
        read_json(path)
    assert len(read_json(path, max_bytes=9 << 20)) == 8 << 20
    path.write_bytes(b"{")
    with pytest.raises(CorruptCheckpointError, match=r"^the config is not valid JSON"):
        read_json(path, what="the config")


def test_the_top_must_be_an_object_where_one_is_expected(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("[1]")
    assert read_json(path) == [1]
    with pytest.raises(
        CorruptCheckpointError, match=r"config\.json' holds a JSON list where an object was expected; f"
    ):
        read_json_object(path)
    with pytest.raises(CorruptCheckpointError, match=r"^the config holds a JSON list"):
        read_json_object(path, what="the config")


def test_valid_json_is_read(tmp_path):
    value = {"a": [1, -2.5, None, True, "é\u202e😀"], "b": {"": 10**900}}
    (tmp_path / "x.json").write_text(json.dumps(value), encoding="utf-8")
    assert read_json_object(tmp_path / "x.json") == value
    (tmp_path / "x.json").write_text("[" * 64 + "]" * 64)
    assert read_json(tmp_path / "x.json")
    with pytest.raises(MissingFileError, match=r"absent\.json' is missing; fetch"):
        read_json(tmp_path / "absent.json")
    (tmp_path / "link.json").symlink_to(tmp_path / "x.json")
    with pytest.raises(UnsafeInputError, match=r"link\.json' is a symbolic link"):
        read_json(tmp_path / "link.json")
