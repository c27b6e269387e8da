"""A forward that asks for its own dtype, which transformers reads off one parameter, gets the dtype of the arithmetic."""

import pytest
import torch
import transformers as hf
from models import relative_error, run, seeded
from safetensors.torch import load_file
from torch import nn

import mono_quant as mq
from mono_quant.planning.forward_code import dtypes_asked_for

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 100,
}


def layoutlm():
    return hf.LayoutLMForMaskedLM(hf.LayoutLMConfig(**SIZES))


def markuplm():
    return hf.MarkupLMForTokenClassification(hf.MarkupLMConfig(**SIZES))


def openai_gpt():
    return hf.OpenAIGPTLMHeadModel(
        hf.OpenAIGPTConfig(vocab_size=100, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    )


def xlnet():
    return hf.XLNetLMHeadModel(hf.XLNetConfig(vocab_size=100, d_model=32, n_layer=2, n_head=2, d_inner=64))


@pytest.mark.parametrize("make", [layoutlm, markuplm, openai_gpt, xlnet])
def test_a_float16_form_of_it_runs_in_float32(make, tmp_path):
    model = seeded(make).eval()
    assert any(dtypes_asked_for(module) for module in model.modules())
    ids = torch.arange(3, 19).view(2, 8)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    result = mq.quantize(model, "fp16", fidelity=False)
    # the same values in float32: only the order of sums differs
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    expected, output = run(model, inputs), run(result.model, inputs)
    assert relative_error(expected, output) < 64 * 2.0**-24 * len(result.report.quantized)
    folder = result.save(tmp_path / "out")
    stored = load_file(folder / "model.safetensors")
    matrices = {name for name, tensor in stored.items() if tensor.dim() == 2}
    assert {stored[name].dtype for name in matrices & {r.name for r in result.report.quantized}} == {
        torch.float16
    }
    assert torch.equal(run(mq.load(folder), inputs), output)


def test_a_class_that_does_not_ask_keeps_its_tables_in_float16():
    model = mq.quantize(hf.BertModel(hf.BertConfig(**SIZES)), "fp16", fidelity=False).model
    assert not any(dtypes_asked_for(module) for module in model.modules())
    assert model.embeddings.word_embeddings.stored("weight").dtype == torch.float16


class Inner(hf.PreTrainedModel):
    """A part that is a model too, behind a matrix as large as its inputs."""

    config_class = hf.BertConfig

    def __init__(self, config):
        super().__init__(config)
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.post_init()

    def forward(self, x):
        return self.second(self.first(x))


class Outer(nn.Module):
    """Rounds what it is given to the dtype of its part."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = Inner(hf.BertConfig(**SIZES)), nn.Linear(64, 64)

    def forward(self, x):
        return self.head(self.inner(x.to(self.inner.dtype)))


def test_the_dtype_of_a_part_is_that_of_the_arithmetic_too():
    """Nemotron's transcriber casts its features to `self.asr_encoder.dtype`."""
    model, x = seeded(Outer), seeded(lambda: torch.randn(2, 5, 64))
    assert dtypes_asked_for(model) == [model.inner] and not dtypes_asked_for(model.inner)
    converted = mq.quantize(model, "fp16", fidelity=False).model
    assert converted.inner.dtype == torch.float32
    assert converted.inner.second.stored("weight").dtype == torch.float16
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
        assert relative_error(model(x), converted(x)) < 8 * 2.0**-24 * 3
