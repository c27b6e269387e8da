"""Defects: see the room of this name."""

import copy
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from models import (
    FAMILIES,
    Cnn,
    Lstm,
    is_plain,
    relative_error,
    run,
    seeded,
    snapshot,
)
from safetensors.torch import load_file
from torch import nn
from verbs import QUIET, ROOT, chosen, ids, kept, net

import mono_quant as mq
from mono_quant.convert.int8_layers import Int8Conv1d, Int8Conv2d, Int8Module
from mono_quant.errors import ConfigError, PatternError


@pytest.mark.parametrize("form", [str, Path, lambda p: f"{p}/", lambda p: Path(p) / "deep" / "er"])
def test_original_defect_01_save_in_every_form_works(tmp_path, form):
    out = mq.quantize(seeded(Lstm), **QUIET).save(form(tmp_path / "out"))
    assert (out / "model.safetensors").is_file() and mq.load(out, model=Lstm()).out.weight.shape == (100, 64)


def test_original_defect_02_str_and_path_behave_alike(tmp_path):
    result = mq.quantize(seeded(Lstm), **QUIET)
    one, two = result.save(str(tmp_path / "a")), result.save(tmp_path / "b")
    assert type(one) is type(two) and snapshot(one) == snapshot(two)
    assert type(mq.load(str(one), model=Lstm)) is type(mq.load(two, model=Lstm))


def test_original_defect_03_bytes_on_disk_equal_the_report(tmp_path):
    result = mq.quantize(net(), **QUIET)
    tensors = load_file(result.save(tmp_path / "out") / "model.safetensors")
    assert sum(t.nbytes for t in tensors.values()) == result.report.bytes_after < result.report.bytes_before


def test_original_defect_04_dtypes_on_disk(tmp_path):
    tensors = load_file(mq.quantize(net(), **QUIET).save(tmp_path / "out") / "model.safetensors")
    codes = {n for n, t in tensors.items() if t.dtype == torch.int8}
    assert codes == {"deep.inner.0.weight", "deep.inner.2.weight", "shared.weight"}
    assert {t.dtype for n, t in tensors.items() if n not in codes} == {torch.float32}
    assert not [n for n in tensors if "zero_point" in n]


def test_original_defect_05_no_mode_without_a_proven_bound():
    with pytest.raises(ConfigError, match="dtype is 'int4'"):
        mq.quantize(net(), "int4")
    model = net()
    converted = mq.quantize(model, **QUIET).model
    for name in ("shared", "deep.inner.0", "deep.inner.2"):
        before, layer = model.get_submodule(name).weight, converted.get_submodule(name)
        assert ((before - layer.weight).abs() <= layer.scale() * 0.50001).all()


def test_original_defect_06_sqnr_and_ratio_are_right():
    model = net()
    result = mq.quantize(model, **QUIET)
    for row in result.report.quantized:
        weight = model.get_submodule(row.module).weight.detach().double().numpy()
        scale = numpy.abs(weight).max(1, keepdims=True) / 127
        noise = weight - numpy.round(weight / scale) * scale
        assert row.sqnr_db == pytest.approx(10 * numpy.log10((weight**2).sum() / (noise**2).sum()), abs=0.01)
    large = mq.quantize(nn.Sequential(nn.Linear(512, 512)), **QUIET).report
    assert large.bytes_before / large.bytes_after == pytest.approx(4 * 513 / (512 + 8), rel=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_original_defect_07_skipped_names_exist(name):
    model = FAMILIES[name].build()
    names = dict(model.named_modules())
    for dtype in ("int8", "fp16"):
        converted, skipped = mq.dynamic_quantize(model, dtype)
        assert set(skipped) <= names.keys()
        assert not [n for n in skipped if isinstance(converted.get_submodule(n), Int8Module)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "cnn", "encoder", "attention"])
