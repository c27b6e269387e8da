"""Which weights of a model its forward writes into, as far as its code says.

A run shows it better, but a plan runs nothing, and most modules come without inputs.
"""

import re
from collections.abc import Iterator
from types import FunctionType

from torch import nn

from mono_quant.planning.forward_code import Paths, written_paths

WRITTEN = "the model's forward writes into it"
_WILD = {"*": r"[^.]+", "**": r".+"}


def written_by_code(model: nn.Module) -> frozenset[str]:
    """Return the names of the parameters and buffers of `model` that a forward in it writes into, moves or replaces.

    What happens in training only does not count.
    """
    found: set[str] = set()
    for prefix, module in model.named_modules():
        for path in _paths_of(module):
            names = _names_below(module)
            pattern = re.compile(r"\.".join(_WILD.get(part, re.escape(part)) for part in path) + r"(\.|$)")
            found |= {f"{prefix}.{name}".lstrip(".") for name in names if pattern.match(name)}
    return frozenset(found)


def _names_below(module: nn.Module) -> Iterator[str]:
    for name, _ in module.named_parameters(remove_duplicate=False):
        yield name
    for name, _ in module.named_buffers(remove_duplicate=False):
        yield name


def _paths_of(module: nn.Module) -> Paths:
    cls = type(module)
    own = vars(module).get("forward")
    forward = cls.forward if own is None else own
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    functions = [] if own is None and cls.__module__.startswith("torch.nn.") else [forward]
    functions += [hook for hook in hooks if isinstance(hook, FunctionType)]
    return frozenset().union(*(written_paths(function, cls) for function in functions))
