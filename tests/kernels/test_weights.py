"""Weight codes, scales, casts and error measures against numpy and hand-computed numbers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mono_quant.errors import NonFiniteWeightError
from mono_quant.kernels import weights as definitions
from mono_quant.kernels.weights import (
    cast_half,
    dequantize_rows,
    gaussian_crest_db,
    quantize_rows,
    round_scale,
    sqnr_db,
    stored_scale,
    weight_limit_db,
)

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TINY32, TINY16 = 2.0**-126, 2.0**-14
# W / s is divided in fp32, and an fp64 weight is rounded to fp32 first: 127 * 2^-24 of a step each.
SLACK = 2 * 127 * 2.0**-24


def to_bf16(values):
    """Round fp32 to bf16 values, to nearest even, on the bits."""
    bits = np.asarray(values, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
    return rounded.astype(np.uint32).view(np.float32)


def to_fp16(values):
    return np.asarray(values, np.float32).astype(np.float16).astype(np.float32)


def expected_rows(weight, scale_dtype):
    """Codes and scales by the definition, in numpy's fp32."""
    w = weight.double().numpy().astype(np.float32)
    scale = np.abs(w).max(axis=1, keepdims=True) / np.float32(127)
    if scale_dtype == torch.bfloat16:
        scale = to_bf16(scale)
    elif scale_dtype == torch.float16:
        scale = np.where(scale < TINY16, scale, to_fp16(scale))
    zero = scale < TINY32
    scale = np.where(zero, np.float32(1), scale)
    codes = np.where(zero, 0, np.clip(np.rint(w / scale), -127, 127))
    return codes.astype(np.int8), scale


def assert_rows_are_sound(weight, rows, scale_dtype):
    """The invariants of W1..W4 that hold for any finite weight."""
    codes, scale = rows.codes, rows.scale
    assert codes.dtype == torch.int8 and scale.dtype == torch.float32
    assert codes.shape == weight.shape and scale.shape == (weight.shape[0], 1)
    assert codes.min() >= -127 and codes.max() <= 127
    assert torch.isfinite(scale).all() and (scale > 0).all()
    assert torch.isfinite(dequantize_rows(codes, scale)).all()
    exact, s = weight.double(), scale.double()
    zero = (codes == 0).all(dim=1, keepdim=True) & (scale == 1)
    error = (exact - codes.double() * s).abs()
    assert (error <= torch.where(zero, 127 * TINY32 * 1.01, s * (0.5 + SLACK))).all()
    if scale_dtype == torch.bfloat16:
        assert np.array_equal(to_bf16(scale.numpy()), scale.numpy())
    elif scale_dtype == torch.float16:
        representable = to_fp16(scale.numpy()) == scale.numpy()
        assert (representable | (scale.numpy() < TINY16)).all()


@st.composite
def weights(draw):
    """Matrices whose rows and values reach over all exponents of fp32."""
    rows, depth = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    seed = draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    top = np.array([draw(st.integers(-149, 127)) for _ in range(rows)]).reshape(-1, 1)
    spread = draw(st.sampled_from([0, 3, 12, 160]))
    exponent = np.maximum(top - random.integers(0, spread + 1, (rows, depth)), -149)
    values = np.ldexp(random.uniform(1, 2, (rows, depth)), exponent) * random.choice(
        [-1.0, 1.0], (rows, depth)
    )
    values[random.random((rows, depth)) < draw(st.sampled_from([0.0, 0.3]))] = 0
    return np.clip(values, -3.4028e38, 3.4028e38)


@settings(max_examples=400, deadline=None)
@given(weights(), st.sampled_from(FLOATS))
def test_every_weight_is_within_half_a_step_over_all_exponents(values, dtype):
    weight = torch.tensor(values).to(dtype)
    weight = torch.where(torch.isfinite(weight), weight, torch.finfo(dtype).max / 2).to(dtype)
    rows = quantize_rows(weight)
    assert_rows_are_sound(weight, rows, dtype)
    codes, scale = expected_rows(weight, dtype)
    assert np.array_equal(rows.codes.numpy(), codes)
    assert np.array_equal(rows.scale.numpy(), scale)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale_dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_codes_and_scales_follow_the_definition_bit_for_bit(dtype, scale_dtype):
    weight = torch.randn(13, 67, generator=torch.Generator().manual_seed(1)).to(dtype)
    rows = quantize_rows(weight, scale_dtype)
    codes, scale = expected_rows(weight, scale_dtype or dtype)
    assert np.array_equal(rows.codes.numpy(), codes)
    assert np.array_equal(rows.scale.numpy(), scale)
    assert_rows_are_sound(weight, rows, scale_dtype or dtype)


