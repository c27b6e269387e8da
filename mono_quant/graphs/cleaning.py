"""Calls that do nothing for the inputs of this graph: dropout in evaluation, casts to the dtype that is there, views as they are."""

import torch
from torch import SymFloat
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate
from torch.nn import functional as F

from mono_quant.graphs.matching import is_call, is_method, named, same_shape, skip, value


def fix_numbers(graph: Graph) -> None:
    """Put the values of floats in their places, which holds the graph to them.

    Where all sizes vary (`dynamic=True`) dynamo takes an epsilon of a model for something that varies, too.
    """
    for node in graph.nodes:
        number = node.meta.get("example_value")
        if isinstance(number, SymFloat) and is_method(node, "item"):
            fixed = float(number)
            for user in list(node.users):
                user.args = map_aggregate(
                    user.args, lambda one, node=node, fixed=fixed: fixed if one is node else one
                )
                user.kwargs = map_aggregate(
                    user.kwargs, lambda one, node=node, fixed=fixed: fixed if one is node else one
                )
            graph.erase_node(node)


def clean(graph: Graph) -> None:
    """Take out what returns its own input."""
    for node in graph.nodes:
        if _is_dropout_at_rest(node) or _is_cast_to_the_same(node) or _is_same_view(node):
            source = node.args[0] if node.args else node.kwargs["input"]
            if isinstance(source, Node):
                skip(node, source)


def _is_dropout_at_rest(node: Node) -> bool:
    if not is_call(node, F.dropout, torch.dropout):
        return False
    rest = {"p": 0.5, "training": True, "inplace": False}
    given = named(node, ("input", *rest), rest) or {}
    return given.get("training") is False


def _is_cast_to_the_same(node: Node) -> bool:
    if not is_method(node, "to", "float", "type_as") or node.kwargs.keys() - {"dtype", "device"}:
        return False
    if any(given is True for given in node.args[1:]):
        # a copy was asked for
        return False
    before, after = value(node.args[0]), value(node)
    return (
        before is not None
        and after is not None
        and (before.dtype, before.device) == (after.dtype, after.device)
    )


def _is_same_view(node: Node) -> bool:
    shown = is_method(node, "flatten", "reshape", "view") and same_shape(node.args[0], node)
    before, after = value(node.args[0]) if node.args else None, value(node)
    return (
        shown
        and before is not None
        and after is not None
        and before.dtype == after.dtype
        and not any(user.op == "output" for user in node.users)
    )
