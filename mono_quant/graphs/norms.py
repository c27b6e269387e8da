"""Layer norms and RMS norms, as functions of torch or written out."""

import operator
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.nn import functional as F

from mono_quant import kernels
from mono_quant.graphs.matching import (
    has_one_user,
    insert,
    is_call,
    is_cast,
    is_fusable,
    is_method,
    last_size,
    named,
    only_user,
    pair,
    replace,
    same_shape,
    same_size,
    undisturbed,
    value,
)

_TIMES = (operator.mul, torch.mul)


def join_norms(graph: Graph) -> None:
    """Replace every norm over the last dimension of a tensor by `kernels.norm`."""
    for node in graph.nodes:
        if not is_fusable(node):
            continue
        if is_call(node, F.layer_norm, torch.layer_norm):
            _join_layer_norm(node)
        elif is_call(node, F.rms_norm, torch.rms_norm):
            _join_rms_norm(node)
        elif is_call(node, *_TIMES):
            _join_written_out(node)


def norm_of(node: Any) -> tuple[Node, tuple[Any, ...]] | None:
    """Return what a `kernels.norm` is applied to, and the norm; None where the node is another, or adds a residual."""
    return (node.args[0], node.args[1]) if is_call(node, kernels.norm) and len(node.args) == 2 else None


def add_in_norms(graph: Graph) -> None:
    """Let norms that stayed alone make the sum in front of them: both results come from one pass."""
    for node in graph.nodes:
        found = norm_of(node)
        if found is None:
            continue
        total, norm = found
        parts = pair(total) if is_call(total, operator.add, torch.add) else None
        if (
            parts is None
            or not all(same_shape(part, total) for part in parts)
            or not is_fusable(total, *parts)
        ):
            continue
        if not undisturbed(total, node) or any(isinstance(part, Node) and total < part for part in norm):
            continue
        both = replace(total, kernels.norm, (parts[0], norm, parts[1]))
        with graph.inserting_after(both):
            normed, summed = (graph.call_function(operator.getitem, (both, i)) for i in (0, 1))
        normed.meta, summed.meta = dict(node.meta), dict(node.meta)
        both.replace_all_uses_with(summed, delete_user_cb=lambda user, own=(normed, summed): user not in own)
        node.replace_all_uses_with(normed)
        graph.erase_node(node)
        if not summed.users:
            graph.erase_node(summed)
        both.meta = {}


def _join_layer_norm(node: Node) -> None:
    defaults = {"weight": None, "bias": None, "eps": 1e-5}
    given = named(node, ("input", "normalized_shape", *defaults), defaults)
    if given is not None and _is_over_last(given):
        replace(node, kernels.norm, (given["input"], ("layer", given["weight"], given["bias"], given["eps"])))


def _join_rms_norm(node: Node) -> None:
    defaults = {"weight": None, "eps": None}
    given = named(node, ("input", "normalized_shape", *defaults), defaults)
    if given is None or not _is_over_last(given):
        return
    x, weight, eps = given["input"], given["weight"], given["eps"]
    if not is_wide(x):
        # which epsilon is meant is an affair of torch's versions
        if eps is None:
            return
        # torch rounds once, behind the weight
        weight = None if weight is None else insert(node, "float", (weight,))
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    replace(node, kernels.norm, (x, ("rms", weight, None, eps)))


def _is_over_last(given: dict[str, Any]) -> bool:
    shape, floats = given["normalized_shape"], [given.get("weight"), given.get("bias")]
    one = isinstance(shape, tuple | list) and len(shape) == 1 and isinstance(shape[0], int)
    plain = isinstance(given["eps"], float | None)
    return one and plain and is_fusable(given["input"], *(t for t in floats if t is not None))


def _join_written_out(node: Node) -> None:
    """Replace x rsqrt(mean(x^2) + eps), and the weight behind it where there is one."""
    found = _root_mean_square(node)
    if found is None:
        return
    x, eps = found
    end, weight = _end_of_wide(node) if is_wide(x) else _end_of_rounded(node, x)
    if end is not None and undisturbed(node, end):
        replace(end, kernels.norm, (x, ("rms", weight, None, eps)))


def _end_of_wide(node: Node) -> tuple[Node, Node | None]:
    return _weighted(node) or (node, None)


def _end_of_rounded(node: Node, x: Node) -> tuple[Node | None, Node | None]:
    """Return the last node of a norm of half-precision values, and its weight.

    It is applied to values that were rounded already (Llama) or, in fp32, before they are (Gemma).
    """
    weighted = _weighted(node)
    rounded = only_user(node if weighted is None else weighted[0])
    if rounded is None or not is_cast(rounded) or not is_fusable(rounded, x):
        return None, None
    if weighted is not None:
        return rounded, weighted[1]
    return _weighted(rounded) or (rounded, None)


def _weighted(node: Node) -> tuple[Node, Node] | None:
    """Return the product with a weight of each place in the last dimension that alone uses a node, and the weight."""
    user = only_user(node)
    parts = pair(user) if user is not None and is_call(user, *_TIMES) else None
    if user is None or parts is None:
        return None
    weight = parts[1] if parts[0] is node else parts[0]
    seen = value(weight)
    if seen is None or seen.dim() != 1 or not same_size(seen.shape[0], last_size(node)):
        return None
    return (user, weight) if is_fusable(user, node, weight) else None


def _root_mean_square(node: Node) -> tuple[Node, float] | None:
    """Return the values that a node divides by the root of their mean square, in the dtype in which they came, and the epsilon."""
    if not is_wide(node):
        return None
    for x, root in filter(None, (pair(node), (pair(node) or ())[::-1])):
        if not (is_call(root, torch.rsqrt) or is_method(root, "rsqrt")) or not has_one_user(root):
            continue
        shifted = root.args[0]
        if (
            not is_call(shifted, operator.add, torch.add)
            or len(shifted.args) != 2
            or not has_one_user(shifted)
        ):
            continue
        mean, eps = shifted.args if isinstance(shifted.args[1], float) else shifted.args[::-1]
        square = _square_under(mean)
        if not isinstance(eps, float) or square is None or not is_wide(square.args[0]):
            continue
        source = _unwidened(x)
        if source is _unwidened(square.args[0]) and is_fusable(source):
            casts = {one for one in (x, square.args[0]) if one is not source}
            if undisturbed(node, square, *casts):
                return source, eps
    return None


def is_wide(node: Any) -> bool:
    """Say whether a node is an fp32 tensor."""
    seen = value(node)
    return seen is not None and seen.dtype == torch.float32


def _unwidened(node: Any) -> Any:
    """Return the half-precision values that a node is in fp32, where fused calls take those; else the node."""
    source = node.args[0] if is_cast(node) and is_wide(node) else None
    return source if isinstance(source, Node) and is_fusable(source) else node


def _square_under(mean: Any) -> Node | None:
    """Return the squares that a node is the mean of, along the last dimension."""
    if not (is_method(mean, "mean") or is_call(mean, torch.mean)) or not has_one_user(mean):
        return None
    given = named(mean, ("input", "dim", "keepdim"), {"keepdim": False})
    if given is None or given["dim"] not in (-1, (-1,), [-1]) or given["keepdim"] is not True:
        return None
    square = given["input"]
    if not isinstance(square, Node) or not has_one_user(square):
        return None
    power = is_method(square, "pow") or is_call(square, torch.pow, operator.pow)
    plain = (power and square.args[1:] == (2,)) or (is_method(square, "square") and len(square.args) == 1)
    return square if plain and not square.kwargs else None
