"""Converted layers of transformers attend by our kernel where they would by torch's.

`sdpa`, what transformers takes unless it is told otherwise, is wrapped in its register, and the wrapper looks at the attention
module that calls: ours is for those that hold a layer of ours. So there is no name that a config, a comparison in a model's code or another
process could stumble over, and nothing to undo: a copy, an unpickled model or one that became float again is what its layers are. Who
chose another implementation does not come here.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from mono_quant import kernels
from mono_quant.convert.stored import StoredModule

_NAME = "sdpa"


def wrap_() -> None:
    """Wrap transformers' `sdpa`, unless someone else's has taken its place."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    if ALL_ATTENTION_FUNCTIONS[_NAME] is sdpa_attention_forward:
        AttentionInterface.register(_NAME, wrapped(sdpa_attention_forward))


def wrapped(sdpa: Any) -> Any:
    """Return an attention function that does what `sdpa` of transformers does, by our kernel for layers of ours."""

    @functools.wraps(sdpa)
    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        position_bias: Tensor | None = None,
        **more: Any,
    ) -> tuple[Tensor, None]:
        is_traced = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        # in training a checkpoint runs twice, without gradients and with them, and has to see the same values
        is_ours = not module.training and not dropout and not is_traced
        if is_ours and is_converted(module) and not _asks_for_more(more):
            out = _attend(module, query, key, value, attention_mask, scaling, is_causal, position_bias)
            if out is not None:
                return out.transpose(1, 2), None
        if position_bias is not None:
            # transformers learnt of it later
            more["position_bias"] = position_bias
        result: tuple[Tensor, None] = sdpa(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **more,
        )
        return result

    return forward


def is_converted(module: nn.Module) -> bool:
    """Say whether a module holds a layer of ours, be it under an adapter."""
    for child in module.children():
        if isinstance(child, StoredModule) or isinstance(getattr(child, "base_layer", None), StoredModule):
            return True
    return False


def _asks_for_more(more: dict[str, Any]) -> bool:
    """Say whether `sdpa` is asked for what it refuses, warns of, or keeps in a cache of pages."""
    return bool(more) and (
        more.get("softcap") is not None
        or more.get("cache") is not None
        or bool(more.get("output_attentions"))
    )


def _attend(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    is_causal: bool | None,
    bias: Tensor | None,
) -> Tensor | None:
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = False
    if is_causal and mask is None and q.shape[2] > 1:
        if k.shape[2] < q.shape[2]:
            return None
        # of a static cache that is being filled
        causal, k, v = True, k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]
        bias = None if bias is None else bias[..., : q.shape[2]]
    if bias is not None:
        mask = _biased(bias, mask, q.dtype)
    return kernels.try_attention(q, k, v, mask, causal=causal, scale=scale)


def _biased(bias: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the scores that are added and the mask as one; what is hidden counts as transformers has it."""
    if mask is None:
        return bias
    if mask.dtype is torch.bool:
        return torch.where(mask, bias, torch.finfo(dtype).min)
    return bias + mask
