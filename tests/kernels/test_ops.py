"""Every path of the kernels against an oracle in int64 and against each other, bit for bit."""

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native import PATHS, native_only, same
from torch import Tensor
from torch.nn import functional as F

from mono_quant import kernels
from mono_quant.errors import InputError
from mono_quant.kernels import choice, cpu, paths


def encode_rows(weight: torch.Tensor, scale_dtype: torch.dtype) -> cpu.EncodedRows | None:
    return None if choice.active.cpu is None else choice.active.cpu.encode_rows(weight, scale_dtype)


def cast_half(tensor: torch.Tensor) -> cpu.HalfValues | None:
    return None if choice.active.cpu is None else choice.active.cpu.cast_half(tensor)


SCHEMES = list(kernels.SCHEMES)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def codes_of(rows: Tensor, qmax: int) -> tuple[Tensor, Tensor]:
    """Codes of fp32 rows, int64 [M, K], and their scales [M]."""
    absmax = rows.abs().amax(1) if rows.shape[1] else torch.zeros(rows.shape[0])
    limit = torch.full_like(absmax, qmax)
    scale = absmax / limit
    inverse = limit / absmax
    zero = absmax < qmax * 2.0**-126
    scale[zero] = inverse[zero] = 0.0
    broken = ~torch.isfinite(absmax)
    codes = torch.round(rows * inverse[:, None])
    codes[broken] = 0
    scale[broken] = float("nan")
    assert codes.abs().max() <= qmax if codes.numel() else True
    return codes.to(torch.int64), scale[:, None]


def oracle(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, scheme: str = "int8"
) -> Tensor:
    """The definition once more, with exact sums in int64."""
    rows, depth = x.reshape(-1, x.shape[-1]).float(), x.shape[-1]
    group = {"int8-g128": 128, "int8-g64": 64}.get(scheme, max(1, depth))
    qmax = 127 if scheme != "int12" else min(2047, max(127, (2**31 - 1) // 128 // max(1, depth)))
    parts = []
    for start in range(0, max(1, depth), group):
        codes, scale = codes_of(rows[:, start : start + group], qmax)
        total = codes @ weight[:, start : start + group].to(torch.int64).t()
        assert total.abs().max() < 2**31 if total.numel() else True
        parts.append((total.float(), scale))
    if len(parts) == 1:
        out = parts[0][0] * (parts[0][1] * weight_scale.view(1, -1))
    else:
        out = functools.reduce(torch.add, [total * scale for total, scale in parts]) * weight_scale.view(
            1, -1
        )
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def layer(rows: int, depth: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-127, 128, (rows, depth), dtype=torch.int8, generator=generator)
    return weight, torch.rand(rows, 1, generator=generator) + 0.1, torch.randn(rows, generator=generator)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.integers(0, 70),
    rows=st.integers(1, 70),
    depth=st.sampled_from([
        1,
        2,
        3,
        15,
        16,
        17,
        31,
        32,
        33,
        63,
        64,
        65,
        100,
        127,
        128,
        129,
        191,
        200,
        384,
        1025,
        2049,
    ]),
    dtype=st.sampled_from(DTYPES),
    bias=st.sampled_from([None, *DTYPES]),
    scheme=st.sampled_from(SCHEMES),
    count=st.sampled_from([1, 2, 5]),
    path=st.sampled_from(PATHS),
    magnitude=st.sampled_from([1e-30, 1.0, 1e4]),
    seed=st.integers(0, 2**31),
)
def test_every_path_has_the_bits_of_the_oracle(
    tokens: int,
    rows: int,
    depth: int,
    dtype: torch.dtype,
    bias: torch.dtype | None,
    scheme: str,
    count: int,
    path: str,
    magnitude: float,
    seed: int,
) -> None:
    weight, scale, offset = layer(rows, depth, seed)
    weight[seed % rows, seed % depth] = -128
    x = (torch.randn(tokens, depth, generator=torch.Generator().manual_seed(seed)) * magnitude).to(dtype)
    if tokens > 3:
        x[1, seed % depth] = float("nan")
        x[2, seed % depth] = float("-inf")
        x[3] = 0
    b = None if bias is None else offset.to(bias)
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with kernels.using(path):
            y = kernels.int8_linear(x, weight, scale, b, scheme)
    finally:
        torch.set_num_threads(before)
    assert same(y, oracle(x, weight, scale, b, scheme))


def extreme_rows(depth: int, qmax: int) -> Tensor:
    """Tokens whose codes are the largest, alternate, or have one value apart."""
    rows = torch.ones(6, depth)
    rows[1] = -1
    rows[2, 1::2] = -1
    rows[3, 1:] = 0
    rows[4, :-1] = 1 / (2 * qmax)
    rows[5] = 2.0**-130
    return rows


def extreme_weights(depth: int) -> Tensor:
    weight = torch.full((7, depth), 127, dtype=torch.int8)
    weight[1] = -127
    weight[2, 1::2] = -127
    weight[3] = -128
    weight[4, 1:] = 0
    weight[5, :-1] = 0
    weight[6, depth // 2] = -128
    return weight


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("depth", [1, 2, 15, 16, 17, 31, 2047, 2048, 2049, 8191, 8192, 8193, 16385, 132104])
def test_extreme_codes_sum_exactly(path: str, depth: int, scheme: str) -> None:
    weight, x = extreme_weights(depth), extreme_rows(depth, 2047 if scheme == "int12" else 127)
    scale = torch.ones(7, 1)
    few = kernels.int8_linear(x, weight, scale, None, scheme)
    many = kernels.int8_linear(x.repeat(11, 1), weight, scale, None, scheme)
    expected = oracle(x, weight, scale, None, scheme)
    assert same(few, expected)
    assert same(many, expected.repeat(11, 1))


def test_rows_up_to_the_limit_without_minus_128_are_exact(path: str) -> None:
    depth = 133_144
    weight = torch.full((1, depth), -127, dtype=torch.int8)
    x = torch.ones(17, depth)
    assert kernels.int8_linear(x, weight, torch.ones(1, 1), None).eq(-127.0 * depth).all()


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 47, 48, 49, 97])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_token_does_not_depend_on_its_batch(path: str, scheme: str, rows: int, threads: None) -> None:
    weight, scale, bias = layer(rows, 131)
    x = torch.randn(300, 131)
    alone = torch.cat([kernels.int8_linear(x[i : i + 1], weight, scale, bias, scheme) for i in range(300)])
    for tokens in (2, 5, 6, 7, 11, 13, 41, 49, 60, 61, 300):
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            assert same(kernels.int8_linear(x[:tokens], weight, scale, bias, scheme), alone[:tokens])


