"""Products of codes and weights against the reference, bit for bit: every kernel, with and without descriptors and masks."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from mono_quant.kernels import reference
from mono_quant.kernels.activations import SCHEMES
from mono_quant.kernels.gpu import products
from mono_quant.kernels.gpu.codes import Codes
from mono_quant.kernels.gpu.features import INTERPRETED, features_of
from mono_quant.kernels.gpu.products import call_of, multiply
from mono_quant.kernels.gpu.tables import DESCRIPTORS, FEW, POINTERS, VECTORS, Config

INT8, WIDE = SCHEMES["int8"], SCHEMES["int12"]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
DEVICE = torch.device("cpu" if INTERPRETED else "cuda:0")


def encode(x, scheme):
    """The codes of tokens as a quantizing kernel leaves them, by the reference."""
    qmax, spans = scheme.widest_code(x.shape[1]), scheme.spans(x.shape[1])
    parts = [reference.quantize_tokens(x[:, span], qmax) for span in spans]
    codes = torch.cat([part for part, _ in parts], 1)
    planes = [codes >> 6, codes & 63] if scheme.bits > 8 else [codes]
    scale = torch.cat([scale for _, scale in parts], 1).t().contiguous()
    return Codes(torch.stack([p.to(torch.int8) for p in planes]).to(DEVICE), scale.to(DEVICE), scheme.group)


def problem(rows, outputs, depth, dtype=torch.float32):
    """Tokens with rows of zeros, of tiny values and with NaN among them, weights down to -128, scales and a bias."""
    generator = torch.Generator().manual_seed(rows * 7 + outputs + depth)
    x = torch.randn(rows, depth, generator=generator).to(dtype)
    if rows > 3 and depth:
        x[1] = 0
        x[2] *= 1e-37
        x[3, -1] = float("nan")
    weight = torch.randint(-128, 128, (outputs, depth), generator=generator, dtype=torch.int8)
    scale = torch.rand(outputs, 1, generator=generator) + 0.5
    return x, weight, scale, torch.randn(outputs, generator=generator)


def same_bits(got, wanted):
    """Equal bit for bit, but for what a NaN carries."""
    got, bits = got.cpu(), {4: torch.int32, 2: torch.int16}[got.element_size()]
    holes = wanted.isnan()
    return (
        got.dtype == wanted.dtype
        and torch.equal(got.isnan(), holes)
        and torch.equal(got.masked_fill(holes, 0).view(bits), wanted.masked_fill(holes, 0).view(bits))
    )


def check(config, scheme, rows, outputs, depth, dtype=torch.float32, has_bias=True):
    """Hold what one configuration writes into some columns of a wider tensor against the reference."""
    x, weight, scale, bias = problem(rows, outputs, depth, dtype)
    bias = bias if has_bias else None
    wide = torch.full((rows, outputs + 9), 7.0, dtype=dtype, device=DEVICE)
    inputs = [t if t is None else t.to(DEVICE) for t in (weight, scale, bias)]
    call_of(config, encode(x, scheme), *inputs, wide[:, 4:-5]).run(DEVICE)
    assert same_bits(wide[:, 4:-5].contiguous(), reference.linear(x, weight, scale, bias, scheme))
    assert (wide[:, :4] == 7).all()
    assert (wide[:, -5:] == 7).all()


def tile(kernel, scheme, depth=64, split=1):
    return Config(kernel, 16, 32, scheme.group or depth, 4, 2, split)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("kernel", [POINTERS, DESCRIPTORS, FEW])
@pytest.mark.parametrize("depth", [128, 208])
def test_tiles_have_the_bits_of_the_reference(kernel, scheme, depth):
    if kernel == DESCRIPTORS and not (INTERPRETED or features_of(DEVICE).tma):
        pytest.skip("no descriptors on this device")
    # tiles that end beyond the tokens, beyond the outputs, and with 208 beyond K
    check(tile(kernel, scheme), scheme, 13 if kernel == FEW else 21, 37, depth)


@pytest.mark.parametrize("scheme", [INT8, WIDE], ids=["int8", "int12"])
@pytest.mark.parametrize("depth", [256, 160])
def test_parts_of_a_step_are_added(scheme, depth):
    check(tile(FEW, scheme, 32, split=4), scheme, 5, 37, depth)


@pytest.mark.parametrize(
    ("rows", "scheme"), [(1, INT8), (2, INT8), (3, INT8), (4, INT8), (1, WIDE), (2, WIDE)]
)
@pytest.mark.parametrize("depth", [128, 208])
def test_vectors_have_the_bits_of_the_reference(rows, scheme, depth):
    # 37 outputs in programs of 16
    check(Config(VECTORS, rows, 16, 128, 4, 1), scheme, rows, 37, depth)


@pytest.mark.parametrize("kernel", [POINTERS, FEW, VECTORS])
@pytest.mark.parametrize("dtype", FLOATS)
def test_results_are_rounded_once(kernel, dtype):
    config = Config(VECTORS, 4, 16, 128, 4, 1) if kernel == VECTORS else tile(kernel, INT8)
    check(config, INT8, 4, 64, 64, dtype, has_bias=dtype is not torch.float16)


@pytest.mark.parametrize(
    "config", [tile(POINTERS, WIDE, 1024), tile(FEW, WIDE, 1024), Config(VECTORS, 2, 16, 8192, 4, 1)]
)
def test_sums_of_12_bit_codes_leave_int32_on_the_way_and_come_back(config):
    depth = 8192
    x = torch.tensor([[1.0], [-1.0]]).expand(2, depth)
    codes = encode(x, WIDE)
    assert codes.planes.amin((1, 2)).tolist() == [-32, 1]
    assert 2047 * 128 * depth < 2**31 <= 64 * 32 * 128 * depth
    weight = torch.full((3, depth), -128, dtype=torch.int8, device=DEVICE)
    out = torch.empty(2, 3, device=DEVICE)
    call_of(config, codes, weight, torch.ones(3, 1, device=DEVICE), None, out).run(DEVICE)
    sums = torch.tensor([[-2047.0], [2047.0]]) * 128 * depth
    assert torch.equal(out.cpu(), (sums * (torch.ones(1) / torch.full((1,), 2047.0))).expand(2, 3))


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5, 16, 17, 64, 65, 130])
def test_any_number_of_tokens(rows):
    x, weight, scale, bias = problem(rows, 19, 48)
    out = multiply(encode(x, INT8), *(t.to(DEVICE) for t in (weight, scale, bias)), torch.float32)
    assert same_bits(out, reference.linear(x, weight, scale, bias))


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize(("outputs", "depth"), [(1, 1), (3, 67), (17, 129), (5, 0), (0, 5)])
def test_odd_sizes(scheme, outputs, depth):
    x, weight, scale, bias = problem(5, outputs, depth)
    out = multiply(encode(x, scheme), *(t.to(DEVICE) for t in (weight, scale, bias)), torch.float32)
    assert same_bits(out, reference.linear(x, weight, scale, bias, scheme))


def test_weights_that_do_not_begin_where_words_do(monkeypatch):
    able = dataclasses.replace(features_of(DEVICE), dp4a=True)
    monkeypatch.setattr(products, "features_of", lambda device: able)
    x, weight, scale, bias = problem(1, 6, 48)
    pile = torch.cat([torch.zeros(3, dtype=torch.int8), weight.flatten()]).to(DEVICE)
    shifted = pile[3:].view(6, 48)
    assert shifted.data_ptr() % 4
    out = multiply(encode(x, INT8), shifted, scale.to(DEVICE), bias.to(DEVICE), torch.float32)
    assert same_bits(out, reference.linear(x, weight, scale, bias))


def test_weights_bias_and_scales_in_another_order():
    x, weight, scale, bias = problem(6, 10, 48)
    turned = weight.t().contiguous().to(DEVICE).t()
    sparse = torch.stack([bias, bias * 0], 1).to(DEVICE)[:, 0]
    steps = torch.stack([scale, scale * 0], 1).to(DEVICE)[:, 0]
    assert not (turned.is_contiguous() or sparse.is_contiguous() or steps.is_contiguous())
    out = multiply(encode(x, INT8), turned, steps, sparse, torch.float32)
    assert same_bits(out, reference.linear(x, weight, scale, bias))


def test_outputs_of_two_layers_side_by_side():
    x, weight, scale, bias = problem(5, 24, 48, torch.bfloat16)
    codes, both = encode(x, INT8), torch.empty(5, 24, dtype=torch.bfloat16, device=DEVICE)
    for rows in (slice(0, 17), slice(17, 24)):
        part = multiply(
            codes, *(t[rows].to(DEVICE) for t in (weight, scale, bias)), torch.bfloat16, both[:, rows]
        )
        assert part.data_ptr() == both[:, rows].data_ptr()
    assert same_bits(both, reference.linear(x, weight, scale, bias))


def test_half_of_a_bias_counts_as_float32():
    x, weight, scale, bias = problem(4, 9, 32, torch.float16)
    for dtype in FLOATS:
        out = multiply(
            encode(x, INT8), weight.to(DEVICE), scale.to(DEVICE), bias.to(DEVICE, dtype), torch.float16
        )
        assert same_bits(out, reference.linear(x, weight, scale, bias.to(dtype)))


def test_without_instructions_there_is_no_answer(monkeypatch):
    poor = dataclasses.replace(features_of(DEVICE), int8_dot=False, dp4a=True)
    monkeypatch.setattr(products, "features_of", lambda device: poor)
    for rows, scheme, answers in ((4, INT8, True), (2, WIDE, True), (5, INT8, False), (3, WIDE, False)):
        x, weight, scale, bias = problem(rows, 19, 48)
        out = multiply(encode(x, scheme), *(t.to(DEVICE) for t in (weight, scale, bias)), torch.float32)
        assert (out is not None) == answers
        assert out is None or same_bits(out, reference.linear(x, weight, scale, bias, scheme))
