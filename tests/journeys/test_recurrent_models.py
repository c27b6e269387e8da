"""Transformers models with recurrent layers: EnCodec's LSTM, Parakeet's decoder, and the GRU cell that SLANet's own loop drives."""

import json

import pytest
import torch
import transformers as hf
from models import relative_error, seeded
from torch import nn

import mono_quant as mq
from mono_quant.convert.int8_recurrent import Int8GRUCell, Int8LSTM

pytestmark = pytest.mark.filterwarnings("ignore:.*blank_token_id")
QUIET = {"fidelity": False}


def encodec():
    config = hf.EncodecConfig(
        num_filters=8, upsampling_ratios=[4, 2], codebook_size=64, codebook_dim=32, hidden_size=32, target_bandwidths=[24.0]
    )  # fmt: skip
    return hf.EncodecModel(config).eval()


def parakeet():
    encoder = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 512}
    config = hf.ParakeetRNNTConfig(
        vocab_size=12,
        decoder_hidden_size=32,
        blank_token_id=11,
        encoder_config={**encoder, "num_mel_bins": 16},
    )
    return hf.ParakeetForRNNT(config).eval()


def slanet_head():
    config = hf.SLANetConfig(post_conv_out_channels=48, out_channels=20, hidden_size=64, max_text_length=7)
    return hf.SLANetSLAHead(config).eval()


def audio(model):
    return model.decoder(model.encoder(seeded(lambda: torch.randn(1, 1, 400))))


def text(model):
    return model.decoder(torch.tensor([[3, 1, 4, 1, 5]]))


def table(model):
    return model(seeded(lambda: torch.randn(2, 9, 48))).last_hidden_state


CASES = {
    "encodec": (encodec, audio, Int8LSTM, 2, {}),
    "parakeet": (parakeet, text, Int8LSTM, 1, {"disable_defaults": ["portable"]}),
    "slanet": (slanet_head, table, Int8GRUCell, 1, {"disable_defaults": ["portable"]}),
}


def equal(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_same_from_memory_from_a_folder_and_after_loading(name, tmp_path):
    make, run, cls, count, options = CASES[name]
    model = seeded(make)
    model.save_pretrained(tmp_path / "float")
    result = mq.quantize(model, **QUIET, **options)
    read = mq.quantize(tmp_path / "float", **QUIET, **options)
    layers = [module for module in result.model.modules() if isinstance(module, cls)]
    assert len(layers) == count and not any(
        isinstance(m, (nn.LSTM, nn.GRUCell)) for m in read.model.modules()
    )
    assert equal(result.model, read.model)
    facts = [[(r.name, r.action, r.reason, r.bytes_after) for r in x.report.rows] for x in (result, read)]
    assert facts[0] == facts[1]
    folder = read.save(tmp_path / "int8")
    assert (
        json.loads((folder / "config.json").read_bytes())["quantization_config"]["quant_method"]
        == "mono_quant"
    )
    loaded = mq.load(folder)
    assert equal(loaded, read.model)
    with torch.no_grad():
        assert torch.equal(run(loaded), run(result.model))
        assert 0 < relative_error(run(model), run(loaded)) < 0.05


def test_in_a_transformer_of_linear_layers_it_stays_float_so_that_others_can_load_the_folder(tmp_path):
    model = seeded(parakeet)
    result = mq.quantize(model, **QUIET)
    assert type(result.model.decoder.lstm) is nn.LSTM
    kept = {layer.name: layer for layer in result.report.kept_layers}["decoder.lstm"]
    assert kept.reason.startswith(
        "convolution, fused attention or recurrent layer in a transformer: int8 here would keep"
    )
    assert kept.weights == 4 * 4 * 32 * 32
    folder = result.save(tmp_path / "int8")
    assert (
        json.loads((folder / "config.json").read_bytes())["quantization_config"]["quant_method"]
        == "compressed-tensors"
    )


def test_transformers_converts_it_on_load_and_makes_it_float_again(tmp_path):
    model = seeded(encodec)
    model.save_pretrained(tmp_path / "float")
    read = hf.AutoModel.from_pretrained(tmp_path / "float", quantization_config=mq.MonoQuantConfig())
    assert equal(read, mq.quantize(model, **QUIET).model)
    weights = {
        name: layer._flat_weights for name, layer in read.named_modules() if isinstance(layer, Int8LSTM)
    }
    with torch.no_grad():
        before, back = audio(read), read.dequantize()
        for name, expected in weights.items():
            assert type(back.get_submodule(name)) is nn.LSTM
            assert all(
                torch.equal(a, b)
                for a, b in zip(back.get_submodule(name)._flat_weights, expected, strict=True)
            )
        # what is left is the rounding of activations
        assert 0 < relative_error(before, audio(back)) < 0.02
