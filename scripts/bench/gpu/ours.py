"""The package's side of a comparison, through its public surface."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import mono_quant
from mono_quant import kernels
from mono_quant.convert import int8_layers
from mono_quant.kernels import reference


def quantized(model: nn.Module, activations: str = "auto", *, inplace: bool = False, **options: Any) -> Any:
    """Return the int8 result of a float model, whatever the size of its layers."""
    asked = {"fidelity": False, "disable_defaults": ("small",), **options}
    return mono_quant.quantize(model, inplace=inplace, activations=activations, **asked)


def layers(shape: tuple[int, int], copies: int, device: torch.device, dtype: torch.dtype) -> nn.ModuleList:
    """Return float layers of N x K with a bias, each with a weight of its own."""
    rows, depth = shape
    made = nn.ModuleList(nn.Linear(depth, rows, device=device, dtype=dtype) for _ in range(copies))
    return made.requires_grad_(False).eval()


def put_scheme_(model: nn.Module, scheme: str) -> None:
    """Let every int8 layer of a model make codes by a scheme."""
    int8_layers.put_schemes_(model, scheme)


def differing(layer: nn.Module, x: Tensor, out: Tensor) -> int:
    """Return how many results of an int8 layer are not those of the reference, on the same device."""
    scheme = kernels.SCHEMES[kernels.activation_scheme(layer.activations, x.device)]
    expected = reference.linear(x, layer.codes(), layer.scale(), layer.bias, scheme)
    return int((out != expected).sum())


@contextmanager
def path(name: str) -> Iterator[None]:
    """Run int8 products of the CPU on another path where a name is given: "triton" is that of a GPU, interpreted."""
    if not name:
        yield
        return
    with kernels.using(path=name):
        yield
