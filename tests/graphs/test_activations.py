"""Which calls are an activation of ours, and a GELU that is written out."""

import math

import pytest
import torch
from captured import capture
from torch.fx import Graph
from torch.nn import functional as F

from mono_quant.graphs.activations import activation


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "name"),
    [
        (F.gelu, (), {}, "gelu"),
        (F.gelu, (), {"approximate": "none"}, "gelu"),
        (F.gelu, (), {"approximate": "tanh"}, "gelu_tanh"),
        (F.silu, (), {"inplace": False}, "silu"),
        (F.relu, (True,), {}, "relu"),
        (torch.relu, (), {}, "relu"),
        (F.hardswish, (), {}, None),
        (torch.tanh, (), {}, None),
        (F.leaky_relu, (), {}, None),
    ],
)
def test_activations_have_these_names(function, args, kwargs, name):
    graph = Graph()
    x = graph.placeholder("x")
    assert activation(graph.call_function(function, (x, *args), kwargs)) == (
        None if name is None else (name, x)
    )


def gelu_new(x):
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def other_constant(x):
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.05 * torch.pow(x, 3.0))))


def other_power(x):
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 2.0))))


def other_x(x):
    return 0.5 * (x + 1) * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def test_a_written_out_gelu_is_that_of_torch():
    captured, composed = capture(
        lambda x: [f(x) for f in (gelu_new, other_constant, other_power, other_x)], x := torch.randn(50)
    )
    targets = [node.target for node in captured.graphs[0].graph.nodes]
    assert targets.count(F.gelu) == 1 and targets.count(torch.tanh) == 3
    expected = [F.gelu(x, approximate="tanh"), other_constant(x), other_power(x), other_x(x)]
    assert all(map(torch.equal, composed, expected))
