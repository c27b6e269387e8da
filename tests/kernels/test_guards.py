"""What does not fit together is not read by the library, and marks on tensors are minded."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import mono_quant
from mono_quant import kernels


@pytest.mark.parametrize("sizes", [[4, 4, 4], [2, 2], [4] * 1000])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_steps_that_do_not_add_up_are_refused(kind, sizes):
    layer = mono_quant.dynamic_quantize(nn.Sequential(kind(64, 64)).eval(), fidelity=False)[0]
    with pytest.raises(RuntimeError):
        layer(PackedSequence(torch.randn(5 if sizes[0] == 4 else 9, 64), torch.tensor(sizes)))


def test_parts_of_a_recurrent_layer_that_do_not_fit_are_left_to_torch():
    given, weight = torch.randn(6, 32), torch.randint(-9, 9, (32, 8), dtype=torch.int8)
    scale, bias, state = torch.rand(32, 1), torch.randn(32), [torch.zeros(3, 8)] * 2
    run = kernels.run_recurrent
    assert run("LSTM", given, [3, 3], state, weight, scale, bias) is not None
    assert run("LSTM", given, [3, 3], state, weight, scale, bias[:1]) is None
    assert run("LSTM", given, [3, 3], state, weight, scale[:1], bias) is None
    assert run("LSTM", given, [3, 3], state[:1], weight, scale, bias) is None
    assert run("LSTM", given, [2, 4], [torch.zeros(2, 8)] * 2, weight, scale, bias) is None
    assert run("LSTM", given[:, :8], [3, 3], state, weight[:8], scale[:8], bias[:8]) is None


def test_short_scales_are_not_read_beyond():
    weight, x = torch.randint(-9, 9, (8, 4, 3, 3), dtype=torch.int8), torch.randn(1, 4, 6, 6)
    how = ((1, 1), (0, 0), (1, 1), 1)
    scale = torch.full((8, 1), 0.5)
    whole = kernels.int8_conv(x, weight, scale, None, *how)
    # one scale for all is what broadcasting makes of it
    assert torch.equal(
        kernels.int8_conv(x, weight, scale[:1], None, *how, kernels.activation_scheme()), whole
    )
    table = torch.randint(-9, 9, (50, 16), dtype=torch.int8)
    with pytest.raises((IndexError, RuntimeError)):
        kernels.int8_embedding(torch.tensor([40]), table, torch.rand(3, 1), torch.float32)


def negated(values):
    """The same values with the mark that torch computes them lazily."""
    return torch._neg_view(-values)


def test_values_that_are_marked_as_negated():
    x, bias, scale = torch.randn(3, 64), torch.randn(16), torch.rand(16, 1)
    weight = torch.randint(-127, 128, (16, 64), dtype=torch.int8)
    plain = kernels.int8_linear(x, weight, scale, bias)
    assert torch.equal(kernels.int8_linear(negated(x), weight, negated(scale), negated(bias)), plain)
    product = ((weight,), (negated(scale),), (negated(bias),), "auto")
    assert torch.equal(kernels.chain(x, product), plain)
    norm = ("layer", torch.rand(64), torch.randn(64), 1e-5)
    marked = ("layer", negated(norm[1]), negated(norm[2]), 1e-5)
    torch.testing.assert_close(kernels.norm(x, marked), kernels.norm(x, norm), rtol=1e-5, atol=1e-6)
    half = torch.randn(16, 64).half()
    assert torch.equal(
        kernels.half_linear(x, negated(half), negated(bias)), kernels.half_linear(x, half, bias)
    )
    images, filters = torch.randn(1, 4, 6, 6), torch.randint(-9, 9, (16, 4, 3, 3), dtype=torch.int8)
    how = ((1, 1), (0, 0), (1, 1), 1)
    assert torch.equal(
        kernels.int8_conv(images, filters, negated(scale), negated(bias), *how),
        kernels.int8_conv(images, filters, scale, bias, *how),
    )