@native_only
@pytest.mark.parametrize("scheme", ["int8", "int8-g128"])
def test_many_tokens_pass_in_several_chunks(scheme: str) -> None:
    weight, scale, _ = layer(50, 4100)
    x = torch.randn(1100, 4100)
    y = kernels.int8_linear(x, weight, scale, None, scheme)
    pick = torch.tensor([0, 1, 509, 510, 511, 512, 1098, 1099])
    assert same(y[pick], oracle(x[pick], weight, scale, None, scheme))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("depth", [2, 131, 2049])
def test_many_tokens_of_a_small_layer_pass_in_blocks(
    path: str, scheme: str, depth: int, dtype: torch.dtype, threads: None
) -> None:
    weight, scale, bias = layer(97, depth)
    x = torch.randn(2100, depth).to(dtype)
    x[1, 1], x[1030] = float("nan"), 0
    expected = oracle(x, weight, scale, bias, scheme)
    for tokens, count in ((513, 1), (2100, 1), (2100, 2), (2100, 3)):
        torch.set_num_threads(count)
        assert same(kernels.int8_linear(x[:tokens], weight, scale, bias, scheme), expected[:tokens])


def test_a_bad_row_breaks_only_itself(path: str) -> None:
    weight, scale, bias = layer(20, 40)
    x = torch.randn(70, 40)
    good = kernels.int8_linear(x, weight, scale, bias)
    bad = x.clone()
    bad[5, 39], bad[6, 0], bad[7, 20] = float("nan"), float("inf"), float("-inf")
    y = kernels.int8_linear(bad, weight, scale, bias)
    assert y[5:8].isnan().all()
    keep = torch.tensor([i for i in range(70) if i not in (5, 6, 7)])
    assert same(y[keep], good[keep])


def test_rows_of_zeros_and_subnormals_give_the_bias(path: str) -> None:
    weight, scale, bias = layer(20, 40)
    x = torch.zeros(3, 40)
    x[1] = 1e-40
    x[2, 3] = 126 * 2.0**-126
    assert same(kernels.int8_linear(x, weight, scale, bias), bias.expand(3, 20))


