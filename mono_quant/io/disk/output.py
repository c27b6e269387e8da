"""A folder that appears whole under its name, or not at all.

::

    with new_folder("out") as folder:
        folder.write_json("config.json", config)
        folder.copy("tokenizer.json", "source/tokenizer.json")

Everything is built in a hidden sibling, `.<name>.mq-<run>.partial`, and renamed once every byte is on the disk.
"""

import hashlib
import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mono_quant.errors import OutputError
from mono_quant.io.disk import disk, staging
from mono_quant.io.disk.allowed import is_allowed, is_weight_file
from mono_quant.io.disk.json_text import canonical_json
from mono_quant.io.disk.manifest import FORMAT, FORMAT_VERSION, MANIFEST
from mono_quant.io.disk.reading import open_regular, read_chunks, tree
from mono_quant.io.disk.targets import (
    holds_old_result,
    refuse_cache,
    refuse_current_folder,
    refuse_sources,
    resolve_place,
)
from mono_quant.io.text import printable
from mono_quant.version import __version__


class OutputFolder:
    """The folder under construction; `new_folder` hands it out.

    Attributes:
        path: where it is being built; the target once it is finished.
        manifest: facts to be written into `mono_quant.json`, beside the list of files.
        files: size and sha256 of every file written so far.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: dict[str, Any] = {}
        self.files: dict[str, dict[str, Any]] = {}
        self._elsewhere: set[str] = set()

    def write(self, name: str, chunks: Iterable[bytes | memoryview], size: int) -> None:
        """Write a new file whose content is made while it is written.

        Args:
            name: relative to the folder, on the list of allowed files.
            chunks: its content; whatever making them raises comes through.
            size: of all of them together.

        Raises:
            OutputError: the name is not allowed or was written already, or the chunks are more or less than announced.
            OutputWriteError: the file system refused.
        """
        self.files[name] = disk.write_new(self._place(name), chunks, size)

    def take(self, name: str, path: Path, facts: Mapping[str, Any]) -> None:
        """Take in a finished file that lies elsewhere on the same disk, without copying it.

        It keeps its old name beside the new one, where the file system can, so that nothing is lost if this folder is not finished.

        Args:
            name: its name here; see `write`.
            path: the file, complete and on the disk.
            facts: its size and sha256, which the caller has compared with its bytes.

        Raises:
            OutputError: the name is not allowed or was written already, or the file is no regular one of this size.
            OutputWriteError: the file system refused.
        """
        place = self._place(name)
        with disk.writing(path):
            found = path.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_size != facts["size"]:
            raise OutputError(
                f"{printable(path, 400)} is no regular file of {facts['size']} bytes; run the same command again"
            )
        disk.link_file(path, place)
        self.files[name] = {"size": facts["size"], "sha256": facts["sha256"]}

    @property
    def here(self) -> dict[str, dict[str, Any]]:
        """Size and sha256 of the files that are in the folder."""
        return {name: facts for name, facts in self.files.items() if name not in self._elsewhere}

    def leave_elsewhere(self, name: str, facts: Mapping[str, Any]) -> None:
        """Let the manifest name a file that is where the folder will be published, and not in it.

        Args:
            name: its name there; see `write`.
            facts: its size and sha256.

        Raises:
            OutputError: the name is not allowed or was written already.
        """
        self._place(name)
        self.files[name] = {"size": facts["size"], "sha256": facts["sha256"]}
        self._elsewhere.add(name)

    def _place(self, name: str) -> Path:
        """Return where a new file goes, with the folders above it."""
        if not is_allowed(name) or name == MANIFEST:
            raise OutputError(
                f"{printable(name)} may not be written: it is not a model file; see mono_quant.io.disk.allowed"
            )
        if name in self.files:
            raise OutputError(f"{printable(name)} was written already; write each file once")
        path = self.path / name
        for above in reversed(path.relative_to(self.path).parents[:-1]):
            if not (self.path / above).is_dir():
                disk.make_folder(self.path / above)
        return path

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a new file.

        Args:
            name: relative to the folder, on the list of allowed files.
            data: its content.

        Raises:
            OutputError: the name is not allowed or was written already.
            OutputWriteError: the file system refused.
        """
        self.write(name, [data], len(data))

    def write_text(self, name: str, text: str) -> None:
        """Write a new UTF-8 file; see `write_bytes`."""
        self.write_bytes(name, text.encode("utf-8"))

    def write_json(self, name: str, value: Any) -> None:
        """Write JSON with sorted keys, indent 2 and a last newline; see `write_bytes`."""
        self.write_text(name, canonical_json(value, name))

    def copy(self, name: str, source: str | os.PathLike[str]) -> None:
        """Copy a regular file byte for byte.

        Args:
            name: its name here; see `write_bytes`.
            source: the file. Links of the Hugging Face cache are followed.

        Raises:
            MissingFileError: there is no such file.
            UnsafeInputError: it is a foreign link or no regular file.
            CorruptCheckpointError: it changed while it was copied.
            OutputError: see `write_bytes`.
        """
        descriptor = open_regular(Path(source))
        try:
            size = os.fstat(descriptor).st_size
            self.write(name, read_chunks(descriptor, size, source), size)
        finally:
            os.close(descriptor)

    def adopt(self, write: Callable[[Path], object]) -> list[str]:
        """Let a third party write into a scratch folder and take over what is allowed.

        Args:
            write: called with the scratch folder, such as `tokenizer.save_pretrained`.

        Returns:
            The names that were left behind: not allowed, not regular files, or written here already.

        Raises:
            OutputWriteError: the file system refused.
        """
        scratch = self.path / ".scratch"
        disk.make_folder(scratch)
        try:
            with disk.writing(scratch, foreign=True):
                write(scratch)
            dropped = []
            for name, regular in tree(scratch):
                if regular and is_allowed(name) and name not in self.files and name != MANIFEST:
                    self.copy(name, scratch / name)
                else:
                    dropped.append(name)
        finally:
            disk.remove_tree(scratch)
        return dropped


