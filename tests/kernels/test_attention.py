"""Attention: close to the softmax of float64, the same bits whatever runs beside it, torch's where torch has to."""

import math
import threading

import pytest
import torch
from native import NATIVE, native_only, same
from torch import Tensor
from torch.nn import functional as F

from mono_quant import kernels
from mono_quant.errors import InputError

U = 2.0**-24
INF = math.inf


def made(heads, key_heads, queries, keys, size, width=None, batch=2, dense=False):
    """Queries, keys and values as projections leave them, with the length before the heads, or dense."""
    q = torch.randn(batch, queries, heads, size).transpose(1, 2)
    k = torch.randn(batch, keys, key_heads, size).transpose(1, 2)
    v = torch.randn(batch, keys, key_heads, width or size).transpose(1, 2)
    return tuple(t.contiguous() if dense else t for t in (q, k, v))


def visible(queries, keys, causal=False, window=None):
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    return ((distance >= 0) | (not causal)) & (distance < (window or INF))


def exact(q, k, v, mask=None, causal=False, scale=None, window=None):
    """Return the result in float64, and a bound for the error of float32 arithmetic."""
    q, k, v = (t.double() for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores, most = q @ k.mT * scale, q.abs() @ k.abs().mT * scale
    sees = visible(q.shape[2], k.shape[2], causal, window)
    if mask is not None and mask.dtype == torch.bool:
        sees = sees & mask
    elif mask is not None:
        scores, most = scores + mask, most + mask.abs().nan_to_num(0, 0)
    weights = scores.masked_fill(~sees, -INF).softmax(-1).nan_to_num(0)
    # a score is off by U for each of its additions, a weight by twice that, and so is the sum of all; then the sums
    off = 2 * (q.shape[-1] + 4) * float(most.max()) + min(256, k.shape[2]) + k.shape[2] / 16 + 32
    return weights @ v, off * U * float(v.abs().max())


def masks(batch, heads, queries, keys):
    lengths = torch.arange(batch)[:, None, None, None]
    return {
        "none": None,
        "padding": torch.arange(keys) < keys - lengths,
        "expanded": (torch.arange(keys) < keys - lengths).expand(batch, 1, queries, keys),
        "rows": torch.rand(queries, keys) > 0.3,
        "heads": torch.rand(1, heads, queries, keys) > 0.3,
        "bias": torch.randn(1, heads, queries, keys),
        "all": torch.randn(batch, heads, queries, keys),
        "strided": torch.randn(batch, 1, keys, queries).mT,
        "one per query": torch.rand(batch, 1, queries, 1) > 0.3,
        "infinite": torch.where(torch.rand(batch, 1, queries, keys) > 0.3, 0.0, -INF),
        "lowest": torch.where(torch.rand(1, 1, queries, keys) > 0.3, 0.0, torch.finfo(torch.float32).min),
    }


MASKS = list(masks(1, 1, 1, 1))
# heads, heads of keys, queries, keys, size, size of values
SIZES = [
    (2, 2, 5, 7, 16, 16),
    (4, 2, 70, 70, 32, 32),
    (3, 1, 1, 600, 64, 64),
    (2, 2, 50, 515, 80, 24),
    (2, 1, 3, 300, 128, 256),
    (8, 2, 13, 257, 7, 5),
    (1, 1, 200, 10, 17, 33),
    (6, 3, 193, 256, 1, 1),
    (2, 1, 47, 31, 65, 100),
    (5, 1, 49, 48, 256, 3),
]


@pytest.fixture(params=NATIVE)
def path(request):
    with kernels.using(request.param):
        yield request.param


@native_only
@pytest.mark.parametrize("sizes", SIZES)
def test_it_is_the_softmax_of_float64(path, sizes):
    # the portable path shares every line with the others, and is slow
    queries, keys = sizes[2:4]
    for i, (name, mask) in enumerate(masks(2, sizes[0], queries, keys).items()):
        if path == "portable" and i % 4:
            continue
        q, k, v = made(*sizes, dense=bool(i % 2))
        how = [{}, {"causal": True}, {"causal": True, "window": 40}, {"scale": 0.3}][i % 4]
        out = kernels.try_attention(q, k, v, mask, **how)
        expected, bound = exact(q, k, v, mask, **how)
        error = (out - expected).abs().max()
        assert error <= bound, name
        other = kernels.attention(
            *(t.double() for t in (q, k, v)), None if mask is None else mask_of(mask), **how
        )
        assert (other - expected).abs().max() < 1e-12, name
        with kernels.using("reference"):
            by_torch = kernels.attention(q, k, v, mask, **how)
        assert error <= 4 * (by_torch - expected).abs().max() + 8 * U * v.abs().max(), name


def mask_of(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask.double()


@native_only
def test_the_result_lies_as_the_next_projection_reads_it():
    out = kernels.attention(*made(3, 3, 5, 6, 16, 8))
    assert out.shape == (2, 3, 5, 8)
    assert out.transpose(1, 2).is_contiguous()
    with kernels.using("reference"):
        assert kernels.attention(*made(3, 3, 5, 6, 16, 8)).transpose(1, 2).is_contiguous()


@native_only
@pytest.mark.parametrize("sizes", [(4, 2, 60, 300, 32, 32), (4, 1, 1, 1000, 64, 48), (2, 2, 100, 70, 80, 80)])
@pytest.mark.parametrize("mask", ["none", "heads", "all"])
@pytest.mark.parametrize("causal", [False, True])
def test_bits_depend_on_nothing_else(sizes, mask, causal):
    q, k, v = made(*sizes, batch=3)
    mask = masks(3, sizes[0], *sizes[2:4])[mask]
    expected = kernels.attention(q, k, v, mask, causal=causal)
    for other in NATIVE:
        with kernels.using(other):
            assert torch.equal(kernels.attention(q, k, v, mask, causal=causal), expected), other
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3, 16):
            torch.set_num_threads(n)
            assert torch.equal(kernels.attention(q, k, v, mask, causal=causal), expected), n
    finally:
        torch.set_num_threads(threads)
    full = None if mask is None else mask.expand(3, *mask.shape[1:])
    for b in range(3):
        part = None if full is None else full[b : b + 1]
        found = kernels.attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], part, causal=causal)
        assert torch.equal(found, expected[b : b + 1])
    # the same queries, asked one after another and in other groups
    sees = visible(*sizes[2:4], causal)
    if mask is None:
        full = sees
    else:
        full = mask & sees if mask.dtype == torch.bool else mask.masked_fill(~sees, -INF)
    full = full.expand(3, sizes[0], *sizes[2:4])
    for start in range(0, sizes[2], 37):
        rows = slice(start, start + 37)
        assert torch.equal(kernels.attention(q[:, :, rows], k, v, full[:, :, rows]), expected[:, :, rows])


