"""Programs do again what was done before them, with the bits of single calls, and only under the same conditions."""

import random
import weakref

import pytest
import torch
from native import native_only

from mono_quant import kernels
from mono_quant.kernels import Recorder, choice, fused, packs, program
from mono_quant.kernels.program import Made, Place, Step

pytestmark = native_only


@pytest.fixture(autouse=True)
def _fresh():
    packs.forget()
    with torch.no_grad():
        yield
    packs.forget()


def product(rows, depth, scheme="int8-g64", parts=1):
    weights = [torch.randint(-127, 128, (rows, depth), dtype=torch.int8) for _ in range(parts)]
    return (
        tuple(weights),
        tuple(torch.rand(rows, 1) + 0.1 for _ in weights),
        tuple(torch.randn(rows) for _ in weights),
        scheme,
    )


def tensors(*products):
    return [t for one in products for group in one[:3] for t in group]


def recorded(inputs, steps):
    """Return a program of what `steps(recorder)` does, and what it gave."""
    recorder = Recorder(choice.active.cpu, inputs)
    outputs = steps(recorder)
    return recorder.finish(outputs), outputs


def test_a_block_of_a_transformer_runs_again_on_other_inputs():
    x, (qkv, out, up, down) = torch.randn(2, 13, 64), (product(64, 64, parts=3), product(64, 64), product(150, 64), product(64, 150))  # fmt: skip
    norm = ("layer", torch.randn(64), torch.randn(64), 1e-5)

    def block(do, x):
        heads = [part.view(2, 13, 4, 16).transpose(1, 2) for part in do.chain_parts(x, qkv, pre=norm)]
        y = do.attention(*heads).transpose(1, 2).reshape(2, 13, 64)
        y = do.chain(y, out, residual=x)
        return do.chain(y, up, pre=norm, act="gelu", second=down, residual=y, post=norm)

    constants = [*tensors(qkv, out, up, down), *norm[1:3]]
    for _ in range(2):
        block(kernels, x)

    def steps(r):
        parts = r.chain_parts(x, qkv, pre=norm)
        heads = [r.views(r.views(part.view(2, 13, 4, 16), part).transpose(1, 2), part) for part in parts]
        y = r.attention(*heads)
        y = r.views(y.transpose(1, 2).reshape(2, 13, 64), y)
        y = r.chain(y, out, residual=x)
        return [r.chain(y, up, pre=norm, act="gelu", second=down, residual=y, post=norm), y]

    made, given = recorded([x, *constants], steps)
    assert torch.equal(given[0], block(kernels, x))
    for _ in range(3):
        other = torch.randn_like(x)
        found, inner = made.run([other, *constants])
        assert torch.equal(found, block(kernels, other))
        assert inner.shape == other.shape and inner.data_ptr() != found.data_ptr()


def test_norms_rotary_and_copies_run_again():
    x, cos, sin = torch.randn(2, 5, 3, 8), torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    residual, weight = torch.randn(2, 5, 3, 8), torch.randn(8)
    how = ("rms", weight, None, 1e-6)

    def steps(r):
        normed, total = r.norm(x, how, residual)
        turned = r.rotary(r.views(normed.transpose(1, 2), normed), cos, sin)
        return [
            turned,
            total,
            r.views(turned.contiguous(), turned),
            r.norm(r.views(turned[:, 1:], turned), how),
        ]

    made, _ = recorded([x, residual, weight, cos, sin], steps)
    inputs = [
        torch.randn_like(x),
        torch.randn_like(x),
        torch.randn(8),
        torch.randn(1, 5, 8),
        torch.randn(1, 5, 8),
    ]
    how = ("rms", inputs[2], None, 1e-6)
    normed, total = fused.norm(inputs[0], how, inputs[1])
    turned = fused.rotary(normed.transpose(1, 2), *inputs[3:])
    expected = [turned, total, turned, fused.norm(turned[:, 1:], how)]
    for found, one in zip(made.run(inputs), expected, strict=True):
        assert torch.equal(found, one)


