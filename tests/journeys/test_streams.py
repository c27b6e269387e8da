"""A folder that is streamed has the bytes of the one that is saved from memory, in every file; and both refuse the same."""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import diffusion
import encoders
import pytest
import real_streams
import torch
import transformers as hf
from folders import listing, snapshot
from fp8 import write_fp8
from models import FAMILIES, is_plain, seeded, transformer
from safetensors.torch import load_file, save_file

import mono_quant as mq
from mono_quant.errors import MonoQuantError, UnsupportedModelError
from mono_quant.planning.config import QuantizationConfig

SIZES = {name: size for name, size in transformer.items() if name != "vocab_size"}
HEADS = {"num_key_value_heads": 2, "head_dim": 16}
EXPERTS = {**HEADS, "moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
            "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
            "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}  # fmt: skip
LLAMA4 = {"intermediate_size_mlp": 128, "num_local_experts": 4, "head_dim": 16, "num_experts_per_tok": 1}
GPT_OSS = {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def phi3() -> Any:
    return hf.Phi3ForCausalLM(hf.Phi3Config(**transformer, **SPECIAL, num_key_value_heads=2))


def resnet() -> Any:
    sizes = {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [1, 2], "layer_type": "basic"}
    return hf.ResNetForImageClassification(hf.ResNetConfig(**sizes, num_labels=3))


MAKE = {
    **{name: family.make for name, family in FAMILIES.items() if not is_plain(family.build())},
    "phi3": phi3,
    "resnet": resnet,
    "deepseek_v3": lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**transformer, **DEEPSEEK)),
    "gpt_oss": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**transformer, **GPT_OSS)),
    "llama4": lambda: hf.Llama4ForCausalLM(hf.Llama4TextConfig(**transformer, **LLAMA4, num_key_value_heads=2)),
    "qwen3_vl_moe": lambda: hf.Qwen3VLMoeTextModel(hf.Qwen3VLMoeTextConfig(**transformer, **EXPERTS)),
    "nomic_bert": lambda: hf.NomicBertModel(hf.NomicBertConfig(**transformer)),
    "jina_v3": lambda: hf.JinaEmbeddingsV3Model(hf.JinaEmbeddingsV3Config(**transformer)),
    "decision_transformer": lambda: hf.DecisionTransformerModel(
        hf.DecisionTransformerConfig(hidden_size=64, n_layer=2, n_head=4, state_dim=5, act_dim=3)
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def base():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        checkpoint.cache_clear()


@functools.cache
def checkpoint(base, name, dtype="bf16", shard="50GB"):
    """The folder of a model as transformers writes it."""
    model = seeded(MAKE[name]).eval()
    for kept in [b for b in model.buffers() if b.is_floating_point()]:
        kept.data = seeded(lambda kept=kept: torch.rand_like(kept) + 0.5) if name == "resnet" else kept.data
    folder = base / f"{name}-{dtype}-{shard}"
    model.to(FLOATS[dtype]).save_pretrained(folder, max_shard_size=shard)
    return folder


def both(source, place, *, shard="5GB", trust=False, **options):
    """What the road through memory and the stream wrote, or raised."""
    request, found = QuantizationConfig(**{"fidelity": False} | options), []
    for name, convert in (
        ("memory", lambda out: mq.quantize(source, config=request, trust_remote_code=trust).save(out, max_shard_size=shard)),
        ("stream", lambda out: mq.quantize_checkpoint(source, config=request, output=out, trust_remote_code=trust, max_shard_size=shard)),
    ):  # fmt: skip
        try:
            convert(place / name)
            found.append(snapshot(place / name))
        except MonoQuantError as error:
            found.append(error)
    assert [n for n in listing(place) if n not in ("memory", "stream")] == []
    return found


def assert_same(source, place, **options):
    memory, streamed = both(source, place, **options)
    for error in (memory, streamed):
        if isinstance(error, MonoQuantError):
            raise error
    assert memory.keys() == streamed.keys()
    assert [name for name in memory if memory[name] != streamed[name]] == []
    return streamed


OFTEN = ("llama_tied", "gpt2", "mixtral", "phi3")
CASES = [
    *((name, dtype, "bf16") for name in MAKE for dtype in ("int8", "fp16")),
    *((name, dtype, "fp32") for name in OFTEN for dtype in ("int8", "fp16")),
    *((name, "int8", "fp16") for name in OFTEN),
]


@pytest.mark.parametrize(("name", "dtype", "source"), CASES)
def test_families(base, tmp_path, name, dtype, source):
    measured = "auto" if (dtype, source) == ("int8", "bf16") else False
    assert_same(checkpoint(base, name, source), tmp_path, dtype=dtype, fidelity=measured)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((n, "int8") for n in (*OFTEN, "whisper", "qwen3_vl_moe")),
        ("llama_tied", "fp16"),
        ("mixtral", "fp16"),
    ],
)
def test_shards(base, tmp_path, name, dtype):
    files = assert_same(checkpoint(base, name, "bf16", "60KB"), tmp_path, dtype=dtype, shard=50_000)
    assert INDEX in files


