"""Rows of a table against the reference, and against indices that the table does not have."""

import pytest
import torch

pytest.importorskip("triton")

from mono_quant.kernels import paths
from mono_quant.kernels.gpu import embedding as gpu
from mono_quant.kernels.gpu.features import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def embedding(indices, weight, scale, dtype):
    found = gpu.embedding(indices.to(DEVICE), weight.to(DEVICE), scale.to(DEVICE), dtype)
    return None if found is None else found.cpu()


def table(rows=11, width=37):
    generator = torch.Generator().manual_seed(2)
    weight = torch.randint(-128, 128, (rows, width), generator=generator, dtype=torch.int8)
    scale = torch.rand(rows, 1, generator=generator)
    # what float16 can hold as subnormal numbers alone, and not at all
    scale[1:4, 0] = torch.tensor([2.0**-22, 2.0**-126, 1e30])
    return weight, scale


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_have_the_bits_of_the_reference(dtype):
    weight, scale = table()
    flat = torch.arange(11).repeat(2)
    for indices in (
        flat.view(2, 11),
        flat.int().view(2, 11).t(),
        flat[::3],
        torch.tensor(3),
        flat[:0].view(0, 4),
    ):
        found = embedding(indices, weight, scale, dtype)
        expected = paths.embedding(indices, weight, scale, dtype)
        assert found.dtype == dtype and found.shape == (*indices.shape, 37)
        assert torch.equal(found, expected)


def test_rows_are_found_in_wide_tables_and_in_views():
    weight, scale = table(width=4100)
    indices = torch.tensor([10, 0])
    assert torch.equal(
        embedding(indices, weight, scale, torch.float32),
        paths.embedding(indices, weight, scale, torch.float32),
    )
    every_second = weight[::2, ::3], scale[::2]
    indices = torch.tensor([5, 1])
    assert torch.equal(
        embedding(indices, *every_second, torch.float16),
        paths.embedding(indices, *every_second, torch.float16),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_an_index_that_the_table_does_not_have_gives_nan_and_reads_nothing(dtype, kind):
    # the table lies between rows that must not be read
    weight, scale = table(rows=13)
    found = embedding(torch.tensor([-1, 10, 11, 0, -(2**31)], dtype=kind), weight[1:12], scale[1:12], dtype)
    there = torch.tensor([False, True, False, True, False])
    assert torch.equal(found.isnan(), ~there.view(-1, 1).expand_as(found))
    assert torch.equal(found[there], paths.embedding(torch.tensor([11, 1]), weight, scale, dtype))


def test_what_has_no_kernel_is_left_to_the_caller():
    weight, scale = table()
    indices = torch.tensor([1])
    assert embedding(indices.short(), weight, scale, torch.float32) is None
    assert embedding(indices, weight, scale, torch.float64) is None
    assert embedding(indices, weight.float(), scale, torch.float32) is None
    assert embedding(indices, weight, scale.half(), torch.float32) is None
    assert embedding(indices, weight, scale[:4], torch.float32) is None
    assert embedding(indices[:0], weight[:0], scale[:0], torch.float32) is None
