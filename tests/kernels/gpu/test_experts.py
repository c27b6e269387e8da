"""Experts on a GPU against experts one by one on the CPU: bit for bit, but for activations."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from coded import DEVICE
from offline_triton import Job, compile_all

from mono_quant.kernels import SCHEMES, mix_experts, reference
from mono_quant.kernels.gpu import experts as experts_room
from mono_quant.kernels.gpu.experts import (
    FEW_TOKENS,
    Routing,
    config_for,
    experts,
    mix,
    multiply_pairs,
    sort_pairs,
    tiles_at_most,
)
from mono_quant.kernels.gpu.features import INTERPRETER
from mono_quant.kernels.gpu.quantize import quantize
from mono_quant.kernels.gpu.routed import add_routed, multiply_routed_tiles, multiply_routed_vectors
from mono_quant.kernels.gpu.tables import fitted

ACTS = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


@pytest.fixture(autouse=True)
def _on_device():
    with DEVICE:
        yield


def weights_of(count, hidden, inner):
    return (
        torch.randint(-128, 128, (count, 2 * inner, hidden), dtype=torch.int8),
        torch.rand(count, 2 * inner, 1) * 0.02,
        torch.randint(-128, 128, (count, hidden, inner), dtype=torch.int8),
        torch.rand(count, hidden, 1) * 0.02,
    )


def routed(tokens, k, count):
    return torch.rand(tokens, count).argsort(1)[:, :k].contiguous(), torch.rand(tokens, k)


def one_by_one(x, index, share, *more):
    """What the CPU gives."""
    *parts, act, scheme = more
    x, index, share, gate_up, gate_up_scale, down, down_scale = (t.cpu() for t in (x, index, share, *parts))

    def expert(tokens, number):
        both = reference.linear(tokens, gate_up[number], gate_up_scale[number], None, scheme)
        gate, up = both.chunk(2, dim=1)
        return reference.linear(ACTS[act](gate) * up, down[number], down_scale[number], None, scheme)

    with torch.device("cpu"):
        return mix_experts(x, index, share, len(down), expert)


def both_roads(x, index, share, parts, act, scheme):
    """Yield what the kernels give for sorted pairs, and for few tokens whose weights can be read in words, pair by pair."""
    yield experts(x, index, share, *parts, act, scheme)
    if len(x) <= FEW_TOKENS and x.shape[1] % 4 == parts[2].shape[2] % 4 == 0:
        yield mix(x, Routing(index.contiguous(), share.contiguous(), len(parts[0])), *parts, act, scheme)


def same_bits(a, b):
    a = a.cpu()
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(12345.0), b.nan_to_num(12345.0))


# tokens, k, experts, H, I
SHAPES = {
    "one token": (1, 3, 4, 32, 24),
    "two tokens": (2, 2, 4, 16, 20),
    "odd": (7, 3, 9, 19, 21),
    "several steps": (1, 2, 4, 144, 72),
    "one expert": (3, 1, 1, 16, 16),
    "more tokens than a tile": (18, 1, 2, 24, 20),
}
CASES = [(shape, "int8") for shape in SHAPES]
CASES += [("one token", "int12"), *(("several steps", scheme) for scheme in SCHEMES if scheme != "int8")]


@pytest.mark.parametrize(("shape", "scheme"), CASES)
def test_fp32_results_have_the_bits_of_the_cpu(shape, scheme):
    tokens, k, count, hidden, inner = SHAPES[shape]
    parts, (index, share) = weights_of(count, hidden, inner), routed(tokens, k, count)
    if shape == "more tokens than a tile":
        # of 16, as an expert has 9 in the mean
        index[:] = (torch.arange(tokens) != 3).unsqueeze(1)
    x = torch.randn(tokens, hidden) * torch.logspace(-3, 3, tokens).unsqueeze(1)
    expected = one_by_one(x, index, share, *parts, "relu", SCHEMES[scheme])
    for found in both_roads(x, index, share, parts, "relu", SCHEMES[scheme]):
        assert same_bits(found, expected)


def hostile_routings():
    count = 6
    index, share = routed(3, 3, count)
    crowd, marked, twice = index.clone(), index.clone(), index.clone()
    crowd[:] = torch.tensor([5, 2, 4])
    # one token without any expert
    marked[0, 1], marked[2], marked[1, 0] = count, count, -1
    twice[:, 1] = twice[:, 0]
    return {
        "crowd": (crowd, share),
        "empty slots": (marked, share),
        "no slot": (torch.full_like(index, count), share),
        "twice": (twice, share),
        "int32": (index.int(), share.half()),
        "views": (index.t().contiguous().t(), share.t().contiguous().t()),
    }


@pytest.mark.parametrize("case", hostile_routings())
def test_routings(case):
    index, share = hostile_routings()[case]
    parts, x = weights_of(6, 16, 12), torch.randn(3, 16)
    x[1], x[2, 3], x[0] = 0.0, float("nan"), x[0] * 1e-38
    expected = one_by_one(x, index, share, *parts, "relu", SCHEMES["int8"])
    for found in both_roads(x, index, share, parts, "relu", SCHEMES["int8"]):
        assert same_bits(found, expected)


@pytest.mark.parametrize(("dtype", "narrow"), [(torch.float16, False), (torch.bfloat16, True)])
def test_half_precision_is_rounded_where_the_cpu_rounds(dtype, narrow):
    parts, (index, share) = weights_of(5, 16, 12), routed(2, 3, 5)
    x, share = torch.randn(2, 16, dtype=dtype), share.to(dtype) if narrow else share
    expected = one_by_one(x, index, share, *parts, "relu", SCHEMES["int12"])
    for found in both_roads(x, index, share, parts, "relu", SCHEMES["int12"]):
        assert same_bits(found, expected)


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh"])
def test_other_activations_are_those_of_torch_but_for_their_last_bits(act):
    parts, (index, share) = weights_of(4, 24, 16), routed(2, 2, 4)
    x = torch.randn(2, 24)
    expected = one_by_one(x, index, share, *parts, act, SCHEMES["int12"])
    # a value near a tie may get the next code: one in a row, times the largest weight of an output
    largest = (parts[2].abs().float() * parts[3]).amax((0, 2))
    step = torch.zeros(2, 1)
    for number in range(4):
        gate, up = reference.linear(x, parts[0][number], parts[1][number], None, SCHEMES["int12"]).chunk(2, 1)
        values = (ACTS[act](gate) * up).abs().amax(1, keepdim=True) / 2047
        step = torch.maximum(step, values)
    step, largest = step.cpu(), largest.cpu()
    for found in both_roads(x, index, share, parts, act, SCHEMES["int12"]):
        assert ((found.cpu() - expected).abs() <= 2 * step * largest + 1e-5 * expected.abs()).all()


def test_a_row_of_tokens_may_be_a_view():
    parts, (index, share) = weights_of(4, 32, 16), routed(2, 2, 4)
    x = torch.randn(2, 48)[:, 8:40]
    expected = one_by_one(x, index, share, *parts, "relu", SCHEMES["int8"])
    assert same_bits(experts(x, index, share, *parts, "relu", SCHEMES["int8"]), expected)


@pytest.mark.parametrize("shape", [(0, 2), (3, 0)])
def test_no_pairs_give_zeros(shape):
    x, index = torch.randn(shape[0], 16), torch.zeros(shape, dtype=torch.long)
    out = experts(x, index, torch.rand(shape), *weights_of(4, 16, 16), "silu", SCHEMES["int8"])
    assert torch.equal(out, torch.zeros(shape[0], 16))


def test_what_the_kernels_do_not_have_is_left_to_others():
    parts, (index, share), x = weights_of(4, 16, 16), routed(3, 2, 4), torch.randn(3, 16)
    scheme = SCHEMES["int8"]
    assert experts(x, index, share, *parts, "mish", scheme) is None
    assert experts(x.double(), index, share, *parts, "silu", scheme) is None
    assert experts(x, index, share.double(), *parts, "silu", scheme) is None
    crossed = parts[0].transpose(1, 2).contiguous().transpose(1, 2)
    assert experts(x, index, share, crossed, *parts[1:], "silu", scheme) is None


@pytest.mark.parametrize("count", [1, 7, 64, 65, 256])
@pytest.mark.parametrize("pairs", [1, 40, 300])
def test_every_pair_has_a_tile_and_none_is_beyond_the_grid(pairs, count):
    numbers = torch.randint(0, count, (pairs,)).bincount(minlength=count)
    for tokens in (16, 128):
        needed = int(((numbers + tokens - 1) // tokens).sum())
        assert needed <= tiles_at_most(pairs, count, tokens)
    # reached where every expert has one token too many
    full = torch.full((min(pairs, count),), 1)
    full[0] += pairs - len(full)
    assert int(((full + 15) // 16).sum()) >= tiles_at_most(pairs, count, 16) - count


def test_many_experts_in_one_product():
    index, share = routed(11, 3, 200)
    routing = sort_pairs(Routing(index, share, 200))
    weight, scale = torch.randint(-128, 128, (200, 16, 16), dtype=torch.int8), torch.rand(200, 16, 1)
    x = torch.randn(11, 16)
    found = multiply_pairs(quantize(x, SCHEMES["int8"]), routing, weight, scale, x.dtype, tokens=True)
    for row, pair in enumerate(routing.order.tolist()):
        token, number = pair // 3, index.view(-1)[pair]
        expected = reference.linear(
            x[token : token + 1], weight[number], scale[number], None, SCHEMES["int8"]
        )
        assert torch.equal(found[row : row + 1], expected)


def test_tiles_follow_the_tokens_of_an_expert():
    codes = quantize(torch.randn(2, 256), SCHEMES["int8"])
    assert [config_for(pairs, 8, codes, INTERPRETER).tokens for pairs in (8, 200, 400, 2048, 9000)] == [
        16, 32, 64, 128, 128
    ]  # fmt: skip
    grouped = quantize(torch.randn(2, 256), SCHEMES["int8-g64"])
    assert config_for(9000, 8, grouped, INTERPRETER).depth == 64


class _Asked(TorchDispatchMode):
    """Notes the operations of torch."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_values_or_has_a_shape_that_follows_them():
    parts, (index, share), x = weights_of(4, 16, 12), routed(5, 2, 4), torch.randn(5, 16)
    with _Asked() as asked:
        experts(x, index, share, *parts, "silu", SCHEMES["int8"])
    assert "sort" in asked.names
    waiting = {"_local_scalar_dense", "nonzero", "where", "unique", "_unique2", "bincount", "masked_select"}
    assert asked.names.isdisjoint(waiting), asked.names & waiting


