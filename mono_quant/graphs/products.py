"""Int8 linear layers with what stands around them, as one call of `kernels.chain`.

A product is a tuple (weights, scales, biases, activations), each of the first three a tuple with one tensor for each layer that is
computed at once. Layers are made chains of one product first; then each step joins a chain with what is before or behind it.
"""

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from mono_quant import kernels
from mono_quant.graphs.activations import activation
from mono_quant.graphs.matching import (
    erase,
    has_one_user,
    is_barrier,
    is_call,
    is_fusable,
    is_method,
    last_size,
    named,
    pair,
    replace,
    same_shape,
    undisturbed,
)
from mono_quant.graphs.norms import norm_of

_TIMES, _PLUS = (operator.mul, torch.mul), (operator.add, torch.add, operator.iadd)
_ARGUMENTS = ("x", "weight", "weight_scale", "bias", "activations")


def join_products(graph: Graph) -> None:
    """Replace int8 linear layers in main memory, and what stands around them, by chains."""
    for step in (
        start,
        join_gate,
        join_activation,
        join_second,
        join_parallel,
        _join_residual,
        _join_norm_behind,
        _join_norm_before,
    ):
        for node in graph.nodes:
            step(node)


def call_alone(graph: Graph) -> None:
    """Call layers that nothing could be joined to as eager code does: not through an op, which costs more than a small product."""
    for node in graph.nodes:
        if is_call(node, kernels.chain) and not node.kwargs:
            x, ((weight,), (scale,), (bias,), activations) = node.args
            named_scheme = () if activations == "auto" else (activations,)
            replace(node, kernels.int8_linear, (x, weight, scale, bias, *named_scheme))
        elif is_call(node, *kernels.LINEAR_OPS):
            replace(node, kernels.int8_linear, node.args, dict(node.kwargs))
        elif is_call(node, *kernels.HALF_OPS):
            replace(node, kernels.half_linear, node.args, dict(node.kwargs))


def start(node: Node) -> None:
    """Make a layer a chain of one product."""
    if not is_call(node, *kernels.LINEAR_OPS):
        return
    given = named(node, _ARGUMENTS, {"activations": "auto"})
    if given is not None and is_fusable(node, given["x"]):
        product = ((given["weight"],), (given["weight_scale"],), (given["bias"],), given["activations"])
        replace(node, kernels.chain, (given["x"], product))


def _is_bare(node: Any) -> bool:
    """Say whether a node is the product of one input and nothing else."""
    return is_call(node, kernels.chain) and not node.kwargs


def join_activation(node: Node) -> None:
    """Join an activation with the layer that makes its input."""
    found = activation(node)
    if found is not None and _is_bare(found[1]) and has_one_user(found[1]) and undisturbed(found[1], node):
        act, source = found
        replace(node, kernels.chain, source.args, {"act": act})


def join_gate(node: Node) -> None:
    """Join act(gate) * up, in either order, where both are layers of one input or halves of one layer."""
    factors = pair(node) if is_call(node, *_TIMES) else None
    for activated, up in (factors, factors[::-1]) if factors else ():
        found = activation(activated)
        if found is None or not has_one_user(activated) or not has_one_user(up) or not is_fusable(node):
            continue
        act, gate = found
        if not has_one_user(gate) or is_barrier(activated) or not undisturbed(gate, up, node):
            continue
        if _is_bare(gate) and _is_bare(up) and gate is not up and gate.args[0] is up.args[0]:
            replace(node, kernels.chain, up.args, {"act": act, "gate": gate.args[1]})
            return
        halves = _halves(gate, up)
        if halves is not None and undisturbed(halves[0], node):
            whole, gate_first = halves
            first, second = _rows_of(whole, node)
            ordered = (second, first) if gate_first else (first, second)
            replace(node, kernels.chain, (whole.args[0], ordered[0]), {"act": act, "gate": ordered[1]})
            return


def _halves(gate: Node, up: Node) -> tuple[Node, bool] | None:
    """Return the layer that gate and up are the halves of, and whether the gate is the first; None where they are not."""
    if not (is_call(gate, operator.getitem) and is_call(up, operator.getitem)):
        return None
    (chunks, i), (other, j) = gate.args, up.args
    if chunks is not other or {i, j} != {0, 1} or len(chunks.users) != 2:
        return None
    if not (is_method(chunks, "chunk", "split") or is_call(chunks, torch.chunk, torch.split)):
        return None
    given = named(chunks, ("input", "size", "dim"), {"dim": 0}) or named(
        chunks, ("input", "chunks", "dim"), {"dim": 0}
    )
    whole = given["input"] if given else None
    size = last_size(whole)
    if given is None or not _is_bare(whole) or not has_one_user(whole) or size is None or size % 2:
        return None
    same = last_size(gate) == last_size(up) == size // 2
    return (whole, i == 0) if same and given["dim"] in (-1, _dims(whole) - 1) else None


