"""May this folder be written? Refusals for everything that is not ours to replace."""

import os
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

from mono_quant.errors import ConfigError, Option, OutputExistsError, OutputWriteError
from mono_quant.io.disk.disk import writing
from mono_quant.io.disk.manifest import MANIFEST, find_foreign, is_ours
from mono_quant.io.text import listed, printable


def resolve_place(target: str | os.PathLike[str]) -> Path:
    """Find where a target lies, without following a link that it is itself.

    Raises:
        ConfigError: it is no path.
        OutputWriteError: no folder can have this name.
    """
    text = os.fspath(target) if isinstance(target, str | os.PathLike) else None
    if not isinstance(text, str) or not text:
        raise ConfigError(f"the output folder is {target!r}; give a path, such as 'out'")
    path = Path(text).absolute()
    try:
        if path.name in ("", ".."):
            path = path.resolve()
        place = path.parent.resolve() / path.name
        with suppress(FileNotFoundError, NotADirectoryError):
            place.lstat()
    except (OSError, RuntimeError, ValueError) as error:
        raise OutputWriteError(
            f"{printable(target, 400)} cannot be a folder: {printable(error)}; choose another name"
        ) from error
    return place


def refuse_cache(place: Path) -> None:
    """Refuse a place in the cache of the Hugging Face libraries."""
    environment = os.environ
    default = Path(environment.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    home = Path(environment.get("HF_HOME") or default)
    # HF_HOME itself is often a whole data disk; only what the libraries keep in it is theirs.
    caches = [home / part for part in ("hub", "xet", "assets", "datasets", "modules")]
    caches += [
        Path(value) for key in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE") if (value := environment.get(key))
    ]
    for folder in (place, *place.parents):
        in_cache = any(folder == cache.expanduser().absolute().resolve() for cache in caches)
        if in_cache or folder.name.startswith("models--"):
            raise OutputExistsError(
                f"{printable(place, 400)} lies in the Hugging Face cache, whose files other programs share; "
                "choose a folder outside it"
            )


def refuse_current_folder(place: Path) -> None:
    """Refuse the folder this process works in, and those above it: replacing it would leave the process in a deleted one."""
    try:
        here = Path.cwd()
    except FileNotFoundError:
        return
    ours = _identity(place)
    if ours is not None and ours in [_identity(folder) for folder in (here, *here.parents)]:
        raise OutputExistsError(
            f"{printable(place, 400)} is the current folder or holds it, and saving puts a new folder in its place; "
            "name a folder inside it"
        )


def refuse_sources(place: Path, sources: Iterable[str | os.PathLike[str]]) -> None:
    """Refuse a place that is, holds or lies in a folder being read."""
    # Compared as the file system sees them, so that links, mounts and letter case do not hide anything.
    ours = _identity(place)
    around_ours = [_identity(folder) for folder in place.parents]
    for source in sources:
        path = Path(source).resolve()
        theirs = _identity(path)
        if theirs is None:
            continue
        if theirs == ours:
            relation = "is"
        elif theirs in around_ours:
            relation = "lies inside"
        elif ours is not None and ours in [_identity(folder) for folder in path.parents]:
            relation = "contains"
        else:
            continue
        raise OutputExistsError(
            f"the output {printable(place, 400)} {relation} the source {printable(path, 400)}; "
            "choose a folder beside it"
        )


def holds_old_result(place: Path, overwrite: bool, merges: Collection[str] = ()) -> bool:
    """Tell whether there is a result of ours to replace; refuse anything else that is in the way.

    Args:
        place: where the new result will be.
        overwrite: replace a result of ours.
        merges: files that may be another's, because the new result takes over what they hold.
    """
    shown = printable(place, 400)
    if place.is_symlink():
        raise OutputExistsError(f"{shown} is a symbolic link; name the folder it leads to, or another one")
    if not os.path.lexists(place):
        return False
    if not place.is_dir():
        raise OutputExistsError(f"{shown} is a file, not a folder; choose another name")
    with writing(place):
        if not any(place.iterdir()):
            return False
    if not overwrite:
        raise OutputExistsError(
            f"{shown} exists and is not empty; choose another folder, or pass ",
            Option("overwrite", True),
            " to replace a result of mono_quant",
        )
    if not is_ours(place):
        raise OutputExistsError(
            f"{shown} was not written by mono_quant (it has no valid {MANIFEST}); "
            "choose another folder or empty it yourself"
        )
    with writing(place):
        foreign = [
            name
            for name in find_foreign(place)
            if name not in merges or (place / name).is_symlink() or not (place / name).is_file()
        ]
    if foreign:
        raise OutputExistsError(
            f"{shown} holds files that mono_quant did not write, or that were changed since, and would delete: "
            f"{listed(foreign)}; move them away or choose another folder"
        )
    return True


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_dev, facts.st_ino
