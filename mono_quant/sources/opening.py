"""The door: an object, a folder or a Hub id becomes one `Source`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mono_quant.errors import (
    AmbiguousSourceError,
    ConfigError,
    SourceNotFoundError,
    StateDictError,
    UnsupportedModelError,
)
from mono_quant.io.hub.client import is_repo_id
from mono_quant.io.text import looks_like_token
from mono_quant.planning.walk import is_transformers_model
from mono_quant.sources.folder import from_folder
from mono_quant.sources.guards import check_module
from mono_quant.sources.origin import Origin
from mono_quant.sources.remote import from_hub
from mono_quant.sources.source import ACCESS, Access, Source, Subject


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
    is_hub = isinstance(source, str) and locate(source, access.place) == "hub"
    if access.revision is not None and not is_hub:
        raise ConfigError(
            f"revision is {access.revision!r}, but the source is no Hub id, so it has none; leave it out"
        )
    if isinstance(source, nn.Module):
        check_module(source)
        return _from_module(source, processor)
    if isinstance(source, (str, Path)):
        if is_hub:
            opened = from_hub(str(source), access, weights)
        else:
            opened = from_folder(Path(source), access, weights)
        opened.subject.processor = processor
        return opened
    if isinstance(source, Mapping):
        raise StateDictError(
            f"the {type(source).__name__} with {len(source)} entries is weights without the architecture they belong to; "
            f"load it into its model (model.load_state_dict(...)) and pass the model"
        )
    raise SourceNotFoundError(
        f"an object of type {type(source).__name__} is no model; pass an nn.Module, a folder, or a Hub id such as 'org/model'"
    )


def locate(text: str, place: str | None = None) -> str:
    """Say whether a text means a `local` folder or a `hub` id.

    Raises:
        AmbiguousSourceError: it has the form of an id, and a folder of that name is here too.
        SourceNotFoundError: it is neither.
    """
    if looks_like_token(text):
        raise ConfigError("an access token was given where a model belongs; pass it as token=")
    if place not in (None, "hub", "local"):
        raise ConfigError(f"origin is {place!r}; use 'hub' or 'local'")
    if place is not None:
        return place
    here = bool(text) and (Path(text).exists() or Path(text).is_symlink())
    if here and text.count("/") == 1 and not text.startswith((".", "/", "~")) and is_repo_id(text):
        raise AmbiguousSourceError(
            f"{text!r} is a folder here and has the form of a Hub id; write './{text}' for the folder, or pass "
            f"origin='hub' for the Hub"
        )
    if here:
        return "local"
    if is_repo_id(text):
        return "hub"
    raise SourceNotFoundError(
        f"{text!r} is no folder here and no Hub id; check the path, or give an id like 'org/model'"
    )


def _from_module(model: nn.Module, processor: Any) -> Source:
    if any(c.__name__ == "SentenceTransformer" for c in type(model).mro()):
        core = getattr(model[0], "auto_model", None)  # type: ignore[index]
        if not isinstance(core, nn.Module) or not is_transformers_model(core):
            raise UnsupportedModelError(
                f"{type(model).__name__}: its first module ({type(model[0]).__name__}) holds no transformer to quantize"  # type: ignore[index]
            )
        name = next(path for path, module in model.named_modules() if module is core)
        origin = Origin(type(core).__name__)
        return Source(Subject(model, "sentence_transformer", name, processor=processor, origin=origin))
    kind = "transformers" if is_transformers_model(model) else "module"
    return Source(Subject(model, kind, processor=processor, origin=Origin(type(model).__name__)))
