"""Whether a model is as it was: every tensor, flag and plain attribute, by value."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sweeping.outputs import same_bits

State = dict[str, Any]


def state_of(model: nn.Module) -> State:
    """Return everything that a conversion could disturb, copied."""
    state: State = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, value in vars(module).items():
            if name in ("_modules", "_parameters", "_buffers"):
                state |= {f"{path}.{name}.{k}": _copy(v) for k, v in value.items()}
            else:
                state[f"{path}.{name}"] = _copy(value)
    return state


def changes(before: State, model: nn.Module) -> Iterator[str]:
    """Yield what is not as it was."""
    now = state_of(model)
    for name in sorted(before.keys() ^ now.keys()):
        yield f"{name} {'is gone' if name in before else 'is new'}"
    for name in sorted(before.keys() & now.keys()):
        if not _same(before[name], now[name]):
            yield f"{name} has changed{_values(before[name], now[name])}"


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (id(value), value.dtype, value.requires_grad, value.detach().clone())
    if isinstance(value, Mapping):
        return {str(k): _copy(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_copy(v) for v in value]
    if isinstance(value, (bool, int, float, str, type(None), torch.dtype)):
        return value
    # configs are objects that stay the same while their fields change
    return (id(value), _copy(value.to_dict())) if hasattr(value, "to_dict") else id(value)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return same_bits(a, b)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return bool(a == b)


def _values(a: Any, b: Any) -> str:
    simple = (bool, int, float, str, type(None))
    return f" from {a!r} to {b!r}"[:80] if isinstance(a, simple) and isinstance(b, simple) else ""
