"""Convolutions with what follows them: bits on all paths, and against float64."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from native import NATIVE, native_only, same
from torch import Tensor, nn
from torch.nn import functional as F

from mono_quant import kernels
from mono_quant.kernels import fused_conv
from mono_quant.kernels.activations import SCHEMES

# Channels, outputs, kernel, stride, padding, dilation, groups of channels, height, width.
GEOMETRIES = [
    (3, 20, (7, 7), (2, 2), (3, 3), (1, 1), 1, 15, 14),
    (64, 70, (3, 3), (1, 1), (1, 1), (1, 1), 1, 9, 11),
    (64, 33, (3, 3), (2, 1), (1, 2), (2, 1), 1, 12, 9),
    (128, 50, (3, 2), (2, 2), (0, 1), (1, 1), 1, 9, 8),
    (192, 17, (1, 1), (1, 1), (0, 0), (1, 1), 1, 7, 9),
    (130, 48, (1, 1), (2, 2), (1, 1), (1, 1), 1, 13, 15),
    (5, 9, (3, 3), (1, 1), (1, 1), (1, 1), 1, 8, 9),
    (128, 8, (3, 3), (1, 1), (1, 1), (1, 1), 2, 8, 8),
    (12, 12, (5, 5), (1, 1), (2, 2), (1, 1), 12, 9, 8),
]


class Case:
    """A convolution with all that may follow it."""

    def __init__(self, geometry: tuple[Any, ...], images: int = 2) -> None:
        channels, rows, size, stride, padding, dilation, groups, height, width = geometry
        self.how = (stride, padding, dilation, groups)
        self.x = torch.randn(images, channels, height, width)
        self.weight = torch.randint(-128, 128, (rows, channels // groups, *size), dtype=torch.int8)
        self.scale, self.bias = torch.rand(rows, 1) / 100 + 1e-3, torch.randn(rows)
        self.norm = (torch.randn(rows), torch.randn(rows), torch.randn(rows), torch.rand(rows) + 0.1, 1e-5)
        self.residual = torch.randn_like(self.run())

    def run(self, **rest: Any) -> Tensor:
        x = rest.pop("x", self.x)
        return fused_conv.conv(x, self.weight, self.scale, rest.pop("bias", self.bias), *self.how, **rest)

    def whole(self, activations: str = "int8", **rest: Any) -> Tensor:
        rest = {"batch_norm": self.norm, "residual": self.residual, "relu": True} | rest
        return self.run(activations=activations, **rest)

    def exact(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The result of `whole` with float activations, in float64, and how far codes of 8 bits may take it from there."""
        stride, padding, dilation, groups = self.how
        weight = self.weight.double() * self.scale.double().view(-1, 1, 1, 1)
        y = F.conv2d(x.double(), weight, self.bias.double(), stride, padding, dilation, groups)
        gamma, beta, mean, var = (part.double() for part in self.norm[:4])
        y = F.batch_norm(y, mean, var, gamma, beta, False, 0.0, self.norm[4])
        # a value is off by half a step of at most the largest magnitude of the image
        step = x.abs().amax((1, 2, 3)).double() / 127
        slope = (weight.abs().sum((1, 2, 3)) * gamma.abs() / (var + self.norm[4]).sqrt()).view(1, -1)
        bound = (step / 2).view(-1, 1) * slope * 1.0001 + 1e-4
        return (y + self.residual.double()).relu(), bound.view(*bound.shape, 1, 1)


