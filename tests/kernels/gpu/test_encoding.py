"""Weights encoded by the kernel of a GPU against the definition, at the edges too."""

import math

import pytest
import torch

pytest.importorskip("triton")

from mono_quant.kernels import weights
from mono_quant.kernels.gpu import encoding
from mono_quant.kernels.gpu.features import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def encode_rows(matrix, scale_dtype, into=None):
    found = encoding.encode_rows(matrix.to(DEVICE), scale_dtype, into)
    return None if found is None else found._replace(codes=found.codes.cpu(), scale=found.scale.cpu())


def hostile(dtype, depth=67):
    """Rows of all sizes, zeros, ties, and what is next to the largest number."""
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(18, depth, generator=generator, dtype=torch.float64)
    rows *= torch.logspace(-44, 38, 18, dtype=torch.float64).unsqueeze(1)
    largest = torch.finfo(dtype).max
    rows = rows.clamp(-largest, largest)
    rows[0] = 0
    rows[1, :3] = torch.tensor([largest, -largest, largest / 2])
    rows[2, :4] = torch.tensor([127.0, 0.5, 1.5, -2.5])
    rows[2, 4:] = 0
    # a scale that is rounded down, so that the largest value lies beyond its code
    rows[3] = 0
    rows[3, :2] = torch.tensor([-127.496, 1.0])
    # ties, which a product with the reciprocal of the scale would miss
    steps = torch.tensor([3.0, 7.0, 11.0, 13.0]).view(-1, 1)
    rows[6:10] = (torch.arange(depth) - depth // 2 + 0.5) * steps
    rows[6:10, :1] = 127 * steps
    # on both sides of where a row counts as zero
    rows[4], rows[5] = 127 * 2.0**-126, 126.9 * 2.0**-126
    return rows.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_and_scales_equal_the_definition(dtype):
    matrix = hostile(dtype)
    for scale_dtype in {dtype, torch.float16}:
        found, expected = encode_rows(matrix, scale_dtype), weights.quantize_rows(matrix, scale_dtype)
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.scale, expected.scale)
        assert found.signal == pytest.approx(expected.signal, rel=1e-12)
        assert found.noise == pytest.approx(expected.noise, rel=1e-12)


@pytest.mark.parametrize("shape", [(3, 1), (2, 2100), (0, 5), (4, 0)])
def test_rows_of_any_length_are_encoded(shape):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(5))
    found, expected = encode_rows(matrix, torch.float32), weights.quantize_rows(matrix)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scale, expected.scale)
    assert (found.signal, found.noise) == pytest.approx((expected.signal, expected.noise), rel=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_has_the_scale_nan_and_spoils_no_other(bad):
    matrix = hostile(torch.float32)
    expected = weights.quantize_rows(matrix)
    matrix[7, 66] = bad
    found = encode_rows(matrix, torch.float32)
    assert found.scale.isnan().nonzero().tolist() == [[7, 0]]
    others = torch.arange(len(matrix)) != 7
    assert torch.equal(found.codes[others], expected.codes[others])
    assert torch.equal(found.scale[others], expected.scale[others])
    assert math.isfinite(found.signal) and math.isfinite(found.noise)


def test_transposed_weights_and_given_places_are_taken():
    matrix = hostile(torch.bfloat16)
    into = torch.empty(18, 67, dtype=torch.int8, device=DEVICE), torch.empty(18, 1, device=DEVICE)
    encode_rows(matrix.t().contiguous().t(), torch.bfloat16, into)
    expected = weights.quantize_rows(matrix)
    assert torch.equal(into[0].cpu(), expected.codes) and torch.equal(into[1].cpu(), expected.scale)
    assert encode_rows(matrix.double(), torch.float64) is None