def tiles_job(capability, config, codes, out, **changes):
    """A product of sorted pairs, of sizes that 16 divides."""
    planes, group = codes
    config = fitted(dataclasses.replace(config, depth=group or config.depth), planes, SHARED[capability])
    pointers = {
        "codes_ptr": "*i8", "scale_ptr": "*fp32", "order_ptr": "*i64", "start_ptr": "*i64", "weight_ptr": "*i8",
        "weight_scale_ptr": "*fp32", "out_ptr": out,
    }  # fmt: skip
    constants = {
        "SLOTS": 8, "PLANES": planes, "GROUPED": group > 0, "EXPERTS": 128, "TOKENS": config.tokens,
        "OUTPUTS": config.outputs, "DEPTH": config.depth, "WHOLE": True, **changes,
    }  # fmt: skip
    options = {"num_warps": config.warps, "num_stages": config.stages, "aligned": (*pointers, "N", "K")}
    sizes = dict.fromkeys(("M", "N", "K", "E"), "i32")
    return Job(multiply_routed_tiles, pointers | sizes, constants, capability, options)


def vectors_job(capability, planes, group):
    config = experts_room._GROUPED_VECTORS if group else experts_room._VECTORS
    signature = {
        "codes_ptr": "*i32", "scale_ptr": "*fp32", "index_ptr": "*i64", "weight_ptr": "*i32", "weight_scale_ptr": "*fp32",
        "out_ptr": "*fp16", "M": "i32", "N": "i32", "words": "i32", "E": "i32",
    }  # fmt: skip
    constants = {
        "SLOTS": 8, "PLANES": planes, "GROUPED": group > 0, "OUTPUTS": config.outputs, "WORDS": (group or config.depth) // 4,
        "STAGES": config.stages,
    }  # fmt: skip
    options = {"num_warps": config.warps, "num_stages": config.stages}
    options["aligned"] = ("codes_ptr", "weight_ptr", "words")
    return Job(multiply_routed_vectors, signature, constants, capability, options)


