"""Every op as compilers see it: its schema, what its fake gives, and in each dtype with each layout of its input."""

from itertools import islice

import pytest
import torch
from torch.library import opcheck

from mono_quant import kernels

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# The rest of `opcheck` runs the compiler, which looks at dtypes and layouts through the fake alone.
QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")


def codes(*shape):
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def scale(rows):
    return (torch.rand(rows, 1) + 0.5) / 73 / 8


def layouts(dtype, *shape):
    """The same shape next to each other, turned over, and with gaps."""
    turned = torch.randn(*shape[:-2], shape[-1], shape[-2]).to(dtype).transpose(-1, -2)
    gaps = torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., ::2]
    return [torch.randn(shape).to(dtype), turned, gaps]


def linears(dtype):
    for x in (*layouts(dtype, 2, 3, 32), torch.randn(32).to(dtype), torch.randn(0, 32).to(dtype)):
        yield x, codes(24, 32), scale(24), torch.randn(24).to(dtype)
    yield torch.randn(3, 32).to(dtype), codes(24, 32), scale(24), None, "int12"


def halves(dtype):
    for x in layouts(dtype, 2, 3, 32):
        yield x, torch.randn(24, 32).half(), torch.randn(24).to(dtype)


def convolutions(dtype):
    how = ([1, 1], [1, 1], [1, 1], 1)
    for x in layouts(dtype, 2, 4, 7, 6):
        yield x, codes(8, 4, 3, 3), scale(8), None, *how
    channels_last = torch.randn(2, 4, 7, 6).to(dtype, memory_format=torch.channels_last)
    yield channels_last, codes(8, 4, 3, 3), scale(8), torch.randn(8).to(dtype), *how, "int8-g64"


def attentions(dtype):
    for q in layouts(dtype, 2, 4, 5, 16):
        k, v = torch.randn(2, 2, 2, 7, 16).to(dtype)
        yield q, k, v, None, False, None, None


def experts(dtype):
    weights = (codes(3, 48, 32), scale(3 * 48).view(3, 48, 1), codes(3, 32, 24), scale(3 * 32).view(3, 32, 1))
    for x in layouts(dtype, 5, 32):
        yield x, torch.randint(0, 3, (5, 2)), torch.rand(5, 2).to(dtype), *weights, "silu"


def chains(dtype):
    def call(x, added, norm, keep, act, *, gate=False, second=False):
        depth = x.shape[-1]
        term = torch.randn(depth).to(dtype)
        norms = (norm, term if norm else None, term if norm == "layer" else None, 1e-6)
        counts = [2, 2 if gate else 0, 1 if second else 0]
        shapes = [(24, depth), (8, depth)] * (2 if gate else 1) + ([(20, 32)] if second else [])
        layers = [(codes(*shape), scale(shape[0]), torch.randn(shape[0]).to(dtype)) for shape in shapes]
        return (
            x,
            added,
            *norms,
            *keep,
            act,
            *map(list, zip(*layers, strict=True)),
            counts,
            "int8",
            "int8",
            "int12",
        )

    for x in layouts(dtype, 2, 3, 32):
        yield call(x, torch.randn(2, 3, 32).to(dtype), "rms", (True, True), "silu", gate=True, second=True)
    yield call(torch.randn(3, 32).to(dtype), None, "layer", (False, True), "gelu", second=True)
    yield call(torch.randn(32).to(dtype), None, None, (False, False), None)
    yield call(torch.randn(0, 32).to(dtype), None, "rms", (False, True), None)


OPS = {
    "int8_linear": linears,
    "half_linear": halves,
    "int8_conv": convolutions,
    "attention": attentions,
    "chain": chains,
    "int8_experts": experts,
}


@pytest.fixture(params=[None, "triton"])
def path(request):
    """What is there by itself, and the kernels of GPUs in Triton's interpreter."""
    if request.param is not None:
        pytest.importorskip("triton")
    with kernels.using(path=request.param):
        yield request.param


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", OPS)
def test_fakes_say_what_ops_give(name, dtype, path):
    torch.manual_seed(0)
    # interpreting takes its time, and what is given depends on few layouts
    for args in islice(OPS[name](dtype), 2 if path == "triton" else None):
        opcheck(getattr(torch.ops.mono_quant, name).default, args, test_utils=QUICK)


def test_a_compiler_takes_a_chain():
    torch.manual_seed(0)
    opcheck(torch.ops.mono_quant.chain.default, next(chains(torch.bfloat16)))


def test_no_op_is_left_out():
    names = {
        name.removeprefix("mono_quant::")
        for name in torch._C._dispatch_get_all_op_names()
        if "mono_quant" in name
    }
    assert names == OPS.keys()
