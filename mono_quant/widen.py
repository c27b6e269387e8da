"""Making a float16 model run: its large matrices stay float16 in memory, its arithmetic is float32."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mono_quant.convert import disable_float_fast_paths_, put_
from mono_quant.forwards import StoredModule
from mono_quant.half_modules import HALF_LAYERS
from mono_quant.layers import WEIGHTS, below, kind_of, module_aliases, obstacle, own_floats


def compute_in_float_(model: nn.Module, within: str = "") -> None:
    """Make a float16 model compute in float32, with its large matrices in float16.

    Layers of the kinds in `HALF_LAYERS` are replaced; every other float16 tensor becomes float32 with the same values.
    A module in another dtype gets its inputs in it, and answers in float32, by hooks.

    Args:
        model: is changed.
        within: name of the part that is float16; everything when empty.
    """
    modules = {n: m for n, m in model.named_modules() if below(n, within)}
    layers = {n: m for n, m in modules.items() if _can_hold_half(m)}
    inside = {f"{n}.out_proj".lstrip(".") for n, m in layers.items() if kind_of(m) == "attention"}
    held = {id(m.get_parameter(w)) for m in layers.values() for w in WEIGHTS[kind_of(m)]}
    wide: set[int] = set()
    for name, module in modules.items():
        for own, tensor in own_floats(module).items():
            is_weight = (
                own in WEIGHTS[kind_of(module)] if name in layers else name in inside and own == "weight"
            )
            if tensor.dtype == torch.float16 and not is_weight:
                tensor.data = tensor.data.float()
                wide.add(id(tensor))
    # a tensor that something else uses too is float32 for all who hold it
    free = held - wide
    shared: dict[int, nn.Parameter] = {}
    aliases = module_aliases(model)
    for name, module in layers.items():
        if all(id(module.get_parameter(w)) in free for w in WEIGHTS[kind_of(module)]):
            new = HALF_LAYERS[kind_of(module)](module, lambda p: _frozen(p, shared))
            put_(model, (name, *aliases[id(module)]), module, new)
    for module in model.get_submodule(within).modules():
        if not isinstance(module, StoredModule):
            _cast_inputs_(module)
    disable_float_fast_paths_(model)


def widened(model: nn.Module, report_names: Iterable[str]) -> tuple[int, list[str]]:
    """Count the values that a file holds as float16 and `model` as float32, and name the classes that hold matrices of them.

    Args:
        model: after `compute_in_float_`.
        report_names: of the tensors that are float16 in the file.
    """
    names = set(report_names)
    count, classes = 0, set()
    for name, module in model.named_modules():
        for own, tensor in own_floats(module).items():
            if f"{name}.{own}".lstrip(".") in names and tensor.dtype == torch.float32:
                count += tensor.numel()
                classes |= {type(module).__name__} if tensor.dim() > 1 else set()
    return count, sorted(classes)


def _can_hold_half(module: nn.Module) -> bool:
    kind = kind_of(module)
    if kind not in HALF_LAYERS or obstacle(module, kind):
        return False
    return all(module.get_parameter(w).dtype == torch.float16 for w in WEIGHTS[kind])


def _frozen(parameter: nn.Parameter, shared: dict[int, nn.Parameter]) -> nn.Parameter:
    """Return one Parameter without gradient for all layers that share `parameter`."""
    return shared.setdefault(id(parameter), nn.Parameter(parameter.data, requires_grad=False))


def _cast_inputs_(module: nn.Module) -> None:
    """Let a module with matrices, or in a dtype of its own, take float inputs of any dtype."""
    own = own_floats(module).values()
    if any(t.dim() > 1 or t.dtype != torch.float32 for t in own):
        module.register_forward_pre_hook(_inputs_to_own_dtype, with_kwargs=True)
    if any(t.dtype != torch.float32 for t in own):
        module.register_forward_hook(_output_to_float)


def _own_dtype(module: nn.Module) -> torch.dtype | None:
    return next((t.dtype for t in module.parameters(recurse=False) if t.is_floating_point()), None)


def _inputs_to_own_dtype(module: nn.Module, args: Any, kwargs: Any) -> Any:
    own = _own_dtype(module)
    return (args, kwargs) if own is None else (_cast_tree(args, own), _cast_tree(kwargs, own))


def _output_to_float(module: nn.Module, args: Any, output: Any) -> Any:
    return output if _own_dtype(module) == torch.float16 else _cast_tree(output, torch.float32)


def _cast_tree(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: _cast_tree(v, dtype) for k, v in value.items()}
    return type(value)(_cast_tree(v, dtype) for v in value) if type(value) in (tuple, list) else value
