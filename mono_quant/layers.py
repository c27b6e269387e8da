"""Finding the layers of a model: what kind each is, how large, and which default rules apply to it.

Works on real and on meta modules alike, so that a plan and a conversion see the same layers.
"""

import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mono_quant.kernels import MAX_IN_FEATURES
from mono_quant.selection import Layer

# The float parameters that become int8, by kind of layer.
WEIGHTS: Mapping[str, tuple[str, ...]] = {
    "linear": ("weight",),
    "transposed_linear": ("weight",),
    "conv1d": ("weight",),
    "conv2d": ("weight",),
    "embedding": ("weight",),
    "experts": ("gate_up_proj", "down_proj"),
    "attention": ("in_proj_weight", "out_proj.weight"),
}

# What compressed-tensors and vLLM can hold.
PORTABLE_KINDS = frozenset({"linear", "experts"})
# What a model made of portable layers holds beside them, and can keep in float at a small price.
_COSTLY_KINDS = ("conv1d", "conv2d", "attention")

_KINDS: Mapping[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Embedding: "embedding",
    nn.MultiheadAttention: "attention",
}
_HEADS = frozenset({"lm_head", "classifier", "score", "qa_outputs", "proj_out", "classification_head"})
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
_FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64})


def find_layers(model: nn.Module) -> list[Layer]:
    """Return every layer of `model` that holds a weight matrix, in module order.

    Args:
        model: any module, on any device, meta included.
    """
    aliases = module_aliases(model)
    owners = _owners(model)
    covered: set[str] = set()
    layers = []
    for name, module in model.named_modules():
        if name in covered:
            continue
        kind = kind_of(module)
        if kind == "attention":
            covered.add(f"{name}.out_proj" if name else "out_proj")
        layer = _layer(name, module, kind)
        if layer is not None:
            own = dict(module.named_parameters())
            weights = [own[w] for w in WEIGHTS.get(kind, ()) if w in own] or list(_matrices(module))
            tied = any(len(owners[id(p)]) > 1 for p in weights)
            rules = _router_rule(name, module) | _fp32_rule(model, name) | ({"tied"} if tied else set())
            rules |= {"embedding"} if kind == "embedding" else set()
            layers.append(replace(layer, defaults=frozenset(rules), aliases=aliases[id(module)]))
    return _with_portable_rule(model, _with_heads(model, layers))


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


def weight_owners(model: nn.Module) -> dict[str, str]:
    """Return for every float parameter that could be int8 the name of its layer."""
    return {
        f"{name}.{weight}".lstrip("."): name
        for name, module in model.named_modules()
        for weight in WEIGHTS.get(kind_of(module), ())
    }


def is_transformers_model(model: nn.Module) -> bool:
    """True for a transformers `PreTrainedModel`, without importing transformers."""
    return any(
        c.__name__ == "PreTrainedModel" and c.__module__.startswith("transformers.")
        for c in type(model).mro()
    )


def _layer(name: str, module: nn.Module, kind: str) -> Layer | None:
    matrices = list(_matrices(module))
    cls = type(module).__name__
    if isinstance(module, nn.MultiheadAttention) and kind:
        size = module.embed_dim
        return Layer(name, kind, cls, 4 * size, size, unsupported=obstacle(module, kind))
    if not matrices:
        return None
    if not kind:
        lazy = any(isinstance(p, nn.parameter.UninitializedParameter) for p in matrices)
        total = 0 if lazy else sum(p.numel() for p in matrices)
        return Layer(name, cls, cls, 1, total, unsupported=_foreign_reason(module))
    rows, depth = _matrix_shape(module, kind)
    problem = obstacle(module, kind)
    if not problem and depth > MAX_IN_FEATURES:
        problem = f"{depth} inputs: an int32 sum could overflow above {MAX_IN_FEATURES}"
    return Layer(name, kind, cls, rows, depth, unsupported=problem)


