"""From a saved folder to a repository: check it, give it the card of the place where it will be, push it in one commit."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mono_quant.artifact import cards, loading
from mono_quant.artifact.buffers import read_values, unsaved_buffers
from mono_quant.artifact.cards import CardFacts
from mono_quant.artifact.facts import Manifest, read_card_facts
from mono_quant.artifact.merging import foresee, merge_card, renew
from mono_quant.artifact.proposal import proposal
from mono_quant.artifact.tensors import read_tensors
from mono_quant.convert.int8_layers import tensors_of
from mono_quant.errors import (
    ConfigError,
    CorruptCheckpointError,
    HubConflictError,
    LimitExceededError,
    Option,
)
from mono_quant.hf.state import at_rest
from mono_quant.io.disk.json_text import canonical_json
from mono_quant.io.disk.manifest import MANIFEST, README
from mono_quant.io.disk.output import record, temporary_folder, write_file
from mono_quant.io.hub.branch import WorkBranch
from mono_quant.io.hub.client import HUB, Hub
from mono_quant.io.hub.push import PushResult, push
from mono_quant.io.hub.target import (
    PUSH,
    PushOptions,
    Target,
    check_push,
    full_id,
    open_target,
    refuse_foreign,
)
from mono_quant.io.hub.uploads import LocalFile, gather
from mono_quant.io.phases import phase
from mono_quant.io.tensors.checkpoint import open_checkpoint
from mono_quant.planning.config import HALVES
from mono_quant.sources.origin import Origin
from mono_quant.sources.source import Preview


def publish(
    folder: Path,
    repo_id: str,
    options: PushOptions = PUSH,
    *,
    model: nn.Module | None = None,
    client: Hub = HUB,
) -> PushResult:
    """Push a saved folder, after loading it back.

    What the owner of the repository wrote on its card stays (see `merging`); other files that mono_quant did not push are not
    replaced unless the options ask for it.

    Args:
        folder: that `save` wrote.
        repo_id: target; the token's account when it has no owner.
        options: how to push.
        model: the converted model, to compare what the folder loads as with.
        client: where the Hub is, and who asks.

    Returns:
        The commit that holds the files.

    Raises:
        ConfigError: the card contradicts the report.
        CorruptCheckpointError: the folder does not load as what it should be.
        HubConflictError: something in the repository is not ours to replace.
        HubError: the Hub refused; see `mono_quant.errors`.
    """
    manifest = Manifest.read(folder, hashes=False)
    sent = _sent(manifest)
    with phase("Checking the files"):
        files = gather(folder, sorted(sent), _expected(sent))
    place = full_id(repo_id, client)
    ours = checked_card(folder, place)
    check_loads(folder, manifest, model)
    target = open_target(place, options, source=manifest.source, hub=client)
    with _for_target(folder, manifest, target, options, ours) as (made, description):
        return push(
            target,
            files | made,
            options,
            message=_message(manifest),
            description=description,
            merged=[README],
        )


def publish_gathered(
    folder: Path, branch: WorkBranch, gathered: Collection[str], options: PushOptions = PUSH
) -> PushResult:
    """Publish a model whose weights gathered on a work branch, in one commit; see `publish`.

    Args:
        folder: everything else of it, with the manifest of all.
        branch: that holds the weights.
        gathered: paths of the files on the branch.
        options: how to push.

    Returns:
        The commit that holds the files.

    Raises:
        HubConflictError: something in the repository is not ours to replace.
        HubError: the Hub refused; see `mono_quant.errors`.
    """
    manifest = Manifest.read(folder)
    sent = {name: facts for name, facts in _sent(manifest).items() if name not in gathered}
    files = gather(folder, sorted(sent), _expected(sent))
    ours = checked_card(folder, branch.repo_id)
    target = open_target(branch.repo_id, options, source=manifest.source, hub=branch.hub)
    with _for_target(folder, manifest, target, options, ours) as (made, description):
        return branch.publish(
            target,
            files | made,
            gathered,
            options,
            source=manifest.source,
            message=_message(manifest),
            description=description,
            merged=[README],
        )


def _sent(manifest: Manifest) -> dict[str, Mapping[str, Any]]:
    """Return what a manifest says of the files that are pushed as they are."""
    return {name: facts for name, facts in manifest.files.items() if name != README}


def _expected(sent: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, str]]:
    return {name: (facts["size"], facts["sha256"]) for name, facts in sent.items()}


@contextmanager
def _for_target(
    folder: Path, manifest: Manifest, target: Target, options: PushOptions, ours: str
) -> Iterator[tuple[dict[str, LocalFile], str]]:
    """Make the card and the manifest for a repository, and the text of a pull request."""
    about = read_card_facts(folder, target.repo_id)
    card = _card_for(target, options, ours, about).encode()
    with temporary_folder() as staged:
        write_file(staged / README, card)
        moved = replace(manifest, files={**_sent(manifest), README: record(card)})
        write_file(staged / MANIFEST, canonical_json(moved.to_dict(), MANIFEST).encode())
        yield gather(staged, [README, MANIFEST]), proposal(about, target)


def check_publish(repo_id: str, options: PushOptions, coming: Preview, client: Hub = HUB) -> None:
    """Refuse early what `publish` would refuse after long work; nothing is created.

    Args:
        repo_id: target.
        options: how to push.
        coming: what is known of the model that will be converted.
        client: where the Hub is, and who asks.

    Raises:
        HubConflictError: something in the repository is not ours to replace: weights, a licence, other files, or a card that
            says other things than the source.
        HubError: the Hub refused; see `mono_quant.errors`.
    """
    target = check_push(repo_id, options, source=coming.origin, hub=client)
    if target is None or options.may_replace:
        return
    refuse_foreign(
        target, options, (path for path, file in target.files.items() if coming.replaces(path, file))
    )
    there, unread = _read_card(target)
    _refuse_card(target, unread or foresee(there, _earlier(target), coming.origin, target.repo_id))


def _card_for(target: Target, options: PushOptions, ours: str, facts: CardFacts) -> str:
    """Return the card to push: ours, with what the owner of the repository wrote on the one that is there."""
    there, unread = _read_card(target)
    merged = merge_card(there, _earlier(target), ours, facts)
    problems = unread or merged.problems
    if problems and options.may_replace:
        return ours
    _refuse_card(target, problems)
    return merged.text


def _read_card(target: Target) -> tuple[bytes | None, tuple[str, ...]]:
    """Return the card that is there, and why it cannot be read."""
    try:
        return target.read(README), ()
    except LimitExceededError as e:
        return None, (str(e),)


def _earlier(target: Target) -> Origin | None:
    """Return where the model came from that an earlier push left there; None when that is not known."""
    with suppress(CorruptCheckpointError):
        return Origin.from_dict(target.manifest["source"]) if "source" in target.manifest else None
    return None


def _refuse_card(target: Target, problems: Sequence[str]) -> None:
    if problems:
        raise HubConflictError(
            f"{README} of {target.repo_id!r} at commit {target.facts.sha[:12]} has words of its owner, and cannot hold ours beside "
            f"them: {'; '.join(problems[:5])}. Correct it there, pass ",
            Option("overwrite", True),
            " to replace it, or ",
            Option("create_pr", True),
            " to open a pull request.",
        )


def checked_card(folder: Path, repo_id: str | None = None) -> str:
    """Return the card of a folder for the place where it is to be.

    Our lines are written anew, with a load snippet for `repo_id`, and what its owner wrote above and below them is kept; a card whose
    own lines were edited is kept when it is true.

    Raises:
        ConfigError: the card contradicts the report.
    """
    here, there = read_card_facts(folder), read_card_facts(folder, repo_id)
    path = folder / README
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else cards.render(here)
    except UnicodeDecodeError as e:
        raise ConfigError(
            f"{path} is not UTF-8 text ({e.reason} at byte {e.start}). Save it as UTF-8"
        ) from None
    renewed = renew(text, there, cards.stated(here.origin, None))
    if not renewed.problems:
        return renewed.text
    if repo_id is not None:
        text = text.replace('"path/to/this/folder"', f'"{repo_id}"')
    problems = cards.lint(text, there)
    if problems:
        raise ConfigError(
            f"{path} was edited and contradicts the report: {'; '.join(problems[:5])}. Correct it, or delete it to have it "
            f"written anew"
        )
    return text


def check_loads(folder: Path, manifest: Manifest, model: nn.Module | None) -> None:
    """Load a folder and compare every tensor with the model it was saved from, bit for bit, computed ones too.

    Args:
        folder: to load.
        manifest: of the folder.
        model: the converted model; None only proves that the folder loads.

    Raises:
        CorruptCheckpointError: a tensor differs.
    """
    if manifest.kind == "module":
        # only the user's code can build it: compare what is in the files
        with open_checkpoint(folder) as checkpoint:
            found = read_tensors(checkpoint, manifest) | read_values(folder)
    else:
        found = _tensors(loading.load(folder, verify=False)[0])
    if model is None:
        return
    with at_rest(model):
        wrong = sorted(_differing(_tensors(model), found, manifest))
    if wrong:
        raise CorruptCheckpointError(
            f"{folder} does not load as the model that was saved: {', '.join(wrong[:5])} differ. Nothing was published"
        )


def _differing(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], manifest: Manifest
) -> Iterator[str]:
    is_plain = manifest.kind == "module"
    for name in expected.keys() | found.keys():
        ours, theirs = expected.get(name), found.get(name)
        if is_plain and theirs is None:
            continue  # tied: the file holds the tensor under its first name
        if is_plain and ours is not None and theirs is not None and theirs.dtype in HALVES.values():
            # what is in half precision in the file may be float32 in memory, with the same values
            theirs = theirs.to(ours.dtype)
        if not _equal(ours, theirs):
            yield name


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**tensors_of(model), **unsaved_buffers(model)}


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())


def _message(manifest: Manifest) -> str:
    origin = manifest.source
    base = f"{origin.repo_id}@{str(origin.sha)[:12]}" if origin.repo_id else "a local model"
    return f"{manifest.class_name} in {manifest.dtype}, made by mono_quant from {base}"
