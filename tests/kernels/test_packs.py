"""Packed weights are those of the codes as they are now, and go when the codes do."""

import copy
import gc
import io
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from native import NATIVE, native_only
from torch import nn

from mono_quant import kernels
from mono_quant.kernels import choice, fused, packs

packing = [path for path in NATIVE if not choice.cpu.Cpu(choice.loaded.library, path).is_wide(127)]
pytestmark = [native_only, pytest.mark.skipif(not packing, reason="no path here reads packed bytes")]

ROWS, DEPTH = 70, 130


class Layer(nn.Module):
    """A product with codes as our layers hold them."""

    def __init__(self, rows: int = ROWS, depth: int = DEPTH) -> None:
        super().__init__()
        codes = torch.randint(-127, 128, (rows, depth), dtype=torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight_scale = nn.Parameter(torch.rand(rows, 1) + 0.1, requires_grad=False)
        self.bias = nn.Parameter(torch.randn(rows), requires_grad=False)

    def forward(self, x):
        return fused.chain(x, ((self.weight,), (self.weight_scale,), (self.bias,), "int8-g64"))


@pytest.fixture(autouse=True)
def _fresh():
    packs.forget()
    with torch.no_grad(), kernels.using(packing[-1]):
        yield
    packs.forget()


class Eager(Layer):
    """The same as models run it without a graph."""

    def forward(self, x):
        return kernels.int8_linear(x, self.weight, self.weight_scale, self.bias, "int8-g64")


@pytest.fixture
def x():
    return torch.randn(33, DEPTH)


def expected(layer, x):
    # of a copy, which nothing is known of
    weight = layer.weight.clone()
    return kernels.int8_linear(x, weight, layer.weight_scale, layer.bias, "int8-g64")


def packed(layer, x):
    """Use a layer until its weight is packed."""
    for _ in range(3):
        assert torch.equal(layer(x), expected(layer, x))
    assert packs.bytes_held() >= layer.weight.nbytes
    return layer


def test_a_weight_is_packed_at_its_second_use(x):
    layer = Layer()
    layer(x)
    assert packs.bytes_held() == 0
    layer(x)
    # rows up to the height of a panel, columns up to 64
    assert layer.weight.nbytes <= packs.bytes_held() <= (ROWS + 47) // 48 * 48 * 192
    held = packs.bytes_held()
    layer(x)
    assert packs.bytes_held() == held


def in_place(layer):
    layer.weight.neg_()


def one_code(layer):
    layer.weight[3, 5] += 1


def copied(layer):
    layer.weight.copy_(torch.randint(-127, 128, layer.weight.shape, dtype=torch.int8))


def loaded(layer):
    layer.load_state_dict(Layer().state_dict())


def assigned(layer):
    layer.load_state_dict(Layer().state_dict(), assign=True)


def data_replaced(layer):
    layer.weight.data = layer.weight.data.neg()


def data_written(layer):
    layer.weight.data.copy_(torch.randint(-127, 128, layer.weight.shape, dtype=torch.int8))


def numpy_written(layer):
    layer.weight.numpy()[:] ^= 0x55


def parameter_replaced(layer):
    layer.weight = Layer().weight


def swapped(layer):
    other = Layer()
    layer.weight.data, other.weight.data = other.weight.data, layer.weight.data


def shared(layer):
    layer.share_memory()


def moved(layer):
    # as offloading does: the memory is gone in between, and may come back at the same address
    kept = layer.weight.data.clone().neg_()
    layer.weight.data = torch.empty(0, dtype=torch.int8)
    layer.weight.data = kept


def scale_and_bias_written(layer):
    layer.weight_scale.mul_(2.0)
    layer.bias.add_(1.0)


def scale_and_bias_written_through_data(layer):
    layer.weight_scale.data.mul_(2.0)
    layer.bias.data = torch.randn(ROWS)


def reshaped(layer):
    layer.weight.data = layer.weight.data[:40]
    layer.weight_scale.data = layer.weight_scale.data[:40]
    layer.bias.data = layer.bias.data[:40]


CHANGES = [
    in_place, one_code, copied, loaded, assigned, data_replaced, data_written, numpy_written, parameter_replaced, swapped,
    shared, moved, scale_and_bias_written, scale_and_bias_written_through_data, reshaped,
]  # fmt: skip


@pytest.mark.parametrize("kind", [Layer, Eager])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change, kind, x):
    layer = packed(kind(), x)
    change(layer)
    want = expected(layer, x)
    assert all(torch.equal(layer(x), want) for _ in range(3))


def test_one_token_reads_weights_as_they_are(x):
    layer = Eager()
    for _ in range(3):
        layer(x[:1])
    assert packs.bytes_held() == 0


