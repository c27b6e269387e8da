"""Every int8 layer against the documented arithmetic in numpy, bit for bit, and against its float layer by theory."""

import copy
import io
import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor

import accelerate
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.pytorch_utils import Conv1D

from mono_quant import kernels
from mono_quant.convert.int8_layers import (
    Int8Conv1d,
    Int8Conv2d,
    Int8Embedding,
    Int8Experts,
    Int8Linear,
    Int8Module,
    Int8MultiheadAttention,
    Int8TransposedLinear,
)
from mono_quant.kernels import paths
from mono_quant.kernels.weights import quantize_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One rounding to the output dtype, relative.
EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
EXPERTS = {"hidden_size": 24, "intermediate_size": 20, "num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["reference", "chosen"])
def kernel(request):
    """Run on the reference with 8-bit codes, and with 12 bits on the path that this machine chooses by itself."""
    chosen = (None, "int12") if request.param == "chosen" else ("reference", "int8")
    with kernels.using(*chosen):
        yield request.param


def rows(weight):
    return quantize_rows(weight.detach().flatten(1))


def int8(layer):
    """The int8 layer for a float one, without the machinery that walks over models."""
    if isinstance(layer, nn.MultiheadAttention):
        both = {"in_proj_weight": layer.in_proj_weight, "out_proj.weight": layer.out_proj.weight}
        return Int8MultiheadAttention(layer, {n: rows(w) for n, w in both.items()}).eval()
    if isinstance(layer, MixtralExperts):
        both = {"gate_up_proj": layer.gate_up_proj, "down_proj": layer.down_proj}
        return Int8Experts(
            layer, {n: quantize_rows(w.detach().flatten(0, 1)) for n, w in both.items()}
        ).eval()
    if isinstance(layer, Conv1D):
        return Int8TransposedLinear(layer, quantize_rows(layer.weight.detach().t())).eval()
    classes = {
        nn.Linear: Int8Linear,
        nn.Conv1d: Int8Conv1d,
        nn.Conv2d: Int8Conv2d,
        nn.Embedding: Int8Embedding,
    }
    return classes[type(layer)](layer, rows(layer.weight)).eval()


def experts(dtype=torch.float32):
    layer = MixtralExperts(MixtralConfig(**EXPERTS))
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    return layer.to(dtype).eval()


def routing(tokens, slots=2, count=4):
    index = torch.stack([torch.randperm(count)[:slots] for _ in range(tokens)])
    return index, torch.rand(tokens, slots)


def conv1d_gpt2():
    layer = Conv1D(19, 24)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


# One float layer and arguments for it per class: what every int8 layer has to survive.
CASES = {
    "linear": lambda: (nn.Linear(24, 19), (torch.randn(3, 5, 24),)),
    "transposed": lambda: (conv1d_gpt2(), (torch.randn(3, 5, 24),)),
    "conv1d": lambda: (nn.Conv1d(6, 8, 3, padding=1), (torch.randn(2, 6, 11),)),
    "conv2d": lambda: (nn.Conv2d(4, 6, 3, stride=2, groups=2), (torch.randn(2, 4, 9, 8),)),
    "embedding": lambda: (nn.Embedding(13, 17), (torch.randint(0, 13, (3, 4)),)),
    "attention": lambda: (
        nn.MultiheadAttention(24, 3, batch_first=True).eval(),
        tuple(torch.randn(2, 5, 24) for _ in range(3)),
    ),
    "experts": lambda: (experts(), (torch.randn(9, 24), *routing(9))),
}
EVERY = pytest.mark.parametrize("case", list(CASES))


def make(case):
    layer, args = CASES[case]()
    return layer, int8(layer), args


def first(output):
    return output[0] if isinstance(output, tuple) else output


def run(module, args):
    with torch.no_grad():
        return first(module(*args))


# The oracle: numpy, written from the document.


def half(values, dtype):
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype)


def oracle_linear(x, codes, scale, bias, dtype):
    """y = float(sum) * (s_x * s_w) + b with codes of the width in use; x fp32 [M, K]."""
    x = np.asarray(x, np.float32)
    qmax = np.float32(2 ** (kernels.SCHEMES[kernels.activation_scheme()].bits - 1) - 1)
    absmax = np.abs(x).max(axis=1, keepdims=True)
    with np.errstate(all="ignore"):
        zero = absmax < qmax * np.float32(2.0**-126)
        q = np.clip(np.rint(x * np.where(zero, np.float32(0), qmax / absmax)), -qmax, qmax)
        s = np.where(zero, np.float32(0), absmax / qmax)
    bad = ~np.isfinite(absmax)
    q[bad[:, 0]], s[bad] = 0, np.nan
    total = q.astype(np.int64) @ codes.numpy().astype(np.int64).T
    y = total.astype(np.float32) * (s * scale.numpy().reshape(1, -1))
    if bias is not None:
        y = y + bias.detach().float().numpy()
    return half(y, dtype)