def test_scales_are_rounded_before_the_codes_are_computed():
    # absmax 1: s = 1/127 = 0.0078740; in bf16 0.0078735. 0.0905473 lies between the two ties at code 11.5.
    weight = torch.tensor([[1.0, 0.0905470]])
    assert 11.5 * to_bf16(np.float32(1 / 127)) < 0.0905470 < 11.5 / 127
    assert quantize_rows(weight).codes.tolist() == [[127, 11]]
    assert quantize_rows(weight, torch.bfloat16).codes.tolist() == [[127, 12]]


def test_rounding_is_half_to_even_and_each_row_has_its_own_scale():
    ties = [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -127.0]
    weight = torch.tensor([ties, [2 * t for t in ties]])
    rows = quantize_rows(weight)
    assert rows.codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126, -127]] * 2
    assert rows.scale.tolist() == [[1.0], [2.0]]


def test_the_largest_value_gets_code_127_when_its_scale_is_rounded_down():
    # 127.496 / 127 is just below the tie between the bf16 values 1 and 1 + 2^-7: the ratio is the largest there is
    rows = quantize_rows(torch.tensor([[-127.496, 1.0], [127.496, -1.0]]), torch.bfloat16)
    assert rows.scale.tolist() == [[1.0], [1.0]]
    assert rows.codes.tolist() == [[-127, 1], [127, -1]]


@pytest.mark.parametrize("value", [0.0, -0.0, 2.0**-149, -(2.0**-149), 126 * TINY32])
def test_zero_rows_get_scale_one_and_codes_zero(value):
    rows = quantize_rows(torch.tensor([[value] * 5, [1.0] * 5]))
    assert rows.codes.tolist() == [[0] * 5, [127] * 5]
    assert rows.scale.tolist() == [[1.0], [float(np.float32(1) / np.float32(127))]]
    assert torch.equal(dequantize_rows(rows.codes, rows.scale)[0], torch.zeros(5))


def test_the_smallest_row_that_is_not_zero_keeps_its_codes():
    rows = quantize_rows(torch.tensor([[127 * TINY32, -TINY32]]))
    assert rows.codes.tolist() == [[127, -1]] and rows.scale.item() == TINY32


def test_constant_rows_are_exact_up_to_fp32():
    rows = quantize_rows(torch.full((3, 8), 0.3))
    assert (rows.codes == 127).all()
    assert (dequantize_rows(rows.codes, rows.scale) - 0.3).abs().max() <= 0.3 * 2**-23


