"""What becomes of a model that was converted on load, or loaded in int8: cast, resized, under another head, from damaged folders."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from models import FAMILIES, run, seeded, transformer
from safetensors.torch import load_file, save_file
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

import mono_quant as mq
from mono_quant.artifact.facts import Manifest, read_report
from mono_quant.errors import ConfigError, CorruptCheckpointError, MetaTensorError, UnsupportedModelError

INT8 = mq.MonoQuantConfig
CAUSAL = hf.AutoModelForCausalLM
pytestmark = pytest.mark.filterwarnings("ignore:.*use_return_dict.*:FutureWarning")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Float and int8 folders of a Llama and a GPT-2, by name."""
    home = tmp_path_factory.mktemp("folders")
    for name in ("llama", "gpt2"):
        FAMILIES[name].build().save_pretrained(home / name)
        mq.quantize(home / name, fidelity=False).save(home / f"{name}-int8")
    return SimpleNamespace(**{p.name.replace("-", "_"): p for p in home.iterdir()})


def masked_lm(kind):
    small = {**transformer, "max_position_embeddings": 40, "pad_token_id": 0}
    if kind == "bert":
        return hf.BertForPreTraining(hf.BertConfig(**small))
    if kind == "roberta":
        return hf.RobertaForMaskedLM(hf.RobertaConfig(**small))
    return hf.ElectraForMaskedLM(hf.ElectraConfig(**small, embedding_size=64))