def theory_bound(x, weight, codes, scale, bias, dtype):
    """Largest distance to the float layer: half a step of each operand, and rounding."""
    x, w = np.asarray(x, np.float64), weight.detach().double().numpy()
    step_w = scale.double().numpy().reshape(1, -1)
    step_x = np.abs(x).max(axis=1, keepdims=True) / (
        2 ** (kernels.SCHEMES[kernels.activation_scheme()].bits - 1) - 1
    )
    restored = np.abs(codes.numpy().astype(np.float64) * scale.double().numpy()).sum(axis=1)
    bound = (np.abs(x).sum(axis=1, keepdims=True) * step_w + step_x * restored) / 2 * (1 + 1e-4)
    y = x @ w.T + (0 if bias is None else bias.detach().double().numpy())
    return torch.from_numpy(y), torch.from_numpy(bound + np.abs(y) * EPS[dtype] + 1e-6)


def check_linear(module, weight, x):
    out = run(module, (x,))
    flat = x.float().reshape(-1, x.shape[-1])
    args = (module.codes(), module.scale())
    assert out.dtype == x.dtype and out.shape == (*x.shape[:-1], weight.shape[0])
    flat_out = out.reshape(-1, weight.shape[0])
    assert torch.equal(flat_out, oracle_linear(flat, *args, module.bias, x.dtype))
    exact, bound = theory_bound(flat, weight, *args, module.bias, x.dtype)
    assert ((flat_out.double() - exact).abs() <= bound).all()


# Linear layers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(67,), (1, 67), (33, 67), (2, 3, 4, 67), (3, 1, 67)])
def test_linear_equals_the_definition_and_stays_within_theory(kernel, dtype, bias, shape):
    layer = nn.Linear(67, 29, bias=bias).to(dtype)
    check_linear(int8(layer), layer.weight, torch.randn(shape, dtype=dtype) * 3)


@pytest.mark.parametrize("shape", [(67,), (5, 67), (2, 3, 67)])
def test_gpt2_conv1d_equals_the_definition_and_stays_within_theory(kernel, shape):
    layer = Conv1D(29, 67)
    nn.init.normal_(layer.bias)
    module = int8(layer)
    check_linear(module, layer.weight.t(), torch.randn(shape))
    assert (module.nx, module.nf) == (67, 29)


@pytest.mark.parametrize("depth", [1, 2, 1040, 1041, 8192])
def test_linear_is_exact_for_any_length_of_rows(kernel, depth):
    layer = nn.Linear(depth, 4)
    with torch.no_grad():
        layer.weight[0] = 1.0
        layer.weight[1] = -1.0
        layer.weight[2].abs_()  # sums of odd numbers far beyond 2^24
    x = torch.cat([torch.randn(2, depth), torch.rand(20, depth), torch.ones(1, depth)])
    # few and many tokens may take different products
    for tokens in (x, x[-8:]):
        check_linear(int8(layer), layer.weight, tokens)


@pytest.mark.parametrize("case", ["linear", "transposed", "conv1d", "conv2d"])
@pytest.mark.parametrize("inner", DTYPES)
@pytest.mark.parametrize("outer", DTYPES)
def test_output_has_the_dtype_of_the_input_whatever_the_layer_was(case, inner, outer):
    layer, _, (x,) = make(case)
    module = int8(layer.to(inner))
    out = run(module, (x.to(outer),))
    assert out.dtype == outer
    wide = run(module, (x.to(outer).float(),))
    assert torch.equal(out, wide.to(outer))


