"""Activation schemes: the same bits on every path, from weights as they are and packed, and errors within their theory."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native import NATIVE, native_only, same
from torch import Tensor
from torch.autograd import forward_ad

from mono_quant import kernels
from mono_quant.kernels import choice, cpu, reference

SCHEMES = list(kernels.SCHEMES)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DEPTHS = [1, 63, 64, 65, 127, 128, 129, 191, 200, 300, 512, 1025]
# AVX-VNNI in the encoding of AVX-512 runs where that does, whether or not the processor has the other one.
ALL = [*NATIVE, *(["avx512vl-vnni"] if "avx512vnni" in NATIVE else [])]


def on(path: str) -> cpu.Cpu:
    assert choice.loaded.library is not None
    return cpu.Cpu(choice.loaded.library, path)


def layer(rows: int, depth: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (rows, depth), dtype=torch.int8, generator=generator)
    weight[0] = -128
    return weight, torch.rand(rows, 1, generator=generator) + 0.1, torch.randn(rows, generator=generator)


def inputs(tokens: int, depth: int, seed: int = 0) -> Tensor:
    """Normal tokens; some with groups of zeros, subnormals, one hot element, NaN or infinity."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, depth, generator=generator) * torch.logspace(-3, 3, tokens)[:, None]
    place = seed % depth
    for row, value in enumerate((float("nan"), float("-inf"), 1e4, 3e-39)):
        x[row + 1 :][:1, place] = value
    x[4:6, : depth // 2] = 0
    x[5:7, depth // 2 :] = 1e-39
    x[7:8] = 0
    x[7:8, place] = -3
    return x


def oracle(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, scheme: str) -> Tensor:
    """The definition in numpy: int64 sums, float32 arithmetic, one group after the other."""
    values, codes = x.float().numpy(), weight.numpy().astype(np.int64)
    depth = values.shape[1]
    group = int(scheme.partition("-g")[2] or max(1, depth))
    qmax = 2047 if scheme == "int12" and depth <= 8192 else 127 if scheme != "int12" else 16_777_215 // depth
    parts = []
    with np.errstate(all="ignore"):
        for start in range(0, max(1, depth), group):
            part = values[:, start : start + group]
            a, q = np.abs(part).max(1, keepdims=True), np.float32(qmax)
            zero, broken = a < q * np.float32(2.0**-126), ~np.isfinite(a)
            code = np.rint(part * np.where(zero | broken, np.float32(0), q / a))
            code = np.where(broken, 0, np.clip(code, -q, q)).astype(np.int64)
            s = np.where(broken, np.float32(np.nan), np.where(zero, np.float32(0), a / q))
            parts.append(((code @ codes[:, start : start + group].T).astype(np.float32), s))
        ws = scale.numpy().reshape(1, -1)
        if len(parts) == 1:
            y = parts[0][0] * (parts[0][1] * ws)
        else:
            y = parts[0][0] * parts[0][1]
            for total, s in parts[1:]:
                y = y + total * s
            y = y * ws
        if bias is not None:
            y = y + bias.float().numpy()
    return torch.from_numpy(y).to(x.dtype)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@native_only
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.sampled_from([0, 1, 2, 3, 4, 5, 9, 16, 17, 70, 300]),
    rows=st.sampled_from([1, 5, 16, 17, 33, 48, 50, 97]),
    depth=st.sampled_from(DEPTHS),
    dtype=st.sampled_from(DTYPES),
    bias=st.sampled_from([None, *DTYPES]),
    scheme=st.sampled_from(SCHEMES),
    count=st.sampled_from([1, 2, 7]),
    seed=st.integers(0, 2**31),
)
def test_every_path_has_the_bits_of_the_definition(
    tokens: int,
    rows: int,
    depth: int,
    dtype: torch.dtype,
    bias: torch.dtype | None,
    scheme: str,
    count: int,
    seed: int,
    threads: None,
) -> None:
    weight, scale, offset = layer(rows, depth, seed)
    x, b = inputs(tokens, depth, seed).to(dtype), None if bias is None else offset.to(bias)
    expected = oracle(x, weight, scale, b, scheme)
    assert same(reference.linear(x, weight, scale, b, kernels.SCHEMES[scheme]), expected)
    torch.set_num_threads(count)
    for path in ALL:
        native = on(path)
        for packed in (None, native.pack(weight, kernels.SCHEMES[scheme])):
            y = native.linear(x, weight, scale, b, kernels.SCHEMES[scheme], packed)
            assert y is not None and same(y, expected), (path, packed is not None)


@native_only
@pytest.mark.parametrize("depth", [8191, 8192, 8193])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_long_rows_have_the_bits_of_the_definition(scheme: str, depth: int) -> None:
    weight, scale, bias = layer(18, depth)
    x = inputs(70, depth, 4000)
    expected = oracle(x, weight, scale, bias, scheme)
    for path in ALL:
        native = on(path)
        packed = native.pack(weight, kernels.SCHEMES[scheme])
        for tokens in (1, 3, 70):
            for pack in (None, packed):
                y = native.linear(x[:tokens], weight, scale, bias, kernels.SCHEMES[scheme], pack)
                assert y is not None and same(y, expected[:tokens]), (path, tokens, pack is not None)


@native_only
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_token_does_not_depend_on_its_batch_or_on_packing(scheme: str, threads: None) -> None:
    weight, scale, bias = layer(50, 300)
    x, fixed = inputs(1100, 300), kernels.SCHEMES[scheme]
    for path in ALL:
        native = on(path)
        packed = native.pack(weight, fixed)
        whole = native.linear(x, weight, scale, bias, fixed)
        assert whole is not None
        for tokens, count in ((1, 1), (5, 2), (16, 1), (41, 7), (600, 2), (1100, 7)):
            torch.set_num_threads(count)
            for pack in (None, packed):
                y = native.linear(x[:tokens], weight, scale, bias, fixed, pack)
                assert y is not None and same(y, whole[:tokens]), (path, tokens, count, pack is not None)


def test_a_row_of_one_group_has_the_bits_of_one_scale(path: str) -> None:
    weight, scale, bias = layer(20, 64)
    x = inputs(30, 64)
    plain = kernels.int8_linear(x, weight, scale, bias, "int8")
    for scheme in ("int8-g64", "int8-g128"):
        assert same(kernels.int8_linear(x, weight, scale, bias, scheme), plain)


@pytest.mark.parametrize("scheme", ["int8-g128", "int8-g64"])
def test_nan_breaks_its_token_and_zeros_add_nothing(path: str, scheme: str) -> None:
    weight, scale, bias = layer(20, 256)
    x = torch.randn(4, 256)
    x[1, 200], x[2, 3], x[3, :128] = float("nan"), float("inf"), 0
    y = kernels.int8_linear(x, weight, scale, bias, scheme)
    assert y[1:3].isnan().all()
    assert y[[0, 3]].isfinite().all()
    tail = kernels.int8_linear(x[3:, 128:], weight[:, 128:].contiguous(), scale, None, "int8-g64")
    if scheme == "int8-g64":
        assert same(kernels.int8_linear(x[3:], weight, scale, None, scheme), tail)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_errors_stay_within_half_a_step_of_each_group(path: str, scheme: str) -> None:
    weight, scale, bias = layer(40, 500)
    x = torch.randn(20, 500) * torch.logspace(-2, 2, 500)
    depth, group = 500, kernels.SCHEMES[scheme].group or 500
    exact = x.double() @ (weight.double() * scale.double()).t() + bias.double()
    size, bound = x.double().abs() @ (weight.double().abs() * scale.double()).t() + bias.abs(), 0.0
    for start in range(0, depth, group):
        part = slice(start, start + group)
        step = x[:, part].abs().amax(1, keepdim=True).double() / kernels.SCHEMES[scheme].qmax
        bound = bound + step / 2 * (weight[:, part].double().abs().sum(1) * scale.double().view(1, -1))
    y = kernels.int8_linear(x, weight, scale, bias, scheme)
    # codes are rounded from x times a rounded reciprocal, and each fp32 operation rounds once
    rounding = size * (depth // group + 6) * 2.0**-23
    assert ((y - exact).abs() <= bound * (1 + 1e-4) + rounding).all()


def test_groups_and_wide_codes_are_what_an_outlier_needs(path: str) -> None:
    weight, scale, _ = layer(64, 1024)
    x = torch.randn(32, 1024)
    x[:, 77] = 60
    exact = x.double() @ (weight.double() * scale.double()).t()
    error = {
        scheme: float((kernels.int8_linear(x, weight, scale, None, scheme) - exact).norm() / exact.norm())
        for scheme in SCHEMES
    }
    # the step of one group in eight, or in sixteen, is an outlier's
    assert error["int8-g128"] < error["int8"] / 2
    assert error["int8-g64"] < error["int8-g128"] / 1.2
    assert error["int12"] < error["int8"] / 12


@native_only
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("groups", [1, 3])
def test_a_packed_convolution_has_the_bits_of_the_plain_one(scheme: str, groups: int) -> None:
    weight, scale, bias = layer(21, 9 * 50)
    weight, x, fixed = weight.view(21, 50, 3, 3), torch.randn(2, 50 * groups, 9, 7), kernels.SCHEMES[scheme]
    x[1, 3, 4, 4] = float("nan")
    geometry = ([2, 1], [1, 1], [1, 1], groups)
    size = out_size(x, weight, *geometry[:3])
    with kernels.using("reference"):
        expected = kernels.int8_conv(x, weight, scale, bias, *geometry, scheme)
    flat = weight.permute(0, 2, 3, 1).reshape(21, -1)
    for path in ALL:
        native = on(path)
        for packed in (None, native.pack(flat, fixed, groups)):
            y = native.conv(x, weight, scale, bias, *geometry, size, fixed, packed)
            assert y is not None and same(y, expected), (path, packed is not None)


def out_size(
    x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> list[int]:
    y = torch.nn.functional.conv2d(x[:, : weight.shape[1]], weight.float(), None, stride, padding, dilation)
    return list(y.shape[2:])


@native_only
def test_a_pack_of_other_kernels_is_passed_over() -> None:
    weight, scale, bias = layer(33, 200)
    x, narrow, wide = inputs(70, 200), kernels.SCHEMES["int8"], kernels.SCHEMES["int12"]
    packs = [on(path).pack(weight, scheme) for path in ALL for scheme in (narrow, wide)]
    for path in ALL:
        for scheme in (narrow, wide):
            plain = on(path).linear(x, weight, scale, bias, scheme)
            for packed in packs:
                y = on(path).linear(x, weight, scale, bias, scheme, packed)
                assert plain is not None and y is not None and same(y, plain)


@native_only
def test_what_cannot_be_packed_is_not() -> None:
    weight, _, _ = layer(33, 200)
    native, int8 = on(NATIVE[-1]), kernels.SCHEMES["int8"]
    assert native.pack(weight.float(), int8) is None
    assert native.pack(weight.t(), int8) is None
    assert on("portable").pack(weight, int8) is None


def test_the_avx_vnni_twin_is_never_chosen() -> None:
    assert "avx512vl-vnni" not in choice.loaded.paths
    with pytest.raises(ValueError, match="unknown kernel path 'avx512vl-vnni'"):
        cpu.choose(choice.loaded, "avx512vl-vnni")


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_and_transforms_take_the_scheme(scheme: str) -> None:
    weight, scale, bias = layer(13, 200)
    x = torch.randn(4, 3, 200)
    expected = kernels.int8_linear(x, weight, scale, bias, scheme)
    assert not same(expected, kernels.int8_linear(x, weight, scale, bias, "int8")) or scheme == "int8"

    def product(rows: Tensor) -> Tensor:
        return kernels.int8_linear(rows, weight, scale, bias, scheme)

    assert same(torch.vmap(product)(x), expected)
    leaf = x.clone().requires_grad_()
    y = product(leaf)
    assert same(y.detach(), expected)
    y.sum().backward()
    torch.testing.assert_close(leaf.grad, (torch.ones(4, 3, 13) @ (weight.float() * scale)))
    with forward_ad.dual_level():
        primal, tangent = forward_ad.unpack_dual(product(forward_ad.make_dual(x, torch.ones_like(x))))
    assert same(primal, expected)
    torch.testing.assert_close(tangent, (torch.ones_like(x) @ (weight.float() * scale).t()))
    absent = (t.to("meta") for t in (x, weight, scale, bias))
    assert kernels.int8_linear(*absent, scheme).shape == (4, 3, 13)  # type: ignore[arg-type]
    image, kernel = torch.randn(2, 50, 5, 6), weight.view(13, 50, 2, 2)
    geometry = ([1, 1], [0, 0], [1, 1], 1)
    convolved = kernels.int8_conv(image, kernel, scale, bias, *geometry, scheme)
    batched = torch.vmap(lambda one: kernels.int8_conv(one, kernel, scale, bias, *geometry, scheme))(
        image[None]
    )
    assert same(batched[0], convolved)
    watched = kernels.int8_conv(image.requires_grad_(), kernel, scale, bias, *geometry, scheme)
    assert same(watched.detach(), convolved)
    watched.sum().backward()
    assert image.grad is not None
