import hashlib
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from mono_quant.errors import CorruptCheckpointError
from mono_quant.io.disk.manifest import verify_files
from mono_quant.io.disk.output import new_folder
from mono_quant.io.disk.reading import open_regular, read_all, read_chunks
from mono_quant.io.tensors.checkpoint import WeightFile, identity_of

SIZE = 40 << 20
BOUND = 4 << 20


def large(folder: Path) -> tuple[Path, str]:
    """Make a file with holes, but for its last bytes."""
    path = folder / "LICENSE"
    with path.open("wb") as file:
        file.seek(SIZE - 3)
        file.write(b"end")
    return path, hashlib.sha256(bytes(SIZE - 3) + b"end").hexdigest()


def of_weights(path: Path, digest: str) -> None:
    descriptor = open_regular(path)
    file = WeightFile(path, identity_of(descriptor))
    os.close(descriptor)
    assert file.sha256() == digest


def of_a_result(path: Path, digest: str) -> None:
    verify_files(path.parent, {path.name: {"size": SIZE, "sha256": digest}}, hashes=True)


def copied(path: Path, digest: str) -> None:
    with new_folder(path.parent / "out") as folder:
        folder.copy("LICENSE", path)
    assert folder.files["LICENSE"] == {"size": SIZE, "sha256": digest}


@pytest.mark.parametrize("work", [of_weights, of_a_result, copied])
def test_a_large_file_is_never_in_memory(tmp_path: Path, work: Callable[[Path, str], None]) -> None:
    path, digest = large(tmp_path)
    tracemalloc.start()
    try:
        work(path, digest)
        assert tracemalloc.get_traced_memory()[1] < BOUND
    finally:
        tracemalloc.stop()


def test_pieces_are_the_file_and_a_short_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 9000)
    descriptor = open_regular(path)
    try:
        for size in (0, 1, 1 << 20, (1 << 20) + 1, 256 * 9000):
            assert b"".join(map(bytes, read_chunks(descriptor, size, path))) == path.read_bytes()[:size]
        with pytest.raises(CorruptCheckpointError, match=r"file' became shorter while it was read; fetch"):
            list(read_chunks(descriptor, 256 * 9000 + 1, path))
        assert read_all(descriptor, 1 << 30, 256 * 8999) == bytes(range(256))
    finally:
        os.close(descriptor)
