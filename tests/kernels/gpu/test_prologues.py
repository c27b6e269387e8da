"""Norms and activations with codes: float values within bounds of float64, codes and scales exactly those of these values.

e = 2^-24 is the relative error of one fp32 operation; u that of one in the dtype of the inputs.
"""

import itertools
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from coded import DEVICE, assert_codes_of
from torch.nn import functional as F

from mono_quant.kernels.activations import SCHEMES
from mono_quant.kernels.fused import norm as composed_norm
from mono_quant.kernels.gpu.prologues import act_quantize, gate_quantize, norm_quantize

E = 2.0**-24
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# half the distance of subnormal numbers
TINY = {torch.float32: 2.0**-149, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}
FLOATS = tuple(UNIT)
ACTS = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}
# torch's own lose digits to 1 - tanh and 1 - erf, even in float64
EXACT = ACTS | {
    "gelu": lambda x: x / 2 * torch.special.erfc(-x * 0.5**0.5),
    "gelu_tanh": lambda x: x * torch.sigmoid(1.5957691216057308 * (x + 0.044715 * x**3)),
}
EVERY_DTYPE = pytest.mark.parametrize("dtype", FLOATS, ids=str)
NEXT_SCHEME = itertools.cycle(SCHEMES.values())


def normal(rows, depth, dtype, seed, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, depth, generator=generator) * spread).to(dtype).to(DEVICE)


def act_error(act, x):
    """Bound the error of an activation in fp32, for float64 inputs and the tl.exp, tl.erf and division of a GPU."""
    y = EXACT[act](x).abs()
    if act == "relu":
        return 0 * x
    if act == "gelu":
        # erf: its argument is rounded (at most E in its value) and it has two units in the last place
        return 4 * E * x.abs() + 3 * E * y
    # exp(v): |v| units of E by its argument, 3 by ex2.approx; 1 by the sum; 4 by the division
    u = x if act == "silu" else 1.5957691216057308 * (x + 0.044715 * x**3)
    return ((6 if act == "gelu_tanh" else 1) * u.abs() + 9) * E * y


def assert_close_and_coded(found, exact, error, composed, scheme, roundings):
    values = found.values
    dtype = values.dtype
    assert values.shape == composed.shape and dtype == composed.dtype
    rounding = 0 if dtype == torch.float32 else roundings * 1.01 * UNIT[dtype]
    bound = 1.01 * error.cpu() + rounding * exact.abs().cpu() + roundings * TINY[dtype]
    assert ((values.cpu().double() - exact.cpu()).abs() <= bound).all()
    if dtype != torch.float32:
        # a rounding left out, or one too many, would change a quarter of them
        assert (values != composed).float().mean() < 0.02
    assert_codes_of(found.codes, values, scheme)


@EVERY_DTYPE
@pytest.mark.parametrize("act", ACTS)
def test_activations_are_those_of_torch_and_codes_those_of_their_values(act, dtype):
    scheme = next(NEXT_SCHEME)
    x = normal(5, 200, dtype, 1, 1.5)
    found = act_quantize(x, act, scheme, keep=True)
    wide = x.double()
    assert_close_and_coded(found, EXACT[act](wide), act_error(act, wide), ACTS[act](x), scheme, 1)
    alone = act_quantize(x, act, scheme)
    assert alone.values is None and alone.total is None
    assert torch.equal(alone.codes.planes, found.codes.planes)


@EVERY_DTYPE
@pytest.mark.parametrize("act", [*ACTS, None])
def test_gates_are_those_of_torch_and_codes_those_of_their_values(act, dtype):
    scheme = next(NEXT_SCHEME)
    run, exactly = (ACTS[act], EXACT[act]) if act is not None else (torch.clone, torch.clone)
    # as one product leaves them, and in the other order
    both = normal(5, 2 * 130, dtype, 2, 1.5)
    for gate, up in (both.chunk(2, 1), (both[:, 130:], both[:, :130])):
        found = gate_quantize(gate, up, act, scheme, keep=True)
        x, factor = gate.double(), up.double()
        error = 0 * x if act is None else act_error(act, x) * factor.abs()
        exact = exactly(x) * factor
        error = error + E * exact.abs() + (TINY[dtype] * factor.abs() if act is not None else 0)
        assert_close_and_coded(found, exact, error, run(gate) * up, scheme, 2)


