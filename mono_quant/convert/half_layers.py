"""The layers of a float16 model that keep their weight in float16 and compute in float32.

A processor without float16 arithmetic runs a float16 model several times slower than a float32 one. These layers hold
the float16 weight, widen it in registers, and pass float32 on; everything else in the model is small and is float32 in
memory with values that float16 holds. `.half()` gives a model that computes in float16 throughout, for a GPU.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mono_quant import kernels
from mono_quant.convert.forwards import AttentionForward, ExpertsForward, TransposedForm
from mono_quant.convert.stored import StoredModule
from mono_quant.errors import Fp16RangeError, FrozenWeightError

Share = Callable[[Tensor], nn.Parameter]


class HalfModule(StoredModule):
    """A layer that holds float16 weights.

    Outputs follow the dtype of the input; what follows no input is float32, until `.half()` or `.to(dtype)` says otherwise.
    """

    def __init__(self) -> None:
        super().__init__(torch.float32)

    def _hold(self, name: str, parameter: nn.Parameter) -> None:
        # Not `register_parameter`: it refuses names that the class answers itself.
        self._parameters[name] = parameter

    def encode_(self, name: str, weight: Tensor) -> None:
        stored = self.stored(name)
        value = weight.detach().to(stored.dtype)
        if stored.dtype == torch.float16:
            half = kernels.cast_half(weight)
            if half.overflowed:
                raise Fp16RangeError(
                    f"{self._name(name)}: {half.overflowed} values do not fit float16 (largest {float(weight.abs().max()):.6g}, limit "
                    f"65504); convert the float model that has them to int8"
                )
            value = half.value
        # in the memory order of before
        self._hold(name, nn.Parameter(torch.empty_like(stored).copy_(value), requires_grad=False))

    def _take_bias(self, bias: nn.Parameter | None) -> None:
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)

    def _restore(self, name: str) -> Tensor:
        return self.stored(name).to(self.float_dtype)

    def _state_problems(self, given: Mapping[str, Tensor], assign: bool) -> Iterator[str]:
        for name, tensor in given.items():
            own = self.stored(name).dtype
            if assign and tensor.dtype != own or not tensor.is_floating_point():
                yield (
                    f"{name} is {tensor.dtype}, but {type(self).__name__} holds {own}; load it with assign=False, which rounds "
                    f"floating-point values"
                )
            elif lost := _lost(tensor, own):
                yield f"{name} has {lost} values that {own} cannot hold; convert the model that has them (quantize)"

    def _form(self, name: str) -> str:
        return f"{self.stored(name).dtype} values"

    def _product(self, x: Tensor, name: str, rows: int | slice, bias: Tensor | None) -> Tensor:
        return kernels.half_linear(x, self.stored(name)[rows], bias)


def _lost(tensor: Tensor, dtype: torch.dtype) -> int:
    """Count the finite values that are not finite in `dtype`."""
    if tensor.is_meta or tensor.dtype == dtype:
        return 0
    return int((torch.isfinite(tensor) & ~torch.isfinite(tensor.to(dtype))).sum())


class _HalfWeight(HalfModule):
    """A float16 layer with the one parameter `weight`."""

    @property
    def weight(self) -> Tensor:
        """The weight as a tensor of the dtype that the model computes in."""
        return self.read("weight")


class HalfLinear(_HalfWeight, nn.Linear):  # type: ignore[misc, override]
    """`nn.Linear` with float16 weights [out, in]."""

    def __init__(self, source: nn.Linear, share: Share) -> None:
        super().__init__()
        self._hold("weight", share(source.weight))
        self._take_bias(source.bias)
        self.in_features, self.out_features = source.in_features, source.out_features

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., in] to [..., out] in the dtype of `input`."""
        return kernels.half_linear(input, self.stored("weight"), self.bias)

    def _sizes(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )


class HalfTransposedLinear(TransposedForm, _HalfWeight):
    """GPT-2's `Conv1D`: a linear layer whose weight is [in, out]."""

    def __init__(self, source: nn.Module, share: Share) -> None:
        super().__init__()
        weight = source.get_parameter("weight")
        held = share(weight)
        # the kernel reads rows of length `in`
        held.data = held.data.t().contiguous().t()
        self._hold("weight", held)
        self._take_bias(source.get_parameter("bias"))
        self._take_size(source)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out] in the dtype of `x`."""
        return kernels.half_linear(x, self.stored("weight").t(), self.bias)


class HalfEmbedding(_HalfWeight, nn.Embedding):  # type: ignore[override]
    """`nn.Embedding` with rows in float16 or bfloat16."""

    def __init__(self, source: nn.Embedding, share: Share) -> None:
        super().__init__()
        self._hold("weight", share(source.weight))
        self.num_embeddings, self.embedding_dim = source.num_embeddings, source.embedding_dim
        self.padding_idx = source.padding_idx

    def forward(self, input: Tensor) -> Tensor:
        """Map integer indices [...] to rows [..., D] in the dtype that the model computes in."""
        kernels.check_indices(input, type(self).__name__)
        rows = self.stored("weight")
        if rows.requires_grad and rows.dtype != self.float_dtype:
            raise FrozenWeightError(kernels.NO_GRADIENT)
        return F.embedding(input, rows, self.padding_idx).to(self.float_dtype)

    def _sizes(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


class HalfExperts(ExpertsForward, HalfModule):
    """The fused experts of transformers 5: `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I]."""

    def __init__(self, source: nn.Module, share: Share) -> None:
        super().__init__()
        for name in ("gate_up_proj", "down_proj"):
            self._hold(name, share(source.get_parameter(name)))
        self._take_routing(source)


class HalfMultiheadAttention(AttentionForward, HalfModule):
    """`nn.MultiheadAttention` with float16 projections: `in_proj_weight` [3E, E] and `out_proj`."""

    def __init__(self, source: nn.MultiheadAttention, share: Share) -> None:
        super().__init__()
        self._hold("in_proj_weight", share(source.get_parameter("in_proj_weight")))
        self.register_parameter("in_proj_bias", source.in_proj_bias)
        self.out_proj = HalfLinear(source.out_proj, share)
        self._take_heads(source)


# By kind of layer. Convolutions are not among them: nothing here is faster for them than torch's float32 ones.
HALF_LAYERS: Mapping[str, Callable[..., HalfModule]] = {
    "linear": HalfLinear,
    "transposed_linear": HalfTransposedLinear,
    "embedding": HalfEmbedding,
    "experts": HalfExperts,
    "attention": HalfMultiheadAttention,
}


def layer_of(kind: str, dtype: torch.dtype) -> Callable[..., HalfModule] | None:
    """Return what makes a layer that holds weights of `dtype`; None where nothing does.

    A bfloat16 weight is widened as a whole before a product, so that holding it would cost time and memory; a row of a table is not.
    """
    if dtype == torch.bfloat16:
        return HalfEmbedding if kind == "embedding" else None
    return HALF_LAYERS.get(kind) if dtype == torch.float16 else None