@pytest.mark.parametrize("shape", [(40,), (0, 40), (2, 0, 40), (1, 1, 40), (2, 3, 4, 40)])
def test_leading_dimensions_are_kept(path: str, shape: tuple[int, ...]) -> None:
    weight, scale, bias = layer(20, 40)
    x = torch.randn(shape)
    assert same(kernels.int8_linear(x, weight, scale, bias), oracle(x, weight, scale, bias))


def test_no_input_features_give_the_bias(path: str) -> None:
    weight, scale, bias = layer(5, 0)
    assert same(kernels.int8_linear(torch.empty(3, 0), weight, scale, bias), bias.expand(3, 5))


def test_strided_and_misaligned_tensors_are_read_right(path: str) -> None:
    depth, rows = 67, 19
    weight, scale, bias = layer(rows, depth)
    memory = torch.zeros(weight.numel() + 3, dtype=torch.int8)
    odd = memory[3:].view(rows, depth)
    odd.copy_(weight)
    column_major = weight.t().contiguous().t()
    x = torch.randn(30, 2 * depth + 1)[:, 1 : depth + 1]
    expected = oracle(x, weight, scale, bias)
    wide_bias = torch.stack([bias, bias], 1)[:, 0]
    for w in (weight, odd, column_major):
        assert same(kernels.int8_linear(x, w, scale, wide_bias), expected)
    flat = torch.randn(1 + 30 * depth)[1:].view(30, depth)
    assert same(kernels.int8_linear(flat, weight, scale, bias), oracle(flat, weight, scale, bias))
    negated = torch.view_as_complex(torch.randn(30, depth, 2)).conj().imag
    assert same(
        kernels.int8_linear(negated, weight, scale, bias), oracle(negated.clone(), weight, scale, bias)
    )


def test_other_dtypes_take_the_reference() -> None:
    weight, scale, bias = layer(5, 16)
    x = torch.randn(3, 16, dtype=torch.float64)
    for scheme in SCHEMES:
        assert same(
            kernels.int8_linear(x, weight, scale, bias, scheme), oracle(x, weight, scale, bias, scheme)
        )


def test_a_wrong_shape_is_an_error(path: str) -> None:
    weight, scale, bias = layer(5, 16)
    with pytest.raises(InputError, match="with 16 features, not \\(3, 17\\)"):
        kernels.int8_linear(torch.randn(3, 17), weight, scale, bias)


@native_only
def test_eight_threads_share_one_layer() -> None:
    weight, scale, bias = layer(300, 500)
    inputs = [torch.randn(1 + 9 * i, 500) for i in range(8)]
    expected = [kernels.int8_linear(x, weight, scale, bias) for x in inputs]

    def work(i: int) -> bool:
        return all(same(kernels.int8_linear(inputs[i], weight, scale, bias), expected[i]) for _ in range(40))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


@native_only
def test_wide_codes_are_closer_to_the_float_product() -> None:
    weight, scale, _ = layer(256, 1024)
    x = torch.randn(64, 1024)
    exact = x.double() @ (weight.double() * scale.double()).t()

    def error() -> float:
        return float((kernels.int8_linear(x, weight, scale, None) - exact).norm() / exact.norm())

    with kernels.using(activations="int8"):
        narrow = error()
    with kernels.using(activations="int12"):
        wide = error()
    # sqrt(1/12) * step / rms with absmax near 3.5 sigma; sixteen times less with 2047 in place of 127
    assert 0.005 < narrow < 0.01
    assert wide < narrow / 14


def test_long_rows_get_narrower_codes_by_their_length_alone() -> None:
    wide = kernels.SCHEMES["int12"]
    assert wide.widest_code(8192) == 2047
    assert wide.widest_code(8200) == 2046
    assert wide.widest_code(132_104) == 127
    assert wide.widest_code(10**6) == 127
    assert kernels.SCHEMES["int8"].widest_code(10**6) == 127
    assert kernels.SCHEMES["int8-g128"].widest_code(10**6) == 127
    assert kernels.MAX_IN_FEATURES == 132_104


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="torch._int_mm is slow here")
def test_int_mm_stands_in_for_the_reference() -> None:
    weight, scale, bias = layer(33, 100)
    weight[0, 0] = -128
    x = torch.randn(40, 100)
    with kernels.using("reference"):
        assert paths._int_mm_is_exact()
        assert same(kernels.int8_linear(x, weight, scale, bias), oracle(x, weight, scale, bias))


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, value in zip(("weight", "scale", "offset"), layer(13, 17), strict=True):
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(kernels.int8_linear(x, self.weight, self.scale, self.offset))  # type: ignore[arg-type]


