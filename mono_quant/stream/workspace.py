"""The hidden folder beside a target in which its shards come to be, from one run of the same command to the next.

::

    with open_workspace("out", identity) as ledger:
        ...

`.<name>.mq-stream` holds `plan.json`, which says what the result is made of and how, and a `Ledger` of what is finished. Unlike what
`staging` leaves it is not disposable: it goes away with the target's publication, as a whole, and not before.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mono_quant.errors import MonoQuantError, Option, OutputExistsError, ResumeError
from mono_quant.io.disk import disk, staging
from mono_quant.io.disk.json_text import canonical_json, read_json_object
from mono_quant.io.disk.manifest import is_ours, read_manifest
from mono_quant.io.disk.targets import refuse_cache, refuse_current_folder, refuse_sources, resolve_place
from mono_quant.io.text import printable
from mono_quant.stream import members
from mono_quant.stream.ledger import Ledger

PLAN = "plan.json"
# A plan lists the files of a source; the largest known has under a thousand.
MAX_PLAN_BYTES = 64 << 20
_SHOWN = 5


def workspace_beside(place: Path) -> Path:
    """Name the folder that belongs to a target."""
    return place.parent / f".{place.name}.mq-stream"


@contextmanager
def open_workspace(
    target: str | os.PathLike[str],
    identity: Mapping[str, Any],
    *,
    run: str = "",
    rank: int = 0,
    restart: bool = False,
    sources: Sequence[str | os.PathLike[str]] = (),
    check: Callable[[], object] | None = None,
) -> Iterator[Ledger]:
    """Open the workspace of a target, and go on with what an earlier run left in it.

    When the context ends well, the target is published and the workspace goes, unless this worker left it to others. After an
    error finished shards stay, and the error has a note that says so.

    Args:
        target: the folder that will be written.
        identity: what the result is made of and how, as plain JSON: source, settings, versions.
        run: what all workers of one command share; nothing for one alone.
        rank: of this worker.
        restart: discard what an earlier run left.
        sources: folders being read, which the target must not touch.
        check: refuses the target; asked when no other worker can publish any more, as one may have done just now.

    Raises:
        ResumeError: what was left is of another identity; names what differs.
        OutputBusyError: another run is at work.
        OutputExistsError: the target touches a source, or something else has the workspace's name.
        OutputWriteError: the file system refused.
    """
    place = resolve_place(target)
    refuse_cache(place)
    refuse_current_folder(place)
    refuse_sources(place, sources)
    folder = workspace_beside(place)
    _refuse_other_things(folder)
    me = members.this_member(run or secrets.token_hex(8), rank)
    parents: list[Path] = []
    ledger: Ledger | None = None
    try:
        staging.make_parents(place.parent, parents)
        with members.gate(folder, make=True):
            lock = members.enter(folder, me)
            try:
                if check is not None:
                    check()
                _agree(folder, dict(identity), me, restart)
                ledger = Ledger(folder, me, lock, _name(identity))
            except BaseException:
                os.close(lock)
                with suppress(MonoQuantError):
                    if not members.others(folder, -1) and Ledger(folder, me, None).is_empty:
                        _dispose(folder, place)
                raise
        yield ledger
        _end(ledger, place, keep=False)
    except BaseException as error:
        if ledger is not None:
            _end_with(error, ledger, place)
        raise
    finally:
        for path in reversed(parents):
            disk.remove_empty(path)


def forget_published(target: str | os.PathLike[str]) -> None:
    """Remove the workspace of a target that was published from it by a run that was killed before it could do so itself.

    Call it before a target that exists is refused.

    Args:
        target: the folder.

    Raises:
        OutputBusyError: another run is writing the target at this moment.
        OutputWriteError: the file system refused.
    """
    place = resolve_place(target)
    folder = workspace_beside(place)
    if not place.is_dir() or not is_ours(place):
        return
    staging.recover(place)
    if not folder.is_dir() or folder.is_symlink():
        return
    me = members.this_member("", 0)
    with members.gate(folder):
        if not members.others(folder, -1):
            ledger = Ledger(folder, me, None)
            if ledger.is_empty or ledger.is_in(place, read_manifest(place)["files"]):
                _dispose(folder, place)


def _name(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(identity, PLAN).encode()).hexdigest()[:16]


def _end(ledger: Ledger, place: Path, *, keep: bool) -> None:
    if ledger.is_left:
        return
    with members.gate(ledger.folder):
        if not keep and not members.others(ledger.folder, ledger.me.rank):
            _dispose(ledger.folder, place)
        ledger.leave()


def _end_with(error: BaseException, ledger: Ledger, place: Path) -> None:
    # the error is what the user has to see, not that its traces could not be cleared away
    with suppress(MonoQuantError):
        ledger.refresh()
        _end(ledger, place, keep=not ledger.is_empty)
    ledger.leave()
    if not ledger.is_empty and ledger.folder.exists():
        error.add_note(
            f"what is finished stays in {printable(ledger.folder, 400)}; the same command goes on from there"
        )


def _dispose(folder: Path, place: Path) -> None:
    """Remove a workspace as a whole: once it has the other name, it counts for nothing, whatever happens to the removal."""
    stray = staging.partial_beside(place)
    disk.rename(folder, stray)
    disk.discard(stray)


def _refuse_other_things(folder: Path) -> None:
    if not os.path.lexists(folder):
        return
    is_folder = folder.is_dir() and not folder.is_symlink()
    # the first thing that comes into a folder of ours is its gate
    if not is_folder or (any(folder.iterdir()) and not members.has_gate(folder)):
        raise OutputExistsError(
            f"{printable(folder, 400)} is not of mono_quant, and unfinished work goes there; move it away"
        )


def _agree(folder: Path, identity: dict[str, Any], me: members.Member, restart: bool) -> None:
    """See to it that the workspace is of this identity; call it inside the gate."""
    company = members.others(folder, me.rank)
    left = Ledger(folder, me, None)
    there = _read_plan(folder) if os.path.lexists(folder / PLAN) else None
    if there is not None and there.get("identity") == identity:
        if not restart or company or there.get("run") == me.run:
            _sweep_parts(folder)
            return
    elif there is not None and not isinstance(there.get("identity"), dict) and not restart:
        raise ResumeError(
            f"{printable(folder / PLAN, 400)} is damaged, so nobody knows what the unfinished work there is of; pass ",
            Option("restart", True),
            " to discard it",
        )
    elif there is not None and (company or not (restart or left.is_empty)):
        raise _difference(folder, there, identity)
    _empty(folder)
    data = canonical_json({"run": me.run, "identity": identity}, PLAN).encode()
    part = folder / f"{PLAN}.{me.rank}.part"
    disk.write_new(part, [data], len(data))
    disk.move_file(part, folder / PLAN)
    disk.fsync_folder(folder.parent)


def _read_plan(folder: Path) -> dict[str, Any]:
    try:
        return read_json_object(folder / PLAN, max_bytes=MAX_PLAN_BYTES)
    except MonoQuantError as error:
        return {"identity": f"unreadable ({error})"}


def _difference(folder: Path, there: Mapping[str, Any], identity: dict[str, Any]) -> ResumeError:
    found = list(_differences("", there.get("identity"), identity))
    shown = "; ".join(
        f"{key or 'it'} was {_short(old)} and is {_short(new)}" for key, old, new in found[:_SHOWN]
    )
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ResumeError(
        f"{printable(folder, 400)} holds unfinished work of another source or other settings: {shown}{more}; "
        "give those again to go on with it, or pass ",
        Option("restart", True),
        " to discard it",
    )


_MISSING = object()


def _differences(key: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, old value, new value) of whatever differs, as deep as the keys go."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from _differences(
                f"{key}.{name}" if key else name, old.get(name, _MISSING), new.get(name, _MISSING)
            )
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from _differences(f"{key}[{index}]", one, other)
    elif old != new:
        yield key, old, new


def _short(value: Any) -> str:
    if value is _MISSING:
        return "not there"
    return printable(value if isinstance(value, str) else json.dumps(value), 80)


def _empty(folder: Path) -> None:
    """Remove what an earlier run left, but for locks."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == PLAN):
        if path.is_dir() and not path.is_symlink():
            disk.discard(path)
        elif path.name != "gate" and not path.name.endswith(".lock"):
            disk.remove_file(path)


def _sweep_parts(folder: Path) -> None:
    """Remove what killed workers began; call it inside the gate."""
    alive = members.ranks_at_work(folder)
    for path in folder.glob("*.part"):
        if int(path.name.split(".")[-2]) not in alive:
            disk.remove_file(path)
