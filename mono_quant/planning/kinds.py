"""What kind of layer a module is, which of its parameters become int8, and why it cannot be replaced."""

import inspect
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from mono_quant.planning.rules import MIN_ROW

_CELL = ("weight_ih", "weight_hh")
# The float parameters that become int8, by kind of layer; those of stacked recurrent layers depend on the module.
_WEIGHTS: Mapping[str, tuple[str, ...]] = {
    "linear": ("weight",),
    "transposed_linear": ("weight",),
    "conv1d": ("weight",),
    "conv2d": ("weight",),
    "embedding": ("weight",),
    "experts": ("gate_up_proj", "down_proj"),
    "attention": ("in_proj_weight", "out_proj.weight"),
    "lstm_cell": _CELL,
    "gru_cell": _CELL,
    "rnn_cell": _CELL,
}

# What compressed-tensors can hold; vLLM the first two alone.
PORTABLE_KINDS = frozenset({"linear", "experts", "embedding"})
RECURRENT_KINDS = frozenset({"lstm", "gru", "rnn", "lstm_cell", "gru_cell", "rnn_cell"})

_KINDS: Mapping[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Embedding: "embedding",
    nn.MultiheadAttention: "attention",
    nn.LSTM: "lstm",
    nn.GRU: "gru",
    nn.RNN: "rnn",
    nn.LSTMCell: "lstm_cell",
    nn.GRUCell: "gru_cell",
    nn.RNNCell: "rnn_cell",
}
# What a float layer of each kind holds beside its weights; anything else would be lost with it.
_BESIDE: Mapping[str, frozenset[str]] = {
    "attention": frozenset({"in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj"}),
    "embedding": frozenset(),
    "experts": frozenset({"act_fn"}),
}
_FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64})


def kind_of(module: nn.Module) -> str:
    """Return the kind of layer `module` is, or an empty string.

    Subclasses do not count, except those of transformers that compute exactly what `nn.Linear` does (Falcon's).
    """
    if type(module) in _KINDS:
        return _KINDS[type(module)]
    if _computes_linear(type(module)):
        return "linear"
    # by name: transformers is not imported for models that do not come from it
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return "transposed_linear"
    return "experts" if _is_fused_experts(module) else ""