@pytest.mark.parametrize("share", [1.0, 0.999, 0.99, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_magnitudes_near_the_largest_float_stay_finite(share, dtype):
    top = torch.finfo(dtype).max * share
    weight = torch.tensor([[top, -top, top / 2]]).to(dtype)
    rows = quantize_rows(weight)
    assert_rows_are_sound(weight, rows, dtype)
    assert rows.codes.tolist() in ([[127, -127, 64]], [[127, -127, 63]])
    assert math.isfinite(rows.sqnr_db)


def test_scales_that_float16_would_make_subnormal_stay_as_they_are():
    weight = torch.tensor([[0.007, 0.001], [1e-7, 5e-8], [0.5, 0.1]], dtype=torch.float16)
    rows = quantize_rows(weight)
    s = weight.float().abs().amax(1, keepdim=True).numpy() / np.float32(127)
    assert np.array_equal(rows.scale.numpy()[:2], s[:2])
    assert rows.scale.numpy()[2] == to_fp16(s[2]) != s[2]
    assert_rows_are_sound(weight, rows, torch.float16)


def test_scales_too_large_for_float16_stay_finite():
    weight = torch.tensor([[1e7, -5e6, 0.0]])
    rows = quantize_rows(weight, torch.float16)
    assert torch.isfinite(rows.scale).all()
    weight = torch.tensor([[1e9, -5e8, 0.0]])
    assert_rows_are_sound(weight, quantize_rows(weight, torch.float16), None)


@pytest.mark.parametrize("scale", [1.0, 0.0123, 6e-5, 1e-7, 3e4])
def test_rounding_a_scale_changes_it_by_half_a_step_at_most(scale):
    s = torch.tensor([scale])
    assert torch.equal(round_scale(s, torch.float32), s) and torch.equal(round_scale(s, torch.float64), s)
    assert abs(round_scale(s, torch.bfloat16) - s) <= s * 2**-8
    assert abs(round_scale(s, torch.float16) - s) <= (0 if scale < TINY16 else s * 2**-11)


@pytest.mark.parametrize(
    ("values", "narrow"),
    [
        ([1.0, 0.5], {torch.float16, torch.bfloat16}),
        # needs 11 bits: float16 has them, bfloat16 has 8
        ([1.0, 1 + 2**-10], {torch.float16}),
        # below the range of float16, above it, and with more bits than its smallest numbers have
        ([1.0, 2.0**-30], {torch.bfloat16}),
        ([1.0, 2.0**17], {torch.bfloat16}),
        ([1.0, 1.5 * 2.0**-24], {torch.bfloat16}),
        ([1.0, 2.0**-24], {torch.float16, torch.bfloat16}),
        ([1.0, 1 / 3], set()),
    ],
)
def test_a_file_holds_scales_in_the_dtype_of_the_weight_only_where_that_is_exact(values, narrow):
    scale = torch.tensor(values).view(-1, 1)
    with np.errstate(over="ignore"):
        rounded = {torch.float16: to_fp16(values), torch.bfloat16: to_bf16(values)}
    for dtype in FLOATS:
        stored = stored_scale(scale, dtype)
        assert stored.dtype == (dtype if dtype in narrow else torch.float32)
        assert torch.equal(stored.float(), scale)
    assert {d for d, r in rounded.items() if (r == scale.numpy().ravel()).all()} == narrow


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [(0, 0), (2, 3), (4, 6)])
def test_a_weight_with_nan_or_infinity_is_refused_with_count_and_place(dtype, bad, at):
    weight = torch.ones(5, 7, dtype=dtype)
    weight[at] = bad
    weight[4, 6] = math.nan
    count = 1 if at == (4, 6) else 2
    expected = rf"{count} of 35 values are NaN or infinite, first at \[{at[0]}, {at[1]}\]"
    with pytest.raises(NonFiniteWeightError, match=expected):
        quantize_rows(weight)


def test_one_nan_in_a_million_values_is_found():
    weight = torch.ones(1000, 1000)
    weight[999, 998] = math.nan
    with pytest.raises(NonFiniteWeightError, match=r"1 of 1000000 .* first at \[999, 998\]"):
        quantize_rows(weight)


def test_float64_beyond_float32_is_refused_as_infinite():
    with pytest.raises(NonFiniteWeightError, match=r"1 of 2 .* first at \[0, 1\]"):
        quantize_rows(torch.tensor([[1.0, 1e300]], dtype=torch.float64))


@pytest.mark.parametrize("chunk", [1, 7, 67, 68, 300, 1 << 22])
def test_the_chunk_size_changes_nothing(monkeypatch, chunk):
    weight = torch.randn(13, 67, generator=torch.Generator().manual_seed(2))
    whole = quantize_rows(weight)
    half = cast_half(weight * 4e4)
    monkeypatch.setattr(definitions, "_CHUNK", chunk)
    parts = quantize_rows(weight)
    assert torch.equal(parts.codes, whole.codes) and torch.equal(parts.scale, whole.scale)
    assert parts.sqnr_db == pytest.approx(whole.sqnr_db, abs=1e-9)
    again = cast_half(weight * 4e4)
    assert torch.equal(again.value, half.value)
    counts = (again.overflowed, again.clamped, again.flushed)
    assert counts == (half.overflowed, half.clamped, half.flushed) and counts[0] > 0
    weight[11, 5] = math.nan
    for cast in quantize_rows, cast_half:
        with pytest.raises(NonFiniteWeightError, match=r"1 of 871 .* first at \[11, 5\]"):
            cast(weight)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_matrices_pass_through(shape):
    rows = quantize_rows(torch.empty(shape))
    assert rows.codes.shape == shape and rows.scale.tolist() == [[1.0]] * shape[0]
    assert rows.sqnr_db == math.inf


def test_views_give_the_same_codes_and_the_weight_is_untouched():
    base = torch.nn.Parameter(torch.randn(31, 17, generator=torch.Generator().manual_seed(3)))
    before = base.detach().clone()
    view, copy = quantize_rows(base.t()), quantize_rows(base.detach().t().contiguous())
    assert torch.equal(view.codes, copy.codes) and torch.equal(view.scale, copy.scale)
    assert torch.equal(base.detach(), before) and not view.codes.requires_grad


def test_sqnr_is_the_ratio_of_squares_in_float64():
    weight = torch.randn(9, 33, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    weight[4] *= 1000
    rows = quantize_rows(weight)
    w, restored = weight.numpy(), rows.codes.double().numpy() * rows.scale.double().numpy()
    expected = 10 * math.log10((w**2).sum() / ((w - restored) ** 2).sum())
    assert rows.sqnr_db == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("signal", "noise", "expected"),
    [(100.0, 1.0, 20.0), (1.0, 1.0, 0.0), (1.0, 0.0, math.inf), (0.0, 0.0, math.inf), (0.0, 2.0, -math.inf), (1.0, 10.0, -10.0)],
)  # fmt: skip
def test_sqnr_in_decibels(signal, noise, expected):
    assert sqnr_db(signal, noise) == pytest.approx(expected)


def test_a_weight_that_is_a_multiple_of_its_scale_loses_nothing():
    assert quantize_rows(torch.tensor([[127.0, -3.0, 64.0]])).sqnr_db == math.inf


@pytest.mark.parametrize(
    ("depth", "crest", "limit"), [(384, 10.2, 42.7), (1024, 10.9, 42.0), (4096, 11.5, 41.3), (16384, 12.3, 40.5)]
)  # fmt: skip
def test_crest_and_limit_match_the_table_of_the_numerics_document(depth, crest, limit):
    # 0.15 dB, and the table is rounded to 0.1
    assert gaussian_crest_db(depth) == pytest.approx(crest, abs=0.2)
    assert weight_limit_db(depth) == pytest.approx(limit, abs=0.2)
    assert weight_limit_db(depth) + gaussian_crest_db(depth) == pytest.approx(52.87, abs=0.005)


@pytest.mark.parametrize("depth", [256, 1000, 5000, 100_000])
def test_crest_matches_the_expected_maximum_by_integration(depth):
    x = np.linspace(0, 12, 24001)
    below = np.array([math.erf(v / math.sqrt(2)) for v in x]) ** depth
    mean = float(np.trapezoid(1 - below, x))
    assert gaussian_crest_db(depth) == pytest.approx(20 * math.log10(mean), abs=0.15)


@pytest.mark.parametrize("depth", [384, 1024])
def test_gaussian_rows_reach_the_limit(depth):
    weight = torch.randn(512, depth, generator=torch.Generator().manual_seed(5))
    assert quantize_rows(weight).sqnr_db == pytest.approx(weight_limit_db(depth), abs=0.2)


# value, what numpy's correctly rounded cast gives, (overflowed, clamped, flushed)
HALF_CASES = [
    (65504.0, 65504.0, (0, 0, 0)),
    (65504.01, 65504.0, (0, 1, 0)),
    (65519.9, 65504.0, (0, 1, 0)),
    (65520.0, math.inf, (1, 0, 0)),
    (3e38, math.inf, (1, 0, 0)),
    (2.0**-24, 2.0**-24, (0, 0, 0)),
    (2.0**-25 * 1.01, 2.0**-24, (0, 0, 0)),
    (2.0**-25, 0.0, (0, 0, 1)),
    (1e-8, 0.0, (0, 0, 1)),
    (2.0**-149, 0.0, (0, 0, 1)),
    (0.0, 0.0, (0, 0, 0)),
    (1 / 3, float(np.float16(1 / 3)), (0, 0, 0)),
]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("value", "expected", "counts"), HALF_CASES)
def test_float16_counts_what_does_not_fit(value, expected, counts, dtype, sign):
    cast = cast_half(torch.tensor([sign * value, 1.0], dtype=dtype))
    assert cast.value.dtype == torch.float16
    assert cast.value.tolist() == [sign * expected, 1.0]
    assert (cast.overflowed, cast.clamped, cast.flushed) == counts


