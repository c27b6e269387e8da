"""Layers with what stands around them become one call, and only where nothing else would see a difference."""

from functools import partial

import pytest
import torch
from captured import capture
from torch import Tensor, nn
from torch.nn import functional as F

from mono_quant import dynamic_quantize

K, N = 64, 96


class Layers(nn.Module):
    """Int8 layers from 64 features to 96 and back, and a forward to try."""

    def __init__(self, forward, bias=True):
        super().__init__()
        self.a, self.b, self.both = nn.Linear(K, N, bias), nn.Linear(K, N), nn.Linear(K, 2 * N, bias)
        self.down, self.same, self.norm = nn.Linear(N, K, bias), nn.Linear(K, K), nn.LayerNorm(K)
        self.written = forward

    def forward(self, x):
        return self.written(self, x)


def joined(forward, x=None, bias=True, mode=torch.inference_mode):
    """Return the calls that a forward becomes, after checking that they give its bits."""
    torch.manual_seed(0)
    model = dynamic_quantize(Layers(forward, bias).eval(), "int8", disable_defaults=["head"])[0]
    x = torch.randn(2, 5, K) if x is None else x
    with mode():
        eager = model(x.clone())
        captured, composed = capture(model, x.clone())
    for one, other in zip(flat(eager), flat(composed), strict=True):
        assert torch.equal(one, other)
    return dict(captured.calls)


def flat(out):
    return [out] if isinstance(out, Tensor) else list(out)


@pytest.mark.parametrize(
    ("forward", "calls"),
    [
        (lambda m, x: m.down(F.gelu(m.a(x))), {"chain act second": 1}),
        (lambda m, x: m.down(F.relu(m.a(x), inplace=True)), {"chain act second": 1}),
        (lambda m, x: m.down(m.a(x).relu()), {"chain act second": 1}),
        (lambda m, x: m.down(F.silu(m.a(x)) * m.b(x)), {"chain gate act second": 1}),
        (lambda m, x: m.down(m.b(x) * F.gelu(m.a(x), approximate="tanh")), {"chain gate act second": 1}),
        (lambda m, x: x + m.down(F.silu(m.a(x))), {"chain act second residual": 1}),
        (lambda m, x: m.norm(m.same(x) + x), {"chain residual post": 1}),
        (lambda m, x: m.norm(torch.add(x, m.same(x))), {"chain residual post": 1}),
        (lambda m, x: m.same(m.norm(x)) + x, {"chain pre residual": 1}),
        (lambda m, x: (m.a(m.norm(x)), m.b(m.norm(x))), {"chain pre": 2}),
        (lambda m, x: (m.a(x), m.b(x), m.same(x)), {"chain_parts": 1}),
        (lambda m, x: m.a(x).relu() + 1, {"chain act": 1}),
        (lambda m, x: m.same(m.down(F.gelu(m.a(x)))), {"chain act second": 1, "int8_linear": 1}),
        (lambda m, x: m.a(m.down(F.silu(m.a(x)) * m.b(x))), {"chain gate act second": 1, "int8_linear": 1}),
    ],
)  # fmt: skip
def test_what_stands_around_a_layer_joins_it(forward, calls):
    assert joined(forward) == calls


@pytest.mark.parametrize("bias", [True, False])
def test_the_halves_of_one_layer_are_gate_and_product(bias):
    def forward(m, x):
        a, b = m.both(x).chunk(2, dim=-1)
        c, d = m.both(x + 1).split(N, -1)
        e, f = torch.chunk(m.both(x + 2), 2, 2)
        return m.down(F.relu(a) * b), m.down(d * F.relu(c)), F.relu(f) * e

    assert joined(forward, bias=bias) == {"chain gate act second": 2, "chain gate act": 1}


def test_one_norm_of_several_layers_is_made_once():
    def forward(m, x):
        y = m.norm(x)
        return m.a(y).view(2, 5, 4, -1).transpose(1, 2), m.b(y), m.same(y)

    assert joined(forward) == {"chain_parts pre": 1}


