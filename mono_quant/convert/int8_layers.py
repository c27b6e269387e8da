"""The int8 layers that take the place of float ones.

Each keeps its codes under the name and in the shape of the float parameter it replaces (`weight`, int8) with the
scales beside it (`weight_scale`, fp32 [N, 1]), as plain Parameters without gradient. Reading the attribute
`.weight` gives the dequantized weight, so that code which looks at a layer's weight, its dtype or its device
keeps working; the codes are in the state dict, and in `codes("weight")`. `forward` writes no attribute.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mono_quant import kernels
from mono_quant.convert.forwards import AttentionForward, ConvForward, ExpertsForward, StoredModule
from mono_quant.kernels.weights import RowCodes, dequantize_rows
from mono_quant.planning.kinds import as_rows, from_rows, rows_of


class Int8Module(StoredModule):
    """What all int8 layers share: where codes and scales live and how they survive casts.

    Attributes:
        kind: of layer, as `planning.kinds` has it; says which axis of a weight is a row.
    """

    kind: str

    def _put(self, name: str, shape: torch.Size, encoded: RowCodes | None) -> None:
        """Register codes and scales for the float parameter `name` of `shape`; on meta without `encoded`."""
        scales = (*rows_of(shape, self.kind), 1)
        if encoded is None:
            matrix = torch.empty(shape, dtype=torch.int8, device="meta")
            scale = torch.empty(scales, dtype=torch.float32, device="meta")
        else:
            matrix, scale = from_rows(encoded.codes, shape, self.kind), encoded.scale.view(scales)
        # Not `register_parameter`: it refuses names that the class answers itself (the dequantizing property).
        self._parameters[name] = nn.Parameter(self._in_kernel_order(matrix), requires_grad=False)
        self._parameters[f"{name}_scale"] = nn.Parameter(scale, requires_grad=False)

    def _in_kernel_order(self, codes: Tensor) -> Tensor:
        """Return codes of the same shape in the memory order that the kernels read without a copy: row after row."""
        return from_rows(as_rows(codes, self.kind).contiguous(), codes.shape, self.kind)

    def settle_(self) -> None:
        """Put codes that were assigned from outside into the memory order of the kernels."""
        for name, codes in self._parameters.items():
            if codes is not None and f"{name}_scale" in self._parameters:
                codes.data = self._in_kernel_order(codes.data)

    def codes(self, name: str = "weight") -> Tensor:
        """Return the int8 matrix [N, K] behind the parameter `name`."""
        held = self._parameters[name]
        assert held is not None
        return as_rows(int8_values(held), self.kind)

    def scale(self, name: str = "weight") -> Tensor:
        """Return the fp32 scales [N, 1] of the parameter `name`."""
        scale = self._parameters[f"{name}_scale"]
        assert scale is not None
        return scale

    def dequantize(self, name: str = "weight") -> Tensor:
        """Return the float parameter that the codes of `name` stand for, in its original shape."""
        shape = self._parameters[name].shape  # type: ignore[union-attr]
        rows = dequantize_rows(self.codes(name), self.scale(name), self.float_dtype)
        return from_rows(rows, shape, self.kind)

    def _product(self, x: Tensor, name: str, rows: int | slice, bias: Tensor | None) -> Tensor:
        return kernels.int8_linear(x, self.codes(name)[rows], self.scale(name)[rows], bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        scales = {n: p.data for n, p in self._parameters.items() if n.endswith("_scale") and p is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in scales.items():
            after = self._parameters[name]
            if after is not None and after.dtype != torch.float32:
                # a scale in half precision would move every weight of its row
                after.data = before.to(after.device)
        return self


def int8_values(codes: Tensor) -> Tensor:
    """Return codes as int8: accelerate's offload hooks cast them to the dtype that `.weight` shows, all of which hold them."""
    return codes if codes.dtype == torch.int8 else codes.to(torch.int8)


class _Int8Weight(Int8Module):
    """An int8 layer with the one parameter `weight` and perhaps a bias."""

    def __init__(self, weight: Tensor, bias: Tensor | None, encoded: RowCodes | None) -> None:
        super().__init__(weight.dtype)
        self._put("weight", weight.shape, encoded)
        self.bias: nn.Parameter | None
        self.register_parameter(
            "bias", bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        )

    @property
    def weight(self) -> Tensor:
        """The dequantized weight: float, in the shape of the layer this one replaced."""
        return self.dequantize("weight")