@native_only
@pytest.mark.parametrize("key_heads", [1, 4])
@pytest.mark.parametrize("window", [None, 100])
def test_decoding_gives_the_bits_of_prefill(key_heads, window):
    q, k, v = made(4, key_heads, 560, 560, 32)
    whole = kernels.attention(q, k, v, causal=True, window=window)
    static = (torch.zeros(2, key_heads, 700, 32), torch.zeros(2, key_heads, 700, 32))
    for held, new in zip(static, (k, v), strict=True):
        held[:, :, :560] = new
    for at in (0, 1, 15, 16, 100, 255, 256, 257, 511, 512, 559):
        past = slice(0, at + 1)
        one = q[:, :, at : at + 1]
        found = kernels.attention(one, k[:, :, past], v[:, :, past], causal=True, window=window)
        assert torch.equal(found, whole[:, :, at : at + 1]), at
        mask = visible(700, 700, True, window)[at].view(1, 1, 1, 700)
        assert torch.equal(kernels.attention(one, *static, mask), whole[:, :, at : at + 1]), at
        # and what comes later is of no consequence
        prefix = kernels.attention(q[:, :, past], k[:, :, past], v[:, :, past], causal=True, window=window)
        assert torch.equal(prefix, whole[:, :, past]), at


@native_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [5, 40, 128])
def test_a_few_rows_that_read_keys_where_they_lie_have_the_bits_of_many(path, size, dtype):
    for rows, keys in ((1, 300), (2, 33), (3, 16), (5, 257), (8, 64), (9, 300)):
        q, k, v = (t.to(dtype) for t in made(rows, 1, 60, keys, size))
        whole = kernels.attention(q, k, v)
        for at in (0, 31, 59):
            assert torch.equal(kernels.attention(q[:, :, at : at + 1], k, v), whole[:, :, at : at + 1]), rows


