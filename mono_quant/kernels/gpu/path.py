"""How a call gets to the kernels of a device: what they take, and what becomes of the rest."""

import logging
import subprocess
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar, cast

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from mono_quant.kernels import reference
from mono_quant.kernels.activations import INT8, ActivationScheme
from mono_quant.kernels.cpu import EncodedRows
from mono_quant.kernels.gpu.chains import chain, described
from mono_quant.kernels.gpu.convolution import conv
from mono_quant.kernels.gpu.embedding import embedding
from mono_quant.kernels.gpu.encoding import encode_rows
from mono_quant.kernels.gpu.experts import experts
from mono_quant.kernels.gpu.features import INTERPRETED, INTERPRETER, Features, features_of, refusal
from mono_quant.kernels.gpu.products import multiply
from mono_quant.kernels.gpu.quantize import quantize
from mono_quant.kernels.gpu.replay import Replays
from mono_quant.kernels.inputs import fits
from mono_quant.kernels.steps import Steps

# Compute capabilities on which a prototype of these kernels was held against the reference (gpu.md).
_PROTOTYPED = frozenset({(9, 0)})
# What Triton raises where it cannot compile or load a kernel: no C compiler, no driver, a cache that cannot be written.
_BUILD_ERRORS = (TritonError, RuntimeError, AssertionError, OSError, subprocess.SubprocessError)
_Answer = TypeVar("_Answer")
_logger = logging.getLogger(__name__)


def _unless_failed(method: Callable[..., _Answer | None]) -> Callable[..., _Answer | None]:
    """Give no answer once Triton has failed on the device, and say so when it does; the interpreter's failures are ours."""

    @wraps(method)
    def run(self: "Gpu", *args: Any) -> _Answer | None:
        if self.failure is not None:
            return None
        try:
            return method(self, *args)
        except TritonError as error:
            if INTERPRETED:
                raise
            self.failure = _told(error)
            _logger.warning("int8 kernels are not used on this device any more: %s", self.failure)
            return None

    return run


class Gpu:
    """The kernels on one device. Every method returns None where there is no kernel for its arguments.

    Attributes:
        features: of the device.
        failure: what Triton said when it could not compile a kernel that was needed; from then on no method has an answer.
    """

    def __init__(self, features: Features, device: torch.device) -> None:
        self.features = features
        self.failure: str | None = None
        self._replays = Replays(device)

    @property
    def note(self) -> str:
        """What nobody has tried."""
        if self.features.backend == "interpreter":
            return "interpreted: for tests"
        if self.features.capability in _PROTOTYPED:
            return "unverified: a prototype of these kernels has run on such a device, they have not"
        return "unverified: nobody has run these kernels on such a device"

    @_unless_failed
    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        scheme: ActivationScheme,
    ) -> Tensor | None:
        """Apply an int8 linear layer; see `mono_quant.kernels.int8_linear`."""
        tensors = (x, weight, weight_scale, bias)
        return self._one((_linear, scheme.name), lambda: _linear(*tensors, scheme), *tensors)

    @_unless_failed
    def chain(
        self, x: Tensor, added: Tensor | None, steps: Steps, keep_sum: bool, keep_normed: bool
    ) -> tuple[Tensor, ...] | None:
        """Apply products and what is in front of them; see `mono_quant.kernels.device_chains.run_chain`."""
        what, tensors = described(steps)
        found = self._replays.run(
            (chain, keep_sum, keep_normed, *what),
            lambda: chain(x, added, steps, keep_sum, keep_normed),
            x,
            added,
            *tensors,
        )
        return cast(tuple[Tensor, ...] | None, found)

    @_unless_failed
    def embedding(
        self, indices: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype
    ) -> Tensor | None:
        """Gather and dequantize rows of a table; see `mono_quant.kernels.int8_embedding`."""
        tensors = (indices, weight, weight_scale)
        return self._one((embedding, dtype), lambda: embedding(*tensors, dtype), *tensors)

    @_unless_failed
    def conv(
        self,
        x: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        scheme: ActivationScheme,
    ) -> Tensor | None:
        """Apply an int8 convolution; see `mono_quant.kernels.int8_conv`."""
        tensors, how = (x, weight, weight_scale, bias), (stride, padding, dilation)
        what = (conv, *stride, *padding, *dilation, groups, scheme.name)
        return self._one(what, lambda: conv(*tensors, *how, groups, scheme), *tensors)

    @_unless_failed
    def experts(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        gate_up: Tensor,
        gate_up_scale: Tensor,
        down: Tensor,
        down_scale: Tensor,
        act: str,
        scheme: ActivationScheme,
    ) -> Tensor | None:
        """Mix the outputs of gated experts; see `mono_quant.kernels.int8_experts`."""
        tensors = (hidden_states, top_k_index, top_k_weights, gate_up, gate_up_scale, down, down_scale)
        return self._one((experts, act, scheme.name), lambda: experts(*tensors, act, scheme), *tensors)

    @_unless_failed
    def encode_rows(self, matrix: Tensor, into: tuple[Tensor, Tensor] | None) -> EncodedRows | None:
        """Quantize the rows of a weight; see `mono_quant.kernels.encode_rows`."""
        return encode_rows(matrix, matrix.dtype, into)

    def _one(
        self, what: tuple[Any, ...], call: Callable[[], Tensor | None], first: Tensor, *others: Tensor | None
    ) -> Tensor | None:
        out = self._replays.run(what, call, first, *others)
        return cast(Tensor | None, out)


