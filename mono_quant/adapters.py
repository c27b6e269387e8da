"""The doors: whatever a user holds becomes one `Source`, or one clear error that says what to do instead."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mono_quant import bridge, hub
from mono_quant.allowed import is_allowed
from mono_quant.checkpoint import Checkpoint, open_checkpoint
from mono_quant.errors import (
    AmbiguousSourceError,
    ConfigError,
    CorruptCheckpointError,
    HubOfflineError,
    SourceNotFoundError,
    StateDictError,
    UnsafeInputError,
    UnsupportedModelError,
)
from mono_quant.guards import (
    PICKLES,
    Shapes,
    check_dtypes,
    check_float,
    check_module,
    check_proportion,
    read_config,
    refuse_pickles,
)
from mono_quant.headers import parse_header_bytes
from mono_quant.json_reader import read_json_object
from mono_quant.layers import is_transformers_model
from mono_quant.manifest import MANIFEST
from mono_quant.names import check_fit, renamer, split_names
from mono_quant.origin import Origin


@dataclass
class Source:
    """One model to convert, wherever it came from.

    Attributes:
        model: the module; on meta for a plan.
        core: the part that is converted: `model` itself, or the transformer inside a SentenceTransformer.
        core_name: name of `core` inside `model`; empty for the whole.
        kind: `module`, `transformers` or `sentence_transformer`.
        folder: where its files are; None for a model in memory.
        side_files: names of the files in `folder` that belong to the result: tokenizer, processor, licence.
        processor: tokenizer or processor given by the user.
        origin: where it came from, and what its card says.
        owned: True when nobody else holds the model, so that it may be changed.
        notes: what the user should know.
    """

    model: nn.Module
    core: nn.Module
    kind: str
    core_name: str = ""
    folder: Path | None = None
    side_files: tuple[str, ...] = ()
    processor: Any = None
    origin: Origin = field(default_factory=lambda: Origin("model"))
    owned: bool = False
    notes: list[str] = field(default_factory=list)

    def find_processor(self) -> Any:
        """Return the given processor, or load the one in the folder; None when there is none."""
        if self.processor is None and self.folder is not None and self.kind == "transformers":
            self.processor = bridge.load_processor(self.folder)
        return self.processor


@dataclass(frozen=True)
class Access:
    """How to reach a source.

    Attributes:
        revision: branch, tag or commit of a Hub id.
        client: where the Hub is and who asks.
        trust_remote_code: run code from the repository where its config asks for it.
        allow_pickle: read pickle weights, in a guarded process.
        origin: `hub` or `local` to say what a text means; None to decide by looking.
    """

    revision: str | None = None
    client: hub.Hub = hub.HUB
    trust_remote_code: bool = False
    allow_pickle: bool = False
    origin: str | None = None


def open_source(
    source: Any, access: Access = Access(), *, processor: Any = None, weights: bool = True
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
    is_hub = isinstance(source, str) and locate(source, access.origin) == "hub"
    if access.revision is not None and not is_hub:
        raise ConfigError(
            f"revision is {access.revision!r}, but the source is no Hub id, so it has none; leave it out"
        )
    if isinstance(source, nn.Module):
        check_module(source)
        return _from_module(source, processor)
    if isinstance(source, (str, Path)):
        if is_hub:
            opened = _from_hub(str(source), access, weights)
        else:
            opened = _from_folder(Path(source), access, weights)
        opened.processor = processor
        return opened
    if isinstance(source, Mapping):
        raise StateDictError(
            f"the {type(source).__name__} with {len(source)} entries is weights without the architecture they belong to; "
            f"load it into its model (model.load_state_dict(...)) and pass the model"
        )
    raise SourceNotFoundError(
        f"an object of type {type(source).__name__} is no model; pass an nn.Module, a folder, or a Hub id such as 'org/model'"
    )


def locate(text: str, origin: str | None = None) -> str:
    """Say whether a text means a `local` folder or a `hub` id.

    Raises:
        AmbiguousSourceError: it has the form of an id, and a folder of that name is here too.
        SourceNotFoundError: it is neither.
    """
    if hub.looks_like_token(text):
        raise ConfigError("an access token was given where a model belongs; pass it as token=")
    if origin not in (None, "hub", "local"):
        raise ConfigError(f"origin is {origin!r}; use 'hub' or 'local'")
    if origin is not None:
        return origin
    here = bool(text) and (Path(text).exists() or Path(text).is_symlink())
    if here and text.count("/") == 1 and not text.startswith((".", "/", "~")) and hub.is_repo_id(text):
        raise AmbiguousSourceError(
            f"{text!r} is a folder here and has the form of a Hub id; write './{text}' for the folder, or pass "
            f"origin='hub' for the Hub"
        )
    if here:
        return "local"
    if hub.is_repo_id(text):
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
        return Source(
            model, core, "sentence_transformer", name, processor=processor, origin=Origin(type(core).__name__)
        )
    kind = "transformers" if is_transformers_model(model) else "module"
    return Source(model, model, kind, processor=processor, origin=Origin(type(model).__name__))


def _from_hub(repo_id: str, access: Access, weights: bool) -> Source:
    facts = hub.resolve(repo_id, revision=access.revision, hub=access.client)
    names = {f.path for f in facts.files}
    safe = any(n.endswith(".safetensors") for n in names)
    if access.client.is_offline and not safe and not any(PICKLES.fullmatch(n) for n in names):
        raise HubOfflineError(
            f"the weights of {repo_id!r} at {facts.sha[:12]} are not in the cache and the network is off; unset "
            f"HF_HUB_OFFLINE, or fetch the model once while online"
        )
    if not safe and not access.allow_pickle:
        refuse_pickles(sorted(names), f"{repo_id} at {facts.sha[:12]}")

    def wanted(name: str) -> bool:
        if name.endswith((".safetensors", ".safetensors.index.json")):
            return weights and is_allowed(name)
        if not safe and access.allow_pickle and PICKLES.fullmatch(name):
            return weights
        if not weights and name != "config.json":
            return access.trust_remote_code and name.endswith(".py")
        return is_allowed(name) or (access.trust_remote_code and name.endswith(".py"))

    folder = hub.download(facts, wanted=wanted, hub=access.client)
    if weights or not safe:
        opened = _from_folder(folder, access, weights, is_cache=True)
    else:
        shapes = remote_headers(facts, access.client)[0]
        opened = _complete(_skeleton(folder, access, shapes), shapes)
    opened.origin = replace(_hub_origin(opened.origin.name, facts), access=opened.origin.access)
    if facts.gated:
        opened.notes.append("the source repository is gated; its terms apply to the result")
    return opened


def _hub_origin(name: str, facts: hub.RepoFacts) -> Origin:
    return Origin(
        name,
        facts.repo_id,
        facts.sha,
        facts.private,
        facts.gated,
        facts.license,
        facts.license_name,
        facts.license_link,
        facts.language,
        facts.datasets,
        facts.pipeline_tag,
        facts.extra_gated,
    )


def _local_origin(name: str, folder: Path) -> Origin:
    """Take over what the card beside a local checkpoint says about licence and data; its `base_model` is another one."""
    return Origin(name, **hub.local_card(folder / "README.md"))


def remote_headers(facts: hub.RepoFacts, client: hub.Hub) -> tuple[Shapes, int]:
    """Fetch dtype and shape of every tensor of a repository, and the size of its weights in bytes."""

    def is_weight(name: str) -> bool:
        return "/" not in name and is_allowed(name)

    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    size = 0
    for name, head in hub.read_headers(facts, wanted=is_weight, hub=client).items():
        spans, _ = parse_header_bytes(head, facts.file(name).size, f"{facts.repo_id}/{name}")
        shapes.update({key: (span.dtype, span.shape) for key, span in spans.items()})
        size += sum(span.end - span.start for span in spans.values())
    return shapes, size


def _from_folder(folder: Path, access: Access, weights: bool, *, is_cache: bool = False) -> Source:
    raw = read_config(folder)
    pickled = access.allow_pickle and not any(folder.glob("*.safetensors"))
    with open_checkpoint(folder, allow_pickle=access.allow_pickle) as checkpoint:
        shapes = {name: (h.dtype, h.shape) for name, h in checkpoint.headers.items()}
        check_float(folder, shapes)
        if not weights:
            return _complete(_skeleton(folder, access, shapes), shapes)
        bare = _skeleton(folder, access, shapes)
        cls, config = bridge.model_class(raw, folder, access.trust_remote_code)
        model = bridge.load_float(cls, config, _read_all(checkpoint), str(folder))
        # a commit says already what the files are
        files = {} if pickled or is_cache else checkpoint.sha256s()
    source = _of_folder(model, folder)
    used = {
        "allow_pickle": pickled,
        "trust_remote_code": access.trust_remote_code and bool(raw.get("auto_map")),
    }
    source.origin = replace(source.origin, files=files, access=tuple(name for name, on in used.items() if on))
    source.notes = bare.notes
    if pickled:
        source.notes.append("read from pickle weights (allow_pickle=True)")
    _note_generation(model, folder)
    return source


def _skeleton(folder: Path, access: Access, shapes: Shapes) -> Source:
    raw = read_config(folder)
    check_float(folder, shapes)
    check_proportion(folder, raw, shapes)
    cls, config = bridge.model_class(raw, folder, access.trust_remote_code)
    sizes: dict[torch.dtype, int] = {}
    for dtype, shape in shapes.values():
        if dtype.is_floating_point:
            sizes[dtype] = sizes.get(dtype, 0) + math.prod(shape)
    dtype = max(sizes, key=lambda d: sizes[d], default=torch.float32)
    model = bridge.skeleton(cls, config, dtype, str(folder))
    left = check_fit(model, {name: shape for name, (_, shape) in shapes.items()}, str(folder))
    check_dtypes(folder, shapes, model, left)
    source = _of_folder(model, folder)
    if left:
        source.notes.append(f"left out, because no layer of {cls.__name__} uses them: {_grouped(left)}")
    return source


def _complete(source: Source, shapes: Shapes) -> Source:
    """Refuse a skeleton that the checkpoint does not fill, as loading would.

    Raises:
        CorruptCheckpointError: weights are missing.
    """
    model = source.core
    state = model.state_dict(keep_vars=True)
    filled, short = _filled(model, shapes)
    # a tied tensor has several names, of which a checkpoint holds one
    present = {id(state[name]) for name in filled if name in state}
    optional = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    absent = [name for name, tensor in state.items() if id(tensor) not in present]
    missing = [name for name in absent if not any(re.search(p, name) for p in optional)] + short
    if missing:
        raise CorruptCheckpointError(
            f"{source.folder}: {len(missing)} weights of {type(model).__name__} are missing: {_grouped(missing)}. "
            f"If that is intended, load the model yourself and pass the object"
        )
    return source


def _filled(model: nn.Module, shapes: Shapes) -> tuple[set[str], list[str]]:
    """Return the names in the model that a checkpoint has tensors for, and those that are made of too few values."""
    rename, state = renamer(model), model.state_dict()
    filled, short = set(), []
    values: dict[str, int] = {}
    for key, (_, shape) in shapes.items():
        name, merged = rename(key)
        filled.add(name)
        if merged:
            values[name] = values.get(name, 0) + math.prod(shape)
    for name, count in values.items():
        parts = [part for part in split_names(model, name) if part in state]
        filled.update(parts)
        if count < sum(state[part].numel() for part in parts):
            short += parts
    return filled, short


def _grouped(names: list[str]) -> str:
    """List names; of many, those below one numbered layer as one."""
    if len(names) <= 8:
        return ", ".join(names)
    groups = dict.fromkeys(re.sub(r"^(.*\.\d+)\..*$", r"\1.*", name) for name in names)
    return ", ".join(list(groups)[:8]) + (" ..." if len(groups) > 8 else "")


def _of_folder(model: nn.Module, folder: Path) -> Source:
    source = Source(
        model,
        model,
        "transformers",
        folder=folder,
        side_files=side_files(folder),
        origin=_local_origin(type(model).__name__, folder),
        owned=True,
    )
    if "modules.json" in source.side_files:
        source.notes.append(
            f"a SentenceTransformer: only the {type(model).__name__} inside it was converted, and load() gives that alone; "
            f"quantize(SentenceTransformer(...)) keeps the pooling"
        )
    return source


def _read_all(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: checkpoint[name] for name in checkpoint}


def side_files(folder: Path) -> tuple[str, ...]:
    """Return the files beside the weights that belong to a model, by the list of what an output may hold."""
    own = ("config.json", "generation_config.json", "README.md", MANIFEST, "mono_quant_report.json")
    names = [p.relative_to(folder).as_posix() for p in [*folder.glob("*"), *folder.glob("*/*")]]
    # the weights of sentence-transformers' dense modules lie in folders of their own
    chosen = [n for n in names if is_allowed(n) and n not in own and ("/" in n or ".safetensors" not in n)]
    for below in {n.partition("/")[0] for n in chosen if "/" in n}:
        if (folder / below).is_symlink():
            raise UnsafeInputError(
                f"{folder / below} is a symbolic link to another folder; put a copy of the folder there"
            )
    return tuple(sorted(chosen))


def _note_generation(model: nn.Module, folder: Path) -> None:
    path = folder / "generation_config.json"
    if path.exists() and hasattr(model, "generation_config"):
        clean, _ = bridge.clean_config(read_json_object(path))
        model.generation_config = type(model.generation_config).from_dict(clean)  # type: ignore[union-attr]
