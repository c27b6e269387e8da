"""A float16 model: its matrices are float16 in memory and in the file, its arithmetic on CPU is float32."""

import copy
import pickle

import pytest
import torch
from models import FAMILIES, Cnn, is_plain, relative_error, run, seeded, tiny_llama
from torch import nn
from torch.nn import functional as F

import mono_quant as mq
from mono_quant.convert.half_layers import (
    HALF_LAYERS,
    HalfEmbedding,
    HalfExperts,
    HalfLinear,
    HalfModule,
    HalfMultiheadAttention,
    HalfTransposedLinear,
)
from mono_quant.errors import AlreadyQuantizedError

QUIET = {"fidelity": False}


def convert(model, **options):
    return mq.dynamic_quantize(model.eval(), "fp16", **options)[0]


def halved(model):
    """The float model with every parameter and saved buffer rounded to float16, computing in float32."""
    twin = copy.deepcopy(model).float()
    for tensor in [
        *twin.parameters(),
        *(twin.get_buffer(n) for n in twin.state_dict() if n in dict(twin.named_buffers())),
    ]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.half().float()
    return twin


@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "llama_bf16"])
def test_the_output_is_that_of_the_rounded_weights_in_float32(name):
    model, inputs = FAMILIES[name].build(), FAMILIES[name].inputs()
    expected, output = run(halved(model), inputs), run(convert(model), inputs)
    assert output.dtype == torch.float32
    # t5 keeps some modules in float32, whose weights are not rounded
    rounding = 2.0**-11 if name == "t5" else 64 * 2.0**-24 * len(list(model.parameters()))
    assert relative_error(expected, output) <= rounding


def test_every_kind_of_layer_is_held_in_float16():
    kinds = {
        "llama": {HalfEmbedding, HalfLinear},
        "gpt2": {HalfEmbedding, HalfTransposedLinear, HalfLinear},
        "mixtral": {HalfEmbedding, HalfExperts, HalfLinear},
        "attention": {HalfMultiheadAttention, HalfLinear},
    }
    assert set().union(*kinds.values()) == set(HALF_LAYERS.values())
    for name, expected in kinds.items():
        model = convert(FAMILIES[name].build())
        found = {type(m) for m in model.modules() if isinstance(m, HalfModule)}
        assert found == expected, name
        large = {
            n: p.dtype
            for n, p in model.named_parameters()
            if p.dim() > 1 and "router" not in n and ".gate." not in n
        }
        assert {d for n, d in large.items() if "pos" not in n} == {torch.float16}, large


def test_the_matrices_of_a_language_model_take_half_the_memory():
    model = FAMILIES["mixtral"].build()
    result = mq.quantize(model, "fp16", **QUIET)
    held = sum({p.data_ptr(): p.nbytes for p in result.model.parameters()}.values())
    before = sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values())
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1 or p.shape[0] == 4)
    assert held <= before // 2 + 2 * vectors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24), (0, 24)])
def test_linear_is_as_close_as_float32_sums_are(shape, dtype):
    layer = seeded(lambda: nn.Linear(24, 19))
    x = seeded(lambda: torch.randn(shape)).to(dtype)
    half = convert(nn.Sequential(layer))
    y = half(x)
    weight, bias = layer.weight.half().double(), layer.bias.half().double()
    exact = F.linear(x.double(), weight, bias)
    size = F.linear(x.double().abs(), weight.abs(), bias.abs())
    assert y.dtype == dtype and y.shape == (*shape[:-1], 19)
    assert ((y - exact).abs() <= size * 26 * 2.0**-24 + exact.abs() * torch.finfo(dtype).eps / 2).all()


def test_reading_a_weight_gives_what_the_model_computes_with():
    layer = nn.Linear(24, 19)
    half = convert(nn.Sequential(layer))
    assert half[0].weight.dtype == torch.float32 and torch.equal(half[0].weight, layer.weight.half().float())
    assert half.state_dict()["0.weight"].dtype == torch.float16
    assert half.half()[0].weight.dtype == torch.float16


