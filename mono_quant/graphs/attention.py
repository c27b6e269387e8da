"""Attention: `scaled_dot_product_attention`, and keys and values that are repeated in front of it."""

import operator
from typing import Any

from torch.fx import Graph, Node
from torch.nn import functional as F

from mono_quant import kernels
from mono_quant.graphs.layouts import keeps_heads_apart
from mono_quant.graphs.matching import (
    is_call,
    is_fusable,
    is_method,
    named,
    replace,
    same_size,
    undisturbed,
    value,
)

_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}


def join_attention(graph: Graph) -> None:
    """Replace attention over fp32 tensors by `kernels.attention`, which repeats keys and values by itself."""
    for node in graph.nodes:
        if is_call(node, *kernels.ATTENTION_OPS):
            _call_directly(node)
        if not is_call(node, F.scaled_dot_product_attention):
            continue
        given = named(node, ("query", "key", "value", *_DEFAULTS), _DEFAULTS)
        if given is None or not _is_ours(node, given):
            continue
        q, k, v = given["query"], given["key"], given["value"]
        if not given["enable_gqa"]:
            k, v = _unrepeated(k, node), _unrepeated(v, node)
        # one way for both, as heads are counted on the keys
        if not _same_heads(k, v):
            k, v = given["key"], given["value"]
        mask = given["attn_mask"]
        how = {
            name: given[key]
            for name, key in (("causal", "is_causal"), ("scale", "scale"))
            if given[key] is not False and given[key] is not None
        }
        made = replace(node, kernels.attention, (q, k, v) if mask is None else (q, k, v, mask), how)
        if not keeps_heads_apart(made):
            _lie_as_captured(made)


def _lie_as_captured(node: Node) -> None:
    """Let the result lie in memory head by head, as torch's does where it has no kernel of its own."""
    with node.graph.inserting_after(node):
        plain = node.graph.call_method("contiguous", (node,))
    plain.meta = dict(node.meta)
    node.replace_all_uses_with(plain, delete_user_cb=lambda user: user is not plain)


def _call_directly(node: Node) -> None:
    """Call our attention, which eager code of transformers has already, as that does: not through an op."""
    given = named(node, ("q", "k", "v", "mask", "causal", "scale", "window"), {})
    if given is not None:
        how = {
            name: given[name]
            for name in ("causal", "scale", "window")
            if given[name] is not False and given[name] is not None
        }
        masked = () if given["mask"] is None else (given["mask"],)
        replace(node, kernels.attention, (given["q"], given["k"], given["v"], *masked), how)


def _is_ours(node: Node, given: dict[str, Any]) -> bool:
    q, k, v = given["query"], given["key"], given["value"]
    if not is_fusable(node, q, k, v) or not all(_dims(t) == 4 for t in (q, k, v)):
        return False
    if (
        given["dropout_p"] != 0.0
        or isinstance(given["scale"], Node)
        or not isinstance(given["is_causal"], bool)
    ):
        return False
    # a causal mask of torch starts at the first key, whatever their number
    return not given["is_causal"] or same_size(_size(q, 2), _size(k, 2))


def _dims(node: Any) -> int | None:
    seen = value(node)
    return None if seen is None else seen.dim()


def _size(node: Node, dim: int) -> Any:
    seen = value(node)
    return None if seen is None else seen.shape[dim]


def _same_heads(k: Node, v: Node) -> bool:
    return same_size(_size(k, 1), _size(v, 1))


def _unrepeated(node: Node, user: Node) -> Node:
    """Return keys or values [B, Hkv, S, D] before each head was repeated (`repeat_kv`); the node itself where none was."""
    expanded = node.args[0] if is_method(node, "reshape") else None
    inserted = expanded.args[0] if isinstance(expanded, Node) and is_method(expanded, "expand") else None
    if not isinstance(inserted, Node) or not is_call(inserted, operator.getitem):
        return node
    source, index = inserted.args
    everything = slice(None)
    if index not in ((everything,) * 2 + (None,) + (everything,) * 2, (everything,) * 2 + (None,)):
        return node
    a, b, c = value(source), value(expanded), value(node)
    if (
        not isinstance(source, Node)
        or a is None
        or b is None
        or c is None
        or (a.dim(), b.dim(), c.dim()) != (4, 5, 4)
    ):
        return node
    heads = same_size(c.shape[1], a.shape[1] * b.shape[2])
    others = all(
        same_size(a.shape[i], b.shape[j]) and same_size(a.shape[i], c.shape[i])
        for i, j in ((0, 0), (2, 3), (3, 4))
    )
    return (
        source
        if heads and others and same_size(a.shape[1], b.shape[1]) and undisturbed(inserted, user)
        else node
    )