@native_only
@pytest.mark.parametrize(("queries", "keys"), [(1, 300), (13, 40), (60, 300), (200, 200)])
def test_what_the_mask_hides_behind_the_last_key_of_all_queries_is_not_read(path, queries, keys):
    q, k, v = made(4, 2, queries, keys, 24)
    for end in (0, 1, 16, keys - 17, keys - 1):
        spoilt = [t.clone() for t in (k, v)]
        for t in spoilt:
            t[:, :, end:] = math.nan
        mask = (torch.arange(keys) < end).expand(queries, keys).contiguous()
        assert torch.equal(
            kernels.attention(q, *spoilt, mask), kernels.attention(q, k[:, :, :end], v[:, :, :end])
        ), end


@native_only
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("lengths", [(1, 9), (5, 5), (50, 50), (49, 70), (100, 33), (197, 197)])
def test_many_short_sequences_have_the_bits_of_each(key_heads, lengths):
    q, k, v = made(4, key_heads, *lengths, 16, 24, batch=17)
    mask = torch.arange(lengths[1]) <= torch.arange(17)[:, None, None, None]
    expected = torch.cat([
        kernels.attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], mask[b : b + 1]) for b in range(17)
    ])
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert torch.equal(kernels.attention(q, k, v, mask), expected), n
    finally:
        torch.set_num_threads(threads)
    exactly, bound = exact(q, k, v, mask)
    assert (expected - exactly).abs().max() <= bound


@native_only
@pytest.mark.parametrize("queries", [1, 20, 60])
def test_who_may_see_nothing_gets_what_torch_gives(path, queries):
    q, k, v = made(2, 1, queries, 300, 16)
    row = queries // 2
    for hidden in (torch.tensor(False), torch.tensor(-INF)):
        mask = torch.ones(1, 1, queries, 300, dtype=hidden.dtype)
        mask[..., row, :] = hidden
        out = kernels.attention(q, k, v, mask)
        assert torch.equal(out[:, :, row], torch.zeros(2, 2, 16))
        expected, bound = exact(q, k, v, mask)
        assert (out - expected).abs().max() <= bound
    lowest = torch.zeros(1, 1, queries, 300)
    lowest[..., row, :] = torch.finfo(torch.float32).min
    mean = v.double().mean(2).expand(2, 2, 16)
    assert (kernels.attention(q, k, v, lowest)[:, :, row] - mean).abs().max() < 1e-6


@native_only
def test_queries_before_all_keys_get_zeros():
    q, k, v = made(2, 2, 9, 4, 16)
    out = kernels.attention(q, k, v, causal=True)
    assert torch.equal(out[:, :, :5], torch.zeros(2, 2, 5, 16))
    expected, bound = exact(q, k, v, causal=True)
    assert (out - expected).abs().max() <= bound


@native_only
@pytest.mark.parametrize("bad", [math.nan, INF])
def test_what_is_not_finite_stays_with_those_who_see_it(path, bad):
    q, k, v = made(2, 1, 60, 600, 16)
    clean = kernels.attention(q, k, v)
    spoilt = q.clone()
    spoilt[0, 1, 7, 3] = bad
    out = kernels.attention(spoilt, k, v)
    assert out[0, 1, 7].isnan().all()
    others = torch.ones(2, 2, 60, dtype=torch.bool)
    others[0, 1, 7] = False
    assert torch.equal(out[others], clean[others])
    # a key that only the first batch may see
    spoilt, mask = k.clone(), torch.ones(2, 1, 1, 600, dtype=torch.bool)
    spoilt[:, :, 300] = math.nan
    mask[1, ..., 300] = False
    out = kernels.attention(q, spoilt, v, mask)
    assert out[0].isnan().all()
    assert torch.equal(out[1], kernels.attention(q, k, v, mask)[1])


@native_only
def test_scores_may_be_large(path):
    q, k, v = made(1, 1, 3, 300, 16)
    out = kernels.attention(q * 1e4, k * 1e4, v)
    expected, _ = exact(q * 1e4, k * 1e4, v)
    # one key wins
    assert (out - expected).abs().max() < 1e-6


