"""Our folders in libraries that never heard of mono_quant, by the calls that go past the forward of the outermost model."""

import copy
import json
import shutil
import subprocess
import sys

import pytest
import roads
import torch
import transformers as hf
from models import FAMILIES, relative_error, seeded, transformer
from roads import ROADS
from sentence_transformers import SentenceTransformer

import mono_quant as mq
from mono_quant.hf import compressed_tensors

SIDES = {
    "d_model": 64, "vocab_size": 200, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
}  # fmt: skip
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
TEXT = {
    **transformer,
    "max_position_embeddings": 32,
    "projection_dim": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PICTURE = {**{k: v for k, v in transformer.items() if k != "vocab_size"}, "image_size": 32, "patch_size": 8}


def bart():
    return hf.BartForConditionalGeneration(hf.BartConfig(**SIDES, **SPECIAL, max_position_embeddings=64))


def trocr():
    text = {k: v for k, v in SIDES.items() if not k.startswith("encoder")} | {"max_position_embeddings": 64}
    text["cross_attention_hidden_size"] = 64
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        hf.ViTConfig(**PICTURE), hf.TrOCRConfig(**text), **SPECIAL
    )
    return hf.VisionEncoderDecoderModel(config)


def clip():
    return hf.CLIPModel(hf.CLIPConfig(text_config=TEXT, vision_config=PICTURE, projection_dim=64))


def siglip():
    return hf.SiglipModel(hf.SiglipConfig(text_config=TEXT, vision_config=PICTURE))


def detr():
    # its normalization has buffers named `weight`, which transformers takes for parameters when it dequantizes while loading
    backbone = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"])
    sizes = {k: v for k, v in SIDES.items() if k != "vocab_size"}
    return hf.DetrForObjectDetection(
        hf.DetrConfig(**sizes, backbone_config=backbone, use_timm_backbone=False, num_queries=5, num_labels=3)
    )


MAKERS = {"bart": bart, "trocr": trocr, "clip": clip, "siglip": siglip, "detr": detr}
# what calls the outermost forward after all, and is left to compressed-tensors there
AT_FIRST_CALL = ("detr",)
ROUNDS_ACTIVATIONS = tuple(map(int, hf.__version__.split(".")[:2])) < (5, 23)


def build(name):
    if name in MAKERS:
        return seeded(MAKERS[name]).eval()
    return FAMILIES[name].build()


def meant_(model, report):
    """Give a float model the values that the int8 weights stand for, by the definition alone."""
    for row in report.quantized:
        weight = model.get_parameter(row.name)
        scale = weight.detach().abs().amax(1, keepdim=True) / 127
        weight.data = (weight / scale).round().clamp(-127, 127) * scale
    return model


def saved(model, folder, **options):
    result = mq.quantize(model, fidelity=False, **options)
    result.save(folder)
    return result.report


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, minilm):
    """By folder: what comes out there, and what float models with the same weights give here."""
    base, meant = tmp_path_factory.mktemp("vanilla"), {}
    with torch.no_grad():
        for name in ROADS.keys() - {"sentence", "pipeline"}:
            model = build(name)
            report = saved(model, base / name)
            meant[name] = ROADS[name](meant_(copy.deepcopy(model), report))
        encoder = SentenceTransformer(str(minilm), device="cpu")
        whole = meant_(encoder, saved(encoder, base / "sentence"))
        meant["sentence"] = ROADS["sentence"](whole)
        shutil.copytree(base / "sentence", base / "pipeline")
        tokens = encoder.tokenizer(roads.SENTENCES[:1], return_tensors="pt")
        meant["pipeline"] = whole[0].auto_model(**tokens).last_hidden_state
    saved(FAMILIES["qwen3_moe"].build(), base / "llama-experts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compressed_tensors, "_WHILE_LOADING", {})
        saved(build("t5"), base / "t5-old")
    command = [sys.executable, roads.__file__, str(base)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return base, torch.load(base / "theirs.pt"), meant


@pytest.mark.parametrize("name", ROADS)
def test_calls_past_the_forward_run_what_the_codes_stand_for(outputs, name):
    _, theirs, meant = outputs
    got = theirs[name]
    assert isinstance(got, torch.Tensor), got
    # activations are rounded too where compressed-tensors unpacks the weights
    is_rounded = ROUNDS_ACTIVATIONS or name in AT_FIRST_CALL
    assert relative_error(meant[name], got) < (0.1 if is_rounded else 1e-5)


def test_an_older_folder_is_cured_by_a_config_given_to_from_pretrained_and_runs_here(outputs):
    base, theirs, meant = outputs
    assert "same dtype" in theirs["t5-old"]
    with pytest.warns(UserWarning, match="quantization_config"):
        model = hf.T5ForConditionalGeneration.from_pretrained(
            base / "t5-old", quantization_config=hf.CompressedTensorsConfig(run_compressed=False)
        )
    assert relative_error(meant["t5"], ROADS["t5"](model.eval())) < (0.1 if ROUNDS_ACTIVATIONS else 1e-5)
    assert torch.equal(ROADS["t5"](mq.load(base / "t5-old")), ROADS["t5"](mq.load(base / "t5")))


def test_experts_stop_instead_of_running_on_codes(outputs):
    assert "conversion of the weights" in outputs[1]["llama-experts"]


def test_buffers_of_weights_leave_it_to_the_first_call(outputs):
    config = json.loads((outputs[0] / "detr" / "config.json").read_text())
    assert not {"run_compressed", "dequantize"} & config["quantization_config"].keys()