OPTIONS = {
    "skip": {"skip": ("*.q_proj", "re:.*layers\\.1\\..*")},
    "skip_types": {"skip_types": ("LlamaMLP",)},
    "embeddings": {"embeddings": True},
    "head": {"disable_defaults": ("head", "small"), "embeddings": True},
    "kept fp16": {"kept": "fp16"},
    "kept bf16": {"kept": "bf16", "min_params": 5000},
    "g64": {"activations": "int8-g64"},
    "patterns": {"activations": {"*.down_proj": "int12", "*.q_proj": "int8-g128"}},
    "measured": {"fidelity": True},
}


@pytest.mark.parametrize(
    ("name", "option"),
    [
        *(("llama", option) for option in OPTIONS),
        *(("llama_tied", o) for o in ("embeddings", "head", "kept fp16")),
    ],
)
def test_options(base, tmp_path, name, option):
    assert_same(checkpoint(base, name, "fp32"), tmp_path, **OPTIONS[option])


# What only values say


def changed(source, folder, **tensors):
    """A copy of a checkpoint with other tensors; a function changes the one that is there, None takes it away."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    held = load_file(source / SINGLE)
    for name, change in tensors.items():
        name = name.replace("__", ".")
        held[name] = change(held[name].clone()) if callable(change) else change
    save_file({k: v for k, v in held.items() if v is not None}, folder / SINGLE, {"format": "pt"})
    return folder


def put(value, at=5):
    def change(tensor):
        tensor.view(-1)[at] = value
        return tensor

    return change


FIRST = "model.layers.0.self_attn.q_proj.weight"
BIAS, DENSE = (f"bert.encoder.layer.0.output.dense.{own}" for own in ("bias", "weight"))
HEAD, NORM = "model.embed_tokens.weight", "model.norm.weight"
VALUES = {
    "nan": (FIRST, {"on_nonfinite": "keep"}),
    "nan, kept": (FIRST, {"on_nonfinite": "keep", "kept": "fp16"}),
    "nan in a table": (HEAD, {"kept": "fp16"}),
    "nan in a norm": (NORM, {}),
    "nan, fp16": (FIRST, {"dtype": "fp16", "on_nonfinite": "keep"}),
    "nan in a norm, fp16": (NORM, {"dtype": "fp16", "on_nonfinite": "keep"}),
}


@pytest.mark.parametrize("most", FLOATS)
@pytest.mark.parametrize("own", FLOATS)
def test_a_weight_in_another_dtype_than_most_has_the_codes_of_what_it_is_loaded_as(base, tmp_path, most, own):
    source = checkpoint(base, "llama", most)
    other = {name: lambda tensor: tensor.to(FLOATS[own]) for name in (FIRST, HEAD)}
    (tmp_path / "out").mkdir()
    assert_same(changed(source, tmp_path / "source", **other), tmp_path / "out", embeddings=True)


@pytest.mark.parametrize("name", ["LlamaPreTrainedModel", "PreTrainedModel"])
def test_a_class_without_layers_is_refused(base, tmp_path, name):
    source = changed(checkpoint(base, "llama"), tmp_path / "source")
    edit(source, architectures=[name])
    with pytest.raises(
        MonoQuantError,
        match=r"has a place for none of the .* tensors; correct architectures|has no model class PreTrainedModel",
    ):
        mq.quantize_checkpoint(source, output=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("case", VALUES)
def test_not_finite(base, tmp_path, case):
    name, options = VALUES[case]
    value = float("-inf" if "fp16" in case else "nan")
    source = changed(checkpoint(base, "llama_tied", "fp32"), tmp_path / "source", **{name: put(value)})
    (tmp_path / "to").mkdir()
    assert_same(source, tmp_path / "to", **options)


@pytest.mark.parametrize(
    ("value", "options"),
    [
        (float("nan"), {}),
        (float("inf"), {"dtype": "fp16"}),
        (1e30, {"dtype": "fp16", "on_overflow": "error"}),
    ],
)
def test_refusals_of_values(base, tmp_path, value, options):
    source = changed(checkpoint(base, "llama", "fp32"), tmp_path / "source", **{FIRST: put(value)})
    (tmp_path / "to").mkdir()
    memory, streamed = both(source, tmp_path / "to", **options)
    assert isinstance(memory, MonoQuantError) and type(memory) is type(streamed)
    assert str(streamed).partition(":")[0] == str(memory).partition(":")[0] == FIRST
    assert (
        memory.args[1:] == streamed.args[1:]
        and str(streamed).rpartition(".")[2] == str(memory).rpartition(".")[2]
    )
    # what both say that one should do helps, and nothing of the first try is in its way
    assert_same(source, tmp_path / "to", **options | {"on_nonfinite": "keep", "on_overflow": "keep"})


@pytest.mark.parametrize(
    "bad", [{BIAS: 1e30}, {DENSE: 1e30}, {BIAS: float("nan")}, {BIAS: 1e30, DENSE: 1e29}]
)
@pytest.mark.parametrize("shard", ["5GB", 20_000])
def test_what_does_not_fit_float16(base, tmp_path, bad, shard):
    source = changed(
        checkpoint(base, "bert", "fp32"), tmp_path / "source", **{n: put(v) for n, v in bad.items()}
    )
    (tmp_path / "to").mkdir()
    assert_same(source, tmp_path / "to", dtype="fp16", on_nonfinite="keep", shard=shard)


@pytest.mark.parametrize("name", ["llama", "phi3", "mixtral"])
def test_scales_that_float16_cannot_hold(base, tmp_path, name):
    """A row of values that are as small as float16 has, in a checkpoint of float16."""
    source = checkpoint(base, name, "fp16")
    tiny = [
        n
        for n, t in load_file(source / SINGLE).items()
        if t.dim() == 2 and "layers.0" in n and "gate.w" not in n
    ]

    def change(tensor):
        tensor[3] = 1e-5
        return tensor

    source = changed(source, tmp_path / "source", **dict.fromkeys(tiny[::2], change))
    (tmp_path / "to").mkdir()
    assert_same(source, tmp_path / "to")


# Ties


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
def test_a_config_says_tied_and_the_file_holds_the_table_twice(base, tmp_path, dtype):
    source = checkpoint(base, "llama_tied", "fp32")
    source = changed(
        source, tmp_path / "source", **{"lm_head.weight": load_file(source / SINGLE)[HEAD].clone()}
    )
    (tmp_path / "to").mkdir()
    assert_same(source, tmp_path / "to", dtype=dtype)


def test_a_config_says_tied_and_the_file_holds_another_head(base, tmp_path):
    source = checkpoint(base, "llama_tied", "fp32")
    source = changed(source, tmp_path / "source", **{"lm_head.weight": load_file(source / SINGLE)[HEAD] + 1})
    (tmp_path / "to").mkdir()
    for error in both(source, tmp_path / "to"):
        assert isinstance(error, UnsupportedModelError)
        assert re.search(
            f"cannot be saved.*{re.escape(HEAD)} and lm_head.weight differ.*tie_word_embeddings", str(error)
        )
    edit(source, tie_word_embeddings=False)
    assert_same(source, tmp_path / "to")


def assert_same_refusal(source, tmp_path, **options):
    (tmp_path / "to").mkdir()
    memory, streamed = both(source, tmp_path / "to", **options)
    assert isinstance(memory, MonoQuantError), "the road through memory refuses it"
    assert type(memory) is type(streamed) and str(memory) == str(streamed)
    assert listing(tmp_path / "to") == []


# Other sources


def test_minilm(minilm, tmp_path):
    assert_same(minilm, tmp_path)


@pytest.mark.parametrize("name", ["dense", "half_core", "router", "reranker", "gpt2"])
def test_encoders(tmp_path, name):
    encoders.ENCODERS[name]().save(str(tmp_path / "source"))
    (tmp_path / "to").mkdir()
    assert_same(tmp_path / "source", tmp_path / "to")


@pytest.mark.parametrize("name", ["dit", "unet", "flux"])
def test_diffusion(tmp_path, name):
    diffusion.build(name).save_pretrained(tmp_path / "source")
    (tmp_path / "to").mkdir()
    assert_same(tmp_path / "source", tmp_path / "to")


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
def test_fp8(tmp_path, dtype):
    model = seeded(MAKE["deepseek_v3"]).eval()
    source = write_fp8(model, tmp_path / "source", (48, 40), modules_to_not_convert=["lm_head"])
    (tmp_path / "to").mkdir()
    assert_same(source, tmp_path / "to", dtype=dtype)


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own-llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_the_repository(base, tmp_path):
    source = changed(checkpoint(base, "llama"), tmp_path / "source")
    (source / "modeling_own.py").write_text(CODE)
    names = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    edit(source, model_type="own-llama", architectures=["OwnForCausalLM"], auto_map=names)
    (tmp_path / "to").mkdir()
    memory, streamed = both(source, tmp_path / "to")
    assert type(memory) is type(streamed) and str(memory) == str(streamed)
    assert_same(source, tmp_path / "to", trust=True)


# Refusals


def edit(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def no_config(folder):
    (folder / "config.json").unlink()


def adapter(folder):
    no_config(folder)
    (folder / SINGLE).rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "a/b"})
    )


def pickle(folder):
    torch.save(load_file(folder / SINGLE), folder / "pytorch_model.bin")
    (folder / SINGLE).unlink()


def quantized(folder):
    edit(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def cut(folder):
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[:-100])


def other_sizes(folder):
    edit(folder, hidden_size=128)


def integers(folder):
    held = load_file(folder / SINGLE)
    save_file({n: t.to(torch.int32) for n, t in held.items()}, folder / SINGLE)


def missing(folder):
    held = load_file(folder / SINGLE)
    del held[FIRST]
    save_file(held, folder / SINGLE)


@pytest.mark.parametrize(
    "damage", [no_config, adapter, pickle, quantized, cut, other_sizes, integers, missing]
)
def test_both_refuse_the_same(base, tmp_path, damage):
    source = changed(checkpoint(base, "llama"), tmp_path / "source")
    damage(source)
    assert_same_refusal(source, tmp_path)


# Several processes


def test_torchrun_shares_the_work_and_one_of_them_publishes(tmp_path):
    """In float16, with scales in the last file that it cannot hold: then all shards are planned anew, by everybody."""
    source = real_streams.prepare(tmp_path / "source", wide=True)
    real_streams.stream(source, tmp_path / "alone")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = Path(real_streams.__file__).resolve()
    done = subprocess.run(
        [*command, script, source, tmp_path / "shared"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(done.stdout.split()) == ["left", "published"]
    assert snapshot(tmp_path / "shared") == snapshot(tmp_path / "alone")
    assert listing(tmp_path) == ["alone", "shared", "source"]
    scales = [
        tensor.dtype
        for path in (tmp_path / "shared").glob("*.safetensors")
        for name, tensor in load_file(path).items()
        if name.endswith("_scale")
    ]
    assert scales.count(torch.float32) == 1 and torch.float16 in scales
