"""Runs: parts of a graph that are calls of `kernels` and views alone, made by one call of the library from the third time on.

Between two products Python takes as long as a small product does, all the more as weights that pass by push it out of the caches.
What a run holds and when it counts is the matter of `kernels.program`; here is which nodes belong to one. A run is a module
of the rewritten graph, and as long as it has nothing prepared, or somebody looks on, it is that part of the graph.
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Interpreter, Node

from mono_quant import kernels
from mono_quant.graphs.matching import is_call, is_method, value
from mono_quant.graphs.parts import Images, images_of

_KERNELS = (
    kernels.chain,
    kernels.chain_parts,
    kernels.attention,
    kernels.conv,
    kernels.norm,
    kernels.rotary,
    kernels.int8_linear,
)
_VIEWS = (
    "t", "transpose", "permute", "view", "reshape", "contiguous", "flatten", "unflatten", "split", "chunk", "unsqueeze",
    "squeeze", "expand",
)  # fmt: skip
_PLUS = (operator.add, torch.add)
# Calls from which on a run pays.
_FEWEST = 2
# Shapes for which a run has a program at the same time; those of which it knows how often they came.
_PROGRAMS, _SEEN = 32, 256
# Calls before another program is written for a shape whose place another one needed, and at most where programs were useless.
_REST, _MOST_PATIENCE = 8, 1024


def join_runs(module: GraphModule) -> None:
    """Replace the runs of a rewritten graph by modules of it."""
    graph = module.graph
    for number, nodes in enumerate(_runs(graph)):
        name = f"run_{number}"
        inside = set(nodes)
        inputs = list(
            dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in inside)
        )
        outputs = [node for node in nodes if any(user not in inside for user in node.users)]
        fixed = [_is_parameter(source) for source in inputs]
        plain = _part(module, nodes, inputs, outputs)
        setattr(module, name, Run(plain, fixed, images_of(nodes, inputs, fixed)))
        with graph.inserting_before(nodes[0]):
            call = graph.call_module(name, tuple(inputs))
            views = [graph.call_function(operator.getitem, (call, i)) for i in range(len(outputs))]
        for old, new in zip(outputs, views, strict=True):
            new.meta = dict(old.meta)
            old.replace_all_uses_with(new, delete_user_cb=lambda user, inside=inside: user not in inside)
        for node in reversed(nodes):
            graph.erase_node(node)


def _runs(graph: Graph) -> list[list[Node]]:
    found: list[list[Node]] = [[]]
    for node in graph.nodes:
        if _belongs(node, found[-1]):
            found[-1].append(node)
        elif found[-1] and node.op != "placeholder":
            found.append([])
    return [nodes for nodes in found if sum(is_call(node, *_KERNELS) for node in nodes) >= _FEWEST]


def _belongs(node: Node, before: Sequence[Node]) -> bool:
    """Say whether a node can go on with a run."""
    if is_method(node, "contiguous") and is_call(node.args[0], kernels.conv) and node.args[1:] == ():
        # puts the channels in front of the pixels again, which is no step of a program
        return False
    if is_call(node, *_KERNELS) or is_method(node, *_VIEWS, "index_copy_"):
        return True
    if is_call(node, operator.getitem):
        source, index = node.args
        places = index if isinstance(index, tuple) else (index,)
        # a tuple that is made elsewhere is taken apart there
        is_ours = value(source) is not None or source in before
        return is_ours and all(value(place) is None and not isinstance(place, Tensor) for place in places)
    if is_call(node, torch.arange):
        return _is_long(node)
    if len(node.args) != 2 or node.kwargs or not _is_long(node) or not _is_long(node.args[0]):
        return False
    if is_method(node, "add_"):
        return type(node.args[1]) is int
    return is_call(node, *_PLUS) and (type(node.args[1]) is int or _is_long(node.args[1]))


def _is_long(node: Any) -> bool:
    seen = value(node)
    return seen is not None and seen.dtype is torch.int64 and seen.dim() <= 1


def _is_parameter(node: Node) -> bool:
    """Say whether an input is one that the guards of a graph hold to its shape."""
    seen = value(node)
    if node.op != "placeholder" or not isinstance(seen, nn.Parameter):
        return False
    return all(isinstance(size, int) for size in (*seen.shape, *seen.stride()))


def _part(
    module: GraphModule, nodes: Sequence[Node], inputs: Sequence[Node], outputs: Sequence[Node]
) -> GraphModule:
    graph = Graph()
    inner = {source: graph.placeholder(f"x{i}") for i, source in enumerate(inputs)}
    for node in nodes:
        inner[node] = graph.node_copy(node, inner.__getitem__)
    graph.output(tuple(inner[node] for node in outputs))
    return GraphModule(module, graph)


class Run(nn.Module):
    """Some nodes in a row: as they stand, or by a program for inputs of one shape."""

    def __init__(self, plain: GraphModule, fixed: Sequence[bool], images: Images | None) -> None:
        """Take a part of a graph, which of its inputs are guarded parameters, and which are images that may be kept apart."""
        super().__init__()
        self._plain, self._images = plain, images
        self._cut = frozenset[int]() if images is None else images.inputs
        self._moving = [i for i, known in enumerate(fixed) if not known]
        self._programs: dict[Any, kernels.Program] = {}
        # by what was seen: calls until a program is written for it; None where none can be
        self._waiting: dict[Any, int | None] = {}
        # so many the next time, more and more where programs turn out useless
        self._patience = 1

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        """Do what the nodes do."""
        images, cpu = self._images, kernels.active.cpu
        count = None if images is None or cpu is None else images.count(inputs)
        if images is None or count is None:
            return self._run(self._key(inputs), inputs)
        size = min(count, images.at_once(inputs, count))
        key = self._key(inputs, size)
        if size == count or key is None:
            return self._run(key, inputs)
        return self._run_parts(images, inputs, count, size, key)

    def _run_parts(
        self, images: Images, inputs: Sequence[Any], count: int, size: int, key: Any
    ) -> tuple[Tensor, ...]:
        """Take `size` images of `count` at a time; `key` is that of so many."""
        outputs: tuple[Tensor, ...] = ()
        done, program = 0, self._programs.get(key)
        if program is not None:
            outputs, done = program.run_apart(inputs, images.inputs, count, size) or (outputs, done)
        for first in range(done, count, size):
            last = min(first + size, count)
            if last - first < size:
                key = self._key(inputs, last - first)
            places = [output[first:last] for output in outputs]
            found = self._run(key, images.part(inputs, first, last), places or None)
            if first == 0:
                outputs = tuple([
                    kernels.for_images(count, one.shape[1:], one.stride()[1:], one) for one in found
                ])
                places = [output[:last] for output in outputs]
            for place, one in zip(places, found, strict=True):
                if one is not place:
                    place.copy_(one)
        return outputs

    def _run(
        self, key: Any, inputs: Sequence[Any], places: Sequence[Tensor] | None = None
    ) -> tuple[Any, ...]:
        """Do what the nodes do, by the program of a key if there is one: it may write into `places`."""
        if key is None:
            return self._run_plain(inputs)
        program = self._programs.get(key)
        if program is not None:
            found = program.run([x for x in inputs if isinstance(x, Tensor)], places)
            if found is not None:
                self._patience = 1
                return found
            # weights were written to, or are packed another way
            self._programs.pop(key, None)
            self._patience = min(2 * self._patience, _MOST_PATIENCE)
            self._waiting[key] = self._patience
        left = self._waiting.get(key, self._patience)
        if left == 0:
            return self._record(key, inputs)
        if len(self._waiting) >= _SEEN:
            self._waiting.clear()
        self._waiting[key] = None if left is None else left - 1
        return self._run_plain(inputs)

    def _run_plain(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        found: tuple[Any, ...] = self._plain.forward(*inputs)
        return found

    def _key(self, inputs: Sequence[Any], images: int | None = None) -> Any:
        """Return what a program depends on, besides what guards hold to; None where torch has to look at each call.

        Args:
            inputs: of the run.
            images: how many of them the program is for, where that is not all.
        """
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or kernels.is_followed():
            return None
        key: list[Any] = [torch.is_inference_mode_enabled()]
        for i in self._moving:
            x = inputs[i]
            if isinstance(x, Tensor):
                if (
                    type(x) not in (Tensor, nn.Parameter)
                    or not x.is_cpu
                    or x.is_neg()
                    or x.layout is not torch.strided
                ):
                    return None
                shape = x.shape if images is None or i not in self._cut else (images, *x.shape[1:])
                key += (x.dtype, shape, x.stride(), x.is_inference())
            elif type(x) is int:
                key.append(x)
            else:
                return None
        return tuple(key)

    def _record(self, key: Any, inputs: Sequence[Any]) -> tuple[Any, ...]:
        cpu = kernels.active.cpu
        if cpu is None:
            return self._run_plain(inputs)
        recorder = kernels.Recorder(cpu, [x for x in inputs if isinstance(x, Tensor)])
        found: tuple[Any, ...] = _Recording(self._plain, recorder).run(*inputs)
        program = recorder.finish(found)
        if program is None:
            self._waiting[key] = None
        else:
            while len(self._programs) >= _PROGRAMS:
                oldest = next(iter(self._programs))
                self._programs.pop(oldest, None)
                self._waiting[oldest] = _REST
            self._programs[key] = program
        return found


class _Recording(Interpreter):  # type: ignore[misc]
    """Runs a part of a graph by what a recorder does in the place of each call."""

    def __init__(self, module: GraphModule, recorder: kernels.Recorder) -> None:
        super().__init__(module)
        self._recorder = recorder

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        recorder = self._recorder
        if target in _KERNELS:
            return getattr(recorder, target.__name__)(*args, **kwargs)
        if target is operator.getitem:
            source, index = args
            return (
                source[index] if isinstance(source, tuple | list) else recorder.views(source[index], source)
            )
        if target is torch.arange:
            return recorder.constant(target(*args, **kwargs))
        return recorder.add_longs(*args)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        source, *rest = args
        if target == "index_copy_":
            return self._recorder.copy_rows(source, *rest, **kwargs)
        if target == "add_":
            return self._recorder.add_long(source, *rest)
        return self._recorder.views(getattr(source, target)(*rest, **kwargs), source)
