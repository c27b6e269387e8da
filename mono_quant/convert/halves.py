"""Tensors in half precision: cast, with what does not fit named, and held in memory so that arithmetic stays wide."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from mono_quant.convert.contract import Task
from mono_quant.convert.half_layers import layer_of
from mono_quant.convert.stored import StoredModule
from mono_quant.convert.surgery import clash, disable_float_fast_paths_, put_, relink_
from mono_quant.errors import Fp16RangeError, NonFiniteWeightError, Option
from mono_quant.kernels import cast_half
from mono_quant.kernels.weights import HalfCast
from mono_quant.planning.config import HALVES, QuantizationConfig
from mono_quant.planning.forward_code import dtypes_asked_for
from mono_quant.planning.kinds import kind_of, obstacle, weights_of
from mono_quant.planning.report import TensorReport, dtype_name
from mono_quant.planning.walk import module_aliases, own_floats

_HALVES = {dtype_name(dtype) for dtype in HALVES.values()}


def cast(
    name: str, tensor: Tensor, task: Task, dtype: torch.dtype = torch.float16
) -> tuple[HalfCast | None, str]:
    """Cast a tensor of the model of a task to half precision, or say why it has to stay as it is.

    Raises:
        NonFiniteWeightError: it holds NaN or infinity, and the request does not keep such tensors.
        Fp16RangeError: a value does not fit, and the request does not keep such tensors.
    """
    if name in task.unfit:
        return None, task.unfit[name]
    try:
        half = cast_half(tensor, dtype)
    except NonFiniteWeightError as e:
        return None, unfinite(name, e, task.request)
    if half.overflowed:
        return None, overflow(name, half.overflowed, float(tensor.detach().abs().max()), task.request, dtype)
    return half, ""


def unfinite(name: str, what: object, request: QuantizationConfig) -> str:
    """Return why a tensor with values that are not finite is not cast, where the request keeps such tensors.

    Args:
        name: of the tensor.
        what: is wrong with its values.
        request: what the user asks for.

    Raises:
        NonFiniteWeightError: it does not.
    """
    if request.on_nonfinite == "error":
        raise NonFiniteWeightError(
            f"{name}: {what}. Repair the checkpoint, or use ", Option("on_nonfinite", "keep")
        )
    return f"{name} holds NaN or infinity"


def overflow(name: str, count: int, largest: float, request: QuantizationConfig, dtype: torch.dtype) -> str:
    """Return why a tensor with values that are too large is not cast, where the request keeps such tensors.

    Args:
        name: of the tensor.
        count: of the values that do not fit.
        largest: magnitude of all.
        request: what the user asks for.
        dtype: that they do not fit.

    Raises:
        Fp16RangeError: it does not.
    """
    if request.on_overflow == "error":
        raise Fp16RangeError(
            f"{name}: {count} values do not fit {dtype_name(dtype)} (largest {largest:.6g}, limit "
            f"{torch.finfo(dtype).max:.6g}); use int8, or keep the layer with ",
            Option("on_overflow", "keep"),
        )
    return f"{name} has values up to {largest:.4g}, which {dtype_name(dtype)} cannot hold"


def hold_(model: nn.Module, wide: Mapping[int, torch.dtype]) -> None:
    """Make a model run that holds tensors in half precision, in the dtypes that they stand for.

    Layers that can hold such weights take the place of those that have them; any other tensor gets the dtype that it stands for,
    with the values that it has. So does the parameter that decides it where a forward asks for `self.dtype`.

    Args:
        model: is changed.
        wide: by id of each of its tensors in half precision, the dtype that arithmetic is to see.
    """
    modules = dict(model.named_modules())
    deciding = _deciding(modules.values())
    layers = {
        n: m
        for n, m in modules.items()
        if _can_hold(m, wide) and not any(id(m.get_parameter(w)) in deciding for w in weights_of(m))
    }
    inside = {f"{n}.out_proj".lstrip(".") for n, m in layers.items() if kind_of(m) == "attention"}
    held = {id(m.get_parameter(w)) for m in layers.values() for w in weights_of(m)}
    widened: set[int] = set()
    for name, module in modules.items():
        for own, tensor in own_floats(module).items():
            is_weight = own in weights_of(module) if name in layers else name in inside and own == "weight"
            if id(tensor) in wide and not is_weight:
                tensor.data = tensor.data.to(wide[id(tensor)])
                widened.add(id(tensor))
    # a tensor that something else uses too is wide for all who hold it
    free = held - widened
    shared: dict[int, nn.Parameter] = {}
    aliases = module_aliases(model)
    replaced: dict[nn.Module, nn.Module] = {}
    for name, module in layers.items():
        weights = [module.get_parameter(w) for w in weights_of(module)]
        if all(id(weight) in free for weight in weights):
            made = layer_of(kind_of(module), weights[0].dtype)
            assert made is not None
            replaced[module] = made(module, lambda p: _frozen(p, shared))
            for part in replaced[module].modules():
                if isinstance(part, StoredModule):
                    part.read_as_(wide[id(weights[0])])
            put_(model, (name, *aliases[id(module)]), module, replaced[module])
    relink_(model, replaced)
    disable_float_fast_paths_(model)


def _deciding(modules: Iterable[nn.Module]) -> set[int]:
    """Return the ids of parameters whose dtype a forward takes for that of its arithmetic: masks of LayoutLM and its like."""
    asked = [part for module in modules for part in dtypes_asked_for(module)]
    firsts = (next((p for p in m.parameters() if p.is_floating_point()), None) for m in asked)
    return {id(parameter) for parameter in firsts if parameter is not None}


def _can_hold(module: nn.Module, wide: Mapping[int, torch.dtype]) -> bool:
    """Tell whether a layer in half precision can take the place of a module."""
    kind = kind_of(module)
    if not kind or obstacle(module, kind):
        return False
    weights = [module.get_parameter(w) for w in weights_of(module)]
    made = layer_of(kind, weights[0].dtype)
    is_one = len({w.dtype for w in weights}) == 1 and all(id(w) in wide for w in weights)
    return is_one and made is not None and not clash(module, made)


def _frozen(parameter: nn.Parameter, shared: dict[int, nn.Parameter]) -> nn.Parameter:
    """Return one Parameter without gradient for all layers that share `parameter`."""
    return shared.setdefault(id(parameter), nn.Parameter(parameter.data, requires_grad=False))


def memory_notes(rows: Sequence[TensorReport], model: nn.Module | None) -> Iterator[str]:
    """Say where a model with tensors in half precision needs more memory than its file.

    Args:
        rows: of the report.
        model: that runs; None for a plan, which knows no values.
    """
    names = {row.name: row.dtype_after for row in rows if row.action != "shared"}
    count, classes, dtypes = 0, set[str](), set[str]()
    for name, module in model.named_modules() if model is not None else ():
        for own, tensor in own_floats(module).items():
            half = names.get(f"{name}.{own}".lstrip("."))
            if half in _HALVES and tensor.dtype == torch.float32:
                count += tensor.numel()
                dtypes.add(half)
                classes |= {type(module).__name__} if tensor.dim() > 1 else set()
    if classes:
        yield (
            f"in memory {count:,} of the {' and '.join(sorted(dtypes))} values are float32, because "
            f"{', '.join(sorted(classes))} runs in float32"
        )
