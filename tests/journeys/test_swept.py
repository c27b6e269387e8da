"""What `scripts/sweep` found in single architectures, each in several of its kind."""

import pytest
import torch
import transformers as hf
from models import relative_error, seeded

import mono_quant as mq

DTYPES = ("int8", "fp16")
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 200,
}
# the layer of full attention has heads of another size than the other
LAYERED = {
    **SIZES,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 4,
}
PER_LAYER = {"vocab_size_per_layer_input": 200, "hidden_size_per_layer_input": 16}


def gemma4():
    return hf.Gemma4ForCausalLM(hf.Gemma4TextConfig(**LAYERED, **PER_LAYER))


def gemma4_unified():
    return hf.Gemma4UnifiedForCausalLM(hf.Gemma4UnifiedTextConfig(**LAYERED))


def embedding_gemma2():
    return hf.EmbeddingGemma2TextModel(hf.EmbeddingGemma2TextConfig(**LAYERED, **PER_LAYER))


def flava():
    sizes = {k: v for k, v in SIZES.items() if k != "vocab_size"}
    config = hf.FlavaConfig(
        text_config=SIZES,
        image_config={**sizes, "image_size": 32, "patch_size": 8, "vocab_size": 200},
        multimodal_config=sizes,
        init_codebook=False,
        projection_dim=64,
        hidden_size=64,
    )
    return hf.FlavaForPreTraining(config)


def held(model):
    return {**model.state_dict(), **dict(model.named_buffers())}


def assert_loads_as_saved(result, folder):
    loaded = mq.load(result.save(folder))
    before, after = held(result.model), held(loaded)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name
    return loaded


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [gemma4, gemma4_unified, embedding_gemma2])
def test_a_config_whose_fields_differ_between_layers_is_written_and_read_back(make, dtype, tmp_path):
    model = seeded(make).eval()
    loaded = assert_loads_as_saved(mq.quantize(model, dtype, fidelity=False), tmp_path / "out")
    heads = [layer.head_dim for layer in loaded.config.per_layer_config]
    assert heads == [layer.head_dim for layer in model.config.per_layer_config] == [16, 32]


def test_biases_that_are_tied_stay_so_beside_int8_weights(tmp_path):
    """Four of FLAVA's heads share the bias of the int8 layer inside them, and no weight."""
    model = seeded(flava).eval()
    result = mq.quantize(model, disable_defaults=["head"], fidelity=False)
    ties = model.all_tied_weights_keys
    layers = {row.module for row in result.report.quantized}
    assert len(ties) == 4 and {source.rpartition(".")[0] for source in ties.values()} <= layers
    loaded = assert_loads_as_saved(result, tmp_path / "out")
    for target, source in ties.items():
        assert loaded.get_parameter(target) is loaded.get_parameter(source)


@pytest.mark.parametrize(("dtype", "options"), [("int8", {}), ("int8", {"embeddings": True}), ("fp16", {})])
def test_a_padding_row_that_is_not_zero_is_loaded_as_it_was_saved(dtype, options, tmp_path):
    """transformers' ChineseCLIP sets it to zero whenever it is loaded."""
    config = hf.ChineseCLIPTextConfig(**SIZES, pad_token_id=0)
    model = seeded(lambda: hf.ChineseCLIPTextModel(config)).eval()
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.normal_(generator=torch.Generator().manual_seed(1))
    assert_loads_as_saved(mq.quantize(model, dtype, fidelity=False, **options), tmp_path / "out")


@pytest.mark.parametrize("labels", [3, 12])
def test_a_loaded_model_is_saved_with_the_same_config(labels, tmp_path):
    """Of more than ten labels, the numbers are sorted as text in the file, whether they come from memory or from a file."""
    model = seeded(lambda: hf.BertForTokenClassification(hf.BertConfig(**SIZES, num_labels=labels))).eval()
    first = mq.quantize(model, "fp16", fidelity=False).save(tmp_path / "first")
    again = mq.QuantizedModel.from_folder(first).save(tmp_path / "again")
    assert (again / "config.json").read_bytes() == (first / "config.json").read_bytes()


@pytest.mark.parametrize("masked", [False, True])
def test_fp16_runs_where_a_model_makes_its_mask_in_its_own_dtype(masked):
    model = seeded(lambda: hf.LayoutLMForMaskedLM(hf.LayoutLMConfig(**SIZES))).eval()
    inputs = {"input_ids": torch.randint(3, 200, (2, 7), generator=torch.Generator().manual_seed(0))}
    if masked:
        inputs["attention_mask"] = torch.ones(2, 7, dtype=torch.long).index_fill_(1, torch.tensor([6]), 0)
    result = mq.quantize(model, "fp16", fidelity=False)
    with torch.no_grad():
        expected, output = model(**inputs).logits, result.model(**inputs).logits
    assert output.dtype == torch.float32
    # half a unit in the last place of weights and inputs of each matrix
    count = sum(len(row.shape) > 1 for row in result.report.quantized)
    assert relative_error(expected, output) < count * 2**-11


def test_a_class_that_reads_files_of_its_own_is_converted_in_memory_alone(tmp_path):
    """The decision models of transformers read a decision config too; what a folder does not keep is not promised."""
    text = {**SIZES, "num_key_value_heads": 2, "head_dim": 16, "layer_types": ["full_attention"] * 2}
    config = hf.JevConfig(text_config={"model_type": "qwen3_5_text", **text})
    model = seeded(lambda: hf.JevForDecision(config)).eval()
    model.save_pretrained(tmp_path / "float")
    for verb in (mq.plan, mq.quantize):
        with pytest.raises(mq.MonoQuantError, match=r"reads files of its own.*dynamic_quantize"):
            verb(tmp_path / "float")
    result = mq.quantize(model, fidelity=False)
    assert result.report.quantized
    with pytest.raises(mq.MonoQuantError, match="JevForDecision reads files of its own"):
        result.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
