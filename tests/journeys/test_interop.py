"""What other programs look for in our folders: names in `ignore` and `targets`, their own config keys, the dtype of scales."""

import json

import pytest
import torch
import transformers as hf
from compressed_tensors.utils.match import match_named_modules
from models import FAMILIES, seeded, transformer
from safetensors.torch import load_file

import mono_quant as mq

TEXT = {**transformer, "num_key_value_heads": 2}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 16, "patch_size": 8}  # fmt: skip


def build(name, config, dtype=torch.float32):
    return seeded(lambda: getattr(hf, name)._from_config(config, dtype=dtype)).eval()


def saved(model, folder, **options):
    return mq.quantize(model, fidelity=False, **options).save(folder)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def quantized(folder):
    """Names of the int8 layers of a saved model."""
    rows = json.loads((folder / "mono_quant_report.json").read_text())["rows"]
    return {row["module"] for row in rows if row["action"] == "quantized"}


def matched(model, folder):
    """Names of the layers of a model that compressed-tensors takes for quantized ones."""
    block = config_of(folder)["quantization_config"]
    targets = block["config_groups"]["group_0"]["targets"]
    return {name for name, _ in match_named_modules(model, targets, block["ignore"])}


# ---- names ----

HEADLESS = {
    "LlamaModel": ("LlamaForCausalLM", hf.LlamaConfig(**TEXT), "layers.0"),
    "Qwen2Model": ("Qwen2ForCausalLM", hf.Qwen2Config(**TEXT), "layers.0.mlp"),
    "BertModel": ("BertForMaskedLM", hf.BertConfig(**transformer), "encoder.layer.0"),
    "ViTModel": ("ViTForImageClassification", hf.ViTConfig(**VISION), "q_proj"),
    "DistilBertModel": ("DistilBertForMaskedLM", hf.DistilBertConfig(dim=64, hidden_dim=128, n_layers=2, n_heads=4, vocab_size=200), "q_lin"),
    "T5EncoderModel": ("T5ForTokenClassification", hf.T5Config(d_model=64, d_ff=128, d_kv=16, num_layers=2, num_heads=4, vocab_size=200), "SelfAttention"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADLESS)
def test_a_model_without_head_is_described_as_the_inner_part_of_one_with_it_too(name, tmp_path):
    headed, config, skip = HEADLESS[name]
    model = build(name, config)
    folder = saved(model, tmp_path / "out", skip=[skip], disable_defaults=["small"])
    outer = build(headed, config)
    codes = quantized(folder)
    assert codes and matched(model, folder) == codes
    inner = {n for n in matched(outer, folder) if n.startswith(f"{outer.base_model_prefix}.")}
    assert inner == {f"{outer.base_model_prefix}.{n}" for n in codes}


@pytest.mark.parametrize("name", ["llama", "t5", "vit", "whisper"])
def test_a_model_with_a_head_names_what_it_has_and_the_same_inside_its_prefix(name, tmp_path):
    model = FAMILIES[name].build()
    folder = saved(model, tmp_path / "out")
    stored = load_file(folder / "model.safetensors")
    ignored = config_of(folder)["quantization_config"]["ignore"]
    modules = dict(model.named_modules())
    prefixes = ("", f"{model.base_model_prefix}.")
    assert all(any(f"{p}{n}" in modules or f"{p}{n}.weight" in stored for p in prefixes) for n in ignored)
    assert matched(model, folder) == quantized(folder)


def test_an_int8_output_head_is_a_target_by_name(tmp_path):
    model = build("LlamaForCausalLM", hf.LlamaConfig(**TEXT))
    folder = saved(model, tmp_path / "out", disable_defaults=["head"])
    assert config_of(folder)["quantization_config"]["config_groups"]["group_0"]["targets"] == [
        "Linear",
        "lm_head",
    ]
    assert "lm_head" in quantized(folder) and matched(model, folder) == quantized(folder)
    ids = torch.arange(3, 11)[None]
    theirs = hf.LlamaForCausalLM.from_pretrained(folder)(ids).logits
    assert (theirs - model(ids).logits).norm() < 0.05 * theirs.norm()
    whole = saved(build("LlamaForCausalLM", hf.LlamaConfig(**TEXT)), tmp_path / "float-head")
    assert config_of(whole)["quantization_config"]["config_groups"]["group_0"]["targets"] == ["Linear"]


# ---- layers that engines fuse ----

DEEPSEEK = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
            "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32}  # fmt: skip
LINEAR = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
          "layer_types": ["linear_attention", "full_attention"], "head_dim": 16}  # fmt: skip
FUSED = {
    "deepseek": ("DeepseekV3ForCausalLM", hf.DeepseekV3Config(**transformer, **DEEPSEEK), ("q_a_proj", "kv_a_proj_with_mqa")),
    "qwen3.5-z": ("Qwen3_5ForCausalLM", hf.Qwen3_5TextConfig(**TEXT, **LINEAR), ("in_proj_qkv", "in_proj_z")),
    "qwen3.5-a": ("Qwen3_5ForCausalLM", hf.Qwen3_5TextConfig(**TEXT, **LINEAR), ("in_proj_b", "in_proj_a")),
    "olmo-hybrid": ("OlmoHybridForCausalLM", hf.OlmoHybridConfig(**TEXT, **LINEAR, pad_token_id=0), ("g_proj", "q_proj")),
}  # fmt: skip


