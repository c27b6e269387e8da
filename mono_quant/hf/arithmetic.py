"""What sentence-transformers is told of the dtype that a converted transformer computes in.

It takes the dtype of the first parameter for that, be it that of int8 codes or of half-precision rows, and casts all modules behind
the transformer to it: when it builds an encoder, and when it places one.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from mono_quant.convert.stored import StoredModule

# Whether a transformer is asked for its dtype.
_ASKED: ContextVar[bool] = ContextVar("asked", default=False)


@contextmanager
def asked_for_dtype() -> Iterator[None]:
    """Let the first parameter of a converted transformer have the dtype that it computes in."""
    before = _ASKED.set(True)
    try:
        yield
    finally:
        _ASKED.reset(before)


def tell_arithmetic_(encoder: Any) -> None:
    """Let transformers of sentence-transformers answer while `asked_for_dtype`, and its encoders ask so when they are placed.

    Args:
        encoder: the class that all encoders have as a base.
    """
    from sentence_transformers.base.modules import Transformer

    parameters, place = Transformer.parameters, getattr(encoder, "_place_modules", None)

    @functools.wraps(parameters)
    def with_dtype_first(self: Any, *args: Any, **options: Any) -> Iterator[nn.Parameter]:
        owner = next((m for m in self.modules() if m._parameters), None)  # noqa: SLF001
        if _ASKED.get() and isinstance(owner, StoredModule):
            yield nn.Parameter(torch.empty(0, dtype=owner.float_dtype), requires_grad=False)
        yield from parameters(self, *args, **options)

    Transformer.parameters = with_dtype_first
    if place is None:
        return

    @functools.wraps(place)
    def placed(self: Any) -> None:
        with asked_for_dtype():
            place(self)

    encoder._place_modules = placed  # noqa: SLF001
