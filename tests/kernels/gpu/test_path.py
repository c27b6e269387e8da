"""Calls on their way to the kernels of a device, in Triton's interpreter: every layer has the bits of the reference."""

import logging
import re

import pytest
import torch
from native import same

pytest.importorskip("triton")
from models import FAMILIES
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.errors import TritonError
from triton.runtime.errors import OutOfResources

import mono_quant as mq
from mono_quant import kernels
from mono_quant.errors import FrozenWeightError, InputError, NonFiniteWeightError
from mono_quant.kernels import accelerators
from mono_quant.kernels.gpu import path as room
from mono_quant.kernels.gpu.features import INTERPRETED, of_nvidia, of_others

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here")
SCHEMES = list(kernels.SCHEMES)
CPU = torch.device("cpu")


@pytest.fixture
def answers(monkeypatch):
    """What the path answers: a list that grows."""
    seen = []

    def listening(name):
        method = getattr(room.Gpu, name)

        def run(self, *args):
            out = method(self, *args)
            seen.append((name, out is not None))
            return out

        monkeypatch.setattr(room.Gpu, name, run)

    for name in ("linear", "embedding", "conv", "experts", "encode_rows"):
        listening(name)
    return seen


def layer(outputs, depth, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (outputs, depth), generator=generator, dtype=torch.int8)
    return (
        weight,
        torch.rand(outputs, 1, generator=generator) + 0.01,
        torch.randn(outputs, generator=generator),
    )


def both(call):
    with kernels.using("reference"):
        expected = call()
    with kernels.using("triton"):
        return call(), expected


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_linear_layer_has_the_bits_of_the_reference(scheme, dtype, answers):
    for shape, outputs in (((1, 64), 7), ((2, 3, 200), 33), ((2, 1, 1, 136), 16), ((70,), 5), ((0, 48), 4)):
        weight, scale, bias = layer(outputs, shape[-1])
        x = torch.randn(shape, dtype=dtype)
        x.view(-1)[:1] = float("nan")
        offset = {1: None, 2: bias.to(dtype)}.get(len(shape), bias)
        assert same(*both(lambda: kernels.int8_linear(x, weight, scale, offset, scheme)))  # noqa: B023
    assert answers == [("linear", True)] * 5


def test_inputs_may_lie_anyhow(answers):
    weight, scale, bias = layer(9, 48)
    wide = torch.randn(5, 4, 97)
    cases = {
        "every second value": wide[..., 1:97:2],
        "misaligned": wide[..., 1:49],
        "transposed": torch.randn(48, 6).t(),
        "middle moved": torch.randn(4, 5, 48).transpose(0, 1),
        "expanded": torch.randn(48).expand(3, 2, 48),
        "negated": torch.randn(3, 48, dtype=torch.cfloat).conj().imag,
    }
    for name, x in cases.items():
        assert same(*both(lambda: kernels.int8_linear(x, weight, scale, bias, "int8"))), name  # noqa: B023
    assert answers == [("linear", True)] * len(cases)


def test_weights_may_lie_anyhow(answers):
    weight, scale, bias = layer(19, 48)
    x = torch.randn(3, 48)
    cases = {
        "transposed": (weight.t().contiguous().t(), scale, bias),
        "rows in the middle": (weight[3:], scale[3:], bias[3:]),
        "every second row": (weight[::2], scale[::2], bias[::2]),
        "no address of 16": (torch.cat([weight.view(-1)[:1], weight.view(-1)])[1:].view(19, 48), scale, bias),
        "flat scales": (weight, scale.view(-1), bias),
    }
    for name, (codes, scales, offset) in cases.items():
        assert same(*both(lambda: kernels.int8_linear(x, codes, scales, offset, "int8"))), name  # noqa: B023
    assert answers == [("linear", True)] * len(cases)


