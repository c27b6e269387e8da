"""Compiling what a verb returned: the same model, saved and loaded as before."""

import torch
from encoders import ENCODERS
from models import bert, relative_error, run, seeded, snapshot, text

import mono_quant as mq


def test_a_compiled_result_saves_the_same_bytes_and_loads_compiled(tmp_path):
    torch.compiler.reset()
    result = mq.quantize(seeded(bert).eval(), "int8", fidelity=False)
    inputs = seeded(text)
    before = run(result.model, inputs)
    result.save(tmp_path / "before")
    result.compile(dynamic=False, fullgraph=True)
    assert relative_error(before, run(result.model, inputs)) < 0.02
    result.save(tmp_path / "after")
    files = [snapshot(tmp_path / name) for name in ("before", "after")]
    assert all(
        files[0][name] == files[1][name] for name in files[0] if name.endswith(("safetensors", "config.json"))
    )
    loaded = mq.load(tmp_path / "after", compile=True)
    assert type(loaded) is type(result.model) and loaded._compiled_call_impl is not None
    assert torch.equal(run(loaded, inputs), run(result.model, inputs))
    assert mq.load(tmp_path / "after")._compiled_call_impl is None


def test_an_encoder_encodes_compiled():
    torch.compiler.reset()
    result = mq.quantize(ENCODERS["mean"](), "int8", fidelity=False)
    sentences = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9 w10"]
    before = torch.as_tensor(result.model.encode(sentences))
    result.compile(dynamic=True)
    calls = []
    compiled = result.model._compiled_call_impl
    result.model._compiled_call_impl = lambda *args, **kwargs: calls.append(1) or compiled(*args, **kwargs)
    assert relative_error(before, torch.as_tensor(result.model.encode(sentences))) < 0.02
    assert calls == [1]