def test_half_gives_a_model_that_computes_in_float16():
    """What a GPU wants; the values are those of the file already, so nothing is lost."""
    model, inputs = tiny_llama(), FAMILIES["llama"].inputs()
    ours = convert(model)
    values = {n: t.float() for n, t in ours.state_dict().items()}
    ours.half()
    assert {p.dtype for p in ours.parameters()} == {torch.float16}
    assert all(torch.equal(t.float(), values[n]) for n, t in ours.state_dict().items())
    with torch.no_grad():
        theirs, output = copy.deepcopy(model).half()(**inputs).logits, ours(**inputs).logits
    assert output.dtype == torch.float16
    assert relative_error(theirs, output) < 2.0**-11 * 20


def test_float_gives_back_a_float32_model():
    model, inputs = tiny_llama(), FAMILIES["llama"].inputs()
    assert relative_error(run(halved(model), inputs), run(convert(model).float(), inputs)) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "attention", "cnn"])
def test_copies_pickles_and_state_dicts_keep_every_bit(name):
    model, inputs = FAMILIES[name].build(), FAMILIES[name].inputs()
    half = convert(model)
    expected = run(half, inputs)
    assert torch.equal(run(copy.deepcopy(half), inputs), expected)
    assert torch.equal(run(pickle.loads(pickle.dumps(half)), inputs), expected)
    other = convert(seeded(FAMILIES[name].make, 1))
    assert not torch.equal(run(other, inputs), expected)
    other.load_state_dict(half.state_dict(), strict=True)
    assert torch.equal(run(other, inputs), expected)
    assert {n: (t.shape, t.stride()) for n, t in other.state_dict().items()} == {
        n: (t.shape, t.stride()) for n, t in half.state_dict().items()
    }


@pytest.mark.parametrize("name", ["llama", "gpt2", "attention", "cnn"])
def test_it_compiles_in_one_graph(name):
    model, inputs = convert(FAMILIES[name].build()), FAMILIES[name].inputs()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert relative_error(run(model, inputs), run(compiled, inputs)) < 1e-5


def test_it_exports():
    model = convert(nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 8)))
    x = torch.randn(3, 24)
    exported = torch.export.export(model, (x,))
    assert torch.equal(exported.module()(x), model(x))
    assert sum("half_linear" in str(node.target) for node in exported.graph.nodes) == 2


def test_a_loaded_model_has_the_memory_order_of_the_kernels(tmp_path):
    model = FAMILIES["gpt2"].build()
    mq.quantize(model, "fp16", **QUIET).save(tmp_path / "half")
    mq.quantize(model, "int8", **QUIET).save(tmp_path / "int8")
    for folder in ("half", "int8"):
        layer = mq.load(tmp_path / folder).transformer.h[0].mlp.c_fc
        assert layer._parameters["weight"].t().is_contiguous(), folder


def test_int8_convolutions_have_their_channels_last_in_memory_also_when_loaded(tmp_path):
    model = seeded(Cnn)
    result = mq.quantize(model, **QUIET)
    for m in (result.model, mq.load(result.save(tmp_path / "out"), model=Cnn)):
        assert m.b._parameters["weight"].movedim(1, -1).is_contiguous()
        assert m.b._parameters["weight"].shape == model.b.weight.shape