def test_what_it_does_not_take_goes_to_the_reference_or_is_the_error_of_the_other_paths(answers):
    weight, scale, bias = layer(4, 32)
    x = torch.randn(3, 32, dtype=torch.float64)
    assert same(*both(lambda: kernels.int8_linear(x, weight, scale, bias, "int8")))
    assert same(*both(lambda: kernels.int8_linear(x.float()[:, :0], weight[:, :0], scale, bias, "int8")))
    assert answers == [("linear", False)] * 2
    with kernels.using("triton"):
        with pytest.raises(InputError, match="takes inputs with 32 features, not"):
            kernels.int8_linear(torch.randn(3, 31), weight, scale, bias)
        with pytest.raises(InputError, match="takes floating-point inputs"):
            kernels.int8_linear(torch.ones(3, 32, dtype=torch.int64), weight, scale, bias)
        with pytest.raises(FrozenWeightError, match="in the place of its int8 codes"):
            kernels.int8_linear(torch.randn(3, 32), weight.float(), scale, bias)


def test_tensors_on_several_devices_are_left_to_torch():
    weight, scale, bias = layer(4, 32)
    gpu, x = room.Gpu(room.INTERPRETER, CPU), torch.randn(3, 32)
    args = [x, weight, scale, bias]
    for i in range(4):
        elsewhere = [arg.to("meta") if i == j else arg for j, arg in enumerate(args)]
        assert gpu.linear(*elsewhere, kernels.SCHEMES["int8"]) is None


def test_tables_and_convolutions_have_the_bits_of_the_reference(answers):
    weight, scale, _ = layer(11, 20)
    indices = torch.tensor([[3, 10, 0], [7, 7, 1]])
    assert same(*both(lambda: kernels.int8_embedding(indices, weight, scale, torch.float16)))
    kernel, scale, bias = layer(6, 4 * 3 * 3)
    kernel = kernel.view(6, 4, 3, 3)
    x = torch.randn(2, 8, 5, 6).contiguous(memory_format=torch.channels_last)
    how = ((1, 2), (1, 0), (1, 1), 2)
    assert same(*both(lambda: kernels.int8_conv(x, kernel, scale, bias, *how, "int12")))
    # groups of 64 lie across pixels: patches, and then products
    assert same(
        *both(
            lambda: kernels.int8_conv(
                x, kernel.repeat(1, 1, 2, 2), scale, bias, (1, 1), (3, 3), (1, 1), 2, "int8-g64"
            )
        )
    )
    assert answers == [("embedding", True), ("conv", True), ("conv", False), *[("linear", True)] * 2]


def test_weights_become_int8_with_the_bits_of_the_definition(answers):
    matrix = torch.randn(7, 40, dtype=torch.bfloat16)
    ours, expected = both(lambda: kernels.encode_rows(matrix))
    assert torch.equal(ours.codes, expected.codes) and torch.equal(ours.scale, expected.scale)
    assert answers == [("encode_rows", True)]
    matrix[3, 5] = float("inf")
    with (
        kernels.using("triton"),
        pytest.raises(NonFiniteWeightError, match="1 of 280 values are NaN or infinite"),
    ):
        kernels.encode_rows(matrix)


def test_experts_are_one_call(answers):
    experts, hidden, inner, tokens = 3, 32, 16, 5
    x, index = torch.randn(tokens, hidden), torch.rand(tokens, experts).argsort(1)[:, :2]
    gate_up, gate_up_scale, _ = layer(experts * 2 * inner, hidden)
    down, down_scale, _ = layer(experts * hidden, inner)
    weights = (gate_up.view(experts, 2 * inner, hidden), gate_up_scale.view(experts, 2 * inner, 1) / 100)
    weights += (down.view(experts, hidden, inner), down_scale.view(experts, hidden, 1) / 100)
    assert not kernels.has_experts(x, x)
    # of ReLU both have the same bits
    args = (x, index, torch.rand(tokens, 2), *weights, "relu", "int8")
    assert same(*both(lambda: kernels.int8_experts(*args)))
    assert answers == [("experts", True)]
    with kernels.using("triton"):
        assert kernels.has_experts(x, x) and not kernels.has_experts(x.clone().requires_grad_(), x)
        with pytest.raises(ValueError, match="unknown activation 'tanh'; choose from 'gelu'"):
            kernels.int8_experts(*args[:7], "tanh", "int8")


