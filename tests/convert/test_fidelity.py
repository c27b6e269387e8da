"""What a model is measured with: inputs that it runs on, and a reason instead of an error where there are none."""

import pytest
import torch
import transformers as hf
from models import seeded, tiny_llama, transformer
from torch import nn

import mono_quant as mq
from mono_quant.convert.fidelity import Output, compare, run
from mono_quant.convert.probes import ProbeError, given_probe, make_probe
from mono_quant.errors import NonFiniteWeightError

VISION = {k: v for k, v in transformer.items() if k != "vocab_size"} | {"image_size": 32, "patch_size": 8}
TEXT = {**transformer, "bos_token_id": 1, "pad_token_id": 0, "eos_token_id": 2}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 200}
SIDES = {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 128))
}


def clip():
    return hf.CLIPModel(hf.CLIPConfig(text_config=TEXT, vision_config=VISION))


def siglip():
    return hf.SiglipModel(hf.SiglipConfig(text_config=TEXT, vision_config=VISION))


def captions():
    encoder = hf.ViTModel(hf.ViTConfig(**VISION))
    config = hf.GPT2Config(**GPT2, add_cross_attention=True, bos_token_id=0, eos_token_id=1)
    return hf.VisionEncoderDecoderModel(encoder=encoder, decoder=hf.GPT2LMHeadModel(config))


def spectrograms():
    sizes = {k: v for k, v in VISION.items() if k != "image_size"} | {"patch_size": 16}
    return hf.ASTForAudioClassification(hf.ASTConfig(**sizes, max_length=64, num_mel_bins=32))


def bart():
    config = hf.BartConfig(d_model=64, vocab_size=200, max_position_embeddings=64, num_labels=3, **SIDES)
    return hf.BartForSequenceClassification(config)


def t5():
    sizes = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4, "vocab_size": 200}
    return hf.T5ForSequenceClassification(hf.T5Config(**sizes, num_labels=3, decoder_start_token_id=0))


@pytest.mark.parametrize(
    ("make", "inputs", "name"),
    [
        (
            clip,
            {"input_ids", "attention_mask", "pixel_values"},
            "2 of 4 x 32 random tokens with 2 noise images of 32 x 32",
        ),
        (
            siglip,
            {"input_ids", "attention_mask", "pixel_values"},
            "2 of 4 x 32 random tokens with 2 noise images of 32 x 32",
        ),
        (captions, {"pixel_values", "decoder_input_ids"}, "2 noise images of 32 x 32"),
        (spectrograms, {"input_values"}, "2 noise spectrograms of 64 x 32"),
        (bart, {"input_ids", "attention_mask"}, "4 x 32 random tokens"),
        (t5, {"input_ids", "attention_mask"}, "4 x 32 random tokens"),
    ],
)
def test_each_kind_of_model_is_measured_with_inputs_of_its_own(make, inputs, name):
    model = seeded(make).eval()
    probe = make_probe(model, None)
    assert (probe.kwargs.keys(), probe.name) == (inputs, name)
    facts = mq.quantize(model).report.fidelity
    assert facts["probe"] == name and facts["relative_error"] < 0.1


class Tokenizer:
    """Answers with the same tokens for every text."""

    pad_token = "<pad>"

    def __call__(self, texts, **_):
        ids = torch.full((len(texts), 9), 7)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": ids}


def test_texts_and_images_come_in_pairs_that_the_model_takes():
    probe = make_probe(seeded(clip).eval(), Tokenizer())
    assert {n: len(v) for n, v in probe.kwargs.items()} == {
        "input_ids": 2,
        "attention_mask": 2,
        "pixel_values": 2,
    }
    assert probe.mask.shape == (2, 9)


def broken(error):
    class Broken(nn.Module):
        def forward(self, x):
            raise error

    return Broken()


ERRORS = [
    ZeroDivisionError("division by zero"),
    KeyError("no_such_key"),
    FileNotFoundError("there is no /home/somebody/file"),
    ImportError("no module"),
    NonFiniteWeightError("a weight is NaN"),
    StopIteration(),
    AssertionError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_whatever_a_model_raises_becomes_a_reason(error):
    with pytest.raises(ProbeError, match=r"^the model did not run on the given inputs: .") as caught:
        run(broken(error), given_probe(torch.zeros(1)))
    assert "/home" not in str(caught.value)


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_what_is_not_the_models_fault_is_not_hidden(error):
    with pytest.raises(type(error)):
        run(broken(error), given_probe(torch.zeros(1)))


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_a_tokenizer_that_fails_does_not_cost_the_conversion(error):
    class Failing(Tokenizer):
        def __call__(self, texts, **_):
            raise error

    report = mq.quantize(tiny_llama(), processor=Failing()).report
    assert report.quantized and report.fidelity is None
    assert report.fidelity_note.startswith("no inputs could be made: ")


def test_a_model_that_fails_does_not_cost_the_conversion(monkeypatch):
    def forward(self, **_):
        return 1 // 0

    monkeypatch.setattr(hf.LlamaForCausalLM, "forward", forward)
    report = mq.quantize(tiny_llama()).report
    assert report.quantized
    assert report.fidelity_note.startswith("the model did not run on 4 x 32 random tokens: integer division")


def test_outputs_that_cannot_be_compared_are_a_reason():
    with pytest.raises(ProbeError, match="the outputs could not be compared"):
        compare(Output("x", torch.ones(2, 3), torch.ones(4) > 0), Output("x", torch.ones(2, 3), None), "it")


class Answers(nn.Module):
    """Returns what it was made with."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer


A, B = torch.ones(2, 3), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("answer", "name", "values"),
    [
        *(({"other": A, key: B}, key, B) for key in ("logits", "last_hidden_state", "start_logits", "sentence_embedding")),
        ({"last_hidden_state": A, "logits": B}, "logits", B),
        ({"start_logits": A, "last_hidden_state": B}, "last_hidden_state", B),
        ({"logits": torch.tensor([1]), "last_hidden_state": B}, "last_hidden_state", B),
        ({"logits": None, "other": [torch.tensor([1]), {"deep": (B, A)}]}, "output", B),
        (A, "output", A),
        (("text", torch.tensor([1]), B), "output", B),
    ],
)  # fmt: skip
def test_the_output_that_is_compared_is_the_best_known_one_else_the_first_of_floats(answer, name, values):
    found = run(Answers(answer), given_probe(torch.zeros(1)))
    assert found.name == name and torch.equal(found.values, values)


def test_a_model_without_a_float_output_says_what_it_returned():
    with pytest.raises(ProbeError, match=r"the model returned str, which holds no float tensor to compare"):
        run(Answers("text"), given_probe(torch.zeros(1)))
