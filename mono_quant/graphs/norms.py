"""Layer norms and RMS norms, as functions of torch or written out."""

import operator
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.nn import functional as F

from mono_quant import kernels
from mono_quant.graphs.matching import (
    has_one_user,
    is_call,
    is_float32,
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
    """Replace every norm over the last dimension of an fp32 tensor by `kernels.norm`."""
    for node in graph.nodes:
        if not is_float32(node):
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
            or not is_float32(total, *parts)
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
    if given is not None and _is_over_last(given):
        eps = torch.finfo(torch.float32).eps if given["eps"] is None else given["eps"]
        replace(node, kernels.norm, (given["input"], ("rms", given["weight"], None, eps)))


def _is_over_last(given: dict[str, Any]) -> bool:
    shape, floats = given["normalized_shape"], [given.get("weight"), given.get("bias")]
    one = isinstance(shape, tuple | list) and len(shape) == 1 and isinstance(shape[0], int)
    plain = isinstance(given["eps"], float | None)
    return one and plain and is_float32(given["input"], *(t for t in floats if t is not None))


def _join_written_out(node: Node) -> None:
    """Replace x rsqrt(mean(x^2) + eps), and the weight behind it where there is one."""
    found = _root_mean_square(node)
    if found is None:
        return
    x, eps = found
    user = only_user(node)
    if user is not None and is_call(user, *_TIMES) and is_float32(user):
        parts = pair(user)
        weight = None if parts is None else parts[1] if parts[0] is node else parts[0]
        seen = value(weight)
        if (
            seen is not None
            and seen.dim() == 1
            and same_size(seen.shape[0], last_size(x))
            and is_float32(weight)
        ):
            if undisturbed(node, user):
                replace(user, kernels.norm, (x, ("rms", weight, None, eps)))
            return
    replace(node, kernels.norm, (x, ("rms", None, None, eps)))


def _root_mean_square(node: Node) -> tuple[Node, float] | None:
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
        if (
            isinstance(eps, float)
            and _is_mean_of_squares(mean, x)
            and is_float32(x)
            and undisturbed(node, mean)
        ):
            return x, eps
    return None


def _is_mean_of_squares(mean: Any, x: Node) -> bool:
    if not (is_method(mean, "mean") or is_call(mean, torch.mean)) or not has_one_user(mean):
        return False
    given = named(mean, ("input", "dim", "keepdim"), {"keepdim": False})
    if given is None or given["dim"] not in (-1, (-1,), [-1]) or given["keepdim"] is not True:
        return False
    square = given["input"]
    if not isinstance(square, Node) or not has_one_user(square) or not undisturbed(square, mean):
        return False
    power = is_method(square, "pow") or is_call(square, torch.pow, operator.pow)
    return (power and square.args == (x, 2)) or (is_method(square, "square") and square.args == (x,))
