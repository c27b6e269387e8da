"""The dtypes of a skeleton: what transformers gives, and what a checkpoint holds."""

import pytest
import torch
import transformers as hf
from models import transformer
from torch import Tensor, nn

from mono_quant.hf.dtypes import built_dtype, loaded_dtypes, take_dtypes_
from mono_quant.hf.models import computed_buffers, given_dtypes, load_as_stored, skeleton
from mono_quant.hf.names import on_meta, place

fp32, bf16, fp16, fp64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
T5 = hf.T5Config(d_model=16, d_ff=32, d_kv=4, num_layers=1, num_heads=4, vocab_size=20)
DEBERTA = hf.DebertaConfig(**transformer | {"num_hidden_layers": 1})
MIXTRAL = hf.MixtralConfig(**transformer | {"num_hidden_layers": 1}, num_local_experts=2)
LLAMA = hf.LlamaConfig(**transformer | {"num_hidden_layers": 1}, tie_word_embeddings=True)


def bare(cls, config, dtype: torch.dtype) -> nn.Module:
    return skeleton(cls, config, dtype, "x")


def dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in model.state_dict().items() if tensor.is_floating_point()}


def others(found: dict[str, torch.dtype], dtype: torch.dtype) -> dict[str, torch.dtype]:
    return {name: other for name, other in found.items() if other != dtype}


@pytest.mark.parametrize("dtype", [fp32, bf16, fp16, fp64])
@pytest.mark.parametrize(
    ("cls", "config"), [(hf.T5EncoderModel, T5), (hf.DebertaModel, DEBERTA), (hf.LlamaModel, LLAMA)]
)
def test_the_dtypes_of_a_skeleton_are_those_that_transformers_loads(cls, config, dtype, tmp_path):
    cls(config).save_pretrained(tmp_path)
    expected = dtypes(cls.from_pretrained(tmp_path, dtype=dtype))

    assert loaded_dtypes(bare(cls, config, dtype), dtype) == expected
    assert given_dtypes(cls(config), dtype) == others(expected, dtype)


def test_a_model_that_cannot_be_built_from_its_config_has_only_its_declarations():
    class Needs(hf.T5EncoderModel):
        def __init__(self, config, more):
            super().__init__(config)

    expected = {name for name in dtypes(Needs(T5, 1)) if name.endswith("wo.weight")}
    assert given_dtypes(Needs(T5, 1), fp16) == dict.fromkeys(expected, fp32) and expected
    assert given_dtypes(nn.Linear(2, 2), fp16) == {}


def test_a_skeleton_takes_the_dtypes_of_the_file():
    model = bare(hf.DebertaModel, DEBERTA, bf16)
    assert set(others(dtypes(model), bf16)) == {n for n in dtypes(model) if n.endswith(("q_bias", "v_bias"))}
    names = list(dtypes(model))
    held = dict.fromkeys(names, fp16) | {names[0]: fp64, names[3]: fp32, "not.in.the.model": fp32}

    take_dtypes_(model, fp16, held)

    assert dtypes(model) == {name: held[name] for name in names}


def test_what_the_file_does_not_hold_gets_its_common_dtype_unless_it_was_made_in_one_of_its_own():
    model = bare(hf.DebertaModel, DEBERTA, bf16)

    take_dtypes_(model, fp16, {})

    assert others(dtypes(model), fp16) == dict.fromkeys(
        [n for n in dtypes(model) if n.endswith(("q_bias", "v_bias"))], fp32
    )


def test_of_tensors_that_become_one_the_widest_decides():
    model = bare(hf.MixtralForCausalLM, MIXTRAL, bf16)
    experts = "model.layers.0.block_sparse_moe.experts"
    shapes = {"w1": (128, 64), "w2": (64, 128), "w3": (128, 64)}
    held = {f"{experts}.{i}.{w}.weight": (bf16, shape) for i in (0, 1) for w, shape in shapes.items()}
    held |= {f"{experts}.1.w3.weight": (fp32, shapes["w3"]), f"{experts}.0.w2.weight": (fp16, shapes["w2"])}
    placed = place(model, on_meta(held))

    take_dtypes_(model, bf16, {name: tensor.dtype for name, tensor in placed.tensors.items()})

    found = others(dtypes(model), bf16)
    assert found == {
        "model.layers.0.mlp.experts.gate_up_proj": fp32,
        "model.layers.0.mlp.experts.down_proj": torch.promote_types(bf16, fp16),
    }


def test_tied_tensors_stay_one():
    model = bare(hf.LlamaForCausalLM, LLAMA, fp32)

    take_dtypes_(model, bf16, {"model.embed_tokens.weight": fp16})

    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert others(dtypes(model), bf16) == {"model.embed_tokens.weight": fp16, "lm_head.weight": fp16}


def test_a_model_is_filled_with_the_very_tensors_of_the_checkpoint_whatever_it_is_built_in():
    state = {n: t.to(fp16) for n, t in hf.T5EncoderModel(T5).state_dict().items() if n != "shared.weight"}
    wide = next(name for name in state if "wo" in name)
    state[wide] = state[wide].double()
    for built in (fp32, bf16, fp16):
        model = load_as_stored(hf.T5EncoderModel, T5, state, "x", fp16, built)
        loaded = model.state_dict()
        assert all(loaded[name].data_ptr() == tensor.data_ptr() for name, tensor in state.items())
        assert built_dtype(model) == built
        assert model._keep_in_fp32_modules == {"wo"}
        assert not {"hf_quantizer", "is_quantized", "quantization_method"} & vars(model).keys()
        assert not hasattr(model.config, "quantization_config")
        assert model.half().dtype == fp16


def test_merged_tensors_of_several_dtypes_lose_nothing():
    source = hf.MixtralForCausalLM(MIXTRAL)
    w1, w2 = (torch.randn(128, 64) for _ in "ab")
    state: dict[str, Tensor] = {
        name: tensor.to(bf16) for name, tensor in source.state_dict().items() if "experts" not in name
    }
    experts = "model.layers.0.block_sparse_moe.experts"
    for i in (0, 1):
        state |= {f"{experts}.{i}.w1.weight": w1, f"{experts}.{i}.w3.weight": w1.to(bf16)}
        state[f"{experts}.{i}.w2.weight"] = w2.T.to(bf16)

    model = load_as_stored(hf.MixtralForCausalLM, MIXTRAL, state, "x", bf16)

    fused = model.model.layers[0].mlp.experts.gate_up_proj
    assert fused.dtype == fp32 and torch.equal(fused, torch.cat([w1, w1.to(bf16).float()]).expand(2, -1, -1))


def test_what_a_class_computes_is_known_without_its_weights():
    config = hf.Gemma3TextConfig(**transformer | {"hidden_size": 48, "num_hidden_layers": 1}, head_dim=16)
    model = hf.Gemma3TextModel(config)
    expected = {n: b for n, b in model.named_buffers() if n not in model.state_dict()}

    found = computed_buffers(model, fp32)

    assert found.keys() == expected.keys() and len(found) > 2
    assert all(torch.equal(found[name], buffer) for name, buffer in expected.items())
    assert computed_buffers(model, fp16)["embed_tokens.embed_scale"] == torch.tensor(48**0.5).half()
    assert config.dtype is None
