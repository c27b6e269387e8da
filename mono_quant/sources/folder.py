"""A folder of a transformers or diffusers model becomes a source, with its weights or as a skeleton for a plan."""

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mono_quant.convert.arrival import Arrival, unfinite
from mono_quant.convert.filling import fill_
from mono_quant.errors import (
    CorruptCheckpointError,
    Option,
    UnsafeInputError,
    UnsupportedModelError,
    Words,
)
from mono_quant.hf.around import Around, around, first_dtype, held_around, skeleton_around
from mono_quant.hf.configs import set_generation_
from mono_quant.hf.diffusion import (
    CLASS,
    checkpoint_names,
    diffusion_class,
    diffusion_skeleton,
    fit_diffusion,
    read_diffusion,
)
from mono_quant.hf.dtypes import loaded_dtypes, take_dtypes_
from mono_quant.hf.encoders import Encoder, encoder_of
from mono_quant.hf.fp8 import fp8_weights, kind_of_fp8, told
from mono_quant.hf.making import Recipe
from mono_quant.hf.models import load_as_stored, model_class, skeleton
from mono_quant.hf.names import Fit, Placement, fit, grouped, on_meta
from mono_quant.hf.sentence import core_class, settings_of
from mono_quant.io.disk.allowed import BUFFERS, is_allowed
from mono_quant.io.disk.json_text import read_json_object
from mono_quant.io.disk.manifest import MANIFEST, README, REPORT
from mono_quant.io.disk.reading import open_regular, read_all
from mono_quant.io.hub.metadata import local_card
from mono_quant.io.hub.repo import RepoFile, cached_commit, git_id
from mono_quant.io.memory import uncollected
from mono_quant.io.tensors.blockwise import Blockwise, Dequantized
from mono_quant.io.tensors.checkpoint import Checkpoint, WeightFile, open_checkpoint, open_weights
from mono_quant.io.tensors.listing import Listing
from mono_quant.planning.walk import common_dtype
from mono_quant.sources.guards import (
    Shapes,
    check_float,
    check_proportion,
    read_config,
)
from mono_quant.sources.origin import Origin
from mono_quant.sources.source import Access, Preview, Source, Stored, Subject

MAX_SIDE_FILE_BYTES = 1 << 26
_PICKLED = Words("read from pickle weights (", Option("allow_pickle", True), ")")


def _local_origin(name: str, folder: Path) -> Origin:
    """Take over what the card beside a local checkpoint says about licence and data; its `base_model` is another one."""
    return Origin(name, card=local_card(folder / README))


@dataclass(frozen=True)
class _Skeleton:
    """A model on meta that a checkpoint fits, and how to make the real one.

    Attributes:
        kind: `transformers` or `diffusers`.
        model: with every tensor in the dtype of the checkpoint.
        raw: the `config.json`.
        config: of a transformers model.
        dtype: of most of the checkpoint.
        dtypes: that transformers would give the float tensors.
        placed: where the tensors of the checkpoint go in it.
        notes: what the user should know.
        has_code: the repository's own code was run.
        encoder: of sentence-transformers, that the model is the transformer of.
        codes: which tensors of the files are fp8, where some are.
    """

    kind: str
    model: nn.Module
    raw: Mapping[str, Any]
    config: Any
    dtype: torch.dtype
    dtypes: Mapping[str, torch.dtype]
    placed: Placement
    notes: list[str]
    has_code: bool
    encoder: Encoder | None
    codes: Blockwise | None = None


def from_folder(folder: Path, access: Access, weights: bool, *, is_cache: bool = False) -> Source:
    """Open the folder of a transformers model.

    Args:
        folder: with `config.json` and weights.
        access: how to read it.
        weights: False gives a skeleton alone, whose weights nobody will read.
        is_cache: the folder holds one commit of a repository, which says already what its files are.

    Raises:
        MonoQuantError: a typed error for everything that cannot be converted.
    """
    raw = read_config(folder)
    pickled = access.allow_pickle and not any(folder.glob("*.safetensors"))
    # stays open as long as the source: what is read later are the files that were checked
    checkpoint = open_checkpoint(folder, allow_pickle=access.allow_pickle)
    shapes = {name: (h.dtype, h.shape) for name, h in checkpoint.headers.items()}
    bare = _skeleton(folder, raw, access, shapes)
    source = _of_folder(folder, bare, held_around(folder, bare.encoder) if bare.encoder else {})
    if not weights:
        return source
    tensors = checkpoint if bare.codes is None else Dequantized(checkpoint, bare.codes)
    source.stored = _stored(source.subject, bare, tensors)
    files = {} if pickled or is_cache else checkpoint.sha256s()
    used = {"allow_pickle": pickled, "trust_remote_code": bare.has_code}
    origin = source.subject.origin
    source.subject.origin = replace(
        origin, files=files, access=tuple(name for name, on in used.items() if on)
    )
    if pickled:
        source.notes.append(_PICKLED)
    return source


