"""A folder is absent, the old one or the new one; it holds what is allowed and nothing else."""

import errno
import hashlib
import json
import os
import stat

import pytest
from folders import BAD, leftovers, listing, os_error, save, snapshot

from mono_quant.errors import (
    CorruptCheckpointError,
    MissingFileError,
    OutputError,
    OutputWriteError,
    UnsafeInputError,
)
from mono_quant.io.disk import disk, output, reading
from mono_quant.io.disk.manifest import verify_manifest
from mono_quant.io.disk.output import new_folder
from mono_quant.version import __version__


class Stop(BaseException):
    """Stands for anything that is no Exception."""


def test_a_finished_folder_has_every_file_and_its_manifest(tmp_path):
    save(tmp_path / "out", 1)
    names = ["1_Pooling/config.json", "config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(snapshot(tmp_path / "out")) == sorted([*names, "mono_quant.json"])
    text = (tmp_path / "out" / "mono_quant.json").read_text(encoding="utf-8")
    manifest = json.loads(text)
    assert text == json.dumps(manifest, sort_keys=True, indent=2) + "\n"
    assert list(manifest["files"]) == names
    assert manifest["format_version"] == 1 and manifest["source"] == "tests"
    assert manifest["mono_quant_version"] == __version__
    assert leftovers(tmp_path) == []
    verify_manifest(tmp_path / "out", hashes=True)


def test_the_same_content_gives_the_same_bytes(tmp_path):
    save(tmp_path / "a", 1)
    save(tmp_path / "b", 1)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


def test_nothing_is_visible_before_the_end_and_the_path_follows(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        assert not (tmp_path / "out").exists()
        assert folder.path.parent == tmp_path and folder.path.name.startswith(".out.mq-")
    assert folder.path == tmp_path / "out"


def test_the_manifest_is_the_last_file_written(tmp_path, monkeypatch):
    opened = []

    class Watching(disk._Ops):
        def open(self, path):
            opened.append(path.name)
            return super().open(path)

    monkeypatch.setattr(disk, "_ops", Watching())
    save(tmp_path / "out", 1)
    assert opened[-1] == "mono_quant.json" and opened.count("mono_quant.json") == 1


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_modes_follow_the_umask(tmp_path, umask):
    def private(path):
        (path / "tokenizer.json").write_text("{}")
        (path / "tokenizer.json").chmod(0o600)

    before = os.umask(umask)
    try:
        with new_folder(tmp_path / "out") as folder:
            folder.write_text("1_Pooling/config.json", "{}")
            folder.adopt(private)
    finally:
        os.umask(before)
    for path in (tmp_path / "out").rglob("*"):
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


def test_missing_parents_are_made_and_taken_back_after_a_failure(tmp_path):
    with pytest.raises(Stop), new_folder(tmp_path / "a" / "b" / "out"):
        raise Stop
    assert listing(tmp_path) == []
    save(tmp_path / "a" / "b" / "out", 1)
    assert (tmp_path / "a" / "b" / "out" / "config.json").exists()


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "out").mkdir()
    save(tmp_path / "out", 1)
    verify_manifest(tmp_path / "out", hashes=True)


def test_a_relative_target_and_one_that_ends_in_dots_work(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    save("out/../other", 1)
    assert listing(tmp_path) == ["other", "out"]


@pytest.mark.parametrize("failure", [Stop, KeyboardInterrupt, RuntimeError])
def test_an_exception_in_the_body_leaves_nothing(tmp_path, failure):
    def work():
        with new_folder(tmp_path / "out") as folder:
            folder.write_text("README.md", "x")
            raise failure

    with pytest.raises(failure):
        work()
    assert listing(tmp_path) == []


def test_the_manifest_is_not_for_the_caller(tmp_path):
    with (
        pytest.raises(OutputError, match=r"'mono_quant\.json' may not"),
        new_folder(tmp_path / "out") as folder,
    ):
        folder.write_text("mono_quant.json", "{}")


def test_a_file_is_written_once(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        folder.write_json("config.json", {})
        with pytest.raises(OutputError, match=r"'config\.json' was written already; write each file once"):
            folder.write_json("config.json", {})


def test_json_is_canonical(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        folder.write_json("config.json", {"b": "é", "a": [1]})
    assert (
        tmp_path / "out" / "config.json"
    ).read_bytes() == '{\n  "a": [\n    1\n  ],\n  "b": "é"\n}\n'.encode()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"x": object()}, {1: 1, "a": 2}, "\ud800"])
def test_json_that_others_cannot_read_is_refused(tmp_path, value):
    with (
        pytest.raises(OutputError, match=r"'config\.json' cannot be written as JSON"),
        new_folder(tmp_path / "o") as f,
    ):
        f.write_json("config.json", value)


def test_adopt_takes_model_files_only(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("x")

    def third_party(path):
        for name in [
            "tokenizer.json",
            "vocab.txt",
            *(name for name in BAD[:30] if "." in name and "/" not in name),
        ]:
            if name != "..model":
                (path / name).write_text(name)
        (path / ".git").mkdir()
        (path / ".git" / "config").write_text("x")
        (path / "additional_chat_templates").mkdir()
        (path / "additional_chat_templates" / "a.jinja").write_text("x")
        (path / "merges.txt").symlink_to(secret)
        (path / "LICENSE").symlink_to(tmp_path)
        os.mkfifo(path / "vocab.json")
        (path / "config.json").write_text("theirs")
        (path / "mono_quant.json").write_text("theirs")

    with new_folder(tmp_path / "out") as folder:
        folder.write_text("config.json", "ours")
        dropped = folder.adopt(third_party)
    kept = [
        "additional_chat_templates/a.jinja",
        "config.json",
        "mono_quant.json",
        "tokenizer.json",
        "vocab.txt",
    ]
    assert sorted(snapshot(tmp_path / "out")) == kept
    assert (tmp_path / "out" / "config.json").read_text() == "ours"
    assert {"merges.txt", "LICENSE", "vocab.json", "config.json", ".git/config", ".env", "setup.py"} <= set(
        dropped
    )
    verify_manifest(tmp_path / "out", hashes=True)


def test_an_error_of_a_third_party_passes_and_a_full_disk_is_ours(tmp_path):
    def missing(path):
        (path / "nowhere" / "x").read_text()

    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "out") as folder:
        folder.adopt(missing)
    with (
        pytest.raises(OutputWriteError, match=r"No space left.*available \d+ bytes; free some space"),
        new_folder(tmp_path / "out") as folder,
    ):
        folder.adopt(lambda path: os_error(errno.ENOSPC)())
    assert listing(tmp_path) == []


def test_files_that_went_around_the_folder_are_refused(tmp_path):
    def save_with(change):
        with new_folder(tmp_path / "out") as folder:
            folder.write_json("config.json", {})
            change(folder.path)

    for change, name in [
        (lambda path: (path / "tokenizer.json").write_text("x"), "tokenizer.json"),
        (lambda path: (path / "config.json").unlink(), "config.json"),
        (lambda path: (path / "config.json").write_text("longer than before"), "config.json"),
    ]:
        with pytest.raises(
            OutputError, match=rf"changed from outside: '{name}'; write through the folder's methods"
        ):
            save_with(change)
        assert listing(tmp_path) == []


def test_copy_takes_regular_files_and_no_links(tmp_path):
    source = tmp_path / "LICENSE"
    source.write_bytes(b"terms" * 1000)
    (tmp_path / "link").symlink_to(source)
    os.mkfifo(tmp_path / "fifo")
    with new_folder(tmp_path / "out") as folder:
        folder.copy("LICENSE", source)
        with pytest.raises(UnsafeInputError, match=r"link' is a symbolic link; put a copy"):
            folder.copy("vocab.txt", tmp_path / "link")
        with pytest.raises(UnsafeInputError, match=r"fifo' is not a regular file; remove it"):
            folder.copy("vocab.txt", tmp_path / "fifo")
        with pytest.raises(MissingFileError, match=r"absent' is missing; fetch"):
            folder.copy("vocab.txt", tmp_path / "absent")
    assert (tmp_path / "out" / "LICENSE").read_bytes() == source.read_bytes()


def test_a_source_that_shrinks_while_copied_is_noticed(tmp_path, monkeypatch):
    source = tmp_path / "LICENSE"
    source.write_bytes(b"x" * 100)
    real = os.preadv
    monkeypatch.setattr(reading, "_CHUNK", 10)

    def shrinking(descriptor, windows, offset):
        os.truncate(source, 20)
        return real(descriptor, windows, offset)

    monkeypatch.setattr(reading.os, "preadv", shrinking)
    with (
        pytest.raises(CorruptCheckpointError, match=r"LICENSE' became shorter"),
        new_folder(tmp_path / "o") as folder,
    ):
        folder.copy("LICENSE", source)
    assert listing(tmp_path) == ["LICENSE"]


def test_overwrite_replaces_the_whole_folder(tmp_path, expected):
    save(tmp_path / "out", 1)
    (tmp_path / "out" / "config.json").unlink()
    save(tmp_path / "out", 2, overwrite=True)
    assert snapshot(tmp_path / "out") == expected["new"]
    assert leftovers(tmp_path) == []


def test_a_temporary_folder_is_private_and_goes_away():
    with output.temporary_folder() as path:
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        (path / "x").write_text("x")
    assert not path.exists()
    with pytest.raises(Stop), output.temporary_folder() as path:
        raise Stop
    assert not path.exists()


def test_a_finished_file_is_taken_in_without_copying_and_keeps_its_old_name(tmp_path):
    there = tmp_path / "there"
    there.write_bytes(b"12345")
    facts = {"size": 5, "sha256": hashlib.sha256(b"12345").hexdigest(), "more": 1}
    with new_folder(tmp_path / "out") as folder:
        folder.take("1_Dense/model.safetensors", there, facts)
        folder.take("model.safetensors", there, facts)
    assert (tmp_path / "out" / "model.safetensors").samefile(there) and there.read_bytes() == b"12345"
    manifest = json.loads((tmp_path / "out" / "mono_quant.json").read_text())
    assert manifest["files"]["model.safetensors"] == {"size": 5, "sha256": facts["sha256"]}
    verify_manifest(tmp_path / "out", hashes=True)


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK])
def test_a_file_system_without_links_gets_the_file_itself(tmp_path, monkeypatch, code):
    class NoLinks(disk._Ops):
        def link(self, old, new):
            raise OSError(code, "no")

    monkeypatch.setattr(disk, "_ops", NoLinks())
    there = tmp_path / "there"
    there.write_bytes(b"12345")
    with new_folder(tmp_path / "out") as folder:
        folder.take("model.safetensors", there, {"size": 5, "sha256": hashlib.sha256(b"12345").hexdigest()})
    assert listing(tmp_path) == ["out"]
    verify_manifest(tmp_path / "out", hashes=True)


