"""Models whose checkpoints hold several layers in one tensor: planned, converted, saved and loaded as all others."""

import functools
import json
import tempfile
from pathlib import Path

import pytest
import torch
import transformers as hf
from models import seeded, text, transformer
from safetensors.torch import load_file, save_file
from transformers import conversion_mapping

import mono_quant as mq
from mono_quant.errors import CorruptCheckpointError

QUIET = {"fidelity": False}
sizes = {k: v for k, v in transformer.items() if k != "vocab_size"}
grouped_heads = {"num_key_value_heads": 2, "head_dim": 16}


def pixels():
    return {"pixel_values": torch.rand(2, 3, 32, 32)}


def step_vision():
    return hf.Step3p7VisionModel(hf.Step3p7VisionConfig(**sizes, image_size=32, patch_size=8))


# split evenly, by the name of the layer or of its weight; split unevenly; with rows reordered; stacked and turned
FAMILIES = {
    "nomic_bert": (lambda: hf.NomicBertModel(hf.NomicBertConfig(**transformer)), text),
    "gte": (lambda: hf.GteModel(hf.GteConfig(**transformer)), text),
    "jina_v3": (lambda: hf.JinaEmbeddingsV3Model(hf.JinaEmbeddingsV3Config(**transformer)), text),
    "radio": (lambda: hf.RadioModel(hf.RadioConfig(**sizes, image_size=32, patch_size=8)), pixels),
    "molmo2_text": (lambda: hf.Molmo2TextModel(hf.Molmo2TextConfig(**transformer, **grouped_heads)), text),
    "tipsv2_text": (lambda: hf.Tipsv2TextModel(hf.Tipsv2TextConfig(**transformer)), text),
    "step3p7_vision": (step_vision, pixels),
    "hrm_text": (
        lambda: hf.HrmTextModel(hf.HrmTextConfig(**transformer, head_dim=16, H_cycles=1, L_cycles=1)),
        text,
    ),
    "qwen3_vl_moe": (
        lambda: hf.Qwen3VLMoeTextModel(
            hf.Qwen3VLMoeTextConfig(
                **transformer, **grouped_heads, moe_intermediate_size=48, num_experts=4, num_experts_per_tok=2
            )
        ),
        text,
    ),
}
EVERY = pytest.mark.parametrize("name", FAMILIES)
BOTH = pytest.mark.parametrize("dtype", ["int8", "fp16"])


@pytest.fixture(scope="module")
def base():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        source.cache_clear()
        saved.cache_clear()


@functools.cache
def source(base, name):
    """A model, and its checkpoint as transformers writes it."""
    model = seeded(FAMILIES[name][0]).eval()
    model.save_pretrained(base / name)
    return model, base / name


@functools.cache
def saved(base, name, dtype):
    """What became of the checkpoint."""
    result = mq.quantize(source(base, name)[1], dtype, **QUIET)
    return result, result.save(base / f"{name}-{dtype}")


def output(model, inputs):
    with torch.inference_mode():
        return model(**inputs).last_hidden_state


def differing(a, b):
    a, b = a.state_dict(), b.state_dict()
    return [
        n
        for n in a.keys() | b.keys()
        if n not in a or n not in b or a[n].dtype != b[n].dtype or not a[n].equal(b[n])
    ]


@BOTH
@EVERY
def test_the_plan_of_a_checkpoint_is_that_of_its_model(base, name, dtype):
    model, folder = source(base, name)
    assert mq.plan(folder, dtype).rows == mq.plan(model, dtype).rows
    assert mq.plan(folder, dtype).rows


@BOTH
@EVERY
def test_what_was_converted_from_a_checkpoint_comes_back(base, name, dtype):
    result, folder = saved(base, name, dtype)
    loaded, inputs = mq.load(folder), seeded(FAMILIES[name][1])
    assert not differing(result.model, loaded)
    if dtype == "int8":
        assert torch.equal(output(result.model, inputs), output(loaded, inputs))


@EVERY
def test_what_was_converted_in_memory_comes_back(base, name, tmp_path):
    result = mq.quantize(source(base, name)[0], **QUIET)
    loaded = mq.load(result.save(tmp_path / "out"))
    assert not differing(result.model, loaded)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (
        saved(base, name, "int8")[1] / "model.safetensors"
    ).read_bytes()
    again = mq.QuantizedModel.from_folder(tmp_path / "out").save(tmp_path / "again")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


