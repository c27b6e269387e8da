"""Tables that are int8 beside int8 linear layers, in the standard layout: what compressed-tensors and transformers make of them."""

import copy
import json

import pytest
import torch
import transformers as hf
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams
from models import FAMILIES, relative_error, run, seeded, text, transformer
from safetensors.torch import load_file
from torch import nn

import mono_quant as mq
from mono_quant.convert.int8_layers import Int8Embedding

QUIET = {"fidelity": False}
OPTIONS = {"embeddings": True, "disable_defaults": ["small"], **QUIET}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def padded_roberta():
    """Its padding row is not zero, and its positions begin behind it."""
    config = hf.RobertaConfig(
        **transformer, pad_token_id=1, tie_word_embeddings=False, max_position_embeddings=40
    )
    model = hf.RobertaForMaskedLM(config)
    with torch.no_grad():
        model.roberta.embeddings.word_embeddings.weight[1] = torch.randn(64)
    return model


def modernbert():
    config = hf.ModernBertConfig(**transformer, **SPECIAL, cls_token_id=1, sep_token_id=2)
    return hf.ModernBertForSequenceClassification(config)


def opt():
    sizes = {
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "ffn_dim": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return hf.OPTForCausalLM(
        hf.OPTConfig(**sizes, vocab_size=200, max_position_embeddings=64, tie_word_embeddings=False)
    )


# what is int8 of the tables: those of T5, and OPT's positions, are tied or of a class of their own
CASES = {
    "bert": (FAMILIES["bert"].make, FAMILIES["bert"].make_inputs, 3),
    "padded roberta": (padded_roberta, text, 3),
    "modernbert": (modernbert, text, 1),
    "llama": (FAMILIES["llama"].make, text, 1),
    "bert in bfloat16": (lambda: FAMILIES["bert"].make().to(torch.bfloat16), text, 3),
    "opt": (opt, text, 1),
    "t5": (FAMILIES["t5"].make, FAMILIES["t5"].make_inputs, 2),
    "whisper": (FAMILIES["whisper"].make, FAMILIES["whisper"].make_inputs, 1),
}
EACH = pytest.mark.parametrize("name", CASES)


def converted(name, folder):
    make, inputs, _ = CASES[name]
    model = seeded(make).eval()
    result = mq.quantize(model, **OPTIONS)
    result.save(folder)
    return model, seeded(inputs), result


def block_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def codes_in(folder):
    return {
        n.removesuffix(".weight")
        for n, t in load_file(folder / "model.safetensors").items()
        if t.dtype == torch.int8
    }


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@EACH
def test_it_loads_as_it_was_here_and_as_its_codes_say_in_transformers(name, tmp_path):
    model, inputs, result = converted(name, tmp_path)
    tables = {n for n, m in result.model.named_modules() if isinstance(m, Int8Embedding)}
    assert len(tables) == CASES[name][2] and block_of(tmp_path)["quant_method"] == "compressed-tensors"
    loaded = mq.load(tmp_path)
    assert {n for n, m in loaded.named_modules() if isinstance(m, Int8Embedding)} == tables
    out = run(result.model, inputs)
    assert torch.equal(run(loaded, inputs), out)

    # the float model with the weights that the codes in the file stand for
    exact, state = copy.deepcopy(model), load_file(tmp_path / "model.safetensors")
    for module in codes_in(tmp_path):
        values = state[f"{module}.weight"].float() * state[f"{module}.weight_scale"].float()
        layer = exact.get_submodule(module)
        layer.weight = nn.Parameter(values.to(layer.weight.dtype))
    expected = run(exact, inputs)
    config = hf.CompressedTensorsConfig(dequantize=True)
    theirs, info = type(model).from_pretrained(tmp_path, quantization_config=config, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert relative_error(expected, run(theirs.eval(), inputs)) < 1e-6
    # kept in int8 until the first call, which then rounds activations as we do
    theirs, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    bound = 2 * max(relative_error(expected, out), 1e-4)
    assert relative_error(expected, run(theirs.eval(), inputs)) <= bound


@EACH
def test_compressed_tensors_finds_what_is_int8_and_nothing_else_with_and_without_head(name, tmp_path):
    model, _, _ = converted(name, tmp_path)
    codes, headless = codes_in(tmp_path), copy.deepcopy(model.base_model)
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    inner = {n.removeprefix(prefix) for n in codes if n.startswith(prefix)}
    for part, names in ((model, codes), (headless, inner)):
        apply_quantization_config(part, QuantizationConfig.model_validate(block_of(tmp_path)))
        schemes = {
            n: m.quantization_scheme for n, m in part.named_modules() if hasattr(m, "quantization_scheme")
        }
        assert schemes.keys() == names
        for module, scheme in schemes.items():
            is_table = isinstance(part.get_submodule(module), nn.Embedding)
            assert (scheme.input_activations is None) == is_table and scheme.format == "int-quantized"


def test_a_folder_without_int8_tables_has_one_group_and_the_card_tells(tmp_path):
    model = FAMILIES["bert"].build()
    told = {}
    for embeddings in (False, True):
        folder = mq.quantize(model, embeddings=embeddings, **QUIET).save(tmp_path / str(embeddings))
        told[embeddings] = (folder / "README.md").read_text()
        groups = block_of(folder)["config_groups"]
        assert groups.keys() == ({"group_0", "group_1"} if embeddings else {"group_0"})
    assert "vLLM 0.32 ran" in told[False] and "vLLM cannot read" not in told[False]
    assert "vLLM cannot read int8 embeddings" in told[True] and "vLLM 0.32 ran" not in told[True]
    assert all("library_name: transformers" in text for text in told.values())


def test_what_is_stored_in_half_precision_is_on_the_card_and_read_in_the_dtype_of_the_model(tmp_path):
    model, inputs = FAMILIES["bert"].build(), FAMILIES["bert"].inputs()
    result = mq.quantize(model, embeddings=True, kept="fp16", **QUIET)
    card = (result.save(tmp_path) / "README.md").read_text()
    assert "Matrices that stay in float are stored in float16." in card and "| float16 |" in card
    assert "kept='fp16'" in card
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    theirs = type(model).from_pretrained(tmp_path).eval()
    out = run(theirs, inputs)
    assert {p.dtype for p in theirs.parameters() if p.is_floating_point()} == {torch.float32}
    assert relative_error(run(result.model, inputs), out) < 0.01


# what compressed-tensors itself writes


def test_a_checkpoint_of_compressed_tensors_with_int8_tables_loads_as_int8(tmp_path, caplog):
    inputs = FAMILIES["bert"].inputs()
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    inner = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    for targets in (["Embedding"], ["re:.*embeddings$"], ["bert.embeddings.word_embeddings"]):
        model = FAMILIES["bert"].build()
        tables = {"targets": targets, "weights": weights, "format": "int-quantized"}
        groups = {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": inner,
                "format": "int-quantized",
            }
        }
        block = {"config_groups": groups | {"group_1": tables}, "ignore": ["classifier"]}
        apply_quantization_config(model, QuantizationConfig.model_validate(block))
        for module in model.modules():
            if hasattr(module, "quantization_scheme"):
                low, high = module.weight.detach().aminmax(dim=1, keepdim=True)
                scale, zero = calculate_qparams(low, high, module.quantization_scheme.weights)
                module.weight_scale.data, module.weight_zero_point.data = scale, zero
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        folder = tmp_path / str(len(targets[0]))
        model.save_pretrained(folder)
        compressor.update_config(folder)
        caplog.clear()
        loaded = mq.load(folder)
        assert [r.getMessage() for r in caplog.records if r.name.startswith("mono_quant")] == []
        state = load_file(folder / "model.safetensors")
        held = {n: t for n, t in loaded.state_dict().items() if t.dtype == torch.int8}
        assert held.keys() == {f"{module}.weight" for module in codes_in(folder)}
        # flat in a state dict, so that no float model is filled with them
        assert [n for n, t in held.items() if not torch.equal(t, state[n].flatten())] == []
        assert any(isinstance(m, Int8Embedding) for m in loaded.modules())
        theirs = type(FAMILIES["bert"].build()).from_pretrained(folder).eval()
        assert relative_error(run(theirs, inputs), run(loaded, inputs)) < 0.01


# projections that are one in the model: q, k and v, or the gate and what it gates

FUSED = {
    "ModernBertForMaskedLM": (hf.ModernBertConfig, {**transformer, **SPECIAL, "cls_token_id": 1, "sep_token_id": 2}, {"Wqkv", "Wi", "Wo"}),
    "GPTNeoXForCausalLM": (hf.GPTNeoXConfig, transformer, {"query_key_value", "dense"}),
    "FalconForCausalLM": (hf.FalconConfig, transformer, {"query_key_value", "dense"}),
    "BloomForCausalLM": (hf.BloomConfig, {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 200}, {"query_key_value"}),
    "Phi3ForCausalLM": (hf.Phi3Config, {**transformer, **SPECIAL}, {"qkv_proj", "gate_up_proj"}),
    "DebertaModel": (hf.DebertaConfig, transformer | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, {"in_proj", "pos_proj"}),
    "MptForCausalLM": (hf.MptConfig, {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 200}, {"Wqkv", "up_proj"}),
    "CodeGenForCausalLM": (hf.CodeGenConfig, {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 200, "rotary_dim": 8}, {"qkv_proj"}),
}  # fmt: skip


@pytest.mark.parametrize("name", FUSED)
def test_fused_projections_are_one_int8_layer_in_the_standard_layout(name, tmp_path):
    config, fields, fused = FUSED[name]
    model = seeded(lambda: getattr(hf, name)(config(**fields))).eval()
    result = mq.quantize(model, **QUIET)
    found = {row.module.rpartition(".")[2]: row.shape for row in result.report.quantized}
    assert fused <= found.keys() and {row.kind for row in result.report.quantized} == {"linear"}
    assert block_of(result.save(tmp_path))["quant_method"] == "compressed-tensors"
    ids = {"input_ids": torch.arange(3, 20)[None]}
    with torch.inference_mode():
        reference, out, loaded = (m(**ids)[0] for m in (model, result.model, mq.load(tmp_path)))
        theirs, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        there = theirs.eval()(**ids)[0]
    assert torch.equal(out, loaded)
    # both round what a token is to 8 bits or more
    assert relative_error(reference, there) <= 2 * relative_error(reference, out) < 0.1
