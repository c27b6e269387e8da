"""A model that runs while its weights stay in their files, with everything that its class computes for itself."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

import torch
from torch import nn

from mono_quant.convert.offloaded import Reads, Tensors, offloaded
from mono_quant.convert.probes import ProbeError
from mono_quant.errors import CorruptCheckpointError
from mono_quant.hf.computed import put_tensors_
from mono_quant.hf.dtypes import built_dtype
from mono_quant.hf.making import Made, Recipe, Stored
from mono_quant.hf.models import computed_buffers
from mono_quant.hf.names import on_meta, place
from mono_quant.planning.walk import is_transformers_model


def made_of(
    core: nn.Module,
    tensors: Stored,
    headers: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    codes: Iterable[str] | None = None,
) -> Made:
    """Return the tensors of a model by name, made of those of a checkpoint that fits it.

    Args:
        core: on meta; with int8 layers where there are codes.
        tensors: of the checkpoint; int8 codes in the shape of the float weight, scales fp32.
        headers: dtype and shape of each.
        codes: names of the int8 codes, which have scales beside them.
    """
    held = on_meta(headers)
    if not is_transformers_model(core):
        recipes = {name: Recipe(name, ((name, ""),)) for name in held}
        return Made(core, recipes, tensors, {name: tensor.shape for name, tensor in held.items()})
    placed = place(core, held, codes)
    return Made(
        core, placed.recipes, tensors, {name: tensor.shape for name, tensor in placed.tensors.items()}
    )


@contextmanager
def apart(
    core: nn.Module, tensors: Tensors, stored: Mapping[str, torch.dtype] = MappingProxyType({})
) -> Iterator[Reads]:
    """Let a model on meta run for the block, as if it had been loaded; see `offloaded`.

    Args:
        core: a model of transformers or diffusers, in float or converted; on meta, but for what is in memory already.
        tensors: by name in it.
        stored: dtypes in which files would hold what the class computes itself, by name; it is computed in them.

    Raises:
        ProbeError: it cannot run like that; says why.
    """
    left = _left(core, tensors)
    try:
        if left:
            put_tensors_(core, _computed(core, list(left), stored))
        with offloaded(core, tensors) as reads:
            yield reads
    finally:
        put_tensors_(core, left)


def _left(core: nn.Module, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Return what has no values yet and gets none from a checkpoint, by name; what is tied once."""
    named = [*core.named_parameters(remove_duplicate=False), *core.named_buffers(remove_duplicate=False)]
    known = {id(tensor) for name, tensor in named if name in tensors or not tensor.is_meta}
    left = {id(tensor): name for name, tensor in reversed(named) if id(tensor) not in known}
    return {name: tensor for name, tensor in named if left.get(id(tensor)) == name}


def _computed(
    core: nn.Module, names: list[str], stored: Mapping[str, torch.dtype]
) -> dict[str, torch.Tensor]:
    """Compute what the class of a model computes."""
    if not is_transformers_model(core):
        raise ProbeError(f"{names[0]} is not in the checkpoint, and is not known without loading the model")
    try:
        found = computed_buffers(core, built_dtype(core), names)
        with torch.random.fork_rng(devices=[]):
            torch.rand(1)
            again = computed_buffers(core, built_dtype(core), names)
    except CorruptCheckpointError as e:
        raise ProbeError(f"what is not in the checkpoint ({names[0]}) cannot be computed alone ({e})") from e
    for name in names:
        if name not in found or not torch.equal(found[name], again[name]):
            raise ProbeError(f"{name} is not in the checkpoint, and its class draws it at random")
    saved = core.state_dict(keep_vars=True)
    return {
        name: found[name].to(stored.get(name, found[name].dtype)).to(saved[name].dtype)
        if name in saved
        else found[name]
        for name in names
    }
