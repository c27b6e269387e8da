"""A tensor that others may only read: what counts as a write, and what comes out of it."""

import pytest
import torch
from torch.nn import functional as F

from mono_quant.convert.computed import ComputedWeight, computed, read_once
from mono_quant.errors import FrozenWeightError


def make():
    return computed(torch.arange(12.0).view(3, 4), "it is frozen")


VIEWS = {
    "row": lambda w: w[1],
    "transposed": lambda w: w.t(),
    "flat": lambda w: w.view(-1),
    "narrow": lambda w: w.narrow(1, 1, 2),
    "data": lambda w: w.data,
    "detached": lambda w: w.detach(),
    "same dtype": lambda w: w.to(torch.float32),
    "one of a list": lambda w: w.unbind()[2],
    "view of a view": lambda w: w.t()[0],
}


@pytest.mark.parametrize("view", list(VIEWS))
def test_a_view_is_like_the_weight(view):
    weight = make()
    seen, plain = VIEWS[view](weight), VIEWS[view](torch.arange(12.0).view(3, 4))
    assert type(seen) is ComputedWeight and torch.equal(seen, plain)
    with pytest.raises(FrozenWeightError, match="it is frozen"):
        seen.add_(1)


def test_what_has_memory_of_its_own_is_a_plain_tensor():
    weight = make()
    for out in (
        weight + 1,
        weight.double(),
        weight.sum(),
        weight[[0, 2]],
        torch.cat([weight, weight]),
        F.relu(weight),
    ):
        assert type(out) is torch.Tensor
    assert weight.shape == (3, 4) and weight.tolist()[0] == [0.0, 1.0, 2.0, 3.0]


WRITES = {
    "out=": lambda w: torch.mul(torch.ones(3, 4), 2, out=w),
    "inplace=True": lambda w: F.relu(w - 0, inplace=True) + F.relu(w, inplace=True),
    "in a list": lambda w: torch._foreach_zero_([torch.ones(2), w]),
    "setitem": lambda w: w.__setitem__((0, 0), 5.0),
    "data": lambda w: setattr(w, "data", torch.ones(3, 4)),
    "resize_": lambda w: w.resize_(2, 2),
}


@pytest.mark.parametrize("write", list(WRITES))
def test_a_write_is_found_by_whatever_way_it_comes(write):
    with pytest.raises(FrozenWeightError, match="it is frozen"):
        WRITES[write](make())


def test_a_weight_may_be_the_source_of_a_write():
    weight, target = make(), torch.zeros(3, 4)
    target.copy_(weight).add_(weight)
    target[0] = weight[0]
    assert torch.equal(target[0], weight[0]) and torch.equal(target[1:], 2 * weight[1:])


@pytest.mark.parametrize(
    "value", [torch.empty(2, 3, device="meta"), torch.empty(0, 3)], ids=["meta", "empty"]
)
def test_what_holds_no_values_stays_what_it_is(value):
    assert computed(value, "it is frozen") is value


def test_asking_for_no_gradient_is_no_write():
    weight = make()
    weight.requires_grad = False
    assert weight.requires_grad_(False).requires_grad is False
    for write in (weight.requires_grad_, lambda: weight.requires_grad_(True)):
        with pytest.raises(FrozenWeightError, match="it is frozen"):
            write()


def test_a_weight_is_made_once_while_it_is_held_and_what_it_is_made_from_stays():
    codes, scale = torch.arange(12.0), torch.ones(1)

    def read(dtype=torch.float64):
        return read_once([codes, scale], dtype, lambda: (codes * scale).to(dtype), "it is frozen")

    held = read()
    assert read() is held and read(torch.float32) is not held
    held = read()
    scale.mul_(2)
    again = read()
    assert again is not held and torch.equal(again, codes.double() * 2)
    codes.data = codes.data + 1
    moved = read()
    assert torch.equal(moved, codes.double() * 2)
    with pytest.raises(FrozenWeightError):
        moved.data.zero_()
    assert torch.equal(read(), codes.double() * 2)
