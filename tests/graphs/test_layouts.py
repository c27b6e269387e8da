"""What a compiled graph hands on lies in memory as it does in eager code, so that views of it are what they were."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mono_quant


def compiled_and_eager(model, *inputs):
    torch.manual_seed(0)
    model = mono_quant.dynamic_quantize(model.eval(), fidelity=False)[0]
    with torch.no_grad():
        eager = model(*inputs)
        torch._dynamo.reset()
        found = torch.compile(model, backend="mono_quant")(*inputs)
    return found, eager


class Head(nn.Module):
    def __init__(self, end):
        super().__init__()
        self.conv, self.norm, self.end = nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), end

    def forward(self, x):
        return self.end(torch.relu(self.norm(self.conv(x))))


@pytest.mark.parametrize(
    "end",
    [
        lambda y: y.view(y.shape[0], -1),
        lambda y: y,
        lambda y: (F.max_pool2d(y, 2) + 1).view(y.shape[0], -1),
        lambda y: y.permute(0, 2, 3, 1).reshape(-1),
        lambda y: torch.as_strided(y, (2, 8), (64, 1)),
        lambda y: [y.mul_(2), y.view(-1)][1],
    ],
)
def test_behind_a_convolution(end):
    x = torch.randn(2, 32, 8, 8)
    found, eager = compiled_and_eager(Head(end), x)
    assert found.shape == eager.shape and found.stride() == eager.stride()
    assert (found - eager).norm() < 1e-5 * eager.norm()


class Attention(nn.Module):
    def __init__(self, scale=None, wide=True, merge=False):
        super().__init__()
        self.qkv, self.scale, self.wide, self.merge = nn.Linear(64, 192), scale, wide, merge

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, 4, 16).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, torch.cat([v, v], -1) if self.wide else v, scale=self.scale)
        return (
            y.transpose(1, 2).reshape(batch, length, -1) if self.merge else y.contiguous().view(batch * 4, -1)
        )


class Viewed(Attention):
    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, 4, 16).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, torch.cat([v, v], -1)).view(batch * 4, length, 32)


@pytest.mark.parametrize("model", [Viewed(), Attention(), Attention(wide=False), Attention(merge=True)])
def test_behind_attention(model):
    found, eager = compiled_and_eager(model, torch.randn(3, 20, 64))
    assert found.stride() == eager.stride()
    assert (found - eager).norm() < 1e-5 * eager.norm()


@pytest.mark.parametrize("scale", [0.0, 1e-9, -1.0, 0.3])
def test_a_scale_is_what_was_given(scale):
    found, eager = compiled_and_eager(Attention(scale, wide=False, merge=True), torch.randn(3, 20, 64))
    assert (found - eager).norm() < 1e-5 * eager.norm()
