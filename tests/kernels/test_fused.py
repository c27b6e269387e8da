"""Chains against float64 and against `int8_linear`, on every path, and the same bits whatever runs beside a token."""

import itertools

import pytest
import torch
from native import NATIVE, native_only, same
from torch import Tensor
from torch.nn import functional as F

from mono_quant import kernels
from mono_quant.kernels import fused, packs
from mono_quant.kernels.activations import SCHEMES

pytestmark = native_only

HALF_ULP = 2.0**-24
ACTS = {
    None: lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


@pytest.fixture(autouse=True)
def _no_gradients():
    packs.forget()
    with torch.no_grad():
        yield


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def product(rows, depth, activations="int8", bias=True):
    """A product whose outputs are about as large as its inputs."""
    weight = torch.randint(-127, 128, (rows, depth), dtype=torch.int8)
    scale = (torch.rand(rows, 1) + 0.5) / 73 / depth**0.5
    return (weight,), (scale,), (torch.randn(rows) if bias else None,), activations


def beside(*products):
    """Several products of the same tokens as one."""
    return *(sum((p[i] for p in products), ()) for i in range(3)), products[0][3]


def layer_norm(width):
    return "layer", torch.randn(width), torch.randn(width), 1e-5


def rms_norm(width):
    return "rms", torch.randn(width), None, 1e-6


def linear(x, one):
    weights, scales, biases, activations = one
    outs = [kernels.int8_linear(x, *rest, activations) for rest in zip(weights, scales, biases, strict=True)]
    return torch.cat(outs, -1)


def norm64(x: Tensor, how) -> Tensor:
    kind, weight, bias, epsilon = how
    centred = x - x.mean(-1, keepdim=True) if kind == "layer" else x
    y = centred / (centred.pow(2).mean(-1, keepdim=True) + epsilon).sqrt()
    y = y if weight is None else y * weight.double()
    return y if bias is None else y + bias.double()


def product64(x: Tensor, slack: Tensor, one) -> tuple[Tensor, Tensor]:
    """A product of float64 [M, K] that are known up to `slack`; returns its outputs, and how far fp32 may be from them.

    A code differs where the slack reaches over a tie of rounding; everything else is float error, at most `2^-20` of the sum of
    magnitudes for the few hundred operations here.
    """
    (weight,), (scale,), (bias,), activations = one
    scheme = SCHEMES[activations]
    out, far = torch.zeros(len(x), len(weight)).double(), torch.zeros(len(x), len(weight)).double()
    for span in scheme.spans(x.shape[1]):
        qmax = scheme.widest_code(x.shape[1])
        part, loose, w = x[:, span], slack[:, span], weight[:, span].double()
        step = part.abs().amax(1, keepdim=True) / qmax
        ratio = part / step
        # the value itself, its step, and two roundings of the ratio
        reach = loose / step + ratio.abs() * (loose.amax(1, keepdim=True) / step / qmax + 4 * HALF_ULP)
        flips = ((ratio - ratio.floor() - 0.5).abs() <= reach).double()
        out += step * (ratio.round() @ w.t())
        far += step * (flips @ w.abs().t()) + (step * 2.0**-20 + loose.amax(1, keepdim=True) / qmax) * (
            ratio.abs().round() @ w.abs().t()
        )
    out, far = out * scale.double().view(-1), far * scale.double().view(-1)
    if bias is not None:
        out, far = out + bias.double(), far + bias.double().abs() * HALF_ULP
    return out, far


def test_a_product_has_the_bits_of_int8_linear(threads):
    sizes = itertools.product([1, 2, 5, 33, 130], [(65, 50), (384, 96), (200, 7), (2304, 40), (1, 1)])
    for tokens, (depth, rows) in sizes:
        x = torch.randn(tokens, depth) * 3
        x[tokens // 2, depth // 3] = float("nan")
        for scheme, path in itertools.product(SCHEMES, NATIVE):
            one = beside(product(rows, depth, scheme), product(rows + 3, depth, scheme, bias=False))
            with kernels.using(path):
                expected = linear(x, one)
                # the third time from packed weights
                for count in (1, 2, 3):
                    threads(count)
                    assert same(fused.chain(x, one), expected), (tokens, depth, scheme, path, count)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("act", ACTS)
def test_a_chain_is_as_near_to_float64_as_its_codes_allow(scheme, act):
    x = torch.randn(40, 200)
    first, second = product(300, 200, scheme), product(200, 300, scheme)
    found = fused.chain(x, first, act=act, second=second, residual=x)
    inner, slack = product64(x.double(), torch.zeros_like(x).double(), first)
    # slopes of the activations are below 1.13; their own error is below 3e-7, and 4e-7 of their value
    hidden = ACTS[act](inner)
    out, far = product64(hidden, 1.13 * slack + 3e-7 + 4e-7 * hidden.abs(), second)
    error = (found.double() - out - x.double()).abs()
    assert (error <= far + 4 * HALF_ULP * (out.abs() + x.double().abs())).all()
    # the bound says something: it is far below the outputs
    assert far.median() < 2e-2 * out.abs().median()


@pytest.mark.parametrize("scheme", ["int8", "int8-g64", "int12"])
def test_a_gated_chain_is_as_near_to_float64_as_its_codes_allow(scheme):
    x = torch.randn(40, 130)
    gate, first, second = product(150, 130, scheme), product(150, 130, scheme), product(70, 150, scheme)
    found = fused.chain(x, first, act="silu", gate=gate, second=second)
    zero = torch.zeros_like(x).double()
    (up, up_slack), (turn, turn_slack) = product64(x.double(), zero, first), product64(x.double(), zero, gate)
    turn_slack = 1.13 * turn_slack + 3e-7 + 4e-7 * turn.abs()
    turn = F.silu(turn)
    slack = up_slack * turn.abs() + turn_slack * (up.abs() + up_slack) + 2 * HALF_ULP * (up * turn).abs()
    out, far = product64(up * turn, slack, second)
    assert ((found.double() - out).abs() <= far).all()


@pytest.mark.parametrize("make", [layer_norm, rms_norm])
@pytest.mark.parametrize("path", NATIVE)
def test_norms_are_as_near_to_float64_as_their_operations_allow(make, path):
    for width in (1, 7, 16, 65, 384, 1000):
        x, how = torch.randn(9, width) + 3, make(width)
        with kernels.using(path):
            found = fused.norm(x, how)
        exact = norm64(x.double(), how)
        centred = x.double() - x.double().mean(-1, keepdim=True) if how[0] == "layer" else x.double()
        size = (centred.pow(2).mean(-1, keepdim=True) + how[3]).sqrt()
        # of the mean: as many roundings as there are additions to a lane; of the rest: a few each
        roundings = width / 64 + 8
        reach = (x.double().abs().amax(-1, keepdim=True) + centred.abs()) / size * how[1].double().abs()
        reach = reach + (0.0 if how[2] is None else how[2].double().abs())
        if how[0] == "layer" and width == 1:
            continue
        assert ((found.double() - exact).abs() <= roundings * HALF_ULP * reach).all(), width


def test_a_norm_with_a_residual_gives_the_sum_too():
    x, residual, how = torch.randn(3, 5, 70), torch.randn(3, 5, 70), layer_norm(70)
    found, total = fused.norm(x, how, residual)
    assert torch.equal(total, x + residual)
    assert torch.equal(found, fused.norm(x + residual, how))


def test_norms_around_a_chain_are_those_of_norm():
    x, first, second = torch.randn(70, 90), product(110, 90), product(90, 110)
    before, after = rms_norm(90), layer_norm(90)
    apart = fused.chain(fused.norm(x, before), first, act="silu", second=second, residual=x)
    together = fused.chain(x, first, pre=before, act="silu", second=second, residual=x, post=after)
    assert torch.equal(together, fused.norm(apart, after))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_chain_has_the_same_bits_on_every_path_for_every_thread_count_and_batch(scheme, threads):
    depth, inner = 130, 217
    first, gate = product(inner, depth, scheme), product(inner, depth, scheme)
    second, how = product(depth, inner, scheme), layer_norm(depth)
    x = torch.randn(150, depth)
    x[17, 5] = float("nan")
    calls = [
        lambda x: fused.chain(x, first, act="gelu", second=second, residual=x, post=how),
        lambda x: fused.chain(x, first, pre=rms_norm_of, act="silu", gate=gate, second=second),
        lambda x: fused.chain(x, first, pre=how, act="gelu_tanh", gate=gate),
    ]
    rms_norm_of = rms_norm(depth)
    with kernels.using("portable"):
        expected = [call(x) for call in calls]
    for want in expected:
        broken = want.isnan().any(1)
        assert broken[17] and broken.sum() == 1
    for path, count in itertools.product(NATIVE, (1, 2, 3)):
        threads(count)
        packs.forget()
        with kernels.using(path):
            for call, want in zip(calls, expected, strict=True):
                # 1 and 2 tokens share out rows of weights among threads, and the last call finds them packed
                for parts in ([1, 2, 147], [150], [40, 110]):
                    assert same(torch.cat([call(part) for part in x.split(parts)]), want), (
                        path,
                        count,
                        parts,
                    )


def test_parts_are_the_outputs_of_each_weight():
    x = torch.randn(3, 4, 48)
    one, two, three = product(16, 48), product(5, 48, bias=False), product(70, 48)
    q, k, v = fused.chain_parts(x, beside(one, two, three), pre=layer_norm(48)[:1] + (None, None, 1e-5))
    normed = fused.norm(x, ("layer", None, None, 1e-5))
    assert torch.equal(q, linear(normed, one))
    assert torch.equal(k, linear(normed, two))
    assert torch.equal(v, linear(normed, three))


@pytest.mark.parametrize("shape", [(0, 48), (2, 0, 48), (48,), (1, 1, 1, 48)])
def test_shapes_are_those_of_a_linear_layer(shape):
    x, first, second = torch.randn(shape), product(20, 48), product(48, 20)
    out = fused.chain(x, first, act="relu", second=second, residual=x, post=layer_norm(48))
    assert out.shape == x.shape
    assert fused.norm(x, rms_norm(48)).shape == x.shape
    with kernels.using("reference"):
        assert fused.chain(x, first, act="relu", second=second).shape == x.shape


def test_views_are_read_where_they_lie():
    base = torch.randn(96, 2, 30)
    x, first, second = base.transpose(0, 2)[::3], product(40, 96), product(96, 40)
    residual = base.permute(2, 1, 0)[::3]
    assert not x.is_contiguous()
    assert torch.equal(
        fused.chain(x, first, act="gelu", second=second, residual=residual),
        fused.chain(x.contiguous(), first, act="gelu", second=second, residual=residual.contiguous()),
    )


def test_nothing_in_or_out_is_nothing():
    empty = product(0, 48)
    assert fused.chain(torch.randn(3, 48), empty).shape == (3, 0)
    none = ((torch.zeros(7, 0, dtype=torch.int8),), (torch.ones(7, 1),), (torch.ones(7),), "int8")
    assert torch.equal(fused.chain(torch.randn(3, 0), none), torch.ones(3, 7))


@pytest.mark.parametrize("shape", [(2, 3, 5, 64), (1, 4, 1, 34), (3, 1, 7, 2), (0, 2, 3, 8)])
@pytest.mark.parametrize("path", NATIVE)
def test_rotary_is_as_near_to_float64_as_its_operations_allow(shape, path):
    batch, heads, tokens, width = shape
    x = torch.randn(batch, tokens, heads, width).transpose(1, 2)
    for angles in {1, batch}:
        angle = torch.randn(angles, tokens, width // 2).repeat(1, 1, 2)
        cos, sin = angle.cos(), angle.sin()
        with kernels.using(path):
            found = fused.rotary(x, cos, sin)
        low, high = x.double().chunk(2, -1)
        turned = torch.cat((-high, low), -1)
        straight, across = x.double() * cos.double().unsqueeze(1), turned * sin.double().unsqueeze(1)
        assert found.shape == x.shape
        assert found.transpose(1, 2).is_contiguous()
        error = (found.double() - straight - across).abs()
        assert (error <= 2 * HALF_ULP * (straight.abs() + across.abs())).all()
        # as the composition has it, to the bit
        assert torch.equal(found, x * cos.unsqueeze(1) + turned.float() * sin.unsqueeze(1))


def composed(x, first, second, how):
    return F.layer_norm(linear(F.gelu(linear(x, first)), second) + x, x.shape[-1:], *how[1:])


def test_gradients_are_those_of_the_composition():
    first, second, how = product(40, 24), product(24, 40), layer_norm(24)
    x = torch.randn(5, 24)
    with torch.enable_grad():
        grads = []
        for call in (
            lambda x: fused.chain(x, first, act="gelu", second=second, residual=x, post=how),
            lambda x: composed(x, first, second, how),
        ):
            leaf = x.clone().requires_grad_()
            call(leaf).pow(2).sum().backward()
            grads.append(leaf.grad)
        assert torch.equal(*grads)
        # a bias that is trained, and an input that is not
        first[2][0].requires_grad_()
        fused.chain(x, first, act="gelu", second=second).sum().backward()
        assert first[2][0].grad.abs().sum() > 0
        assert fused.norm(x, ("layer", torch.ones(24, requires_grad=True), None, 1e-5)).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes_are_the_composition(dtype):
    first, second = product(40, 24), product(24, 40)
    x = torch.randn(5, 24, dtype=dtype)
    how = ("layer", torch.randn(24, dtype=dtype), torch.randn(24, dtype=dtype), 1e-5)
    found = fused.chain(x, first, act="gelu", second=second, residual=x, post=how)
    assert found.dtype == dtype
    assert torch.equal(found, composed(x, first, second, how))


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch imports its own old code
def test_transforms_and_fakes_see_the_composition():
    first, second, how = product(40, 24), product(24, 40), layer_norm(24)
    x = torch.randn(5, 3, 24)

    def call(x):
        return fused.chain(x, first, act="gelu", second=second, residual=x, post=how)

    assert torch.allclose(torch.vmap(call)(x), composed(x, first, second, how), atol=1e-5)
    primal, tangent = torch.func.jvp(call, (x,), (torch.ones_like(x),))
    assert primal.shape == tangent.shape == x.shape
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert call(mode.from_tensor(x)).shape == x.shape


def test_without_a_library_it_is_the_composition():
    first, second, how = product(40, 24), product(24, 40), layer_norm(24)
    x = torch.randn(5, 24)
    with kernels.using("reference"):
        found = fused.chain(x, first, act="gelu", second=second, residual=x, post=how)
        assert torch.equal(found, composed(x, first, second, how))
        assert torch.equal(fused.norm(x, how), F.layer_norm(x, (24,), *how[1:]))


def test_residuals_that_have_to_be_broadcast_are():
    x, first, place = torch.randn(4, 6, 24), product(30, 24), torch.randn(6, 30)
    assert torch.equal(fused.chain(x, first, residual=place), linear(x, first) + place)


def test_what_there_is_not_is_named():
    x, first = torch.randn(2, 24), product(30, 24)
    with pytest.raises(ValueError, match="unknown activation 'swish'; choose from None, 'gelu'"):
        fused.chain(x, first, act="swish")
    with pytest.raises(ValueError, match="unknown norm 'batch'; choose 'layer' or 'rms'"):
        fused.norm(x, ("batch", None, None, 1e-5))
    with pytest.raises(ValueError, match="unknown activation scheme 'int4'"):
        fused.chain(x, (*first[:3], "int4"))