def tensors_of(model):
    """Names of parameters and buffers without the scales, which a report does not list."""
    return {name for name in model.state_dict() if not name.endswith("_scale")}


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
def test_an_int8_head_may_be_left_out_and_the_report_then_speaks_of_the_rest(kind, tmp_path):
    whole = mq.quantize(seeded(lambda: masked_lm(kind)).eval(), fidelity=False)
    saved = whole.save(tmp_path / "whole")
    with mq.enable():
        body, info = hf.AutoModel.from_pretrained(saved, output_loading_info=True)
    assert any(name.endswith("weight_scale") for name in info["unexpected_keys"])
    inputs = FAMILIES["bert"].inputs()
    hidden = whole.model(**inputs, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(body(**inputs).last_hidden_state, hidden, rtol=0, atol=1e-6)
    body.save_pretrained(tmp_path / "body")
    mq.verify(tmp_path / "body")
    report = read_report(tmp_path / "body")
    assert {row.name for row in report.rows} == tensors_of(body)
    codes = {n for n, t in body.state_dict().items() if t.dtype == torch.int8}
    assert {row.name for row in report.quantized} == codes
    for row in report.quantized:
        assert row.shape == tuple(body.get_submodule(row.module).weight.shape)
    assert report.parameters == sum(p.numel() for n, p in body.named_parameters() if not n.endswith("_scale"))
    assert "left out" in " ".join(report.notes)
    assert report.fidelity is None


def test_a_new_head_is_told_by_the_report(folders, tmp_path):
    classifier = hf.AutoModelForSequenceClassification
    loaded = classifier.from_pretrained(folders.llama, num_labels=5, quantization_config=INT8())
    assert "score.weight" in " ".join(loaded.mono_quant_report.notes)
    with mq.enable():
        again = classifier.from_pretrained(folders.llama_int8, num_labels=5)
    again.save_pretrained(tmp_path / "saved")
    row = next(row for row in read_report(tmp_path / "saved").rows if row.name == "score.weight")
    assert (row.action, row.shape, row.bytes_after) == ("kept", (5, 64), 5 * 64 * 4)
    assert "anew" in row.reason
    assert tensors_of(mq.load(tmp_path / "saved")) == tensors_of(again)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_load_casts_as_from_pretrained_does_and_dequantize_follows(dtype, folders):
    with mq.enable():
        expected = CAUSAL.from_pretrained(folders.llama_int8, dtype=dtype)
    found = mq.load(folders.llama_int8, dtype=dtype)
    for ours, theirs in (
        (found.named_parameters(), expected.named_parameters()),
        (found.named_buffers(), expected.named_buffers()),
    ):
        ours, theirs = dict(ours), dict(theirs)
        assert ours.keys() == theirs.keys()
        assert all(ours[n].dtype == t.dtype and torch.equal(ours[n], t) for n, t in theirs.items())
    assert found.model.rotary_emb.inv_freq.dtype == torch.float32
    inputs = FAMILIES["llama"].inputs()
    assert torch.equal(run(found, inputs), run(expected, inputs))
    back = found.dequantize()
    assert {t.dtype for t in back.state_dict().values()} == {getattr(torch, dtype)}
    run(back, inputs)


def test_a_class_keeps_in_float32_what_it_declares_when_load_casts(tmp_path):
    saved = mq.quantize(FAMILIES["t5"].build(), skip=["wo"], fidelity=False).save(tmp_path / "t5")
    found = mq.load(saved, dtype="float16")
    assert found.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    assert found.shared.weight.dtype == torch.float16
    assert found.get_encoder().embed_tokens.weight is found.shared.weight


def test_a_cast_model_becomes_float_in_that_dtype_and_no_longer_has_a_report(folders, tmp_path):
    model = CAUSAL.from_pretrained(folders.gpt2, quantization_config=INT8()).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    rows = {row.name: row for row in read_report(tmp_path / "saved").rows}
    assert rows["transformer.wpe.weight"].dtype_after == "bfloat16"
    assert rows["transformer.wpe.weight"].bytes_after == model.transformer.wpe.weight.numel() * 2
    back = model.dequantize()
    assert {t.dtype for t in back.state_dict().values()} == {torch.bfloat16}
    run(back, FAMILIES["gpt2"].inputs())
    assert not hasattr(back, "mono_quant_report")


def test_float_embeddings_may_be_resized_and_an_int8_head_may_not(folders, tmp_path):
    model = CAUSAL.from_pretrained(folders.llama, quantization_config=INT8())
    model.resize_token_embeddings(210)
    model.save_pretrained(tmp_path / "resized")
    rows = {row.name: row for row in read_report(tmp_path / "resized").rows}
    assert rows["lm_head.weight"].shape == rows["model.embed_tokens.weight"].shape == (210, 64)
    assert rows["lm_head.weight"].bytes_after == 210 * 64 * 4
    mq.verify(tmp_path / "resized")
    model = CAUSAL.from_pretrained(folders.llama, quantization_config=INT8(disable_defaults=["head"]))
    model.resize_token_embeddings(210)
    with pytest.raises(UnsupportedModelError, match=r"lm_head\.weight.*resize_token_embeddings"):
        model.save_pretrained(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("lost", [".weight", ".weight_scale", "both", "norm"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_a_folder_of_ours_lacks_is_not_made_up(name, lost, folders, tmp_path):
    layer, norm = {
        "llama": ("model.layers.1.mlp.down_proj", "model.norm.weight"),
        "gpt2": ("transformer.h.1.mlp.c_fc", "transformer.ln_f.weight"),
    }[name]
    shutil.copytree(getattr(folders, f"{name}_int8"), tmp_path / "damaged")
    file = tmp_path / "damaged" / "model.safetensors"
    gone = {"both": (f"{layer}.weight", f"{layer}.weight_scale"), "norm": (norm,)}.get(
        lost, (f"{layer}{lost}",)
    )
    save_file({n: t for n, t in load_file(file).items() if n not in gone}, file, metadata={"format": "pt"})
    with mq.enable(), pytest.raises(CorruptCheckpointError, match=norm if lost == "norm" else layer):
        CAUSAL.from_pretrained(tmp_path / "damaged")


def test_weights_that_a_float_checkpoint_lacks_are_named_in_the_report(folders, tmp_path):
    shutil.copytree(folders.llama, tmp_path / "float")
    file, name = tmp_path / "float" / "model.safetensors", "model.layers.1.mlp.down_proj.weight"
    save_file({n: t for n, t in load_file(file).items() if n != name}, file, metadata={"format": "pt"})
    for dtype in ("int8", "fp16"):
        report = CAUSAL.from_pretrained(tmp_path / "float", quantization_config=INT8(dtype)).mono_quant_report
        assert [note for note in report.notes if name in note]
    assert not CAUSAL.from_pretrained(folders.gpt2, quantization_config=INT8()).mono_quant_report.notes


def test_a_variant_and_a_pickle_are_what_was_read(folders, tmp_path):
    model = FAMILIES["llama"].build()
    wanted = mq.quantize(model, fidelity=False).model.state_dict()
    model.save_pretrained(tmp_path / "variant", variant="v")
    broken = FAMILIES["llama"].build()
    broken.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    broken.save_pretrained(tmp_path / "variant")
    (tmp_path / "pickle").mkdir()
    torch.save(model.state_dict(), tmp_path / "pickle" / "pytorch_model.bin")
    model.config.save_pretrained(tmp_path / "pickle")
    for folder, options, files, access in (
        ("variant", {"variant": "v"}, ["model.v.safetensors"], ()),
        ("pickle", {}, [], ("allow_pickle",)),
    ):
        asked = INT8(on_nonfinite="keep") if files else INT8()
        loaded = CAUSAL.from_pretrained(tmp_path / folder, quantization_config=asked, **options)
        found = loaded.state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[n], t) for n, t in wanted.items())
        loaded.save_pretrained(tmp_path / "saved" / folder)
        source = Manifest.read(tmp_path / "saved" / folder).source
        assert (list(source.files), source.access) == (files, access)
    with pytest.raises(ConfigError, match="on_nonfinite"):
        CAUSAL.from_pretrained(tmp_path / "pickle", quantization_config=INT8(on_nonfinite="keep"))


def test_the_last_to_end_puts_transformers_back_and_ending_twice_ends_nobody_else():
    def keeps():
        return AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"] is not before

    before = AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"]
    first, second = mq.enable(), mq.enable()
    first.disable()
    first.disable()
    assert keeps()
    second.disable()
    assert not keeps()
    third = mq.enable()
    first.disable()
    assert keeps()
    third.disable()
    assert not keeps()


def test_offloaded_weights_are_neither_saved_nor_made_float(folders, tmp_path):
    places = {"model.layers.0": "disk", "model.layers.1": "cpu", "model.embed_tokens": "cpu"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = mq.load(folders.llama_int8, device_map=places, offload_folder=tmp_path / "off")
    for use in (lambda: model.save_pretrained(tmp_path / "saved"), model.dequantize):
        with pytest.raises(MetaTensorError, match=r"layers\.0.*offload"):
            use()
    assert not (tmp_path / "saved").exists()


def test_a_projection_without_separate_weights_becomes_float_again():
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = hf.SiglipVisionModel(hf.SiglipVisionConfig(**sizes, image_size=32, patch_size=8)).eval()
    inputs = {"pixel_values": torch.randn(1, 3, 32, 32)}
    half = mq.quantize(model, "fp16", fidelity=False).model
    back = half.dequantize()
    assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
    assert json.dumps(back.config.to_dict()) == json.dumps(model.config.to_dict())
    expected = model.half().float()
    torch.testing.assert_close(
        back(**inputs).last_hidden_state, expected(**inputs).last_hidden_state, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
def test_tying_anew_changes_nothing_and_its_config_makes_float_models(dtype, folders):
    model = CAUSAL.from_pretrained(folders.gpt2, quantization_config=INT8(dtype))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.tie_weights()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    head, table = model.lm_head, model.transformer.wte
    assert head._parameters["weight"] is table._parameters["weight"]
    assert "quantization_config" not in CAUSAL.from_config(model.config).config.to_dict()
    other = CAUSAL.from_pretrained(folders.gpt2, config=model.config)
    assert type(other.transformer.h[0].mlp.c_fc) is hf.pytorch_utils.Conv1D
