"""Models come back as they were filled, also where transformers initialises a part of them again."""

import pytest
import torch
import transformers as hf
from models import seeded
from safetensors.torch import load_file

import mono_quant as mq
from mono_quant.errors import CorruptCheckpointError
from mono_quant.hf.models import computed_buffers

TABLE = "text_model.embeddings.word_embeddings.weight"


def chinese_clip():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text, vision = {**sizes, "vocab_size": 100}, {**sizes, "image_size": 32, "patch_size": 8}
    model = hf.ChineseCLIPModel(
        hf.ChineseCLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    )
    # a trained table may have a padding row that is not zero
    torch.nn.init.normal_(model.get_parameter(TABLE))
    return model.eval()


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
def test_a_padding_row_that_is_not_zero_outlives_loading(dtype, tmp_path):
    model = seeded(chinese_clip)
    model.save_pretrained(tmp_path / "float")
    assert hf.ChineseCLIPModel.from_pretrained(tmp_path / "float").get_parameter(TABLE)[0].eq(0).all(), (
        "transformers itself keeps the row now: the guard in hf/quantizer can go"
    )
    expected = model.get_parameter(TABLE).detach()
    for source, name in ((model, "memory"), (tmp_path / "float", "folder")):
        folder = mq.quantize(source, dtype, fidelity=False).save(tmp_path / name)
        stored = load_file(folder / "model.safetensors")[TABLE]
        assert torch.equal(stored, expected.to(stored.dtype))
        loaded = mq.load(folder).get_submodule(TABLE.removesuffix(".weight")).weight
        assert torch.equal(loaded.to(stored.dtype), stored)


def test_a_class_that_cannot_initialise_itself_is_named_with_its_own_words():
    class Unlucky(hf.BertModel):
        def _init_weights(self, module):
            raise ValueError("no\nluck")

    model = hf.BertModel(
        hf.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    )
    model.__class__ = Unlucky
    with pytest.raises(
        CorruptCheckpointError, match=r"^Unlucky: transformers cannot initialise it \(no luck\)$"
    ):
        computed_buffers(model, torch.float32)
