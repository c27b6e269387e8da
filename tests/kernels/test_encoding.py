"""The fast encoder and the definition agree bit for bit, at the edges too."""

import pytest
import torch

from mono_quant.errors import NonFiniteWeightError
from mono_quant.kernels import encoding, weights

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAGNITUDES = (1.0, 1e-3, 1e-7, 1e-30, 1e-38, 1e-42, 3e4, 1e30, 3e38)


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_and_scales_equal_the_definition(dtype: torch.dtype, magnitude: float) -> None:
    for rows, depth in ((1, 1), (3, 17), (64, 384), (130, 129)):
        generator = torch.Generator().manual_seed(rows)
        values = torch.randn(rows, depth, generator=generator, dtype=torch.float64) * magnitude
        matrix = values.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
        matrix[0] = 0 if rows > 1 else matrix[0]
        if not torch.isfinite(matrix.float()).all():
            continue
        for given in (matrix, matrix.t().contiguous().t()):
            found, expected = encoding.encode_rows(given), weights.quantize_rows(matrix)
            assert torch.equal(found.codes, expected.codes)
            assert torch.equal(found.scale, expected.scale)
            # above 100 dB nothing but the rounding of the sums is left to compare
            assert min(found.sqnr_db, 100) == pytest.approx(min(expected.sqnr_db, 100), abs=0.02)


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_the_largest_float_dequantizes_to_something_finite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    found = encoding.encode_rows(torch.tensor([[largest, -largest, largest / 2]], dtype=dtype))
    assert torch.isfinite(weights.dequantize_rows(found.codes, found.scale)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_are_counted_by_the_definition(bad: float) -> None:
    matrix = torch.ones(3, 5)
    matrix[1, 2] = bad
    with pytest.raises(NonFiniteWeightError, match=r"1 of 15 values are NaN or infinite, first at \[1, 2\]"):
        encoding.encode_rows(matrix)
    with pytest.raises(NonFiniteWeightError, match="1 of 15"):
        encoding.cast_half(matrix)


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_counts_equal_the_definition(dtype: torch.dtype) -> None:
    edges = [65503.0, 65504.0, 65519.0, 65520.0, 1e-8, 2.0**-25, 2.0**-24, 0.0, -0.0, -70000.0, 1.0]
    values = torch.tensor(edges, dtype=torch.float64).to(dtype)
    values = values[torch.isfinite(values)]
    found, expected = encoding.cast_half(values), weights.cast_half(values)
    assert torch.equal(found.value, expected.value)
    assert (found.overflowed, found.clamped, found.flushed) == (
        expected.overflowed, expected.clamped, expected.flushed,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_part_of_a_matrix_has_the_bits_of_the_whole(dtype: torch.dtype) -> None:
    sizes = torch.tensor([[m] for m in MAGNITUDES if m < torch.finfo(dtype).max], dtype=torch.float64)
    values = torch.randn(len(sizes), 37, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    matrix = (values * sizes).clamp(-largest, largest).to(dtype)
    matrix[1] = 0
    whole, definition = encoding.encode_rows(matrix), weights.quantize_rows(matrix)
    assert torch.equal(whole.scale, definition.scale)
    parts = [encoding.encode_rows(part, threads=1) for part in matrix.split(1)]
    assert torch.equal(torch.cat([part.codes for part in parts]), whole.codes)
    assert torch.equal(torch.cat([part.scale for part in parts]), whole.scale)
    for name in ("signal", "noise"):
        found = [getattr(part, name) for part in parts]
        assert sum(found) == pytest.approx(getattr(whole, name), rel=1e-12)
        # rows of any size, those too whose squares vanish in fp32
        for part, row in zip(found, matrix.split(1), strict=True):
            assert part == pytest.approx(getattr(weights.quantize_rows(row), name), rel=1e-3, abs=0)


def test_codes_and_halves_go_where_they_are_wanted() -> None:
    matrix = torch.randn(5, 9, dtype=torch.float64)
    for dtype in DTYPES:
        given = matrix.to(dtype)
        into = torch.empty(5, 9, dtype=torch.int8), torch.empty(5, 1)
        found = encoding.encode_rows(given, into=into)
        assert found.codes is into[0]
        assert found.scale is into[1]
        assert torch.equal(into[0], weights.quantize_rows(given).codes)
        for half in (torch.float16, torch.bfloat16):
            place = torch.empty(5, 9, dtype=half)
            assert encoding.cast_half(given, half, into=place).value is place
            assert torch.equal(place, given.to(half))
