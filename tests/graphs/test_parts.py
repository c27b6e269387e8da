"""Runs of convolutions take a batch in parts, with the bits, the layout and the conditions of the whole one."""

import threading

import pytest
import torch
from beside import Beside, beside
from native import native_only
from torch import Tensor, nn

from mono_quant import dynamic_quantize, kernels
from mono_quant.graphs import parts
from mono_quant.graphs.runs import Run
from mono_quant.kernels import fused_conv

pytestmark = native_only
BATCHES = (1, 2, 3, 5, 33)
# of an image in the step of `Blocks` with the most of them: `wide` reads 32 channels, writes 48 and adds 48
WIDEST = 4 * (32 + 48 + 48) * 5 * 4


class Blocks(nn.Module):
    """Four convolutions of which two are given away; `side` is added to one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.jump = nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.Conv2d(16, 48, 1, 2)
        self.second, self.wide = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 48, 1)
        self.norm, self.norms = nn.BatchNorm2d(32), nn.BatchNorm2d(48)
        for norm in (self.norm, self.norms):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 1.5)

    def forward(self, x: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, 16, 9, 7] and side [B, 32, 5, 4] to [B, 32, 5, 4] and [B, 48, 5, 4]."""
        y = torch.relu(self.second(torch.relu(self.norm(self.first(x)))) + side)
        return y, torch.relu(self.norms(self.wide(y)) + self.jump(x))


