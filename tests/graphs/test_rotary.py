"""Halves that are turned become one call; neighbours, and tables that do not fit, stay."""

import torch
from captured import capture

Q = torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(0))


def tables(batch=1, length=5, width=8):
    angles = torch.randn(batch, length, width, generator=torch.Generator().manual_seed(1))
    return angles.cos(), angles.sin()


def rotate_half(x):
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def turned(q, cos, sin, half=rotate_half):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + half(q) * sin


def test_halves_become_one_call():
    def function(q, cos, sin, cos2, sin2):
        other = rotate_half(q) * sin2.unsqueeze(1) + cos2.unsqueeze(1) * q
        part = turned(q[..., :4], cos[..., :4], sin[..., :4])
        return (
            turned(q, cos, sin),
            other,
            torch.cat((part, q[..., 4:]), -1),
            turned(q.transpose(1, 2).transpose(1, 2), cos, sin),
        )

    args = (Q, *tables(), *tables(batch=2))
    captured, composed = capture(function, *args)
    assert captured.calls == {"rotary": 4}
    for fused, one, expected in zip(captured.fused[0], composed, function(*args), strict=True):
        assert torch.equal(one, expected)
        torch.testing.assert_close(fused, expected, rtol=1e-6, atol=1e-6)


def neighbours(x):
    return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)


def swapped(x):
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x2, -x1), dim=-1)


def test_what_is_turned_otherwise_stays():
    def function(q, cos, sin, narrow, wide):
        return (
            turned(q, cos, sin, neighbours),
            turned(q, cos, sin, swapped),
            q * cos.unsqueeze(0) + rotate_half(q) * sin.unsqueeze(0),
            turned(q, narrow, narrow),
            q * cos.unsqueeze(1) - rotate_half(q) * sin.unsqueeze(1),
            turned(q, wide, wide),
        )

    args = (Q, *tables(), tables(width=1)[0], tables(length=1)[0])
    captured, composed = capture(function, *args)
    assert captured.calls == {}
    assert all(map(torch.equal, composed, function(*args)))
