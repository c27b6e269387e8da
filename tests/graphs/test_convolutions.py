"""A convolution with batch norm, residual and ReLU is one call; training, and another order, are not."""

import torch
from captured import capture
from torch import nn
from torch.nn import functional as F

from mono_quant import dynamic_quantize


class Net(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.conv, self.norm, self.wide = (
            nn.Conv2d(32, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.Conv2d(32, 32, 3),
        )
        self.norm.running_mean.normal_(0, 0.1)
        self.norm.running_var.uniform_(0.5, 1.5)
        self.written = forward

    def forward(self, x):
        return self.written(self, x)


def calls_of(forward, train=False):
    torch.manual_seed(0)
    model = dynamic_quantize(Net(forward).eval(), "int8")[0].train(train)
    x = torch.randn(2, 32, 6, 6)
    with torch.inference_mode():
        captured, composed = capture(model, x)
        eager = model(x)
    for fused, one, other in zip(captured.fused[0], composed, eager, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(fused, other, rtol=1e-4, atol=1e-4)
    return captured.calls


def in_place(m, x):
    y = m.norm(m.conv(x))
    y += x
    return F.relu(y, inplace=True)


def test_what_stands_behind_a_convolution_joins_it():
    def forward(m, x):
        return (
            m.conv(x), torch.relu(m.conv(x)), m.norm(m.conv(x)), F.relu(m.norm(m.conv(x))),
            torch.relu(x + m.norm(m.conv(x))), in_place(m, x), m.conv(x) + x,
        )  # fmt: skip

    assert calls_of(forward) == {
        "int8_conv": 1,
        "conv relu": 1,
        "conv batch_norm": 1,
        "conv batch_norm relu": 1,
        "conv batch_norm residual relu": 2,
        "conv residual": 1,
    }


def test_another_order_stays():
    def forward(m, x):
        y = m.conv(x)
        return m.norm(torch.relu(m.conv(x))), m.norm(m.conv(x) + x), m.norm(y), y, m.wide(x) + x[:, :, :4, :1]

    assert calls_of(forward) == {"conv relu": 1, "conv residual": 1, "int8_conv": 2}


def test_batch_norm_in_training_stays():
    model = dynamic_quantize(Net(lambda m, x: m.norm(m.conv(x))).eval(), "int8")[0].train()
    captured, _ = capture(model, torch.randn(2, 32, 6, 6))
    assert captured.calls == {"int8_conv": 1}
    assert model.norm.num_batches_tracked > 0