def int8(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return dynamic_quantize(model.eval(), "int8", disable_defaults=["head", "small"])[0]


@pytest.fixture
def blocks(monkeypatch):
    """Blocks that take two images at a time."""
    monkeypatch.setattr(fused_conv, "IN_CACHES", 2 * WIDEST)
    model, backend = beside(int8(Blocks()))
    yield model, backend
    torch.compiler.reset()


def images(batch: int, last: bool = True) -> tuple[Tensor, Tensor]:
    order = torch.channels_last if last else torch.contiguous_format
    x, side = torch.randn(batch, 16, 9, 7), torch.randn(batch, 32, 5, 4)
    return x.contiguous(memory_format=order), side.contiguous(memory_format=order)


def settled(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        for _ in range(4):
            found = model(*inputs)
    return found


def sizes(backend: Beside) -> list[int]:
    """The batches that the programs of the last run were written for."""
    shapes = [
        [one for one in key if isinstance(one, tuple) and len(one) == 4] for key in backend.runs[-1]._programs
    ]
    return sorted(first[0] for first, *_ in shapes)


@pytest.mark.parametrize("last", [True, False])
def test_parts_have_the_bits_and_the_layout_of_the_whole_batch(blocks, last):
    model, backend = blocks
    for batch in BATCHES:
        inputs = images(batch, last)
        found = settled(model, inputs)
        with torch.no_grad():
            eager = Blocks.forward(model, *inputs)
        # batch norm is folded in other steps there, and a code may be another one
        torch.testing.assert_close(found, eager, rtol=0, atol=0.02)
    # more than two images have no program of their own
    assert sizes(backend) == ([1, 2] if last else [])


def test_without_batch_norm_parts_have_the_bits_of_eager_code(monkeypatch):
    monkeypatch.setattr(fused_conv, "IN_CACHES", 3 * 4 * (16 + 24) * 6 * 5)
    layers = [nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 16, 3, padding=1), nn.ReLU()]
    model, backend = int8(nn.Sequential(*layers)), Beside()
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(7, 16, 6, 5).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = model(x)
        for _ in range(3):
            assert torch.equal(compiled(x), expected)
    assert sizes(backend) == [1, 3]


def test_a_whole_batch_that_fits_is_one_part(blocks):
    model, backend = blocks
    for batch in (1, 2):
        torch.compiler.reset()
        settled(model, images(batch))
        assert sizes(backend) == [batch]


def test_memory_between_steps_does_not_grow_with_the_batch(blocks, monkeypatch):
    model, backend = blocks
    arenas = []
    for batch in (3, 33, 64):
        settled(model, images(batch))
        arenas.append(max(one._arena for run in backend.runs for one in run._programs.values()))
    assert arenas[0] == arenas[1] == arenas[2]
    monkeypatch.setattr(fused_conv, "IN_CACHES", 1 << 30)
    torch.compiler.reset()
    settled(model, images(65))
    assert max(one._arena for one in backend.runs[-1]._programs.values()) > 20 * arenas[0]


def test_images_may_lie_apart_and_be_parts_of_larger_ones(blocks):
    model, _ = blocks
    x, side = images(10)
    wide = torch.randn(5, 9, 7, 20).permute(0, 3, 1, 2)[:, 2:18]
    for inputs in [(x[::2], side[1::2]), (x[3:8], side[5:]), (x[:1].expand(5, -1, -1, -1), side[:5]), (wide, side[::2])]:  # fmt: skip
        dense = tuple(t.contiguous(memory_format=torch.channels_last) for t in inputs)
        assert all(map(torch.equal, settled(model, inputs), settled(model, dense)))


def test_what_changes_between_calls_is_read(blocks):
    model, _ = blocks
    inputs = images(5)
    seen = [settled(model, inputs)]

    def changed() -> None:
        found = settled(model, inputs)
        assert not any(torch.equal(one, other) for one, other in zip(found, seen[-1], strict=True))
        seen.append(found)

    with torch.no_grad():
        model.norm.running_var.mul_(2)
        model.norms.running_mean.add_(0.1)
        changed()
        model.first.state_dict(keep_vars=True)["weight"].neg_()
        changed()
        model.second.weight_scale.mul_(0.5)
        changed()


def test_threads_take_batches_of_their_own(blocks):
    model, _ = blocks
    given = [images(batch) for batch in (3, 5)]
    expected = [settled(model, inputs) for inputs in given]
    wrong = []

    def work(inputs, results):
        with torch.no_grad():
            for _ in range(20):
                if not all(map(torch.equal, model(*inputs), results)):
                    wrong.append(1)

    threads = [
        threading.Thread(target=work, args=pair) for pair in 2 * list(zip(given, expected, strict=True))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def run_of(forward, *inputs: Tensor) -> Run:
    """Return the run that a function of tensors and a block becomes, called as often as it takes to settle."""

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, padding=1)
            self.last, self.side = nn.Linear(4, 5), nn.Parameter(torch.randn(3, 16, 5, 4))

        def forward(self, *given: Tensor) -> Tensor:
            return forward(self, *given)

    model, backend = beside(int8(Written()))
    settled(model, inputs)
    return backend.runs[0]


def two(m, x):
    return torch.relu(m.two(torch.relu(m.one(x))))


def test_only_convolutions_of_images_are_taken_in_parts(monkeypatch):
    monkeypatch.setattr(fused_conv, "IN_CACHES", 1)
    x = torch.randn(3, 16, 5, 4).contiguous(memory_format=torch.channels_last)

    def added(m, x):
        return torch.relu(m.two(two(m, x)) + m.side)

    assert run_of(two, x)._images is not None
    assert run_of(added, x)._images is None


def test_images_stay_together_where_torch_has_to_look(blocks):
    model, _ = blocks
    x, side = images(3)
    for _ in range(4):
        found = model(x.requires_grad_(), side)
    sum(one.sum() for one in found).backward()
    assert x.grad.abs().sum() > 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        settled(model, images(3))
    with kernels.using("reference"):
        settled(model, images(3))


def test_what_fits_is_found_from_the_shapes(monkeypatch):
    weights = [torch.empty(32, 2, 3, 3, dtype=torch.int8), torch.empty(8, 32, 1, 1, dtype=torch.int8)]
    steps = [
        parts._Step(0, 1, None, ((2, 2), (1, 1), (1, 1), 1)),
        parts._Step(3, 2, None, ((1, 1), (0, 0), (1, 1), 1)),
        parts._Step(3, 2, 4, ((1, 1), (0, 0), (1, 1), 1)),
    ]
    found = parts.Images([0], steps)
    for height, width in [(10, 8), (100, 90), (9, 7), (10, 8)]:
        x = torch.empty(5, 2, height, width)
        # 32 channels are read, 8 added and 8 written
        widest = 4 * (32 + 8 + 8) * ((height + 1) // 2) * ((width + 1) // 2)
        for room, expected in [(3 * widest + 5, 3), (3 * widest - 1, 2), (widest, 1), (5, 1)]:
            monkeypatch.setattr(fused_conv, "IN_CACHES", room)
            found._last = (None, 0)
            assert found.at_once([x, *weights], 5) == expected
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        monkeypatch.setattr(fused_conv, "IN_CACHES", 4 * widest)
        # each thread its own image, where there is one for each
        assert [found.at_once([x, *weights], count) for count in (4, 5, 3)] == [1, 1, 4]
    finally:
        torch.set_num_threads(before)
    assert found.count([x, *weights]) == 5
    assert found.count([x.half(), *weights]) is None


class Stem(nn.Module):
    """A convolution with or without what joins it, and a pool behind it."""

    def __init__(self, norm: bool, **pool: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 24, 3, 2, 1)
        self.norm = nn.BatchNorm2d(24) if norm else nn.Identity()
        self.pool = nn.MaxPool2d(**pool)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 16, H, W] to what the pool makes of [B, 24, H', W']."""
        return self.pool(torch.relu(self.norm(self.conv(x))))


POOLS = [
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 2},
    {"kernel_size": (2, 3), "dilation": 2, "stride": 1, "ceil_mode": True},
]


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("last", [True, False])
def test_a_convolution_with_a_pool_behind_it_goes_in_parts(monkeypatch, pool, last):
    monkeypatch.setattr(fused_conv, "IN_CACHES", 2 * 4 * (16 * 14 * 13 + 24 * 7 * 7) + 9)
    stem = int8(Stem(norm=False, **pool))
    compiled = torch.compile(stem, backend="mono_quant")
    taken, alone = [], fused_conv.conv
    monkeypatch.setattr(
        fused_conv, "conv", lambda x, *rest, **how: (taken.append(len(x)), alone(x, *rest, **how))[1]
    )
    order = torch.channels_last if last else torch.contiguous_format
    for batch in (5, 1, 2, 33):
        x = torch.randn(batch, 16, 14, 13).contiguous(memory_format=order)
        x[0, :, 3:7, 3:7], x[-1, 0, 9, 9] = -torch.rand(1), torch.nan
        with torch.no_grad():
            expected, found = stem(x), compiled(x)
        assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7)) and found.isnan().any()
        assert last or found.stride() == expected.stride()
        assert taken == [min(2, batch - first) for first in range(0, batch, 2)]
        taken.clear()
    torch.compiler.reset()


def test_a_result_in_parts_can_be_written_into(monkeypatch):
    monkeypatch.setattr(fused_conv, "IN_CACHES", 1)
    stem = int8(Stem(norm=False, kernel_size=7))
    with torch.no_grad():
        found = torch.compile(stem, backend="mono_quant")(torch.randn(3, 16, 14, 13))
    factor = nn.Parameter(torch.full((1,), 2.0))
    expected = 2 * found
    found.mul_(factor)
    assert torch.equal(found, expected) and found.requires_grad
    torch.compiler.reset()


@pytest.mark.parametrize("last", [True, False])
def test_a_pool_behind_a_lone_convolution_keeps_the_layout_of_eager_code(last):
    conv = int8(nn.Sequential(nn.Conv2d(8, 12, 3, padding=1)))
    order = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(3, 8, 8, 8).contiguous(memory_format=order)

    def pooled(x):
        return torch.nn.functional.max_pool2d(conv(x), 2)

    with torch.no_grad():
        expected, found = pooled(x), torch.compile(pooled, backend="mono_quant")(x)
    assert torch.equal(found, expected) and found.stride() == expected.stride()
    torch.compiler.reset()


def test_a_pool_is_joined_only_to_what_nobody_else_sees(monkeypatch):
    monkeypatch.setattr(fused_conv, "IN_CACHES", 1)
    calls = []
    pooled = kernels.pooled_conv
    monkeypatch.setattr(
        kernels, "pooled_conv", lambda *given, **how: (calls.append(1), pooled(*given, **how))[1]
    )
    stem = int8(Stem(norm=True, kernel_size=2))
    x = torch.randn(3, 16, 14, 13)

    def indices(x):
        return torch.nn.functional.max_pool2d(torch.relu(stem.norm(stem.conv(x))), 2, return_indices=True)

    def seen(x):
        y = torch.relu(stem.norm(stem.conv(x)))
        return stem.pool(y), y + 1

    for function, joined in ((stem, True), (indices, False), (seen, False)):
        torch.compiler.reset()
        with torch.no_grad():
            expected, found = function(x), torch.compile(function, backend="mono_quant")(x)
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert bool(calls) is joined
        calls.clear()
    torch.compiler.reset()
    given = x.clone().requires_grad_()
    torch.compile(stem, backend="mono_quant")(given).sum().backward()
    assert given.grad.abs().sum() > 0
    torch.compiler.reset()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_have_parts_of_their_own(monkeypatch, threads):
    monkeypatch.setattr(fused_conv, "IN_CACHES", threads * (2 * 4 * (16 + 24) * 6 * 5 + 9))
    done, apart = [], kernels.Program.run_apart

    def noted(*given):
        found = apart(*given)
        done.extend(() if found is None else found[1:])
        return found

    monkeypatch.setattr(kernels.Program, "run_apart", noted)
    layers = [nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 16, 3, padding=1), nn.ReLU()]
    model, before = int8(nn.Sequential(*layers)), torch.get_num_threads()
    compiled = torch.compile(model, backend=Beside())
    try:
        torch.set_num_threads(threads)
        for batch in (13, 14, 3, 33):
            x = torch.randn(batch, 16, 6, 5).contiguous(memory_format=torch.channels_last)
            with torch.no_grad():
                expected = model(x)
                for _ in range(4):
                    assert torch.equal(compiled(x), expected)
            # as many parts as keep all threads busy; those that are left have all threads
            assert not done or set(done) == {batch // 2 // threads * threads * 2}
            assert done or batch < 2 * threads
            done.clear()
            assert torch.equal(expected, model(x))
    finally:
        torch.set_num_threads(before)