def test_original_defect_08_a_result_can_be_cast(name, dtype):
    family = FAMILIES[name]
    result = mq.quantize(family.build(), **QUIET)
    expected = run(result.model, family.inputs())
    scales = {n: p.clone() for n, p in result.model.named_parameters() if n.endswith("_scale")}
    model = copy.deepcopy(result.model).to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in family.inputs().items()}
    output = run(model, inputs)
    assert output.dtype == dtype and relative_error(expected, output) < 0.05
    for n, scale in scales.items():
        assert torch.equal(dict(model.named_parameters())[n], scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_original_defect_09_every_float_dtype_is_quantized(dtype):
    model = net().to(dtype)
    result = mq.quantize(model, **QUIET)
    assert chosen(result) == ["deep.inner.0", "deep.inner.2", "shared"]
    output = result.model(ids())
    assert output.dtype == dtype and relative_error(model(ids()), output) < 0.05


def test_original_defect_10_fp16_runs_with_batchnorm_and_honours_skips(tmp_path):
    model, x = seeded(Cnn).eval(), seeded(lambda: torch.randn(2, 3, 16, 16))
    result = mq.quantize(model, "fp16", skip=["bn2", "fc"], probe=x)
    folder = result.save(tmp_path / "out")
    dtypes = {n: t.dtype for n, t in load_file(folder / "model.safetensors").items()}
    assert {n.split(".")[0] for n, d in dtypes.items() if d == torch.float32} == {"bn2", "fc"}
    assert dtypes["bn.running_mean"] == torch.float16 and dtypes["bn.num_batches_tracked"] == torch.int64
    output = result.model(x)
    assert relative_error(model(x), output) < 1e-3
    assert torch.isfinite(result.model(x.half())).all()
    assert torch.equal(mq.load(folder, model=Cnn)(x), output)


@pytest.mark.parametrize("name", ["llama", "gpt2", "cnn", "attention"])
def test_original_defect_11_compiles_in_one_graph(name):
    family = FAMILIES[name]
    model = mq.quantize(family.build(), **QUIET).model
    expected = run(model, family.inputs())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        out = compiled(**family.inputs())
    assert torch.allclose(
        out if isinstance(out, torch.Tensor) else out.logits, expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "cnn", "attention"])
def test_original_defect_12_all_tensors_are_registered(name):
    model = mq.quantize(FAMILIES[name].build(), **QUIET).model
    layers = [m for m in model.modules() if isinstance(m, Int8Module)]
    assert layers
    for layer in layers:
        loose = [k for k, v in vars(layer).items() if isinstance(v, torch.Tensor)]
        assert not loose
        assert all(type(p) is nn.Parameter and type(p.data) is torch.Tensor for p in layer.parameters())
    moved = copy.deepcopy(model).to("meta")
    assert {t.device.type for t in [*moved.parameters(), *moved.buffers()]} == {"meta"}
    again = pickle.loads(pickle.dumps(model))
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())
    again.load_state_dict(model.state_dict(), strict=True)


CONVS = [
    {"padding": 1},
    {"padding": "same", "kernel_size": 4},
    {"padding": "valid", "stride": 2},
    {"padding": 2, "dilation": 2},
    {"padding": 1, "groups": 2},
    {"padding": 1, "bias": False},
    *({"padding": 1, "padding_mode": mode} for mode in ("reflect", "replicate", "circular")),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("options", CONVS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize(
    ("float_class", "int8_class", "size"), [(nn.Conv1d, Int8Conv1d, (31,)), (nn.Conv2d, Int8Conv2d, (9, 11))]
)
def test_original_defect_13_every_conv_option_works(float_class, int8_class, size, options):
    layer = seeded(lambda: nn.Sequential(float_class(64, 64, **{"kernel_size": 3, **options}))).eval()
    x = seeded(lambda: torch.randn(2, 64, *size))
    converted = mq.quantize(layer, **QUIET).model
    assert type(converted[0]) is int8_class
    for given in (x, x[0], x[:0]):
        output, expected = converted(given), layer(given)
        assert output.shape == expected.shape
        assert not given.numel() or relative_error(expected, output) < 0.02


def test_original_defect_14_an_option_has_an_effect_or_raises():
    for option, value in (("per_channel", False), ("symmetric", False), ("dynamic", False)):
        with pytest.raises(ConfigError, match=f"{option}=False is not supported"):
            mq.quantize(net(), **{option: value})
        assert mq.quantize(net(), **{option: True}, **QUIET)
    assert "tied" in kept(mq.quantize(net(), embeddings=True, **QUIET))["embed"]
    with pytest.raises(ConfigError, match=r"'tied', which cannot be lifted.*Untie them first"):
        mq.quantize(net(), embeddings=True, disable_defaults=["tied"], **QUIET)
    assert chosen(mq.quantize(seeded(Lstm), embeddings=True, **QUIET)) == ["emb", "lstm", "lstm", "out"]


@pytest.mark.parametrize("name", FAMILIES)
def test_original_defect_15_the_way_back_to_float(name):
    model = FAMILIES[name].build()
    result = mq.quantize(model, **QUIET)
    for row in result.report.quantized:
        owner, _, last = row.name.rpartition(".")
        layer, before = result.model.get_submodule(owner), model.get_parameter(row.name).float()
        # fused experts are read by transformers as codes; the others show their float weight as an attribute
        back = layer.dequantize(last) if row.kind == "experts" else getattr(layer, last)
        assert back.dtype == model.get_parameter(row.name).dtype and back.shape == before.shape
        scale = layer.scale(last)
        if layer.kind == "transposed_linear":
            scale = scale.t()
        elif before.dim() == 4:
            scale = scale[:, :, None, None]
        # half a step, and for bf16 half a unit of the last place of the product
        slack = 0.5 * scale * 1.0001 + (before.abs() * 2**-8 if back.dtype == torch.bfloat16 else 0.0)
        assert ((before - back.float()).abs() <= slack).all(), row.name


def test_original_defect_16_rounding_is_exact_at_the_edges():
    layer = nn.Sequential(nn.Linear(64, 64, bias=False))
    steps = torch.cat([
        torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5]),
        torch.arange(55.0),
    ])
    layer[0].weight.data = (steps * 0.25).repeat(64, 1)
    codes = mq.quantize(layer, **QUIET).model[0].codes()
    assert codes[0, :9].tolist() == [127, 0, 2, 2, 0, -2, -2, 126, -126]
    assert codes[0, 9:].tolist() == list(range(55))


