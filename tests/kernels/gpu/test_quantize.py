"""Codes and scales against the reference, for every scheme and dtype, wherever rows lie."""

import pytest
import torch

pytest.importorskip("triton")

from coded import DEVICE, assert_codes_of

from mono_quant.kernels.activations import SCHEMES
from mono_quant.kernels.gpu.features import INTERPRETED
from mono_quant.kernels.gpu.quantize import quantize

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
EVERY_SCHEME = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
EVERY_DTYPE = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def hostile(rows, depth, dtype):
    """Rows of every size, and one each of zeros, NaN, infinity, the largest and subnormal numbers, ties, nearly no scale."""
    generator = torch.Generator().manual_seed(depth)
    limits = torch.finfo(dtype)
    sizes = torch.logspace(-7 if dtype == torch.float16 else -43, 4, rows, dtype=torch.float64).unsqueeze(1)
    x = (torch.randn(rows, depth, generator=generator) * sizes).to(dtype)
    x[0] = 0
    x[1, depth // 2] = float("nan")
    x[2, -1] = float("-inf")
    x[3, 0], x[3, -1] = limits.max, limits.min
    x[4] = limits.smallest_normal / 8
    x[5] = torch.arange(depth) % 256 - 127.5
    x[6] = 127 * 2.0**-126
    x[7, depth // 3] = float("inf")
    return x.to(DEVICE)


@EVERY_SCHEME
@EVERY_DTYPE
@pytest.mark.parametrize("depth", [1, 200])
def test_codes_and_scales_are_those_of_the_reference(scheme, dtype, depth):
    x = hostile(11, depth, dtype)
    assert_codes_of(quantize(x, scheme), x, scheme)


# 16384 is the widest tile; beyond 8192 values 12 bits become fewer
@pytest.mark.parametrize(
    ("name", "depth"), [("int8", 16384), ("int8", 16385), ("int12", 8200), ("int12", 30000)]
)
def test_rows_as_long_as_the_widest_tile_and_longer(name, depth):
    x = hostile(8, depth, torch.bfloat16)[3::4]
    assert_codes_of(quantize(x, SCHEMES[name]), x, SCHEMES[name])


def test_codes_of_rows_so_long_that_twelve_bits_would_overflow_are_one_plane():
    assert quantize(torch.empty(0, 130000, device=DEVICE), SCHEMES["int12"]).planes.shape == (2, 0, 130000)
    assert quantize(torch.empty(0, 140000, device=DEVICE), SCHEMES["int12"]).planes.shape == (1, 0, 140000)


@EVERY_SCHEME
@pytest.mark.parametrize("shape", [(0, 70), (3, 0), (0, 0)])
def test_no_rows_and_rows_of_nothing(scheme, shape):
    assert_codes_of(quantize(torch.ones(shape, device=DEVICE), scheme), torch.ones(shape), scheme)


@EVERY_SCHEME
def test_rows_apart_transposed_repeated_and_in_another_dtype(scheme):
    wide = hostile(8, 300, torch.float16)
    for x in (wide[:, 30:100], wide.t()[:70, :8], wide[5:6].expand(9, 300), wide[::2, :129], wide.double()):
        assert_codes_of(quantize(x, scheme), x, scheme)


def test_a_row_that_lies_beyond_two_billion_values():
    # 5 GB of addresses, of which three pages are touched
    step = 2**30 + 16
    x = torch.empty(2 * step + 70, dtype=torch.float16, device=DEVICE).as_strided((3, 70), (step, 1))
    x.copy_(hostile(8, 70, torch.float16)[5:])
    assert_codes_of(quantize(x, SCHEMES["int8"]), x, SCHEMES["int8"])


@pytest.mark.skipif(INTERPRETED, reason="takes the interpreter ten seconds")
@EVERY_SCHEME
def test_more_programs_than_a_second_axis_of_a_grid_has(scheme):
    for x in (torch.randn(70000 * 128, 3, device=DEVICE), torch.randn(70000, 2048, device=DEVICE)):
        assert_codes_of(quantize(x, scheme), x, scheme)
