"""Int8 linear layers on a device, with what makes their codes: a sum and a norm, an activation, a gate.

Values that become codes in the kernel that computes them are read once. What is behind a product stays where it is, because the
compiler fuses it with its own surroundings: a sum belongs to the norm that reads it, and is left for others where they need it.
"""

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from mono_quant import kernels
from mono_quant.graphs.matching import (
    insert,
    is_call,
    is_fusable,
    pair,
    replace,
    same_shape,
    undisturbed,
)
from mono_quant.graphs.norms import norm_of
from mono_quant.graphs.products import (
    call_alone,
    join_activation,
    join_gate,
    join_parallel,
    join_second,
    start,
)

_PLUS = (operator.add, torch.add)


def join_prologues(graph: Graph) -> None:
    """Replace int8 linear layers on a device, and what makes their inputs, by chains."""
    for step in (start, join_gate, join_activation, join_second, join_parallel, _join_norm):
        for node in graph.nodes:
            step(node)
    call_alone(graph)


def _join_norm(node: Node) -> None:
    """Join a chain with the norm in front of it, and the sum in front of that."""
    found = norm_of(node.args[0]) if is_call(node, kernels.chain, kernels.chain_parts) else None
    if found is None:
        return
    normed: Any = node.args[0]
    x, norm = found
    if not undisturbed(normed, node) or not _others_are_later(normed, normed, node):
        return
    terms = _terms(x, normed, node)
    keep = [
        name
        for name, made, user in (("sum", x if terms else None, normed), ("normed", normed, node))
        if made is not None and any(other is not user for other in made.users)
    ]
    if terms is None and not keep:
        replace(node, node.target, (x, *node.args[1:]), {**node.kwargs, "pre": norm})
        return
    how = (
        {**node.kwargs, "pre": norm}
        | ({"added": terms[1]} if terms else {})
        | ({"keep": tuple(keep)} if keep else {})
    )
    call = insert(node, kernels.chain_kept, (terms[0] if terms else x, *node.args[1:]), how)
    kept = {name: insert(node, operator.getitem, (call, i)) for i, name in enumerate(keep)}
    for name, old in (("normed", normed), ("sum", x)):
        if name in kept:
            kept[name].meta = dict(old.meta)
            old.replace_all_uses_with(
                kept[name], delete_user_cb=lambda user: user not in (call, normed, node)
            )
    # and erase what nobody uses any more
    _use_results(node, call, len(keep))


def _others_are_later(made: Node, user: Node, place: Node) -> bool:
    """Say whether whoever else uses a result does it after a place."""
    return all(other in (user, place) or other > place for other in made.users)


def _terms(x: Node, normed: Node, node: Node) -> tuple[Node, Node] | None:
    """Return the terms of a sum that can be made where a chain is; None where it is none or somebody needs it before."""
    terms = pair(x) if is_call(x, *_PLUS) else None
    if terms is None or not is_fusable(x, *terms) or not all(same_shape(x, term) for term in terms):
        return None
    return terms if undisturbed(x, node) and _others_are_later(x, normed, node) else None


def _use_results(node: Node, call: Node, kept: int) -> None:
    """Let whoever uses a chain use what a call returns behind the values that it keeps."""
    if is_call(node, kernels.chain_parts):
        for view in list(node.users):
            _, i = view.args
            replace(view, operator.getitem, (call, kept + i))
    else:
        replace(node, operator.getitem, (call, kept))