def _matrices(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the module's own parameters that are more than a vector."""
    for parameter in module.parameters(recurse=False):
        if (
            isinstance(parameter, nn.parameter.UninitializedParameter)
            or parameter.dim() >= 2
            and parameter.numel() > max(parameter.shape)
        ):
            yield parameter


def _matrix_shape(module: nn.Module, kind: str) -> tuple[int, int]:
    if kind == "experts":
        shapes = [p.shape for p in module.parameters(recurse=False)]
        # rows of gate_up have H values, rows of down have I: count them as rows of the longer kind
        depth = max(shape[-1] for shape in shapes)
        return sum(shape.numel() for shape in shapes) // depth, depth
    weight = module.weight
    assert isinstance(weight, Tensor)
    if kind == "transposed_linear":
        return weight.shape[1], weight.shape[0]
    return weight.shape[0], weight[0].numel()


def obstacle(module: nn.Module, kind: str) -> str:
    """Return why a layer of a known kind cannot be replaced; empty when it can."""
    if isinstance(module, nn.MultiheadAttention):
        return _attention_problem(module)
    if any(name not in module._parameters for name in WEIGHTS[kind]):
        return "its weight is computed at every forward (weight norm or similar)"
    weights = [module._parameters[name] for name in WEIGHTS[kind]]
    dtypes = {w.dtype for w in weights if w is not None}
    if not dtypes <= _FLOATS:
        return f"its weight is {', '.join(sorted(str(d) for d in dtypes - _FLOATS))}, not a float matrix"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "its forward renormalises the table (max_norm)"
    return ""


def _attention_problem(module: nn.MultiheadAttention) -> str:
    if not module._qkv_same_embed_dim:
        return "attention with different key or value sizes"
    if module.bias_k is not None or module.add_zero_attn:
        return "attention with bias_k, bias_v or add_zero_attn"
    if parametrize.is_parametrized(module) or parametrize.is_parametrized(module.out_proj):
        return "parametrized: its weight is computed at every forward"
    return ""


def _foreign_reason(module: nn.Module) -> str:
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


def own_floats(module: nn.Module) -> dict[str, Tensor]:
    """Return the float parameters and saved float buffers that a module itself owns."""
    own = {n: p for n, p in module.named_parameters(recurse=False) if p.is_floating_point()}
    skip = module._non_persistent_buffers_set
    return own | {
        n: b for n, b in module.named_buffers(recurse=False) if b.is_floating_point() and n not in skip
    }


def below(name: str, within: str) -> bool:
    """Tell whether a module lies in the part of a model that is called `within`; everything does when that is empty."""
    return not within or name == within or name.startswith(f"{within}.")


def module_aliases(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """Return by id of a module the other names it has."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[id(module)].append(name)
    return defaultdict(tuple, {key: tuple(found[1:]) for key, found in names.items()})


def _owners(model: nn.Module) -> dict[int, set[int]]:
    owners: dict[int, set[int]] = defaultdict(set)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].add(id(module))
    return owners


def _router_rule(name: str, module: nn.Module) -> set[str]:
    # the matrix may lie inside the router: router.proj (Gemma 4), router.layer (JetMoe), gate.wg (HunYuan)
    is_router = not _ROUTERS.isdisjoint(name.split(".")[-2:]) or "Router" in type(module).__name__
    return {"router"} if is_router else set()


def _fp32_rule(model: nn.Module, name: str) -> set[str]:
    return {"keep_in_fp32"} if any(p.search(name) for p in fp32_patterns(model)) else set()


def fp32_patterns(model: nn.Module) -> list[re.Pattern[str]]:
    """Return expressions for the module names that a transformers model keeps in float32."""
    names: set[str] = set()
    for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        names |= set(getattr(model, attribute, None) or ())
    return [re.compile(rf"(^|\.){n.replace('*', '.*')}($|\.)") for n in sorted(names)]


def _with_heads(model: nn.Module, layers: list[Layer]) -> list[Layer]:
    """Mark the output embeddings, and the last layer below every name that heads have."""
    heads = {name for name, module in model.named_modules() if _is_output(model, module)}
    last: dict[tuple[str, ...], str] = {}
    for layer in layers:
        parts = layer.name.split(".")
        for i, part in enumerate(parts):
            pooled = part == "pooler" and parts[i + 1 :] == ["dense"]
            if part in _HEADS or pooled or (part == "head" and i == 0):
                last[tuple(parts[: i + 1])] = layer.name
                break
    heads |= set(last.values())
    return [replace(x, defaults=x.defaults | {"head"}) if x.name in heads else x for x in layers]


def _is_output(model: nn.Module, module: nn.Module) -> bool:
    get = getattr(model, "get_output_embeddings", None) if is_transformers_model(model) else None
    return get is not None and get() is module


def _with_portable_rule(model: nn.Module, layers: list[Layer]) -> list[Layer]:
    """In a transformers model made of linear layers, convolutions and `nn.MultiheadAttention` would cost the standard format."""
    if not is_transformers_model(model):
        return layers
    kinds: dict[str, int] = defaultdict(int)
    for layer in layers:
        kinds[layer.kind] += 0 if layer.unsupported else layer.weights
    portable = sum(kinds[kind] for kind in PORTABLE_KINDS)
    costly = sum(kinds[kind] for kind in _COSTLY_KINDS)
    if kinds["transposed_linear"] or costly >= portable:
        return layers
    return [replace(x, defaults=x.defaults | {"portable"}) if x.kind in _COSTLY_KINDS else x for x in layers]


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


def tensor_names(model: nn.Module) -> Iterable[tuple[str, Tensor, bool]]:
    """Yield (name, tensor, is_buffer) for every parameter and persistent buffer, shared ones under every name."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield dot + name, parameter, False
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield dot + name, buffer, True
