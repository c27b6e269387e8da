"""Attention on CPU, in float32 arithmetic, by a kernel of our own; whatever it is not made for goes to torch.

softmax(scale * q k^T + mask) v, with the same bits for every instruction set, thread count and batch. A query's result does
not depend on other queries, nor on keys that it does not see: a token has the bits in a decode step that it has in a
prefill, as long as hidden values are finite.
"""

import math
import struct

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from mono_quant.errors import InputError
from mono_quant.kernels import pool
from mono_quant.kernels.choice import active
from mono_quant.kernels.cpu import Cpu
from mono_quant.kernels.watching import is_followed, wants_gradient

# `Attention` of csrc/attention.h.
_CALL = struct.Struct("=10q" + 3 * "Q4q" + "qQ4q" + "2qd" + "Q4q")
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# What outputs of the kernel are like.
_FLOAT = torch.empty(0, dtype=torch.float32, device="cpu")
_NONE = 0
_KINDS = {torch.float32: 1, torch.bool: 2}
_NO_STEPS = (0, 0, 0, 0)
WIDEST_HEAD = 256


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Let each query attend to the keys that it may see.

    Args:
        q: floating [B, H, L, D].
        k: [B, Hkv, S, D] in the dtype of `q`; H / Hkv heads of queries in a row share one of keys.
        v: [B, Hkv, S, Dv], likewise.
        mask: bool, true where a query may see a key, or float, added to the scores; broadcasts to [B, H, L, S].
        causal: the queries are the last L of S positions, and none sees a key behind its own.
        scale: of the scores; D ** -0.5 when not given.
        window: a query sees so many keys at most, its own the last of them; only with `causal`.

    Returns:
        [B, H, L, Dv], which lies in memory as [B, L, H, Dv]. A query that may see nothing gets zeros.

    Raises:
        InputError: the shapes do not go together, or there is a window without `causal`.
    """
    if window is not None and (not causal or window < 1):
        raise InputError(
            f"window={window} needs causal=True and at least one key; leave it out to see all keys"
        )
    out = try_attention(q, k, v, mask, causal=causal, scale=scale, window=window)
    return by_torch(q, k, v, mask, causal, scale, window) if out is None else out


def try_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor | None:
    """Do what `attention` does where our own kernel can; None where torch has to, for callers with a way of their own."""
    if _is_plain(q, k, v, mask):
        return native_attention(active.cpu, q, k, v, mask, causal, scale, window)
    if _is_captured(q, k, v, mask):
        captured: Tensor = torch.ops.mono_quant.attention(q, k, v, mask, causal, scale, window)
        return captured
    return None


def native_attention(
    cpu: Cpu | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    window: int | None,
) -> Tensor | None:
    """Attend by our own kernel; None where it has no answer."""
    dtype = q.dtype
    if cpu is None or not k.dtype is v.dtype is dtype or not (q.is_cpu and k.is_cpu and v.is_cpu):
        return None
    if dtype not in _DTYPES or not q.dim() == k.dim() == v.dim() == 4:
        return None
    batch, heads, queries, size = q.shape
    key_batch, key_heads, keys, key_size = k.shape
    value_batch, value_heads, values, width = v.shape
    if (
        not batch == key_batch == value_batch
        or key_heads != value_heads
        or keys != values
        or size != key_size
    ):
        return None
    if not 0 < size <= WIDEST_HEAD or not 0 < width <= WIDEST_HEAD or key_heads == 0 or heads % key_heads:
        return None
    kind, pointer = _NONE, 0
    steps: tuple[int, ...] = _NO_STEPS
    if mask is not None:
        if dtype is not torch.float32 and mask.dtype is dtype:
            mask = mask.float()
        kind = _KINDS.get(mask.dtype, _NONE)
        if kind == _NONE or not mask.is_cpu or mask.dim() > 4:
            return None
        # dense along the keys; the other dimensions may be one element seen many times
        if mask.shape[-1] != keys or mask.stride(-1) != 1 or mask.is_neg():
            mask = mask.expand(*mask.shape[:-1], keys).resolve_neg().contiguous()
        mask = mask.expand(batch, heads, queries, keys)
        pointer, steps = mask.data_ptr(), mask.stride()
    q_steps, k_steps, v_steps = q.stride(), k.stride(), v.stride()
    if not q_steps[3] == k_steps[3] == v_steps[3] == 1 or q.is_neg() or k.is_neg() or v.is_neg():
        q, k, v = (x.resolve_neg().contiguous() for x in (q, k, v))
        q_steps, k_steps, v_steps = q.stride(), k.stride(), v.stride()
    row = heads * width
    out = pool.empty((batch, queries, heads, width), _FLOAT).transpose(1, 2)
    call = _CALL.pack(
        cpu.isa, torch.get_num_threads(), _DTYPES[dtype], batch, heads, key_heads, queries, keys, size, width,
        q.data_ptr(), *q_steps,
        k.data_ptr(), *k_steps, v.data_ptr(), *v_steps, kind, pointer, *steps, causal, window or 0,
        size**-0.5 if scale is None else scale, out.data_ptr(), queries * row, width, row, 1,
    )  # fmt: skip
    if cpu.attention(call):
        return None
    return out if dtype is torch.float32 else out.to(dtype)


def by_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Attend by torch, for gradients, transforms, other devices and dtypes.

    Raises:
        InputError: the shapes do not go together.
    """
    # sizes are tensors then, and asking for them would fix them
    traced = torch._C._get_tracing_state() is not None
    if not traced:
        _check(q, k, v)
    queries, keys = q.shape[2], k.shape[2]
    # torch counts from the first key instead of the last
    by_flag = causal and mask is None and window is None and not traced and queries == keys
    if causal and not by_flag:
        mask = _merged(_past(queries, keys, window, q.device), mask)
    out = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=by_flag, scale=scale, enable_gqa=traced or q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _past(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Return [L, S], true for the keys that are at or before a query, and within its window."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def _merged(visible: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return visible
    if mask.dtype is torch.bool:
        return visible & mask
    return torch.where(visible, mask, -math.inf)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    fits = q.dim() == k.dim() == v.dim() == 4 and k.shape[:3] == v.shape[:3] and q.shape[3] == k.shape[3]
    if not fits or q.shape[0] != k.shape[0] or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        shapes = ", ".join(str(list(t.shape)) for t in (q, k, v))
        raise InputError(
            f"attention takes q [B, H, L, D], k [B, Hkv, S, D] and v [B, Hkv, S, Dv] with H a multiple of Hkv, not {shapes}"
        )


def _is_plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Say whether nobody but the CPU looks at this call."""
    return (
        not is_followed()
        and type(q) is type(k) is type(v) is Tensor
        and not wants_gradient(q, k, v, mask)
        # torch would compute in another dtype then
        and not torch.is_autocast_enabled("cpu")
    )


def _is_captured(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Say whether a compiler or a mode looks that can take an op of ours, and one would pay."""
    compiling = torch.compiler.is_compiling()
    if not compiling and (torch._C._len_torch_dispatch_stack() == 0 or _is_differentiated()):
        return False
    if not compiling and torch._C._get_tracing_state() is not None:
        return False
    if q.dtype not in _DTYPES or q.device.type != "cpu" or wants_gradient(q, k, v, mask):
        return False
    fits = q.dim() == k.dim() == v.dim() == 4 and q.shape[0] == k.shape[0] and k.shape[:3] == v.shape[:3]
    return fits and q.shape[3] == k.shape[3] <= WIDEST_HEAD and q.shape[1] % k.shape[1] == 0


def _is_differentiated() -> bool:
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu")
    )


@torch.library.custom_op("mono_quant::attention", mutates_args=())
def _attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    window: int | None,
) -> Tensor:
    out = native_attention(active.cpu, q, k, v, mask, causal, scale, window)
    return by_torch(q, k, v, mask, causal, scale, window) if out is None else out


@_attention_op.register_fake
def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    window: int | None,
) -> Tensor:
    _check(q, k, v)
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
