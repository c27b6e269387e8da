"""The backend `mono_quant` of `torch.compile`: dynamo captures, and patterns become fused calls.

In main memory the graph runs as Python, and no compiler is needed. On a device that has kernels of ours it goes on to torch's own
compiler, for which they are ops that it cannot open. What no pattern knows stays as it is, and a fused call looks at its tensors
when it runs: gradients, other dtypes and devices take the way of plain torch inside `kernels`. Parameters are inputs of the
graph, so nothing is held twice.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from mono_quant import kernels
from mono_quant.errors import ConfigError, Option
from mono_quant.graphs.activations import join_written_out_gelus
from mono_quant.graphs.attention import join_attention
from mono_quant.graphs.cleaning import clean, fix_numbers
from mono_quant.graphs.convolutions import join_convolutions
from mono_quant.graphs.layouts import restore_layouts
from mono_quant.graphs.matching import value
from mono_quant.graphs.norms import add_in_norms, join_norms
from mono_quant.graphs.products import call_alone, join_products
from mono_quant.graphs.prologues import join_prologues
from mono_quant.graphs.rotary import join_rotary
from mono_quant.graphs.runs import join_runs

NAME = "mono_quant"
# In this order: a norm has to be one before a product can take it in.
_PASSES = (fix_numbers, clean, join_written_out_gelus, join_norms)
_IN_MEMORY = (
    join_rotary,
    join_attention,
    join_products,
    add_in_norms,
    call_alone,
    join_convolutions,
    restore_layouts,
)
# Attention and rotary embeddings stay torch's, whose compiler and kernels are there.
_ON_DEVICE = (join_prologues,)


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
        example_inputs: for torch's compiler.
        mode: a preset of torch's compiler, such as "reduce-overhead"; in main memory, where that does not run, there is one way.
        options: there are none.

    Raises:
        ConfigError: options are given.
    """
    if options:
        raise ConfigError(
            Option("options", dict(options)), " are for another backend; mono_quant has none, leave them out"
        )
    rewrite_(graph)
    if _compiles(graph):
        return compiled(graph, example_inputs, mode)
    join_runs(graph)
    graph.recompile()
    forward: Callable[..., Any] = graph.forward
    return forward


def rewrite_(graph: GraphModule) -> GraphModule:
    """Replace the patterns in a captured graph by calls of `kernels`, and return it."""
    rest = _ON_DEVICE if _runs_on_device(graph) else _IN_MEMORY
    for change in (*_PASSES, *rest):
        change(graph.graph)
    graph.graph.lint()
    graph.recompile()
    return graph


def _inputs(graph: GraphModule) -> list[Tensor]:
    seen = [value(node) for node in graph.graph.nodes if node.op == "placeholder"]
    return [tensor for tensor in seen if tensor is not None]


def _runs_on_device(graph: GraphModule) -> bool:
    return any(kernels.runs_on_device(tensor) for tensor in _inputs(graph))


def _compiles(graph: GraphModule) -> bool:
    """Say whether torch's compiler goes on: it has to be there for our kernels, too."""
    return any(tensor.device.type != "cpu" and kernels.runs_on_device(tensor) for tensor in _inputs(graph))


def compiled(graph: GraphModule, inputs: Sequence[Tensor], mode: str | None) -> Callable[..., Any]:
    """Return what torch's compiler makes of a rewritten graph.

    Args:
        graph: it is changed.
        inputs: that it was captured with, or their fakes.
        mode: one of `torch.compile`'s.

    Raises:
        RuntimeError: there is no such mode.
    """
    patches = torch._inductor.list_mode_options(mode) if mode and mode != "default" else {}
    inductor: Any = torch._dynamo.lookup_backend("inductor")
    forward: Callable[..., Any] = inductor(graph, list(inputs), config_patches=patches)
    return forward


def register() -> None:
    """Make the name known to `torch.compile` where no installed package does that: in a checkout that was not installed anew."""
    if not entry_points(group="torch_dynamo_backends", name=NAME):
        torch._dynamo.register_backend(mono_quant, name=NAME)