@contextmanager
def new_folder(
    target: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    sources: Iterable[str | os.PathLike[str]] = (),
    merges: Collection[str] = (),
) -> Iterator[OutputFolder]:
    """Build a folder that appears under its name only when it is complete.

    Args:
        target: the folder; missing parents are made. It must not exist, or be empty.
        overwrite: replace a folder that mono_quant wrote, as a whole and in one step.
        sources: folders being read, which the target must not touch.
        merges: files of the old folder whose content the caller takes over, so that somebody may have edited them.

    Yields:
        The folder under construction. After an exception the target is what it was before.

    Raises:
        OutputExistsError: something that is not ours to replace is there.
        OutputBusyError: another run is writing there.
        OutputWriteError: the file system refused.
    """
    place = resolve_place(target)
    refuse_cache(place)
    refuse_current_folder(place)
    refuse_sources(place, sources)
    partial = staging.partial_beside(place)
    parents: list[Path] = []
    lock = -1
    try:
        staging.make_parents(place.parent, parents)
        staging.recover(place)
        holds_old_result(place, overwrite, merges)
        lock = staging.make_partial(partial)
        folder = OutputFolder(partial)
        yield folder
        _seal(folder)
        staging.swap_in(partial, place, holds_old_result(place, overwrite, merges), parents)
        folder.path = place
        staging.clean(partial, place)
    except BaseException:
        staging.clean(partial, place)
        for path in reversed(parents):
            disk.remove_empty(path)
        raise
    finally:
        if lock >= 0:
            os.close(lock)


