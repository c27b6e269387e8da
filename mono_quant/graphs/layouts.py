"""The order of dimensions in memory: what eager code has is what the rest of a graph was captured with.

Fused convolutions give channels last, which the next convolution, pooling and additions keep. Whatever else sees such a tensor, a
`view` above all, and whoever gets it out of the graph, may count on the order that the separate layers give.
"""

import operator

import torch
from torch.fx import Graph, Node
from torch.nn import functional as F

from mono_quant import kernels
from mono_quant.graphs.matching import is_barrier, is_call, is_method, value

# Functions of images whose result does not depend on that order, and has it too.
_KEEPERS = (
    operator.add, operator.iadd, operator.sub, operator.mul, operator.imul, torch.add, torch.mul, torch.relu,
    torch.sigmoid, F.relu, F.relu6, F.silu, F.gelu, F.hardswish, F.hardsigmoid, F.leaky_relu,
    F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.batch_norm, F.interpolate, kernels.int8_conv,
)  # fmt: skip


def restore_layouts(graph: Graph) -> None:
    """Give everything behind convolutions that does not keep channels last the order that eager code has."""
    last: set[Node] = set()
    for node in graph.nodes:
        seen = [source for source in node.all_input_nodes if source in last]
        if is_call(node, kernels.conv, kernels.pooled_conv):
            last.add(node)
        elif seen and (_keeps(node) or (is_barrier(node) and node.op != "output")):
            # a write has to reach the tensor itself
            last.add(node)
        else:
            for source in seen:
                with graph.inserting_before(node):
                    plain = graph.call_method("contiguous", (source,))
                plain.meta = dict(source.meta)
                node.replace_input_with(source, plain)


def _keeps(node: Node) -> bool:
    # with `return_indices` a pool gives two, which are no image
    return is_call(node, *_KEEPERS) and value(node) is not None


def keeps_heads_apart(node: Node) -> bool:
    """Say whether all users of the result [B, H, L, D] of an attention go on with [B, L, H, D], as it lies in memory."""
    return all(
        is_method(user, "transpose")
        and set(user.args[1:]) in ({1, 2}, {-3, -2})
        or is_call(user, torch.transpose)
        and set(user.args[1:]) in ({1, 2}, {-3, -2})
        or is_method(user, "permute")
        and user.args[1:] in ((0, 2, 1, 3), ((0, 2, 1, 3),))
        for user in node.users
    )
