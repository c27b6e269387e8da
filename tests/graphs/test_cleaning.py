"""Calls that do nothing go; those that do something stay."""

import torch
from captured import Captured, capture
from torch.nn import functional as F


def names(captured):
    return [
        getattr(node.target, "__name__", node.target)
        for node in captured.graphs[0].graph.nodes
        if node.op.startswith("call")
    ]


def test_what_does_nothing_goes():
    def function(x):
        y = F.dropout(x, 0.5, False).to(torch.float32).float().type_as(x).to("cpu").to(x.dtype)
        return F.dropout(y.reshape(2, 3, -1).view(2, 3, 4), p=0.1, training=False, inplace=True) + 1

    captured, composed = capture(function, x := torch.randn(2, 3, 4))
    assert names(captured) == ["add"]
    assert torch.equal(composed, x + 1)


def test_what_does_something_stays():
    def function(x):
        return (
            x.to(torch.float64) + 1,
            x.to(torch.float32, copy=True).add_(1),
            x.view(3, 8) + x.view(torch.int32).view(3, 8),
            x.half() + 1,
        )

    captured, composed = capture(function, x := torch.randn(2, 3, 4))
    assert all(map(torch.equal, composed, function(x)))
    assert names(captured).count("to") == 2 and names(captured).count("view") == 3


def test_dropout_in_training_stays():
    captured, composed = capture(lambda x: F.dropout(x, 0.5, training=True), torch.ones(1000))
    assert names(captured) == ["dropout"] and 300 < (composed == 0).sum() < 700


def test_numbers_of_a_model_are_constants_where_all_sizes_vary():
    model = torch.nn.LayerNorm(8, eps=0.25).requires_grad_(False)
    functions = [
        model,
        lambda x: F.layer_norm(x, (8,), model.weight, model.bias, model.eps),
        lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + model.eps),
    ]
    for function in functions:
        torch.compiler.reset()
        captured = Captured()
        composed = torch.compile(function, backend=captured, dynamic=True)(x := torch.randn(3, 8))
        assert "norm" in names(captured) and "item" not in names(captured)
        torch.testing.assert_close(composed, function(x), rtol=1e-5, atol=1e-6)


def test_a_number_that_changes_is_another_graph():
    def function(x, factor):
        return F.layer_norm(x, (8,), eps=factor)

    compiled = torch.compile(function, backend="mono_quant", dynamic=True)
    x = torch.randn(3, 8) * 0.1
    for eps in (0.25, 1e-5, 0.5):
        torch.testing.assert_close(compiled(x, eps), F.layer_norm(x, (8,), eps=eps), rtol=1e-5, atol=1e-6)