# Each scheme in each model: of four kinds of layers.
MIXED = {
    "bert": {"*query": "int8", "*key": "int8-g128", "*value": "int8-g64", "*dense": "int12"},
    "llama": {
        "*.q_proj": "int8-g64",
        "*.k_proj": "int12",
        "*.v_proj": "int8-g128",
        "*.mlp.*": "int8",
        "*.o_proj": "int12",
    },
}


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_whole_model_has_the_bits_of_the_reference(family, answers):
    model = FAMILIES[family].build()
    result = mq.quantize(model, fidelity=False, activations=MIXED[family], embeddings=True)
    inputs = FAMILIES[family].inputs()
    with torch.inference_mode():
        ours, expected = both(lambda: result.model(**inputs)[0])
    assert same(ours, expected)
    assert {name for name, _ in answers} == {"linear", "embedding"} and all(found for _, found in answers)
    schemes = {layer.activations for layer in result.model.modules() if getattr(layer, "activations", "")}
    assert schemes >= set(SCHEMES)


def test_a_compiled_model_calls_the_same_kernels(answers):
    weight, scale, bias = layer(9, 48)
    kernel = layer(6, 4 * 3 * 3)[0].view(6, 4, 3, 3)
    x, image = torch.randn(2, 5, 48), torch.randn(2, 4, 5, 6).contiguous(memory_format=torch.channels_last)

    def call(x, image):
        y = kernels.int8_linear(x, weight, scale, bias, "int8")
        return y, kernels.int8_conv(image, kernel, scale[:6], None, (1, 1), (1, 1), (1, 1), 1, "int8")

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    with kernels.using("triton"), torch.inference_mode():
        got, expected = compiled(x, image), call(x, image)
    assert all(same(*pair) for pair in zip(got, expected, strict=True))
    # what fake tensors promised
    assert got[1].is_contiguous() and not expected[1].is_contiguous()
    assert answers == [("linear", True), ("conv", True)] * 2


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_ops_have_fakes_for_a_device(layout):
    with FakeTensorMode():
        x = torch.empty(2, 3, 48, device="cuda", dtype=torch.float16)
        weight = torch.empty(9, 48, dtype=torch.int8, device="cuda")
        y = kernels.int8_linear(x, weight, torch.empty(9, 1, device="cuda"), None)
        assert (y.shape, y.dtype, y.device.type, y.is_contiguous()) == ((2, 3, 9), x.dtype, "cuda", True)
        image = torch.empty(2, 4, 5, 6, device="cuda").to(memory_format=layout)
        kernel = torch.empty(6, 4, 3, 3, dtype=torch.int8, device="cuda")
        y = kernels.int8_conv(
            image, kernel, torch.empty(6, 1, device="cuda"), None, (1, 1), (1, 1), (1, 1), 1
        )
        assert (y.shape, y.device.type, y.is_contiguous()) == ((2, 6, 5, 6), "cuda", True)


def test_auto_is_int8_for_every_shape(answers):
    weight, scale, bias = layer(9, 200)
    with kernels.using("triton"):
        for shape in ((2, 1, 200), (3, 200), (200,), (2, 4, 200)):
            x = torch.randn(shape)
            assert same(
                kernels.int8_linear(x, weight, scale, bias),
                kernels.int8_linear(x, weight, scale, bias, "int8"),
            )
        with kernels.using(activations="int12"):
            wide = kernels.int8_linear(x, weight, scale, bias)
        assert same(wide, kernels.int8_linear(x, weight, scale, bias, "int12"))
    assert len(answers) == 10


def test_the_path_says_what_it_is():
    with kernels.using("triton"):
        assert kernels.describe() == "Triton's interpreter (exact)"
        assert kernels.environment()["path"] == "triton" and kernels.environment()["cost"] is None
        with kernels.using("reference"):
            assert kernels.describe() == "reference (plain torch, exact)"
        assert kernels.describe() == "Triton's interpreter (exact)"
    assert accelerators.wanted.interpreted is None


def test_without_the_interpreter_it_is_not_to_be_had(monkeypatch):
    monkeypatch.setattr(room, "INTERPRETED", False)
    wrong = "kernel path 'triton' is not available: it runs on the CPU only where TRITON_INTERPRET=1 is set"
    with pytest.raises(ValueError, match=wrong), kernels.using("triton"):
        raise AssertionError
    assert accelerators.wanted.interpreted is None