class Mixed(nn.Module):
    """Layers that no float16 form exists for, between some that have one."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.lstm = nn.LSTM(32, 32, batch_first=True)
        self.conv = nn.Conv1d(32, 32, 3, padding=1)
        self.bilinear = nn.Bilinear(32, 32, 8)
        self.norm = nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.randn(8, 8))
        self.out = nn.Linear(8, 50)

    def forward(self, ids):
        x, _ = self.lstm(self.embed(ids))
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.out(self.norm(self.bilinear(x, x)) @ self.scale)


def test_what_has_no_float16_form_computes_in_float32_and_the_report_says_so(tmp_path):
    model, ids = seeded(Mixed).eval(), torch.arange(24).view(2, 12)
    result = mq.quantize(model, "fp16", probe=ids)
    assert relative_error(halved(model)(ids), result.model(ids)) < 1e-5
    (note,) = result.report.notes
    wide = sum(p.numel() for n, p in model.named_parameters() if n not in ("embed.weight", "out.weight"))
    assert f"in memory {wide:,} of the float16 values are float32" in note
    assert all(kind in note for kind in ("LSTM", "Conv1d", "Bilinear", "Mixed"))
    assert torch.equal(mq.load(result.save(tmp_path / "out"), model=Mixed)(ids), result.model(ids))


def test_a_table_that_something_else_reads_too_is_float32_for_both():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.reader = nn.Embedding(50, 32), nn.Bilinear(32, 1, 50, bias=False)
            self.reader.weight = nn.Parameter(self.embed.weight.unsqueeze(-1))
            self.again = nn.Module()
            self.again.table = self.embed.weight

        def forward(self, ids):
            return self.embed(ids) @ self.again.table.t()

    model, ids = seeded(Reader).eval(), torch.arange(6)
    half = convert(model)
    assert half.embed._parameters["weight"] is half.again.table and half.again.table.dtype == torch.float32
    assert relative_error(halved(model)(ids), half(ids)) < 1e-5


def test_skipped_layers_of_a_bf16_model_run_between_the_others(tmp_path):
    model = tiny_llama().bfloat16()
    inputs = FAMILIES["llama"].inputs()
    result = mq.quantize(model, "fp16", skip=["up_proj", "input_layernorm", "q_proj"], **QUIET)
    assert held_dtype(result.model.model.layers[0].mlp.up_proj) == torch.bfloat16
    output = run(result.model, inputs)
    assert output.dtype == torch.float32
    assert relative_error(run(model.float(), inputs), output) < 0.05
    loaded = mq.load(result.save(tmp_path / "out"))
    assert held_dtype(loaded.model.layers[0].mlp.up_proj) == torch.bfloat16
    assert torch.equal(run(loaded, inputs), output)


def held_dtype(module):
    return module._parameters["weight"].dtype


def test_float16_inputs_are_taken_too():
    model, pixels = FAMILIES["vit"].build(), FAMILIES["vit"].inputs()["pixel_values"]
    half = convert(model)
    with torch.no_grad():
        assert relative_error(half(pixels).logits, half(pixels.half()).logits.float()) < 2e-3


def test_a_float16_model_is_cast_without_a_change(tmp_path):
    model, inputs = tiny_llama().half(), FAMILIES["llama"].inputs()
    half = convert(model)
    assert all(
        torch.equal(a.float(), b.float())
        for a, b in zip(model.state_dict().values(), half.state_dict().values(), strict=True)
    )
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in half.parameters()}
    assert relative_error(run(copy.deepcopy(model).float(), inputs), run(half, inputs)) < 1e-5


def test_it_generates_the_tokens_of_the_rounded_weights():
    model, ids = tiny_llama(), torch.arange(5)[None]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = halved(model).generate(ids, **options)
    assert torch.equal(convert(model).generate(ids, **options), expected)


def test_gradients_reach_the_input_and_the_bias():
    layer = nn.Linear(24, 19)
    half = convert(nn.Sequential(layer))
    x = torch.randn(3, 24, requires_grad=True)
    half(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.half().float().sum(0).expand(3, 24))
    assert half[0].bias.grad.eq(3).all() and not half[0]._parameters["weight"].requires_grad


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
def test_a_converted_model_is_not_converted_again(dtype):
    with pytest.raises(AlreadyQuantizedError, match=r"HalfLinear.*quantized already"):
        mq.quantize(convert(nn.Sequential(nn.Linear(64, 64))), dtype, **QUIET)


def test_every_family_is_covered_here():
    assert {"llama", "gpt2", "mixtral", "attention", "cnn"} <= set(FAMILIES) and is_plain(seeded(Cnn))


def test_values_of_one_byte_stay_as_they_are(tmp_path):
    class Coded(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 64)
            self.register_buffer("codes", torch.arange(64.0).to(torch.float8_e4m3fn))

        def forward(self, x):
            return self.fc(x) * self.codes.float()

    model, x = Coded().eval(), torch.randn(3, 64)
    planned, result = mq.plan(model, "fp16"), mq.quantize(model, "fp16", probe=x)
    assert [r.dtype_after for r in result.report.rows] == [r.dtype_after for r in planned.rows]
    assert torch.equal(result.model.codes.view(torch.uint8), model.codes.view(torch.uint8))
    result.save(tmp_path / "out")
    loaded = mq.load(tmp_path / "out", model=Coded)
    assert torch.equal(loaded(x), result.model(x)) and loaded.codes.dtype == torch.float8_e4m3fn
