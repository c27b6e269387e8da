"""A folder is absent, the old one or the new one; it holds what is allowed and nothing else."""

import errno
import fcntl
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mono_quant.errors import (
    ConfigError,
    CorruptCheckpointError,
    FormatVersionError,
    MissingFileError,
    OutputBusyError,
    OutputError,
    OutputExistsError,
    OutputWriteError,
    SourceNotFoundError,
    UnsafeInputError,
)
from mono_quant.io.disk import disk, output, reading, staging
from mono_quant.io.disk.allowed import is_allowed
from mono_quant.io.disk.manifest import read_manifest, verify_manifest
from mono_quant.io.disk.output import check_target, new_folder
from mono_quant.io.tensors import tensor_file
from mono_quant.io.tensors.shards import write_tensors
from mono_quant.io.tensors.tensor_file import TensorEntry
from mono_quant.version import __version__

WRITES = [name for name in vars(disk._Ops) if not name.startswith("_")]
DEAD = "deadbeef"


class Stop(BaseException):
    """Stands for anything that is no Exception."""


class ShimOps(disk._Ops):
    """Counts every operation and lets the k-th one go wrong, before or after it took effect."""

    def __init__(self, fail_at=None, error=None, after=False, can_exchange=True):
        self.count = 0
        self.calls = []
        self.fail_at, self.error, self.after, self.can_exchange = fail_at, error, after, can_exchange
        for name in WRITES:
            setattr(self, name, self._wrap(name, getattr(super(), name)))

    def _wrap(self, name, real):
        def call(*arguments):
            self.count += 1
            self.calls.append(name)
            strikes = self.count == self.fail_at
            # The kernel frees the descriptor even when close reports an error.
            if strikes and not self.after and name != "close":
                self.error()
            if name == "fsync":
                result = None  # a thousand real ones would take minutes
            elif name == "exchange" and not self.can_exchange:
                result = False
            else:
                result = real(*arguments)
            if strikes:
                self.error()
            return result

        return call


def os_error(code):
    def strike():
        raise OSError(code, os.strerror(code))

    return strike


def interrupt():
    raise KeyboardInterrupt


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def save(target, value, **options):
    """A small but complete save: every way of writing is used once."""
    with new_folder(target, **options) as folder:
        folder.manifest["source"] = "tests"
        write_tensors(folder, "model.safetensors", {"w": torch.full((3, 5), float(value))})
        folder.write_json("config.json", {"value": value})
        folder.write_text("1_Pooling/config.json", f"{value}\n")
        folder.adopt(lambda path: (path / "tokenizer.json").write_text(f"{value}"))