@pytest.mark.parametrize("name", FAMILIES)
def test_original_defect_17_the_report_lists_every_quantized_layer(name):
    result = mq.quantize(FAMILIES[name].build(), **QUIET)
    layers = {n for n, m in result.model.named_modules() if isinstance(m, Int8Module)}
    listed = set(chosen(result))
    assert listed and layers - {f"{n}.out_proj" for n in listed} == listed


def test_original_defect_18_one_source_of_the_version(tmp_path):
    out = subprocess.run(
        [sys.executable, "-m", "mono_quant", "--version"],
        cwd=ROOT.parent,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    manifest = json.loads(
        (mq.quantize(net(), **QUIET).save(tmp_path / "out") / "mono_quant.json").read_text()
    )
    assert out.strip() == mq.__version__ == manifest["mono_quant_version"]


def test_original_defect_19_patterns_are_patterns():
    assert chosen(mq.quantize(net(), skip=["deep.*"], **QUIET)) == ["shared"]
    assert chosen(mq.quantize(net(), skip=[r"re:.*inner\.[0-1]"], **QUIET)) == ["deep.inner.2", "shared"]
    with pytest.raises(PatternError, match=r"near names: .*shared"):
        mq.quantize(net(), skip=["sharde"])


def test_original_defect_20_no_deprecated_quantization_of_torch(pytestconfig):
    assert "error" in pytestconfig.getini("filterwarnings")
    text = "\n".join(p.read_text() for p in ROOT.rglob("*.py"))
    assert not re.findall(
        r"quantize_per_(?:channel|tensor)|torch\.ao\.quantization|quantize_dynamic\(|_make_per_", text
    )
    model = mq.quantize(net(), **QUIET).model
    assert not [n for n, p in model.named_parameters() if p.is_quantized]


def test_original_defect_plus_nested_layers_are_found():
    bert = mq.quantize(FAMILIES["bert"].build(), **QUIET)
    assert len([n for n in chosen(bert) if n.startswith("bert.encoder.")]) == 12
    gpt2 = mq.quantize(FAMILIES["gpt2"].build(), **QUIET)
    assert len(chosen(gpt2)) == 8 and "lm_head" not in chosen(gpt2)


@pytest.mark.parametrize("name", ["lstm", "llama", "gpt2"])
def test_original_defect_plus_embeddings_are_in_the_file(tmp_path, name):
    model = FAMILIES[name].build()
    result = mq.quantize(model, embeddings=True, **QUIET)
    embeddings = [n for n in chosen(result) if isinstance(model.get_submodule(n), nn.Embedding)]
    # GPT-2 ties its token embeddings to the head; its position table is free
    assert len(embeddings) == 1
    folder = result.save(tmp_path / "out")
    saved = load_file(folder / "model.safetensors")
    assert {n.removesuffix("_scale") for n in saved} == {
        n for n in model.state_dict() if n != "lm_head.weight" or name == "llama"
    }
    assert saved[f"{embeddings[0]}.weight"].dtype == torch.int8
    loaded = mq.load(folder, model=FAMILIES[name].build if is_plain(model) else None)
    inputs = FAMILIES[name].inputs()
    assert torch.equal(run(loaded, inputs), run(result.model, inputs))
