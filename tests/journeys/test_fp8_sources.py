"""Checkpoints in fp8 become what the checkpoint in bfloat16 that they stand for becomes, byte for byte."""

import functools
import json
import tempfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers as hf
from fp8 import CODES, SCALES, WEIGHTS, read_shards, write_bf16, write_fp8, write_json, write_shards
from loopback_hub import LoopbackHub
from models import FAMILIES, seeded, transformer

import mono_quant as mq
from mono_quant.api.recipe import plan_source
from mono_quant.api.stream_plan import plan_stream
from mono_quant.errors import (
    AlreadyQuantizedError,
    CorruptCheckpointError,
    NonFiniteWeightError,
    UnsupportedModelError,
)
from mono_quant.io.hub.client import Hub
from mono_quant.planning.config import QuantizationConfig
from mono_quant.sources.opening import open_source
from mono_quant.sources.source import Access
from mono_quant.sources.streamed import open_streamed
from mono_quant.stream.shard import convert_shard
from mono_quant.stream.spec import Found

QUIET = {"fidelity": False}
DEEPSEEK = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
            "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
            "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}  # fmt: skip


def deepseek():
    return hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**transformer, **DEEPSEEK))


def nomic_bert():
    return hf.NomicBertModel(hf.NomicBertConfig(**transformer))


# with blocks that divide all sizes, none, and that are larger than most; whole matrices; what is split on its way into the model
SOURCES = {
    "deepseek_v3": (deepseek, (48, 40)),
    "qwen3_moe": (FAMILIES["qwen3_moe"].make, (16, 16)),
    "llama": (FAMILIES["llama"].make, (128, 128)),
    "llama_tied": (FAMILIES["llama_tied"].make, None),
    "nomic_bert": (nomic_bert, (32, 48)),
    "nomic_bert_whole": (nomic_bert, None),
}
EVERY = pytest.mark.parametrize("name", SOURCES)
WORDS = "weights in fp8 (e4m3, "


@pytest.fixture(scope="module")
def base():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        sources.cache_clear()


@functools.cache
def sources(base, name):
    """The checkpoint in fp8, and the one in bfloat16 that it stands for."""
    make, block = SOURCES[name]
    folder = write_fp8(seeded(make).eval(), base / name, block, modules_to_not_convert=["lm_head"])
    return folder, write_bf16(folder, base / f"{name}-bf16", block)


@pytest.fixture
def llama(tmp_path):
    return write_fp8(seeded(FAMILIES["llama"].make).eval(), tmp_path / "theirs", (48, 40))


CASES = [*((name, "int8") for name in SOURCES), ("deepseek_v3", "fp16"), ("nomic_bert", "fp16")]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_the_result_is_that_of_the_floats(base, name, dtype, tmp_path):
    ours, expected = (mq.quantize(source, dtype, **QUIET) for source in sources(base, name))
    out, other = ours.save(tmp_path / "out"), expected.save(tmp_path / "other")
    assert {p.name for p in out.iterdir()} == {p.name for p in other.iterdir()}
    for file in {"model.safetensors", "config.json", "generation_config.json"} & {
        p.name for p in out.iterdir()
    }:
        assert (out / file).read_bytes() == (other / file).read_bytes()
    assert ours.report.rows == expected.report.rows
    config = json.loads((out / "config.json").read_text())
    assert config.get("quantization_config", {}).get("quant_method") != "fp8"
    assert config["dtype"] == ("bfloat16" if dtype == "int8" else "float16")
    assert [WORDS in note for note in ours.report.notes].count(True) == 1
    assert WORDS in (out / "README.md").read_text() and WORDS in ours.report.table()
    source = json.loads((out / "mono_quant.json").read_text())["source"]
    assert source["stored"] in ours.report.notes[0] and source["stored"].startswith("fp8 (e4m3, ")
    assert "stored" not in json.loads((other / "mono_quant.json").read_text())["source"]
    mq.load(out)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_the_plan_is_that_of_the_floats_and_reads_no_weight(base, name, dtype, tmp_path):
    folder, floats = sources(base, name)
    planned = mq.plan(folder, dtype)
    assert planned.rows == mq.plan(floats, dtype).rows
    assert (
        planned.notes[0].startswith("the source holds ") and planned.notes[1:] == mq.plan(floats, dtype).notes
    )


def test_a_plan_from_the_hub_needs_headers_alone(base, tmp_path):
    folder, floats = sources(base, "deepseek_v3")
    with LoopbackHub() as hub:
        hub.add_repo("org/model", {p.name: p.read_bytes() for p in folder.iterdir()})
        access = Access(client=Hub(endpoint=hub.endpoint, cache_dir=tmp_path), place="hub")
        source = open_source("org/model", access, weights=False)
        assert plan_source(source, QuantizationConfig()).rows == mq.plan(floats).rows
        assert WORDS in source.notes[0] and source.subject.origin.stored in source.notes[0]
    huggingface_hub.close_session()


def test_values_are_those_that_transformers_gives_them(base):
    folder, _ = sources(base, "qwen3_moe")
    theirs = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    ours = mq.quantize(folder, "fp16", **QUIET).model.state_dict()
    for name, tensor in theirs.items():
        assert torch.equal(tensor.half(), ours[name].half()), name