def snapshot(folder):
    if not folder.exists():
        return None
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def leftovers(parent):
    return [name for name in listing(parent) if name.startswith(".")]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The bytes of the old and the new result."""
    base = tmp_path_factory.mktemp("expected")
    save(base / "old", 1)
    save(base / "new", 2)
    return {"absent": None, "old": snapshot(base / "old"), "new": snapshot(base / "new")}


def shimmed(monkeypatch, **options):
    ops = ShimOps(**options)
    monkeypatch.setattr(disk, "_ops", ops)
    return ops


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
def test_S10_modes_follow_the_umask(tmp_path, umask):
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
def test_O13_an_exception_in_the_body_leaves_nothing(tmp_path, failure):
    def work():
        with new_folder(tmp_path / "out") as folder:
            folder.write_text("README.md", "x")
            raise failure

    with pytest.raises(failure):
        work()
    assert listing(tmp_path) == []


GOOD_NAMES = """config.json generation_config.json tokenizer.json tokenizer_config.json special_tokens_map.json
added_tokens.json vocab.txt vocab.json merges.txt spiece.model tokenizer.model sentencepiece.bpe.model
qwen.tiktoken normalizer.json preprocessor_config.json processor_config.json video_preprocessor_config.json
chat_template.jinja chat_template.json additional_chat_templates/tool_use.jinja modules.json
config_sentence_transformers.json sentence_bert_config.json sentence_xlnet_config.json 1_Pooling/config.json
2_Dense/config.json 2_Dense/model.safetensors LICENSE LICENSE.txt LICENSE.md license NOTICE NOTICE.txt
USE_POLICY.md README.md mono_quant.json mono_quant_report.json model.safetensors
model-00001-of-00003.safetensors model.safetensors.index.json"""

BAD_NAMES = """modeling_x.py setup.py LICENSE.py pytorch_model.bin model.bin training_args.bin optimizer.pt scheduler.pt
rng_state.pth trainer_state.json .env .git/config .gitattributes model.onnx tf_model.h5 model.gguf
model.ckpt flax_model.msgpack ../config.json a/../config.json /etc/passwd 1_Pooling/../config.json
1_Pooling/2_Dense/config.json 1_Pooling config.json/ ./config.json events.out.tfevents credentials.json
1_Dense/pytorch_model.bin model-1-of-2.safetensors adapter_model.safetensors ..model"""

BAD = [
    *BAD_NAMES.split(),
    "",
    "config.json\n",
    "config\x00.json",
    "config.json\u202e",
    "a" * 300 + ".model",
]


@pytest.mark.parametrize("name", GOOD_NAMES.split())
def test_K11_model_files_are_allowed(name):
    assert is_allowed(name)


@pytest.mark.parametrize("name", BAD)
def test_K11_anything_else_is_refused(name, tmp_path):
    assert not is_allowed(name)
    with (
        pytest.raises(
            OutputError,
            match=r"may not be written: it is not a model file; see mono_quant\.io\.disk\.allowed",
        ),
        new_folder(tmp_path / "out") as folder,
    ):
        folder.write_bytes(name, b"")
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


def test_K11_adopt_takes_model_files_only(tmp_path):
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


def test_copy_takes_regular_files_and_links_only_when_told(tmp_path):
    source = tmp_path / "LICENSE"
    source.write_bytes(b"terms" * 1000)
    (tmp_path / "link").symlink_to(source)
    os.mkfifo(tmp_path / "fifo")
    with new_folder(tmp_path / "out") as folder:
        folder.copy("LICENSE", source)
        folder.copy("NOTICE", tmp_path / "link", follow=True)
        with pytest.raises(UnsafeInputError, match=r"link' is a symbolic link; put a copy"):
            folder.copy("vocab.txt", tmp_path / "link")
        with pytest.raises(UnsafeInputError, match=r"fifo' is not a regular file; remove it"):
            folder.copy("vocab.txt", tmp_path / "fifo")
        with pytest.raises(MissingFileError, match=r"absent' is missing; fetch"):
            folder.copy("vocab.txt", tmp_path / "absent")
    assert (tmp_path / "out" / "LICENSE").read_bytes() == source.read_bytes()
    assert (tmp_path / "out" / "NOTICE").read_bytes() == source.read_bytes()
    assert not (tmp_path / "out" / "NOTICE").is_symlink()


def test_S6_a_source_that_shrinks_while_copied_is_noticed(tmp_path, monkeypatch):
    source = tmp_path / "LICENSE"
    source.write_bytes(b"x" * 100)
    real = os.pread
    monkeypatch.setattr(reading, "_CHUNK", 10)

    def shrinking(descriptor, count, offset):
        os.truncate(source, 20)
        return real(descriptor, count, offset)

    monkeypatch.setattr(reading.os, "pread", shrinking)
    with (
        pytest.raises(CorruptCheckpointError, match=r"LICENSE' became shorter"),
        new_folder(tmp_path / "o") as folder,
    ):
        folder.copy("LICENSE", source)
    assert listing(tmp_path) == ["LICENSE"]


FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
BITS8 = [
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
]
OTHERS = [
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
]


def zoo():
    """One tensor of every dtype, odd shapes, names that need care."""
    generator = torch.Generator().manual_seed(0)
    dtypes = [*FLOATS, *BITS8, *OTHERS, torch.complex64]
    tensors = {}
    for number, dtype in enumerate(dtypes):
        raw = torch.randint(0, 256, (3, 5 * dtype.itemsize), dtype=torch.uint8, generator=generator)
        tensors[f"{'zyx'[number % 3]}.{number}"] = raw.view(dtype)
    tensors["flags"] = torch.tensor([True, False, True])
    tensors["scalar"] = torch.tensor(3.0)
    tensors["empty"] = torch.zeros(0, 7, dtype=torch.bfloat16)
    tensors['quote"back\\slash/é'] = torch.ones(2)
    tensors["param"] = torch.nn.Parameter(torch.ones(3, 1))
    return tensors


def official(path, tensors):
    save_file({name: tensor.detach() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    return path.read_bytes()


def written(path, tensors):
    with new_folder(path) as folder:
        write_tensors(folder, "model.safetensors", tensors)
    return (path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("tensors", [zoo(), {}, {"a": torch.zeros(0)}, {"é": torch.ones(1)}])
def test_S9_bytes_are_those_of_the_official_writer(tmp_path, tensors):
    assert written(tmp_path / "out", tensors) == official(tmp_path / "official", tensors)


def test_large_tensors_are_written_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "_CHUNK", 100)
    tensors = {"w": torch.arange(1000.0), "v": torch.arange(7)}
    assert written(tmp_path / "out", tensors) == official(tmp_path / "official", tensors)


def test_S8_views_are_written_with_their_values(tmp_path):
    base = torch.randn(4, 6, dtype=torch.complex64)
    views = {
        "conj": base.conj(),
        "neg": base.conj().imag,
        "t": base.t(),
        "expanded": torch.ones(1, 3).expand(4, 3),
    }
    plain = {name: view.resolve_conj().resolve_neg().contiguous().clone() for name, view in views.items()}
    assert written(tmp_path / "out", views) == official(tmp_path / "official", plain)


def test_O14_tensors_are_made_one_at_a_time(tmp_path):
    log = []

    class Watched:
        def __init__(self, name):
            self.name = name

        def __call__(self):
            log.append(self.name)
            return torch.full((13, 17), float(self.name))

    entries = [TensorEntry(name, torch.float32, (13, 17), Watched(name)) for name in ("2", "1", "3")]
    got = written(tmp_path / "out", entries)
    assert log == ["1", "2", "3"]
    assert got == official(tmp_path / "official", {name: torch.full((13, 17), float(name)) for name in "123"})


def test_an_entry_must_be_what_it_promised(tmp_path):
    meta = TensorEntry("w", torch.float32, (2,), lambda: torch.empty(2, device="meta"))
    other = TensorEntry("w", torch.int8, (2,), lambda: torch.ones(3))
    sparse = TensorEntry("w", torch.float32, (2, 2), lambda: torch.eye(2).to_sparse())
    for entry, words in [
        (other, r"'w' was announced as torch.int8 \[2\] and came as torch.float32 \[3\]; announce"),
        (meta, r"'w' has no plain data .*meta.*; make it dense and load it first"),
        (sparse, r"'w' has no plain data \(torch.sparse_coo, cpu\); make it dense"),
    ]:
        with pytest.raises(OutputError, match=words):
            written(tmp_path / "out", [entry])
    assert listing(tmp_path) == []


def test_P12_unwritable_tensors_are_named_together(tmp_path):
    tensors = {
        "": torch.ones(1),
        "a\nb": torch.ones(1),
        "\u202egnp": torch.ones(1),
        "__metadata__": torch.ones(1),
        "x" * 1025: torch.ones(1),
        "double": torch.ones(1, dtype=torch.complex128),
        "deep": torch.ones([1] * 9),
        "Case": torch.ones(1),
        "case": torch.ones(1),
    }
    with pytest.raises(OutputError) as caught:
        written(tmp_path / "out", tensors)
    message = str(caught.value)
    for words in [
        "'' is empty",
        r"'a\nb' has control",
        r"'\u202egnp' has control",
        "'__metadata__' is reserved",
        "longer than 1024 bytes",
        "'double' has the dtype torch.complex128",
        "'deep' has 9 dimensions",
        "'Case' differs from another only by case",
    ]:
        assert words in message
    assert "rename or convert them" in message and message.isprintable()
    entry = TensorEntry("w", torch.float32, (1,), lambda: torch.ones(1))
    with pytest.raises(OutputError, match=r"'w' is there twice; rename"):
        written(tmp_path / "out", [entry, entry])


def test_a_header_that_no_reader_takes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "MAX_HEADER_BYTES", 100)
    with pytest.raises(
        OutputError, match=r"model\.safetensors would need a header of \d+ bytes.*use more shards"
    ):
        written(tmp_path / "out", zoo())


def test_O8_a_foreign_folder_is_refused_and_untouched(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    with pytest.raises(
        OutputExistsError, match=r"out' exists and is not empty; choose another folder, or pass over"
    ):
        save(out, 2)
    with pytest.raises(
        OutputExistsError, match=r"out' was not written by mono_quant .*choose another folder or empty"
    ):
        save(out, 2, overwrite=True)
    for text in [
        "{}",
        "[]",
        "not json",
        '{"format": "other"}',
        '{"format": "mono_quant", "format": "mono_quant"}',
    ]:
        (out / "mono_quant.json").write_text(text)
        with pytest.raises(OutputExistsError, match=r"was not written by mono_quant"):
            save(out, 2, overwrite=True)
    assert listing(out) == ["mono_quant.json", "thesis.tex"] and leftovers(tmp_path) == []


def test_O8_foreign_files_beside_our_own_are_not_deleted(tmp_path):
    save(tmp_path / "out", 1)
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(
        OutputExistsError, match=r"did not write and would delete: 'thesis\.tex'; move them away"
    ):
        save(tmp_path / "out", 2, overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_O8_files_and_links_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError, match=r"file' is a file, not a folder; choose another name"):
            save(tmp_path / "file", 1, overwrite=overwrite)
        for name in ("link", "dangling"):
            with pytest.raises(
                OutputExistsError, match=rf"{name}' is a symbolic link; name the folder it leads to"
            ):
                save(tmp_path / name, 1, overwrite=overwrite)
    assert listing(tmp_path / "real") == [] and not (tmp_path / "nowhere").exists()


def test_O11_overwrite_replaces_the_whole_folder(tmp_path, expected):
    save(tmp_path / "out", 1)
    (tmp_path / "out" / "model-00001-of-00002.safetensors").write_text("stale")
    save(tmp_path / "out", 2, overwrite=True)
    assert snapshot(tmp_path / "out") == expected["new"]
    assert leftovers(tmp_path) == []


def test_O9_the_output_is_kept_away_from_the_source(tmp_path):
    source = tmp_path / "models" / "source"
    source.mkdir(parents=True)
    (source / "config.json").write_text("{}")
    (tmp_path / "alias").symlink_to(source)
    cases = [
        (source, "is the source"),
        (source / "out", "lies inside the source"),
        (source / "deep" / "er" / "out", "lies inside the source"),
        (tmp_path / "alias" / "out", "lies inside the source"),
        (tmp_path / "models", "contains the source"),
    ]
    for target, words in cases:
        for given in (source, tmp_path / "alias"):
            with pytest.raises(OutputExistsError, match=rf"{words}.*choose a folder beside it"):
                save(target, 1, sources=[given])
    assert listing(source) == ["config.json"]
    save(tmp_path / "models" / "beside", 1, sources=[source, tmp_path / "no-such-source"])


def test_O10_the_hub_cache_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "alias").symlink_to(tmp_path / "cache")
    blob = tmp_path / "elsewhere" / "models--a--b" / "blobs" / "x"
    blob.parent.mkdir(parents=True)
    blob.write_text("shared")
    for target in [
        "cache/out",
        "cache/a/b/out",
        "alias/out",
        "home/hub/out",
        "home/hub",
        blob.parent,
        blob.parent / "o",
    ]:
        with pytest.raises(
            OutputExistsError, match=r"lies in the Hugging Face cache.*choose a folder outside"
        ):
            save(tmp_path / target, 1)
    assert blob.read_text() == "shared" and not (tmp_path / "cache").exists()
    # HF_HOME is often a whole disk, so what lies beside its caches is not theirs.
    save(tmp_path / "home" / "mine", 1)


@pytest.mark.parametrize("name", ["a" * 256, "a" * 250, "a\0b"])
def test_O7_impossible_names_are_typed(tmp_path, name):
    with pytest.raises(OutputWriteError, match=r"choose another"):
        save(tmp_path / name, 1)
    assert listing(tmp_path) == []


@pytest.mark.parametrize("target", [None, b"out", 3, ""])
def test_O7_what_is_no_path_is_typed(target):
    for refuse in (check_target, save_one):
        with pytest.raises(ConfigError, match=r"the output folder is .*; give a path"):
            refuse(target)


def save_one(target):
    save(target, 1)


@pytest.mark.parametrize("target", [".", "..", "../work"])
def test_O8_the_current_folder_is_not_swapped_away(tmp_path, monkeypatch, target):
    here = tmp_path / "work"
    here.mkdir()
    monkeypatch.chdir(here)
    for refuse in (check_target, save_one):
        with pytest.raises(
            OutputExistsError, match=r"is the current folder or holds it.*name a folder inside"
        ):
            refuse(target)
    assert Path.cwd().samefile(here)
    save("out", 1)
    assert listing(here) == ["out"]


def test_O7_a_place_that_takes_no_folder_is_found_before_the_work(tmp_path):
    with pytest.raises(
        OutputWriteError, match=r"'/proc/x/y' cannot be made: '/proc' takes no new folder .*choose"
    ):
        check_target("/proc/x/y")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputWriteError, match=r"Not a directory"):
        check_target(tmp_path / "file" / "out")
    check_target(tmp_path / "new" / "deep" / "out")
    assert listing(tmp_path) == ["file"]


def test_O7_a_file_as_parent_and_a_link_loop_are_typed(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OutputWriteError, match=r"cannot write .*Not a directory; check the folder"):
        save(tmp_path / "file" / "out", 1)
    with pytest.raises(OutputWriteError, match=r"cannot be a folder.*choose another name"):
        save(tmp_path / "loop" / "out", 1)
    with pytest.raises(OutputExistsError):
        save("/", 1)


SETTINGS = {
    "fresh": {"old": False, "can_exchange": True},
    "overwrite": {"old": True, "can_exchange": True},
    "overwrite in two steps": {"old": True, "can_exchange": False},
}
FAULTS = {
    "ENOSPC": (os_error(errno.ENOSPC), False),
    "EIO": (os_error(errno.EIO), False),
    "EROFS": (os_error(errno.EROFS), False),
    "EDQUOT after": (os_error(errno.EDQUOT), True),
    "interrupt before": (interrupt, False),
    "interrupt after": (interrupt, True),
}


def prepare(base, setting):
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir()
    if SETTINGS[setting]["old"]:
        save(base / "out", 1)


def count_operations(base, setting, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(disk, "_ops", ShimOps())
        prepare(base, setting)
        ops = ShimOps(can_exchange=SETTINGS[setting]["can_exchange"])
        patch.setattr(disk, "_ops", ops)
        save(base / "out", 2, overwrite=True)
    return ops.count


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("fault", FAULTS)
def test_O1_to_O7_every_single_fault_leaves_old_or_new(tmp_path, monkeypatch, expected, setting, fault):
    base = tmp_path / "base"
    before = expected["old" if SETTINGS[setting]["old"] else "absent"]
    error, after = FAULTS[fault]
    total = count_operations(base, setting, monkeypatch)
    assert total > 30
    for k in range(1, total + 1):
        shimmed(monkeypatch)
        prepare(base, setting)
        ops = shimmed(
            monkeypatch, fail_at=k, error=error, after=after, can_exchange=SETTINGS[setting]["can_exchange"]
        )
        try:
            save(base / "out", 2, overwrite=True)
            failed = False
        except (OutputWriteError, KeyboardInterrupt):
            failed = True
        where = f"operation {k}, {ops.calls[k - 1]}"
        found = snapshot(base / "out")
        assert found in ((before, expected["new"]) if failed else (expected["new"],)), where
        assert leftovers(base) == [], where
        # Only a removal may be tried again; anything else that fails is fatal.
        assert failed or ops.calls[k - 1] == "remove_tree", where


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("setting", SETTINGS)
def test_O1_O2_a_killed_run_leaves_old_or_new_and_the_next_cleans_up(
    tmp_path, monkeypatch, expected, setting
):
    base = tmp_path / "base"
    before = expected["old" if SETTINGS[setting]["old"] else "absent"]
    total = count_operations(base, setting, monkeypatch)
    for k in range(1, total + 1):
        shimmed(monkeypatch)
        prepare(base, setting)
        shimmed(
            monkeypatch, fail_at=k, error=kill, after=k % 2, can_exchange=SETTINGS[setting]["can_exchange"]
        )
        assert in_child(lambda: save(base / "out", 2, overwrite=True)) == -signal.SIGKILL
        shimmed(monkeypatch)
        found = snapshot(base / "out")
        halfway = found is None and any(name.endswith(".old") for name in leftovers(base))
        assert halfway or found in (before, expected["new"]), k
        if halfway:
            assert not SETTINGS[setting]["can_exchange"]
            # The old result is put back even if the new run fails at once.
            with pytest.raises(OutputExistsError):
                save(base / "out", 2)
            assert snapshot(base / "out") == before
        save(base / "out", 2, overwrite=True)
        assert snapshot(base / "out") == expected["new"]
        assert leftovers(base) == [], k


def in_child(work):
    """Run in a forked process; returns its exit code, negative for a signal."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_O5_a_full_disk_says_what_is_needed(tmp_path, monkeypatch):
    shimmed(monkeypatch, fail_at=3, error=os_error(errno.ENOSPC))
    words = r"cannot write '.*model\.safetensors': No space left on device; needed \d+ bytes, available \d+ bytes; free"
    with pytest.raises(OutputWriteError, match=words):
        save(tmp_path / "out", 1)