@EVERY
def test_the_codes_stand_for_the_tensors_of_the_source(base, name):
    """Under the same names, each row with its own scale, however transformers orders rows; flat, so that nobody else reads them."""
    expected = load_file(source(base, name)[1] / "model.safetensors")
    folder = saved(base, name, "int8")[1]
    found = load_file(folder / "model.safetensors")
    table = json.loads((folder / "mono_quant.json").read_text())["tensors"]
    codes = {n for n, t in found.items() if t.dtype == torch.int8}
    assert codes == set(table) and len(codes) >= 8
    assert {n for n in found if n not in expected} == {f"{n}_scale" for n in codes}
    for n in codes:
        scale = found[f"{n}_scale"]
        assert found[n].dim() == 1 and scale.dtype == torch.float32 and 1 in scale.shape
        scale = scale.view(*scale.shape, *[1] * (expected[n].dim() - scale.dim()))
        value = found[n].view(expected[n].shape) * scale
        assert ((value - expected[n]).abs() <= scale * (0.5 + 1e-4)).all(), n
    kept = expected.keys() - codes
    assert all(torch.equal(found[n], expected[n]) for n in kept)


@EVERY
def test_a_float16_file_holds_the_source_rounded(base, name):
    expected = load_file(source(base, name)[1] / "model.safetensors")
    found = load_file(saved(base, name, "fp16")[1] / "model.safetensors")
    assert found.keys() == expected.keys()
    for n, tensor in found.items():
        assert torch.equal(tensor, expected[n].to(tensor.dtype))
        assert tensor.dtype == (torch.float16 if expected[n].is_floating_point() else expected[n].dtype)


def test_parts_that_differ_are_not_merged(base, tmp_path):
    """A layer that the user skips, or whose values do not fit, shares no tensor with codes or with halves."""
    result = mq.quantize(source(base, "hrm_text")[0], skip=["re:.*self_attn.gate_proj"], **QUIET)
    loaded = mq.load(result.save(tmp_path / "int8"))
    found = load_file(tmp_path / "int8/model.safetensors")
    kept = [n for n in found if n.endswith("self_attn.gate_proj.weight")]
    assert kept and {found[n].dtype for n in kept} == {torch.float32}
    assert not differing(result.model, loaded)

    model = seeded(FAMILIES["nomic_bert"][0]).eval()
    with torch.no_grad():
        model.layers[0].self_attn.q_proj.weight[3, 5] = 1e6
    result = mq.quantize(model, "fp16", **QUIET)
    loaded = mq.load(result.save(tmp_path / "fp16"))
    found = load_file(tmp_path / "fp16/model.safetensors")
    assert {n: t.dtype for n, t in found.items() if "q_proj" in n or "k_proj" in n} == {
        "layers.0.self_attn.q_proj.weight": torch.float32,
        "layers.0.self_attn.k_proj.weight": torch.float16,
    }
    assert not differing(result.model, loaded)


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_a_fused_tensor_that_does_not_fit_is_named(base, tmp_path, change):
    name = "encoder.layers.0.attn.Wqkv.weight"
    folder = tmp_path / "broken"
    model, _ = source(base, "nomic_bert")
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    wqkv = tensors.pop(name)
    if change == "shape":
        tensors[name] = wqkv[:150].contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    match = {
        "missing": r"3 weights of NomicBertModel are missing: layers.0.self_attn.q_proj.weight, "
        r"layers.0.self_attn.k_proj.weight, layers.0.self_attn.v_proj.weight",
        "shape": rf"layers.0.self_attn.k_proj.weight \(of {name}\) is \(50, 64\) and should be \(64, 64\)",
    }[change]
    for verb in (mq.plan, mq.quantize):
        with pytest.raises(CorruptCheckpointError, match=match):
            verb(folder)


def test_the_mapping_of_names_is_read_once_for_many_experts(monkeypatch, tmp_path):
    """Not once per expert: that took ten times as long as loading."""
    asked = []
    real = conversion_mapping.get_model_conversion_mapping
    monkeypatch.setattr(
        conversion_mapping, "get_model_conversion_mapping", lambda *a, **k: asked.append(1) or real(*a, **k)
    )
    config = hf.Qwen3MoeConfig(
        **transformer, **grouped_heads, moe_intermediate_size=16, num_experts=64, num_experts_per_tok=2
    )
    model = seeded(lambda: hf.Qwen3MoeForCausalLM(config))
    folder = mq.quantize(model, min_params=1, disable_defaults=["small"], **QUIET).save(tmp_path / "out")
    asked.clear()
    mq.load(folder)
    assert len(asked) <= 2