def test_memory_goes_with_the_model(x):
    kept, gone = packed(Layer(), x), packed(Layer(), x)
    held = packs.bytes_held()
    output = gone(x)
    view = gone.weight[3:]
    del gone
    gc.collect()
    assert packs.bytes_held() == held
    del view
    gc.collect()
    assert packs.bytes_held() == held // 2
    assert torch.equal(kept(x), expected(kept, x))
    assert output.isfinite().all()


@pytest.mark.parametrize("change", [in_place, assigned, parameter_replaced, data_replaced, shared])
def test_what_is_not_used_any_more_is_not_kept(change, x):
    layer = packed(Layer(), x)
    held = packs.bytes_held()
    change(layer)
    gc.collect()
    packed_again = [layer(x) for _ in range(3)]
    assert packs.bytes_held() == held
    assert len(packed_again) == 3


def test_a_copy_has_its_own(x):
    layer = packed(Layer(), x)
    other = packed(copy.deepcopy(layer), x)
    other.weight.neg_()
    assert torch.equal(layer(x), expected(layer, x))
    assert not torch.equal(layer(x), packed(other, x)(x))
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    assert len(buffer.getvalue()) < 2 * layer.weight.nbytes + 8 * ROWS


def test_weights_that_share_a_storage_are_told_apart(x):
    whole = torch.randint(-127, 128, (2 * ROWS, DEPTH), dtype=torch.int8)
    first, second = Layer(), Layer()
    first.weight.data, second.weight.data = whole[:ROWS], whole[ROWS:]
    packed(first, x)
    packed(second, x)
    # another shape of the same memory
    third = Layer(2 * ROWS, DEPTH // 2)
    third.weight.data = whole[:ROWS].view(2 * ROWS, DEPTH // 2)
    packed(third, x[:, : DEPTH // 2])
    packed(first, x)
    packed(second, x)


def test_other_parameters_for_one_call(x):
    layer, other = packed(Layer(), x), Layer()
    for _ in range(3):
        found = torch.func.functional_call(layer, dict(other.named_parameters()), (x,))
        assert torch.equal(found, expected(other, x))
        assert torch.equal(layer(x), expected(layer, x))


def test_offloaded_weights(x):
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(Layer(), Layer(ROWS, ROWS))
    want = expected(model[1], expected(model[0], x))
    accelerate.cpu_offload(model, execution_device="cpu")
    for _ in range(4):
        assert torch.equal(model(x), want)
    del model
    gc.collect()
    assert packs.bytes_held() == 0


def test_codes_without_a_version_are_not_packed(x):
    with torch.inference_mode():
        layer = Layer()
        for _ in range(3):
            assert torch.equal(layer(x), expected(layer, x))
            layer.weight.neg_()
    assert packs.bytes_held() == 0


def test_eight_threads_at_once(x):
    layers = [Layer() for _ in range(6)]
    want = [expected(layer, x) for layer in layers]
    start = threading.Barrier(8)

    def work(seed):
        start.wait()
        for i in range(60):
            n = (i * 7 + seed) % len(layers)
            if not torch.equal(layers[n](x), want[n]):
                return False
            if i % 20 == seed:
                packs.forget()
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_a_weight_that_is_always_written_to_is_not_packed(x):
    layer = Layer()
    for _ in range(4):
        layer.weight.neg_()
        assert torch.equal(layer(x), expected(layer, x))
    assert packs.bytes_held() == 0


def test_they_are_bounded(x, monkeypatch):
    room = packs._Budget()
    room._bytes = Layer().weight.nbytes
    monkeypatch.setattr(packs, "_budget", room)
    layers = [Layer() for _ in range(3)]
    for _ in range(3):
        for layer in layers:
            assert torch.equal(layer(x), expected(layer, x))
    size = packs.bytes_held()
    packs.forget()
    packed(layers[0], x)
    assert size == packs.bytes_held() > 0


def test_they_can_be_switched_off(x, monkeypatch):
    monkeypatch.setenv("MONO_QUANT_PACK", "0")
    monkeypatch.setattr(packs, "_budget", packs._Budget())
    layer = Layer()
    for _ in range(3):
        assert torch.equal(layer(x), expected(layer, x))
    assert packs.bytes_held() == 0


def test_a_quarter_of_the_free_memory(monkeypatch):
    monkeypatch.delenv("MONO_QUANT_PACK", raising=False)
    budget = packs._Budget()()
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    assert 0 < budget <= free * 1024 * 0.3


@pytest.mark.parametrize("path", NATIVE)
def test_wide_codes_read_weights_as_they_are(path, x):
    layer = Layer()
    with kernels.using(path):
        for _ in range(3):
            fused.chain(x, ((layer.weight,), (layer.weight_scale,), (None,), "int12"))
    assert packs.bytes_held() == 0
