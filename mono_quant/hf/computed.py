"""The buffers that a transformers model computes for itself when it is built: tables and scales that no checkpoint holds."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# The mark by which transformers knows what a checkpoint has filled.
INITIALIZED = "_is_hf_initialized"


def computed_on(skeleton: nn.Module, left: Collection[str] = ()) -> dict[str, Tensor]:
    """Return the buffers of a skeleton that are not in a checkpoint, with their values; the skeleton stays as it was.

    They are those of the dtype that the skeleton was built in. transformers computes them after it has filled a model, and
    for some (SwinV2) in the dtype of the weights that were filled in.

    Args:
        skeleton: on meta.
        left: names of buffers that checkpoints may have, and one did not.

    Raises:
        RuntimeError, and whatever else the code of the class raises: it cannot be initialised without its weights.
    """
    model: Any = skeleton
    saved = model.state_dict(keep_vars=True)
    unsaved = {name: buffer for name, buffer in model.named_buffers() if name not in saved or name in left}
    with _as_filled(model), torch.device("cpu"), _float32(), torch.random.fork_rng(devices=[]):
        try:
            # a value that shows where nothing is computed
            put_buffers_(model, {name: torch.full_like(b, 77, device="cpu") for name, b in unsaved.items()})
            model.initialize_weights()
            return {name: model.get_buffer(name) for name in unsaved}
        finally:
            put_buffers_(model, unsaved)


def put_buffers_(model: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Put tensors in the place of the buffers of these names."""
    for name, buffer in buffers.items():
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, buffer)


@contextmanager
def _as_filled(model: nn.Module) -> Iterator[None]:
    """Let every tensor of the model count as filled from a checkpoint, and every module as not yet initialised."""
    marks = [(vars(t), True) for t in (*model.parameters(), *model.buffers())]
    marks += [(vars(module), False) for module in model.modules()]
    before = [fields.get(INITIALIZED) for fields, _ in marks]
    for fields, mark in marks:
        fields[INITIALIZED] = mark
    try:
        yield
    finally:
        for (fields, _), old in zip(marks, before, strict=True):
            fields.pop(INITIALIZED)
            if old is not None:
                fields[INITIALIZED] = old


@contextmanager
def _float32() -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)
