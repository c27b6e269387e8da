"""What a commit can be made of, and the way up for large files; nothing is committed here."""

import hashlib
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import CommitOperationAdd, CommitOperationCopy

from mono_quant.errors import (
    ConfigError,
    CorruptCheckpointError,
    HubConflictError,
    MissingFileError,
    UnsafeInputError,
)
from mono_quant.io.hub.client import TRIES, Hub, ask
from mono_quant.io.hub.repo import RepoFile, git_id


class Sent(Protocol):
    """One file of a commit."""

    def equals(self, remote: RepoFile | None) -> bool:
        """Tell whether the Hub holds the same content."""
        ...

    def operation(self, path: str) -> Any:
        """Return how a commit says that the file is to be at a path."""
        ...


@dataclass(frozen=True)
class LocalFile:
    """One file to push; it may lie elsewhere than it goes to."""

    path: Path
    size: int
    sha256: str

    def equals(self, remote: RepoFile | None) -> bool:
        """Tell whether the Hub holds the same content."""
        if remote is None or remote.size != self.size:
            return False
        if remote.sha256 is not None:
            return remote.sha256 == self.sha256
        # Small files have a git id instead; they are small, so reading them again is cheap.
        return remote.blob_id == git_id(self.path.read_bytes())

    def operation(self, path: str) -> CommitOperationAdd:
        """Return how a commit says that the file is to be at a path."""
        return CommitOperationAdd(path, str(self.path))


@dataclass(frozen=True)
class StoredFile:
    """A file that the repository holds already, at another commit; only its name travels.

    Attributes:
        sha: the commit.
        file: as it is there.
    """

    sha: str
    file: RepoFile

    def equals(self, remote: RepoFile | None) -> bool:
        """Tell whether the Hub holds the same content."""
        if remote is None or remote.differs(self.file):
            return False
        return (remote.sha256 or remote.blob_id) == (self.file.sha256 or self.file.blob_id)

    def operation(self, path: str) -> CommitOperationCopy:
        """Return how a commit says that the file is to be at a path."""
        return CommitOperationCopy(self.file.path, path, src_revision=self.sha)


def gather(
    folder: Path, files: Sequence[str], expect: Mapping[str, tuple[int, str]] | None = None
) -> dict[str, LocalFile]:
    """Look at the files of a folder that are to be pushed.

    Args:
        folder: finished folder.
        files: paths in it; nothing else is sent, and symbolic links never.
        expect: size and SHA-256 for each path, as they were written; a path that is not in it is not compared.

    Raises:
        ConfigError: an argument is wrong.
        UnsafeInputError: a path leaves the folder or is no regular file.
        CorruptCheckpointError: a file is not what was written.
    """
    expect = expect or {}
    if not files or len(set(files)) != len(files) or not set(expect) <= set(files):
        raise ConfigError(
            f"{len(files)} files to push and {len(expect)} expectations do not fit together. List each file once, and "
            "expect only listed files."
        )
    return {name: _local_file(folder, name, expect.get(name)) for name in files}


def _local_file(folder: Path, name: str, expected: tuple[int, str] | None) -> LocalFile:
    parts = name.split("/")
    if "\\" in name or not name.isprintable() or any(part in ("", ".", "..", ".git") for part in parts):
        raise UnsafeInputError(f"{name!r} is not a path inside a repository. Use relative paths with '/'.")
    path = folder
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise UnsafeInputError(
                f"{name!r} in {folder} is or passes a symbolic link, which is never pushed."
            )
    if not path.exists():
        raise MissingFileError(f"{name!r} is not in {folder}. Save the model again.")
    if not stat.S_ISREG(path.lstat().st_mode):
        raise UnsafeInputError(f"{name!r} in {folder} is not a regular file, and only such are pushed.")
    with path.open("rb") as file:
        found = (path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
    if expected is not None and found != tuple(expected):
        raise CorruptCheckpointError(
            f"{name!r} in {folder} has {found[0]} bytes and SHA-256 {found[1]}, but {expected[0]} bytes and "
            f"{expected[1]} were written. Save the model again."
        )
    return LocalFile(path, *found)


def upload(
    hub: Hub,
    repo_id: str,
    additions: Sequence[CommitOperationAdd],
    subject: str,
    revision: str | None,
    create_pr: bool = False,
) -> None:
    """Upload the large ones of some files, and find out which are large.

    Args:
        hub, repo_id: where to.
        additions: of the commit that will follow.
        subject: start of the error message.
        revision: branch of that commit; None for the default one.
        create_pr: it will be a pull request.

    Raises:
        HubConflictError: the repository hides some of them from commits.
        HubError: any other refusal; see `mono_quant.errors`.
    """
    if not additions:
        return
    # An empty rule list: otherwise the repository's own .gitignore makes files vanish from the commit.
    ask(
        hub,
        subject,
        lambda api: api.preupload_lfs_files(
            repo_id,
            additions,
            revision=revision,
            create_pr=create_pr,
            free_memory=False,
            gitignore_content="",
        ),
        tries=TRIES,
        transfers=True,
    )
    hidden = [add.path_in_repo for add in additions if add._should_ignore]  # noqa: SLF001 - the only sign of it
    if hidden:
        raise HubConflictError(
            f"The .gitignore of {repo_id!r} hides {hidden}, so a commit would lack them. Nothing was committed; "
            "remove that rule first."
        )
