"""Int8 convolutions with batch norm, residual and ReLU behind them, as one call of `kernels.conv`, and pooling behind that."""

import operator
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.nn import functional as F

from mono_quant import kernels
from mono_quant.graphs.activations import activation
from mono_quant.graphs.matching import (
    has_one_user,
    is_call,
    is_fusable,
    named,
    pair,
    replace,
    same_shape,
    undisturbed,
)

_GEOMETRY = ("x", "weight", "weight_scale", "bias", "stride", "padding", "dilation", "groups")
_POOLS = (F.max_pool2d, torch.max_pool2d)
_PLUS = (operator.add, torch.add, operator.iadd)


def join_convolutions(graph: Graph) -> None:
    """Replace int8 convolutions over fp32 images, and what stands behind them, by `kernels.conv`."""
    for step in (_start, _join_batch_norm, _join_residual, _join_relu, _join_pool, _call_alone):
        for node in graph.nodes:
            step(node)


def _start(node: Node) -> None:
    given = (
        named(node, (*_GEOMETRY, "activations"), {"activations": "auto"})
        if is_call(node, *kernels.CONV_OPS)
        else None
    )
    if given is not None and is_fusable(node, given["x"]):
        scheme = given["activations"]
        kwargs = {} if scheme == "auto" else {"activations": scheme}
        replace(node, kernels.conv, tuple(given[name] for name in _GEOMETRY), kwargs)


def _open(node: Any, *taken: str) -> bool:
    """Say whether a node is a convolution that one node uses, and that has none of these parts yet."""
    return is_call(node, kernels.conv) and has_one_user(node) and not node.kwargs.keys() & set(taken)


def _join_batch_norm(node: Node) -> None:
    defaults = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}
    names = ("input", "running_mean", "running_var", *defaults)
    given = named(node, names, defaults) if is_call(node, F.batch_norm) else None
    if given is None or given["training"] is not False or not isinstance(given["eps"], float):
        return
    made, values = given["input"], [given[name] for name in ("weight", "bias", "running_mean", "running_var")]
    if (
        _open(made, "batch_norm")
        and is_fusable(node, *(t for t in values if t is not None))
        and undisturbed(made, node)
    ):
        replace(node, kernels.conv, made.args, {**made.kwargs, "batch_norm": (*values, given["eps"])})


def _join_residual(node: Node) -> None:
    terms = pair(node) if is_call(node, *_PLUS) else None
    for made, residual in (terms, terms[::-1]) if terms else ():
        # what is written into has to be the convolution's own
        if node.target is operator.iadd and made is not node.args[0]:
            continue
        ready = _open(made, "residual", "relu") and residual is not made and is_fusable(node, residual)
        if ready and same_shape(made, residual) and same_shape(made, node) and undisturbed(made, node):
            replace(node, kernels.conv, made.args, {**made.kwargs, "residual": residual})
            return


def _join_relu(node: Node) -> None:
    found = activation(node)
    if found is not None and found[0] == "relu" and _open(found[1], "relu") and undisturbed(found[1], node):
        made = found[1]
        replace(node, kernels.conv, made.args, {**made.kwargs, "relu": True})


def _join_pool(node: Node) -> None:
    defaults = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False}
    names = ("input", "kernel_size", *defaults)
    given = named(node, names, defaults) if is_call(node, *_POOLS) else None
    if given is None or given["return_indices"] is not False:
        return
    made = given["input"]
    if not _open(made, "residual") or not _is_joined(made) or not undisturbed(made, node):
        return
    # what comes from another convolution stays in a run with it
    if not is_call(made.args[0], kernels.conv):
        pool = tuple(given[name] for name in names[1:-1])
        replace(node, kernels.pooled_conv, made.args, {**made.kwargs, "pool": pool})


def _is_joined(made: Node) -> bool:
    """Say whether anything became part of a convolution: if not, it is called as eager code does."""
    return bool(made.kwargs.keys() - {"activations"})


def _call_alone(node: Node) -> None:
    """Call a convolution that nothing could be joined to as eager code does."""
    if is_call(node, kernels.conv) and not _is_joined(node):
        scheme = node.kwargs.get("activations")
        replace(node, kernels.int8_conv, node.args if scheme is None else (*node.args, scheme))
    elif is_call(node, *kernels.CONV_OPS):
        replace(node, kernels.int8_conv, node.args, dict(node.kwargs))
