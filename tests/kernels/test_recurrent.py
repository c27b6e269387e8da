"""Recurrent layers in one native call: gates against float64, bits on all paths, packed steps in both directions."""

from typing import Any

import pytest
import torch
from native import NATIVE, native_only, same
from torch import Tensor

from mono_quant import kernels

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
# Sequences at each step: one, a few, and enough for tiles, ending one after another.
SIZES = {"one": [1] * 4, "few": [2, 2, 1], "many": [19, 19, 8, 5, 2, 1]}
pytestmark = native_only


class Layer:
    def __init__(self, mode: str, size: int, sizes: list[int]) -> None:
        rows = GATES[mode] * size
        self.mode, self.sizes, self.size = mode, sizes, size
        self.given = torch.randn(sum(sizes), rows)
        self.weight = torch.randint(-127, 128, (rows, size), dtype=torch.int8)
        self.scale, self.bias = torch.rand(rows, 1) / 500, torch.randn(rows)
        self.state = tuple(torch.randn(sizes[0], size) for _ in range(1 + (mode == "LSTM")))

    def run(self, activations: str = "int8", **changes: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        given, state = changes.pop("given", self.given), changes.pop("state", self.state)
        sizes = changes.pop("sizes", self.sizes)
        done = kernels.run_recurrent(
            self.mode, given, sizes, state, self.weight, self.scale, self.bias, activations, **changes
        )
        assert done is not None
        return done

    def step(self, given: Tensor, state: tuple[Tensor, ...], activations: str) -> tuple[Tensor, ...]:
        """One step with the gates in float64."""
        product = kernels.int8_linear(state[0], self.weight, self.scale, self.bias, activations).double()
        if self.mode == "RNN_RELU":
            return ((given.double() + product).relu(),)
        if self.mode == "RNN_TANH":
            return ((given.double() + product).tanh(),)
        x, h = (part.double().chunk(GATES[self.mode], 1) for part in (given, product))
        if self.mode == "GRU":
            reset, update = (x[0] + h[0]).sigmoid(), (x[1] + h[1]).sigmoid()
            new = (x[2] + reset * h[2]).tanh()
            return (new + update * (state[0].double() - new),)
        entry, forget, out = ((x[i] + h[i]).sigmoid() for i in (0, 1, 3))
        cells = forget * state[1].double() + entry * (x[2] + h[2]).tanh()
        return out * cells.tanh(), cells


@pytest.mark.parametrize("mode", GATES)
@pytest.mark.parametrize("size", [24, 130])
def test_each_step_is_that_of_float64(mode: str, size: int) -> None:
    layer = Layer(mode, size, SIZES["many"])
    for scheme in ("int8", "int8-g64", "int12"):
        state, start = layer.state, 0
        out, last = layer.run(scheme)
        for count in layer.sizes:
            now = tuple(part[:count] for part in state)
            given = layer.given[start : start + count]
            exact = layer.step(given, now, scheme)
            alone, new = layer.run(scheme, given=given, sizes=[count], state=now)
            # sums of two products are rounded to fp32 before the gates
            rounding = 2e-6 * (given.abs().amax() + 20)
            for got, want in zip(new, exact, strict=True):
                assert ((got.double() - want).abs() <= rounding).all()
            assert same(alone, new[0]) and same(out[start : start + count], alone)
            state, start = new, start + count
        for part, final in zip(last, state, strict=True):
            assert same(part[: layer.sizes[-1]], final)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("mode", GATES)
def test_every_path_has_the_same_bits(mode: str, sizes: list[int]) -> None:
    layer = Layer(mode, 67, sizes)
    for scheme in ("int8", "int8-g64", "int12"):
        for backward in (False, True):
            found = []
            for path in NATIVE:
                with kernels.using(path):
                    found.append(layer.run(scheme, backward=backward))
            for out, state in found[1:]:
                assert same(out, found[0][0])
                assert all(same(a, b) for a, b in zip(state, found[0][1], strict=True))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
def test_a_sequence_is_what_it_is_alone(mode: str, backward: bool) -> None:
    layer = Layer(mode, 40, SIZES["many"])
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        out, last = layer.run(backward=backward)
        torch.set_num_threads(before)
        starts = torch.tensor([0, *layer.sizes]).cumsum(0)
        for n in (0, 4, 18):
            places = [int(starts[t]) + n for t, count in enumerate(layer.sizes) if n < count]
            alone, state = layer.run(
                given=layer.given[places],
                sizes=[1] * len(places),
                state=tuple(part[n : n + 1] for part in layer.state),
                backward=backward,
            )
            assert same(alone, out[places])
            assert all(same(a, b[n : n + 1]) for a, b in zip(state, last, strict=True))


def test_the_functions_keep_their_relative_error() -> None:
    x = torch.cat([
        torch.linspace(-95, 95, 4001),
        torch.logspace(-30, 1.5, 500),
        -torch.logspace(-30, 1.5, 500),
    ])
    x = x.view(1, -1)
    layer = Layer("RNN_TANH", x.shape[1], [1])
    layer.weight.zero_()
    layer.bias.zero_()
    tanh = layer.run(given=x)[0].double()
    exact = x.double().tanh()
    assert ((tanh - exact).abs() <= 2e-7 * exact.abs()).all()
    layer = Layer("LSTM", x.shape[1], [1])
    layer.weight.zero_()
    layer.bias.zero_()
    # cells = sigmoid(x) * tanh(large)
    given = torch.cat([x, x, torch.full_like(x, 50.0), x], 1)
    sigmoid = layer.run(given=given, state=tuple(torch.zeros(1, x.shape[1]) for _ in range(2)))[1][1].double()
    exact = x.double().sigmoid()
    assert ((sigmoid - exact).abs() <= 2e-7 * exact + 1e-38).all()


def test_nan_stays_with_its_sequence() -> None:
    layer = Layer("LSTM", 40, [5, 5, 5])
    clean, _ = layer.run()
    layer.given[7, 3] = float("nan")
    out, _ = layer.run()
    assert out[[7, 12]].isnan().any(1).all() and not out[[5, 6, 8, 9, 10, 11, 13, 14]].isnan().any()
    keep = [i for i in range(15) if i not in (7, 12)]
    assert same(out[keep], clean[keep])


def test_initial_states_are_not_written_and_onlookers_get_nothing() -> None:
    layer = Layer("LSTM", 40, SIZES["few"])
    kept = [part.clone() for part in layer.state]
    layer.run()
    assert all(same(a, b) for a, b in zip(layer.state, kept, strict=True))
    args = (layer.weight, layer.scale, layer.bias)
    grad = layer.given.clone().requires_grad_()
    assert kernels.run_recurrent("LSTM", grad, layer.sizes, layer.state, *args) is None
    assert kernels.run_recurrent("LSTM", layer.given.double(), layer.sizes, layer.state, *args) is None
    with kernels.using("reference"):
        assert kernels.run_recurrent("LSTM", layer.given, layer.sizes, layer.state, *args) is None
