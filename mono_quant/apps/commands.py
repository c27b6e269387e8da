"""What the commands do; each gives its answer as JSON and as lines and tables, and prints nothing."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mono_quant import kernels
from mono_quant.api import verbs
from mono_quant.api.delivery import Order, after_saving, deliver
from mono_quant.api.streaming import StreamOrder, stream, why_stream
from mono_quant.apps.progress import seen
from mono_quant.artifact import cards, publishing
from mono_quant.artifact.facts import read_card_facts
from mono_quant.artifact.inspection import inspect_any
from mono_quant.errors import ConfigError, MissingFileError
from mono_quant.io.disk.manifest import MANIFEST, README, REPORT
from mono_quant.io.hub.client import Hub, check_repo_id
from mono_quant.io.hub.push import PushResult
from mono_quant.io.hub.target import PushOptions
from mono_quant.io.memory import peak_bytes
from mono_quant.planning.config import merge
from mono_quant.planning.report import QuantReport, human_bytes
from mono_quant.planning.tables import Part
from mono_quant.sources.opening import place_of, saved_folder
from mono_quant.sources.source import Access
from mono_quant.version import __version__

logger = logging.getLogger(__name__)

__all__ = [
    "Answer",
    "access",
    "card",
    "env",
    "inspect",
    "plan",
    "push",
    "push_options",
    "quantize",
    "schemes",
    "seen",
    "suggest",
    "verify",
]


@dataclass(frozen=True)
class Answer:
    """What a command found.

    Attributes:
        json: one object, for a program; empty for what is text anyway.
        parts: the same for a person.
    """

    json: str
    parts: tuple[Part, ...]


def access(
    revision: str | None,
    origin: str | None,
    token: str | None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Access:
    """Say how a source is reached."""
    return Access(revision, Hub(token=token), trust_remote_code, allow_pickle, origin)


def push_options(push_to: str | None, private: bool | None, overwrite: bool, create_pr: bool) -> PushOptions:
    """Say how to push.

    Raises:
        ConfigError: there is nowhere to push to.
    """
    if push_to is None and (private is not None or create_pr):
        raise ConfigError(
            "--private, --public and --create-pr are about the repository that is pushed to; name it with --push-to, or "
            "leave them out"
        )
    return PushOptions(private=private, overwrite=overwrite, create_pr=create_pr)


def quantize(
    source: str,
    access: Access,
    dtype: str,
    options: Mapping[str, Any],
    output: Path | None,
    push_to: str | None,
    push: PushOptions,
    in_files: bool | None,
    restart: bool,
) -> Answer:
    request = merge({"dtype": dtype}, options)
    target = output if output or push_to else Path(f"{_name(source)}-{request.dtype}")
    if place_of(source, access) == "local":
        access = replace(access, place="local")  # so that it is said once
    why = why_stream(source, access) if in_files is None else ""
    if why:
        logger.warning("streaming from file to file: %s", why)
    if in_files or why:
        return _streamed(source, access, StreamOrder(request, target, push_to, push, restart))
    if restart:
        raise ConfigError(
            "--restart is about unfinished work that --stream leaves; add --stream, or leave it out"
        )
    done = deliver(source, access, Order(request, target, push_to, push))
    return _done(done.result.report, done.folder, done.pushed)


def _streamed(source: str, access: Access, order: StreamOrder) -> Answer:
    if access.allow_pickle:
        raise ConfigError("--allow-pickle reads weights into memory; leave it out, or add --no-stream")
    done = stream(source, access, order)
    if done.report is None:
        # of several processes one has an answer, so that it is one object on stdout
        logger.warning("another process of this job has the rest, and writes the result")
        return Answer("", ())
    peak = peak_bytes()
    line = f"memory  {human_bytes(peak)} at most, Python and torch included"
    return _done(done.report, done.folder, done.pushed, {"peak_memory_bytes": peak}, line)


def _done(
    report: QuantReport,
    folder: Path | None,
    pushed: PushResult | None,
    more: Mapping[str, Any] = MappingProxyType({}),
    *lines: str,
) -> Answer:
    told = dict(more)
    parts = list(report.parts())
    if folder is not None:
        told |= {"folder": str(folder), "folder_bytes": _folder_bytes(folder)}
        parts += ["", f"saved   {told['folder']} ({human_bytes(told['folder_bytes'])} on disk)"]
    if pushed is not None:
        told |= asdict(pushed)
        parts.append(_pushed_line(pushed))
    return Answer(_json({**report.to_dict(), **told}), (*parts, *lines))


def plan(source: str, dtype: str, **options: Any) -> Answer:
    report = verbs.plan(source, dtype, **options)
    return Answer(report.to_json().rstrip("\n"), tuple(report.parts()))


def suggest(source: str, **options: Any) -> Answer:
    found = verbs.suggest(source, **options)
    return Answer(_json(found.to_dict()), tuple(found.parts()))


def schemes(given: Sequence[str]) -> str | dict[str, str]:
    """Read what `--activations` says: a scheme for all layers, PATTERN=SCHEME, or one of the first and any of the second.

    Raises:
        ConfigError: several schemes are for all layers.
    """
    single = [text for text in given if "=" not in text]
    if len(single) > 1:
        raise ConfigError(
            f"--activations says {' and '.join(single)} for all layers; give one of them, and PATTERN=SCHEME for others"
        )
    # a pattern may hold the sign itself
    pairs = dict(text.rsplit("=", 1) for text in given if "=" in text)
    if not pairs:
        return single[0] if single else "auto"
    return {**({"*": single[0]} if single else {}), **pairs}


def inspect(place: str, access: Access) -> Answer:
    found = inspect_any(place, access)
    return Answer(_json(found.to_dict()), tuple(found.parts()))


def push(folder: Path, repo: str, **options: Any) -> Answer:
    with after_saving(None, repo):
        pushed = verbs.push_to_hub(folder, repo, **options)
    return Answer(json.dumps(asdict(pushed), indent=2), (_pushed_line(pushed),))


def card(place: str, access: Access, repo: str | None, lint: bool) -> Answer:
    if repo is not None:
        check_repo_id(repo)
    folder, repo_id = saved_folder(place, access, wanted={README, MANIFEST, REPORT}.__contains__)
    there = repo or repo_id
    if not lint:
        return Answer("", (cards.render(read_card_facts(folder, there)).rstrip("\n"),))
    publishing.checked_card(folder, there)
    if not (folder / README).is_file():
        raise MissingFileError(
            f"{folder / README} is missing, so there is no card to check; leave out --lint to print one"
        )
    return Answer("", (f"ok      {place if repo_id else folder}/{README} says what the report says",))


def verify(place: str, **how: Any) -> Answer:
    passed = verbs.verify(place, **how)
    return Answer(
        json.dumps({"folder": place, "ok": True, "passed": passed}, indent=2),
        tuple(f"ok      {line}" for line in passed),
    )


def env() -> Answer:
    facts: dict[str, Any] = {
        "mono_quant": __version__,
        **kernels.environment(),
        "processors": kernels.processors(),
        "starved": kernels.starved(),
    }
    devices = facts["accelerators"]
    shown = {**facts, "accelerators": [found["device"] for found in devices] or None}
    shown |= {found["device"]: "; ".join(_told(found)) for found in devices}
    return Answer(
        json.dumps(facts, indent=2), tuple(f"{key:<16} {_plain(value)}" for key, value in shown.items())
    )


def _told(found: Mapping[str, str | None]) -> list[str]:
    """Return the path of an accelerator, its name, why it has no better path, and what nobody has tried."""
    return [said for said in (found[key] for key in ("path", "name", "reason", "note")) if said]


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True)


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value)
    return "-" if value is None else str(value)


def _name(source: str) -> str:
    return Path(source).resolve().name if Path(source).exists() else source.rpartition("/")[2]


def _folder_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _pushed_line(pushed: PushResult) -> str:
    what = "already at" if pushed.already_there else "pull request" if pushed.pr_url else "pushed to"
    return f"{what} {pushed.pr_url or pushed.url} (commit {pushed.commit_sha[:12]})"