def test_notes_say_what_was_run():
    notes = [room.Gpu(features, CPU).note for features in (
        of_nvidia((9, 0), 1, 1, True), of_nvidia((8, 0), 1, 1, True), of_others("amd", 1, 1)
    )]  # fmt: skip
    assert ["prototype" in note for note in notes] == [True, False, False]
    assert all(note.startswith("unverified: ") for note in notes)


def test_kernels_that_are_interpreted_are_for_no_device():
    kernels_, reason = room.kernels_for(torch.device("cuda", 0))
    assert kernels_ is None and "TRITON_INTERPRET=1" in reason


def test_the_trial_of_a_device_sees_a_wrong_result(monkeypatch):
    assert room.agrees(CPU, room.INTERPRETER)
    right = room.multiply
    monkeypatch.setattr(room, "multiply", lambda *args: right(*args).nextafter(torch.tensor(9e9)))
    assert not room.agrees(CPU, room.INTERPRETER)
    monkeypatch.setattr(room, "features_of", lambda device: room.INTERPRETER)
    monkeypatch.setattr(room, "INTERPRETED", False)
    assert room.kernels_for(CPU) == (None, "a product differs from the reference")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OutOfResources(300000, 101376, "shared memory"), "OutOfResources: out of resource: shared memory"),
        (RuntimeError("Failed to find C compiler."), "RuntimeError: Failed to find C compiler."),
        (
            AssertionError("libcuda.so cannot found!\nPlease run ldconfig"),
            "AssertionError: Please run ldconfig",
        ),
        (
            PermissionError(13, "Permission denied", "/cache"),
            "PermissionError: .*Permission denied: '/cache'",
        ),
    ],
    ids=str,
)
def test_a_triton_that_fails_at_the_first_compile_is_the_reason(monkeypatch, error, says):
    def fails(*args):
        raise error

    monkeypatch.setattr(room, "features_of", lambda device: of_nvidia((9, 0), 1, 1, True))
    monkeypatch.setattr(room, "INTERPRETED", False)
    monkeypatch.setattr(room, "quantize", fails)
    found, reason = room.kernels_for(CPU)
    assert found is None
    assert re.fullmatch(rf"Triton \d.* failed: {says}.*", reason)


def test_a_device_that_is_too_old_is_refused(monkeypatch):
    monkeypatch.setattr(room, "INTERPRETED", False)
    monkeypatch.setattr(room, "features_of", lambda device: of_nvidia((7, 0), 1, 1, True))
    assert room.kernels_for(CPU) == (None, "compute capability 7.0 is below 7.5")


def test_memory_that_runs_out_is_no_refusal(monkeypatch):
    def fails(*args):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(room, "INTERPRETED", False)
    monkeypatch.setattr(room, "features_of", lambda device: of_nvidia((9, 0), 1, 1, True))
    monkeypatch.setattr(room, "quantize", fails)
    with pytest.raises(torch.OutOfMemoryError):
        room.kernels_for(CPU)


def test_a_kernel_that_cannot_be_compiled_later_leaves_the_device_to_torch(monkeypatch, caplog):
    weight, scale, bias = layer(4, 32)
    gpu, x = room.Gpu(room.INTERPRETER, CPU), torch.randn(3, 32)

    def fails(*args):
        raise OutOfResources(300000, 101376, "shared memory")

    monkeypatch.setattr(room, "multiply", fails)
    with pytest.raises(TritonError):
        gpu.linear(x, weight, scale, bias, kernels.SCHEMES["int8"])
    monkeypatch.setattr(room, "INTERPRETED", False)
    with caplog.at_level(logging.WARNING):
        assert gpu.linear(x, weight, scale, bias, kernels.SCHEMES["int8"]) is None
    assert "int8 kernels are not used on this device any more: OutOfResources: out of resource" in caplog.text
    monkeypatch.undo()
    assert gpu.failure is not None
    assert gpu.linear(x, weight, scale, bias, kernels.SCHEMES["int8"]) is None
    assert gpu.embedding(torch.tensor([0]), weight, scale, torch.float32) is None
