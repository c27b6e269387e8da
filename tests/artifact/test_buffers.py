"""Buffers outside the state dict: how they come back."""

import pytest
import torch
import transformers as hf
from models import transformer
from torch import nn

from mono_quant.artifact.buffers import (
    Buffers,
    buffers_of,
    read_values,
    restore_,
    unsaved_buffers,
    write_values,
)
from mono_quant.convert.int8 import build, install_
from mono_quant.errors import CorruptCheckpointError
from mono_quant.io.disk.output import new_folder

fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
CONFIG = hf.Gemma3TextConfig(**transformer | {"hidden_size": 48, "num_hidden_layers": 1}, head_dim=16)
SCALE = "embed_tokens.embed_scale"


def gemma(dtype: torch.dtype = fp32) -> hf.Gemma3TextModel:
    return hf.Gemma3TextModel._from_config(hf.Gemma3TextConfig(**CONFIG.to_dict()), dtype=dtype)


def facts(found: Buffers) -> tuple[torch.dtype, dict[str, torch.dtype], list[str]]:
    return found.built, dict(found.casts), sorted(found.values)


def test_what_building_gives_back_is_not_written_down():
    assert facts(buffers_of(gemma(), fp32)) == (fp32, {}, [])
    assert facts(buffers_of(gemma(bf16), bf16)) == (bf16, {}, [])


def test_a_cast_after_building_is_named():
    model = gemma().half()
    assert facts(buffers_of(model, fp16)) == (fp32, dict.fromkeys(unsaved_buffers(model), fp16), [])


def test_what_was_changed_is_kept_by_value():
    model = gemma(bf16)
    model.embed_tokens.embed_scale.mul_(2)
    model.config.rope_parameters["sliding_attention"]["rope_theta"] = 7.0
    built, casts, values = facts(buffers_of(model, bf16))
    assert (built, casts, values[0]) == (bf16, {}, SCALE)
    assert values[1:] and all("inv_freq" in name for name in values[1:])


def test_a_model_that_cannot_be_built_again_keeps_all_by_value():
    class Needs(hf.Gemma3TextModel):
        def __init__(self, config, more):
            super().__init__(config)

    model = Needs(CONFIG, 1)
    assert facts(buffers_of(model, fp32)) == (fp32, {}, sorted(unsaved_buffers(model)))


@pytest.mark.parametrize("dtype", [fp32, bf16])
def test_int8_layers_that_read_as_another_dtype_than_most_are_named(dtype):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8).bfloat16())
    single = build(nn.Linear(8, 8).half(), "linear", None)
    assert buffers_of(single, dtype).casts == {"_float": fp16}
    install_(model, ["0", "1"])
    assert unsaved_buffers(model) == {}
    other = {fp32: {"1._float": bf16}, bf16: {"0._float": fp32}}
    assert facts(buffers_of(model, dtype)) == (fp32, other[dtype], [])


def test_what_no_file_can_hold_is_left_to_the_users_module(tmp_path):
    model = nn.Linear(2, 2)
    for name, values in {
        "wide": torch.ones(2, dtype=torch.complex128),
        "few": torch.eye(2).to_sparse(),
        "empty": torch.ones(0),
        "narrow": torch.ones(2, dtype=torch.complex64),
    }.items():
        model.register_buffer(name, values, persistent=False)
    with new_folder(tmp_path / "out") as folder:
        write_values(folder, buffers_of(model, fp32).values)
    assert read_values(tmp_path / "out").keys() == {"empty", "narrow"}
    assert torch.equal(read_values(tmp_path / "out")["narrow"], model.narrow)


def test_without_buffers_there_is_no_file(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        write_values(folder, buffers_of(nn.Linear(2, 2), fp32).values)
    assert read_values(tmp_path / "out") == {} and folder.files == {}


def test_an_integer_table_of_another_dtype_is_kept_by_value():
    model = hf.BertModel(hf.BertConfig(**transformer))
    model.embeddings.position_ids = model.embeddings.position_ids.int()
    assert facts(buffers_of(model, fp32)) == (fp32, {}, ["embeddings.position_ids"])


def test_buffers_come_back_by_name():
    model = gemma()
    restore_(model, {SCALE: fp16}, {"rotary_emb.sliding_attention_inv_freq": torch.ones(3)})
    assert model.embed_tokens.embed_scale.dtype == fp16
    assert torch.equal(model.rotary_emb.sliding_attention_inv_freq, torch.ones(3))
    assert "rotary_emb.sliding_attention_inv_freq" not in model.state_dict()
    for casts, values in (({"x.y": fp32}, {}), ({}, {"x.y": torch.ones(3)})):
        with pytest.raises(
            CorruptCheckpointError, match=r"mono_quant.json names x\.y, which Gemma3TextModel does not have"
        ):
            restore_(model, casts, values)


def test_the_file_lies_where_older_and_newer_versions_look_for_it(tmp_path):
    model = nn.Module()
    model.register_buffer("table", torch.ones(2, 2), persistent=False)
    with new_folder(tmp_path / "out") as folder:
        write_values(folder, {"table": model.table})
    assert set(folder.files) == {"mono_quant_buffers/model.safetensors"}
    assert (tmp_path / "out" / "mono_quant_buffers" / "model.safetensors").is_file()
