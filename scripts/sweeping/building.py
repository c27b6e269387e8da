"""Building the model of a class: its small config, and random weights that every layer shows in the output."""

from typing import Any

import torch
from torch import Tensor, nn

from sweeping.shrinking import shrunk
from sweeping.special import FIELDS


def build(kind: str, name: str) -> nn.Module:
    """Return a small model of a class in evaluation mode, the same every time.

    Args:
        kind: its model type.
        name: of the class in transformers.
    """
    import transformers  # noqa: PLC0415

    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model: nn.Module = cls(small_config(kind, cls)).eval()
    enliven_(model)
    return model


def small_config(kind: str, cls: type[Any]) -> Any:
    """Return a small config for a model class, which may be a part of the config that the model type names."""
    from transformers import CONFIG_MAPPING  # noqa: PLC0415

    special = FIELDS.get(cls.__name__, FIELDS.get(kind, {}))
    return shrunk((cls.config_class or CONFIG_MAPPING[kind])(), special() if callable(special) else special)


@torch.no_grad()
def enliven_(model: nn.Module) -> None:
    """Move every weight away from what it starts as: layers that start as zero or one would hide their errors.

    Matrices get a gain of about one half; everything else changes by a few per cent of itself, so that what has a sign or a
    range (variances, decays) keeps it.
    """
    generator = torch.Generator().manual_seed(1)
    for tensor in [*model.parameters(), *_saved_buffers(model)]:
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        noise = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        if isinstance(tensor, nn.Parameter) and tensor.dim() > 1:
            tensor += noise * 0.5 / tensor[0].numel() ** 0.5
        elif not bool(tensor.any()):
            tensor += 0.02 * noise
        else:
            tensor *= 1 + 0.05 * noise.clamp(-2, 2)


def _saved_buffers(model: nn.Module) -> list[Tensor]:
    state = model.state_dict(keep_vars=True)
    return [buffer for name, buffer in model.named_buffers() if name in state]
