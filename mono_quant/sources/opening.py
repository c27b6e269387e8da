"""The door: an object, a folder or a Hub id becomes one `Source`."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from mono_quant.errors import (
    ConfigError,
    HubAuthError,
    HubNotFoundError,
    HubOfflineError,
    HubTransientError,
    Name,
    Option,
    SourceNotFoundError,
    StateDictError,
    UnsupportedModelError,
)
from mono_quant.hf.sentence import is_encoder, transformer_in
from mono_quant.io.disk.allowed import is_allowed
from mono_quant.io.hub.client import is_repo_id
from mono_quant.io.hub.fetching import download
from mono_quant.io.hub.repo import resolve
from mono_quant.io.phases import phase
from mono_quant.io.text import looks_like_token
from mono_quant.planning.walk import is_diffusers_model, is_transformers_model
from mono_quant.sources.folder import from_folder, preview_folder
from mono_quant.sources.guards import check_module, pipeline_text
from mono_quant.sources.origin import Origin
from mono_quant.sources.remote import from_hub, preview_hub
from mono_quant.sources.source import ACCESS, Access, Preview, Source, Subject

logger = logging.getLogger(__name__)


def open_source(
    source: Any, access: Access = ACCESS, *, processor: Any = None, weights: bool = True
) -> Source:
    """Turn what the user gave into a `Source`.

    Args:
        source: a module, a folder, or a Hub id.
        access: how to reach it.
        processor: tokenizer or processor of a model in memory.
        weights: False builds a skeleton without data, from the config and the file headers alone.

    Raises:
        MonoQuantError: a typed error for everything that cannot be converted, naming the remedy.
    """
    place = place_of(source, access)
    if isinstance(source, nn.Module):
        check_module(source)
        return from_module(source, processor)
    if place in ("hub", "local"):
        if place == "hub":
            with looked_up(str(source), access):
                opened = from_hub(str(source), access, weights)
        else:
            with phase("Reading the model"):
                opened = from_folder(Path(source), access, weights)
        opened.subject.processor = processor
        return opened
    if any(c.__name__ == "DiffusionPipeline" for c in type(source).__mro__):
        parts = [n for n, part in source.components.items() if isinstance(part, nn.Module)]
        raise UnsupportedModelError(pipeline_text(f"the {type(source).__name__}", parts))
    if isinstance(source, Mapping):
        raise StateDictError(
            f"the {type(source).__name__} with {len(source)} entries is weights without the architecture they belong to; "
            f"load it into its model (model.load_state_dict(...)) and pass the model"
        )
    raise SourceNotFoundError(
        f"an object of type {type(source).__name__} is no model; pass an nn.Module, a folder, or a Hub id such as 'org/model'"
    )


def preview(source: Any, access: Access = ACCESS) -> Preview:
    """Say what is known of a source before it is opened: where it comes from, and which files travel along.

    Args:
        source, access: as for `open_source`.

    Raises:
        MonoQuantError: as `open_source`, as far as it can be seen without its weights.
    """
    place = place_of(source, access)
    if place == "hub":
        with looked_up(str(source), access):
            return preview_hub(str(source), access)
    return preview_folder(Path(source)) if place == "local" else Preview(Origin(type(source).__name__))


def saved_folder(
    place: str | Path, access: Access = ACCESS, wanted: Callable[[str], bool] = is_allowed
) -> tuple[Path, str | None]:
    """Find a folder that somebody saved: one that is here, or a repository of which the wanted files are fetched.

    Args:
        place: a folder or a Hub id.
        access: how to reach it.
        wanted: tells which files of a repository are needed.

    Returns:
        The folder, in the cache for a Hub id; and the id as the Hub writes it, None for a folder that is here.

    Raises:
        MonoQuantError: as `place_of`; the Hub refused.
    """
    if place_of(place, access) == "local":
        return Path(place), None
    with looked_up(str(place), access):
        facts = resolve(str(place), revision=access.revision, hub=access.client)
    return download(facts, wanted=wanted, hub=access.client), facts.repo_id


@contextmanager
def looked_up(text: str, access: Access) -> Iterator[None]:
    """Let a Hub that does not know a text say that it is no folder either: it may be a path with a slip."""
    try:
        yield
    except (HubAuthError, HubNotFoundError, HubOfflineError, HubTransientError) as e:
        if access.place is not None:
            raise
        raise type(e)(*e.args, f" There is no folder {text!r} here either.") from None


def place_of(source: Any, access: Access) -> str:
    """Tell whether a source is on the `hub`, `local` or in `memory`.

    Raises:
        ConfigError: a revision is given for something that has none.
        MonoQuantError: as `locate`.
    """
    place = "memory"
    if isinstance(source, str):
        place = locate(source, access.place)
    elif isinstance(source, Path):
        place = "local"
    if access.revision is not None and place != "hub":
        what = f"{source} is a local folder" if place == "local" else "the source is a model in memory"
        raise ConfigError(
            f"{what}, which has no revision {access.revision!r}; leave it out, or give a Hub id with ",
            Option("origin", "hub"),
        )
    return place


def locate(text: str, place: str | None = None) -> str:
    """Say whether a text means a `local` folder or a `hub` id.

    What is here wins over an id, as everywhere in the ecosystem; where the text has the form `owner/name`, a warning says so.

    Args:
        text: that the user gave.
        place: `hub` or `local` where the user said which; the disk is not looked at then.

    Raises:
        SourceNotFoundError: it is neither.
    """
    if looks_like_token(text):
        raise ConfigError("an access token was given where a model belongs; pass it as ", Option("token"))
    if place not in (None, "hub", "local"):
        raise ConfigError(Name("origin"), f" is {place!r}; use 'hub' or 'local'")
    if place is not None:
        return place
    here = bool(text) and (Path(text).exists() or Path(text).is_symlink())
    if here and text.count("/") == 1 and not text.startswith((".", "/", "~")) and is_repo_id(text):
        what = "file" if Path(text).is_file() else "folder"
        logger.warning(
            "%r is a %s here, so it is not looked up on the Hub; pass %s for that",
            text,
            what,
            Option("origin", "hub"),
        )
    if here:
        return "local"
    if is_repo_id(text):
        return "hub"
    raise SourceNotFoundError(
        f"{text!r} is no folder here and no Hub id; check the path, or give an id like 'org/model'"
    )


def from_module(model: nn.Module, processor: Any = None) -> Source:
    """Return a model in memory, float or converted, with what belongs to it.

    Raises:
        UnsupportedModelError: it is an encoder around something that is no torch model.
    """
    if is_encoder(model):
        core = transformer_in(model)
        if not is_transformers_model(core):
            raise UnsupportedModelError(
                f"{type(model).__name__}: its transformer is a {type(core).__name__}, which is no torch model; load it with "
                f'backend="torch"'
            )
        name = next(path for path, module in model.named_modules() if module is core)
        origin = Origin(type(core).__name__)
        return Source(Subject(model, "sentence_transformer", name, processor=processor, origin=origin))
    kind = "transformers" if is_transformers_model(model) else "module"
    kind = "diffusers" if is_diffusers_model(model) else kind
    return Source(Subject(model, kind, processor=processor, origin=Origin(type(model).__name__)))