def test_export_keeps_the_op_and_its_result() -> None:
    module, x = Small(), torch.randn(3, 17)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},))
    targets = {str(node.target) for node in program.graph.nodes}
    assert "mono_quant.int8_linear.default" in targets
    more = torch.randn(9, 17)
    assert same(program.module()(more), module(more))


def test_compile_keeps_the_op_in_one_graph() -> None:
    module, x = Small(), torch.randn(3, 17)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(module, fullgraph=True, backend=backend)
    assert same(compiled(x), module(x))
    assert len(graphs) == 1
    assert any("int8_linear" in str(node.target) for node in graphs[0].graph.nodes)


@pytest.mark.parametrize("op", ["int8_linear", "half_linear"])
def test_ops_pass_the_checks_of_torch_library(op: str) -> None:
    weight, scale, bias = layer(13, 17)
    for x in (torch.randn(3, 17), torch.randn(2, 3, 17, requires_grad=True)):
        args = (x, weight, scale, bias, "int12") if op == "int8_linear" else (x, weight.half(), bias)
        torch.library.opcheck(getattr(torch.ops.mono_quant, op).default, args)


def test_the_conv_op_passes_the_checks_of_torch_library() -> None:
    weight, scale, bias = layer(6, 36)
    args = (
        torch.randn(2, 4, 9, 8),
        weight.view(6, 4, 3, 3),
        scale,
        bias,
        [2, 1],
        [1, 1],
        [1, 1],
        1,
        "int8-g64",
    )
    torch.library.opcheck(torch.ops.mono_quant.int8_conv.default, args)
    last = (args[0].contiguous(memory_format=torch.channels_last), *args[1:])
    torch.library.opcheck(torch.ops.mono_quant.int8_conv.default, last)


def test_gradients_are_those_of_the_dequantized_layer() -> None:
    weight, scale, bias = layer(13, 17)
    x = torch.randn(3, 17, requires_grad=True)
    bias.requires_grad_()
    kernels.int8_linear(x, weight, scale, bias).sum().backward()
    assert x.grad is not None
    assert bias.grad is not None
    torch.testing.assert_close(x.grad, torch.ones(3, 13) @ (weight.float() * scale))
    assert bias.grad.eq(3).all()


def test_fake_tensors_get_shape_and_dtype() -> None:
    weight, scale, bias = layer(13, 17)
    with torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        y = kernels.int8_linear(torch.empty(2, 3, 17, dtype=torch.bfloat16), weight, scale, bias)
    assert y.shape == (2, 3, 13)
    assert y.dtype == torch.bfloat16