def _linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, scheme: ActivationScheme
) -> Tensor | None:
    shape, (outputs, depth) = x.shape, weight.shape
    if not shape or shape[-1] != depth or depth == 0 or not fits(x, weight, weight_scale, bias):
        return None
    codes = quantize(x.reshape(x.numel() // depth, depth), scheme)
    out = multiply(codes, weight, weight_scale, bias, x.dtype)
    return None if out is None else out.view(*shape[:-1], outputs)


def kernels_for(device: torch.device) -> tuple[Gpu | None, str | None]:
    """Return the kernels for a device and None, or None and why it has none: a small product is compiled and tried first."""
    if INTERPRETED:
        return None, "TRITON_INTERPRET=1 is set: kernels are interpreted, and only on the CPU"
    try:
        features = features_of(device)
        reason = refusal(features)
        if reason is not None:
            return None, reason
        if not agrees(device, features):
            return None, "a product differs from the reference"
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        # of the device and the program on it, not of Triton
        raise
    except _BUILD_ERRORS as error:
        return None, f"Triton {triton.__version__} failed: {_told(error)}"
    return Gpu(features, device), None


def interpreted() -> tuple[Gpu | None, str | None]:
    """Return the kernels for tensors on the CPU and None, or None and why there are none."""
    if INTERPRETED:
        return Gpu(INTERPRETER, torch.device("cpu")), None
    return None, "it runs on the CPU only where TRITON_INTERPRET=1 is set before the first use of Triton"


def agrees(device: torch.device, features: Features) -> bool:
    """Hold a small product on a device against the reference, bit for bit."""
    # without products of tiles only a few tokens have a kernel
    tokens, outputs, depth = 19 if features.int8_dot else 4, 24, 80
    index = torch.arange(tokens * depth, dtype=torch.float32, device="cpu")
    x = torch.sin(index * index).view(tokens, depth)
    x[0], x[1], x[2, -1] = 1.0, 0.0, float("nan")
    weight = ((torch.arange(outputs * depth, device="cpu") * 37 + 11) % 256 - 128).to(torch.int8)
    weight = weight.view(outputs, depth)
    scale = torch.linspace(0.5, 1.5, outputs, device="cpu").view(outputs, 1)
    bias = torch.linspace(-1.0, 1.0, outputs, device="cpu")
    expected = reference.linear(x, weight, scale, bias, INT8)
    found = _linear(x.to(device), weight.to(device), scale.to(device), bias.to(device), INT8)
    return found is not None and torch.equal(found.cpu().nan_to_num(1e30), expected.nan_to_num(1e30))


def _told(error: BaseException) -> str:
    """Return an error in one line: of what compilers print, the last says what was wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:200]}" if lines else type(error).__name__