def _dims(node: Node) -> int:
    dims: int = node.meta["example_value"].dim()
    return dims


def _rows_of(whole: Node, before: Node) -> tuple[Any, Any]:
    """Return the products that the first and the second half of the rows of a layer are."""
    (weight,), (scale,), (bias,), activations = whole.args[1]
    half = (last_size(whole) or 0) // 2
    graph, products = whole.graph, []
    with graph.inserting_before(before):
        for rows in (slice(None, half), slice(half, None)):
            parts = [
                t if t is None else graph.call_function(operator.getitem, (t, rows))
                for t in (weight, scale, bias)
            ]
            products.append((*((part,) for part in parts), activations))
    return products[0], products[1]


def join_second(node: Node) -> None:
    """Join a layer with the activated one that makes its input."""
    if not _is_bare(node):
        return
    first, second = node.args
    ready = is_call(first, kernels.chain) and "act" in first.kwargs and "second" not in first.kwargs
    if not ready or not has_one_user(first):
        return
    if undisturbed(first, node):
        replace(node, kernels.chain, first.args, {**first.kwargs, "second": second})


def join_parallel(node: Node) -> None:
    """Join layers of one input into one product with its outputs side by side."""
    if not _is_bare(node):
        return
    x, (_, _, _, activations) = node.args
    beside = [
        other
        for other in x.users
        if _is_bare(other) and other.args[0] is x and other.args[1][3] == activations
    ]
    others = [
        other
        for other in sorted(beside)
        if other > node and undisturbed(node, other) and _is_early(other, node)
    ]
    if not others or min(beside) is not node:
        return
    layers = [node, *others]
    joined = tuple(tuple(layer.args[1][i][0] for layer in layers) for i in range(3))
    with node.graph.inserting_before(node):
        parts = node.graph.call_function(kernels.chain_parts, (x, (*joined, activations)))
        views = [node.graph.call_function(operator.getitem, (parts, i)) for i in range(len(layers))]
    for layer, view in zip(layers, views, strict=True):
        view.meta = dict(layer.meta)
        for user in layer.users:
            # rows of a part lie further apart than those of a tensor of its own, where a view may not be possible
            if is_method(user, "view"):
                user.target = "reshape"
        layer.replace_all_uses_with(view)
        erase(layer)


def _is_early(layer: Node, place: Node) -> bool:
    """Say whether the weights of a layer are there at an earlier place, and bring views of parameters there."""
    tensors = [one for (one,) in layer.args[1][:3] if one is not None]
    late = [t for t in tensors if t > place]
    if any(
        t.op != "call_method" or t.target not in ("t", "flatten") or _parameter_of(t) is None for t in late
    ):
        return False
    for t in late:
        place.prepend(t)
    return True


def _parameter_of(node: Node) -> Node | None:
    source = node.args[0]
    return source if isinstance(source, Node) and source.op == "placeholder" and source < node else None


def _join_residual(node: Node) -> None:
    """Join a sum with the chain that makes one of its terms."""
    terms = pair(node) if is_call(node, *_PLUS) else None
    for made, residual in (terms, terms[::-1]) if terms else ():
        # what is written into has to be the chain's own
        if node.target is operator.iadd and made is not node.args[0]:
            continue
        ready = is_call(made, kernels.chain) and has_one_user(made) and "residual" not in made.kwargs
        if not ready or residual is made or not is_fusable(node, residual):
            continue
        if same_shape(made, residual) and same_shape(made, node) and undisturbed(made, node):
            replace(node, kernels.chain, made.args, {**made.kwargs, "residual": residual})
            return


def _join_norm_behind(node: Node) -> None:
    found = norm_of(node)
    if found is None:
        return
    made, norm = found
    ready = is_call(made, kernels.chain) and has_one_user(made) and "post" not in made.kwargs
    if ready and undisturbed(made, node):
        replace(node, kernels.chain, made.args, {**made.kwargs, "post": norm})


def _join_norm_before(node: Node) -> None:
    for function in (kernels.chain, kernels.chain_parts):
        found = norm_of(node.args[0]) if is_call(node, function) else None
        if found is None:
            continue
        normed: Any = node.args[0]
        x, norm = found
        if has_one_user(normed) and node.kwargs.get("residual") is not normed and undisturbed(normed, node):
            replace(node, function, (x, node.args[1]), {**node.kwargs, "pre": norm})
            return