def convolution(rows, inner, kernel, *, groups=1, last=True):
    """Return an int8 weight [rows, inner / groups, kernel, kernel], its scales, a bias, and a batch norm."""
    weight = torch.randint(-127, 128, (rows, inner // groups, kernel, kernel), dtype=torch.int8)
    weight = weight.contiguous(memory_format=torch.channels_last) if last else weight
    norm = (torch.randn(rows), torch.randn(rows), torch.randn(rows), torch.rand(rows) + 0.5, 1e-3)
    return weight, torch.rand(rows, 1) / 100, torch.randn(rows), norm


def images(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def block_of_convolutions():
    """Return what a block of a CNN does, with all that a convolution can have, and its tensors."""
    first, grouped, narrow, wide = (
        convolution(32, 16, 3), convolution(32, 32, 3, groups=4), convolution(150, 32, 1), convolution(150, 16, 1)
    )  # fmt: skip

    def block(do, x):
        y = do.conv(x, *first[:3], (2, 1), (1, 1), (1, 1), 1, batch_norm=first[3], relu=True)
        y = do.conv(y, *grouped[:3], (1, 1), (2, 2), (2, 2), 4, activations="int8", relu=True)
        z = do.conv(
            x,
            *wide[:3],
            (2, 1),
            (0, 0),
            (1, 1),
            1,
            batch_norm=(None, None, *wide[3][2:]),
            activations="int12",
        )
        how = {"batch_norm": narrow[3], "residual": z, "relu": True, "activations": "int8-g64"}
        return do.conv(y, narrow[0], narrow[1], None, (1, 1), (0, 0), (1, 1), 1, **how)

    used = (*first[:3], *first[3][:4], *grouped[:3], *wide[:3], *wide[3][2:4], *narrow[:2], *narrow[3][:4])
    return block, list(used)


def test_convolutions_run_again_on_other_images():
    block, constants = block_of_convolutions()
    x = images(2, 16, 11, 7)
    for _ in range(2):
        block(kernels, x)
    made, (first,) = recorded([x, *constants], lambda r: (block(r, x),))
    assert made is not None and torch.equal(first, block(kernels, x))
    for _ in range(2):
        other = images(2, 16, 11, 7)
        (found,) = made.run([other, *constants])
        expected = block(kernels, other)
        assert torch.equal(found, expected) and found.stride() == expected.stride()
    # statistics as they are at each call
    constants[5].add_(1)
    (found,) = made.run([other, *constants])
    assert torch.equal(found, block(kernels, other)) and not torch.equal(found, expected)
    constants[0].neg_()
    assert made.run([other, *constants]) is None


def test_outputs_go_to_places_that_lie_as_they_do():
    block, constants = block_of_convolutions()
    x, other = images(2, 16, 11, 7), images(2, 16, 11, 7)
    for _ in range(2):
        block(kernels, x)
    made, _ = recorded([x, *constants], lambda r: (block(r, x),))
    y = block(kernels, other)
    wide = torch.full((5, *y.shape[1:]), 7.0).contiguous(memory_format=torch.channels_last)
    place = wide[2:4]
    (found,) = made.run([other, *constants], [place])
    assert found is place and torch.equal(wide[2:4], y)
    assert (wide[:2] == 7).all() and (wide[4:] == 7).all()
    plain = torch.zeros(y.shape)
    (found,) = made.run([other, *constants], [plain])
    assert found is not plain and torch.equal(found, y) and plain.count_nonzero() == 0

    def twice(r):
        y = block(r, x)
        return y, r.views(y[:, 3:5], y)

    # both lie in one piece of memory
    made, _ = recorded([x, *constants], twice)
    places = [torch.zeros_like(y), torch.zeros_like(y[:, 3:5])]
    found = made.run([other, *constants], places)
    assert torch.equal(found[0], y) and torch.equal(found[1], y[:, 3:5])
    assert all(place.count_nonzero() == 0 for place in places)

    def some(r):
        y = block(r, x)
        return (r.views(y[:1], y),)

    # more is written than what is given away
    made, _ = recorded([x, *constants], some)
    place = torch.zeros_like(y[:1])
    (found,) = made.run([other, *constants], [place])
    assert torch.equal(found, y[:1]) and place.count_nonzero() == 0


def test_convolutions_of_copies_spoil_a_program_and_not_the_run():
    block, constants = block_of_convolutions()
    x, plain = images(2, 16, 11, 7), torch.randn(2, 16, 11, 7)
    for _ in range(2):
        block(kernels, x)
    made, (found,) = recorded([plain, *constants], lambda r: (block(r, plain),))
    assert made is None and torch.equal(found, block(kernels, plain))
    rows = convolution(8, 16, 3, last=False)
    made, (found,) = recorded([x, *rows[:3]], lambda r: (r.conv(x, *rows[:3], (1, 1), (1, 1), (1, 1), 1),))
    assert made is None and torch.equal(found, kernels.conv(x, *rows[:3], (1, 1), (1, 1), (1, 1), 1))
    none = convolution(0, 16, 3)
    made, (found,) = recorded([x, *none[:3]], lambda r: (r.conv(x, *none[:3], (1, 1), (1, 1), (1, 1), 1),))
    assert made is None and found.shape == (2, 0, 11, 7)
    made, (found,) = recorded([x, *constants], lambda r: (block(r, x.double().float().bfloat16()),))
    assert made is None and found.dtype is torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_caches_are_written_at_their_places(dtype):
    def made_of(length, rows):
        cache = torch.zeros(2, 3, 9, 4, dtype=dtype)
        new = torch.randn(2, rows, 3, 4).to(dtype).transpose(1, 2)
        return [cache, torch.tensor([length]), new]

    def steps(r, cache, length, new):
        place = r.add_longs(r.constant(torch.arange(2)), length)
        return [r.copy_rows(cache, 2, place, new), r.add_long(length, 2), place]

    inputs = made_of(3, 2)
    made, _ = recorded(inputs, lambda r: steps(r, *inputs))
    cache, length, new = other = made_of(7, 2)
    versions = cache._version, length._version
    out, moved, place = made.run(other)
    assert out is cache and moved is length and (cache._version, length._version) > versions
    assert place.tolist() == [7, 8] and length.item() == 9
    assert torch.equal(cache[:, :, 7:], new) and cache[:, :, :7].count_nonzero() == 0
    before = cache.clone()
    with pytest.raises(IndexError, match="out of bounds"):
        made.run(other)
    assert torch.equal(before, cache)


def test_what_changes_makes_a_program_useless():
    one = product(48, 64)
    x, constants = torch.randn(1, 70, 64), tensors(one)
    for _ in range(2):
        kernels.chain(x, one)
    made, _ = recorded([x, *constants], lambda r: [r.chain(x, one)])
    assert made.run([x, *constants]) is not None
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert made.run([x, *constants]) is None
    torch.set_num_threads(threads)
    with kernels.using(activations="int12"):
        assert made.run([x, *constants]) is None
    if packs.bytes_held():
        constants[0].neg_()
        # it is not known, then not packed
        assert made.run([x, *constants]) is None
        kernels.chain(x, one)
        assert made.run([x, *constants]) is None
        kernels.chain(x, one)
    (found,) = made.run([x, *constants])
    assert torch.equal(found, kernels.chain(x, one))


def test_a_single_code_that_changes_is_noticed():
    one = product(48, 64)
    x, (weight, scale, bias) = torch.randn(1, 70, 64), tensors(one)
    for _ in range(2):
        kernels.chain(x, one)
    made, _ = recorded([x, weight, scale, bias], lambda r: [r.chain(x, one)])
    weight[17, 5] = -weight[17, 5] + 1
    found = made.run([x, weight, scale, bias])
    # of a copy, which nothing is known of
    expected = kernels.int8_linear(x, weight.clone(), scale, bias, "int8-g64")
    assert found is None or torch.equal(found[0], expected)
    assert torch.equal(kernels.chain(x, one), expected)


def test_what_cannot_be_placed_spoils_a_program_and_not_the_run():
    one, x = product(16, 64), torch.randn(3, 64)
    constants = tensors(one)
    elsewhere, square = torch.randn(3, 64), torch.randn(1, 2, 16, 16)

    def by_torch(r):
        return [r.chain(elsewhere, one)]

    def turned(r):
        wide = r.views(x.t(), x)
        return [r.norm(wide, ("rms", None, None, 1e-6))]

    def half(r):
        return [r.chain(r.views(x.half(), x), one)]

    def upright(r):
        return [r.attention(r.views(square.transpose(2, 3), square), square, square)]

    def twice(r):
        return [r.chain(x, one)]

    for inputs, steps, expected in [
        ([x, *constants], by_torch, kernels.chain(elsewhere, one)),
        ([x, *constants], turned, fused.norm(x.t(), ("rms", None, None, 1e-6))),
        ([x, *constants], half, kernels.chain(x.half(), one)),
        ([square], upright, kernels.attention(square.transpose(2, 3), square, square)),
        ([x, x, *constants], twice, kernels.chain(x, one)),
    ]:
        made, (found,) = recorded(inputs, steps)
        assert made is None and torch.equal(found, expected)


def test_memory_is_shared_only_by_what_is_not_needed_at_once():
    random.seed(3)
    for _ in range(200):
        made = [Made(4 * random.randrange(1, 90), torch.float32) for _ in range(random.randrange(1, 12))]
        steps = []
        for i in range(len(made)):
            used = {-1 - i, *(-1 - random.randrange(i + 1) for _ in range(random.randrange(3)))}
            steps.append(Step(0, b"", tuple(Place(0, home, 0) for home in used)))
        offsets, size = program._laid_out(steps, made, ())
        spans = {
            home: [i for i, step in enumerate(steps) if any(place.home == home for place in step.places)]
            for home in offsets
        }
        for one, at in offsets.items():
            assert at % 64 == 0 and at + made[-1 - one].size <= size
            for other, there in offsets.items():
                together = spans[one][0] <= spans[other][-1] and spans[other][0] <= spans[one][-1]
                apart = at + made[-1 - one].size <= there or there + made[-1 - other].size <= at
                assert one == other or not together or apart


def test_what_lies_between_steps_goes_while_they_are_written_down():
    x = torch.randn(4, 64)
    how = ("layer", None, None, 1e-5)
    recorder = Recorder(choice.active.cpu, [x])
    y, gone = x, []
    for _ in range(4):
        y = recorder.norm(y, how)
        gone.append(weakref.ref(y))
    assert [one() is None for one in gone] == [True, True, True, False]
    program = recorder.finish([y])
    other = torch.randn(4, 64)
    expected = other
    for _ in range(4):
        expected = kernels.norm(expected, how)
    assert torch.equal(program.run([other])[0], expected)