def _stored(subject: Subject, bare: _Skeleton, checkpoint: Checkpoint | Dequantized) -> Stored:
    folder, prefix = checkpoint.folder, f"{subject.core_name}." if subject.core_name else ""

    def fill(arrival: Arrival | None) -> nn.Module:
        cls = type(bare.model)
        if bare.kind == "diffusers":
            return read_diffusion(cls, bare.raw, checkpoint, str(folder), arrival)
        model = load_as_stored(
            cls, bare.config, checkpoint.stored(), str(folder), bare.dtype, arrival=arrival
        )
        set_generation_(model, folder)
        if bare.encoder is None:
            return model
        whole = around(folder, model, bare.encoder, first_dtype(bare.model), trust_remote_code=bare.has_code)
        subject.settings.update(settings_of(whole))
        return whole

    return Stored(
        fill, lambda: frozenset(f"{prefix}{name}" for name in unfinite(checkpoint, bare.placed.sources))
    )


def savable_folder(
    folder: Path, access: Access, listing: Listing, weights: tuple[WeightFile, ...] = ()
) -> Source:
    """Make a source with a skeleton in it that has everything but weights: it can be converted and saved around them.

    Args:
        folder: of a model.
        access: how to read it.
        listing: what its weight files say of themselves, wherever they are.
        weights: those files, where they are in the folder and nobody hashed them yet.

    Raises:
        MonoQuantError: as `from_folder`.
    """
    shapes = {name: (h.dtype, h.shape) for name, h in listing.tensors.items()}
    bare = _skeleton(folder, read_config(folder), access, shapes)
    source = _of_folder(folder, bare, held_around(folder, bare.encoder) if bare.encoder else {})
    subject = source.subject
    if bare.kind != "diffusers":
        set_generation_(bare.model, folder)
    if bare.encoder is not None:
        dtype = first_dtype(bare.model)
        whole = around(folder, bare.model, bare.encoder, dtype, trust_remote_code=bare.has_code)
        subject = replace(subject, model=whole, settings=settings_of(whole))
    used = ("trust_remote_code",) if bare.has_code else ()
    origin = replace(subject.origin, access=used)
    return replace(source, subject=replace(subject, origin=origin, weights=weights))


def from_headers(folder: Path, access: Access, shapes: Shapes, others: Around) -> Source:
    """Make a source without data from a config and the headers of weights that lie elsewhere.

    Args:
        folder: with `config.json`.
        access: how to read it.
        shapes: dtype and shape of every tensor of the checkpoint, by name.
        others: the same of the weights in folders below it.

    Raises:
        MonoQuantError: as `from_folder`.
    """
    bare = _skeleton(folder, read_config(folder), access, shapes)
    return _of_folder(folder, bare, others)


@uncollected()
def _skeleton(folder: Path, raw: Mapping[str, Any], access: Access, held: Shapes) -> _Skeleton:
    codes = fp8_weights(raw, held, str(folder))
    shapes = held if codes is None else codes.shapes(held)
    check_float(folder, shapes)
    check_proportion(folder, raw, shapes)
    if CLASS in raw:
        return _diffusion_skeleton(folder, raw, shapes)
    cls, config = model_class(raw, folder, access.trust_remote_code)
    encoder = encoder_of(folder, raw)
    if encoder is not None:
        cls = core_class(config, encoder, cls)
    # the files decide: a config may say another dtype than they hold
    dtype = common_dtype((own, math.prod(shape)) for own, shape in shapes.values())
    model = skeleton(cls, config, dtype, str(folder))
    found = fit(model, on_meta(shapes))
    _refuse_misfit(found, cls.__name__, folder)
    dtypes = loaded_dtypes(model, dtype)
    take_dtypes_(model, dtype, {name: tensor.dtype for name, tensor in found.placed.tensors.items()})
    # as transformers notes it on a model that it loads: by these its tensors get their names back
    model.__dict__["_weight_conversions"] = found.placed.conversions
    has_code = access.trust_remote_code and bool(raw.get("auto_map"))
    notes = [*([] if codes is None else [told(codes)]), *_left_out(model, found.left)]
    return _Skeleton(
        "transformers", model, raw, config, dtype, dtypes, found.placed, notes, has_code, encoder, codes
    )


def _diffusion_skeleton(folder: Path, raw: Mapping[str, Any], shapes: Shapes) -> _Skeleton:
    model = diffusion_skeleton(diffusion_class(raw, folder), raw, str(folder))
    tensors, names = on_meta(shapes), checkpoint_names(model, shapes)
    held = {name: tensors[key] for name, key in names.items()}
    left = fit_diffusion(model, held, str(folder))
    kept = {name: tensor for name, tensor in held.items() if name not in left}
    fill_(model, kept)
    dtype = common_dtype((tensor.dtype, tensor.numel()) for tensor in kept.values())
    placed = Placement(kept, {name: Recipe(name, ((names[name], ""),)) for name in kept})
    return _Skeleton(
        "diffusers",
        model,
        raw,
        None,
        dtype,
        {},
        placed,
        _left_out(model, left),
        has_code=False,
        encoder=None,
    )


