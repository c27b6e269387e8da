"""On a device, what makes the codes of a layer joins it, and others still get what they use of it."""

import pytest
import torch
from captured import capture
from torch import Tensor, nn
from torch.nn import functional as F

from mono_quant import dynamic_quantize, kernels

pytest.importorskip("triton")

K, N = 64, 96


class Layers(nn.Module):
    """Int8 layers from 64 features to 96 and back, norms, and a forward to try."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.b, self.down = nn.Linear(K, N), nn.Linear(K, N, bias=False), nn.Linear(N, K)
        self.same, self.norm, self.both = nn.Linear(K, K), nn.LayerNorm(K), nn.Linear(K, 2 * N)
        self.rms = nn.Parameter(torch.rand(K) + 0.5)
        self.written = forward

    def forward(self, *args):
        return self.written(self, *args)


def rms(m, x):
    """As Llama writes it."""
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return m.rms * h.to(x.dtype)


def flat(out):
    return [out] if isinstance(out, Tensor) else list(out)


def joined(forward, inputs=1, dtype=torch.bfloat16):
    """Return the calls that a forward becomes, after checking that they stand for what is written, and compute it."""
    torch.manual_seed(0)
    model = dynamic_quantize(Layers(forward).eval().to(dtype), "int8", disable_defaults=["head"])[0]
    args = torch.randn(inputs, 2, 5, K).to(dtype).unbind()
    with kernels.using(path="triton"), torch.inference_mode():
        eager = flat(model(*(x.clone() for x in args)))
        captured, composed = capture(model, *(x.clone() for x in args))
    # a code that lies next to a tie counts 1/127 of the largest value, an activation is rounded once more or less
    bound = 1e-2 if dtype is torch.float32 else 4e-2
    for one, other, fused in zip(eager, flat(composed), flat(captured.fused[0]), strict=True):
        assert torch.equal(one, other)
        assert (fused - one).abs().max() <= bound * one.abs().max()
    return dict(captured.calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_block_of_llama_is_two_calls_and_a_product(dtype):
    def block(m, x, y):
        normed = rms(m, total := x + y)
        total = total + m.same(m.down(F.relu(m.a(normed))))
        normed = rms(m, total)
        return total + m.down(F.silu(m.a(normed)) * m.b(normed))

    assert joined(block, 2, dtype) == {
        "chain_kept added pre act second and sum": 1,
        "int8_linear": 1,
        "chain_kept added pre gate act second and sum": 1,
    }


@pytest.mark.parametrize(
    ("forward", "calls"),
    [
        # BERT: what is normed goes on
        (lambda m, x, y: m.same(n := m.norm(x + y)) + n, {"chain_kept added pre and normed": 1}),
        (lambda m, x, y: m.a(m.norm(x)) + m.b(y), {"chain pre": 1, "int8_linear": 1}),
        (lambda m, x, y: (m.a(n := m.norm(x)), m.b(n), m.same(n)), {"chain_parts pre": 1}),
        (lambda m, x, y: (m.a(n := m.norm(x)), m.b(n), n), {"chain_kept pre and normed": 1}),
        (lambda m, x, y: (m.a(n := m.norm(s := x + y)), m.b(n), n, s), {"chain_kept added pre and sum and normed": 1}),
        # layers that are halves of one
        (lambda m, x, y: F.silu((h := m.both(rms(m, x)).chunk(2, -1))[0]) * h[1], {"chain pre gate act": 1}),
        # two users of a norm that are no products beside each other
        (
            lambda m, x, y: m.down(F.relu(m.a(n := m.norm(x + y)))) + m.same(n),
            {"chain_kept added pre act second and normed": 1, "int8_linear": 1},
        ),
        # a sum with one row is none of two tensors
        (lambda m, x, y: m.a(m.norm(x + y[:1])), {"chain pre": 1}),
        (lambda m, x, y: m.norm(m.same(x) + y), {"int8_linear": 1, "norm": 1}),
    ],
)  # fmt: skip
def test_what_makes_the_codes_of_a_layer_joins_it(forward, calls):
    assert joined(forward, 2) == calls


def uses_the_sum_before(m, x, y):
    total = x + y
    normed = m.norm(total)
    doubled = total.mul(2)
    return m.a(normed), doubled


def uses_the_norm_before(m, x, y):
    normed = m.norm(x + y)
    doubled = normed.mul(2)
    return m.same(normed) + doubled


def writes_the_sum(m, x, y):
    total = x + y
    normed = m.norm(total)
    total.mul_(2)
    return m.a(normed), total


def writes_a_term(m, x, y):
    total = x + y
    x.zero_()
    return m.a(m.norm(total)), total


def writes_what_was_normed(m, x, y):
    normed = m.norm(x + y)
    normed[0] = 0
    return m.a(normed), normed


@pytest.mark.parametrize(
    ("forward", "calls"),
    [
        # the norm is made where the layer is, and its own sum where others want it
        (uses_the_sum_before, {"chain pre": 1}),
        (uses_the_norm_before, {"norm": 1, "int8_linear": 1}),
        (writes_the_sum, {"norm": 1, "int8_linear": 1}),
        (writes_a_term, {"chain pre": 1}),
        (writes_what_was_normed, {"norm": 1, "int8_linear": 1}),
    ],
)
def test_nothing_is_moved_past_its_users_or_a_write(forward, calls):
    assert joined(forward, 2) == calls


def test_half_precision_is_joined_where_kernels_are_and_nowhere_else():
    torch.manual_seed(0)
    model = dynamic_quantize(Layers(lambda m, x: m.a(m.norm(x))).eval().bfloat16(), "int8")[0]
    with torch.inference_mode():
        captured, _ = capture(model, torch.randn(2, 5, K, dtype=torch.bfloat16))
    assert captured.calls == {"int8_linear": 1}