def test_O5_a_file_size_limit_is_typed(tmp_path):
    """A real refusal by the kernel, in a process that may not write more than 4 kB into a file."""
    script = """
import resource, signal, sys, torch
from mono_quant.errors import OutputWriteError
from mono_quant.io.disk.output import new_folder
from mono_quant.io.tensors.shards import write_tensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    with new_folder(sys.argv[1]) as folder:
        write_tensors(folder, "model.safetensors", {"w": torch.ones(5000)})
except OutputWriteError as error:
    sys.exit(42 if "File too large" in str(error) else str(error))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "out")], check=False, cwd=Path(__file__).parents[3]
    )
    assert done.returncode == 42
    assert listing(tmp_path) == []


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_O6_a_file_system_that_cannot_reserve_space_is_fine(tmp_path, monkeypatch, expected, code):
    class NoReserve(disk._Ops):
        def allocate(self, descriptor, size):
            raise OSError(code, "no")

    monkeypatch.setattr(disk, "_ops", NoReserve())
    save(tmp_path / "out", 1)
    assert snapshot(tmp_path / "out") == expected["old"]


def test_O7_short_writes_are_continued_and_none_is_an_error(tmp_path, monkeypatch, expected):
    class Short(disk._Ops):
        step = 7

        def write(self, descriptor, data):
            return super().write(descriptor, data[: self.step])

    monkeypatch.setattr(disk, "_ops", Short())
    save(tmp_path / "out", 1)
    assert snapshot(tmp_path / "out") == expected["old"]
    monkeypatch.setattr(Short, "step", 0)
    with pytest.raises(OutputWriteError, match=r"took no more bytes; check the folder"):
        save(tmp_path / "other", 1)


def test_O7_a_folder_that_cannot_be_synced_is_fine_where_there_is_no_such_call(
    tmp_path, monkeypatch, expected
):
    class NoFolderSync(disk._Ops):
        def fsync(self, descriptor):
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "no")

    monkeypatch.setattr(disk, "_ops", NoFolderSync())
    save(tmp_path / "out", 1)
    assert snapshot(tmp_path / "out") == expected["old"]


def test_exchange_falls_back_or_reports(tmp_path):
    ops = disk._Ops()
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError, match="No such file"):
        ops.exchange(tmp_path / "a", tmp_path / "absent")


def stray(parent, kind="partial", host=None, process=2**22 + 1):
    path = parent / f".out.mq-{host or staging._host()}-{process}-00000000.{kind}"
    path.mkdir()
    (path / "x").write_text("x")
    return path


def test_O1_strays_of_dead_runs_are_removed_and_others_left(tmp_path, caplog):
    ours = stray(tmp_path)
    old = stray(tmp_path, kind="old")
    foreign = stray(tmp_path, host=DEAD)
    living = stray(tmp_path, process=os.getppid())
    other_target = tmp_path / ours.name.replace(".out.", ".other.")
    other_target.mkdir()
    save(tmp_path / "unrelated", 1)
    assert ours.exists() and old.exists()
    (tmp_path / "out").mkdir()
    save(tmp_path / "out", 1)
    assert not ours.exists() and not old.exists()
    assert foreign.exists() and living.exists() and other_target.exists()
    assert f"{foreign} was left by another run; remove it if none is using it" in caplog.text


def test_a_stray_that_cannot_be_removed_is_reported(tmp_path, monkeypatch, caplog):
    class Stubborn(disk._Ops):
        def remove_tree(self, path):
            if not path.name.startswith(".scratch"):
                raise OSError(errno.EIO, "Input/output error")
            super().remove_tree(path)

    path = stray(tmp_path)
    monkeypatch.setattr(disk, "_ops", Stubborn())
    save(tmp_path / "out", 1)
    assert f"{path} could not be removed (Input/output error); the next run tries again" in caplog.text


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_O4_a_living_run_is_not_disturbed(tmp_path, expected):
    started, go = os.pipe(), os.pipe()

    def slow():
        with new_folder(tmp_path / "out") as folder:
            folder.write_text("README.md", "first")
            os.write(started[1], b"x")
            os.read(go[0], 1)

    process = os.fork()
    if process == 0:
        code = 1
        try:
            slow()
            code = 0
        finally:
            os._exit(code)
    os.read(started[0], 1)
    with pytest.raises(
        OutputBusyError, match=rf"process {process} is writing .*wait for it or choose another folder"
    ):
        save(tmp_path / "out", 2)
    os.write(go[1], b"x")
    assert os.waitpid(process, 0)[1] == 0
    for descriptor in (*started, *go):
        os.close(descriptor)
    assert (tmp_path / "out" / "README.md").read_text() == "first"
    verify_manifest(tmp_path / "out", hashes=True)


def test_O4_a_second_run_in_the_same_process_is_refused(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        folder.write_text("README.md", "first")
        with pytest.raises(OutputBusyError, match="wait for it"):
            save(tmp_path / "out", 2)
    assert listing(tmp_path / "out") == ["README.md", "mono_quant.json"]


def test_O4_losing_a_race_is_an_error_and_changes_nothing(tmp_path, monkeypatch):
    class Racing(disk._Ops):
        def rename(self, old, new):
            new.mkdir()
            (new / "theirs").write_text("x")
            super().rename(old, new)

    monkeypatch.setattr(disk, "_ops", Racing())
    with pytest.raises(
        OutputBusyError, match=r"another run finished .*out' in the meantime; nothing was changed"
    ):
        save(tmp_path / "out", 1)
    assert listing(tmp_path / "out") == ["theirs"] and leftovers(tmp_path) == []


def test_O4_a_target_that_appeared_meanwhile_is_not_replaced(tmp_path):
    def work():
        with new_folder(tmp_path / "out") as folder:
            folder.write_text("README.md", "x")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "thesis.tex").write_text("x")

    with pytest.raises(OutputExistsError, match="exists and is not empty"):
        work()
    assert listing(tmp_path) == ["out"]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("locks", [True, False])
def test_O4_concurrent_runs_never_mix(tmp_path, monkeypatch, locks, expected):
    if not locks:
        monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    shimmed(monkeypatch)

    def race(value):
        for _ in range(15):
            try:
                save(tmp_path / "out", value, overwrite=True)
            except (OutputBusyError, OutputExistsError, OutputWriteError):
                continue

    children = []
    for value in (1, 2):
        process = os.fork()
        if process == 0:
            code = 1
            try:
                race(value)
                code = 0
            finally:
                os._exit(code)
        children.append(process)
    assert [os.waitpid(process, 0)[1] for process in children] == [0, 0]
    assert snapshot(tmp_path / "out") in (expected["old"], expected["new"])
    save(tmp_path / "out", 2, overwrite=True)
    assert leftovers(tmp_path) == []


def test_threads_into_different_targets_do_not_disturb_each_other(tmp_path, expected):
    threads = [threading.Thread(target=save, args=(tmp_path / f"out{number}", 1)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(snapshot(tmp_path / f"out{number}") == expected["old"] for number in range(4))


def test_a_temporary_folder_is_private_and_goes_away():
    with output.temporary_folder() as path:
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        (path / "x").write_text("x")
    assert not path.exists()
    with pytest.raises(Stop), output.temporary_folder() as path:
        raise Stop
    assert not path.exists()


def rewrite(folder, **changes):
    path = folder / "mono_quant.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_R3_a_newer_format_names_both_versions(tmp_path):
    save(tmp_path / "out", 1)
    rewrite(tmp_path / "out", format_version=2)
    with pytest.raises(
        FormatVersionError, match=rf"format version 2, and mono_quant {__version__} reads up to 1; upgr"
    ):
        read_manifest(tmp_path / "out")


def test_R4_a_manifest_that_is_missing_or_not_ours_is_typed(tmp_path):
    with pytest.raises(
        MissingFileError, match=r"has no mono_quant\.json, so mono_quant did not write it; give"
    ):
        read_manifest(tmp_path)
    with pytest.raises(SourceNotFoundError, match=r"nope' is no folder; give the folder of a saved model"):
        read_manifest(tmp_path / "nope")
    (tmp_path / "mono_quant.json").write_text("garbage")
    with pytest.raises(CorruptCheckpointError, match=r"mono_quant\.json' is not valid JSON.*fetch it again"):
        read_manifest(tmp_path)
    for text in ["{}", '{"format": "mono_quant"}', '{"format": "mono_quant", "format_version": true}']:
        (tmp_path / "mono_quant.json").write_text(text)
        with pytest.raises(
            CorruptCheckpointError, match=r"is not a manifest of mono_quant: format .*quantize the model"
        ):
            read_manifest(tmp_path)


@pytest.mark.parametrize(
    "listed",
    [
        None,
        [],
        {"../x": {"size": 1, "sha256": ""}},
        {"config.json": {}},
        {"config.json": {"size": "1", "sha256": ""}},
    ],
)
def test_R4_a_strange_file_list_is_refused(tmp_path, listed):
    save(tmp_path / "out", 1)
    rewrite(tmp_path / "out", files=listed)
    with pytest.raises(
        CorruptCheckpointError, match=r"'files' does not map file names to size and sha256; fetch"
    ):
        verify_manifest(tmp_path / "out", hashes=False)


def test_R4_every_difference_is_named_at_once(tmp_path):
    out = tmp_path / "out"
    save(out, 1)
    (out / "config.json").write_bytes(b"short")
    (out / "1_Pooling" / "config.json").unlink()
    (out / "notes\n.txt").write_text("x")
    (tmp_path / "copy").write_text("1")
    (out / "tokenizer.json").unlink()
    (out / "tokenizer.json").symlink_to(tmp_path / "copy")
    with pytest.raises(CorruptCheckpointError) as caught:
        verify_manifest(out, hashes=False)
    for words in [
        "1_Pooling/config.json is missing",
        "config.json has 5 bytes instead of 17",
        r"'notes\n.txt' is not listed",
        "tokenizer.json is a symbolic link",
        "fetch it again",
    ]:
        assert words in str(caught.value)


def test_R4_a_flipped_bit_is_seen_with_hashes(tmp_path):
    out = tmp_path / "out"
    save(out, 1)
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    verify_manifest(out, hashes=False)
    with pytest.raises(CorruptCheckpointError, match=r"model\.safetensors has sha256 \w+ instead of '\w+'"):
        verify_manifest(out, hashes=True)


def test_what_git_and_the_hub_add_and_an_edited_card_are_no_faults(tmp_path):
    out = tmp_path / "out"
    with new_folder(out) as folder:
        folder.write_text("README.md", "card")
    (out / "README.md").write_text("a better card")
    (out / ".gitattributes").write_text("x")
    (out / ".cache" / "huggingface").mkdir(parents=True)
    (out / ".cache" / "huggingface" / "x.lock").write_text("x")
    verify_manifest(out, hashes=True)
    (out / "README.md").unlink()
    verify_manifest(out, hashes=True)
    os.mkfifo(out / "README.md")
    with pytest.raises(CorruptCheckpointError, match=r"README\.md cannot be read \(.*not a regular file"):
        verify_manifest(out, hashes=True)


def test_a_download_in_the_hub_cache_verifies(tmp_path):
    save(tmp_path / "out", 1)
    snapshot_folder = tmp_path / "models--a--b" / "snapshots" / "abc"
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(p for p in (tmp_path / "out").rglob("*") if p.is_file())):
        link = snapshot_folder / path.relative_to(tmp_path / "out")
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = blobs / f"{number:040x}"
        shutil.copy(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    verify_manifest(snapshot_folder, hashes=True)
