"""Whole models with experts on the kernels of a GPU: the bits of the reference, in eager mode and as one graph."""

import pytest
import torch
import transformers as hf

pytest.importorskip("triton")

from coded import DEVICE

import mono_quant
from mono_quant import kernels
from mono_quant.kernels.gpu import path

SIZES = {
    "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": 16, "vocab_size": 20, "max_position_embeddings": 64, "hidden_act": "relu",
}  # fmt: skip
# on a device what is not ours has other bits than on a CPU: both run there
REFERENCE, KERNELS = ({"path" if DEVICE.type == "cpu" else "gpu": name} for name in ("reference", "triton"))


def mixtral():
    return hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))


def qwen3_moe():
    more = {"moe_intermediate_size": 16, "num_experts": 6, "num_experts_per_tok": 3}
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**SIZES, **more))


@pytest.mark.parametrize("make", [mixtral, qwen3_moe])
def test_whole_models_have_the_bits_of_the_reference(make, monkeypatch):
    model = make().eval()
    model = mono_quant.quantize(model, "int8", fidelity=False, disable_defaults=["small", "head"]).model
    model.to(DEVICE)
    ids, calls, run = torch.randint(0, 20, (1, 5), device=DEVICE), [], path.experts
    monkeypatch.setattr(path, "experts", lambda *args: calls.append(1) or run(*args))
    with torch.no_grad():
        with kernels.using(**REFERENCE, activations="int8"):
            expected = model(ids).logits
        with kernels.using(**KERNELS, activations="int8"):
            assert torch.equal(model(ids).logits, expected)
            torch._dynamo.reset()
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            assert torch.equal(compiled(ids).logits, expected)
    assert len(calls) == 2
