"""What a class computes for itself, on a skeleton."""

import math

import torch
import transformers as hf
from models import transformer

from mono_quant.hf.computed import INITIALIZED, computed_on
from mono_quant.hf.models import skeleton

CONFIG = hf.Gemma3TextConfig(**transformer | {"hidden_size": 48, "num_hidden_layers": 1}, head_dim=16)
SWIN = hf.Swinv2Config(image_size=16, patch_size=4, embed_dim=32, depths=[1], num_heads=[2], window_size=4)
TABLE = "encoder.layers.0.blocks.0.attention.self.relative_coords_table"


def test_buffers_are_computed_and_the_skeleton_stays_as_it_was():
    bare = skeleton(hf.Gemma3TextModel, CONFIG, torch.bfloat16, "x")
    tensors = {n: id(t) for n, t in [*bare.named_parameters(), *bare.named_buffers()]}
    marks = [vars(x).get(INITIALIZED) for x in [*bare.modules(), *bare.parameters(), *bare.buffers()]]
    state = torch.random.get_rng_state()

    with torch.device("meta"):
        found = computed_on(bare)

    assert found.keys() == {n for n, _ in bare.named_buffers()} - bare.state_dict().keys()
    assert torch.equal(found["embed_tokens.embed_scale"], torch.tensor(math.sqrt(48)).bfloat16())
    assert all(buffer.device.type == "cpu" for buffer in found.values())
    assert {n: id(t) for n, t in [*bare.named_parameters(), *bare.named_buffers()]} == tensors
    assert [vars(x).get(INITIALIZED) for x in [*bare.modules(), *bare.parameters(), *bare.buffers()]] == marks
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32


def test_buffers_have_the_values_of_the_dtype_that_the_class_is_built_in():
    for dtype in (torch.float32, torch.float16):
        expected = hf.Swinv2Model(SWIN).to(dtype).get_buffer(TABLE)
        found = computed_on(skeleton(hf.Swinv2Model, SWIN, dtype, "x"))
        assert found[TABLE].dtype == dtype and torch.equal(found[TABLE], expected)
