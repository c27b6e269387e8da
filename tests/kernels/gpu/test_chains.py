"""Chains of kernels against the reference: what they keep says which codes there have to be, and those give all bits."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")

from coded import DEVICE

from mono_quant import kernels
from mono_quant.kernels import reference
from mono_quant.kernels.activations import SCHEMES
from mono_quant.kernels.composed import composed_norm
from mono_quant.kernels.gpu import chains
from mono_quant.kernels.gpu.features import features_of
from mono_quant.kernels.gpu.launch import started_by
from mono_quant.kernels.gpu.prologues import act_quantize, gate_quantize
from mono_quant.kernels.steps import ACTS, Steps

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _on_device():
    path = "triton" if DEVICE.type == "cpu" else None
    with kernels.using(path=path), torch.no_grad(), DEVICE:
        torch.manual_seed(0)
        yield


def product(rows, depth, scheme="int8", dtype=torch.float32, bias=True):
    """A product whose outputs are about as large as its inputs."""
    weight = torch.randint(-127, 128, (rows, depth), dtype=torch.int8)
    scale = (torch.rand(rows, 1) + 0.5) / 73 / depth**0.5
    return (weight,), (scale,), (torch.randn(rows).to(dtype) if bias else None,), scheme


def beside(*products):
    """Several products of the same tokens as one."""
    return *(sum((p[i] for p in products), ()) for i in range(3)), products[0][3]


def linear(x, product):
    """The reference, each weight by itself."""
    rows = x.reshape(-1, x.shape[-1]).cpu()
    layers = [[t if t is None else t.cpu() for t in layer] for layer in zip(*product[:3], strict=True)]
    outs = [reference.linear(rows, *layer, SCHEMES[product[3]]) for layer in layers]
    return torch.cat(outs, 1).view(*x.shape[:-1], -1).to(x.device)


def rms_norm(width, dtype):
    return "rms", (torch.rand(width) + 0.5).to(dtype), None, 1e-6


def layer_norm(width, dtype):
    return "layer", torch.randn(width).to(dtype), torch.randn(width).to(dtype), 1e-5


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_products_behind_a_sum_and_a_norm_have_the_bits_of_the_reference_on_what_is_kept(scheme, dtype):
    x, added = torch.randn(2, 2, 3, 70).to(dtype)
    first = beside(product(20, 70, scheme, dtype), product(9, 70, scheme, dtype, bias=False))
    norm = rms_norm(70, dtype) if scheme == "int8" else layer_norm(70, dtype)

    total, normed, out = chains.chain(x, added, Steps(first, norm), True, True)

    assert torch.equal(total, x + added)
    # another order of the sum of squares moves a value by few roundings, and then its own
    wide = composed_norm(
        total.double().float(), tuple(t.float() if isinstance(t, Tensor) else t for t in norm)
    )
    unit = torch.finfo(dtype).eps
    assert (normed.float() - wide).abs().max() <= 4 * unit * wide.abs().max()
    assert torch.equal(out, linear(normed, first)) and out.is_contiguous()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "relu", None])
def test_a_gate_between_products_gives_the_codes_of_its_values(act, dtype):
    x = torch.randn(5, 36).to(dtype)
    first, gate, second = (product(n, k, dtype=dtype) for n, k in ((20, 36), (20, 36), (12, 20)))

    (out,) = chains.chain(x, None, Steps(first, None, act, gate, second), False, False)

    up, opened = linear(x, first), linear(x, gate)
    values = gate_quantize(opened, up, act, SCHEMES["int8"], keep=True).values
    expected = ACTS[act](opened.double()) * up.double()
    assert (values - expected).abs().max() <= 2 * torch.finfo(dtype).eps * expected.abs().max()
    assert torch.equal(out, linear(values, second))


def test_an_activation_between_products_and_none():
    x = torch.randn(5, 36)
    first, second = product(20, 36), product(12, 20, "int12")
    for act in ("gelu", None):
        (out,) = chains.chain(x, None, Steps(first, None, act, None, second), False, False)
        y = linear(x, first)
        y = y if act is None else act_quantize(y, act, SCHEMES["int8"], keep=True).values
        assert torch.equal(out, linear(y, second))


def test_strides_empty_batches_and_single_rows():
    first, norm = product(12, 36), layer_norm(36, torch.float32)
    x, added = torch.randn(36, 4, 2).permute(2, 1, 0), torch.randn(2, 4, 72)[..., ::2]
    total, out = chains.chain(x, added, Steps(first, norm), True, False)
    assert torch.equal(total, x + added)
    same = chains.chain(x.contiguous(), added.contiguous(), Steps(first, norm), True, False)
    assert torch.equal(out, same[1])
    assert [t.shape for t in chains.chain(x[:0], None, Steps(first, norm), False, True)] == [
        (0, 4, 36),
        (0, 4, 12),
    ]
    assert torch.equal(chains.chain(x[0, 0], None, Steps(first), False, False)[0], linear(x[0, :1], first)[0])


def test_what_kernels_do_not_take_has_no_answer_and_becomes_the_composition():
    x = torch.randn(5, 36)
    first, gate = product(20, 36), product(20, 36, "int12")
    floats = ((torch.randn(20, 36),), *first[1:])
    for steps, values in [
        (Steps(first, gate=gate, second=product(12, 20)), x),
        (Steps(first), x.double()),
        (Steps(product(20, 35)), x),
        (Steps(floats), x),
        (Steps(first, second=product(12, 21)), x),
    ]:
        assert chains.chain(values, None, steps, False, False) is None
    # values whose sum is not normed are added by torch
    assert chains.chain(x, x, Steps(first), False, False) is None
    found = kernels.chain(x, first, act="silu", gate=gate)
    assert torch.equal(found, F.silu(linear(x, gate)) * linear(x, first))
    with pytest.raises(Exception, match="35 features, not"):
        kernels.chain(x, product(20, 35))


def test_calls_of_graphs_come_here():
    x, residual = torch.randn(2, 3, 36), torch.randn(2, 3, 12)
    first, gate, second, norm = product(20, 36), product(20, 36), product(12, 20), rms_norm(36, torch.float32)
    steps = Steps(first, norm, "silu", gate, second)
    (out,) = chains.chain(x, None, steps, False, False)
    after = layer_norm(12, torch.float32)
    found = kernels.chain(
        x, *steps[:1], **dict(zip(steps._fields[1:], steps[1:], strict=True)), residual=residual, post=after
    )
    assert torch.equal(found, composed_norm(out + residual, after))
    q, k = kernels.chain_parts(x, beside(first, second[:0] or gate), pre=norm)
    _, normed, both = chains.chain(x, x * 0, Steps(beside(first, gate), norm), True, True)
    assert torch.equal(torch.cat((q, k), -1), both)
    total, normed, q, k = kernels.chain_kept(
        x, beside(first, gate), pre=norm, added=x, keep=("sum", "normed")
    )
    assert (
        torch.equal(total, x + x)
        and torch.equal(q, linear(normed, first))
        and torch.equal(k, linear(normed, gate))
    )
    (gated,) = kernels.chain_kept(x, first, pre=norm, gate=gate, act="silu")
    q, k = kernels.chain_parts(x, beside(first, gate), pre=norm)
    assert torch.equal(gated, F.silu(k) * q)


def test_calls_that_are_written_down_give_the_bits_of_those_that_are_not():
    first, gate, second, norm = (
        product(20, 36),
        product(20, 36),
        product(12, 20),
        layer_norm(36, torch.float32),
    )
    for _ in range(4):
        x, added = torch.randn(2, 3, 36), torch.randn(2, 3, 36)
        found = kernels.chain_kept(
            x, first, pre=norm, added=added, keep=("sum",), act="silu", gate=gate, second=second
        )
        expected = chains.chain(x, added, Steps(first, norm, "silu", gate, second), True, False)
        assert all(map(torch.equal, found, expected))


def form(arg):
    return (arg.dtype, arg.shape, arg.stride()) if isinstance(arg, Tensor) else arg


def test_what_is_launched_depends_on_no_value():
    """A captured graph launches it again whatever the tokens are."""
    steps = Steps(product(20, 36), rms_norm(36, torch.float32), "gelu", None, product(12, 20, "int12"))
    values = torch.randn(4, 3, 36)
    values[1] = 0
    values[2, 1, 5], values[3] = torch.nan, 1e30
    seen = []
    for x in values:
        with started_by() as launches:
            chains.chain(x, x, steps, True, True)
        seen.append([(s.kernel, s.grid, s.constants, [form(arg) for arg in s.args]) for s in launches])
    assert len(seen[0]) == 4 and seen.count(seen[0]) == 4


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_a_thousand_steps_of_a_captured_graph_have_the_bits_of_eager_mode():
    dtype = torch.bfloat16
    steps = Steps(
        product(96, 64, dtype=dtype),
        rms_norm(64, dtype),
        "silu",
        product(96, 64, dtype=dtype),
        product(64, 96, dtype=dtype),
    )
    x, graph = torch.randn(1, 1, 64).to(dtype), torch.cuda.CUDAGraph()

    def step(x):
        total, out = kernels.chain_kept(
            x, steps.first, added=x, keep=("sum",), **dict(zip(steps._fields[1:], steps[1:], strict=True))
        )
        return total.tanh() + out.tanh()

    for _ in range(3):
        step(x)
    captured = x.clone()
    with torch.cuda.graph(graph):
        captured.copy_(step(captured))
    captured.copy_(x)
    for _ in range(1000):
        graph.replay()
        x = step(x)
        assert torch.equal(captured, x)


@pytest.mark.parametrize("behind", [False, True])
def test_a_chain_with_a_product_that_has_no_kernel_has_no_answer(behind, monkeypatch):
    # on Turing few tokens have one, and many have none
    poor = dataclasses.replace(features_of(DEVICE), int8_dot=False, dp4a=True)
    monkeypatch.setattr("mono_quant.kernels.gpu.products.features_of", lambda device: poor)
    first, second = product(64, 32), product(16, 64, bias=False)
    steps = Steps(first, act="silu", second=second) if behind else Steps(first)
    few = chains.chain(torch.randn(2, 32), None, steps, False, False)
    assert few is not None and few[0].isfinite().all()
    assert chains.chain(torch.randn(40, 32), None, steps, False, False) is None


@pytest.mark.parametrize("place", ["scale", "bias"])
def test_a_chain_whose_layer_lies_elsewhere_has_no_answer(place):
    (weight,), (scale,), (bias,), scheme = product(16, 32)
    if place == "scale":
        scale = scale.to("meta")
    else:
        bias = bias.to("meta")
    steps = Steps(((weight,), (scale,), (bias,), scheme))
    assert chains.chain(torch.randn(3, 32), None, steps, False, False) is None
    steps = Steps(((weight,), (scale.new_ones(15, 1),), (None,), scheme))
    assert chains.chain(torch.randn(3, 32), None, steps, False, False) is None
