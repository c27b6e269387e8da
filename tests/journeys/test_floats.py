"""Which dtype each tensor has: what the model declares, what the file holds, what was saved; transformers is the judge."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from models import relative_error, seeded, transformer
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer
from torch import Tensor, nn

import mono_quant
from mono_quant.artifact.inspection import verify
from mono_quant.io.disk.json_text import read_json_object

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
sizes = transformer | {"hidden_size": 48}
experts = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
latent = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}


def deepseek_v3() -> nn.Module:
    return near_ties(hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**sizes, **experts, **latent)))


def glm4_moe() -> nn.Module:
    return near_ties(hf.Glm4MoeForCausalLM(hf.Glm4MoeConfig(**sizes, **experts, head_dim=16)))


def near_ties(model: nn.Module) -> nn.Module:
    """Give the routers biases that lie closer together than float16 and bfloat16 can tell apart, as trained ones do."""
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(16 + torch.randn(buffer.shape) / 300)
    return model


def ernie() -> nn.Module:
    names = {"moe_num_experts": 8, "moe_k": 2, "moe_layer_start_index": 1}
    config = hf.Ernie4_5_MoeConfig(**sizes, **names, num_key_value_heads=2, moe_intermediate_size=32)
    return near_ties(hf.Ernie4_5_MoeForCausalLM(config))


def nemotron_h() -> nn.Module:
    config = hf.NemotronHConfig(
        vocab_size=200, hidden_size=64, intermediate_size=96, layers_block_type=["mamba", "moe", "attention"],
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, n_routed_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=32, moe_shared_expert_intermediate_size=32, mamba_num_heads=8, mamba_head_dim=16,
        ssm_state_size=16, n_groups=2, use_mamba_kernels=False,
    )  # fmt: skip
    return near_ties(hf.NemotronHForCausalLM(config))


def rwkv() -> nn.Module:
    return hf.RwkvForCausalLM(
        hf.RwkvConfig(vocab_size=200, context_length=64, hidden_size=64, num_hidden_layers=2)
    )


def gpt_oss() -> nn.Module:
    names = {"head_dim": 16, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return spread_norms(hf.GptOssForCausalLM(hf.GptOssConfig(**sizes, **names)))


def t5(cls: Any = hf.T5ForConditionalGeneration, config: Any = hf.T5Config) -> nn.Module:
    return cls(config(d_model=64, d_ff=128, d_kv=16, num_layers=1, num_heads=4, vocab_size=200))


def deberta() -> nn.Module:
    """Two parameters of each layer are float32 by how they are made, without a declaration."""
    model = hf.DebertaModel(hf.DebertaConfig(**sizes))
    for name, parameter in model.named_parameters():
        if name.endswith(("q_bias", "v_bias")):
            parameter.data.normal_()
    return model


def spread_norms(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.normal_(1, 0.1)
    return model


# How to make a model, and what of it transformers holds in float32 when it loads float16.
DECLARED: Mapping[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "deepseek_v3": (deepseek_v3, ("e_score_correction_bias",)),
    "glm4_moe": (glm4_moe, ("e_score_correction_bias",)),
    "nemotron_h": (nemotron_h, ("e_score_correction_bias",)),
    "ernie": (ernie, ("gate.weight", "e_score_correction_bias")),
    "rwkv": (rwkv, ("time_decay", "time_first")),
    "gpt_oss": (gpt_oss, ("norm.weight",)),
    "t5": (t5, ("wo.weight",)),
    "mt5": (lambda: t5(hf.MT5ForConditionalGeneration, hf.MT5Config), ("wo.weight",)),
    "umt5": (lambda: t5(hf.UMT5ForConditionalGeneration, hf.UMT5Config), ("wo.weight",)),
    "deberta": (deberta, ("q_bias", "v_bias")),
}
STRICT = ("deepseek_v3", "glm4_moe", "nemotron_h", "ernie")


def build(name: str) -> nn.Module:
    return seeded(DECLARED[name][0]).eval()


def inputs(model: nn.Module) -> dict[str, Tensor]:
    if model.main_input_name == "pixel_values":
        return {"pixel_values": seeded(lambda: torch.randn(2, 3, 16, 16))}
    ids = seeded(lambda: torch.randint(3, 200, (4, 9)))
    both = getattr(model.config, "is_encoder_decoder", False)
    return {"input_ids": ids, "decoder_input_ids": ids[:, :5]} if both else {"input_ids": ids}


def run(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        return model(**inputs(model))[0]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def float_dtypes(model: nn.Module) -> dict[str, str]:
    return {n: name_of(t.dtype) for n, t in model.state_dict().items() if t.is_floating_point()}


def after(report: Any) -> dict[str, str]:
    return {r.name: r.dtype_after for r in report.rows if r.dtype_before in map(name_of, FLOAT_DTYPES)}


def differences(a: nn.Module, b: nn.Module) -> list[str]:
    """Name every parameter and buffer, saved or not, in which two models differ by a bit."""
    one, two = ({**dict(m.named_buffers()), **m.state_dict()} for m in (a, b))
    return sorted(n for n in one.keys() | two.keys() if not equal(one.get(n), two.get(n)))


def equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b)


def stored(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in sorted(folder.glob("model*.safetensors")) for n, t in load_file(file).items()}


def fates(report: Any) -> dict[str, tuple[object, ...]]:
    return {
        r.name: (r.dtype_before, r.dtype_after, r.bytes_before, r.bytes_after, r.action, r.reason)
        for r in report.rows
    }


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *(("deepseek_v3", dtype) for dtype in FLOAT_DTYPES),
        ("glm4_moe", torch.bfloat16),
        ("nemotron_h", torch.float32),
        ("ernie", torch.bfloat16),
        ("rwkv", torch.float16),
        ("gpt_oss", torch.bfloat16),
        ("t5", torch.bfloat16),
        ("mt5", torch.float16),
        ("umt5", torch.bfloat16),
        ("deberta", torch.float32),
    ],
    ids=str,
)
def test_what_a_model_declares_is_float32_in_its_float16_form_as_in_transformers(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, source, target = build(family), tmp_path / "source", tmp_path / "fp16"
    model.to(dtype).save_pretrained(source)
    theirs = type(model).from_pretrained(source, dtype=torch.float16)

    result = mono_quant.quantize(source, "fp16", fidelity=False)

    # RWKV divides some of its weights itself, which transformers does to the float16 values
    written = {r.name for r in result.report.rows if r.reason == "the model's forward writes into it"}
    assert all(after(result.report)[name] == "float32" for name in written)
    assert after(result.report) == float_dtypes(theirs) | dict.fromkeys(written, "float32")
    declared = {n for n in float_dtypes(theirs) if n.endswith(DECLARED[family][1])}
    assert {n for n, d in float_dtypes(theirs).items() if d == "float32"} == declared and declared
    mine = result.model.state_dict()
    for name, tensor in theirs.state_dict().items():
        # in memory float16 values may be held in float32
        assert torch.equal(mine[name].to(tensor.dtype), tensor), name
        assert torch.equal(mine[name], tensor.to(mine[name].dtype)), name
    assert all(mine[name].dtype == torch.float32 for name in declared)
    assert fates(mono_quant.plan(source, "fp16")) == fates(result.report)
    result.save(target)
    assert sum(t.nbytes for t in stored(target).values()) == result.report.bytes_after
    loaded = mono_quant.load(target)
    assert differences(loaded, result.model) == []
    assert torch.equal(run(loaded), run(result.model))


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie"])
def test_routers_that_need_float32_choose_the_same_experts_in_float16(family: str, tmp_path: Path) -> None:
    model = build(family)
    model.save_pretrained(tmp_path / "source")
    theirs = type(model).from_pretrained(tmp_path / "source", dtype=torch.float16)

    result = mono_quant.quantize(model, "fp16", fidelity=False)

    error, bound = relative_error(run(model), run(result.model)), relative_error(run(model), run(theirs))
    assert error <= bound < 0.01


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("deepseek_v3", torch.bfloat16),
        ("ernie", torch.float16),
        ("rwkv", torch.float16),
        ("gpt_oss", torch.bfloat16),
        ("t5", torch.float16),
        ("deberta", torch.bfloat16),
    ],
    ids=str,
)
def test_what_stays_in_float_beside_int8_has_the_dtype_that_transformers_gives_it(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, source, target = build(family), tmp_path / "source", tmp_path / "int8"
    model.to(dtype).save_pretrained(source)
    theirs = type(model).from_pretrained(source, dtype=dtype).state_dict()

    result = mono_quant.quantize(source, fidelity=False)

    mine = result.model.state_dict()
    kept = [r for r in result.report.rows if r.action == "kept" and r.name in float_dtypes(result.model)]
    assert kept and len(result.report.quantized) > 2
    for row in kept:
        assert row.dtype_after == name_of(theirs[row.name].dtype), row.name
        assert equal(mine[row.name], theirs[row.name]), row.name
    strict = family in STRICT or dtype == torch.float16 or family == "deberta"
    assert strict == any(row.dtype_after == "float32" for row in kept)
    assert {row.dtype_before for row in kept} == {name_of(dtype)}
    assert fates(mono_quant.plan(source)) == fates(result.report)
    result.save(target)
    assert sum(t.nbytes for t in stored(target).values()) == result.report.bytes_after
    loaded = mono_quant.load(target)
    assert differences(loaded, result.model) == []


@pytest.mark.parametrize(
    ("family", "dtype", "into"),
    [
        ("deepseek_v3", torch.bfloat16, "int8"),
        ("deepseek_v3", torch.bfloat16, "fp16"),
        ("ernie", torch.float16, "fp16"),
        ("t5", torch.float16, "int8"),
        ("rwkv", torch.float16, "fp16"),
        ("gpt_oss", torch.float16, "int8"),
    ],
    ids=str,
)
def test_a_model_in_memory_gets_back_the_float32_that_it_declares(
    family: str, dtype: torch.dtype, into: str, tmp_path: Path
) -> None:
    model = build(family).to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    result = mono_quant.quantize(model, into, fidelity=False)

    mine, declared = result.model.state_dict(), [n for n in before if n.endswith(DECLARED[family][1])]
    assert declared and all(equal(mine[n], before[n].float()) for n in declared)
    rows = {row.name: row for row in result.report.rows}
    for name in declared:
        row, size = rows[name], before[name].numel()
        assert (row.action, row.dtype_before, row.dtype_after) == ("kept", name_of(dtype), "float32")
        assert (row.bytes_before, row.bytes_after) == (2 * size, 4 * size)
        assert row.reason == "the model declares that it must stay in float32" or into == "int8"
    assert fates(mono_quant.plan(model, into)) == fates(result.report)
    assert all(equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    result.save(tmp_path / "out")
    assert differences(mono_quant.load(tmp_path / "out"), result.model) == []


def test_a_declaration_inside_a_module_of_ones_own_counts(tmp_path: Path) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.top = t5(hf.T5EncoderModel), nn.Linear(64, 64)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.top(self.inner(input_ids)[0])

    model = seeded(Wrapped).eval()

    result = mono_quant.quantize(model, "fp16", fidelity=False)

    rows = {row.name: row for row in result.report.rows}
    assert {n for n, r in rows.items() if r.dtype_after == "float32"} == {n for n in rows if ".wo." in n}
    result.save(tmp_path / "out")
    assert differences(mono_quant.load(tmp_path / "out", Wrapped), result.model) == []


def test_the_rule_can_be_lifted_and_the_file_is_believed(tmp_path: Path) -> None:
    model = build("deepseek_v3")

    result = mono_quant.quantize(model, "fp16", fidelity=False, disable_defaults=["keep_in_fp32"])

    assert set(after(result.report).values()) == {"float16"}
    result.save(tmp_path / "out")
    assert {t.dtype for t in stored(tmp_path / "out").values()} == {torch.float16}
    assert differences(mono_quant.load(tmp_path / "out"), result.model) == []


def test_what_the_user_keeps_comes_back_in_its_own_dtype(tmp_path: Path) -> None:
    names = {"num_local_experts": 2, "num_experts_per_tok": 1, "num_key_value_heads": 2}
    model = seeded(lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**sizes, **names))).eval().bfloat16()
    model.lm_head.double()

    result = mono_quant.quantize(model, "fp16", skip=["experts", "lm_head"], fidelity=False)

    result.save(tmp_path / "out")
    kept = {
        name: tensor.dtype
        for name, tensor in stored(tmp_path / "out").items()
        if tensor.dtype != torch.float16
    }
    assert kept.pop("lm_head.weight") == torch.float64
    assert len(kept) == 12 and set(kept.values()) == {torch.bfloat16}
    assert differences(mono_quant.load(tmp_path / "out"), result.model) == []


def bert() -> nn.Module:
    return spread_norms(hf.BertModel(hf.BertConfig(**sizes)))


def llama() -> nn.Module:
    return spread_norms(hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_key_value_heads=2)))


def gpt2() -> nn.Module:
    names = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 200}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**names, bos_token_id=0, eos_token_id=1))


PLAIN_FAMILIES: Mapping[str, Callable[[], nn.Module]] = {"bert": bert, "llama": llama, "gpt2": gpt2}


def write(
    model: nn.Module, folder: Path, says: torch.dtype, holds: Callable[[str], torch.dtype], shards: int = 1
) -> dict[str, Tensor]:
    """Write a checkpoint whose config says one dtype and whose files hold others."""
    model.save_pretrained(folder, max_shard_size="80KB" if shards > 1 else "5GB")
    for file in folder.glob("*.safetensors"):
        save_file({n: t.to(holds(n)) for n, t in load_file(file).items()}, file, {"format": "pt"})
    assert len(list(folder.glob("*.safetensors"))) >= shards
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"dtype": "float32"', f'"dtype": "{name_of(says)}"'))
    assert f'"dtype": "{name_of(says)}"' in path.read_text()
    return stored(folder)


def scales(weight: Tensor) -> Tensor:
    """The scales of int8 rows by definition: absmax / 127 in float32, rounded to the dtype of the weight."""
    return (weight.float().abs().amax(dim=1, keepdim=True) / 127).to(weight.dtype).float()


CONTRADICTIONS = [
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float32, torch.float16),
]


@pytest.mark.parametrize(
    ("family", "says", "holds"),
    [
        (family, *dtypes)
        for family, dtypes in zip(("bert", "llama", "gpt2", "bert"), CONTRADICTIONS, strict=True)
    ],
    ids=str,
)
def test_float16_rounds_what_the_file_holds_once_whatever_its_config_says(
    family: str, says: torch.dtype, holds: torch.dtype, tmp_path: Path
) -> None:
    model = seeded(PLAIN_FAMILIES[family]).eval()
    source = write(model, tmp_path / "source", says, lambda _: holds)

    result = mono_quant.quantize(tmp_path / "source", "fp16")

    result.save(tmp_path / "out")
    made = stored(tmp_path / "out")
    assert made.keys() == source.keys()
    assert all(equal(made[name], tensor.half()) for name, tensor in source.items())
    assert result.report.bytes_before == sum(t.nbytes for t in source.values())
    assert fates(mono_quant.plan(tmp_path / "source", "fp16")) == fates(result.report)
    assert result.report.fidelity is not None
    assert differences(mono_quant.load(tmp_path / "out"), result.model) == []


@pytest.mark.parametrize(("says", "holds"), CONTRADICTIONS, ids=name_of)
def test_int8_has_the_scales_and_the_floats_of_what_the_file_holds_whatever_its_config_says(
    says: torch.dtype, holds: torch.dtype, tmp_path: Path
) -> None:
    source = write(seeded(llama).eval(), tmp_path / "source", says, lambda _: holds)

    result = mono_quant.quantize(tmp_path / "source")

    result.save(tmp_path / "out")
    made = stored(tmp_path / "out")
    assert read_json_object(tmp_path / "out" / "config.json")["dtype"] == name_of(holds)
    codes = [name for name, tensor in made.items() if tensor.dtype == torch.int8]
    assert codes and all(torch.equal(made[f"{n}_scale"].float(), scales(source[n])) for n in codes)
    assert all(equal(made[name], source[name]) for name in source.keys() - codes)
    assert result.report.bytes_before == sum(t.nbytes for t in source.values())
    assert fates(mono_quant.plan(tmp_path / "source")) == fates(result.report)
    loaded = mono_quant.load(tmp_path / "out")
    assert differences(loaded, result.model) == []
    assert loaded.get_submodule(codes[0].removesuffix(".weight")).weight.dtype == holds


def mostly(common: torch.dtype, rare: torch.dtype) -> Callable[[str], torch.dtype]:
    """Norms and one projection in another dtype than the rest."""
    return lambda name: (
        rare if "norm" in name.lower() or name.endswith("1.self_attn.k_proj.weight") else common
    )


MIXTURES = [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float32)]


@pytest.mark.parametrize(
    ("family", "common", "rare"),
    [("bert", *MIXTURES[0]), ("llama", *MIXTURES[1]), ("llama", *MIXTURES[2])],
    ids=str,
)
def test_every_tensor_of_a_mixed_checkpoint_is_rounded_to_float16_once(
    family: str, common: torch.dtype, rare: torch.dtype, tmp_path: Path
) -> None:
    model = seeded(PLAIN_FAMILIES[family]).eval()
    source = write(model, tmp_path / "source", common, mostly(common, rare), shards=2)

    result = mono_quant.quantize(tmp_path / "source", "fp16")

    assert {r.name: r.dtype_before for r in result.report.rows} == {
        name: name_of(tensor.dtype) for name, tensor in source.items()
    }
    result.save(tmp_path / "out")
    made = stored(tmp_path / "out")
    assert all(equal(made[name], tensor.half()) for name, tensor in source.items())
    assert fates(mono_quant.plan(tmp_path / "source", "fp16")) == fates(result.report)
    assert result.report.fidelity is not None and result.report.fidelity["relative_error"] < 0.01
    assert differences(mono_quant.load(tmp_path / "out"), result.model) == []


@pytest.mark.parametrize(("common", "rare"), MIXTURES[:2], ids=name_of)
def test_a_mixed_checkpoint_becomes_int8_as_transformers_loads_it_in_its_most_common_dtype(
    common: torch.dtype, rare: torch.dtype, tmp_path: Path
) -> None:
    model = seeded(llama).eval()
    source = write(model, tmp_path / "source", torch.float32, mostly(common, rare), shards=2)
    theirs = type(model).from_pretrained(tmp_path / "source", dtype=common).state_dict()

    result = mono_quant.quantize(tmp_path / "source")

    result.save(tmp_path / "out")
    made = stored(tmp_path / "out")
    assert read_json_object(tmp_path / "out" / "config.json")["dtype"] == name_of(common)
    codes = [name for name, tensor in made.items() if tensor.dtype == torch.int8]
    assert codes and all(torch.equal(made[f"{n}_scale"].float(), scales(theirs[n])) for n in codes)
    assert all(equal(made[name], theirs[name]) for name in source.keys() - codes)
    rows = {row.name: row for row in result.report.rows}
    assert {n: r.dtype_before for n, r in rows.items()} == {n: name_of(t.dtype) for n, t in source.items()}
    assert fates(mono_quant.plan(tmp_path / "source")) == fates(result.report)
    assert result.report.fidelity is not None
    assert differences(mono_quant.load(tmp_path / "out"), result.model) == []


def gemma3() -> nn.Module:
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**sizes, num_key_value_heads=2, head_dim=16))


def m2m_100() -> nn.Module:
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 128))
    }
    config = hf.M2M100Config(vocab_size=200, d_model=48, max_position_embeddings=16, **sides)
    return hf.M2M100ForConditionalGeneration(config)


def openai_gpt() -> nn.Module:
    return hf.OpenAIGPTLMHeadModel(hf.OpenAIGPTConfig(vocab_size=200, n_embd=64, n_layer=1, n_head=4))


def recurrent_gemma() -> nn.Module:
    config = hf.RecurrentGemmaConfig(**sizes | {"num_hidden_layers": 3}, num_key_value_heads=2, lru_width=48)
    return hf.RecurrentGemmaForCausalLM(config)


def reformer() -> nn.Module:
    config = hf.ReformerConfig(
        vocab_size=200, hidden_size=64, attention_head_size=16, num_attention_heads=4, feed_forward_size=96,
        attn_layers=["local"], axial_pos_shape=(8, 8), axial_pos_embds_dim=(32, 32), max_position_embeddings=64,
        is_decoder=False,
    )  # fmt: skip
    return hf.ReformerModel(config)


def from_folder(dtype: torch.dtype) -> Callable[[nn.Module, Path], nn.Module | Path]:
    def make(model: nn.Module, folder: Path) -> Path:
        model.to(dtype).save_pretrained(folder)
        return folder

    return make


def swin_v2() -> nn.Module:
    """Its tables take the dtype of weights that may have been filled in by then."""
    names = {"embed_dim": 32, "depths": [1], "num_heads": [2], "window_size": 4, "num_labels": 3}
    config = hf.Swinv2Config(image_size=16, patch_size=4, **names)
    return hf.Swinv2ForImageClassification(config)


# How a model comes to us: built in float32, cast in memory, loaded by transformers in another dtype, or as a folder.
ROADS: Mapping[str, Callable[[nn.Module, Path], nn.Module | Path]] = {
    "built": lambda model, _: model,
    "cast to bfloat16": lambda model, _: model.bfloat16(),
    "cast to float16": lambda model, _: model.half(),
    "loaded in bfloat16": lambda model, folder: type(model).from_pretrained(
        from_folder(torch.float32)(model, folder), dtype=torch.bfloat16
    ),
    "folder in float32": from_folder(torch.float32),
    "folder in bfloat16": from_folder(torch.bfloat16),
    "folder in float16": from_folder(torch.float16),
}
# Families with tables and scales that are computed when the model is built and are not in the file.
COMPUTED: list[tuple[Callable[[], nn.Module], str, str]] = [
    (gemma3, "built", "fp16"),
    (gemma3, "cast to bfloat16", "int8"),
    (gemma3, "cast to float16", "fp16"),
    (gemma3, "folder in bfloat16", "fp16"),
    (gemma3, "folder in float16", "int8"),
    (m2m_100, "built", "fp16"),
    (m2m_100, "cast to bfloat16", "fp16"),
    (m2m_100, "loaded in bfloat16", "fp16"),
    (m2m_100, "folder in float32", "fp16"),
    (m2m_100, "folder in float16", "fp16"),
    (recurrent_gemma, "built", "fp16"),
    (recurrent_gemma, "cast to bfloat16", "int8"),
    (openai_gpt, "folder in float32", "fp16"),
    (reformer, "built", "fp16"),
    (swin_v2, "built", "fp16"),
    (swin_v2, "folder in bfloat16", "fp16"),
    (llama, "cast to bfloat16", "int8"),
]


@pytest.mark.parametrize(
    ("family", "road", "into"), [pytest.param(*x, id=f"{x[0].__name__}-{x[1]}-{x[2]}") for x in COMPUTED]
)
def test_what_is_computed_and_not_saved_comes_back_as_it_was(
    family: Callable[[], nn.Module], road: str, into: str, tmp_path: Path
) -> None:
    source = ROADS[road](seeded(family).eval(), tmp_path / "source")

    result = mono_quant.quantize(source, into, fidelity=False)

    result.save(tmp_path / "out")
    loaded = mono_quant.load(tmp_path / "out")
    assert differences(loaded, result.model) == []
    assert torch.equal(run(loaded), run(result.model))
    assert folders(tmp_path / "out") == []


def folders(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.is_dir()]


@pytest.mark.parametrize("into", ["int8", "fp16"])
def test_what_building_the_model_does_not_give_back_lies_beside_the_weights(
    into: str, tmp_path: Path
) -> None:
    model = seeded(m2m_100).eval()
    model.model.encoder.embed_positions.make_weights(40, 48, 1)  # a longer text than ever before
    model.model.decoder.embed_positions.weights.mul_(1.5)

    result = mono_quant.quantize(model, into, fidelity=False)

    result.save(tmp_path / "out")
    loaded = mono_quant.load(tmp_path / "out")
    assert differences(loaded, result.model) == []
    assert loaded.model.encoder.embed_positions.weights.shape == (40, 48)
    assert torch.equal(run(loaded), run(result.model))
    assert folders(tmp_path / "out") == ["mono_quant_buffers"]
    again = mono_quant.QuantizedModel.from_folder(tmp_path / "out").save(tmp_path / "again")
    assert differences(mono_quant.load(again), result.model) == []
    hf.M2M100ForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert len(verify(tmp_path / "out")) > 2


class Tables(nn.Module):
    """Buffers of all kinds that no state dict holds, of which some are changed after the module was made."""

    def __init__(self, length: int = 12) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)
        self.register_buffer("positions", torch.randn(12, 64), persistent=False)
        self.register_buffer("mask", torch.rand(length, length) > 0.5, persistent=False)
        self.register_buffer("steps", torch.arange(12), persistent=False)
        self.scale = nn.Module()
        self.scale.register_buffer("value", torch.tensor(1 / 3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.up(x + self.positions[self.steps] * self.scale.value))
        return self.down(y) * self.mask[:12, :12].to(y.dtype).sum(0, keepdim=True).T

    def trained(self) -> "Tables":
        self.scale.value.add_(0.25)
        self.steps.copy_(self.steps.flip(0))
        return self


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return Tables()


@pytest.mark.parametrize(
    ("dtype", "model", "into"),
    [
        (torch.float32, Tables, "int8"),
        (torch.float32, lambda: Tables().half(), "fp16"),
        (torch.bfloat16, lambda: Tables().double(), "int8"),
        (torch.bfloat16, on_meta, "fp16"),
    ],
    ids=["as built", "cast to float16", "cast to float64", "without data"],
)
def test_the_buffers_of_a_plain_module_come_back_whatever_the_users_module_holds(
    dtype: torch.dtype, model: Callable[[], nn.Module], into: str, tmp_path: Path
) -> None:
    original = seeded(Tables).trained().to(dtype).eval()

    result = mono_quant.quantize(original, into)

    result.save(tmp_path / "out")
    loaded = mono_quant.load(tmp_path / "out", model())
    assert differences(loaded, result.model) == []
    x = seeded(lambda: torch.randn(2, 12, 64)).to(dtype)
    with torch.inference_mode():
        assert torch.equal(loaded(x), result.model(x))


def test_a_buffer_that_the_user_makes_in_another_size_is_left_as_it_is(tmp_path: Path) -> None:
    mono_quant.quantize(seeded(Tables).eval()).save(tmp_path / "out")

    longer = seeded(lambda: Tables(20), seed=1)
    loaded = mono_quant.load(tmp_path / "out", longer)

    assert torch.equal(loaded.mask, longer.mask) and not torch.equal(loaded.positions, longer.positions)


def test_buffers_that_the_users_module_does_not_have_are_an_error(tmp_path: Path) -> None:
    class Fewer(Tables):
        def __init__(self) -> None:
            super().__init__()
            del self.mask

    mono_quant.quantize(seeded(Tables).eval()).save(tmp_path / "out")
    with pytest.raises(mono_quant.MonoQuantError, match=r"mask.*Fewer does not have"):
        mono_quant.load(tmp_path / "out", Fewer)


@pytest.mark.parametrize(
    ("dtype", "into"), [(torch.float32, "fp16"), (torch.bfloat16, "int8"), (torch.bfloat16, "fp16")], ids=str
)
def test_a_sentence_transformer_computes_what_it_computed(
    minilm: Path, dtype: torch.dtype, into: str, tmp_path: Path
) -> None:
    config = hf.Gemma3TextConfig(**sizes | {"vocab_size": 30522, "num_hidden_layers": 1}, head_dim=16)
    core = tmp_path / "core"
    seeded(lambda: hf.Gemma3TextModel(config)).save_pretrained(core)
    for file in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(minilm / file, core)
    transformer = Transformer(str(core), model_kwargs={"dtype": dtype})
    modules = [transformer, Pooling(48), seeded(lambda: Dense(48, 32))]
    original = SentenceTransformer(modules=modules, device="cpu").eval()

    result = mono_quant.quantize(original, into, fidelity=False)

    result.save(tmp_path / "out")
    loaded = mono_quant.load(tmp_path / "out")
    assert differences(loaded, result.model) == []
    texts = ["one", "two or three words"]
    assert (loaded.encode(texts) == result.model.encode(texts)).all()
