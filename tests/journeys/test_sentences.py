"""A model of sentence-transformers goes in by folder or id, and comes out as one, with its modules and its answers."""

import pytest
import torch
from encoders import ENCODERS, answers
from models import snapshot

import mono_quant as mq
from mono_quant.convert.int8_layers import Int8Module

KINDS = pytest.mark.parametrize("name", ENCODERS)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of the encoders, as sentence-transformers writes them, with the encoder."""
    known = {}

    def make(name):
        if name not in known:
            model, folder = ENCODERS[name](), tmp_path_factory.mktemp(name) / "float"
            model.save_pretrained(str(folder), create_model_card=False)
            known[name] = model, folder
        return known[name]

    return make


@KINDS
def test_an_encoder_comes_back_as_what_it_was(made, name, tmp_path):
    model, folder = made(name)
    result = mq.quantize(folder, fidelity=False)
    assert type(result.model) is type(model)
    assert [type(m) for m in result.model.children()] == [type(m) for m in model.children()]
    expected = answers(result.model)
    assert torch.equal(expected, answers(mq.quantize(model, fidelity=False).model))

    out = result.save(tmp_path / "out")
    back = mq.load(out)

    assert type(back) is type(model)
    assert sum(isinstance(m, Int8Module) for m in back.modules()) == len({
        row.module for row in result.report.quantized
    })
    assert torch.equal(answers(back), expected)
    assert snapshot(mq.QuantizedModel.from_folder(out).save(tmp_path / "again")) == snapshot(out)


@KINDS
def test_the_plan_of_a_folder_says_what_becomes_of_it(made, name):
    _, folder = made(name)
    planned, done = mq.plan(folder), mq.quantize(folder, fidelity=False).report
    told = [
        [
            (r.name, r.module, r.kind, r.shape, r.dtype_before, r.dtype_after, r.action, r.reason)
            for r in report.rows
        ]
        for report in (planned, done)
    ]
    assert told[0] == told[1]