@pytest.mark.parametrize("name", BAD)
def test_a_file_is_taken_in_under_an_allowed_name_only(tmp_path, name):
    there = tmp_path / "there"
    there.write_bytes(b"12345")
    with new_folder(tmp_path / "out") as folder:
        with pytest.raises(OutputError, match="may not be written"):
            folder.take(name, there, {"size": 5, "sha256": "0"})
        folder.write_text("model.safetensors", "x")
        with pytest.raises(OutputError, match="was written already"):
            folder.take("model.safetensors", there, {"size": 5, "sha256": "0"})
    assert (tmp_path / "out" / "model.safetensors").read_text() == "x"


def test_only_a_regular_file_of_the_right_size_is_taken_in(tmp_path):
    there, link, pipe = tmp_path / "there", tmp_path / "link", tmp_path / "pipe"
    there.write_bytes(b"1234")
    link.symlink_to(there)
    os.mkfifo(pipe)
    with new_folder(tmp_path / "out") as folder:
        for path in (there, link, pipe, tmp_path):
            with pytest.raises(
                OutputError, match=r"is no regular file of 5 bytes; run the same command again"
            ):
                folder.take("model.safetensors", path, {"size": 5, "sha256": "0"})
        with pytest.raises(OutputWriteError, match="gone"):
            folder.take("model.safetensors", tmp_path / "gone", {"size": 5, "sha256": "0"})
