"""`save` and `push_to_hub` accept what `load` gives back, and refuse the rest before a byte is written, naming the remedy."""

import json
import re

import pytest
import torch
import transformers as hf
from models import bert, gpt2, llama, run, seeded, snapshot, t5, text, tiny_llama, transformer, vit, whisper
from torch import nn
from torch.nn.utils import parametrizations, prune

import mono_quant as mq
from mono_quant.artifact.facts import Manifest
from mono_quant.artifact.publishing import check_loads
from mono_quant.errors import ConfigError, CorruptCheckpointError, UnsupportedModelError

QUIET = {"fidelity": False}
BOTH = pytest.mark.parametrize("dtype", ["int8", "fp16"])


def differing(a, b):
    a, b = a.state_dict(), b.state_dict()
    return [
        n
        for n in a.keys() | b.keys()
        if n not in a or n not in b or a[n].dtype != b[n].dtype or not a[n].equal(b[n])
    ]


def qwen3():
    config = hf.Qwen3Config(**transformer, num_key_value_heads=2, head_dim=16)
    return hf.Qwen3ForCausalLM(config)


def new_head(model):
    model.classifier = nn.Linear(64, 7)


def drop(path):
    def change(model):
        del model.get_submodule(path)[-1]

    return change


def grow(model):
    model.resize_token_embeddings(210, mean_resizing=False)
    model.config.vocab_size = 200


def untie(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 1.5)


def tie(model):
    model.lm_head.weight = model.model.embed_tokens.weight


def shorten(model):
    drop("model.layers")(model)
    grow(model)


SAYABLE = {
    "head of bert": (bert, new_head, "classifier.weight is (7, 64) and should be (3, 64)", {"num_labels": 7}),
    "head of vit": (vit, new_head, "classifier.bias is (7,) and should be (3,)", {"num_labels": 7}),
    "layer of llama": (
        llama,
        drop("model.layers"),
        "model.layers.1.* would be missing",
        {"num_hidden_layers": 1},
    ),
    "layer of gpt2": (
        gpt2,
        drop("transformer.h"),
        "transformer.h.1.* would be missing",
        {"num_hidden_layers": 1},
    ),
    "layer of whisper": (
        whisper,
        drop("model.decoder.layers"),
        "model.decoder.layers.1.* would be missing",
        {"decoder_layers": 1},
    ),
    "layer of qwen3": (
        qwen3,
        drop("model.layers"),
        "model.layers.1.* would be missing",
        {"num_hidden_layers": 1, "layer_types": ["full_attention"]},
    ),
    "vocabulary": (llama, grow, "lm_head.weight is (210, 64) and should be (200, 64)", {"vocab_size": 210}),
    "two at once": (
        llama,
        shorten,
        "model.layers.1.* would be missing",
        {"num_hidden_layers": 1, "vocab_size": 210},
    ),
    "untied": (
        lambda: llama(tie_word_embeddings=True),
        untie,
        "model.embed_tokens.weight and lm_head.weight differ, and would be one",
        {"tie_word_embeddings": False},
    ),
    "tied": (
        llama,
        tie,
        "model.embed_tokens.weight and lm_head.weight are one, and would be two",
        {"tie_word_embeddings": True},
    ),
}


@BOTH
@pytest.mark.parametrize("name", SAYABLE)
def test_a_config_that_can_say_it_is_the_remedy(name, dtype, tmp_path):
    make, change, problem, values = SAYABLE[name]
    model = seeded(make).eval()
    seeded(lambda: change(model))
    result = mq.quantize(model, dtype, **QUIET)
    with pytest.raises(UnsupportedModelError, match=re.escape(problem)) as caught:
        result.save(tmp_path / "out")
    assert not list(tmp_path.iterdir())
    settings = dict(
        re.findall(r"result\.model\.config\.(\w+) = (.+?)(?= and |, and save again)", str(caught.value))
    )
    assert settings == {key: repr(value) for key, value in values.items()}
    for key, value in values.items():
        setattr(result.model.config, key, value)
    assert not differing(result.model, mq.load(result.save(tmp_path / "out")))


class Half(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


def dense(model):
    return model.bert.encoder.layer[0].intermediate.dense


def sequential(model):
    model.classifier = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))


