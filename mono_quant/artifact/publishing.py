"""From a saved folder to a repository: check it, give it the card of the place where it will be, push it in one commit."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from mono_quant.artifact import cards, loading
from mono_quant.artifact.buffers import read_values, unsaved_buffers
from mono_quant.artifact.facts import Manifest, read_card_facts
from mono_quant.artifact.tensors import read_tensors
from mono_quant.errors import ConfigError, CorruptCheckpointError, MonoQuantError
from mono_quant.hf.state import at_rest
from mono_quant.io.disk.json_text import canonical_json
from mono_quant.io.disk.manifest import MANIFEST
from mono_quant.io.disk.output import record, temporary_folder, write_file
from mono_quant.io.hub.client import HUB, Hub
from mono_quant.io.hub.push import PushResult, push
from mono_quant.io.hub.repo import RepoFacts
from mono_quant.io.hub.target import full_id

README = "README.md"


def publish(
    folder: Path,
    repo_id: str,
    *,
    model: nn.Module | None = None,
    private: bool | None = None,
    overwrite: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    client: Hub = HUB,
) -> PushResult:
    """Push a saved folder, after loading it back.

    Args:
        folder: that `save` wrote.
        repo_id: target; the token's account when it has no owner.
        model: the converted model, to compare what the folder loads as with.
        private: visibility of a repository that is created; None follows the source.
        overwrite: replace weights that mono_quant did not push.
        create_pr: open a pull request instead of changing the branch.
        revision: branch to push to.
        commit_message: one line.
        client: where the Hub is, and who asks.

    Returns:
        The commit that holds the files.

    Raises:
        ConfigError: the card contradicts the report.
        CorruptCheckpointError: the folder does not load as what it should be.
        HubError: the Hub refused; see `mono_quant.errors`.
    """
    manifest = Manifest.read(folder, hashes=True)
    target = full_id(repo_id, client)
    card = checked_card(folder, target)
    check_loads(folder, manifest, model)
    origin = manifest.source
    source = None
    if origin.repo_id is not None:
        source = RepoFacts(origin.repo_id, None, str(origin.sha), origin.private, origin.gated)
    files = manifest.files
    with temporary_folder() as staged:
        write_file(staged / README, card.encode())
        moved = replace(manifest, files={**files, README: record(card.encode())})
        text = canonical_json(moved.to_dict(), MANIFEST)
        write_file(staged / MANIFEST, text.encode())
        return push(
            folder,
            target,
            files=sorted({*files, README, MANIFEST}),
            expect={
                name: (facts["size"], facts["sha256"]) for name, facts in files.items() if name != README
            },
            instead={README: staged / README, MANIFEST: staged / MANIFEST},
            commit_message=commit_message or _message(manifest),
            source=source,
            private=private,
            overwrite=overwrite,
            create_pr=create_pr,
            revision=revision,
            hub=client,
        )


@contextmanager
def after_saving(folder: Path | None, repo_id: str) -> Iterator[None]:
    """Let a failure of the push say that the folder was saved before, and how to push it; None when there is none."""
    try:
        yield
    except MonoQuantError as e:
        if folder is None:
            raise
        raise type(e)(
            f"{e} The model itself is saved in {folder}; push it from there: mono-quant push {folder} {repo_id}"
        ) from e


def checked_card(folder: Path, repo_id: str | None = None) -> str:
    """Return the card of a folder for the place where it is to be.

    A card that nobody touched is written anew, with a load snippet for `repo_id`; one that was edited is kept when it is true.

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
    if text == cards.render(here):
        return cards.render(there)
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
        found = read_tensors(folder, manifest) | read_values(folder)
    else:
        found = _tensors(loading.load(folder, verify=False)[0])
    if model is None:
        return
    with at_rest(model):
        expected = _tensors(model)
        tied = set(expected) - set(found) if manifest.kind == "module" else set()
        names = (expected.keys() | found.keys()) - tied
        wrong = [name for name in names if not _equal(expected.get(name), found.get(name))]
    if wrong:
        raise CorruptCheckpointError(
            f"{folder} does not load as the model that was saved: {', '.join(sorted(wrong)[:5])} differ. Nothing was published"
        )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**model.state_dict(), **unsaved_buffers(model)}


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())


def _message(manifest: Manifest) -> str:
    origin = manifest.source
    base = f"{origin.repo_id}@{str(origin.sha)[:12]}" if origin.repo_id else "a local model"
    return f"{manifest.class_name} in {manifest.dtype}, made by mono_quant from {base}"