def test_a_view_of_a_part_that_needs_a_copy_gets_one():
    # three rows of 64 apart from each other, which no view can merge with their columns
    assert joined(lambda m, x: (m.a(x).view(2, -1), m.b(x).view(-1))) == {"chain_parts": 1}


def leaves_the_sum(m, x):
    total = x + m.same(x)
    return m.norm(total), total


def uses_the_activation(m, x):
    y = F.gelu(m.a(x))
    return m.down(y), y


def uses_the_product(m, x):
    y = m.a(x)
    return m.down(F.gelu(y)), y


def uses_the_norm(m, x):
    y = m.norm(x)
    return m.same(y) + y


@pytest.mark.parametrize(
    ("forward", "calls"),
    [
        (leaves_the_sum, {"chain residual": 1, "norm": 1}),
        (uses_the_activation, {"chain act": 1, "int8_linear": 1}),
        (uses_the_product, {"int8_linear": 2}),
        (uses_the_norm, {"chain residual": 1, "norm": 1}),
        (lambda m, x: m.down(F.gelu(m.a(x)) * m.b(x + 1)), {"chain act": 1, "int8_linear": 2}),
        (lambda m, x: m.down(torch.tanh(m.a(x))), {"int8_linear": 2}),
        (lambda m, x: m.same(x) + x[:1], {"int8_linear": 1}),
        (lambda m, x: m.same(x) + 1.0, {"int8_linear": 1}),
        (lambda m, x: torch.add(m.same(x), x, alpha=2), {"int8_linear": 1}),
    ],
)  # fmt: skip
def test_what_somebody_else_uses_or_no_pattern_knows_stays(forward, calls):
    assert joined(forward) == calls


def writes_the_input(m, x):
    a = m.a(x)
    x.mul_(2)
    return a, m.b(x)


def writes_the_input_by_index(m, x):
    a = m.a(x)
    x[0] = 0
    return a, m.b(x)


def writes_the_input_before_the_sum(m, x):
    y = m.same(x)
    x += 1
    return y + x


def writes_out(m, x):
    y = m.norm(x)
    torch.add(x, 1, out=x)
    return m.same(y)


def writes_between_activation_and_product(m, x):
    y = F.silu(m.a(x))
    x.zero_()
    return m.down(y)


def writes_the_residual_in_place(m, x):
    x += m.same(x)
    return x, m.same(x)


@pytest.mark.parametrize(
    "forward",
    [
        writes_the_input,
        writes_the_input_by_index,
        writes_the_input_before_the_sum,
        writes_out,
        writes_between_activation_and_product,
        writes_the_residual_in_place,
    ],
)
def test_nothing_is_moved_across_a_write(forward):
    # equal bits are asserted by `joined`
    calls = joined(forward)
    assert not any("parts" in call or "second" in call or "pre" in call for call in calls)


def test_a_write_that_nobody_reads_in_the_graph_stays():
    cache = torch.zeros(2, 8, N)

    def forward(m, x):
        cache.index_copy_(1, torch.arange(5), m.a(x))
        return m.down(cache)

    joined(forward)
    assert cache[:, :5].abs().sum() > 0 and cache[:, 5:].abs().sum() == 0


def test_half_precision_inputs_keep_their_way():
    assert joined(lambda m, x: m.down(F.gelu(m.a(x))), torch.randn(2, 5, K).half()) == {"int8_linear": 2}


def test_under_autocasting_dtypes_stay_what_they_were():
    bfloat16 = partial(torch.autocast, "cpu", torch.bfloat16)
    assert joined(lambda m, x: m.down(F.gelu(m.a(x))), mode=bfloat16) == {"chain act second": 1}


def test_layers_of_two_schemes_are_two_products():
    def forward(m, x):
        return m.a(x), m.b(x)

    torch.manual_seed(0)
    model = dynamic_quantize(Layers(forward).eval(), "int8", disable_defaults=["head"])[0]
    model.a.activations, model.b.activations = "int8", "int8-g64"
    x = torch.randn(3, K)
    with torch.inference_mode():
        eager = model(x)
        captured, composed = capture(model, x)
    if hasattr(type(model.a), "activations"):
        assert captured.calls == {"int8_linear": 2}
    assert all(map(torch.equal, eager, composed))
