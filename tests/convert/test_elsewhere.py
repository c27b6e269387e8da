"""A parameter whose values are not in memory: what is computed with it has the bits of the plain one, and no more is read than that needs."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mono_quant.convert.elsewhere import Elsewhere


def stand_in(values, in_parts=True):
    """What stands for a tensor, and what is read of it: the whole (None), or parts of it."""
    read = []

    def whole():
        read.append(None)
        return nn.Parameter(values.clone())

    def rows(start, stop):
        read.append((start, stop))
        return values[start:stop].clone()

    meta = nn.Parameter(torch.empty_like(values, device="meta"))
    return Elsewhere.like(meta, whole, rows if in_parts else None), read


def values(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_what_there_is_to_know_is_known_without_reading():
    w = values(4, 6, 5, dtype=torch.bfloat16)
    stand, read = stand_in(w)
    assert isinstance(stand, nn.Parameter) and stand.requires_grad and stand.is_leaf
    assert (stand.device, stand.dtype, stand.shape) == (w.device, w.dtype, w.shape)
    assert (stand.stride(), stand.numel(), stand.nbytes) == (w.stride(), w.numel(), w.nbytes)
    assert stand.is_floating_point() and not stand.is_meta and len(stand) == 4
    assert stand.to("cpu") is stand and stand.to(torch.device("cpu"), None, False) is stand
    assert read == []


@pytest.mark.parametrize(
    ("use", "parts"),
    [
        (lambda w: w[2], [(2, 3)]),
        (lambda w: w[-1], [(3, 4)]),
        (lambda w: w[torch.tensor(1)], [(1, 2)]),
        (lambda w: w.transpose(-2, -1)[3], [(3, 4)]),
        (lambda w: torch.transpose(w, 1, 2)[0], [(0, 1)]),
        (lambda w: w[torch.tensor([1, 3])], [None]),
        (lambda w: w.transpose(0, 1)[2], [None]),
        (lambda w: w.transpose(-2, -1) + 1, [None]),
        (lambda w: w[1:3], [None]),
        (lambda w: torch.cat([w, w])[5], [None, None]),
        (lambda w: w.sum(), [None]),
    ],
)
def test_of_a_stack_one_matrix_is_read_where_one_is_used(use, parts):
    w = values(4, 6, 5)
    stand, read = stand_in(w)
    out, expected = use(stand), use(w)
    assert torch.equal(out, expected) and out.stride() == expected.stride()
    assert read == parts and not isinstance(out, Elsewhere)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ends", [[3, 3, 9, 12], [0, 12, 12, 12], [1, 2, 3, 10]])
def test_products_of_groups_read_one_matrix_after_the_other(dtype, ends):
    x, w = values(12, 16, dtype=dtype, seed=1), values(4, 24, 16, dtype=dtype)
    stand, read = stand_in(w)
    offs = torch.tensor(ends, dtype=torch.int32)
    out = F.grouped_mm(x, stand.transpose(-2, -1), offs=offs)
    expected = F.grouped_mm(x, w.transpose(-2, -1), offs=offs)
    rows = ends[-1]
    assert torch.equal(out[:rows], expected[:rows]) and out.stride() == expected.stride()
    assert read == [(i, i + 1) for i, end in enumerate(ends) if end > ([0, *ends])[i]]


def test_of_a_table_the_rows_are_read_that_are_looked_up():
    w, ids = values(10, 4), torch.tensor([[3, 7, 3], [0, 7, 9]])
    stand, read = stand_in(w)
    assert torch.equal(F.embedding(ids, stand, padding_idx=0), F.embedding(ids, w, padding_idx=0))
    assert read == [(0, 1), (3, 4), (7, 8), (9, 10)]
    del read[:]
    # writes into the table
    assert torch.equal(F.embedding(ids, stand, max_norm=1.0), F.embedding(ids, w.clone(), max_norm=1.0))
    assert read == [None]
    with pytest.raises(IndexError):
        F.embedding(torch.tensor([10]), stand)


def test_what_cannot_be_read_in_parts_is_read_whole():
    w = values(4, 6, 5)
    stand, read = stand_in(w, in_parts=False)
    assert torch.equal(stand[1], w[1]) and torch.equal(stand.transpose(1, 2), w.transpose(1, 2))
    assert read == [None, None]


@pytest.mark.parametrize("ask", [lambda w: w.data_ptr(), lambda w: w.untyped_storage()])
def test_nobody_gets_its_address(ask):
    with pytest.raises(RuntimeError, match="of a weight that is not in memory"):
        ask(stand_in(values(3, 3))[0])
