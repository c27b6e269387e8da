"""Each captured graph twice: call by call, and with runs."""

import copy

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from mono_quant.graphs.backend import rewrite_
from mono_quant.graphs.runs import Run, join_runs


class Beside:
    """A backend that runs each graph twice, call by call and with runs, and holds one result against the other."""

    def __init__(self) -> None:
        self.runs: list[Run] = []

    def __call__(self, graph: GraphModule, _inputs):
        plain = copy.deepcopy(rewrite_(graph))
        join_runs(graph)
        graph.recompile()
        self.runs += [module for module in graph.children() if isinstance(module, Run)]

        def both(*args):
            own = [arg.clone() if type(arg) is Tensor else arg for arg in args]
            expected, found = plain.forward(*own), graph.forward(*args)
            for one, other in zip((*expected, *own), (*found, *args), strict=True):
                if isinstance(one, Tensor):
                    assert torch.equal(one, other)
            for one, other in zip(expected, found, strict=True):
                assert not isinstance(one, Tensor) or one.stride() == other.stride()
            return found

        return both

    @property
    def programs(self) -> int:
        return sum(len(run._programs) for run in self.runs)


def beside(model: nn.Module) -> tuple[nn.Module, Beside]:
    torch.compiler.reset()
    backend = Beside()
    model.compile(backend=backend)
    return model, backend