@pytest.mark.parametrize("case", FUSED)
def test_layers_that_vllm_fuses_are_kept_together(case, tmp_path):
    name, config, (skipped, other) = FUSED[case]
    result = mq.quantize(
        build(name, config), fidelity=False, skip=[skipped], min_params=1, disable_defaults=["small"]
    )
    reasons = {row.module: row.reason for row in result.report.rows if row.is_layer}
    pairs = [n for n in reasons if n.endswith(f".{skipped}")]
    assert pairs
    for module in pairs:
        beside = f"{module.rpartition('.')[0]}.{other}"
        assert reasons[beside] == f"decided together with {skipped}, which is kept"


# ---- scales ----


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "LlamaForCausalLM"), (torch.float16, "LlamaForCausalLM"),
                                            (torch.float32, "LlamaForCausalLM"), (torch.bfloat16, "GPT2LMHeadModel")])  # fmt: skip
def test_scales_have_the_dtype_of_their_weight_in_the_file_and_are_fp32_in_memory(dtype, name, tmp_path):
    config = (
        hf.LlamaConfig(**TEXT)
        if "Llama" in name
        else hf.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=200)
    )
    result = mq.quantize(build(name, config, dtype), fidelity=False)
    folder = result.save(tmp_path / "out")
    stored = {k: t for k, t in load_file(folder / "model.safetensors").items() if k.endswith("_scale")}
    assert stored and {t.dtype for t in stored.values()} == {dtype}
    ours, theirs = result.model.state_dict(), mq.load(folder).state_dict()
    for key, scale in stored.items():
        assert theirs[key].dtype == torch.float32
        assert torch.equal(theirs[key], ours[key]) and torch.equal(theirs[key], scale.float())


def test_scales_that_float16_cannot_hold_stay_fp32_and_exact(tmp_path):
    model = build("LlamaForCausalLM", hf.LlamaConfig(**TEXT), torch.float16)
    fine, rough = model.model.layers[0].mlp.down_proj, model.model.layers[1].mlp.down_proj
    with torch.no_grad():
        # a row this small has a scale below the smallest normal float16
        rough.weight[3] = (torch.arange(128) + 1).half() * 2**-20
    result = mq.quantize(model, fidelity=False)
    folder = result.save(tmp_path / "out")
    stored = load_file(folder / "model.safetensors")
    names = [f"model.layers.{i}.mlp.down_proj.weight_scale" for i in (0, 1)]
    assert [stored[n].dtype for n in names] == [torch.float16, torch.float32]
    assert stored[names[1]][3].item() == pytest.approx(128 * 2**-20 / 127, rel=2**-23)
    assert torch.equal(mq.load(folder).state_dict()[names[1]], stored[names[1]])
    assert fine.weight.dtype == torch.float16
    assert sum(t.nbytes for t in stored.values()) == result.report.bytes_after


def test_scales_that_the_checkpoint_merges_have_one_dtype(tmp_path):
    # q, k and v are one tensor in the file, and only k has a row that float16 cannot scale
    model = build("NomicBertModel", hf.NomicBertConfig(**transformer), torch.float16)
    with torch.no_grad():
        model.layers[0].self_attn.k_proj.weight[3] = (torch.arange(64) + 1).half() * 2**-20
    result = mq.quantize(model, fidelity=False)
    folder = result.save(tmp_path / "out")
    stored = load_file(folder / "model.safetensors")
    dtypes = [stored[f"encoder.layers.{i}.attn.Wqkv.weight_scale"].dtype for i in (0, 1)]
    assert dtypes == [torch.float32, torch.float16]
    ours, theirs = result.model.state_dict(), mq.load(folder).state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_a_module_given_twice_keeps_one_scale_in_the_file(tmp_path):
    shared = torch.nn.Linear(64, 64)
    model = torch.nn.Sequential(shared, torch.nn.ReLU(), shared).to(torch.bfloat16)
    folder = mq.quantize(model, fidelity=False, disable_defaults=["head", "small"]).save(tmp_path / "out")
    stored = load_file(folder / "model.safetensors")
    assert {k: t.dtype for k, t in stored.items()} == {
        "0.weight": torch.int8, "0.weight_scale": torch.bfloat16, "0.bias": torch.bfloat16}  # fmt: skip


# ---- config.json ----

