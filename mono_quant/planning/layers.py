"""Finding the layers of a model: what kind each is, how large, and which default rules apply to it.

Works on real and on meta modules alike, so that a plan and a conversion see the same layers.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import replace

import torch
from torch import nn

from mono_quant.kernels import MAX_IN_FEATURES
from mono_quant.planning.kinds import (
    PORTABLE_KINDS,
    RECURRENT_KINDS,
    foreign_reason,
    kind_of,
    matrices,
    matrix_shape,
    obstacle,
    weights_of,
)
from mono_quant.planning.rules import Layer
from mono_quant.planning.walk import (
    below,
    is_diffusers_model,
    is_transformers_model,
    module_aliases,
    owners_of,
    tensor_names,
)

# What a model made of portable layers holds beside them, and can keep in float at a small price.
_COSTLY_KINDS = frozenset({"conv1d", "conv2d", "attention"}) | RECURRENT_KINDS
# Where a transformers model lists what needs float32: against float16 alone, and against any other dtype.
DECLARATIONS = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
_HEADS = frozenset({
    "lm_head",
    "classifier",
    "score",
    "qa_outputs",
    "proj_out",
    # of DiT, behind the one that makes scales and shifts
    "proj_out_2",
    "classification_head",
})
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})


def find_layers(model: nn.Module, within: str = "") -> list[Layer]:
    """Return every layer of `model` that holds a weight matrix, in module order.

    Args:
        model: any module, on any device, meta included.
        within: name of the part that is to be converted; layers outside are marked as unsupported, and come last.
    """
    if not within:
        return _layers_of(model)
    inside = [replace(x, name=f"{within}.{x.name}") for x in _layers_of(model.get_submodule(within))]
    outside = [
        replace(x, unsupported=f"outside the transformer of the {type(model).__name__}")
        for x in _layers_of(model)
        if not below(x.name, within)
    ]
    return inside + outside


def _layers_of(model: nn.Module) -> list[Layer]:
    aliases = module_aliases(model)
    owners = owners_of(model)
    declared = declared_float32(model)
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
            own, names = dict(module.named_parameters()), weights_of(module)
            weights = [own[w] for w in names if w in own] or list(matrices(module))
            tied = any(len(owners[id(p)]) > 1 for p in weights)
            rules = _router_rule(name, module) | ({"tied"} if tied else set())
            rules |= {"keep_in_fp32"} if _holds_any(name, module, declared) else set()
            rules |= {"embedding"} if kind == "embedding" else set()
            layers.append(
                replace(layer, defaults=frozenset(rules), aliases=aliases[id(module)], matrices=names)
            )
    return _with_portable_rule(model, _with_heads(model, layers))


def _layer(name: str, module: nn.Module, kind: str) -> Layer | None:
    found = list(matrices(module))
    cls = type(module).__name__
    if isinstance(module, nn.MultiheadAttention) and kind:
        size = module.embed_dim
        return Layer(name, kind, cls, 4 * size, size, unsupported=obstacle(module, kind))
    if not found:
        return None
    if not kind:
        lazy = any(isinstance(p, nn.parameter.UninitializedParameter) for p in found)
        total = 0 if lazy else sum(p.numel() for p in found)
        return Layer(name, cls, cls, 1, total, unsupported=foreign_reason(module))
    rows, depth = matrix_shape(module, kind)
    problem = obstacle(module, kind)
    if not problem and depth > MAX_IN_FEATURES:
        problem = f"{depth} inputs: an int32 sum could overflow above {MAX_IN_FEATURES}"
    return Layer(name, kind, cls, rows, depth, unsupported=problem)


def _router_rule(name: str, module: nn.Module) -> set[str]:
    # the matrix may lie inside the router: router.proj (Gemma 4), router.layer (JetMoe), gate.wg (HunYuan)
    is_router = not _ROUTERS.isdisjoint(name.split(".")[-2:]) or "Router" in type(module).__name__
    return {"router"} if is_router else set()


def _holds_any(name: str, module: nn.Module, declared: Collection[str]) -> bool:
    weights = weights_of(module) or [own for own, _ in module.named_parameters(recurse=False)]
    return any(f"{name}.{weight}".lstrip(".") in declared for weight in weights)


def declared_float32(model: nn.Module, dtype: torch.dtype | None = None) -> set[str]:
    """Return the names of the float tensors that a transformers model, or one inside, declares to need float32.

    A declaration is an expression that transformers looks for anywhere in the name of a parameter or buffer.

    Args:
        model: any module, meta included.
        dtype: what transformers would load it in: for float16 every declaration counts, for bfloat16 the strict ones, for
            others none. All count when it is None.
    """
    found = set()
    for prefix, expression in _declarations(model, dtype):
        for name, tensor, _ in tensor_names(model.get_submodule(prefix)):
            if tensor.is_floating_point() and expression.search(name):
                found.add(f"{prefix}.{name}".lstrip("."))
    return found


def _declarations(model: nn.Module, dtype: torch.dtype | None) -> Iterator[tuple[str, re.Pattern[str]]]:
    """Yield the name of each outermost module that declares something with the expression for names inside it."""
    covered: list[str] = []
    in_force = {torch.float16: DECLARATIONS, torch.bfloat16: DECLARATIONS[1:], None: DECLARATIONS}
    for prefix, module in model.named_modules():
        names = {
            name for attribute in in_force.get(dtype, ()) for name in getattr(module, attribute, None) or ()
        }
        # a model has taken over the declarations of those inside it
        if names and not any(below(prefix, outer) for outer in covered):
            covered.append(prefix)
            yield prefix, re.compile("|".join(_expression(module, name) for name in sorted(names)))


def _expression(module: nn.Module, name: str) -> str:
    # diffusers names a part of the dotted name, transformers anything in it
    return rf"(^|\.){re.escape(name)}(\.|$)" if is_diffusers_model(module) else f"({name.replace('*', '.*')})"


def _with_heads(model: nn.Module, layers: list[Layer]) -> list[Layer]:
    """Mark the output embeddings, and the last layer below every name that heads have."""
    heads = {name for name, module in model.named_modules() if _is_output(model, module)}
    last = {_head_of(layer.name): layer.name for layer in layers}
    last.pop((), None)
    heads |= set(last.values())
    return [replace(x, defaults=x.defaults | {"head"}) if x.name in heads else x for x in layers]


def _head_of(name: str) -> tuple[str, ...]:
    """Return the name of the head that a layer belongs to; empty when it is in none.

    What has the name of a head inside a numbered block (the `proj_out` of an attention) is one of many steps on the way.
    """
    parts = name.split(".")
    # the number of a part of an `nn.Sequential` that is the whole model is no block's: its last part makes the output
    inner = parts[1:] if parts[0].isdigit() else parts
    for i, part in enumerate(inner):
        pooled = part == "pooler" and inner[i + 1 :] == ["dense"]
        if part in _HEADS or pooled or (part == "head" and parts[0] == part):
            return tuple(inner[: i + 1])
        if part.isdigit():
            break
    return ()


def _is_output(model: nn.Module, module: nn.Module) -> bool:
    get = getattr(model, "get_output_embeddings", None) if is_transformers_model(model) else None
    return get is not None and get() is module


def _with_portable_rule(model: nn.Module, layers: list[Layer]) -> list[Layer]:
    """In a transformers model made of linear layers, convolutions, `nn.MultiheadAttention` and recurrent layers would cost the standard format."""
    if not is_transformers_model(model):
        return layers
    kinds: dict[str, int] = defaultdict(int)
    for layer in layers:
        kinds[layer.kind] += 0 if layer.unsupported else layer.weights
    # a table stays in float unless it is asked for, so it says nothing of what the layers are
    portable = sum(kinds[kind] for kind in PORTABLE_KINDS - {"embedding"})
    costly = sum(kinds[kind] for kind in _COSTLY_KINDS)
    if kinds["transposed_linear"] or costly >= portable:
        return layers
    return [replace(x, defaults=x.defaults | {"portable"}) if x.kind in _COSTLY_KINDS else x for x in layers]