def other_layer(model):
    layer = Half(64, 3)
    layer.load_state_dict(model.classifier.state_dict())
    model.classifier = layer


def other_activation(model):
    model.bert.encoder.layer[0].intermediate.intermediate_act_fn = nn.ReLU()


def narrow(model):
    model.bert.encoder.layer[0].attention.self.query = nn.Linear(64, 32)


LAYER = "bert.encoder.layer.0.intermediate.dense"
UNSAYABLE = {
    "a Sequential": (sequential, "classifier is a Sequential and would be a Linear", "Undo that"),
    "pruned": (
        lambda m: prune.l1_unstructured(dense(m), "weight", 0.3),
        f"{LAYER}.weight_mask, {LAYER}.weight_orig would be left out",
        "Make the pruning permanent: torch.nn.utils.prune.remove(layer, 'weight')",
    ),
    "weight norm": (
        lambda m: parametrizations.weight_norm(dense(m)),
        f"{LAYER}.weight would be missing",
        "Compute the weight once: parametrize.remove_parametrizations(layer, 'weight')",
    ),
    "a module more": (
        lambda m: m.add_module("extra", nn.Linear(64, 64)),
        "extra.bias, extra.weight would be left out",
        "Undo",
    ),
    "a parameter more": (
        lambda m: m.bert.register_parameter("gain", nn.Parameter(torch.ones(3))),
        "bert.gain would be left out",
        "Undo that",
    ),
    "a buffer more": (
        lambda m: m.bert.register_buffer("gain", torch.ones(3)),
        "bert.gain would be left out",
        "Undo that",
    ),
    "no bias": (
        lambda m: setattr(m.classifier, "bias", None),
        "classifier.bias would be missing",
        "Undo that",
    ),
    "a layer of another class": (other_layer, "classifier is a Half and would be a Linear", "Undo that"),
    "another activation": (
        other_activation,
        "intermediate_act_fn is a ReLU and would be a GELUActivation",
        "Undo that",
    ),
    "fewer heads in one layer": (narrow, "query.weight is (32, 64) and should be (64, 64)", "Undo that"),
}


@pytest.mark.parametrize("name", UNSAYABLE)
def test_what_no_config_can_say_is_refused(name, tmp_path):
    change, problem, remedy = UNSAYABLE[name]
    model = seeded(bert).eval()
    change(model)
    result = mq.quantize(
        model, "fp16" if name in ("a module more", "a layer of another class") else "int8", **QUIET
    )
    with pytest.raises(UnsupportedModelError, match=re.escape(problem)) as caught:
        result.save(tmp_path / "out")
    assert remedy in str(caught.value) and "load(folder, model=...)" in str(caught.value)
    assert not list(tmp_path.iterdir())
    # before the Hub is asked anything: there is none here
    with pytest.raises(UnsupportedModelError, match=re.escape(problem)):
        result.push_to_hub("me/model")


def test_the_remedies_for_computed_weights_work(tmp_path):
    model = seeded(bert).eval()
    prune.l1_unstructured(dense(model), "weight", 0.3)
    prune.remove(dense(model), "weight")
    result = mq.quantize(model, **QUIET)
    assert not differing(result.model, mq.load(result.save(tmp_path / "out")))


def test_what_loading_keeps_is_not_refused(tmp_path):
    model = seeded(bert).eval()
    model.set_attn_implementation("eager")
    model.dropout = nn.Identity()
    random = torch.get_rng_state()
    result = mq.quantize(model, **QUIET)
    folder = result.save(tmp_path / "bert")
    assert torch.equal(torch.get_rng_state(), random)
    assert not differing(result.model, mq.load(folder))


@pytest.mark.parametrize("options", [{}, {"disable_defaults": ["head"]}, {"embeddings": True}], ids=str)
def test_a_head_of_its_own_beside_a_config_that_always_ties_is_kept(options, tmp_path):
    """T5 1.1 and mT5: transformers unties what differs, and codes tie nothing."""
    model = seeded(t5).eval()
    untie(model)
    result = mq.quantize(model, **options, **QUIET)
    loaded = mq.load(result.save(tmp_path / "out"))
    assert not differing(result.model, loaded)
    inputs = seeded(text) | {"decoder_input_ids": torch.tensor([[3, 4, 5], [6, 7, 8]])}
    assert torch.equal(run(result.model, inputs), run(loaded, inputs))


