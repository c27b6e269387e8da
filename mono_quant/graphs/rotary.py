"""Rotary position embeddings of the kind that turns halves (Llama's `rotate_half`)."""

import operator

import torch
from torch.fx import Graph, Node

from mono_quant import kernels
from mono_quant.graphs.matching import (
    has_one_user,
    is_call,
    is_fusable,
    is_method,
    last_size,
    named,
    pair,
    replace,
    same_size,
    undisturbed,
    value,
)

_TIMES, _PLUS = (operator.mul, torch.mul), (operator.add, torch.add)


def join_rotary(graph: Graph) -> None:
    """Replace q cos + rotate_half(q) sin by `kernels.rotary`."""
    for node in graph.nodes:
        terms = pair(node) if is_call(node, *_PLUS) else None
        if terms is None or not all(is_call(term, *_TIMES) and has_one_user(term) for term in terms):
            continue
        for plain, turned in (terms, terms[::-1]):
            found = _turned(plain, turned)
            if found is not None and is_fusable(node, *found) and undisturbed(min(plain, turned), node):
                replace(node, kernels.rotary, found)
                break


def _turned(plain: Node, turned: Node) -> tuple[Node, Node, Node] | None:
    """Return q and the tables [B or 1, L, D] that it is turned by."""
    left, right = pair(plain), pair(turned)
    for q, cos in (left, left[::-1]) if left else ():
        for half, sin in (right, right[::-1]) if right else ():
            if _is_rotated_half(half, q) and undisturbed(half, plain):
                tables = _table(q, cos, plain), _table(q, sin, turned)
                return None if None in tables else (q, *tables)
    return None


def _is_rotated_half(node: Node, q: Node) -> bool:
    """Say whether a node is (-q2, q1) for the halves q1 and q2 of the last dimension of q."""
    size = last_size(q)
    if not is_call(node, torch.cat) or not has_one_user(node) or size is None or size % 2:
        return False
    given = named(node, ("tensors", "dim"), {"dim": 0})
    if given is None or given["dim"] not in (-1, 3) or len(given["tensors"]) != 2:
        return False
    minus, first = given["tensors"]
    if not is_call(minus, operator.neg, torch.neg) or not undisturbed(node, minus, first):
        return False
    second = minus.args[0]
    half = size // 2
    return _is_slice(first, q, slice(None, half)) and _is_slice(second, q, slice(half, None))


def _is_slice(node: object, q: Node, part: slice) -> bool:
    return isinstance(node, Node) and is_call(node, operator.getitem) and node.args == (q, (Ellipsis, part))


def _table(q: Node, table: Node, user: Node) -> Node | None:
    """Return what a table [B or 1, 1, L, D] was before it got its second dimension; None where it does not fit q [B, H, L, D]."""
    if not is_method(table, "unsqueeze") or table.args[1:] != (1,):
        return None
    source = table.args[0]
    a, b = value(q), value(source)
    if a is None or b is None or (a.dim(), b.dim()) != (4, 3) or not undisturbed(table, user):
        return None
    batch = same_size(b.shape[0], 1) or same_size(a.shape[0], b.shape[0])
    return source if batch and all(map(same_size, a.shape[2:], b.shape[1:])) else None
