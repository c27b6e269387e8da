"""What a report still says of a model that somebody changed after the conversion."""

import copy
import json

import pytest
import torch
from models import FAMILIES, run, snapshot

import mono_quant as mq


def notes(folder):
    report = json.loads((folder / "mono_quant_report.json").read_text())
    return report["fidelity"], " ".join(report["notes"])


CHANGES = {
    "a head is zeroed": lambda m: m.lm_head.weight.data.zero_(),
    "a norm is trained": lambda m: m.model.norm.weight.data.mul_(1.01),
    "a table is replaced": lambda m: setattr(
        m.model.embed_tokens, "weight", torch.nn.Parameter(torch.randn(m.model.embed_tokens.weight.shape))
    ),
    "codes are averaged": lambda m: dict(m.model.layers[0].mlp.up_proj.named_parameters())[
        "weight"
    ].data.mul_(2),
    "scales are changed": lambda m: m.model.layers[0].mlp.up_proj.weight_scale.data.mul_(2),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("way", ["converted", "loaded", "copied"])
def test_a_value_that_was_changed_takes_the_measured_fidelity_off_the_card(what, way, tmp_path):
    result = mq.quantize(FAMILIES["llama"].build())
    folder = result.save(tmp_path / "first")
    model = {"converted": result.model, "loaded": mq.load(folder), "copied": copy.deepcopy(result.model)}[way]
    CHANGES[what](model)
    model.save_pretrained(tmp_path / "changed")
    fidelity, said = notes(tmp_path / "changed")
    assert fidelity is None and "changed after the conversion" in said
    assert notes(folder)[0] is not None
    inputs = FAMILIES["llama"].inputs()
    assert torch.equal(run(mq.load(tmp_path / "changed"), inputs), run(model, inputs))
    mq.verify(tmp_path / "changed")


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "bert", "cnn"])
@pytest.mark.parametrize("dtype", ["int8", "fp16"])
def test_what_nobody_changed_is_saved_as_it_was(name, dtype, tmp_path):
    result = mq.quantize(FAMILIES[name].build(), dtype)
    first = result.save(tmp_path / "first")
    run(result.model, FAMILIES[name].inputs())
    again = result.save(tmp_path / "again")
    assert snapshot(first) == snapshot(again)
    assert result.card() == (first / "README.md").read_text(encoding="utf-8")