def test_float16_counts_agree_with_the_values_next_to_the_overflow_in_float64():
    cast = cast_half(torch.tensor([65520 - 1e-6, 65520 - 1e-11], dtype=torch.float64))
    assert cast.overflowed == int(torch.isinf(cast.value).sum())
    assert cast.overflowed + cast.clamped == 2


def test_bfloat16_beyond_float16_is_counted():
    cast = cast_half(torch.tensor([65280.0, 65536.0, -3e38, 1e-8, 2.0**-24], dtype=torch.bfloat16))
    assert (cast.overflowed, cast.clamped, cast.flushed) == (2, 0, 1)
    assert cast.value.tolist() == [65280.0, math.inf, -math.inf, 0.0, 2.0**-24]


def test_bfloat16_has_the_range_of_float32():
    largest = torch.finfo(torch.bfloat16).max
    source = torch.tensor([1 + 2**-9, 65504.0, largest, 3.3955e38, 1e-41, 0.0])
    cast = cast_half(source, torch.bfloat16)
    # beyond the largest by less than half a step, it becomes that; the rest is what torch makes of it
    assert torch.equal(cast.value, source.to(torch.bfloat16)) and cast.value[3] == largest
    assert (cast.overflowed, cast.clamped, cast.flushed) == (0, 1, 1)
    cast = cast_half(torch.tensor([torch.finfo(torch.float32).max, -3.4e38]), torch.bfloat16)
    assert cast.overflowed == 2 and bool(cast.value.isinf().all())


