"""The backend `mono_quant` of `torch.compile`: dynamo captures, patterns become fused calls, and the graph runs as Python.

No compiler is needed. What no pattern knows stays as it is, and a fused call looks at its tensors when it runs: gradients, other
dtypes and devices take the way of plain torch inside `kernels`. Parameters are inputs of the graph, so nothing is held twice.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from mono_quant.errors import ConfigError, Option
from mono_quant.graphs.activations import join_written_out_gelus
from mono_quant.graphs.attention import join_attention
from mono_quant.graphs.cleaning import clean, fix_numbers
from mono_quant.graphs.convolutions import join_convolutions
from mono_quant.graphs.layouts import restore_layouts
from mono_quant.graphs.norms import add_in_norms, join_norms
from mono_quant.graphs.products import call_alone, join_products
from mono_quant.graphs.rotary import join_rotary
from mono_quant.graphs.runs import join_runs

NAME = "mono_quant"
# In this order: a norm has to be one before a product can take it in.
_PASSES = (
    fix_numbers,
    clean,
    join_written_out_gelus,
    join_norms,
    join_rotary,
    join_attention,
    join_products,
    add_in_norms,
    call_alone,
    join_convolutions,
    restore_layouts,
)


def mono_quant(
    graph: GraphModule,
    example_inputs: Sequence[Tensor],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Return what runs in the place of a captured graph; `torch.compile(model, backend="mono_quant")` calls this.

    Args:
        graph: as dynamo captured it; it is changed.
        example_inputs: not looked at: whatever is constant stands in the graph.
        mode: a preset of torch's own compiler, which transformers always names; there is one way here.
        options: there are none.

    Raises:
        ConfigError: options are given.
    """
    if options:
        raise ConfigError(
            Option("options", dict(options)), " are for another backend; mono_quant has none, leave them out"
        )
    rewrite_(graph)
    join_runs(graph)
    graph.recompile()
    forward: Callable[..., Any] = graph.forward
    return forward


def rewrite_(graph: GraphModule) -> GraphModule:
    """Replace the patterns in a captured graph by calls of `kernels`, and return it."""
    for change in _PASSES:
        change(graph.graph)
    graph.graph.lint()
    graph.recompile()
    return graph


def register() -> None:
    """Make the name known to `torch.compile` where no installed package does that: in a checkout that was not installed anew."""
    if not entry_points(group="torch_dynamo_backends", name=NAME):
        torch._dynamo.register_backend(mono_quant, name=NAME)