@pytest.mark.parametrize("act", ACTS)
def test_what_is_not_finite_or_overflows_is_that_of_torch(act):
    nan, inf = float("nan"), float("inf")
    ends = torch.tensor([[nan, inf, -inf, 1e30, -1e30, 3e38, -3e38, 0.0, -0.0, 100.0, -100.0, 1e-40, -1e-40]])
    for dtype in FLOATS:
        x = ends.to(dtype).to(DEVICE)
        values = act_quantize(x, act, SCHEMES["int8"], keep=True).values
        # its kernel for a CPU makes NaN of gelu(inf), where those for a GPU do not
        cdf = 1 + torch.erf(x.float() * 0.5**0.5)
        wanted = ACTS[act](x) if act != "gelu" else (x.float() * 0.5 * cdf).to(dtype)
        assert torch.equal(values.isnan(), wanted.isnan())
        assert torch.equal(values.nan_to_num(0.0), wanted.nan_to_num(0.0))
        scales = act_quantize(x.t().contiguous(), act, SCHEMES["int8"]).codes.scale[0]
        assert torch.equal(scales.isnan(), ~wanted[0].isfinite())


@pytest.mark.parametrize("act", ["silu", "gelu"])
def test_activations_of_rows_that_no_tile_holds(act):
    scheme, both = SCHEMES["int12"], normal(2, 2 * 17000, torch.bfloat16, 3)
    gate, up = both.chunk(2, 1)
    found = gate_quantize(gate, up, act, scheme, keep=True)
    assert (found.values != ACTS[act](gate) * up).float().mean() < 0.02
    assert_codes_of(found.codes, found.values, scheme)
    found = act_quantize(gate, act, SCHEMES["int8-g128"], keep=True)
    assert_codes_of(found.codes, found.values, SCHEMES["int8-g128"])


def exact_norm(x, kind, weight, bias, epsilon):
    """Return a norm in float64 of `x`, and a bound of the error of one in fp32 that adds in any order."""
    x, depth = x.double(), x.shape[1]
    size = x.abs().mean(1, keepdim=True)
    if kind == "layer":
        # of the mean, and so of each difference
        error = depth * E * size
        x = x - x.mean(1, keepdim=True)
    else:
        error = 0 * size
    factor = (x.square().mean(1, keepdim=True) + epsilon).rsqrt()
    y = x * factor
    error = (error + E * x.abs()) * factor + y.abs() * (error * factor + (depth / 2 + 6) * E)
    if weight is not None:
        y, error = y * weight.double(), error * weight.double().abs()
    error = error + 2 * E * y.abs()
    y = y if bias is None else y + bias.double()
    return y, error + E * y.abs()


def check_norm(x, norm, scheme, residual=None):
    found = norm_quantize(x, norm, scheme, residual, keep=True)
    kind, weight, bias, _ = norm
    summed = x
    if residual is not None:
        summed = x + residual
        assert torch.equal(found.total, summed)
    else:
        assert found.total is None
    exact, error = exact_norm(summed, *norm)
    roundings = 1
    if kind == "rms" and x.dtype != torch.float32:
        is_rounded_first = weight is not None and weight.dtype == x.dtype
        roundings = 1 + is_rounded_first + (bias is not None)
        # what bias takes off was rounded before
        error = error + (0 if bias is None else 2 * UNIT[x.dtype] * bias.double().abs())
    assert_close_and_coded(found, exact, error, composed_norm(summed, norm), scheme, roundings)


