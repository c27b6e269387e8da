"""Values of a row, each from what lies in its own place: as they are, or through an activation and times another value."""

import triton
import triton.language as tl

from mono_quant.kernels.gpu.numerics import narrow, widen

ACTS = ("gelu", "gelu_tanh", "silu", "relu")


@triton.jit
def act_of(x, ACT: tl.constexpr):
    """Return an activation of fp32 values as fp32; of NaN and infinities what the formula gives."""
    if ACT == "gelu":
        y = x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # (1 + tanh(u)) / 2 is the logistic function of 2 u, and without its cancellation
        y = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * (x * x * x))))
    elif ACT == "silu":
        y = x / (1.0 + tl.exp(-x))
    else:
        tl.static_assert(ACT == "relu")
        y = tl.where(x < 0.0, 0.0, x)
    return y


@triton.jit
def load_values(x_ptr, x_at, up_ptr, up_at, inside, ACT: tl.constexpr):
    """Return x, act(x), or act(x) * up where `up_ptr` is not None, in the dtype of x; 0 outside.

    Each operation is rounded to that dtype, as torch rounds their composition.
    """
    y = tl.load(x_ptr + x_at, mask=inside, other=0.0)
    if ACT is not None:
        y = narrow(act_of(widen(y), ACT), y.dtype)
    if up_ptr is not None:
        y = narrow(widen(y) * widen(tl.load(up_ptr + up_at, mask=inside, other=0.0)), y.dtype)
    return y
