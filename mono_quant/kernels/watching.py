"""Who looks at a call: the kernels take plain tensors that nobody else follows, everyone else is served by torch."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_PLAIN = (Tensor, nn.Parameter)


def is_watched() -> bool:
    """Say whether a compiler, a tracer, a transform or a mode runs this code on something that stands for tensors."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def is_followed() -> bool:
    """Say whether someone follows this code: `is_watched`, or derivatives are computed forward."""
    return is_watched() or forward_ad._current_level >= 0


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Say whether autograd would keep a call with these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def is_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Say whether all are fp32 tensors on the CPU that no one else looks at: no compiler, tracer, mode or autograd."""
    if is_followed() or wants_gradient(*tensors):
        return False
    return all(
        given is None or (type(given) in _PLAIN and given.dtype is torch.float32 and given.is_cpu)
        for given in tensors
    )
