"""Activations: how they are spelled, and what `kernels` calls them."""

import math
import operator

import torch
from torch.fx import Graph, Node
from torch.nn import functional as F

from mono_quant.graphs.matching import is_call, is_fusable, is_method, named, replace, with_number

_TIMES, _PLUS = (operator.mul, torch.mul), (operator.add, torch.add)


def activation(node: Node) -> tuple[str, Node] | None:
    """Return the name of an activation and what it is applied to; None where the node is none of those that `kernels` has."""
    if is_method(node, "relu") and len(node.args) == 1:
        name = "relu"
    elif is_call(node, F.relu, torch.relu, F.silu):
        if named(node, ("input", "inplace"), {"inplace": False}) is None:
            return None
        name = "silu" if node.target is F.silu else "relu"
    elif is_call(node, F.gelu):
        how = named(node, ("input", "approximate"), {"approximate": "none"})
        name = {"none": "gelu", "tanh": "gelu_tanh"}.get(how["approximate"], "") if how else ""
    else:
        return None
    source = node.args[0] if node.args else node.kwargs.get("input")
    return (name, source) if name and isinstance(source, Node) else None


def join_written_out_gelus(graph: Graph) -> None:
    """Replace GELU written out with a hyperbolic tangent (`gelu_new` of GPT-2 and T5) by torch's own."""
    for node in graph.nodes:
        source = _written_out(node)
        if source is not None and is_fusable(source, node):
            replace(node, F.gelu, (source,), {"approximate": "tanh"})


def _written_out(node: Node) -> Node | None:
    """Return the x of 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    if not is_call(node, *_TIMES) or len(node.args) != 2:
        return None
    for half, rest in (node.args, node.args[::-1]):
        x = with_number(half, _TIMES, 0.5)
        tanh = with_number(rest, _PLUS, 1.0)
        if x is None or tanh is None or not is_call(tanh, torch.tanh):
            continue
        inner = with_number(tanh.args[0], _TIMES, math.sqrt(2 / math.pi))
        if inner is not None and is_call(inner, *_PLUS) and x in inner.args:
            cube = inner.args[1] if inner.args[0] is x else inner.args[0]
            power = with_number(cube, _TIMES, 0.044715)
            if power is not None and with_number(power, (torch.pow, operator.pow), 3.0) is x:
                return x
    return None
