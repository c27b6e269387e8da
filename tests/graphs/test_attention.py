"""Attention of torch becomes a call, with keys and values as they were before heads were repeated."""

import torch
from captured import capture
from torch.nn import functional as F

sdpa = F.scaled_dot_product_attention


def qkv(heads=4, keys=4, length=5, number=7, width=8):
    torch.manual_seed(0)
    return (
        torch.randn(2, heads, length, width),
        torch.randn(2, keys, number, width),
        torch.randn(2, keys, number, width),
    )


def repeated(x, times):
    batch, heads, number, width = x.shape
    return (
        x[:, :, None, :, :]
        .expand(batch, heads, times, number, width)
        .reshape(batch, heads * times, number, width)
    )


def shapes(captured):
    nodes = [
        node for node in captured.graphs[0].graph.nodes if getattr(node.target, "__name__", "") == "attention"
    ]
    return [tuple(node.args[1].meta["example_value"].shape) for node in nodes]


def same(captured, composed, expected):
    for fused, one, other in zip(captured.fused[0], composed, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert torch.equal(fused, one)


def test_masks_scales_and_causal_attention():
    seen = torch.rand(2, 1, 5, 7) > 0.3
    added = torch.randn(5, 7)

    def function(q, k, v, square):
        return (
            sdpa(q, k, v), sdpa(q, k, v, attn_mask=seen, scale=0.3), sdpa(q, k, v, added, 0.0, False),
            sdpa(q, square, square, is_causal=True),
        )  # fmt: skip

    args = (*qkv(), torch.randn(2, 4, 5, 8))
    captured, composed = capture(function, *args)
    assert captured.calls == {"attention": 4}
    same(captured, composed, function(*args))


def test_keys_and_values_come_with_the_heads_they_have():
    def function(q, k, v):
        return (
            sdpa(q, repeated(k, 2), repeated(v, 2)), sdpa(q, k, v, enable_gqa=True),
            # one of them is no repetition of heads
            sdpa(q, repeated(k, 2), v.repeat(1, 2, 1, 1)),
        )  # fmt: skip

    args = qkv(keys=2)
    captured, composed = capture(function, *args)
    assert captured.calls == {"attention": 3}
    assert shapes(captured) == [(2, 2, 7, 8), (2, 2, 7, 8), (2, 4, 7, 8)]
    same(captured, composed, function(*args))


def test_what_is_written_after_it_was_repeated_is_not_seen():
    def function(q, k, v):
        keys = repeated(k, 2)
        k.zero_()
        return sdpa(q, keys, repeated(v, 2))

    q, k, v = qkv(keys=2)
    _, composed = capture(function, q, k.clone(), v)
    torch.testing.assert_close(composed, function(q, k.clone(), v), rtol=1e-5, atol=1e-5)


def test_dropout_other_ranks_and_causal_attention_over_more_keys_stay():
    def function(q, k, v):
        return (
            sdpa(q, k, v, is_causal=True), sdpa(q[0], k[0], v[0]), sdpa(q.double(), k.double(), v.double()),
            sdpa(q, k, v, dropout_p=0.5).shape,
        )  # fmt: skip

    captured, composed = capture(function, *qkv())
    assert captured.calls == {}
    assert all(map(torch.equal, composed[:3], function(*qkv())[:3]))