@pytest.fixture(params=[name for name in NATIVE if name != "portable"] or [None])
def native_path(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param is None:
        pytest.skip("the native library is not built")
    with kernels.using(request.param):
        yield request.param


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_every_path_has_the_bits_of_the_reference(geometry: tuple[Any, ...], native_path: str) -> None:
    case = Case(geometry)
    case.x[1, 0, 4, 4] = float("nan")
    case.x[0, :, 2, 3] = 0.0
    for scheme in SCHEMES:
        with kernels.using("reference"):
            want = case.whole(scheme)
            bare = case.run(activations=scheme, bias=None)
        got = case.whole(scheme)
        assert same(got, want)
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert same(case.run(activations=scheme, bias=None), bare)


@pytest.mark.parametrize("geometry", GEOMETRIES[:5], ids=str)
def test_memory_order_threads_and_batch_change_no_bit(geometry: tuple[Any, ...], two_threads: None) -> None:
    case = Case(geometry, images=3)
    for scheme in SCHEMES:
        want = case.whole(scheme)
        last = case.x.contiguous(memory_format=torch.channels_last)
        residual = case.residual.contiguous(memory_format=torch.channels_last)
        assert same(case.whole(scheme, x=last, residual=residual), want)
        assert same(case.whole(scheme, x=case.x.flip(3).flip(3)), want)
        alone = [case.whole(scheme, x=case.x[i : i + 1], residual=case.residual[i : i + 1]) for i in range(3)]
        assert same(torch.cat(alone), want)
        torch.set_num_threads(1)
        assert same(case.whole(scheme), want)
        torch.set_num_threads(2)


@native_only
def test_a_chunk_is_cut_without_a_trace() -> None:
    # codes of 256 channels of these images fill more than one chunk
    for kernel, padding in ((3, 1), (1, 0)):
        case = Case((256, 16, (kernel,) * 2, (1, 1), (padding,) * 2, (1, 1), 1, 48, 48), images=5)
        for scheme in ("int8-g128", "int8", "int12"):
            whole = case.whole(scheme)
            alone = case.whole(scheme, x=case.x[3:4], residual=case.residual[3:4])
            assert same(whole[3:4], alone)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_the_error_is_that_of_the_codes(geometry: tuple[Any, ...]) -> None:
    case = Case(geometry)
    exact, bound = case.exact(case.x)
    for scheme in SCHEMES:
        assert ((case.whole(scheme).double() - exact).abs() <= bound).all()
    fine = (case.whole("int12").double() - exact).abs()
    assert (fine <= bound / 16 + 1e-4).all()


def test_it_is_the_composition_of_torch_to_fp32_accuracy() -> None:
    case = Case(GEOMETRIES[1])
    y = kernels.int8_conv(case.x, case.weight, case.scale, case.bias, *case.how, "int8-g64")
    y = F.batch_norm(y, case.norm[2], case.norm[3], case.norm[0], case.norm[1], False, 0.0, case.norm[4])
    torch.testing.assert_close(case.whole("int8-g64"), (y + case.residual).relu(), rtol=1e-4, atol=1e-4)


def test_batch_norm_is_that_of_now() -> None:
    case = Case(GEOMETRIES[1])
    norm = nn.BatchNorm2d(70).eval()

    def run() -> Tensor:
        now = (norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)
        with torch.no_grad():
            return case.run(batch_norm=now, activations="int8")

    def expected() -> Tensor:
        plain = kernels.int8_conv(case.x, case.weight, case.scale, case.bias, *case.how, "int8")
        with torch.no_grad():
            return norm(plain)

    changes: list[Callable[[], Any]] = [
        lambda: None,
        lambda: norm.running_mean.data.fill_(3.0),  # a write that no version shows
        lambda: norm.load_state_dict({**norm.state_dict(), "running_var": torch.rand(70) + 0.5}),
        lambda: norm.train()(torch.randn(4, 70, 3, 3)),
        lambda: norm.weight.data.uniform_(-2, 2),
    ]
    for change in changes:
        change()
        norm.eval()
        torch.testing.assert_close(run(), expected(), rtol=1e-4, atol=1e-4)


def test_a_norm_without_weight_and_a_conv_without_bias() -> None:
    case = Case(GEOMETRIES[1])
    norm = (None, None, *case.norm[2:])
    with kernels.using("reference"):
        want = case.run(bias=None, batch_norm=norm, activations="int8-g64")
    ones = (torch.ones(70), torch.zeros(70), *case.norm[2:])
    assert same(case.run(bias=None, batch_norm=norm, activations="int8-g64"), want)
    assert same(case.run(bias=torch.zeros(70), batch_norm=ones, activations="int8-g64"), want)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nan_stays_in_its_receptive_fields(scheme: str) -> None:
    case = Case((128, 9, (3, 3), (1, 1), (1, 1), (1, 1), 1, 9, 9), images=2)
    clean = case.whole(scheme)
    case.x[0, 70, 4, 5] = float("inf")
    y = case.whole(scheme)
    hit = torch.zeros(2, 1, 9, 9, dtype=torch.bool)
    hit[0, :, 3:6, 4:7] = True
    assert y.isnan().equal(hit.expand_as(y))
    assert same(y[~hit.expand_as(y)], clean[~hit.expand_as(y)])


def test_gradients_and_other_dtypes_take_the_composition() -> None:
    case = Case(GEOMETRIES[1])
    x = case.x.clone().requires_grad_()
    y = case.whole("int8", x=x)
    torch.testing.assert_close(y, case.whole("int8"), rtol=1e-4, atol=1e-4)
    y.sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    narrow, residual = case.x.bfloat16(), case.residual.bfloat16()
    plain = kernels.int8_conv(narrow, case.weight, case.scale, case.bias, *case.how, "int8")
    scale, offset, mean, var, epsilon = case.norm
    normed = F.batch_norm(plain, mean, var, scale, offset, False, 0.0, epsilon)
    assert same(case.whole("int8", x=narrow, residual=residual), (normed + residual).relu())


def test_a_residual_of_another_shape_is_broadcast() -> None:
    case = Case(GEOMETRIES[1])
    bias = torch.randn(70, 1, 1)
    got = case.whole("int8", residual=bias)
    assert same(got, case.whole("int8", residual=bias.expand_as(case.residual).contiguous()))


def test_a_compiler_sees_the_ops() -> None:
    case = Case(GEOMETRIES[1])
    graphs = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append(str(graph.graph))
        return graph.forward

    run = torch.compile(lambda x: case.whole("int8", x=x), backend=backend, fullgraph=True)
    torch.testing.assert_close(run(case.x), case.whole("int8"), rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1 and "int8_conv" in graphs[0]


def test_no_images_and_no_places() -> None:
    case = Case(GEOMETRIES[1])
    assert case.run(x=case.x[:0]).shape == (0, 70, 9, 11)


def test_outputs_are_never_shared() -> None:
    # beyond the size from which on memory comes from the pool
    case = Case((64, 256, (1, 1), (1, 1), (0, 0), (1, 1), 1, 40, 40))
    first = case.whole()
    kept = first.clone()
    case.x = -case.x
    second = case.whole()
    assert same(first, kept) and not same(first, second)