class Int8Linear(_Int8Weight):
    """`nn.Linear` with int8 weights [out, in]; activations are quantized per token."""

    kind = "linear"

    def __init__(self, source: nn.Linear, encoded: RowCodes | None) -> None:
        super().__init__(source.weight, source.bias, encoded)
        self.in_features, self.out_features = source.in_features, source.out_features

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., in] to [..., out] in the dtype of `input`."""
        return kernels.int8_linear(input, self.codes(), self.scale(), self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )


class Int8TransposedLinear(_Int8Weight):
    """GPT-2's `Conv1D`: a linear layer whose float weight is [in, out]."""

    kind = "transposed_linear"

    def __init__(self, source: nn.Module, encoded: RowCodes | None) -> None:
        super().__init__(source.weight, source.bias, encoded)  # type: ignore[arg-type]
        self.nx, self.nf = self.weight.shape

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out] in the dtype of `x`."""
        return kernels.int8_linear(x, self.codes(), self.scale(), self.bias)

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}"


class _Int8Conv(ConvForward, _Int8Weight):
    def __init__(self, source: nn.Conv1d | nn.Conv2d, encoded: RowCodes | None) -> None:
        super().__init__(source.weight, source.bias, encoded)
        self._take_geometry(source)

    def _in_kernel_order(self, codes: Tensor) -> Tensor:
        return codes.movedim(1, -1).contiguous().movedim(-1, 1)

    def _convolve(
        self,
        x: Tensor,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
    ) -> Tensor:
        held = self._parameters["weight"]
        assert held is not None
        codes = int8_values(held)
        codes = codes if codes.dim() == 4 else codes.unsqueeze(2)
        return kernels.int8_conv(x, codes, self.scale(), self.bias, stride, padding, dilation, self.groups)


class Int8Conv2d(_Int8Conv):
    """`nn.Conv2d` with int8 weights; each receptive field is quantized as one token."""

    kind = "conv2d"


class Int8Conv1d(_Int8Conv):
    """`nn.Conv1d` with int8 weights; each receptive field is quantized as one token."""

    kind = "conv1d"


class Int8Embedding(_Int8Weight):
    """`nn.Embedding` with int8 rows."""

    kind = "embedding"

    def __init__(self, source: nn.Embedding, encoded: RowCodes | None) -> None:
        super().__init__(source.weight, None, encoded)
        self.num_embeddings, self.embedding_dim = source.num_embeddings, source.embedding_dim
        self.padding_idx = source.padding_idx

    def forward(self, input: Tensor) -> Tensor:
        """Map integer indices [...] to rows [..., D] in the dtype the table had."""
        return kernels.int8_embedding(input, self.codes(), self.scale(), self.float_dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


class Int8Experts(ExpertsForward, Int8Module):
    """The fused experts of transformers 5: `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I].

    Runs one int8 product per expert that got tokens.
    """

    kind = "experts"

    def __init__(self, source: nn.Module, encoded: dict[str, RowCodes] | None) -> None:
        gate_up, down = source.gate_up_proj, source.down_proj
        assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)
        super().__init__(gate_up.dtype)
        self._put("gate_up_proj", gate_up.shape, None if encoded is None else encoded["gate_up_proj"])
        self._put("down_proj", down.shape, None if encoded is None else encoded["down_proj"])
        self._take_routing(source, gate_up.shape[0])

    def codes(self, name: str = "gate_up_proj") -> Tensor:
        """Return the int8 codes [E, N, K] of the parameter `name`."""
        codes = self._parameters[name]
        assert codes is not None
        return int8_values(codes)


class Int8MultiheadAttention(AttentionForward, Int8Module):
    """`nn.MultiheadAttention` with int8 projections: `in_proj_weight` [3E, E] and `out_proj`.

    For the plain form only: equal query, key and value sizes, no `bias_k`/`bias_v`, no `add_zero_attn`.
    """

    kind = "attention"

    def __init__(self, source: nn.MultiheadAttention, encoded: dict[str, RowCodes] | None) -> None:
        weight = source.in_proj_weight
        assert weight is not None
        super().__init__(weight.dtype)
        self._put("in_proj_weight", weight.shape, None if encoded is None else encoded["in_proj_weight"])
        self.register_parameter("in_proj_bias", source.in_proj_bias)
        self.out_proj = Int8Linear(source.out_proj, None if encoded is None else encoded["out_proj.weight"])
        self._take_heads(source)

    @property
    def in_proj_weight(self) -> Tensor:
        """The dequantized input projection, float [3E, E]."""
        return self.dequantize("in_proj_weight")
