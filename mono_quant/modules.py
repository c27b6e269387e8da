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
from torch.nn import functional as F

from mono_quant import kernels
from mono_quant.numerics import RowCodes, dequantize_rows


class Int8Module(nn.Module):
    """What all int8 layers share: where codes and scales live and how they survive casts."""

    # transformers re-initialises modules that do not carry this mark.
    _is_hf_initialized = True
    # Kernels read rows of length K, one per output: True where the float parameter has them as columns.
    transposed = False

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        # Follows `.to(dtype)`, so that a dequantized weight has the dtype a float weight would have.
        self.register_buffer("_float", torch.empty(0, dtype=dtype), persistent=False)

    @property
    def float_dtype(self) -> torch.dtype:
        """The dtype a dequantized weight has."""
        return self.get_buffer("_float").dtype

    def _put(self, name: str, shape: torch.Size | tuple[int, ...], encoded: RowCodes | None) -> None:
        """Register codes and scales for the float parameter `name` of `shape`; on meta without `encoded`."""
        if encoded is None:
            rows = shape[:-1] if len(shape) == 3 and isinstance(self, Int8Experts) else (self._rows(shape),)
            matrix = torch.empty(shape, dtype=torch.int8, device="meta")
            scale = torch.empty(*rows, 1, dtype=torch.float32, device="meta")
        else:
            matrix, scale = self._to_parameter_shape(encoded.codes, shape), encoded.scale
            if isinstance(self, Int8Experts):
                scale = scale.view(*shape[:-1], 1)
        # Not `register_parameter`: it refuses names that the class answers itself (the dequantizing property).
        self._parameters[name] = nn.Parameter(matrix, requires_grad=False)
        self._parameters[f"{name}_scale"] = nn.Parameter(scale, requires_grad=False)

    def _rows(self, shape: torch.Size | tuple[int, ...]) -> int:
        return shape[-1] if self.transposed else shape[0]

    def _to_parameter_shape(self, codes: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
        return codes.t() if self.transposed else codes.view(shape)

    def codes(self, name: str = "weight") -> Tensor:
        """Return the int8 matrix [N, K] behind the parameter `name`, without a copy."""
        codes = self._parameters[name]
        assert codes is not None
        if codes.dtype != torch.int8:
            # accelerate's offload hooks cast to the dtype that `.weight` shows; codes are exact in all of them
            codes = codes.to(torch.int8)  # type: ignore[assignment]
        return codes.t() if self.transposed else codes.flatten(1)

    def scale(self, name: str = "weight") -> Tensor:
        """Return the fp32 scales [N, 1] of the parameter `name`."""
        scale = self._parameters[f"{name}_scale"]
        assert scale is not None
        return scale

    def dequantize(self, name: str = "weight") -> Tensor:
        """Return the float parameter that the codes of `name` stand for, in its original shape."""
        shape = self._parameters[name].shape  # type: ignore[union-attr]
        return self._to_parameter_shape(
            dequantize_rows(self.codes(name), self.scale(name), self.float_dtype), shape
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        scales = {n: p.data for n, p in self._parameters.items() if n.endswith("_scale") and p is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in scales.items():
            after = self._parameters[name]
            if after is not None and after.dtype != torch.float32:
                # a scale in half precision would move every weight of its row
                after.data = before.to(after.device)
        return self


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

    transposed = True

    def __init__(self, source: nn.Module, encoded: RowCodes | None) -> None:
        super().__init__(source.weight, source.bias, encoded)  # type: ignore[arg-type]
        self.nx, self.nf = self.weight.shape

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out] in the dtype of `x`."""
        return kernels.int8_linear(x, self.codes(), self.scale(), self.bias)

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}"


class _Int8Conv(_Int8Weight):
    def __init__(self, source: nn.Conv1d | nn.Conv2d, encoded: RowCodes | None) -> None:
        super().__init__(source.weight, source.bias, encoded)
        for name in (
            "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"
        ):  # fmt: skip
            setattr(self, name, getattr(source, name))
        # The sizes that F.pad takes, last dimension first; nn.Conv keeps them for `same` and the padding modes.
        self._pad = list(vars(source)["_reversed_padding_repeated_twice"])

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str

    def _padded(self, input: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        if self.padding_mode != "zeros":
            return F.pad(input, self._pad, mode=self.padding_mode), (0,) * len(self.kernel_size)
        if isinstance(self.padding, str):
            # `same` may pad one side more than the other
            return F.pad(input, self._pad), (0,) * len(self.kernel_size)
        return input, self.padding

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, "
            f"bias={self.bias is not None}, padding_mode={self.padding_mode!r}"
        )


class Int8Conv2d(_Int8Conv):
    """`nn.Conv2d` with int8 weights; each receptive field is quantized as one token."""

    def forward(self, input: Tensor) -> Tensor:
        """Map [B, in, H, W] or [in, H, W] to the convolution's output in the dtype of `input`."""
        x, padding = self._padded(input if input.dim() == 4 else input.unsqueeze(0))
        out = kernels.int8_conv(
            x,
            self.codes(),
            self.scale(),
            self.bias,
            self.kernel_size,
            self.stride,
            padding,
            self.dilation,
            self.groups,
        )
        return out if input.dim() == 4 else out.squeeze(0)


class Int8Conv1d(_Int8Conv):
    """`nn.Conv1d` with int8 weights; each receptive field is quantized as one token."""

    def forward(self, input: Tensor) -> Tensor:
        """Map [B, in, L] or [in, L] to the convolution's output in the dtype of `input`."""
        x, padding = self._padded(input if input.dim() == 3 else input.unsqueeze(0))
        out = kernels.int8_conv(
            x.unsqueeze(2),
            self.codes(),
            self.scale(),
            self.bias,
            (1, *self.kernel_size),
            (1, *self.stride),
            (0, *padding),
            (1, *self.dilation),
            self.groups,
        ).squeeze(2)
        return out if input.dim() == 3 else out.squeeze(0)


class Int8Embedding(_Int8Weight):
    """`nn.Embedding` with int8 rows."""

    def __init__(self, source: nn.Embedding, encoded: RowCodes | None) -> None:
        super().__init__(source.weight, None, encoded)
        self.num_embeddings, self.embedding_dim = source.num_embeddings, source.embedding_dim
        self.padding_idx = source.padding_idx

    def forward(self, input: Tensor) -> Tensor:
        """Map integer indices [...] to rows [..., D] in the dtype the table had."""
        return kernels.int8_embedding(input, self.codes(), self.scale(), self.float_dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


class Int8Experts(Int8Module):
    """The fused experts of transformers 5: `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I].

    Runs one int8 product per expert that got tokens, with the signature of the module it replaces.
    """

    def __init__(self, source: nn.Module, encoded: dict[str, RowCodes] | None) -> None:
        gate_up, down = source.gate_up_proj, source.down_proj
        assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)
        super().__init__(gate_up.dtype)
        self._put("gate_up_proj", gate_up.shape, None if encoded is None else encoded["gate_up_proj"])
        self._put("down_proj", down.shape, None if encoded is None else encoded["down_proj"])
        self.num_experts = gate_up.shape[0]
        self.act_fn = source.act_fn

    def codes(self, name: str = "gate_up_proj") -> Tensor:
        """Return the int8 codes [E, N, K] of the parameter `name`."""
        codes = self._parameters[name]
        assert codes is not None
        return codes if codes.dtype == torch.int8 else codes.to(torch.int8)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Mix the experts' outputs.

        Args:
            hidden_states: [T, H].
            top_k_index: integer [T, k], the experts of each token; `num_experts` marks an empty slot.
            top_k_weights: [T, k].

        Returns:
            [T, H] in the dtype of `hidden_states`.
        """
        out = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, slot = torch.where(top_k_index == expert)
            if token.numel() == 0:
                continue
            gate, up = self._project("gate_up_proj", expert, hidden_states[token]).chunk(2, dim=-1)
            y = self._project("down_proj", expert, self.act_fn(gate) * up)  # type: ignore[operator]
            y = y * top_k_weights[token, slot, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out

    def _project(self, name: str, expert: int, x: Tensor) -> Tensor:
        return kernels.int8_linear(x, self.codes(name)[expert], self.scale(name)[expert], None)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}"


class Int8MultiheadAttention(Int8Module):
    """`nn.MultiheadAttention` with int8 projections: `in_proj_weight` [3E, E] and `out_proj`.

    For the plain form only: equal query, key and value sizes, no `bias_k`/`bias_v`, no `add_zero_attn`.
    """

    # The fused float path of nn.TransformerEncoderLayer reads the weights itself unless this is False.
    _qkv_same_embed_dim = False

    def __init__(self, source: nn.MultiheadAttention, encoded: dict[str, RowCodes] | None) -> None:
        weight = source.in_proj_weight
        assert weight is not None
        super().__init__(weight.dtype)
        self._put("in_proj_weight", weight.shape, None if encoded is None else encoded["in_proj_weight"])
        self.register_parameter("in_proj_bias", source.in_proj_bias)
        self.out_proj = Int8Linear(source.out_proj, None if encoded is None else encoded["out_proj.weight"])
        self.embed_dim, self.num_heads, self.head_dim = source.embed_dim, source.num_heads, source.head_dim
        self.batch_first, self.dropout = source.batch_first, source.dropout

    @property
    def in_proj_weight(self) -> Tensor:
        """The dequantized input projection, float [3E, E]."""
        return self.dequantize("in_proj_weight")

    in_proj_bias: nn.Parameter | None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as `nn.MultiheadAttention.forward` does; see there for shapes and masks."""
        if is_causal and attn_mask is None:
            raise ValueError(
                "is_causal=True needs attn_mask as well, as in nn.MultiheadAttention; pass the causal mask"
            )
        batched = query.dim() == 3
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = self._project_in(query, key, value)
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        mask = self._mask(key_padding_mask, attn_mask, q)
        out, weights = self._attend(q, k, v, mask, need_weights)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _project_in(self, *inputs: Tensor) -> list[Tensor]:
        """Project three inputs [B, L, E] to heads [B, heads, L, head_dim]."""
        codes, scale, size = self.codes("in_proj_weight"), self.scale("in_proj_weight"), self.embed_dim
        heads = []
        for i, x in enumerate(inputs):
            rows = slice(i * size, (i + 1) * size)
            bias = None if self.in_proj_bias is None else self.in_proj_bias[rows]
            y = kernels.int8_linear(x, codes[rows], scale[rows], bias)
            heads.append(y.reshape(*y.shape[:2], self.num_heads, self.head_dim).transpose(1, 2))
        return heads

    def _mask(self, padding: Tensor | None, attention: Tensor | None, q: Tensor) -> Tensor | None:
        """Merge both masks into one additive mask that broadcasts to [B, heads, L, S]."""
        merged = None
        if attention is not None:
            merged = _additive(attention, q.dtype)
            if merged.dim() == 3:
                merged = merged.reshape(q.shape[0], self.num_heads, *merged.shape[1:])
        if padding is not None:
            extra = _additive(padding, q.dtype)[:, None, None, :]
            merged = extra if merged is None else merged + extra
        return merged

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            return F.scaled_dot_product_attention(q, k, v, mask, dropout), None
        scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
        if mask is not None:
            scores = scores + mask
        weights = F.dropout(scores.softmax(dim=-1), dropout)
        return weights @ v, weights

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, float("-inf"))
    return mask.to(dtype)
