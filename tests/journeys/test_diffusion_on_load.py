"""`from_pretrained` of diffusers with our method: the same model as `quantize` makes, and folders that come back through it."""

import copy
import json
import pickle

import diffusers
import diffusion
import pytest
import torch
from diffusers.quantizers import PipelineQuantizationConfig
from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from models import snapshot
from torch import nn

import mono_quant as mq
from mono_quant.convert.int8_layers import Int8Module, tensors_of
from mono_quant.errors import ConfigError, CorruptCheckpointError, FormatVersionError, NonFiniteWeightError

SOME = pytest.mark.parametrize("name", ["wan", "unet"])


def same(a, b):
    a, b = tensors_of(a), tensors_of(b)
    return a.keys() == b.keys() and all(t.dtype == b[n].dtype and torch.equal(t, b[n]) for n, t in a.items())


def saved(name, folder, **changes):
    model = diffusion.build(name, **changes)
    model.save_pretrained(folder, max_shard_size="300kB")
    return type(model)


@SOME
@pytest.mark.parametrize("dtype", ["int8", "fp16"])
def test_a_model_converted_on_load_is_the_one_that_quantize_makes(name, dtype, tmp_path):
    cls = saved(name, tmp_path / "source")
    expected = mq.quantize(tmp_path / "source", dtype, fidelity=False)
    model = cls.from_pretrained(tmp_path / "source", quantization_config=mq.MonoQuantConfig(dtype))
    assert same(model, expected.model)
    assert model.mono_quant_report.rows == expected.report.rows
    model.save_pretrained(tmp_path / "model")
    assert same(mq.load(tmp_path / "model"), model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(twin, model)


@SOME
def test_the_dtype_that_is_asked_for_is_that_of_the_float_model(name, tmp_path):
    cls = saved(name, tmp_path)
    floats = cls.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    expected = mq.dynamic_quantize(floats)[0]
    model = cls.from_pretrained(
        tmp_path, torch_dtype=torch.bfloat16, quantization_config=mq.MonoQuantConfig()
    )
    assert same(model, expected)
    assert {m.float_dtype for m in model.modules() if isinstance(m, Int8Module)} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@SOME
def test_an_int8_folder_comes_back_through_diffusers(name, dtype, tmp_path):
    cls = saved(name, tmp_path / "source")
    folder = mq.quantize(tmp_path / "source", fidelity=False).save(tmp_path / "int8", max_shard_size="200kB")
    model, expected = cls.from_pretrained(folder, torch_dtype=dtype), mq.load(folder)
    stored, found = tensors_of(expected), tensors_of(model)
    coded = {n for n, t in stored.items() if t.dtype == torch.int8}
    assert coded and {n for n, t in found.items() if t.dtype == torch.int8} == coded
    for name_, tensor in found.items():
        # codes and scales as they are, floats in the dtype that was asked for, as diffusers reads them
        is_kept = name_.removesuffix("_scale") in coded or dtype is None
        is_kept |= not set(cls._keep_in_fp32_modules or ()).isdisjoint(name_.split("."))
        wanted = stored[name_] if is_kept else stored[name_].to(dtype)
        assert tensor.dtype == wanted.dtype and torch.equal(tensor, wanted)
    model.save_pretrained(tmp_path / "again")
    if dtype is None:
        assert snapshot(tmp_path / "again") == snapshot(
            mq.QuantizedModel.from_folder(folder).save(tmp_path / "b")
        )


def images(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return torch.as_tensor(pipe([3], generator=generator, num_inference_steps=2, output_type="np").images)


def test_a_pipeline_converts_what_it_is_told_and_comes_back(tmp_path):
    parts = diffusion.build("dit", num_embeds_ada_norm=1000), diffusion.build("vae")
    pipe = diffusers.DiTPipeline(*parts, diffusers.DDIMScheduler())
    pipe.save_pretrained(tmp_path / "float")
    pipe.transformer = mq.dynamic_quantize(pipe.transformer)[0]
    expected = images(pipe)
    asked = PipelineQuantizationConfig(quant_mapping={"transformer": mq.MonoQuantConfig()})
    loaded = diffusers.DiTPipeline.from_pretrained(tmp_path / "float", quantization_config=asked)
    assert torch.equal(images(loaded), expected)
    assert not any(isinstance(m, Int8Module) for m in loaded.vae.modules())
    loaded.save_pretrained(tmp_path / "int8")
    again = diffusers.DiTPipeline.from_pretrained(tmp_path / "int8")
    assert torch.equal(images(again), expected) and same(again.transformer, pipe.transformer)
    backend = PipelineQuantizationConfig(
        quant_backend="mono_quant", quant_kwargs={"dtype": "int8"}, components_to_quantize=["vae"]
    )
    other = diffusers.DiTPipeline.from_pretrained(tmp_path / "float", quantization_config=backend)
    assert same(other.vae, mq.dynamic_quantize(diffusion.build("vae"))[0])


def test_the_rules_of_a_request_hold(tmp_path):
    cls = saved("dit", tmp_path)
    asked = mq.QuantizationConfig(skip=["to_q"], embeddings=True)
    expected = mq.quantize(tmp_path, config=asked, fidelity=False)
    model = cls.from_pretrained(tmp_path, quantization_config=asked)
    assert same(model, expected.model) and type(model.transformer_blocks[0].attn1.to_q) is nn.Linear


def test_without_mono_quant_a_folder_is_refused_by_its_method_and_by_its_shapes(tmp_path, monkeypatch):
    cls = saved("dit", tmp_path / "source")
    folder = mq.quantize(tmp_path / "source", fidelity=False).save(tmp_path / "int8")
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, "mono_quant")
    with pytest.raises(ValueError, match="got mono_quant"):
        cls.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    for low in (True, False):
        with pytest.raises((ValueError, RuntimeError), match=r"expected shape|size mismatch"):
            cls.from_pretrained(folder, low_cpu_mem_usage=low)


def test_what_cannot_be_done_while_loading_is_refused(tmp_path):
    cls = saved("dit", tmp_path / "source")
    with pytest.raises(ConfigError, match="on_nonfinite='keep' needs to look at the weights first"):
        cls.from_pretrained(tmp_path / "source", quantization_config=mq.MonoQuantConfig(on_nonfinite="keep"))
    with pytest.raises(ConfigError, match="would stay in float"):
        cls.from_pretrained(
            tmp_path / "source",
            quantization_config=mq.MonoQuantConfig(),
            device_map={"": "disk"},
            offload_folder=tmp_path / "offload",
        )
    model = diffusion.build("dit")
    with torch.no_grad():
        model.transformer_blocks[1].attn1.to_k.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(NonFiniteWeightError, match=r"transformer_blocks\.1\.attn1\.to_k"):
        cls.from_pretrained(tmp_path / "nan", quantization_config=mq.MonoQuantConfig())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"quantization_config": {"quant_method": "mono_quant", "format_version": 99}},
            FormatVersionError,
            "has format 99",
        ),
        ({"num_layers": 1}, CorruptCheckpointError, "has no layer there that can hold it"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(change, error, message, tmp_path):
    cls = saved("dit", tmp_path / "source")
    folder = mq.quantize(tmp_path / "source", fidelity=False).save(tmp_path / "int8")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(error, match=message):
        cls.from_pretrained(folder)