@contextmanager
def shared_folder(target: str | os.PathLike[str]) -> Iterator[OutputFolder]:
    """Build files that go into a folder in which others have files as well: those stay, unless ours have their names.

    A folder that is not there, or empty, appears whole as with `new_folder`. Into another one the files are moved one by one when
    all of them are on the disk, the manifest last: what is interrupted there has none.

    Args:
        target: the folder; missing parents are made.

    Yields:
        The files under construction. After an exception the target is what it was before.

    Raises:
        OutputExistsError: there is something else than a folder.
        OutputWriteError: the file system refused.
    """
    place = resolve_place(target)
    with disk.writing(place):
        is_fresh = not os.path.lexists(place) or (place.is_dir() and not any(place.iterdir()))
    if is_fresh or place.is_symlink() or not place.is_dir():
        with new_folder(place) as folder:
            yield folder
        return
    refuse_cache(place)
    partial = staging.partial_beside(place)
    staging.recover(place)
    lock = staging.make_partial(partial)
    try:
        folder = OutputFolder(partial)
        yield folder
        _seal(folder)
        _move_in(folder, place)
        folder.path = place
    finally:
        disk.discard(partial)
        os.close(lock)


def _move_in(folder: OutputFolder, place: Path) -> None:
    """Move the files of a finished folder into another one, and take out weights that would be read in their stead."""
    aside = folder.path / ".replaced"
    disk.make_folder(aside)
    with disk.writing(place):
        there = {name for name, _ in tree(place)}
    ours = [*sorted(folder.files), MANIFEST]
    old = [n for n in (MANIFEST, *sorted(there - {MANIFEST})) if n in ours or is_weight_file(n)]
    moves = [(place / name, aside / name.replace("/", "-")) for name in old if name in there]
    moves += [(folder.path / name, place / name) for name in ours]
    for name in ours:
        for parent in reversed(Path(name).parents[:-1]):
            disk.make_folder(place / parent, exist_ok=True)
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            disk.rename(source, target)
            done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            disk.rename(target, source)
        raise
    disk.fsync_folder(place)


def check_target(
    target: str | os.PathLike[str], *, overwrite: bool = False, merges: Collection[str] = ()
) -> None:
    """Refuse early what `new_folder` would refuse after long work.

    Args:
        target: the folder to be written.
        overwrite: replace a folder that mono_quant wrote.
        merges: as for `new_folder`.

    Raises:
        ConfigError: the target is no path.
        OutputExistsError: something that is not ours to replace is there.
        OutputWriteError: no folder can be made there.
    """
    place = resolve_place(target)
    refuse_cache(place)
    refuse_current_folder(place)
    holds_old_result(place, overwrite, merges)
    staging.try_place(place)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield a private folder that is removed at the end."""
    path = disk.make_private_folder()
    try:
        yield path
    finally:
        disk.discard(path)


def write_file(path: Path, data: bytes) -> None:
    """Write a new file durably; for files in a `temporary_folder`.

    Raises:
        OutputWriteError: the file system refused.
    """
    disk.write_new(path, [data], len(data))


def record(data: bytes) -> dict[str, Any]:
    """Return what the manifest says about a file with this content."""
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _seal(folder: OutputFolder) -> None:
    """Check that the folder holds what was written through it and nothing else; then write the manifest."""
    with disk.writing(folder.path):
        present = tree(folder.path)
    strange = [name for name, regular in present if name not in folder.files or not regular]
    lost = [
        name
        for name, facts in folder.here.items()
        if (name, True) not in present or _size(folder.path / name) != facts["size"]
    ]
    if strange or lost:
        raise OutputError(
            f"{printable(folder.path, 400)} was changed from outside: "
            f"{', '.join(printable(name) for name in strange + lost)}; "
            "write through the folder's methods, and let other libraries write through adopt()"
        )
    manifest = {
        "mono_quant_version": __version__,
        **folder.manifest,
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "files": folder.files,
    }
    data = canonical_json(manifest, MANIFEST).encode("utf-8")
    disk.write_new(folder.path / MANIFEST, [data], len(data))
    for inner in sorted({folder.path / above for name in folder.files for above in Path(name).parents[:-1]}):
        disk.fsync_folder(inner)
    disk.fsync_folder(folder.path)


def _size(path: Path) -> int:
    with disk.writing(path):
        return path.stat().st_size
