"""What a finished folder says about itself, and whether that is true."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mono_quant.errors import (
    CorruptCheckpointError,
    FormatVersionError,
    MissingFileError,
    MonoQuantError,
    SourceNotFoundError,
)
from mono_quant.io.disk.allowed import HUB_EXTRAS, is_allowed
from mono_quant.io.disk.json_text import read_json_object
from mono_quant.io.disk.reading import is_cache_link, open_regular, read_chunks, tree
from mono_quant.io.text import printable
from mono_quant.version import __version__

MANIFEST = "mono_quant.json"
README = "README.md"
REPORT = "mono_quant_report.json"
FORMAT = "mono_quant"
FORMAT_VERSION = 1


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the manifest of a folder that mono_quant wrote.

    Args:
        folder: the folder.

    Returns:
        The manifest; its `files` map names to size and sha256.

    Raises:
        SourceNotFoundError: there is no such folder.
        MissingFileError: it has no manifest.
        CorruptCheckpointError: it is not one of ours.
        FormatVersionError: it was written by a newer version.
    """
    root = Path(folder)
    path = root / MANIFEST
    if not root.is_dir():
        raise SourceNotFoundError(f"{printable(root, 400)} is no folder; give the folder of a saved model")
    if not os.path.lexists(path):
        raise MissingFileError(
            f"{printable(root, 400)} has no {MANIFEST}, so mono_quant did not write it; give a folder that it saved"
        )
    manifest = read_json_object(path)
    version = manifest.get("format_version")
    if manifest.get("format") != FORMAT or type(version) is not int or version < 1:
        raise CorruptCheckpointError(
            f"{printable(path, 400)} is not a manifest of mono_quant: format {printable(manifest.get('format'))}, "
            f"format_version {printable(version)}; quantize the model again"
        )
    if version > FORMAT_VERSION:
        raise FormatVersionError(
            f"{printable(path, 400)} has format version {version}, and mono_quant {__version__} reads up to "
            f"{FORMAT_VERSION}; upgrade with: pip install -U mono-quant"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(_is_record(name, facts) for name, facts in files.items()):
        raise CorruptCheckpointError(
            f"{printable(path, 400)}: 'files' does not map file names to size and sha256; fetch the folder again"
        )
    return manifest


def verify_manifest(folder: str | os.PathLike[str], *, hashes: bool, extras: bool = False) -> None:
    """Prove that a folder holds what its manifest lists, and nothing else; see `verify_files`.

    Raises:
        CorruptCheckpointError: names every missing, extra or differing file and every link.
        MissingFileError: there is no manifest.
        FormatVersionError: the folder was written by a newer version.
    """
    verify_files(Path(folder), read_manifest(folder)["files"], hashes=hashes, extras=extras)


def verify_files(root: Path, files: Mapping[str, Any], *, hashes: bool, extras: bool = False) -> None:
    """Prove that a folder holds the listed files, and nothing else.

    A changed README.md is no fault: cards are edited on the Hub. Neither is what git and the Hub put beside it.

    Args:
        root: the folder.
        files: size and sha256 by name, as a manifest lists them.
        hashes: compare sha256 too, which reads every byte.
        extras: accept further files, unless loading would read them. Repositories gather them: a LICENSE added on the
            Hub, notes, files of an earlier model.

    Raises:
        CorruptCheckpointError: names every missing, extra or differing file and every link.
    """
    present = [name for name, _ in tree(root)]
    problems = [f"{name} is missing" for name in files.keys() - present if name != README]
    for name in present:
        if name in files:
            problem = _difference(root / name, files[name], hashes)
            if problem:
                problems.append(f"{name} {problem}")
        elif name != MANIFEST and not name.startswith(HUB_EXTRAS) and not (extras and not _is_read(name)):
            problems.append(f"{printable(name)} is not listed")
    if problems:
        raise CorruptCheckpointError(
            f"{printable(root, 400)} does not hold what its {MANIFEST} lists: {'; '.join(sorted(problems))}; "
            "fetch it again or quantize the model again"
        )


def _is_read(name: str) -> bool:
    """Tell whether loading reads a file of this name wherever it finds it, or it is code, which never belongs here."""
    return name.endswith((".safetensors", ".index.json", ".py")) or name in (
        "config.json",
        "generation_config.json",
    )


def find_foreign(folder: Path) -> list[str]:
    """Return the files of a folder that are not as mono_quant wrote them: its manifest does not list them so.

    Weights are compared by size, everything else by sha256.
    """
    listed = read_json_object(folder / MANIFEST).get("files")
    files = listed if isinstance(listed, dict) else {}
    return [
        name
        for name, _ in tree(folder)
        if name != MANIFEST
        and not name.startswith(HUB_EXTRAS[:2])
        and not (_is_record(name, files.get(name)) and _is_as_listed(folder / name, files[name]))
    ]


def is_ours(folder: Path) -> bool:
    """Tell whether some version of mono_quant wrote a folder."""
    try:
        return read_json_object(folder / MANIFEST).get("format") == FORMAT
    except MonoQuantError:
        return False


def _is_record(name: str, facts: Any) -> bool:
    return (
        is_allowed(name)
        and isinstance(facts, dict)
        and type(facts.get("size")) is int
        and isinstance(facts.get("sha256"), str)
    )


def _is_as_listed(path: Path, facts: dict[str, Any]) -> bool:
    if path.name != README:
        return _difference(path, facts, hashes=path.suffix != ".safetensors") is None
    # `is_file`: to read a pipe would wait for ever
    return (
        not path.is_symlink()
        and path.is_file()
        and hashlib.sha256(path.read_bytes()).hexdigest() == facts["sha256"]
    )


def _difference(path: Path, facts: dict[str, Any], hashes: bool) -> str | None:
    if path.is_symlink() and not is_cache_link(path):
        return "is a symbolic link"
    try:
        descriptor = open_regular(path)
    except MonoQuantError as error:
        return f"cannot be read ({error})"
    try:
        size = os.fstat(descriptor).st_size
        if path.name == README:
            return None
        if size != facts["size"]:
            return f"has {size} bytes instead of {facts['size']}"
        if hashes:
            digest = hashlib.sha256()
            for chunk in read_chunks(descriptor, size, path):
                digest.update(chunk)
            if digest.hexdigest() != facts["sha256"]:
                return f"has sha256 {digest.hexdigest()} instead of {printable(facts['sha256'])}"
    finally:
        os.close(descriptor)
    return None
