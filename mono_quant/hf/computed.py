"""What a transformers model computes for itself when it is built: tables and scales that no checkpoint holds, most of them buffers."""

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
        left: names of tensors that checkpoints may have, and one did not: they are returned too.

    Raises:
        RuntimeError, and whatever else the code of the class raises: it cannot be initialised without its weights.
    """
    model: Any = skeleton
    saved = model.state_dict(keep_vars=True)
    unsaved = {name: buffer for name, buffer in model.named_buffers() if name not in saved}
    unsaved |= {name: saved[name] for name in left if name in saved}
    with _as_filled(model), torch.device("cpu"), _float32(), torch.random.fork_rng(devices=[]):
        try:
            # a value that shows where nothing is computed
            put_tensors_(model, {name: torch.full_like(b, 77, device="cpu") for name, b in unsaved.items()})
            model.initialize_weights()
            return {name: getattr(*_place(model, name)).detach() for name in unsaved}
        finally:
            put_tensors_(model, unsaved)


def put_tensors_(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors in the place of the parameters and buffers of these names."""
    for name, tensor in tensors.items():
        owner, last = _place(model, name)
        is_plain = last in dict(owner.named_parameters(recurse=False)) and not isinstance(
            tensor, nn.Parameter
        )
        setattr(
            owner,
            last,
            nn.Parameter(tensor, requires_grad=tensor.is_floating_point()) if is_plain else tensor,
        )


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, last = name.rpartition(".")
    return model.get_submodule(owner), last


def put_buffers_(model: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Put tensors in the place of the buffers of these names."""
    for name, buffer in buffers.items():
        setattr(*_place(model, name), buffer)


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
