"""Forward passes of more than one product, which int8 and float16 layers share."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mono_quant import kernels
from mono_quant.convert.stored import StoredModule

# What `kernels` calls them; those of transformers by their names below.
_ACTIVATIONS: Mapping[type[nn.Module], str] = {nn.SiLU: "silu", nn.ReLU: "relu"}


class ConvForward(StoredModule):
    """The forward pass of `nn.Conv1d` and `nn.Conv2d`: batches, padding modes, one dimension as two."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str

    def _take_geometry(self, source: nn.Conv1d | nn.Conv2d) -> None:
        for name in (
            "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"
        ):  # fmt: skip
            setattr(self, name, getattr(source, name))
        # The sizes that F.pad takes, last dimension first; nn.Conv keeps them for `same` and the padding modes.
        self._pad = list(vars(source)["_reversed_padding_repeated_twice"])

    def _convolve(
        self,
        x: Tensor,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
    ) -> Tensor:
        """Convolve [B, in, H, W] with zero padding."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """Map [B, in, ...] or [in, ...] to the convolution's output in the dtype of `input`."""
        sizes = len(self.kernel_size)
        kernels.check_input(
            input, type(self).__name__, self.in_channels, axis=-sizes - 1, dims=(sizes + 1, sizes + 2)
        )
        batched = input.dim() == sizes + 2
        x, padding = self._padded(input if batched else input.unsqueeze(0))
        if sizes == 1:
            out = self._convolve(
                x.unsqueeze(2), (1, *self.stride), (0, *padding), (1, *self.dilation)
            ).squeeze(2)
        else:
            out = self._convolve(x, self.stride, padding, self.dilation)
        return out if batched else out.squeeze(0)

    def _padded(self, input: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        if self.padding_mode != "zeros":
            return F.pad(input, self._pad, mode=self.padding_mode), (0,) * len(self.kernel_size)
        if isinstance(self.padding, str):
            # `same` may pad one side more than the other
            return F.pad(input, self._pad), (0,) * len(self.kernel_size)
        return input, self.padding

    def _sizes(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, "
            f"bias={self.bias is not None}, padding_mode={self.padding_mode!r}"
        )


class TransposedForm(StoredModule):
    """GPT-2's `Conv1D`, whose float weight is [in, out]."""

    def _take_size(self, source: nn.Module) -> None:
        _inherit_(type(self), type(source))
        self.nx, self.nf = self.stored("weight").shape

    def __setstate__(self, state: dict[str, Any]) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _inherit_(type(self), Conv1D)

    __repr__ = nn.Module.__repr__

    def _sizes(self) -> str:
        return f"nf={self.nf}, nx={self.nx}"


def _inherit_(cls: type[nn.Module], base: type[nn.Module]) -> None:
    """Put a class among the bases of one of ours once it is there: we import transformers for nobody who does not use it."""
    if not issubclass(cls, base):
        cls.__bases__ = (*cls.__bases__, base)


class ExpertsForward(StoredModule):
    """The forward pass of transformers' fused experts, with the signature of the module it replaces."""

    held = ("gate_up_proj", "down_proj")

    def _take_routing(self, source: nn.Module) -> None:
        self.num_experts, _, self.hidden_size = self.stored("gate_up_proj").shape
        self.act_fn = source.act_fn

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Mix the experts' outputs.

        Args:
            hidden_states: [T, H].
            top_k_index: integer [T, k], the experts of each token; `num_experts` marks an empty slot.
            top_k_weights: [T, k].

        Returns:
            [T, H] in the dtype of `hidden_states`.
        """
        kernels.check_input(hidden_states, type(self).__name__, self.hidden_size)
        routing = (top_k_index, top_k_weights, self.num_experts)
        return kernels.mix_experts(hidden_states, *routing, self._expert)

    def _expert(self, x: Tensor, expert: int) -> Tensor:
        gate, up = self._product(x, "gate_up_proj", expert, None).chunk(2, dim=-1)
        return self._product(self.act_fn(gate) * up, "down_proj", expert, None)  # type: ignore[operator]

    @contextmanager
    def adding(self, weight: str, delta: Callable[[Tensor, int], Tensor]) -> Iterator[None]:
        """Add something to every product with the parameter `weight` while the context lasts: adapters.

        Args:
            weight: one of `held`.
            delta: takes the inputs [T, K] of an expert and its number; returns [T, N].
        """
        product, before = self._product, vars(self).get("_product")

        def both(x: Tensor, name: str, rows: int, bias: Tensor | None) -> Tensor:
            y = product(x, name, rows, bias)
            return y + delta(x, rows).to(y.dtype) if name == weight else y

        vars(self)["_product"] = both
        try:
            yield
        finally:
            if before is None:
                del vars(self)["_product"]
            else:
                vars(self)["_product"] = before

    @property
    def gate_up_proj(self) -> Tensor:
        """The weights of the gate and of what it gates, float [E, 2I, H]."""
        return self.read("gate_up_proj")

    @property
    def down_proj(self) -> Tensor:
        """The weights of the way back, float [E, H, I]."""
        return self.read("down_proj")

    def _sizes(self) -> str:
        return f"num_experts={self.num_experts}"


def activation_of(module: object) -> str:
    """Return what `kernels` calls the function that an activation of torch or transformers computes; empty where it has none."""
    if not isinstance(module, nn.Module) or module._forward_hooks or module._forward_pre_hooks:
        return ""
    if type(module) in _ACTIVATIONS:
        return _ACTIVATIONS[type(module)]
    # by name: transformers is not imported for models that do not come from it
    if type(module).__module__ != "transformers.activations":
        return ""
    if type(module).__name__ == "SiLUActivation":
        return "silu"
    act = getattr(module, "act", None)
    if act is F.gelu:
        return "gelu"
    is_tanh = isinstance(act, partial) and act.func is F.gelu and act.keywords == {"approximate": "tanh"}
    return "gelu_tanh" if is_tanh else ""


class AttentionForward(StoredModule):
    """The forward pass of `nn.MultiheadAttention` in its plain form: equal query, key and value sizes."""

    # The fused float path of nn.TransformerEncoderLayer reads the weights itself unless this is False.
    _qkv_same_embed_dim = False
    held = ("in_proj_weight",)
    in_proj_bias: nn.Parameter | None
    out_proj: nn.Module

    @property
    def in_proj_weight(self) -> Tensor:
        """The input projection, float [3E, E]."""
        return self.read("in_proj_weight")

    def _take_heads(self, source: nn.MultiheadAttention) -> None:
        self.embed_dim, self.num_heads, self.head_dim = source.embed_dim, source.num_heads, source.head_dim
        self.batch_first, self.dropout = source.batch_first, source.dropout

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
        for given in (query, key, value):
            kernels.check_input(given, type(self).__name__, self.embed_dim)
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
        # not a call: nn.MultiheadAttention reads the weight there, and no hook of the projection runs
        out = self.out_proj.forward(out.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _project_in(self, *inputs: Tensor) -> list[Tensor]:
        """Project three inputs [B, L, E] to heads [B, heads, L, head_dim]."""
        size = self.embed_dim
        heads = []
        for i, x in enumerate(inputs):
            rows = slice(i * size, (i + 1) * size)
            bias = None if self.in_proj_bias is None else self.in_proj_bias[rows]
            y = self._product(x, "in_proj_weight", rows, bias)
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
        if not need_weights and self.training:
            return F.scaled_dot_product_attention(q, k, v, mask, dropout), None
        if not need_weights:
            return kernels.attention(q, k, v, mask), None
        scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
        if mask is not None:
            scores = scores + mask
        weights = F.dropout(scores.softmax(dim=-1), dropout)
        return weights @ v, weights

    def _sizes(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, float("-inf"))
    return mask.to(dtype)
