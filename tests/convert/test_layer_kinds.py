"""An int8 layer is of the kind that the layer was which it stands for: that says which axis of a weight is a row."""

import pytest
from models import FAMILIES

import mono_quant as mq
from mono_quant.convert.int8_layers import Int8Module
from mono_quant.planning.kinds import kind_of

KINDS = {
    "llama": {"linear", "embedding"},
    "gpt2": {"conv1d_transposed", "embedding"},
    "mixtral": {"linear", "embedding", "experts"},
    "attention": {"attention", "linear"},
    "cnn": {"conv2d", "linear"},
    "lstm": {"lstm", "embedding", "linear"},
}


@pytest.mark.parametrize("name", KINDS)
def test_every_replaced_layer_keeps_its_kind(name):
    model = FAMILIES[name].build()
    result = mq.quantize(model, embeddings=True, fidelity=False)
    found = {n: m.kind for n, m in result.model.named_modules() if isinstance(m, Int8Module)}
    assert found == {n: kind_of(model.get_submodule(n)) or "linear" for n in found}
    assert len(set(found.values())) == len(KINDS[name]), found