@native_only
@pytest.mark.parametrize("sizes", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_nothing_gives_nothing(sizes):
    batch, heads, queries, keys = sizes
    q = torch.randn(batch, heads, queries, 8)
    k = v = torch.randn(batch, max(1, heads), keys, 8)
    assert torch.equal(kernels.attention(q, k, v), torch.zeros(batch, heads, queries, 8))


@native_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(4, 2, 60, 300, 33, 20), (4, 1, 1, 300, 64, 64), (2, 2, 50, 40, 16, 80)])
def test_half_precision_is_computed_in_float32(path, dtype, sizes):
    for name, mask in masks(2, sizes[0], *sizes[2:4]).items():
        if name == "bias":
            mask = mask.to(dtype)
        inputs = [t.to(dtype) for t in made(*sizes)]
        found = kernels.try_attention(*inputs, mask, causal=True)
        wide = mask.float() if name == "bias" else mask
        expected = kernels.try_attention(*(t.float() for t in inputs), wide, causal=True)
        assert torch.equal(found, expected.to(dtype)), name
        assert found.transpose(1, 2).is_contiguous()


@native_only
def test_an_output_is_where_its_inputs_are():
    q, k, v = made(2, 2, 5, 9, 16)
    with torch.device("meta"):
        assert kernels.attention(q, k, v).is_cpu


@native_only
def test_eight_threads_at_once():
    calls = [made(4, 2, 1 + 40 * i, 300, 32) for i in range(8)]
    expected = [kernels.attention(*call, causal=True) for call in calls]
    wrong = []

    def work(i):
        for _ in range(10):
            if not torch.equal(kernels.attention(*calls[i], causal=True), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


def test_gradients_are_torchs():
    q, k, v = (t.requires_grad_() for t in made(4, 2, 5, 9, 16))
    assert kernels.try_attention(q, k, v) is None
    torch.testing.assert_close(
        torch.autograd.grad(kernels.attention(q, k, v, causal=True).square().sum(), (q, k, v)),
        torch.autograd.grad(
            F.scaled_dot_product_attention(q, k, v, visible(5, 9, True), enable_gqa=True).square().sum(),
            (q, k, v),
        ),
    )


# torch says so of its own op
@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:.torch.jit:DeprecationWarning")
def test_transforms_and_whatever_else_are_torchs():
    q, k, v = made(2, 2, 5, 9, 16)
    plain = kernels.attention(q, k, v)
    torch.testing.assert_close(
        torch.func.vmap(kernels.attention)(*(t.unsqueeze(0) for t in (q, k, v)))[0], plain
    )
    slopes = torch.func.grad(lambda x: kernels.attention(q, k, x).sum())(v)
    torch.testing.assert_close(slopes.sum(2), torch.full((2, 2, 16), 5.0))
    double = kernels.attention(*(t.double() for t in (q, k, v)))
    torch.testing.assert_close(double.float(), plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.attention(q, k, v).dtype == torch.bfloat16
    traced = torch.jit.trace(kernels.attention, (q, k, v))
    torch.testing.assert_close(traced(q, k, v), plain)
    assert kernels.attention(*(t.to("meta") for t in (q, k, v))).shape == plain.shape


@native_only
def test_a_compiler_sees_one_op():
    q, k, v = made(4, 2, 5, 9, 16)
    mask = torch.rand(2, 1, 5, 9) > 0.3
    torch.library.opcheck(torch.ops.mono_quant.attention, (q, k, v, mask, True, None, 3))
    seen = []

    def backend(graph, _):
        seen.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph

    compiled = torch.compile(kernels.attention, backend=backend, fullgraph=True)
    with torch.inference_mode():
        assert torch.equal(
            compiled(q, k, v, mask, causal=True), kernels.attention(q, k, v, mask, causal=True)
        )
        assert seen == ["mono_quant.attention"]

    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return kernels.attention(q, k, v) + 1

    with torch.no_grad():
        program = torch.export.export(Module(), (q, k, v))
    assert same(program.module()(q, k, v), kernels.attention(q, k, v) + 1)


def test_what_does_not_go_together_is_refused():
    q, k, v = made(4, 2, 5, 9, 16)
    for wrong in (
        (q[:1], k, v),
        (q, k[:, :, :3], v),
        (q[..., :3], k, v),
        (q[:, :3], k, v),
        (q[0], k[0], v[0]),
    ):
        with pytest.raises(InputError, match=r"q \[B, H, L, D\].*H a multiple of Hkv"):
            kernels.attention(*wrong)
    with pytest.raises(InputError, match=r"window=3 needs causal=True"):
        kernels.attention(q, k, v, window=3)
    with pytest.raises(InputError, match="window=0"):
        kernels.attention(q, k, v, causal=True, window=0)
