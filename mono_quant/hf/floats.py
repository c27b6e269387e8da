"""A converted model of transformers becomes float again: its own classes, with the weights that its codes stand for."""

from typing import Any

import torch
from torch import nn

from mono_quant.convert.half import remove_casts_
from mono_quant.convert.stored import StoredModule
from mono_quant.convert.surgery import put_, relink_
from mono_quant.errors import MetaTensorError
from mono_quant.hf.adapters import refuse_adapters
from mono_quant.hf.diffusion import config_of, diffusion_skeleton
from mono_quant.hf.models import skeleton
from mono_quant.planning.layers import declared_float32
from mono_quant.planning.walk import is_diffusers_model, module_aliases, tensor_names


def dequantize_(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Put float layers of its own classes in the place of converted ones, in place.

    Args:
        model: a converted model of transformers or diffusers.
        dtype: of all floats but those that the class needs in float32; None for the one that the weights read as.

    Returns:
        The model. Its weights are those that were computed with; what quantization rounded away does not come back.

    Raises:
        AdapterAttachedError: adapters are attached to it.
        MetaTensorError: parts of it are offloaded.
    """
    refuse_adapters(model)
    refuse_offloaded(model)
    name = type(model).__name__
    if is_diffusers_model(model):
        bare = diffusion_skeleton(type(model), config_of(model), name)
    else:
        bare = skeleton(type(model), model.config, torch.float32, name)
    aliases = module_aliases(model)
    replaced: dict[nn.Module, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in list(model.named_modules()):
        if isinstance(module, StoredModule) and not name.startswith(inside):
            # of an attention, its projection goes with it
            inside = (*inside, f"{name}.")
            new = bare.get_submodule(name)
            _fill_(new, module, dtype)
            replaced[module] = new
            put_(model, (name, *aliases[id(module)]), module, new)
    relink_(model, replaced)
    remove_casts_(model)
    if dtype is not None:
        _cast_(model, dtype)
    return model


def _cast_(model: nn.Module, dtype: torch.dtype) -> None:
    """Give a float model a dtype as transformers does when it loads one: what is not saved stays as it is."""
    fixed = declared_float32(model, dtype)
    for name, tensor, _ in tensor_names(model):
        if tensor.is_floating_point() and name not in fixed:
            tensor.data = tensor.data.to(dtype)


def refuse_offloaded(model: nn.Module) -> None:
    """Refuse a model of which accelerate keeps weights elsewhere.

    Raises:
        MetaTensorError: it has weights without data.
    """
    for name, tensor, _ in tensor_names(model):
        if tensor.is_meta:
            raise MetaTensorError(
                f"{name} is on the meta device and has no data: device_map offloads it; load the model without offloading first"
            )


def _fill_(new: nn.Module, old: nn.Module, dtype: torch.dtype | None) -> None:
    """Give a float layer on meta the tensors that a converted one stands for."""
    for path, module in new.named_modules():
        source = old.get_submodule(path)
        for name, empty in list(module._parameters.items()):  # noqa: SLF001
            value = None if empty is None else getattr(source, name)
            if value is None:
                continue
            own = dtype if isinstance(source, StoredModule) and name in source.held else None
            tensor = value.detach().as_subclass(torch.Tensor).to(own or value.dtype).clone()
            # not into `_parameters`: a recurrent layer notes what is set
            setattr(module, name, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