def sum_job(capability, dtype):
    signature = {
        "y_ptr": dtype,
        "index_ptr": "*i64",
        "share_ptr": "*fp32",
        "out_ptr": dtype,
        "N": "i32",
        "E": "i32",
    }
    return Job(add_routed, signature, {"SLOTS": 8, "PLACES": 16, "WIDE": 1024}, capability, {"num_warps": 4})


# Bytes that a program may have.
SHARED = {80: 166912, 90: 232448, 100: 232448, 120: 101376}


def test_the_kernels_compile_for_devices_that_are_not_here():
    large, double, small = experts_room._LARGE, experts_room._LARGE_DOUBLE, experts_room._TILES[0][1]
    tiles = [
        tiles_job(80, double, (2, 0), "*fp16", SLOTS=0),
        tiles_job(90, large, (1, 0), "*bf16"),
        tiles_job(100, small, (1, 128), "*fp32", WHOLE=False, EXPERTS=256),
        tiles_job(120, large, (1, 0), "*bf16", SLOTS=0),
    ]
    vectors = [vectors_job(75, 1, 0), vectors_job(90, 2, 0), vectors_job(80, 1, 128)]
    sums = [sum_job(75, "*fp16"), sum_job(90, "*bf16")]
    made = compile_all(tiles + vectors + sums)
    for job, compiled in zip(tiles, made[:4], strict=True):
        assert "s8" in "".join(line for line in compiled.ptx.splitlines() if "mma" in line)
        assert compiled.shared <= SHARED[job.capability]
    assert all("dp4a" in compiled.ptx for compiled in made[4:7])
    # each operation is rounded: no multiplication runs into an addition
    assert not any("fma." in compiled.ptx for compiled in made)
