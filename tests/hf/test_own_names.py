"""A checkpoint that has the model's own names already, though a rule of transformers would change them."""

import json

import pytest
import torch
import transformers as hf
from models import FAMILIES, seeded, transformer
from safetensors.torch import save_file
from transformers.core_model_loading import WeightRenaming

import mono_quant as mq
from mono_quant.hf.names import place, plain_class, scales_follow

VISION = {k: v for k, v in transformer.items() if k != "vocab_size"} | {"image_size": 32, "patch_size": 8}


def dinov3():
    return hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**VISION))


def laguna():
    return hf.LagunaForCausalLM(hf.LagunaConfig(num_hidden_layers=2))


def deepseek_v4():
    return hf.DeepseekV4ForCausalLM(hf.DeepseekV4Config(num_hidden_layers=2))


@pytest.mark.parametrize(
    "make", [dinov3, laguna, deepseek_v4, *(FAMILIES[n].make for n in ("llama", "t5", "whisper"))]
)
def test_a_name_that_the_model_has_itself_stays_though_a_rule_would_change_it(make):
    with torch.device("meta"):
        model = make()
    state = model.state_dict()
    placed = place(model, state)
    assert placed.tensors.keys() == state.keys() and not placed.left and not placed.broken
    assert placed.sources == {name: (name,) for name in state}


def test_a_checkpoint_with_the_models_own_names_is_converted(tmp_path):
    """transformers saves DINOv3 under older names, but reads both."""
    model = seeded(dinov3).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    config = model.config.to_diff_dict() | {"architectures": ["DINOv3ViTModel"], "model_type": "dinov3_vit"}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    result = mq.quantize(tmp_path, fidelity=False)
    assert result.report.notes == () and mq.plan(tmp_path).rows
    same = mq.quantize(model, fidelity=False)
    assert result.report.rows == same.report.rows
    inputs = {"pixel_values": torch.ones(1, 3, 32, 32)}
    with torch.inference_mode():
        a, b = (m.model(**inputs).last_hidden_state for m in (result, same))
    assert torch.equal(a, b)


def test_conversions_that_scales_followed_are_those_of_transformers_below():
    renaming = WeightRenaming("a", "b")
    (followed,) = scales_follow([renaming], ["a"], ["a"])
    assert type(followed) is not WeightRenaming
    assert plain_class(followed) is plain_class(renaming) is WeightRenaming
