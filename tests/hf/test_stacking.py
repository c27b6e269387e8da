"""Stacks of tensors without data are those that torch makes."""

import pytest
import torch

from mono_quant.hf.stacking import MetaStack


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_a_stack_has_the_shape_dtype_and_strides_of_torchs(dim, count, dtype):
    parts = [meta(3, 4, dtype=dtype) for _ in range(count)]
    expected = torch.stack(parts, dim=dim)
    for make in (lambda: torch.stack(parts, dim=dim), lambda: torch.stack(tuple(parts), dim)):
        with MetaStack():
            found = make()
        assert found.is_meta and (found.shape, found.dtype) == (expected.shape, expected.dtype)
        assert found.stride() == expected.stride()


@pytest.mark.parametrize("dim", [3, -4])
def test_torch_says_what_is_wrong_with_the_rest(dim):
    for parts in ([meta(3, 4), meta(3, 5)], [], [meta(3, 4)] * 2):
        with pytest.raises((RuntimeError, IndexError)) as expected:
            torch.stack(parts, dim=dim)
        with pytest.raises(type(expected.value)) as found, MetaStack():
            torch.stack(parts, dim=dim)
        assert str(found.value) == str(expected.value)


def test_tensors_with_data_and_of_several_dtypes_are_torchs():
    parts = [torch.arange(3.0), torch.arange(3.0, 6.0)]
    with MetaStack():
        assert torch.stack(parts, dim=1).tolist() == [[0, 3], [1, 4], [2, 5]]
        mixed = torch.stack([meta(3), meta(3, dtype=torch.float32)])
        held = torch.stack(parts, out=torch.empty(2, 3))
    assert mixed.dtype == torch.float32 and mixed.shape == (2, 3)
    assert held.tolist() == [[0, 1, 2], [3, 4, 5]]
