"""Scales and codes against the reference, over every kind of float32."""

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from coded import DEVICE

from mono_quant.kernels import reference
from mono_quant.kernels.gpu.launch import launch
from mono_quant.kernels.gpu.numerics import code_of, digits_of, magnitude, narrow, scales_of, widen


@triton.jit
def _quantize_row(x_ptr, code_ptr, high_ptr, low_ptr, scale_ptr, K, WIDTH: tl.constexpr, QMAX: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, WIDTH)
    inside = at < K
    x = tl.load(x_ptr + row * K + at, mask=inside, other=0.0).to(tl.float32)
    inverse, scale = scales_of(tl.max(magnitude(x), 0), QMAX)
    code = code_of(x, inverse, QMAX)
    high, low = digits_of(code)
    tl.store(code_ptr + row * K + at, code.to(tl.int16), mask=inside)
    tl.store(high_ptr + row * K + at, high, mask=inside)
    tl.store(low_ptr + row * K + at, low, mask=inside)
    tl.store(scale_ptr + row, scale)


@triton.jit
def _convert(x_ptr, y_ptr, WIDTH: tl.constexpr):
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    tl.store(y_ptr + at, narrow(widen(tl.load(x_ptr + at)), y_ptr.dtype.element_ty))


def hostile_rows(depth=70):
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(64, depth, generator=generator) * torch.logspace(-44, 38, 64).unsqueeze(1)
    rows[0] = 0
    rows[1, 3] = float("nan")
    rows[2, 5] = float("-inf")
    # ties of rounding, and the largest finite number
    rows[3] = torch.arange(depth) - 34.5
    rows[4, :2] = torch.tensor([torch.finfo().max, -torch.finfo().max])
    # on both sides of where a scale would be subnormal
    rows[5], rows[6] = 127 * 2.0**-126, 126.99999 * 2.0**-126
    return rows


@pytest.mark.parametrize("qmax", [127, 2047, 1023])
def test_codes_and_scales_have_the_bits_of_the_reference(qmax):
    x = hostile_rows()
    rows, depth = x.shape
    code = torch.empty(rows, depth, dtype=torch.int16, device=DEVICE)
    high, low = (torch.empty(rows, depth, dtype=torch.int8, device=DEVICE) for _ in range(2))
    scale = torch.empty(rows, device=DEVICE)

    launch(
        _quantize_row,
        (rows,),
        (x.to(DEVICE), code, high, low, scale, depth),
        {"WIDTH": 128, "QMAX": qmax},
        device=scale.device,
    )
    code, high, low, scale = (t.cpu() for t in (code, high, low, scale))

    codes, scales = reference.quantize_tokens(x, qmax)
    assert torch.equal(code, codes.to(torch.int16))
    assert torch.equal(scale.view(torch.int32), scales.view(-1).view(torch.int32)) or torch.equal(
        scale.nan_to_num(-1), scales.view(-1).nan_to_num(-1)
    )
    assert torch.equal(high.int() * 64 + low.int(), codes.int())
    assert low.min() >= 0 and low.max() < 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_and_rounded_as_torch_does_it(dtype):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = torch.empty(2**16, device=DEVICE)
    launch(_convert, (1,), (every.to(DEVICE), wide), {"WIDTH": 2**16}, device=wide.device)
    wide = wide.cpu()
    assert torch.equal(wide.isnan(), every.isnan())
    assert torch.equal(wide.nan_to_num(0.0), every.float().nan_to_num(0.0))

    # each number itself, and ties and their neighbours between it and the next
    step = 2 ** (15 if dtype == torch.bfloat16 else 12)
    bits = every.float().view(torch.int32)
    near = torch.stack([bits + by for by in (0, step, step - 1, step + 1)]).view(torch.float32)
    back = torch.empty(near.shape, dtype=dtype, device=DEVICE)
    launch(_convert, (4,), (near.to(DEVICE), back), {"WIDTH": 2**16}, device=back.device)
    back = back.cpu()
    assert torch.equal(back.isnan(), near.isnan())
    assert torch.equal(back.nan_to_num(0.0), near.to(dtype).nan_to_num(0.0))
