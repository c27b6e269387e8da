"""Parts of a batch: a run of convolutions takes a few images through all of its steps before it takes the next ones.

A step of a large batch writes more than the caches hold, and the next step reads it from memory again. Convolutions do not mix
images, so a run of nothing else has the bits of the whole batch in parts of any size.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from mono_quant import kernels
from mono_quant.graphs.matching import is_call


class _Step(NamedTuple):
    """A convolution by the numbers of its tensors: inputs of a run come first, then what its steps make."""

    x: int
    weight: int
    residual: int | None
    how: kernels.ConvGeometry


class Images:
    """The inputs of a run that hold images one behind the other, in four dimensions."""

    def __init__(self, inputs: Sequence[int], steps: Sequence[_Step]) -> None:
        """Take the numbers of these inputs, and the steps of the run."""
        self.inputs, self._steps = frozenset(inputs), tuple(steps)
        # the shapes that were seen last, and the bytes of an image in the widest step then
        self._last: tuple[Any, int] = (None, 0)

    def count(self, inputs: Sequence[Any]) -> int | None:
        """Return how many images there are; None where they have to stay together."""
        images = [inputs[i] for i in self.inputs]
        if any(not isinstance(x, Tensor) or x.dim() != 4 or x.dtype is not torch.float32 for x in images):
            return None
        counts = {x.shape[0] for x in images}
        return counts.pop() if len(counts) == 1 else None

    def at_once(self, inputs: Sequence[Any], count: int) -> int:
        """Return how many of `count` images should go through all steps together, one at least.

        Each thread has a part of its own; where there are too few images for that, all threads share each part.
        """
        shapes, threads = [inputs[i].shape[1:] for i in self.inputs], torch.get_num_threads()
        seen, widest = self._last
        if seen != shapes:
            widest = self._widest(inputs)
            self._last = shapes, widest
        size = kernels.images_at_once(widest, threads)
        return size if size * threads <= count else kernels.images_at_once(widest)

    def _widest(self, inputs: Sequence[Any]) -> int:
        """Return the bytes that one image is in the step that reads and writes most of them."""
        shapes: list[Any] = [getattr(x, "shape", None) for x in inputs]
        widest = 0
        for x, weight, residual, how in self._steps:
            made = kernels.conv_shape(shapes[x], shapes[weight], how)
            if made is None:
                return 0
            shapes.append(made)
            used = (shapes[x], made) if residual is None else (shapes[x], made, shapes[residual])
            widest = max(widest, 4 * sum(math.prod(shape[1:]) for shape in used))
        return widest

    def part(self, inputs: Sequence[Any], first: int, last: int) -> list[Any]:
        """Return inputs for some images."""
        return [x[first:last] if i in self.inputs else x for i, x in enumerate(inputs)]


def images_of(nodes: Sequence[Node], inputs: Sequence[Node], fixed: Sequence[bool]) -> Images | None:
    """Return which inputs of some nodes hold images; None where the nodes are more than convolutions of those.

    Args:
        nodes: of a run, in order.
        inputs: what they are made of.
        fixed: which inputs are parameters of one shape, which none of the images may be.
    """
    if not all(is_call(node, kernels.conv) for node in nodes):
        return None
    number = {node: i for i, node in enumerate((*inputs, *nodes))}
    steps: list[_Step] = []
    apart: set[Node] = set()
    together: set[Node] = set()
    for node in nodes:
        x, weight, scale, bias, stride, padding, dilation, groups = node.args
        kwargs: dict[str, Any] = dict(node.kwargs)
        residual = kwargs.pop("residual", None)
        apart |= {x, residual} - {None}
        map_arg((weight, scale, bias, kwargs), together.add)
        how = (tuple(stride), tuple(padding), tuple(dilation), groups)
        if not all(isinstance(size, int) for size in (*how[0], *how[1], *how[2], groups)):
            return None
        steps.append(_Step(number[x], number[weight], number.get(residual), how))
    images = [i for i, source in enumerate(inputs) if source in apart]
    if not images or together & {*apart, *nodes} or any(fixed[i] for i in images):
        return None
    return Images(images, steps)