@pytest.mark.parametrize("case", ["linear", "transposed", "conv1d", "conv2d"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_batches_give_empty_outputs(kernel, case, dtype):
    layer, module, (x,) = make(case)
    x = x[:0].to(dtype)
    assert run(module, (x,)).shape == run(layer.to(dtype), (x,)).shape
    assert run(module, (x,)).dtype == dtype


def test_a_batch_without_tokens_and_a_layer_without_inputs_are_fine(kernel):
    module = int8(nn.Linear(24, 19))
    assert run(module, (torch.empty(0, 3, 24),)).shape == (0, 3, 19)
    assert run(module, (torch.empty(3, 0, 24),)).shape == (3, 0, 19)


@EVERY
def test_non_contiguous_inputs_give_the_same_bits(kernel, case):
    _, module, args = make(case)
    strided = tuple(
        torch.stack([a, torch.zeros_like(a)], dim=-1)[..., 0]
        if a.dim() < 3
        else a.transpose(0, -1).contiguous().transpose(0, -1)
        for a in args
    )
    assert not all(s.is_contiguous() for s in strided)
    assert torch.equal(run(module, strided), run(module, args))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_value_ruins_its_own_row_and_no_other(kernel, bad, dtype):
    module = int8(nn.Linear(67, 29))
    x = torch.randn(40, 67, dtype=dtype)
    clean = run(module, (x,))
    x[3, 66] = bad
    x[17, 0] = bad
    out = run(module, (x,))
    hit = torch.tensor([3, 17])
    rest = torch.tensor([i for i in range(40) if i not in (3, 17)])
    assert torch.isnan(out[hit]).all()
    assert torch.equal(out[rest], clean[rest])


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_zeros_give_exactly_the_bias(kernel, value, dtype):
    module = int8(nn.Linear(67, 29).to(dtype))
    x = torch.randn(5, 67, dtype=dtype)
    x[2] = value
    assert torch.equal(run(module, (x,))[2], module.bias.detach())
    none = int8(nn.Linear(67, 29, bias=False))
    assert torch.equal(run(none, (torch.zeros(2, 67),)), torch.zeros(2, 29))


def test_zero_and_tiny_weights_rows_give_exactly_the_bias(kernel):
    layer = nn.Linear(67, 4)
    with torch.no_grad():
        layer.weight[0], layer.weight[1] = 0.0, -0.0
        layer.weight[2] = 2.0**-149
    out = run(int8(layer), (torch.randn(20, 67),))
    assert torch.equal(out[:, :3], layer.bias.detach()[:3].expand(20, 3))


@pytest.mark.parametrize("magnitude", [1e-30, 1e-7, 1.0, 1e4, 1e30])
def test_the_error_scales_with_the_input(kernel, magnitude):
    layer = nn.Linear(67, 29, bias=False)
    module = int8(layer)
    x = torch.randn(6, 67) * magnitude
    out = run(module, (x,)) / magnitude
    y, bound = theory_bound(x / magnitude, layer.weight, module.codes(), module.scale(), None, x.dtype)
    assert ((out.double() - y).abs() <= bound).all()


@pytest.mark.parametrize("depth", [24, 67, 1041])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_alone_equals_the_row_in_a_batch(kernel, depth, dtype):
    module = int8(nn.Linear(depth, 33))
    x = torch.randn(70, depth, dtype=dtype)
    whole = run(module, (x,))
    for size in (1, 2, 5, 17, 64):
        for start in (0, 3):
            assert torch.equal(run(module, (x[start : start + size],)), whole[start : start + size])


@pytest.mark.parametrize("case", ["conv1d", "conv2d"])
def test_an_image_alone_equals_the_image_in_a_batch(kernel, case):
    _, module, (x,) = make(case)
    x = torch.randn(21, *x.shape[1:])
    whole = run(module, (x,))
    assert torch.equal(torch.cat([run(module, (one[None],)) for one in x]), whole)


# Convolutions

PAD_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def patches(x, layer):
    """Receptive fields [B, groups, places, depth] of [B, C, *size], by hand."""
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pads = [(t // 2, t - t // 2) for t in total]
    elif layer.padding == "valid":
        pads = [(0, 0)] * len(kernel)
    else:
        pads = [(p, p) for p in layer.padding]
    x = np.pad(x.numpy(), [(0, 0), (0, 0), *pads], mode=PAD_MODES[layer.padding_mode])
    size = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    ]
    taps = []
    for tap in itertools.product(*map(range, kernel)):
        at = tuple(
            slice(t * d, t * d + (n - 1) * s + 1, s)
            for t, d, n, s in zip(tap, dilation, size, stride, strict=True)
        )
        taps.append(x[(slice(None), slice(None), *at)].reshape(*x.shape[:2], -1))
    fields = np.stack(taps, axis=2)  # B, C, taps, places
    return fields.reshape(x.shape[0], layer.groups, -1, fields.shape[-1]).swapaxes(2, 3)


def check_conv(layer, x):
    module = int8(layer)
    out, exact = run(module, (x,)), run(layer, (x,))
    assert out.shape == exact.shape and out.dtype == x.dtype
    batched = x.dim() == len(layer.kernel_size) + 2
    fields = patches(x if batched else x[None], layer)
    codes, scale = module.codes(), module.scale()
    flat = layer.weight.detach().flatten(1)
    width = layer.out_channels // layer.groups
    out = (out if batched else out[None]).flatten(2)
    exact = (exact if batched else exact[None]).flatten(2)
    for image, group in itertools.product(range(fields.shape[0]), range(layer.groups)):
        of = slice(group * width, (group + 1) * width)
        bias = None if layer.bias is None else layer.bias[of]
        tokens = fields[image, group]
        expected = oracle_linear(tokens, codes[of], scale[of], bias, x.dtype)
        assert torch.equal(out[image, of].t(), expected)
        y, bound = theory_bound(tokens, flat[of], codes[of], scale[of], bias, x.dtype)
        assert torch.allclose(exact[image, of].t().double(), y, atol=1e-5)
        assert ((out[image, of].t().double() - exact[image, of].t().double()).abs() <= bound + 1e-5).all()


GRID_1D = [
    {},
    {"stride": 2},
    {"padding": 2},
    {"dilation": 2, "padding": 3},
    {"groups": 2},
    {"groups": 4, "stride": 3, "padding": 1, "bias": False},
    {"padding": "same"},
    {"padding": "same", "kernel_size": 4, "dilation": 3},
    {"padding": "valid", "stride": 2},
    {"kernel_size": 1},
    *({"padding": 2, "padding_mode": mode, "stride": 2, "groups": 2} for mode in PAD_MODES),
    *({"padding": "same", "padding_mode": mode, "kernel_size": 4} for mode in PAD_MODES),
]


# torch warns about its own copy of the input; the int8 layer pads by itself
SAME_WARNING = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


@SAME_WARNING
@pytest.mark.parametrize("options", GRID_1D, ids=str)
def test_conv1d_equals_the_definition_for_every_option(kernel, options):
    layer = nn.Conv1d(8, 12, **{"kernel_size": 3, **options})
    check_conv(layer, torch.randn(3, 8, 13))


GRID_2D = [
    {},
    {"stride": (2, 1)},
    {"padding": (2, 0)},
    {"dilation": (1, 2), "padding": (0, 3)},
    {"groups": 2},
    {"groups": 4, "stride": 3, "padding": 1, "bias": False},
    {"padding": "same", "kernel_size": (2, 4)},
    {"padding": "same", "kernel_size": (4, 3), "dilation": (1, 2)},
    {"padding": "valid", "stride": 2},
    {"kernel_size": 1, "stride": 2},
    *({"padding": (2, 1), "padding_mode": mode, "stride": (1, 2), "groups": 2} for mode in PAD_MODES),
    *({"padding": "same", "padding_mode": mode, "kernel_size": (2, 3)} for mode in PAD_MODES),
]


@SAME_WARNING
@pytest.mark.parametrize("options", GRID_2D, ids=str)
def test_conv2d_equals_the_definition_for_every_option(kernel, options):
    layer = nn.Conv2d(8, 12, **{"kernel_size": 3, **options})
    check_conv(layer, torch.randn(2, 8, 9, 10))


@pytest.mark.parametrize("padding", [1, "same"])
@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect"])
def test_convolutions_take_unbatched_inputs(padding, mode):
    check_conv(nn.Conv1d(8, 12, 3, padding=padding, padding_mode=mode), torch.randn(8, 13))
    check_conv(nn.Conv2d(8, 12, 3, padding=padding, padding_mode=mode), torch.randn(8, 9, 10))


def test_depthwise_convolution_and_a_chunked_batch(monkeypatch):
    layer = nn.Conv2d(6, 6, 3, padding=1, groups=6)
    x = torch.randn(5, 6, 7, 7)
    check_conv(layer, x)
    whole = run(int8(layer), (x,))
    monkeypatch.setattr(paths, "_PATCH_ELEMENTS", 2 * 49 * 54)
    assert torch.equal(run(int8(layer), (x,)), whole)


def test_a_bad_pixel_ruins_only_the_fields_that_see_it(kernel):
    module = int8(nn.Conv2d(4, 6, 3, padding=1))
    x = torch.randn(2, 4, 6, 6)
    clean = run(module, (x,))
    x[1, 2, 0, 5] = float("nan")
    out = run(module, (x,))
    seen = torch.zeros(2, 6, 6, dtype=torch.bool)
    seen[1, :2, 4:] = True
    seen = seen[:, None].expand(2, 6, 6, 6)
    assert torch.isnan(out[seen]).all() and torch.equal(out[~seen], clean[~seen])


# Embedding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3)])
@pytest.mark.parametrize("index", [torch.int64, torch.int32])
def test_embedding_gives_rows_within_half_a_step(dtype, shape, index):
    layer = nn.Embedding(13, 17, padding_idx=2).to(dtype)
    module = int8(layer)
    at = torch.randint(0, 13, shape, dtype=index)
    out, exact = run(module, (at,)), run(layer, (at,))
    assert out.dtype == dtype and out.shape == exact.shape
    step = module.scale()[at.long()].reshape(*shape, 1)
    assert ((out.double() - exact.double()).abs() <= step * 0.5001 + exact.abs().double() * EPS[dtype]).all()
    expected = (module.codes()[at.long()].numpy().astype(np.float32)) * step.numpy()
    assert torch.equal(out, half(expected, dtype))
    assert module.padding_idx == 2 and (run(module, (torch.tensor(2),)) == 0).all()


def test_embedding_refuses_an_index_out_of_range():
    with pytest.raises(IndexError, match="out of range"):
        run(int8(nn.Embedding(13, 17)), (torch.tensor([13]),))


# Attention: the logic around the projections is held against torch with the products made float.


def float_kernel(x, weight, weight_scale, bias, activations):
    return F.linear(x, (weight.float() * weight_scale).to(x.dtype), bias)


def twin_attention(module, layer):
    """nn.MultiheadAttention with the dequantized weights."""
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.in_proj_weight.copy_(module.in_proj_weight)
        twin.out_proj.weight.copy_(module.out_proj.weight)
    return twin


def attention(**options):
    layer = nn.MultiheadAttention(24, 3, **options).eval()
    if layer.in_proj_bias is not None:
        nn.init.normal_(layer.in_proj_bias)
        nn.init.normal_(layer.out_proj.bias)
    module = int8(layer)
    return module, twin_attention(module, layer)


CAUSAL = torch.ones(5, 7, dtype=torch.bool).triu(1)
PADDING = torch.zeros(2, 7, dtype=torch.bool)
PADDING[1, 4:] = True
MASKS = {
    "none": {},
    "bool": {"attn_mask": CAUSAL},
    "float": {"attn_mask": torch.linspace(-2, 2, 35).view(5, 7)},
    "per head": {"attn_mask": torch.linspace(-2, 2, 210).view(6, 5, 7)},
    "per head bool": {"attn_mask": torch.stack([CAUSAL, CAUSAL, torch.zeros_like(CAUSAL)] * 2)},
    "padding": {"key_padding_mask": PADDING},
    "float padding": {"key_padding_mask": torch.zeros(2, 7).masked_fill(PADDING, -1e4)},
    "both": {"attn_mask": CAUSAL, "key_padding_mask": PADDING},
    "causal hint": {"attn_mask": CAUSAL, "is_causal": True},
}


@pytest.mark.parametrize("masks", list(MASKS))
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("weights", [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("bias", [True, False])
def test_attention_does_what_torch_does_around_its_products(monkeypatch, masks, batch_first, weights, bias):
    module, twin = attention(batch_first=batch_first, bias=bias)
    monkeypatch.setattr(kernels, "int8_linear", float_kernel)
    query, key, value = torch.randn(2, 5, 24), torch.randn(2, 7, 24), torch.randn(2, 7, 24)
    if not batch_first:
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    options = dict(MASKS[masks], need_weights=weights[0], average_attn_weights=weights[1])
    with torch.no_grad():
        found, expected = module(query, key, value, **options), twin(query, key, value, **options)
    assert torch.allclose(found[0], expected[0], atol=2e-6, rtol=1e-5)
    assert (found[1] is None) == (expected[1] is None)
    if found[1] is not None:
        assert found[1].shape == expected[1].shape
        assert torch.allclose(found[1], expected[1], atol=1e-6)


@pytest.mark.parametrize("masks", ["none", "bool", "float", "padding", "both"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_takes_unbatched_inputs(monkeypatch, masks, need_weights):
    module, twin = attention()
    monkeypatch.setattr(kernels, "int8_linear", float_kernel)
    options = {k: v[1] if k == "key_padding_mask" else v for k, v in MASKS[masks].items()}
    args = torch.randn(5, 24), torch.randn(7, 24), torch.randn(7, 24)
    with torch.no_grad():
        found = module(*args, need_weights=need_weights, **options)
        expected = twin(*args, need_weights=need_weights, **options)
    assert torch.allclose(found[0], expected[0], atol=2e-6)
    assert (found[1] is None) == (expected[1] is None)
    if need_weights:
        assert found[1].shape == expected[1].shape and torch.allclose(found[1], expected[1], atol=1e-6)


def test_attention_per_head_masks_unbatched(monkeypatch):
    module, twin = attention()
    monkeypatch.setattr(kernels, "int8_linear", float_kernel)
    args = torch.randn(5, 24), torch.randn(7, 24), torch.randn(7, 24)
    mask = torch.linspace(-2, 2, 105).view(3, 5, 7)
    with torch.no_grad():
        assert torch.allclose(module(*args, attn_mask=mask)[0], twin(*args, attn_mask=mask)[0], atol=2e-6)


def test_attention_products_are_int8_with_their_own_rows_of_the_projection(kernel):
    module, _ = attention(batch_first=True)
    args = [torch.randn(2, n, 24) for n in (5, 7, 7)]
    codes, scale = module.codes("in_proj_weight"), module.scale("in_proj_weight")
    heads = []
    for i, x in enumerate(args):
        at = slice(24 * i, 24 * i + 24)
        y = oracle_linear(x.reshape(-1, 24), codes[at], scale[at], module.in_proj_bias[at], torch.float32)
        heads.append(y.view(2, -1, 3, 8).transpose(1, 2).double())
    q, k, v = heads
    weights = (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1)
    mixed = (weights @ v).transpose(1, 2).reshape(-1, 24)
    with torch.no_grad():
        out, found = module(*args, average_attn_weights=False)
    assert torch.allclose(found.double(), weights, atol=1e-6)
    projection = module.out_proj
    _, bound = theory_bound(
        mixed, projection.weight, projection.codes(), projection.scale(), projection.bias, torch.float32
    )
    y = mixed @ projection.weight.detach().double().t() + projection.bias.detach().double()
    assert ((out.reshape(-1, 24).double() - y).abs() <= bound).all()


def test_attention_needs_a_mask_for_the_causal_hint():
    module, _ = attention()
    with pytest.raises(ValueError, match="is_causal=True needs attn_mask"):
        module(*[torch.randn(2, 5, 24)] * 3, is_causal=True)


def test_attention_drops_weights_in_training_only():
    module = int8(nn.MultiheadAttention(24, 3, dropout=0.5, batch_first=True))
    x = torch.randn(2, 5, 24)
    assert torch.equal(run(module, (x, x, x)), run(module, (x, x, x)))
    assert not torch.equal(run(module.train(), (x, x, x)), run(module, (x, x, x)))


# Experts


def twin_experts(module):
    twin = experts()
    with torch.no_grad():
        twin.gate_up_proj.copy_(module.dequantize("gate_up_proj"))
        twin.down_proj.copy_(module.dequantize("down_proj"))
    return twin


def routings():
    """Routings: usual; expert 1 empty; slot marks; a token without any expert; no tokens."""
    usual = routing(9)
    without = (usual[0].clone().masked_fill_(usual[0] == 1, 3), usual[1])
    marked = (usual[0].clone(), usual[1])
    marked[0][::2, 1] = 4
    marked[0][3] = 4
    return {"usual": usual, "empty expert": without, "empty slots": marked, "no tokens": routing(1)}


@pytest.mark.parametrize("case", ["usual", "empty expert", "empty slots", "no tokens"])
def test_experts_mix_as_transformers_does(monkeypatch, case):
    module = int8(experts())
    index, weights = routings()[case]
    tokens = 0 if case == "no tokens" else 9
    x, index, weights = torch.randn(9, 24)[:tokens], index[:tokens], weights[:tokens]
    monkeypatch.setattr(kernels, "int8_linear", float_kernel)
    expected = run(twin_experts(module), (x, index, weights))
    assert torch.allclose(run(module, (x, index, weights)), expected, atol=2e-6)
    if case == "empty slots":
        assert (expected[3] == 0).all() and (run(module, (x, index, weights))[3] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_products_equal_the_definition(kernel, dtype):
    layer = experts(dtype)
    module = int8(layer)
    x, (index, weights) = torch.randn(9, 24, dtype=dtype), routing(9)
    weights = weights.to(dtype)
    expected = torch.zeros(9, 24, dtype=dtype)
    for expert in range(4):
        token, slot = torch.where(index == expert)
        for t, s in zip(token, slot, strict=True):
            names = ("gate_up_proj", "down_proj")
            (up_codes, up_scale), (down_codes, down_scale) = (
                (module.codes(n)[expert], module.scale(n)[expert]) for n in names
            )
            gate, up = oracle_linear(x[t, None].float(), up_codes, up_scale, None, dtype).chunk(2, dim=-1)
            inner = (F.silu(gate) * up).float()
            y = oracle_linear(inner, down_codes, down_scale, None, dtype)
            expected[t] += (y * weights[t, s])[0]
    out = run(module, (x, index, weights))
    assert out.dtype == dtype
    # silu on one row and on many may differ in the last bit, and a code with it
    assert torch.allclose(
        out, expected, atol=0.02 * expected.abs().max().item() if dtype != torch.float32 else 1e-5
    )


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_experts_codes_and_scales_belong_to_their_expert(name):
    layer = experts()
    with torch.no_grad():
        layer.gate_up_proj.mul_(torch.tensor([1.0, 10.0, 0.1, 3.0]).view(4, 1, 1))
    module = int8(layer)
    weight = getattr(layer, name).detach()
    assert module.codes(name).shape == weight.shape
    assert module.scale(name).shape == (*weight.shape[:2], 1)
    step = weight.abs().amax(-1, keepdim=True) / 127
    assert torch.equal(module.scale(name), step)
    assert ((module.dequantize(name) - weight).abs() <= step * 0.5001).all()


# What every int8 layer survives


@EVERY
@pytest.mark.parametrize("dtype", DTYPES)
def test_reading_the_weight_gives_the_dequantized_one(case, dtype):
    layer, _, _ = make(case)
    layer = layer.to(dtype)
    module = int8(layer)
    names = {"attention": ["in_proj_weight"], "experts": []}.get(case, ["weight"])
    for name in names:
        weight, source = getattr(module, name), getattr(layer, name)
        assert weight.dtype == dtype and weight.shape == source.shape and weight.device == source.device
        axis = 0 if case == "transposed" else tuple(range(1, source.dim()))
        step = source.detach().double().abs().amax(axis, keepdim=True) / 127
        bound = step * 0.51 + source.abs().double() * EPS[dtype]
        assert ((weight.double() - source.detach().double()).abs() <= bound).all()
    if case == "attention":
        assert module.out_proj.weight.shape == (24, 24) and module.out_proj.weight.dtype == dtype


@EVERY
@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.double(),
        lambda m: m.to(torch.float16),
        lambda m: nn.ModuleDict({"child": m}).to(torch.bfloat16)["child"],
        lambda m: m.half().float(),
    ],
    ids=["half", "bfloat16", "double", "to fp16", "child to bf16", "half float"],
)
def test_casts_do_not_touch_codes_and_scales(case, cast):
    layer, module, args = make(case)
    with torch.no_grad():  # scales that float16 cannot hold
        for p in module.parameters():
            if p.dtype == torch.float32 and p.shape[-1] == 1:
                p.view(-1)[0], p.view(-1)[1] = 1e-9, 1e7
    before = {k: v.clone() for k, v in module.state_dict().items() if "bias" not in k}
    dtype = cast(copy.deepcopy(layer)).state_dict().popitem()[1].dtype
    module = cast(module)
    after = module.state_dict()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name
    assert module.float_dtype == dtype
    if case == "embedding":
        assert run(module, args).dtype == dtype


@EVERY
def test_half_changes_no_output_but_for_the_bias(case):
    layer, module, args = make(case)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "bias" in name:
                parameter.copy_(parameter.half())
    module = int8(layer)
    expected = run(module, args)
    found = run(copy.deepcopy(module).half(), args)
    assert torch.equal(found, expected.to(found.dtype))


@EVERY
@pytest.mark.parametrize(
    "flag", ["set_overwrite_module_params_on_conversion", "set_swap_module_params_on_conversion"]
)
def test_casts_keep_scales_under_the_future_flags_of_torch(case, flag):
    _, module, args = make(case)
    expected = run(module, args) if case != "embedding" else None
    before = {k: v.clone() for k, v in module.state_dict().items() if "scale" in k}
    getattr(torch.__future__, flag)(True)
    try:
        module.half()
    finally:
        getattr(torch.__future__, flag)(False)
    assert all(torch.equal(module.state_dict()[k], v) for k, v in before.items())
    if expected is not None:
        assert torch.allclose(run(module, args), expected, atol=2e-3)


@EVERY
def test_moving_to_meta_keeps_shapes_and_dtypes(case):
    _, module, _ = make(case)
    before = {k: (v.dtype, v.shape) for k, v in module.state_dict().items()}
    for moved in (copy.deepcopy(module).to("meta"), copy.deepcopy(module).to("meta", torch.bfloat16)):
        state = moved.state_dict()
        assert all(v.is_meta for v in state.values())
        assert {k: v.shape for k, v in state.items()} == {k: shape for k, (_, shape) in before.items()}
        assert all(state[k].dtype == d for k, (d, _) in before.items() if "bias" not in k)
    assert moved.float_dtype == torch.bfloat16


@EVERY
def test_a_layer_made_on_meta_takes_the_saved_state(case):
    layer, module, args = make(case)
    with torch.device("meta"):
        empty = type(module)(copy.deepcopy(layer).to("meta"), None).eval()
    assert all(p.is_meta for p in empty.parameters())
    want = {k: (v.shape, v.dtype) for k, v in module.state_dict().items()}
    assert {k: (v.shape, v.dtype) for k, v in empty.state_dict().items()} == want
    empty.load_state_dict(module.state_dict(), strict=True, assign=True)
    assert torch.equal(run(empty, args), run(module, args))


@EVERY
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_independent_and_equal(case, how):
    _, module, args = make(case)
    if how == "deepcopy":
        twin = copy.deepcopy(module)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(module))
    else:
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    expected = run(module, args)
    assert torch.equal(run(twin, args), expected)
    assert all(type(p) is nn.Parameter for p in twin.parameters())
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert torch.equal(run(module, args), expected)


@EVERY
@pytest.mark.parametrize("assign", [True, False])
def test_state_dict_goes_round_strictly(case, assign):
    layer, module, args = make(case)
    state = module.state_dict()
    assert state.keys() == {
        *(n for n, _ in layer.named_parameters()),
        *(f"{n}_scale" for n, p in layer.named_parameters() if p.dim() > 1),
    }
    assert {v.dtype for n, v in state.items() if n.endswith("_scale")} == {torch.float32}
    fresh = int8(CASES[case]()[0])
    assert not torch.equal(run(fresh, args), run(module, args))
    fresh.load_state_dict({k: v.clone() for k, v in state.items()}, strict=True, assign=assign)
    assert torch.equal(run(fresh, args), run(module, args))
    assert not any(p.requires_grad for n, p in fresh.named_parameters() if "bias" not in n)


@EVERY
def test_a_state_dict_that_does_not_fit_is_refused(case):
    layer, module, _ = make(case)
    state = module.state_dict()
    scale = next(n for n in state if n.endswith("_scale"))
    codes = scale.removesuffix("_scale")
    for wrong, message in [
        ({k: v for k, v in state.items() if k != scale}, f"Missing key.*{scale}"),
        ({**state, "weight_zero_point": torch.zeros(1)}, "Unexpected key.*weight_zero_point"),
        ({**state, codes: state[codes][..., 1:]}, f"size mismatch for {codes}"),
        ({**state, scale: state[scale][1:]}, f"size mismatch for {scale}"),
        (layer.state_dict(), "Missing key.*_scale"),
    ]:
        with pytest.raises(RuntimeError, match=rf"(?s){message}"):
            module.load_state_dict(wrong, strict=True)


@EVERY
def test_codes_and_scales_are_plain_parameters_without_gradient(case):
    layer, module, _ = make(case)
    assert isinstance(module, Int8Module)
    # libraries find it where they look for the float class; the others are not called as theirs are
    assert isinstance(module, type(layer)) == (case not in ("attention", "experts"))
    for name, parameter in module.named_parameters():
        assert type(parameter) is nn.Parameter
        if "bias" not in name:
            assert not parameter.requires_grad
            assert parameter.dtype == (torch.float32 if name.endswith("_scale") else torch.int8)
    assert module._is_hf_initialized
    assert not any("_float" in k for k in module.state_dict())


@EVERY
def test_forward_writes_no_attribute(monkeypatch, case):
    _, module, args = make(case)

    def refuse(self, name, value):
        raise AssertionError(f"forward sets {name}")

    before = [
        (dict(vars(m)), dict(m._parameters), dict(m._buffers), dict(m._modules)) for m in module.modules()
    ]
    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "__setattr__", refuse)
        patch.setattr(Int8Module, "__setattr__", refuse)
        run(module, args)
    after = [
        (dict(vars(m)), dict(m._parameters), dict(m._buffers), dict(m._modules)) for m in module.modules()
    ]
    for old, new in zip(before, after, strict=True):
        for a, b in zip(old, new, strict=True):
            assert a.keys() == b.keys() and all(a[k] is b[k] for k in a)


@EVERY
def test_threads_on_one_module_agree_bit_for_bit(kernel, case):
    _, module, args = make(case)
    expected = run(module, args)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: run(module, args), range(64)):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("case", ["linear", "transposed", "conv1d", "conv2d"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch imports its own old code
def test_compiled_layers_give_the_same_bits(case):
    # the layers whose whole graph is one op, so that nothing has to go through a C++ compiler
    _, module, args = make(case)
    torch._dynamo.reset()
    assert torch.equal(run(torch.compile(module, fullgraph=True), args), run(module, args))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24), (0, 24)])
def test_the_linear_op_keeps_the_contract_of_torch_library(shape, grad):
    layer = nn.Linear(24, 19)
    module = int8(layer)
    x = torch.randn(shape, requires_grad=grad)
    bias = layer.bias.detach().requires_grad_(grad)
    torch.library.opcheck(torch.ops.mono_quant.int8_linear.default, (x, module.codes(), module.scale(), bias))


def test_the_convolution_op_keeps_the_contract_of_torch_library():
    module = int8(nn.Conv2d(4, 6, (3, 2), stride=(2, 1), groups=2, padding=(1, 0), dilation=(1, 2)))
    args = torch.randn(2, 4, 9, 8), module._parameters["weight"], module.scale(), module.bias.detach()
    options = [2, 1], [1, 0], [1, 2], 2
    torch.library.opcheck(torch.ops.mono_quant.int8_conv.default, (*args, *options))


@EVERY
def test_full_graphs_give_the_same_bits(case):
    _, module, args = make(case)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    atol = 1e-6 if case == "attention" else 0  # softmax is float
    for _ in range(2):
        assert torch.allclose(run(compiled, args), run(module, args), rtol=0, atol=atol)
    more = tuple(torch.cat([a, a, a]) for a in args)
    assert torch.allclose(run(compiled, more), run(module, more), rtol=0, atol=atol)


@EVERY
def test_exported_layers_give_the_same_bits(case):
    _, module, args = make(case)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(module, args, dynamic_shapes=({0: batch},) * len(args)).module()
    more = tuple(torch.cat([a, a, a]) for a in args)
    for given in (args, more):
        expected = run(module, given)
        assert torch.allclose(run(exported, given), expected, rtol=0, atol=1e-6 * (case == "attention"))


# Gradients


@pytest.mark.parametrize("shape", [(67,), (5, 67), (2, 3, 67), (0, 67)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_that_of_the_dequantized_linear(shape, dtype):
    layer = nn.Linear(67, 29)
    module, twin = int8(layer), nn.Linear(67, 29).to(dtype)
    with torch.no_grad():
        twin.weight.copy_(module.weight)
        twin.bias.copy_(layer.bias)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    y = torch.randn(shape, dtype=dtype, requires_grad=True)
    grad = torch.randn(*shape[:-1], 29, dtype=dtype)
    module.bias.grad = None
    module(x).backward(grad)
    twin(y).backward(grad)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert x.grad.dtype == dtype and torch.allclose(x.grad, y.grad, atol=tolerance)
    assert torch.allclose(module.bias.grad.to(dtype), twin.bias.grad, atol=tolerance)
    assert module._parameters["weight"].grad is None


def test_the_forward_value_is_the_same_with_and_without_gradient():
    module = int8(nn.Linear(67, 29))
    x = torch.randn(5, 67)
    assert torch.equal(module(x.clone().requires_grad_()).detach(), run(module, (x,)))


@pytest.mark.parametrize("case", ["attention", "experts", "transposed"])
def test_gradients_reach_the_input_through_every_linear_product(monkeypatch, case):
    _, module, args = make(case)
    x, *rest = args
    x = x.clone().requires_grad_()
    first(module(x, *rest)).square().sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().max() > 0


@pytest.mark.parametrize("case", ["conv1d", "conv2d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_convolution_is_that_of_the_dequantized_one(case, dtype):
    layer, module, (x,) = make(case)
    twin = copy.deepcopy(layer).to(dtype)
    with torch.no_grad():
        twin.weight.copy_(module.weight)
    x, y = (x.detach().clone().to(dtype).requires_grad_() for _ in range(2))
    grad = torch.randn_like(run(module, (x,)))
    module(x).backward(grad)
    twin(y).backward(grad)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert x.grad.dtype == dtype and torch.allclose(x.grad, y.grad, atol=tolerance)
    assert torch.allclose(module.bias.grad.to(dtype), twin.bias.grad, atol=tolerance * 10)


# accelerate


@EVERY
@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offloaded_layers_give_the_same_output(case, where, dtype, tmp_path):
    layer, _, args = make(case)
    module = int8(layer.to(dtype))
    args = tuple(a.to(dtype) if a.is_floating_point() else a for a in args)
    expected = run(module, args)
    model = nn.Sequential(copy.deepcopy(module))
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())
    for _ in range(2):
        assert torch.equal(run(model[0], args), expected)
    assert all(p.is_meta for p in model.parameters())