class Doubled(hf.BertForSequenceClassification):
    """A class that only the user's code has; it computes something else."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output


def same_name(config):
    cls = type("BertForSequenceClassification", (Doubled,), {})
    return cls(config)


@BOTH
@pytest.mark.parametrize("make", [Doubled, same_name], ids=["own name", "name of a transformers class"])
def test_an_own_class_is_filled_by_load(make, dtype, tmp_path):
    config = hf.BertConfig(**transformer, num_labels=3)
    result = mq.quantize(seeded(lambda: make(config)).eval(), dtype, **QUIET)
    folder = result.save(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"only your code can build; pass it: load\("):
        mq.load(folder)
    loaded = mq.load(folder, lambda: make(hf.BertConfig.from_pretrained(folder)))
    assert type(loaded).__name__ == type(result.model).__name__ and not differing(result.model, loaded)
    inputs = seeded(text)
    assert torch.equal(run(result.model, inputs), run(loaded, inputs))
    check_loads(folder, Manifest.read(folder), result.model)
    loaded.save_pretrained(tmp_path / "other")
    again, first = snapshot(tmp_path / "other"), snapshot(folder)
    # the manifest has the dtype that the reader's code built the class in, which is the reader's
    assert {n for n in first.keys() | again.keys() if first.get(n) != again.get(n)} <= {"mono_quant.json"}


def test_a_part_that_transformers_does_not_name_is_filled_by_load(tmp_path):
    encoder = seeded(t5).eval().encoder
    result = mq.quantize(encoder, **QUIET)
    folder = result.save(tmp_path / "out")
    assert not differing(result.model, mq.load(folder, seeded(t5).encoder))


def test_a_sentence_transformer_is_held_against_its_config(minilm, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(minilm), device="cpu")
    del model[0].auto_model.encoder.layer[-1]
    result = mq.quantize(model, **QUIET)
    remedy = r"encoder\.layer\.5\.\* would be missing.*result\.model\[0\]\.auto_model\.config\.num_hidden_layers = 5, and save"
    with pytest.raises(UnsupportedModelError, match=remedy):
        result.save(tmp_path / "out")
    result.model[0].auto_model.config.num_hidden_layers = 5
    loaded = mq.load(result.save(tmp_path / "out"))
    assert (loaded.encode("Hello, world.") == result.model.encode("Hello, world.")).all()

    result.model.append(nn.Identity())
    with pytest.raises(UnsupportedModelError, match=r"module 3 .* is a Identity, which has no save\(path\)"):
        result.save(tmp_path / "more")
    del result.model[3]
    core = result.model[0].auto_model
    core.__class__ = type("OwnBert", (type(core),), {})
    with pytest.raises(UnsupportedModelError, match="transformers has no class OwnBert"):
        result.save(tmp_path / "more")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@BOTH
def test_a_folder_that_does_not_fit_its_config_says_where(dtype, tmp_path):
    """transformers says it in a log that is silenced."""
    folder = mq.quantize(tiny_llama(), dtype, **QUIET).save(tmp_path / "out")
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"vocab_size": 210}
    path.write_text(json.dumps(config))
    manifest = json.loads((folder / "mono_quant.json").read_text())
    manifest["files"]["config.json"]["size"] = path.stat().st_size
    (folder / "mono_quant.json").write_text(json.dumps(manifest))
    match = r"2 tensors have another shape than config.json says: lm_head.weight is \(200, 64\) and should be \(210, 64\)"
    with pytest.raises(CorruptCheckpointError, match=match):
        mq.load(folder, verify=False)


def test_an_int8_layer_that_stands_in_two_places_is_refused_and_a_float16_one_is_not(tmp_path):
    def shared():
        model = tiny_llama()
        model.model.layers[1].mlp = model.model.layers[0].mlp
        return model

    result = mq.quantize(shared(), fidelity=False)
    with pytest.raises(mq.errors.UnsupportedModelError, match="are one int8 layer, and would be two"):
        result.save(tmp_path / "int8")
    assert not (tmp_path / "int8").exists()
    half = mq.quantize(shared(), "fp16", fidelity=False)
    half.save(tmp_path / "fp16")
    mq.verify(tmp_path / "fp16")