def weights_of(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the float parameters of a layer that become int8; none for a module of no known kind.

    A recurrent layer keeps matrices with short rows in float (few input features), where it has longer ones.
    """
    return _weights_as(module, kind_of(module))


def _weights_as(module: nn.Module, kind: str) -> tuple[str, ...]:
    if kind not in RECURRENT_KINDS:
        return _WEIGHTS.get(kind, ())
    names = tuple(name for name in recurrent_parameters(module) if name.startswith("weight"))
    # a matrix that is computed may not be there yet
    short = {name for name in names if hasattr(module, name) and getattr(module, name).shape[-1] < MIN_ROW}
    return tuple(name for name in names if name not in short) or names


def recurrent_parameters(module: nn.Module) -> tuple[str, ...]:
    """Return the names of all parameters of a recurrent layer, in its order."""
    return (
        tuple(module._flat_weights_names)
        if isinstance(module, nn.RNNBase)
        else (*_CELL, "bias_ih", "bias_hh")
    )


def matrices(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the module's own parameters that are more than a vector."""
    for parameter in module.parameters(recurse=False):
        if (
            isinstance(parameter, nn.parameter.UninitializedParameter)
            or parameter.dim() >= 2
            and parameter.numel() > max(parameter.shape)
        ):
            yield parameter


def rows_of(shape: torch.Size, kind: str) -> torch.Size:
    """Return the shape of the rows of a weight: each row holds the inputs of one output channel and has one scale."""
    if kind == "transposed_linear":
        return shape[1:]
    return shape[:-1] if kind == "experts" else shape[:1]


def as_rows(weight: Tensor, kind: str) -> Tensor:
    """Return a weight as a matrix [N, K] of its rows, a view where its memory allows."""
    if kind == "transposed_linear":
        return weight.t()
    return weight.flatten(0, 1) if kind == "experts" else weight.flatten(1)


def from_rows(matrix: Tensor, shape: torch.Size | tuple[int, ...], kind: str) -> Tensor:
    """Return the weight of `shape` that a matrix [N, K] of its rows stands for."""
    return matrix.t() if kind == "transposed_linear" else matrix.view(shape)


def flattened(weight: Tensor, kind: str) -> Tensor:
    """Return the values of a weight in one dimension, row after row; a view where its memory allows."""
    return as_rows(weight, kind).reshape(-1)


def unflattened(flat: Tensor, shape: torch.Size | tuple[int, ...], kind: str) -> Tensor:
    """Return the weight of `shape` that `flattened` made flat."""
    return from_rows(flat.view(rows_of(torch.Size(shape), kind).numel(), -1), shape, kind)


def matrix_shape(module: nn.Module, kind: str) -> tuple[int, int]:
    """Return how many rows the weights of a layer have together, and the length of the longest."""
    # not `get_parameter`: the weight of a normed or pruned layer is an attribute
    shapes = [getattr(module, name).shape for name in _weights_as(module, kind) if hasattr(module, name)]
    # of experts, rows of gate_up have H values, rows of down have I: count them as rows of the longer kind
    depth = max((shape.numel() // rows_of(shape, kind).numel() for shape in shapes), default=1)
    return sum(shape.numel() for shape in shapes) // depth, depth


def obstacle(module: nn.Module, kind: str) -> str:
    """Return why a layer of a known kind cannot be replaced; empty when it can."""
    if isinstance(module, nn.MultiheadAttention):
        return _attention_problem(module) or _hanging(module, kind)
    names = recurrent_parameters(module) if kind in RECURRENT_KINDS else _weights_as(module, kind)
    if any(name not in module._parameters for name in names):
        return "its weight is computed at every forward (weight norm or similar)"
    weights = [module._parameters[name] for name in names]
    held = [id(w) for w in weights if w is not None]
    if len(held) > len(set(held)):
        return "two of its weights are one tensor"
    dtypes = {w.dtype for w in weights if w is not None}
    if not dtypes <= _FLOATS:
        return f"its weight is {', '.join(sorted(str(d) for d in dtypes - _FLOATS))}, not a float matrix"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "its forward renormalises the table (max_norm)"
    return _hanging(module, kind)


def _hanging(module: nn.Module, kind: str) -> str:
    """Return what of a layer would vanish with it; plain attributes and hooks go over to the new one."""
    registered = module._parameters.keys() | module._buffers.keys() | module._modules.keys()
    is_recurrent = kind in RECURRENT_KINDS
    beside = frozenset(recurrent_parameters(module)) if is_recurrent else _BESIDE.get(kind, {"bias"})
    extra = sorted(registered - beside - set(_weights_as(module, kind)))
    if extra:
        return f"it has parameters, buffers or modules of its own ({', '.join(extra)})"
    attributes = vars(module).keys()
    # a recurrent layer has a flag of that name
    if not is_recurrent and not attributes.isdisjoint({"bias", "in_proj_bias"}):
        return "its bias is no parameter: it is fixed, or computed at every forward"
    shadows = sorted(n for n in attributes if callable(getattr(type(module), n, None)))
    if shadows:
        return f"it has a {' and a '.join(shadows)} of its own, in place of what its class does"
    return ""


def _attention_problem(module: nn.MultiheadAttention) -> str:
    if not module._qkv_same_embed_dim:
        return "attention with different key or value sizes"
    if module.bias_k is not None or module.add_zero_attn:
        return "attention with bias_k, bias_v or add_zero_attn"
    if "in_proj_weight" not in module._parameters:
        return "its weight is computed at every forward (weight norm or similar)"
    if parametrize.is_parametrized(module) or parametrize.is_parametrized(module.out_proj):
        return "parametrized: its weight is computed at every forward"
    return _projection_problem(module.out_proj)


def _projection_problem(projection: nn.Module) -> str:
    if type(projection) not in (nn.Linear, NonDynamicallyQuantizableLinear):
        return f"its out_proj is a {type(projection).__name__} and may compute something else"
    problem = obstacle(projection, "linear")
    return f"its out_proj: {problem}" if problem else ""


def foreign_reason(module: nn.Module) -> str:
    cls = type(module).__name__
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return f"{cls} has no weights yet: run the model once first"
    if parametrize.is_parametrized(module) or isinstance(module, parametrize.ParametrizationList):
        return "parametrized: its weight is computed at every forward"
    for base in _KINDS:
        if isinstance(module, base):
            return f"{cls} is a subclass of {base.__name__} and may compute something else"
    if hasattr(module, "gate_up_proj") and hasattr(module, "down_proj"):
        return f"{cls}: experts of a layout that is not known here"
    return f"no int8 form of {cls}"


def _product_and_bias(self: nn.Linear, input: Tensor) -> Tensor:
    hidden_states = input @ self.weight.T
    if self.bias is None:
        return hidden_states
    return hidden_states + self.bias


def _computes_linear(cls: type[nn.Module]) -> bool:
    """True for a transformers class that adds to `nn.Linear` only a `forward` of the same meaning."""
    if cls.__bases__ != (nn.Linear,) or not cls.__module__.startswith("transformers."):
        return False
    own = {name for name, value in vars(cls).items() if callable(value) or isinstance(value, property)}
    return own == {"forward"} and _code(cls.forward) == _code(_product_and_bias)


def _is_fused_experts(module: nn.Module) -> bool:
    """True for experts that compute exactly what transformers' `MixtralExperts` does.

    The layout cannot be told from the shapes alone (gpt_oss is transposed, others clamp or interleave), so the code of
    `forward` has to be the same.
    """
    parameters = dict(module.named_parameters(recurse=False))
    if parameters.keys() != {"gate_up_proj", "down_proj"} or any(p.dim() != 3 for p in parameters.values()):
        return False
    if not type(module).__module__.startswith("transformers."):
        return False
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    own_gate = getattr(type(module), "_apply_gate", None)
    return (
        own_gate is getattr(MixtralExperts, "_apply_gate", None)
        and not getattr(module, "is_transposed", False)
        and getattr(module, "is_concatenated", True)
        and _code(type(module).forward) == _code(MixtralExperts.forward)
    )


def _code(function: Callable[..., object]) -> tuple[object, ...]:
    code = inspect.unwrap(function).__code__
    return (code.co_code, code.co_names, tuple(c for c in code.co_consts if not isinstance(c, str)))
