"""What a model is run on when its output is measured: shapes from its config, values from a fixed seed."""

from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from models import FAMILIES, seeded, tiny_llama, transformer
from torch import nn

from mono_quant.convert.probes import SENTENCES, ProbeError, given_probe, make_probe, probing

VISION = {k: v for k, v in transformer.items() if k != "vocab_size"}


def vit(**changes):
    return seeded(lambda: hf.ViTModel(hf.ViTConfig(**VISION | {"patch_size": 8} | changes)))


def wav2vec2():
    sizes = {"conv_dim": (8,), "conv_kernel": (10,), "conv_stride": (5,), "num_feat_extract_layers": 1}
    return hf.Wav2Vec2Model(hf.Wav2Vec2Config(**transformer, **sizes, num_conv_pos_embeddings=4))


def ast():
    config = hf.ASTConfig(**VISION, patch_size=16, max_length=64, num_mel_bins=32)
    return hf.ASTForAudioClassification(config)


def clip():
    parts = {
        "text_config": dict(transformer, eos_token_id=2),
        "vision_config": VISION | {"image_size": 32, "patch_size": 8},
    }
    return hf.CLIPModel(hf.CLIPConfig(**parts))


def llava():
    vision = hf.CLIPVisionConfig(**VISION, image_size=32, patch_size=8)
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**transformer), vision_config=vision, image_token_id=199
    )
    return hf.LlavaForConditionalGeneration(config)


SHAPES = {
    "text and images": (
        clip,
        {"input_ids": (2, 32), "attention_mask": (2, 32), "pixel_values": (2, 3, 32, 32)},
        "2 of 4 x 32 random tokens with 2 noise images of 32 x 32",
    ),
    "text with image tokens": (
        llava,
        {"input_ids": (4, 32), "attention_mask": (4, 32)},
        "4 x 32 random tokens",
    ),
    "square images": (
        lambda: vit(image_size=32),
        {"pixel_values": (2, 3, 32, 32)},
        "2 noise images of 32 x 32",
    ),
    "other images": (
        lambda: vit(image_size=(16, 24), num_channels=1),
        {"pixel_values": (2, 1, 16, 24)},
        "2 noise images of 16 x 24",
    ),
    "waves": (wav2vec2, {"input_values": (2, 8000)}, "noise of 8,000 samples"),
    "spectrograms": (ast, {"input_values": (2, 64, 32)}, "2 noise spectrograms of 64 x 32"),
    "sound to text": (
        FAMILIES["whisper"].build,
        {"input_features": (1, 20, 80), "decoder_input_ids": (1, 8)},
        "noise of 80 frames",
    ),
    "text": (tiny_llama, {"input_ids": (4, 32), "attention_mask": (4, 32)}, "4 x 32 random tokens"),
    "short text": (
        lambda: tiny_llama(max_position_embeddings=10),
        {"input_ids": (4, 10), "attention_mask": (4, 10)},
        "4 x 10 random tokens",
    ),
    "text to text": (
        FAMILIES["t5"].build,
        {"input_ids": (4, 32), "attention_mask": (4, 32), "decoder_input_ids": (4, 8)},
        "4 x 32 random tokens",
    ),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_the_config_tells_the_shapes_and_the_report_names_them(kind):
    make, shapes, name = SHAPES[kind]
    model = make().eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        probe = make_probe(model, None)
        torch.manual_seed(2)
        again = make_probe(model, None)
    assert {n: tuple(t.shape) for n, t in probe.kwargs.items()} == shapes
    assert (probe.args, probe.name) == ((), name)
    assert all(torch.equal(probe.kwargs[n], again.kwargs[n]) for n in shapes), (
        "the numbers of two runs differ"
    )


def test_images_of_unknown_size_are_those_of_most_models():
    model = tiny_llama()
    model.main_input_name = "pixel_values"
    assert make_probe(model, None).kwargs["pixel_values"].shape == (2, 3, 224, 224)


def test_noise_is_normal():
    pixels = make_probe(vit(image_size=224), None).kwargs["pixel_values"]
    assert abs(float(pixels.mean())) < 0.01 and abs(float(pixels.std()) - 1) < 0.01


@pytest.mark.parametrize(("pad", "end"), [(0, 1), (1, 0), (3, 2), (None, 3), (2, None), (None, None)])
def test_random_tokens_hold_no_special_one_and_most_others(pad, end):
    sizes = {**transformer, "vocab_size": 4, "bos_token_id": None}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, pad_token_id=pad, eos_token_id=end))
    probe = make_probe(model, None)
    assert set(probe.kwargs["input_ids"].unique().tolist()) == {0, 1, 2, 3} - {pad, end}
    assert probe.kwargs["attention_mask"].eq(1).all()
    assert probe.mask.dtype == torch.bool and probe.mask.all() and probe.mask.shape == (4, 32)


