"""Calls that are written down do what the function does, with the tensors of the call, and hold none of them."""

import gc
import weakref

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from mono_quant.kernels.gpu import replay
from mono_quant.kernels.gpu.features import INTERPRETED
from mono_quant.kernels.gpu.launch import launch
from mono_quant.kernels.gpu.replay import Replays

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here")
CPU = torch.device("cpu")


@triton.jit
def _add(x_ptr, y_ptr, out_ptr, n, factor, WIDTH: tl.constexpr):
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    x, y = tl.load(x_ptr + at, mask=at < n), tl.load(y_ptr + at, mask=at < n)
    tl.store(out_ptr + at, x + factor * y, mask=at < n)


@triton.jit
def _double_tile(x_desc, out_ptr, n, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    tile = x_desc.load([0, 0])
    at = tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(out_ptr + at, 2 * tile, mask=at < n)


def add(x: Tensor, y: Tensor, factor: float, out: Tensor | None = None) -> Tensor:
    """x + factor * y, elementwise."""
    out = torch.empty(x.shape, dtype=x.dtype) if out is None else out
    if x.numel():
        launch(_add, (triton.cdiv(x.numel(), 8),), (x, y, out, x.numel(), factor), {"WIDTH": 8}, device=CPU)
    return out


def twice(x: Tensor, y: Tensor) -> Tensor:
    """(x + 2 y) + 3 y, through memory of its own."""
    return add(add(x, y, 2.0), y, 3.0)


class Counted:
    """Calls through `Replays`; counts how often the function itself runs."""

    def __init__(self, function):
        self.function, self.runs, self.replays = function, 0, Replays(CPU)

    def __call__(self, *tensors):
        def run():
            self.runs += 1
            return self.function(*tensors)

        return self.replays.run((self.function,), run, *tensors)


def pair(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)


def test_from_the_third_call_on_the_function_is_not_asked():
    call = Counted(twice)
    for _ in range(5):
        x, y = pair(3, 7)
        assert torch.equal(call(x, y), twice(x, y))
    assert call.runs == 2


def test_each_kind_of_tensors_is_written_down_by_itself():
    call = Counted(twice)
    memory = torch.randn(64)
    kinds = [
        lambda: pair(3, 7),
        lambda: pair(7, 3),
        lambda: pair(21),
        lambda: pair(3, 7, dtype=torch.float16),
        lambda: (memory[1:22].view(3, 7), torch.randn(3, 7)),
        lambda: (torch.randn(7, 3).t(), torch.randn(7, 3).t()),
        lambda: pair(0, 7),
    ]
    for _ in range(4):
        for make in kinds:
            x, y = make()
            assert torch.equal(call(x, y), twice(x, y))
    assert call.runs == 2 * len(kinds)


def test_what_a_function_is_told_beside_tensors_is_part_of_the_kind():
    replays = Replays(CPU)
    for factor in (2.0, 3.0, 2.0, 3.0, 2.0, 3.0, 3):
        x, y = pair(9)
        got = replays.run(("add", factor), lambda: add(x, y, factor), x, y)  # noqa: B023
        assert torch.equal(got, x + factor * y)


def test_parts_of_inputs_are_found_where_they_are():
    call = Counted(lambda x, y: add(x[1:], y[:, :1].t().reshape(-1)[:6].view(2, 3), 4.0))
    for _ in range(4):
        x, y = torch.randn(3, 3), torch.randn(6, 1)
        assert torch.equal(call(x, y), x[1:] + 4 * y.view(2, 3))
    assert call.runs == 2


def test_inputs_that_share_their_memory():
    call = Counted(twice)
    for i in range(4):
        both = torch.randn(2, 8)
        assert torch.equal(call(both[0], both[1]), twice(both[0], both[1]))
        assert call.runs == min(i + 1, 2)
    # one tensor twice: written down nobody could tell which of the two an address was
    alone = Counted(twice)
    for _ in range(4):
        x = torch.randn(5)
        assert torch.equal(alone(x, x), twice(x, x))
    x, y = pair(5)
    assert torch.equal(alone(x, y), twice(x, y))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: add(x.clone(), y, 1.0),
        lambda x, y: add(x, y, 1.0).mul_(2),
        lambda x, y: add(x, y.abs(), 1.0),
        lambda x, y: add(x, torch.zeros(6), 1.0),
        lambda x, y: add(x, CONSTANT, 1.0),
        lambda x, y: add(x, y, 1.0)[:3],
        lambda x, y: x,
        lambda x, y: None,
    ],
    ids=["copy", "in place", "operation", "filled", "a tensor of its own", "part", "an input", "no answer"],
)
def test_what_does_more_than_start_kernels_is_left_as_it_is(function):
    call = Counted(function)
    for _ in range(5):
        x, y = pair(6)
        got, expected = call(x, y), function(x, y)
        assert (got is None and expected is None) or torch.equal(got, expected)
    assert call.runs == 5
    assert list(call.replays._known.values()) == [False]


CONSTANT = torch.arange(6.0)


def test_several_results_and_none_inputs():
    def run(x, nothing, y):
        assert nothing is None
        return add(x, y, 1.0), add(y, x, 5.0).view(2, 3)

    call = Counted(run)
    for _ in range(4):
        x, y = pair(6)
        first, second = call(x, None, y)
        assert torch.equal(first, x + y) and torch.equal(second, (y + 5 * x).view(2, 3))
    assert call.runs == 2


def test_tiles_are_read_through_descriptors():
    def run(x):
        out = torch.empty_like(x)
        tiles = TensorDescriptor.from_tensor(x, [4, 16])
        launch(_double_tile, (1,), (tiles, out, x.numel()), {"ROWS": 4, "WIDTH": 16}, device=CPU)
        return out

    call = Counted(run)
    for _ in range(4):
        x = torch.randn(4, 16)
        assert torch.equal(call(x), 2 * x)
    assert call.runs == 2


def test_no_memory_of_a_call_is_held():
    call = Counted(twice)
    for _ in range(3):
        x, y = pair(9)
        out = call(x, y)
        held = [weakref.ref(tensor) for tensor in (x, y, out)]
        del x, y, out
        gc.collect()
        assert [ref() for ref in held] == [None] * 3
    assert call.runs == 2


def test_results_are_new_ones_at_each_call():
    call = Counted(twice)
    outs = [call(*pair(9)) for _ in range(5)]
    assert len({out.data_ptr() for out in outs}) == 5


def test_kinds_beyond_a_number_are_forgotten(monkeypatch):
    monkeypatch.setattr(replay, "_MOST", 3)
    call = Counted(twice)
    for _ in range(3):
        for length in range(1, 6):
            x, y = pair(length)
            assert torch.equal(call(x, y), twice(x, y))
    assert len(call.replays._known) <= 3


def test_an_error_leaves_nothing_behind():
    def fails(x, y):
        add(x, y, 1.0)
        raise ValueError("no")

    call = Counted(fails)
    for _ in range(3):
        with pytest.raises(ValueError, match="no"):
            call(*pair(4))
    assert call.runs == 3
