"""Every spelling of a norm over the last dimension becomes one call, and nothing else does."""

import pytest
import torch
from captured import Captured, capture
from torch.nn import functional as F

torch.manual_seed(0)
WEIGHT, BIAS = torch.rand(16) + 0.5, torch.randn(16)


def llama(x):
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return WEIGHT * h.to(x.dtype)


def gemma(x):
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + WEIGHT.float())).type_as(x)


def t5(x):
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return WEIGHT * (x * torch.rsqrt(variance + 1e-6))


def without_weight(x):
    return x * (x.square().mean(dim=-1, keepdim=True) + 1e-5).rsqrt()


def over_heads(x):
    return llama(x.view(2, 3, 2, 8, 2).flatten(3))


def test_each_spelling_is_one_call():
    x = torch.randn(2, 3, 16)
    written = [llama, gemma, t5, without_weight]
    functions = [
        lambda x: F.layer_norm(x, (16,), WEIGHT, BIAS, 1e-5),
        lambda x: F.layer_norm(x, (16,)),
        lambda x: F.layer_norm(x, [16], bias=BIAS, weight=WEIGHT, eps=1e-12),
        lambda x: F.rms_norm(x, (16,), WEIGHT),
        lambda x: F.rms_norm(x, (16,), None, 1e-6),
    ]
    captured, composed = capture(lambda x: [f(x) for f in written + functions], x)
    assert captured.calls == {"norm": 9}
    for function, out in zip(written, composed, strict=False):
        assert torch.equal(out, function(x))
    for function, out in zip(functions, composed[4:], strict=True):
        # torch's own rms_norm rounds otherwise
        torch.testing.assert_close(out, function(x), rtol=1e-6, atol=1e-6)
    for one, other in zip(captured.fused[0], composed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_spelled_with_casts_where_kernels_for_a_device_are(dtype):
    pytest.importorskip("triton")
    x, w = torch.randn(2, 3, 16).to(dtype), WEIGHT.to(dtype)

    def llama(x):
        h = x.to(torch.float32)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return w * h.to(x.dtype)

    def t5(x):
        h = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-6)
        return w * h.to(w.dtype)

    functions = [
        llama,
        gemma,
        t5,
        lambda x: without_weight(x.float()).to(x.dtype),
        lambda x: F.rms_norm(x, (16,), w, 1e-6),
        lambda x: F.layer_norm(x, (16,), w, w, 1e-5),
    ]
    torch.compiler.reset()
    captured = Captured(path="triton")
    composed = torch.compile(lambda x: [f(x) for f in functions], backend=captured)(x)
    assert captured.calls == {"norm": 6}
    for function, one, fused in zip(functions, composed, captured.fused[0], strict=True):
        assert torch.equal(one, function(x)) and torch.equal(fused, one)


@pytest.mark.parametrize(
    "function",
    [
        # squares in half precision, a result that stays wide, and another dtype than came in
        lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
        lambda x: x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6) * 2.5,
        lambda x: (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).half(),
        lambda x: F.rms_norm(x, (16,), WEIGHT.bfloat16()),
    ],
)
def test_what_rounds_elsewhere_in_half_precision_stays(function):
    pytest.importorskip("triton")
    torch.compiler.reset()
    captured, x = Captured(path="triton"), torch.randn(2, 3, 16).bfloat16()
    torch.testing.assert_close(torch.compile(function, backend=captured)(x), function(x), rtol=0, atol=0)
    assert captured.calls == {}


def other_mean(x):
    return WEIGHT * (x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + 1e-6))


def other_power(x):
    return WEIGHT * (x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-6))


def other_values(x):
    return WEIGHT * ((x + 1) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def half(x):
    return F.layer_norm(x.half(), (16,), WEIGHT.half())


def two_dimensions(x):
    return F.layer_norm(x, (3, 16))


def root_elsewhere(x):
    root = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return x * root, root


def written_between(x):
    squares = x.pow(2)
    x.mul_(2)
    return x * torch.rsqrt(squares.mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize(
    "function", [other_mean, other_power, other_values, half, two_dimensions, root_elsewhere, written_between]
)
def test_what_is_no_such_norm_stays(function):
    x = torch.randn(2, 3, 16)
    captured, composed = capture(function, x.clone())
    assert captured.calls == {}
    expected = function(x.clone())
    assert all(map(torch.equal, composed, expected))


def test_a_weight_per_place_is_no_weight_of_the_norm():
    table = torch.rand(3, 16)
    captured, composed = capture(
        lambda x: table * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
        x := torch.randn(2, 3, 16),
    )
    assert captured.calls == {"norm": 1}
    torch.testing.assert_close(composed, table * without_weight(x), rtol=1e-5, atol=1e-5)


def test_a_sum_in_front_of_a_norm_is_made_with_it():
    def function(x, y):
        total = x + y
        return F.layer_norm(total, (16,), WEIGHT, BIAS), total

    x, y = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    captured, composed = capture(function, x, y)
    assert captured.calls == {"norm residual": 1}
    assert all(map(torch.equal, composed, function(x, y)))
    captured, composed = capture(lambda x, y: F.layer_norm(x + y[0], (16,)), x, y)
    assert captured.calls == {"norm": 1}
