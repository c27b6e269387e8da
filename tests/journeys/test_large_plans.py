"""Plans of checkpoints with many experts, from headers alone, under the names that published checkpoints have."""

import math

import pytest
import sparse
import torch
import transformers as hf
from models import FAMILIES, seeded, transformer

import mono_quant as mq
from mono_quant.api.stream_plan import plan_stream
from mono_quant.errors import PickleOnlyError
from mono_quant.hf.described import differences
from mono_quant.hf.names import on_meta
from mono_quant.planning.config import QuantizationConfig
from mono_quant.sources.source import Access
from mono_quant.sources.streamed import open_streamed
from mono_quant.stream.spec import Found

# fewer layers and experts, all sizes as published
FEWER = {
    "deepseek_v3": {"num_hidden_layers": 4, "n_routed_experts": 16, "first_k_dense_replace": 1},
    "qwen3_moe_235b": {"num_hidden_layers": 2, "num_experts": 16},
    "mixtral_8x22b": {"num_hidden_layers": 2},
    "llama_405b": {"num_hidden_layers": 2},
}
EVERY = pytest.mark.parametrize("name", FEWER)


def held(name):
    """Shapes of what the model has of a checkpoint, by name: no scales, and not the layer that predicts a token more."""
    config, stubs = sparse.MODELS[name]
    config = config | FEWER[name]
    extra = f"model.layers.{config['num_hidden_layers']}."
    return {
        stub.name: stub.shape
        for stub in stubs(config)
        if not stub.name.endswith("_scale_inv") and not stub.name.startswith(extra)
    }


def becomes_int8(name, shape):
    return len(shape) == 2 and not any(word in name for word in ("embed_tokens", "lm_head", ".gate."))


@EVERY
def test_every_parameter_is_accounted_for(tmp_path, name):
    shapes = held(name)
    planned = mq.plan(sparse.write(name, tmp_path / name, **FEWER[name]))
    # the biases of routers are buffers
    parameters = {own: shape for own, shape in shapes.items() if not own.endswith("correction_bias")}
    assert planned.parameters == sum(map(math.prod, parameters.values()))
    chosen = sum(math.prod(shape) for own, shape in shapes.items() if becomes_int8(own, shape))
    assert planned.quantized_parameters == chosen
    kinds = {row.kind for row in planned.quantized}
    assert kinds == ({"linear"} if name == "llama_405b" else {"linear", "experts"})


@EVERY
def test_the_plan_of_a_stream_has_the_names_of_the_checkpoint(tmp_path, name):
    shapes = held(name)
    with open_streamed(sparse.write(name, tmp_path / name, **FEWER[name]), Access()) as opened:
        planned = plan_stream(opened.source, opened.pieces, QuantizationConfig(), Found(), {})
    codes = {own for own, shape in shapes.items() if becomes_int8(own, shape)}
    assert planned.weight_map().keys() == shapes.keys() | {f"{own}_scale" for own in codes}
    jobs = {job.source.name: job for shard in planned.shards for job in shard.jobs}
    assert jobs.keys() == shapes.keys()
    for own, job in jobs.items():
        assert job.source.shape == shapes[own] and (job.action == "int8") == (own in codes)
        assert (job.source.inverse is not None) == (name == "deepseek_v3" and own in codes)


def test_the_numbers_are_the_published_ones():
    config, stubs = sparse.MODELS["deepseek_v3"]
    made = list(stubs(config))
    assert len(made) == 91_991
    main = [s for s in made if not s.name.startswith("model.layers.61.") and not s.name.endswith("_inv")]
    assert sum(math.prod(stub.shape) for stub in main) == 671_026_419_200
    config, stubs = sparse.MODELS["llama_405b"]
    assert sum(math.prod(stub.shape) for stub in stubs(config)) == 405_853_388_800


@pytest.mark.parametrize("family", ["llama", "llama_tied", "t5", "mixtral"])
def test_tensors_without_data_are_not_one(family):
    """They all have the address 0."""
    with torch.device("meta"):
        model = FAMILIES[family].make()
    state = {name: (t.dtype, t.shape) for name, t in model.state_dict().items()}
    for target in model.all_tied_weights_keys:
        state.pop(target, None)
    raw = model.config.to_dict() | {"architectures": [type(model).__name__]}
    found = differences(model, on_meta(state), raw)
    assert (found.sentences, found.ties) == ([], [])


# Experts that lie in one tensor, stored as no linear layer is, stay in float and say why


def gpt_oss():
    sizes = {"head_dim": 16, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return hf.GptOssForCausalLM(hf.GptOssConfig(**transformer, **sizes))


def llama4():
    sizes = {"intermediate_size_mlp": 128, "num_local_experts": 4, "head_dim": 16, "num_experts_per_tok": 1}
    return hf.Llama4ForCausalLM(hf.Llama4TextConfig(**transformer, num_key_value_heads=2, **sizes))


@pytest.mark.parametrize("make", [gpt_oss, llama4])
def test_fused_experts_of_an_unknown_layout_stay_in_float(tmp_path, make):
    model = seeded(make).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    planned = mq.plan(tmp_path / "model")
    assert planned.rows == mq.plan(model).rows
    experts = [row for row in planned.rows if ".experts." in row.name and len(row.shape) == 3]
    assert {row.name.rpartition(".")[2] for row in experts} == {"gate_up_proj", "down_proj"}
    for row in experts:
        assert row.action == "kept" and "experts of a layout that is not known here" in row.reason
    assert any(row.name.endswith("self_attn.q_proj.weight") for row in planned.quantized)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_of_their_own_are_planned_as_those_in_memory(tmp_path, family):
    model = FAMILIES[family].build()
    model.save_pretrained(tmp_path / "model")
    with (tmp_path / "model/model.safetensors").open("rb") as file:
        assert b".experts.3." in file.read(1 << 20)
    planned = mq.plan(tmp_path / "model")
    assert planned.rows == mq.plan(model).rows
    assert {row.name.rpartition(".")[2] for row in planned.quantized if row.kind == "experts"} == {
        "gate_up_proj",
        "down_proj",
    }


@pytest.mark.parametrize("verb", [mq.plan, mq.quantize])
def test_pickles_alone_are_refused_with_the_remedy(tmp_path, verb):
    model = FAMILIES["llama"].build()
    model.config.save_pretrained(tmp_path / "model")
    torch.save(model.state_dict(), tmp_path / "model/pytorch_model.bin")
    with pytest.raises(
        PickleOnlyError, match=r"pytorch_model\.bin.*safetensors/convert, or pass allow_pickle=True"
    ):
        verb(tmp_path / "model")
