"""Tensors of a model that are made one at a time, or in parts, have the bits that transformers' loader gives them."""

import pytest
import torch
import transformers as hf
from models import mixtral, qwen3_moe, seeded, transformer
from safetensors.torch import load_file
from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose

from mono_quant.hf.making import Made, Recipe
from mono_quant.hf.models import quiet, skeleton
from mono_quant.hf.names import on_meta, place

experts = {"num_key_value_heads": 2, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2}


def turned():
    config = hf.Qwen3VLMoeTextConfig(**transformer, **experts, moe_intermediate_size=48)
    return hf.Qwen3VLMoeTextModel(config)


def split():
    return hf.NomicBertModel(hf.NomicBertConfig(**transformer))


def tied():
    return hf.LlamaForCausalLM(hf.LlamaConfig(**transformer, tie_word_embeddings=True))


class Noted(dict):
    """Tensors of a checkpoint; notes what is read of them."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.read = []

    def __getitem__(self, name):
        self.read.append(name)
        return super().__getitem__(name)

    def part(self, name, start, stop):
        self.read.append((name, start, stop))
        return super().__getitem__(name)[start:stop]


def made_of(make, folder):
    model = seeded(make).eval()
    with quiet():
        model.save_pretrained(folder)
        theirs = type(model).from_pretrained(folder)
    held = Noted(load_file(folder / "model.safetensors"))
    bare = skeleton(type(model), model.config, torch.float32, "this")
    placed = place(bare, on_meta({name: (t.dtype, t.shape) for name, t in held.items()}))
    shapes = {name: t.shape for name, t in placed.tensors.items()}
    return Made(bare, placed.recipes, held, shapes), theirs.state_dict(), held


@pytest.mark.parametrize("make", [mixtral, qwen3_moe, turned, split, tied])
def test_every_tensor_is_what_the_loader_makes(make, tmp_path):
    made, expected, _ = made_of(make, tmp_path)
    assert set(made) >= expected.keys() - {"lm_head.weight"}
    for name in made:
        value = made[name]
        assert torch.equal(value, expected[name]) and value.stride() == expected[name].stride(), name
        if value.dim() > 1:
            assert torch.equal(made.part(name, 1, 3), expected[name][1:3]), name


@pytest.mark.parametrize("make", [mixtral, qwen3_moe])
def test_of_merged_experts_one_is_read_where_one_is_asked_for(make, tmp_path):
    made, _, held = made_of(make, tmp_path)
    name = next(name for name in made if name.endswith("experts.gate_up_proj"))
    made.part(name, 2, 3)
    assert len(held.read) == 2 and all(".experts.2." in key for key in held.read)
    assert made.is_cheap_in_parts(name)


def test_an_operation_that_mixes_parts_is_made_whole(tmp_path):
    parts = tuple((f"{side}.{i}", side) for side in "ab" for i in range(3))

    class Conversion:
        def __init__(self, *operations):
            self.operations = operations

    stacks = [[MergeModulelist(0)], [MergeModulelist(0), Concatenate(1)]]
    mixed = [[MergeModulelist(1)], [MergeModulelist(0), Concatenate(0)], [Transpose(0, 1)], [Concatenate(1)]]
    for operations in [*stacks, *mixed]:
        assert Recipe("x", parts, Conversion(*operations)).is_stack() == (operations in stacks)
    assert not Recipe("x", parts[:1]).is_stack()
    assert Recipe("x", parts, Conversion(*stacks[0])).part(1).parts == (("a.1", "a"), ("b.1", "b"))
    made, expected, held = made_of(split, tmp_path)
    name = next(n for n in made if not made.is_cheap_in_parts(n))
    assert torch.equal(made.part(name, 0, 2), expected[name][:2]) and len(held.read) == 1