def test_float16_passes_through_bit_for_bit():
    source = torch.tensor([65504.0, 6e-8, -0.0, 1.5], dtype=torch.float16)
    cast = cast_half(source)
    assert torch.equal(cast.value.view(torch.int16), source.view(torch.int16))
    assert (cast.overflowed, cast.clamped, cast.flushed) == (0, 0, 0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-7e4, 7e4, width=32), min_size=1, max_size=20))
def test_float16_values_equal_numpys_cast(values):
    source = np.array(values, np.float32)
    cast = cast_half(torch.tensor(source))
    with np.errstate(over="ignore"):
        expected = source.astype(np.float16)
    assert np.array_equal(cast.value.numpy().view(np.uint16), expected.view(np.uint16))
    assert cast.overflowed == int(np.isinf(expected).sum())
    assert cast.flushed == int(((expected == 0) & (source != 0)).sum())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_float16_refuses_nan_and_infinity(dtype, bad):
    tensor = torch.ones(2, 3, 4, dtype=dtype)
    tensor[1, 2, 0] = bad
    with pytest.raises(NonFiniteWeightError, match=r"1 of 24 values .* first at \[1, 2, 0\]"):
        cast_half(tensor)


def test_float16_of_a_scalar_an_empty_and_a_strided_tensor():
    assert cast_half(torch.tensor(65519.0)).clamped == 1
    assert cast_half(torch.empty(0, 3)).value.shape == (0, 3)
    grid = torch.tensor([[1.0, 7e4], [1e-9, 2.0]])
    cast = cast_half(grid.t())
    assert (cast.overflowed, cast.flushed) == (1, 1)
    assert cast.value.tolist() == [[1.0, 0.0], [math.inf, 2.0]]


@pytest.mark.parametrize("dtype", FLOATS)
def test_dequantizing_multiplies_in_fp32_and_rounds_once(dtype):
    codes = torch.arange(-128, 128, dtype=torch.int8).view(2, 128)
    scale = torch.tensor([[0.1], [1e-3]])
    product = codes.numpy().astype(np.float32) * scale.numpy()
    rounded = {torch.bfloat16: to_bf16, torch.float16: to_fp16}.get(dtype, np.asarray)(product)
    values = dequantize_rows(codes, scale, dtype)
    assert values.dtype == dtype
    assert np.array_equal(values.double().numpy(), rounded.astype(np.float64))


def test_dequantizing_keeps_leading_dimensions():
    codes = torch.ones(2, 3, 4, dtype=torch.int8)
    scale = torch.arange(6.0).view(2, 3, 1)
    assert torch.equal(dequantize_rows(codes, scale), scale.expand(2, 3, 4))
