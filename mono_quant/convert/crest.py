"""What rounding activations does to each int8 layer, measured while a model runs.

Every layer gets inputs that are not rounded (the products before it are those of the int8 weights with activations in float), so
that what is measured of one is not the noise of others.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mono_quant import kernels
from mono_quant.convert.fidelity import digits
from mono_quant.convert.int8_layers import Int8Module, layers_with_schemes
from mono_quant.convert.probes import Probe, ProbeError, probing
from mono_quant.convert.untouched import untouched
from mono_quant.planning.suggestion import LayerNoise

# Tokens of one layer whose crest is looked at: a median needs no more.
_TOKENS = 1 << 16


@dataclass
class _Seen:
    """What was seen of one layer so far: sums of squares, and the crests of its tokens."""

    work: int = 0
    signal: float = 0.0
    noise: dict[str, float] = field(default_factory=lambda: dict.fromkeys(kernels.SCHEMES, 0.0))
    crests: list[Tensor] = field(default_factory=list)
    tokens: int = 0

    def take(self, crests: Tensor, work: int, exact: Tensor, product: Callable[[str], Tensor]) -> None:
        """Count one product: `exact` with activations in float, `product` with those of a scheme."""
        self.work += work
        room = max(0, _TOKENS - self.tokens)
        self.crests.append(crests.flatten()[:room])
        self.tokens += crests.numel()
        wide = exact.double()
        self.signal += float(wide.square().sum())
        for scheme in self.noise:
            self.noise[scheme] += float((product(scheme).double() - wide).square().sum())


def measure_layers(model: nn.Module, probe: Probe) -> list[LayerNoise]:
    """Run a converted model and measure every layer that quantizes its activations.

    Args:
        model: with int8 layers; afterwards it is what it was.
        probe: the inputs.

    Returns:
        What was measured, in the order of the model; layers that did not run are left out.

    Raises:
        ProbeError: the model does not run on these inputs.
    """
    with (
        probing(f"the model did not run on {probe.name}"),
        untouched(model, probe),
        torch.no_grad(),
        _watched(model) as seen,
    ):
        model.eval()
        model(*probe.args, **probe.kwargs)
    schemes = {name: layer.activations for name, layer in layers_with_schemes(model).items()}
    wrong = next((name for name, found in seen.items() if not isfinite(found.signal)), None)
    if wrong is not None:
        raise ProbeError(f"the output of {wrong} is not finite on {probe.name}")
    return [_noise(name, schemes[name], found) for name, found in seen.items() if found.signal]


@contextmanager
def _watched(model: nn.Module) -> Iterator[dict[str, _Seen]]:
    """Let the int8 layers of a model compute with activations in float, and note what schemes would make of them."""
    found: dict[str, _Seen] = {}
    with ExitStack() as stack:
        for name, layer in layers_with_schemes(model).items():
            seen = found[name] = _Seen()
            for module in layer.modules():
                if isinstance(module, Int8Module):
                    products = {"multiply": partial(_multiply, seen), "convolve": partial(_convolve, seen)}
                    stack.enter_context(module.answering(**products))
        yield found


def _multiply(seen: _Seen, x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    codes = weight.float() * weight_scale
    exact = F.linear(_exactly(x), _exactly(codes)).float()
    work = x.shape[:-1].numel() * weight.numel()
    seen.take(
        _crest(x.float().abs().amax(-1), x.float().square().sum(-1), x.shape[-1]),
        work,
        exact,
        lambda scheme: kernels.int8_linear(x.float(), weight, weight_scale, None, scheme),
    )
    return (exact if bias is None else exact + bias.float()).to(x.dtype)


def _convolve(
    seen: _Seen,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    codes = weight.float() * weight_scale.view(-1, 1, 1, 1)
    exact = F.conv2d(_exactly(x), _exactly(codes), None, stride, padding, dilation, groups).float()
    work = exact.numel() * weight.shape[1:].numel()
    # the largest value and the energy of each receptive field, from those of its pixels
    pixels = x.float().view(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
    field_of = partial(
        F.unfold, kernel_size=weight.shape[2:], dilation=dilation, padding=padding, stride=stride
    )
    largest = field_of(pixels.abs().amax(2).flatten(0, 1).unsqueeze(1)).amax(1)
    energy = field_of(pixels.square().sum(2).flatten(0, 1).unsqueeze(1)).sum(1)
    how = (stride, padding, dilation, groups)
    seen.take(
        _crest(largest, energy, weight.shape[1:].numel()),
        work,
        exact,
        lambda scheme: kernels.int8_conv(x.float(), weight, weight_scale, None, *how, scheme),
    )
    return (exact if bias is None else exact + bias.float().view(-1, 1, 1)).to(x.dtype)


def _exactly(x: Tensor) -> Tensor:
    """Return floats in a dtype in which the device multiplies them as they are: on CUDA float32 may be cut to 10 bits (TF32)."""
    return x.double() if x.device.type == "cuda" else x.float()


def _crest(largest: Tensor, energy: Tensor, size: int) -> Tensor:
    """Return the largest magnitude over the root mean square of tokens of `size` values, of those that are not all zero."""
    rms = (energy / size).sqrt()
    return (largest / rms)[rms > 0]


def _noise(name: str, scheme: str, seen: _Seen) -> LayerNoise:
    crests = torch.cat(seen.crests).double()
    median, high = (float(crests.quantile(q)) if crests.numel() else 0.0 for q in (0.5, 0.99))
    errors: dict[str, Any] = {
        s: digits((noise / seen.signal) ** 0.5) or 0.0 for s, noise in seen.noise.items()
    }
    return LayerNoise(name, scheme, seen.work, digits(median) or 0.0, digits(high) or 0.0, errors)
