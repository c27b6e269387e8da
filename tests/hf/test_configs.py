"""What is written as config.json: the source's own words, what has changed since, and what older readers look for."""

import copy

import pytest
import transformers as hf

from mono_quant.errors import CorruptCheckpointError
from mono_quant.hf.configs import config_to_write, dtype_of

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 200}


def read(raw):
    return hf.CONFIG_MAPPING[raw["model_type"]].from_dict(copy.deepcopy(raw))


ROPES = {
    "plain": ({"model_type": "llama", **SIZES, "rope_theta": 5e5}, {"rope_theta": 5e5}),
    "scaled": (
        {"model_type": "llama", **SIZES, "rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ),
    "partial": ({"model_type": "phi", **SIZES, "rope_theta": 2e4, "partial_rotary_factor": 0.25},
                {"rope_theta": 2e4, "partial_rotary_factor": 0.25}),
    "neox": ({"model_type": "gpt_neox", **SIZES, "rotary_emb_base": 2000, "rotary_pct": 0.5},
             {"rotary_emb_base": 2000, "rotary_pct": 0.5}),
    "layered": ({"model_type": "gemma3_text", **SIZES, "rope_theta": 2e6, "rope_local_base_freq": 2e4},
                {"rope_theta": 2e6, "rope_local_base_freq": 2e4}),
    "modernbert": ({"model_type": "modernbert", **SIZES, "global_rope_theta": 2e5, "local_rope_theta": 2e4},
                   {"global_rope_theta": 2e5, "local_rope_theta": 2e4}),
    "experts": ({"model_type": "qwen3_moe", **SIZES, "num_experts": 6}, {"num_experts": 6, "num_local_experts": 6}),
}  # fmt: skip


@pytest.mark.parametrize("case", ROPES)
def test_a_config_without_a_file_names_what_transformers_4_looks_for(case):
    raw, expected = ROPES[case]
    config = read(raw)
    written = config_to_write(config, None, "bfloat16")
    assert {k: written[k] for k in expected} == expected
    assert written["rope_parameters"] == config.rope_parameters
    assert (written["dtype"], written["torch_dtype"]) == ("bfloat16", "bfloat16")
    again = read(written)
    assert again.to_dict() | {"dtype": None} == config.to_dict() | {"dtype": None}


def test_a_model_without_rotation_gets_no_such_key():
    written = config_to_write(hf.BertConfig(**SIZES), None, "float32")
    assert not [k for k in written if "rope" in k or "rotary" in k or k == "num_experts"]


@pytest.mark.parametrize("case", ROPES)
def test_an_unchanged_config_is_written_as_it_was_read(case):
    raw = {**ROPES[case][0], "transformers_version": "4.40.0", "made_up": {"dtype": "int4", "deep": [1]}}
    before = copy.deepcopy(raw)
    assert config_to_write(read(raw), raw, "float16") == before | {
        "dtype": "float16", "made_up": {"dtype": "float16", "deep": [1]}}  # fmt: skip
    assert raw == before


def test_the_dtype_of_the_file_stands_where_the_source_had_its_own():
    parts = {
        "text_config": {"model_type": "llama", **SIZES, "torch_dtype": "bfloat16"},
        "vision_config": {"torch_dtype": None},
    }
    raw = {"model_type": "llava", "torch_dtype": "bfloat16", **parts}
    written = config_to_write(read(raw), raw, "float16")
    assert written["torch_dtype"] == "float16" and "dtype" not in written
    assert written["text_config"] == {**parts["text_config"], "torch_dtype": "float16"}
    assert written["vision_config"] == {"torch_dtype": None}


def test_a_changed_value_replaces_every_older_word_for_it():
    raw = {"model_type": "qwen3_moe", **SIZES, "rope_theta": 5e5, "num_experts": 6, "num_experts_per_tok": 2,
           "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4.0}}  # fmt: skip
    config = read(raw)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 1e6}
    config.num_experts = 8
    written = config_to_write(config, raw, "float32")
    assert (written["rope_theta"], written["num_experts"], written["num_local_experts"]) == (1e6, 8, 8)
    assert "rope_scaling" not in written and written["num_experts_per_tok"] == 2
    again = read(written)
    assert (again.rope_parameters, again.num_experts) == (config.rope_parameters, 8)


def test_a_change_inside_a_part_leaves_the_rest_of_the_part():
    text = {"model_type": "llama", **SIZES, "rope_theta": 5e5, "made_up": 1}
    raw = {"model_type": "llava", "text_config": text, "image_token_index": 7}
    config = read(raw)
    config.text_config.vocab_size = 210
    written = config_to_write(config, raw, "float32")
    assert written == {**raw, "text_config": {**text, "vocab_size": 210}, "dtype": "float32"}


def test_a_value_that_was_taken_away_is_not_written():
    raw = {"model_type": "llama", **SIZES, "made_up": 1, "other": 2}
    config = read(raw)
    del config.made_up
    written = config_to_write(config, raw, "float32")
    assert "made_up" not in written and written["other"] == 2


def test_a_change_that_the_own_keys_cannot_express_is_written_in_new_ones():
    # both names stand for one value here, of which the older one would win
    raw = {"model_type": "gpt2", "hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 200}
    config = read(raw)
    config.n_embd = 128
    written = config_to_write(config, raw, "float32")
    assert read(written).n_embd == 128 and "hidden_size" not in written


@pytest.mark.parametrize("value", ["int8", "auto", "float99"])
def test_a_dtype_that_no_model_can_have_is_named_with_its_file(value, tmp_path):
    with pytest.raises(CorruptCheckpointError) as caught:
        dtype_of({"dtype": value}, tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)
    assert f"dtype is {value!r}" in str(caught.value)
    assert "save the model again" in str(caught.value)