def test_autocast_and_inference_mode_change_nothing(path: str) -> None:
    weight, scale, bias = layer(13, 17)
    x = torch.randn(3, 17)
    expected = oracle(x, weight, scale, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(kernels.int8_linear(x, weight, scale, bias), expected)
    with torch.inference_mode():
        assert same(kernels.int8_linear(x, weight, scale, bias), expected)
    with torch.device("meta"):
        assert same(kernels.int8_linear(x, weight, scale, bias), expected)


def test_vmap_gives_the_bits_of_the_whole_batch() -> None:
    weight, scale, bias = layer(13, 17)
    x = torch.randn(4, 3, 17)
    y = torch.vmap(lambda rows: kernels.int8_linear(rows, weight, scale, bias))(x)
    assert same(y, oracle(x, weight, scale, bias))


def oracle_conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    size: tuple[int, int],
    scheme: str = "int8",
    **how: int,
) -> Tensor:
    """The product of receptive fields, their values and those of the weight put in the order row, column, channel."""
    groups = how.pop("groups")
    places = F.unfold(x.float(), size, **how)
    images, _, count = places.shape
    order = torch.arange(weight.shape[1]).view(-1, size[0] * size[1]).t().flatten()
    tokens, weight = places.view(images, groups, -1, count)[:, :, order].transpose(2, 3), weight[:, order]
    width = weight.shape[0] // groups
    parts = []
    for g in range(groups):
        pick = slice(g * width, (g + 1) * width)
        offset = None if bias is None else bias[pick]
        parts.append(oracle(tokens[:, g].to(x.dtype), weight[pick], scale[pick], offset, scheme))
    return torch.cat(parts, -1).transpose(1, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("channels", "rows", "groups", "size", "stride", "padding", "dilation"),
    [
        (3, 8, 1, (3, 3), 1, 1, 1),
        (16, 50, 1, (3, 2), 2, 2, 2),
        (16, 20, 1, (1, 1), 1, 0, 1),
        (12, 8, 4, (3, 3), 1, 1, 1),
        (6, 6, 6, (3, 3), 1, 1, 1),
        (3, 40, 1, (4, 4), 4, 0, 1),
        (75, 21, 3, (3, 3), 2, 1, 1),
        (150, 7, 1, (2, 2), 1, 1, 1),
    ],
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_conv_has_the_bits_of_the_oracle(
    path: str,
    scheme: str,
    channels: int,
    rows: int,
    groups: int,
    size: tuple[int, int],
    stride: int,
    padding: int,
    dilation: int,
    last: bool,
    dtype: torch.dtype,
) -> None:
    weight, scale, bias = layer(rows, channels // groups * size[0] * size[1])
    x = torch.randn(2, channels, 13, 12).to(dtype)
    x[1, 0, 5, 5] = float("nan")
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    pairs = [(n, n) for n in (stride, padding, dilation)]
    y = kernels.int8_conv(
        x, weight.view(rows, channels // groups, *size), scale, bias, *pairs, groups, scheme
    )
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    assert same(y.flatten(2), oracle_conv(x, weight, scale, bias, size, scheme, **how))
    assert y.is_contiguous() or last


def test_conv_of_many_places_has_the_bits_of_the_oracle(path: str) -> None:
    weight, scale, bias = layer(50, 4 * 9)
    x = torch.randn(2, 8, 31, 37)
    y = kernels.int8_conv(x, weight.view(50, 4, 3, 3), scale, bias, (1, 1), (1, 1), (1, 1), 2)
    how = {"stride": 1, "padding": 1, "dilation": 1, "groups": 2}
    assert same(y.flatten(2), oracle_conv(x, weight, scale, bias, (3, 3), **how))


def test_conv_of_no_images(path: str) -> None:
    weight, scale, bias = layer(5, 12)
    y = kernels.int8_conv(
        torch.empty(0, 3, 8, 8), weight.view(5, 3, 2, 2), scale, bias, (1, 1), (0, 0), (1, 1), 1
    )
    assert y.shape == (0, 5, 7, 7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [1, 7, 8, 33])
def test_embedding_rounds_once(path: str, depth: int, dtype: torch.dtype) -> None:
    table, scale, _ = layer(11, depth)
    for indices in (torch.tensor(3), torch.randint(0, 11, (2, 5)), torch.empty(0, dtype=torch.int64)):
        expected = (table[indices].float() * scale[indices]).to(dtype)
        assert same(kernels.int8_embedding(indices, table, scale, dtype), expected)
    assert same(kernels.int8_embedding(torch.tensor([4], dtype=torch.int32), table, scale, dtype)[0],
                (table[4].float() * scale[4]).to(dtype))  # fmt: skip


@pytest.mark.parametrize("index", [-1, 11])
def test_an_index_out_of_range_is_an_error(path: str, index: int) -> None:
    table, scale, _ = layer(11, 8)
    with pytest.raises(IndexError, match="out of range"):
        kernels.int8_embedding(torch.tensor([0, index]), table, scale, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 5, 13, 60, 61, 1111])
@pytest.mark.parametrize("depth", [1, 8, 9, 100, 2049])
def test_half_linear_is_as_close_as_fp32_sums_are(
    path: str, depth: int, tokens: int, dtype: torch.dtype
) -> None:
    weight = torch.randn(37, depth).half()
    x, bias = torch.randn(tokens, depth).to(dtype), torch.randn(37)
    y = kernels.half_linear(x, weight, bias)
    assert y.dtype == dtype
    exact = x.double() @ weight.double().t() + bias
    size = x.double().abs() @ weight.double().abs().t() + bias.abs()
    info = torch.finfo(dtype)
    # the sum in fp32, then one rounding: relative, but for subnormal results
    rounding = exact.abs().clamp(min=info.tiny) * info.eps / 2
    assert ((y - exact).abs() <= size * (depth + 2) * 2.0**-24 + rounding).all()


@native_only
def test_half_linear_passes_nan_and_infinity_on() -> None:
    weight = torch.ones(5, 20).half()
    x = torch.zeros(2, 20)
    x[0, 3], x[1, 19] = float("nan"), float("inf")
    y = kernels.half_linear(x, weight, None)
    assert y[0].isnan().all()
    assert y[1].isposinf().all()


def oracle_rows(weight: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows = weight.float()
    scale = rows.abs().amax(1, keepdim=True) / torch.tensor(127.0)
    rounded = scale.to(scale_dtype).float()
    if scale_dtype == torch.float16:
        rounded = torch.where(scale < 2.0**-14, scale, rounded)
    rounded = torch.where(rounded < 2.0**-126, 1.0, rounded)
    return torch.round(rows / rounded).clamp(-127, 127).to(torch.int8), rounded


@native_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("depth", [1, 31, 32, 33, 700])
def test_encoded_rows_have_the_bits_of_the_oracle(
    depth: int, scale_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    weight = (torch.randn(130, depth) * torch.logspace(-9, 2, 130)[:, None]).to(dtype)
    weight[3] = 0
    found = encode_rows(weight, scale_dtype)
    assert found is not None
    codes, scale = oracle_rows(weight, scale_dtype)
    assert torch.equal(found.codes, codes)
    assert torch.equal(found.scale, scale)
    noise = (weight.float() - codes.float() * scale).double().square().sum()
    assert found.signal == pytest.approx(float(weight.double().square().sum()), rel=1e-6)
    assert found.noise == pytest.approx(float(noise), rel=1e-3, abs=1e-12 * found.signal)


@native_only
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_ties_and_their_neighbours_round_like_the_quotient(scale_dtype: torch.dtype) -> None:
    # every half step and the floats next to it, for scales that are no powers of two
    steps = torch.arange(-126.5, 127, 0.5).repeat(64, 1) * (torch.rand(64, 1) + 0.5)
    weight = torch.cat([steps, steps.nextafter(torch.tensor(9e9)), steps.nextafter(torch.tensor(-9e9))], 1)
    weight[:, 0] = weight.abs().amax(1) * 127 / 126.5
    found = encode_rows(weight, scale_dtype)
    assert found is not None
    assert torch.equal(found.codes, oracle_rows(weight, scale_dtype)[0])


@native_only
def test_encoded_rows_mark_what_is_not_finite() -> None:
    weight = torch.randn(6, 40)
    weight[1, 39], weight[4, 0] = float("nan"), float("-inf")
    found = encode_rows(weight, torch.float32)
    assert found is not None
    assert found.scale.isnan().flatten().tolist() == [False, True, False, False, True, False]
    assert found.codes[1].eq(0).all()


@native_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 100_003])
def test_half_cast_counts_what_it_loses(count: int, dtype: torch.dtype) -> None:
    value = torch.randn(count).mul_(torch.logspace(-10, 6, count) if count else 1.0)
    edges = torch.tensor([
        65504,
        65519.9,
        65520,
        -65520,
        1e9,
        2.0**-25,
        2.0**-25 * 1.01,
        1e-8,
        -1e-45,
        0.0,
        -0.0,
    ])
    value[: len(edges)] = edges[:count]
    value = value.to(dtype)
    found = cast_half(value)
    assert found is not None
    size = value.float().abs()
    assert same(found.value, value.half())
    assert found.overflowed == int((size >= 65520).sum())
    assert found.clamped == int(((size > 65504) & (size < 65520)).sum())
    assert found.flushed == int(((value.half() == 0) & (value != 0)).sum())
    assert found.nonfinite == 0


@native_only
def test_half_cast_counts_nan_and_infinity() -> None:
    found = cast_half(torch.tensor([[1.0, float("nan")], [float("inf"), float("-inf")]]))
    assert found is not None
    assert found[1:] == (0, 0, 0, 3)
    assert found.value.shape == (2, 2)


def test_conversion_leaves_other_dtypes_to_the_caller() -> None:
    assert encode_rows(torch.randn(2, 2, dtype=torch.float64), torch.float32) is None
    assert cast_half(torch.randn(2, dtype=torch.float64)) is None
    with kernels.using("reference"):
        assert encode_rows(torch.randn(2, 2), torch.float32) is None
        assert cast_half(torch.randn(2)) is None