def test_the_last_token_of_what_is_translated_is_its_end_and_the_answer_starts_as_the_config_says():
    t5, bart = FAMILIES["t5"].build(), FAMILIES["whisper"].build()
    ids = make_probe(t5, None).kwargs
    assert ids["input_ids"].eq(t5.config.eos_token_id).nonzero()[:, 1].tolist() == [31] * 4
    t5.config.decoder_start_token_id = 5
    assert make_probe(t5, None).kwargs["decoder_input_ids"][:, 0].tolist() == [5] * 4
    t5.config.decoder_start_token_id = None
    assert make_probe(t5, None).kwargs["decoder_input_ids"][:, 0].tolist() == [0] * 4
    assert make_probe(bart, None).kwargs["decoder_input_ids"][:, 0].tolist() == [1]


class Tokenizer:
    """Tells `calls` how it is called; an attribute of its own would be put back."""

    def __init__(self, pad_token, calls):
        self.pad_token, self._tell = pad_token, lambda *call: calls.append(call)

    def __call__(self, texts, **options):
        self._tell(texts, options)
        ids = torch.full((len(texts), 9), 7)
        mask = torch.ones_like(ids)
        mask[0, 6:] = 0
        return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(
    "wrap", [lambda t: t, lambda t: SimpleNamespace(tokenizer=t)], ids=["tokenizer", "processor"]
)
def test_sentences_are_padded_where_the_tokenizer_can_and_else_joined(wrap):
    for pad, texts in (("<pad>", list(SENTENCES)), (None, [" ".join(SENTENCES)])):
        calls = []
        probe = make_probe(tiny_llama(), wrap(Tokenizer(pad, calls)))
        options = {"return_tensors": "pt", "padding": pad is not None, "truncation": True, "max_length": 128}
        assert calls == [(texts, options)]
        assert probe.name == "12 built-in sentences"
        assert probe.mask.dtype == torch.bool and probe.mask.sum() == 9 * len(texts) - 3


def test_what_is_not_known_is_asked_for():
    with pytest.raises(ProbeError, match=r"a plain module's inputs are not known; pass probe=<inputs>"):
        make_probe(nn.Linear(2, 2), None)
    model = tiny_llama()
    model.main_input_name = "smells"
    with pytest.raises(ProbeError, match=r"inputs called smells are not known; pass probe=<inputs>"):
        make_probe(model, None)
    model.main_input_name = "input_features"
    with pytest.raises(
        ProbeError, match=r"names no num_mel_bins and max_source_positions; pass probe=<inputs>"
    ):
        make_probe(model, None)


def test_given_inputs_are_taken_as_they_are():
    x, mask = torch.ones(2, 3), torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert [(p.args, p.kwargs, p.mask) for p in (given_probe(x), given_probe((x, 5)), given_probe([x]))] == [
        ((x,), {}, None),
        ((x, 5), {}, None),
        ((x,), {}, None),
    ]
    probe = given_probe({"x": x, "attention_mask": mask})
    assert probe.args == () and probe.kwargs == {"x": x, "attention_mask": mask}
    assert torch.equal(probe.mask, mask.bool())
    assert given_probe({"x": x, "attention_mask": None}).mask is None


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("no /home/somebody/model.bin here", "no <path> here"),
        ("at C:\\Users\\somebody\\x and ~/y", "at <path> and <path>"),
        ("a ratio of 3/4, and/or 1.5/2", "a ratio of 3/4, and/or 1.5/2"),
        ("two\n  lines", "two lines"),
        ("x" * 300, "x" * 200),
        ("", "ValueError"),
    ],
)
def test_a_foreign_message_becomes_a_line_that_may_be_published(text, public):
    with pytest.raises(ProbeError) as caught, probing("it failed"):
        raise ValueError(text)
    assert str(caught.value) == f"it failed: {public}"