# configs as transformers 4 writes them
OLD = {
    "Qwen2ForCausalLM": {"model_type": "qwen2", **TEXT, "rope_theta": 1e6, "rope_scaling": None, "torch_dtype": "float32"},
    "LlamaForCausalLM": {"model_type": "llama", **TEXT, "rope_theta": 5e5, "torch_dtype": "bfloat16", "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}},
    "Qwen3MoeForCausalLM": {"model_type": "qwen3_moe", **TEXT, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
                            "moe_intermediate_size": 48, "rope_theta": 1e6, "torch_dtype": "float32"},
    "GPTNeoXForCausalLM": {"model_type": "gpt_neox", **transformer, "rotary_emb_base": 5000, "rotary_pct": 0.5},
    "Gemma3ForConditionalGeneration": {
        "model_type": "gemma3", "torch_dtype": "bfloat16", "mm_tokens_per_image": 4, "image_token_index": 190,
        "text_config": {"model_type": "gemma3_text", **TEXT, "head_dim": 16, "rope_theta": 1e6, "rope_local_base_freq": 5e3,
                        "torch_dtype": "bfloat16", "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        "vision_config": {"model_type": "siglip_vision_model", **VISION, "torch_dtype": "bfloat16"}},
}  # fmt: skip
OURS = {"architectures", "quantization_config", "dtype", "torch_dtype"}


def old_folder(name, folder):
    """A folder as transformers 4 would have left it."""
    raw = OLD[name] | {"architectures": [name], "transformers_version": "4.44.0"}
    config = hf.CONFIG_MAPPING[raw["model_type"]].from_dict(json.loads(json.dumps(raw)))
    build(name, config, getattr(torch, raw.get("torch_dtype", "float32"))).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(raw))
    return raw


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
@pytest.mark.parametrize("name", OLD)
def test_the_config_of_a_folder_keeps_its_own_keys(name, dtype, tmp_path):
    raw = old_folder(name, tmp_path / "source")
    folder = saved(tmp_path / "source", tmp_path / "out", dtype=dtype)
    written = config_of(folder)
    parts = [(written, raw)] + [(written[k], raw[k]) for k in ("text_config", "vision_config") if k in raw]
    for ours, source in parts:
        keys = [k for k in source if k not in OURS and not k.endswith("_config")]
        assert {k: ours[k] for k in keys} == {k: source[k] for k in keys}
        assert ours.keys() - OURS == source.keys() - OURS
        expected = "float16" if dtype == "fp16" else raw.get("torch_dtype", "float32")
        held = {k: ours[k] for k in ("dtype", "torch_dtype") if k in ours}
        assert held == ({"torch_dtype": expected} if "torch_dtype" in source else {"dtype": expected})
    assert written["architectures"] == [name] and ("quantization_config" in written) == (dtype == "int8")


@pytest.mark.parametrize("name", OLD)
def test_the_config_of_a_model_in_memory_says_what_transformers_4_looks_for(name, tmp_path):
    raw = OLD[name]
    config = hf.CONFIG_MAPPING[raw["model_type"]].from_dict(json.loads(json.dumps(raw)))
    model = build(name, config, getattr(torch, raw.get("torch_dtype", "float32")))
    written = config_of(saved(model, tmp_path / "out"))
    for ours, source in [(written, raw)] + [(written[k], raw[k]) for k in ("text_config",) if k in raw]:
        looked_for = ("rope_theta", "rope_local_base_freq", "rotary_emb_base", "rotary_pct", "num_experts")
        assert {k: ours[k] for k in looked_for if k in source} == {
            k: source[k] for k in looked_for if k in source
        }
        if source.get("rope_scaling"):
            assert source["rope_scaling"].items() <= ours["rope_scaling"].items()
    assert written["torch_dtype"] == written["dtype"] == raw.get("torch_dtype", "float32")
    again = type(config).from_dict(
        json.loads(json.dumps({k: v for k, v in written.items() if k != "quantization_config"}))
    )
    assert again.get_text_config().rope_parameters == config.get_text_config().rope_parameters


def test_what_changed_after_loading_wins_over_the_config_of_the_folder(tmp_path):
    raw = old_folder("Qwen2ForCausalLM", tmp_path / "source")
    result = mq.quantize(tmp_path / "source", fidelity=False)
    result.model.config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 2e6}
    result.model.config.id2label = {0: "no", 1: "yes"}
    result.model.config.use_cache = False
    written = config_of(result.save(tmp_path / "out"))
    assert (written["rope_theta"], written["rope_parameters"]["rope_theta"]) == (2e6, 2e6)
    assert written["rope_scaling"]["factor"] == 2.0 and written["use_cache"] is False
    assert written["id2label"] == {"0": "no", "1": "yes"}
    same = raw.keys() - {"rope_theta", "rope_scaling", "id2label", "use_cache"} - OURS
    assert {k: written[k] for k in same} == {k: raw[k] for k in same}
    model = mq.load(tmp_path / "out")
    assert model.config.rope_parameters["factor"] == 2.0 and model.config.use_cache is False


def test_a_vocabulary_resized_in_memory_is_written(tmp_path):
    old_folder("Qwen2ForCausalLM", tmp_path / "source")
    model = hf.Qwen2ForCausalLM.from_pretrained(tmp_path / "source")
    model.resize_token_embeddings(210, mean_resizing=False)
    written = config_of(saved(model, tmp_path / "out"))
    assert (written["vocab_size"], written["rope_theta"]) == (210, 1e6)