def _left_out(model: nn.Module, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    return [f"left out, because no layer of {type(model).__name__} uses them: {grouped(names)}"]


def _refuse_misfit(found: Fit, name: str, folder: Path) -> None:
    """Refuse what loading would refuse or change, before a weight is read.

    Raises:
        CorruptCheckpointError: weights are missing, or have other shapes than the config says.
        UnsupportedModelError: weights are integers, booleans or complex, which loading would cast without a word.
    """
    if found.left and not found.placed.tensors:
        raise CorruptCheckpointError(
            f"{folder}: {name} has a place for none of the {len(found.left)} tensors; correct architectures in config.json"
        )
    problem = found.problem(name)
    if problem:
        raise CorruptCheckpointError(
            f"{folder}: {problem}. If that is intended, load the model yourself and pass the object"
        )
    if found.integers:
        raise UnsupportedModelError(
            f"{folder}: {len(found.integers)} tensors are not in floating point, as {name} needs them: "
            f"{', '.join(found.integers[:3])}; save the checkpoint in float32, bfloat16 or float16"
        )


def _of_folder(folder: Path, bare: _Skeleton, others: Around) -> Source:
    """Make the source of a folder, with a skeleton in it.

    Args:
        folder: that it is.
        bare: the transformer.
        others: headers of the weights of the modules around it.
    """
    subject = Subject(
        bare.model,
        bare.kind,
        folder=folder,
        config=bare.raw,
        side_files=find_side_files(folder),
        origin=replace(_local_origin(type(bare.model).__name__, folder), stored=kind_of_fp8(bare.codes)),
    )
    if bare.encoder is not None:
        whole = skeleton_around(folder, bare.model, bare.encoder, others)
        name = bare.encoder.core_name
        subject = replace(subject, model=whole, kind="sentence_transformer", core_name=name)
    return Source(
        subject, owned=True, dtypes=bare.dtypes, notes=bare.notes, placed=bare.placed, codes=bare.codes
    )


def loaded_from(model: Any, files: Sequence[Path], kind: str = "transformers") -> Source:
    """Make a source of a model that its library reads by itself.

    Args:
        model: built like it; on meta.
        files: that the weights are read from; none where they come from memory.
        kind: `transformers` or `diffusers`.
    """
    name = type(model).__name__
    if not files:
        return Source(Subject(model, kind, origin=Origin(name)))
    folder = files[0].parent
    origin = _local_origin(name, folder)
    weights: tuple[WeightFile, ...] = ()
    commit = cached_commit(folder)
    if commit is not None:
        origin = replace(origin, repo_id=commit[0], sha=commit[1])
    elif are_safe(files):
        with open_weights(folder, [file.name for file in files]) as checkpoint:
            # hashed when it is saved: that takes as long as converting
            weights = checkpoint.weight_files()
    if not are_safe(files):
        origin = replace(origin, access=("allow_pickle",))
    raw = read_json_object(folder / "config.json") if (folder / "config.json").is_file() else None
    subject = Subject(
        model,
        kind,
        folder=folder,
        config=raw,
        side_files=find_side_files(folder),
        origin=origin,
        weights=weights,
    )
    return Source(subject, notes=[] if are_safe(files) else [_PICKLED])


def are_safe(files: Sequence[Path]) -> bool:
    """Tell whether weight files are safetensors, all of them."""
    return all(file.suffix == ".safetensors" for file in files)


def preview_folder(folder: Path) -> Preview:
    """Say what is known of a local checkpoint before its weights are read."""
    if not folder.is_dir():
        return Preview(Origin("model"))
    side_files = {name: _file(folder, name) for name in find_side_files(folder)}
    rewritten = ("config.json",) if (folder / "config.json").is_file() else ()
    return Preview(_local_origin("model", folder), side_files, rewritten)


def _file(folder: Path, name: str) -> RepoFile:
    descriptor = open_regular(folder / name)
    try:
        data = read_all(descriptor, MAX_SIDE_FILE_BYTES)
        size = os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)
    if size > len(data):
        return RepoFile(name, size)
    return RepoFile(name, size, hashlib.sha256(data).hexdigest(), git_id(data))


def is_side_file(name: str) -> bool:
    """Tell whether a file of a checkpoint belongs to its result unchanged, by the list of what an output may hold."""
    own = (
        "config.json",
        "generation_config.json",
        README,
        MANIFEST,
        REPORT,
        f"{BUFFERS}/model.safetensors",
    )
    # the weights of sentence-transformers' dense modules lie in folders of their own
    return is_allowed(name) and name not in own and ("/" in name or ".safetensors" not in name)


def find_side_files(folder: Path) -> tuple[str, ...]:
    """Return the files beside the weights that belong to a model, by the list of what an output may hold."""
    places = ("*", "*/*", "[0-9]*_*/*/*")
    names = [p.relative_to(folder).as_posix() for place in places for p in folder.glob(place)]
    chosen = [n for n in names if is_side_file(n)]
    for below in {n.rpartition("/")[0] for n in chosen if "/" in n}:
        if (folder / below).is_symlink():
            raise UnsafeInputError(
                f"{folder / below} is a symbolic link to another folder; put a copy of the folder there"
            )
    return tuple(sorted(chosen))