@EVERY
def test_streamed_it_has_the_bytes_of_the_floats(base, name, tmp_path):
    folder, floats = sources(base, name)
    expected = mq.quantize(floats, **QUIET).save(tmp_path / "other") / "model.safetensors"
    with open_streamed(folder, Access()) as opened:
        planned = plan_stream(opened.source, opened.pieces, QuantizationConfig(), Found(), {})
        (shard,) = planned.shards
        record = convert_shard(shard, opened.supply(tmp_path), tmp_path / "out", threads=1, block=999)
    assert not record.found and (tmp_path / "out").read_bytes() == expected.read_bytes()
    assert planned.report.notes[0].startswith("the source holds ")


def test_measured_like_the_floats(base):
    ours, expected = (mq.quantize(source, fidelity=True) for source in sources(base, "llama"))
    assert ours.report.fidelity == expected.report.fidelity


# NaN and files that contradict themselves


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_codes_that_are_no_numbers(llama, code):
    weights, scales = read_shards(llama)
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name].view(torch.uint8)[5, 7] = code
    write_shards(llama, weights, scales)
    with pytest.raises(NonFiniteWeightError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        mq.quantize(llama, **QUIET)
    kept = [
        row.name
        for row in mq.quantize(llama, on_nonfinite="keep", **QUIET).report.rows
        if "NaN" in row.reason
    ]
    assert name in kept


def drop_scales(weights, scales):
    del scales["model.layers.0.mlp.up_proj.weight_scale_inv"]


def stray_scales(weights, scales):
    scales["model.layers.7.mlp.up_proj.weight_scale_inv"] = torch.ones(3, 2)


def turned_scales(weights, scales):
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    scales[name] = scales[name].T.contiguous()


def a_scale_of_nan(weights, scales):
    scales["model.layers.0.mlp.up_proj.weight_scale_inv"][0, 1] = float("nan")


def no_scales(weights, scales):
    for name in list(scales):
        scales[name.removesuffix("_inv")] = scales.pop(name)


def other_codes(weights, scales):
    weights["model.layers.0.mlp.up_proj.weight"] = (
        weights["model.layers.0.mlp.up_proj.weight"].float().to(torch.float8_e5m2)
    )
    drop_scales(weights, scales)


UP = r"'model\.layers\.0\.mlp\.up_proj\.weight_scale_inv'"
DAMAGES = {
    "missing": (drop_scales, CorruptCheckpointError, rf"theirs: 1 weights are fp8 without scales.*no {UP}.*; fetch"),
    "stray": (stray_scales, CorruptCheckpointError, "theirs: 1 tensors are scales of fp8 weights that are not there"),
    "turned": (turned_scales, CorruptCheckpointError, rf"theirs: {UP} is \(2, 3\) and should be \(3, 2\), one scale per 48 x 40"),
    "renamed": (no_scales, AlreadyQuantizedError, r"has no scales that transformers reads.*run it with transformers"),
    "e5m2": (other_codes, AlreadyQuantizedError, r"up_proj\.weight is torch\.float8_e5m2"),
}  # fmt: skip


@pytest.mark.parametrize("verb", [mq.quantize, mq.plan])
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_contradicts_itself_is_refused(llama, verb, damage):
    change, error, words = DAMAGES[damage]
    weights, scales = read_shards(llama)
    change(weights, scales)
    write_shards(llama, weights, scales)
    with pytest.raises(error, match=words):
        verb(llama)


def test_a_scale_that_is_no_number_is_refused_when_it_is_read(llama):
    weights, scales = read_shards(llama)
    a_scale_of_nan(weights, scales)
    write_shards(llama, weights, scales)
    with pytest.raises(CorruptCheckpointError, match=rf"{SCALES}: {UP} holds 1 scales .* such as nan; fetch"):
        mq.quantize(llama, **QUIET)


def test_a_config_without_the_block_says_what_is_wrong(llama):
    config = json.loads((llama / "config.json").read_text())
    del config["quantization_config"]
    write_json(llama / "config.json", config)
    with pytest.raises(
        AlreadyQuantizedError, match=r"is torch\.float8_e4m3fn: the weights are quantized already"
    ):
        mq.plan(llama)


def test_load_says_that_it_can_be_quantized(llama):
    with pytest.raises(
        UnsupportedModelError, match=r"quant_method is 'fp8'\); use quantize\('.*theirs'\) to convert it"
    ):
        mq.load(llama)


def test_it_is_the_published_form(llama):
    weights, scales = read_shards(llama)
    codes = [name for name, tensor in weights.items() if tensor.dtype == CODES]
    assert len(codes) == len(scales) == 14 and (llama / WEIGHTS).exists()


def test_rows_that_share_scales_with_rows_of_another_layer_are_not_streamed(tmp_path):
    folder = write_fp8(seeded(nomic_bert).eval(), tmp_path / "theirs", (48, 40))
    with (
        open_streamed(folder, Access()) as opened,
        pytest.raises(UnsupportedModelError, match=r"qkv.* cannot be streamed; convert the model in memory"),
    ):
        plan_stream(opened.source, opened.pieces, QuantizationConfig(), Found(), {})
    mq.quantize(folder, **QUIET)
