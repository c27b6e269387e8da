"""Manifest: see the room of this name."""

import json
import os
import shutil

import pytest
from folders import save

from mono_quant.errors import (
    CorruptCheckpointError,
    FormatVersionError,
    MissingFileError,
    SourceNotFoundError,
)
from mono_quant.io.disk.manifest import read_manifest, verify_manifest
from mono_quant.io.disk.output import new_folder
from mono_quant.version import __version__


def rewrite(folder, **changes):
    path = folder / "mono_quant.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_newer_format_names_both_versions(tmp_path):
    save(tmp_path / "out", 1)
    rewrite(tmp_path / "out", format_version=2)
    with pytest.raises(
        FormatVersionError, match=rf"format version 2, and mono_quant {__version__} reads up to 1; upgr"
    ):
        read_manifest(tmp_path / "out")


def test_a_manifest_that_is_missing_or_not_ours_is_typed(tmp_path):
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
def test_a_strange_file_list_is_refused(tmp_path, listed):
    save(tmp_path / "out", 1)
    rewrite(tmp_path / "out", files=listed)
    with pytest.raises(
        CorruptCheckpointError, match=r"'files' does not map file names to size and sha256; fetch"
    ):
        verify_manifest(tmp_path / "out", hashes=False)


def test_every_difference_is_named_at_once(tmp_path):
    out = tmp_path / "out"
    save(out, 1)
    (out / "config.json").write_bytes(b"short")
    (out / "1_Pooling" / "config.json").unlink()
    (out / "notes\n.txt").write_text("x")
    (tmp_path / "copy").write_text("1")
    (out / "tokenizer.json").unlink()
    (out / "tokenizer.json").symlink_to(tmp_path / "copy")
    (out / "README.md").unlink(missing_ok=True)
    (out / "README.md").symlink_to("README.md")
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


def test_a_flipped_bit_is_seen_with_hashes(tmp_path):
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
