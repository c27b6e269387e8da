"""The door: an object, a folder or a Hub id becomes one `Source`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mono_quant.errors import (
    AmbiguousSourceError,
    ConfigError,
    Option,
    SourceNotFoundError,
    StateDictError,
    UnsupportedModelError,
)
from mono_quant.hf.sentence import is_encoder, transformer_in
from mono_quant.io.hub.client import is_repo_id
from mono_quant.io.text import looks_like_token
from mono_quant.planning.walk import is_diffusers_model, is_transformers_model
from mono_quant.sources.folder import from_folder, preview_folder
from mono_quant.sources.guards import check_module, pipeline_text
from mono_quant.sources.origin import Origin
from mono_quant.sources.remote import from_hub, preview_hub
from mono_quant.sources.source import ACCESS, Access, Preview, Source, Subject


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
        return _from_module(source, processor)
    if place in ("hub", "local"):
        if place == "hub":
            opened = from_hub(str(source), access, weights)
        else:
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
        return preview_hub(str(source), access)
    return preview_folder(Path(source)) if place == "local" else Preview(Origin(type(source).__name__))


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
            f"{what}, which has no revision {access.revision!r}; leave it out, or give a Hub id"
        )
    return place


def locate(text: str, place: str | None = None) -> str:
    """Say whether a text means a `local` folder or a `hub` id.

    Raises:
        AmbiguousSourceError: it has the form of an id, and a folder of that name is here too.
        SourceNotFoundError: it is neither.
    """
    if looks_like_token(text):
        raise ConfigError("an access token was given where a model belongs; pass it as ", Option("token"))
    if place not in (None, "hub", "local"):
        raise ConfigError(f"origin is {place!r}; use 'hub' or 'local'")
    if place is not None:
        return place
    here = bool(text) and (Path(text).exists() or Path(text).is_symlink())
    if here and text.count("/") == 1 and not text.startswith((".", "/", "~")) and is_repo_id(text):
        what = "file" if Path(text).is_file() else "folder"
        raise AmbiguousSourceError(
            f"{text!r} is a {what} here and has the form of a Hub id; write './{text}' for the {what}, or pass ",
            Option("origin", "hub"),
            " for the Hub",
        )
    if here:
        return "local"
    if is_repo_id(text):
        return "hub"
    raise SourceNotFoundError(
        f"{text!r} is no folder here and no Hub id; check the path, or give an id like 'org/model'"
    )


def _from_module(model: nn.Module, processor: Any) -> Source:
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