@EVERY_DTYPE
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_norms_are_those_of_the_composition_and_codes_those_of_their_values(kind, scheme, dtype):
    for rows, depth in ((3, 300), (2, 17)):
        x, residual = normal(rows, depth, dtype, 4), normal(rows, 2 * depth, dtype, 5)[:, depth:]
        weight, bias = normal(2, depth, dtype, 6)
        check_norm(x, (kind, weight, None, 1e-6), scheme, residual)
        check_norm(x + 3, (kind, weight, bias, 1e-5), scheme)
    check_norm(x, (kind, None, None, 1e-5), scheme)
    check_norm(x, (kind, None, bias, 0.1), scheme, residual)
    if kind == "rms":
        # Gemma's, which no dtype but fp32 holds
        check_norm(x, (kind, 1 + weight.float() / 3, None, 1e-6), scheme, residual)
        check_norm(x, (kind, 1 + weight.float() / 3, bias, 1e-6), scheme)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_of_every_kind_of_row(kind):
    x = normal(6, 70, torch.float32, 7)
    x[0] = 0
    x[1, 3] = float("nan")
    x[2, 69] = float("inf")
    # squares that are subnormal, and too large
    x[3] *= 1e-21
    x[4] *= 1e20
    weight = normal(1, 70, torch.float32, 8)[0]
    for epsilon in (1e-5, 0.0):
        found = norm_quantize(x, (kind, weight, None, epsilon), SCHEMES["int8"], keep=True)
        wanted = composed_norm(x, (kind, weight, None, epsilon))
        assert torch.equal(found.values.isnan(), wanted.isnan())
        torch.testing.assert_close(found.values.nan_to_num(0.0), wanted.nan_to_num(0.0), rtol=1e-2, atol=1e-7)
        assert_codes_of(found.codes, found.values, SCHEMES["int8"])


def test_norms_of_rows_as_wide_as_a_program_and_of_one_value():
    for depth in (16384, 1):
        x = normal(2, depth, torch.bfloat16, 9)
        check_norm(x, ("rms", x[0], None, 1e-5), SCHEMES["int8"])
        check_norm(x, ("rms", x[0], None, 1e-5), SCHEMES["int8-g64"])


def test_no_rows_make_no_codes():
    empty = torch.ones(0, 70, device=DEVICE)
    for found in (
        norm_quantize(empty, ("rms", None, None, 1e-5), SCHEMES["int8-g64"], empty, keep=True),
        act_quantize(empty, "relu", SCHEMES["int8-g64"], keep=True),
        gate_quantize(empty, empty, "relu", SCHEMES["int8-g64"], keep=True),
    ):
        assert found.values.shape == (0, 70)
        assert_codes_of(found.codes, empty, SCHEMES["int8-g64"])


def test_what_the_kernels_do_not_compute_is_left_to_the_composition():
    scheme, x = SCHEMES["int8"], torch.ones(2, 70, device=DEVICE)
    half, plain = x.half(), ("rms", None, None, 1e-5)
    assert norm_quantize(torch.ones(2, 16385), plain, scheme) is None
    assert norm_quantize(torch.ones(2, 0), plain, scheme) is None
    assert norm_quantize(x, ("group", None, None, 1e-5), scheme) is None
    # torch would widen the result, repeat the residual
    assert norm_quantize(half, ("layer", x[0], None, 1e-5), scheme) is None
    assert norm_quantize(half, ("rms", None, x[0], 1e-5), scheme) is None
    assert norm_quantize(half, plain, scheme, x) is None
    assert norm_quantize(x, plain, scheme, x[:1]) is None
    assert norm_quantize(x, ("rms", x[0, :1], None, 1e-5), scheme) is None
    assert norm_quantize(x.double(), plain, scheme) is None
    assert act_quantize(x, "tanh", scheme) is None
    assert act_quantize(x.double(), "relu", scheme) is None
    assert gate_quantize(x, x, "tanh", scheme) is None
    assert gate_quantize(x, half, "silu", scheme) is None
    assert gate_quantize(x, x[:1], "silu", scheme) is None
