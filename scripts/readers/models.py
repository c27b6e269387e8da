"""The tiny models that other programs are given: random weights, but sharp enough that greedy tokens mean something."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import nn

# vLLM's CPU attention starts at 32 numbers per head.
TEXT = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MHA = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}
HEADS = {"head_dim": 32}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
# 1e6, unlike the default: a reader that does not find it computes something else
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
IMAGE = {"image_token_id": 250}


@dataclass(frozen=True)
class Case:
    """One model and how it is quantized.

    Attributes:
        cls: name of the class in transformers.
        config: name of the config class.
        fields: of the config.
        dtype: of the checkpoint.
        options: of `mono_quant.quantize`.
        read: `logits`, or `hidden` for a model without head.
    """

    cls: str
    config: str
    fields: Mapping[str, Any]
    dtype: str = "float32"
    options: Mapping[str, Any] = field(default_factory=dict)
    read: str = "logits"

    def build(self) -> nn.Module:
        """Return the model, the same every time, in its dtype."""
        torch.manual_seed(0)
        config = getattr(hf, self.config)(**self.fields)
        model: nn.Module = getattr(hf, self.cls)(config).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() > 1 and "conv" not in name and "A_log" not in name:
                    weight.normal_(0, 1 if "embed" in name else 1.5 / weight.shape[-1] ** 0.5)
        return model.to(getattr(torch, self.dtype))


def text(name: str, config: str | None = None, **fields: Any) -> Case:
    return Case(f"{name}ForCausalLM", config or f"{name}Config", {**TEXT, **fields})


def _cases() -> dict[str, Case]:
    sub = {**TEXT, **HEADS}
    deepseek = {
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "num_key_value_heads": 4,
    }
    linear = {
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "layer_types": ["linear_attention", "full_attention"],
    }
    return {
        "llama": text("Llama", **ROPE),
        "llama3-rope": text(
            "Llama",
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        ),
        "llama-tied": text("Llama", tie_word_embeddings=True),
        "llama-bf16": Case("LlamaForCausalLM", "LlamaConfig", TEXT, "bfloat16"),
        "llama-fp16": Case("LlamaForCausalLM", "LlamaConfig", TEXT, "float16"),
        "llama-skip": Case("LlamaForCausalLM", "LlamaConfig", TEXT, options={"skip": ["layers.0"]}),
        "llama-int8-head": Case(
            "LlamaForCausalLM", "LlamaConfig", TEXT, options={"disable_defaults": ["head"]}
        ),
        "gpt-bigcode": Case(
            "GPTBigCodeForCausalLM",
            "GPTBigCodeConfig",
            {"n_embd": 128, "n_layer": 2, "n_head": 4, "vocab_size": 256, "n_positions": 256},
        ),
        "modernbert-headless": Case(
            "ModernBertModel",
            "ModernBertConfig",
            {**MHA, "cls_token_id": 1, "sep_token_id": 2},
            read="hidden",
        ),
        "modernbert-headless-kept-fp16": Case(
            "ModernBertModel",
            "ModernBertConfig",
            {**MHA, "cls_token_id": 1, "sep_token_id": 2},
            options={"kept": "fp16"},
            read="hidden",
        ),
        "llama-kept-fp16": Case("LlamaForCausalLM", "LlamaConfig", TEXT, options={"kept": "fp16"}),
        "llama-tied-kept-bf16": Case(
            "LlamaForCausalLM", "LlamaConfig", TEXT | {"tie_word_embeddings": True}, options={"kept": "bf16"}
        ),
        "qwen3-headless-kept-fp16": Case(
            "Qwen3Model", "Qwen3Config", TEXT | {"head_dim": 32}, options={"kept": "fp16"}, read="hidden"
        ),
        "llama-headless": Case("LlamaModel", "LlamaConfig", TEXT, read="hidden"),
        "llama-headless-skip": Case(
            "LlamaModel", "LlamaConfig", TEXT, options={"skip": ["layers.0"]}, read="hidden"
        ),
        "qwen2": text("Qwen2", **ROPE),
        "qwen2-headless-skip": Case(
            "Qwen2Model", "Qwen2Config", {**TEXT, **ROPE}, options={"skip": ["layers.0"]}, read="hidden"
        ),
        "qwen3": text("Qwen3", **HEADS, **ROPE),
        "qwen3-headless-skip": Case(
            "Qwen3Model", "Qwen3Config", {**TEXT, **HEADS}, options={"skip": ["layers.0"]}, read="hidden"
        ),
        "mistral": text("Mistral", **HEADS, **ROPE),
        "mistral-headless-skip": Case(
            "MistralModel", "MistralConfig", {**TEXT, **HEADS}, options={"skip": ["layers.0"]}, read="hidden"
        ),
        "gemma": text("Gemma", **HEADS),
        "gemma2": text("Gemma2", **HEADS, query_pre_attn_scalar=32, sliding_window=64),
        "gemma2-headless-skip": Case(
            "Gemma2Model", "Gemma2Config", {**TEXT, **HEADS}, options={"skip": ["layers.0"]}, read="hidden"
        ),
        "gemma3-text": text(
            "Gemma3",
            "Gemma3TextConfig",
            **HEADS,
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=64,
        ),
        "gemma3-headless-skip": Case(
            "Gemma3TextModel",
            "Gemma3TextConfig",
            {**TEXT, **HEADS, "query_pre_attn_scalar": 32},
            options={"skip": ["layers.0"]},
            read="hidden",
        ),
        "phi": text("Phi"),
        "phi3": text("Phi3"),
        "opt": Case("OPTForCausalLM", "OPTConfig", {**MHA, "ffn_dim": 256, "word_embed_proj_dim": 128}),
        "gpt-neox": Case("GPTNeoXForCausalLM", "GPTNeoXConfig", MHA),
        "bloom": Case(
            "BloomForCausalLM",
            "BloomConfig",
            {"vocab_size": 256, "hidden_size": 128, "n_layer": 2, "n_head": 4},
        ),
        "falcon": Case("FalconForCausalLM", "FalconConfig", MHA),
        "stablelm": text("StableLm"),
        "olmo": text("Olmo"),
        "olmo2": text("Olmo2"),
        "olmo3": text("Olmo3", layer_types=["sliding_attention", "full_attention"], sliding_window=64),
        "granite": text("Granite", **ROPE),
        "cohere": text("Cohere"),
        "cohere2": text("Cohere2", **HEADS),
        "starcoder2": text("Starcoder2"),
        "nemotron": text("Nemotron", **HEADS),
        "smollm3": text("SmolLM3", **ROPE),
        "glm": text("Glm", **HEADS),
        "glm4": text("Glm4", **HEADS),
        "exaone4": text(
            "Exaone4", **HEADS, layer_types=["sliding_attention", "full_attention"], sliding_window=64
        ),
        "ernie4.5": text("Ernie4_5", **HEADS),
        "seed-oss": text("SeedOss", **HEADS),
        "helium": text("Helium", **HEADS),
        "arcee": text("Arcee", **HEADS),
        "apertus": text("Apertus"),
        "hunyuan": text("HunYuanDenseV1", **HEADS),
        "mixtral": text("Mixtral", num_local_experts=4, num_experts_per_tok=2),
        "qwen2-moe": text("Qwen2Moe", **MOE, shared_expert_intermediate_size=128),
        "qwen3-moe": text("Qwen3Moe", **MOE, **HEADS, **ROPE),
        "olmoe": text("Olmoe", num_experts=4, num_experts_per_tok=2),
        "granite-moe": text("GraniteMoe", num_local_experts=4, num_experts_per_tok=2),
        "glm4-moe": text("Glm4Moe", **{**deepseek, **HEADS, "partial_rotary_factor": 0.5}),
        "deepseek-v2": text("DeepseekV2", **{**deepseek, "topk_method": "greedy"}),
        "deepseek-v3": text("DeepseekV3", **deepseek),
        "qwen3.5": text("Qwen3_5", "Qwen3_5TextConfig", **HEADS, **linear),
        "qwen3-next": text("Qwen3Next", **HEADS, **linear, **MOE, shared_expert_intermediate_size=64),
        "olmo-hybrid": text(
            "OlmoHybrid", **HEADS, **{**linear, "linear_num_value_heads": 4, "linear_num_key_heads": 4}
        ),
        "lfm2": text("Lfm2", layer_types=["conv", "full_attention"]),
        "mamba": Case(
            "MambaForCausalLM", "MambaConfig", {"vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 2}
        ),
        "mamba2": Case(
            "Mamba2ForCausalLM",
            "Mamba2Config",
            {
                "vocab_size": 256,
                "hidden_size": 128,
                "num_hidden_layers": 2,
                "num_heads": 8,
                "head_dim": 32,
                "n_groups": 1,
            },
        ),
        "falcon-h1": text("FalconH1", **HEADS, mamba_d_ssm=256, mamba_n_heads=8, mamba_d_head=32),
        "jamba": text(
            "Jamba", num_experts=1, num_experts_per_tok=1, attn_layer_period=2, attn_layer_offset=1
        ),
        "gemma3-vl": Case(
            "Gemma3ForConditionalGeneration",
            "Gemma3Config",
            {
                "text_config": sub,
                "vision_config": VISION,
                "mm_tokens_per_image": 4,
                "boi_token_index": 248,
                "eoi_token_index": 249,
                "image_token_index": 250,
                **IMAGE,
            },
            "bfloat16",
        ),
        "llava": Case(
            "LlavaForConditionalGeneration",
            "LlavaConfig",
            {
                "text_config": {"model_type": "llama", **TEXT},
                "vision_config": {"model_type": "clip_vision_model", **VISION},
                "image_token_index": 250,
            },
            "bfloat16",
        ),
        "llava-int8-head": Case(
            "LlavaForConditionalGeneration",
            "LlavaConfig",
            {
                "text_config": {"model_type": "llama", **TEXT},
                "vision_config": {"model_type": "clip_vision_model", **VISION},
                "image_token_index": 250,
            },
            options={"disable_defaults": ["head"]},
        ),
        "qwen2.5-vl": Case(
            "Qwen2_5_VLForConditionalGeneration",
            "Qwen2_5_VLConfig",
            {
                "text_config": {
                    **TEXT,
                    "rope_parameters": {
                        "rope_type": "default",
                        "rope_theta": 1e6,
                        "mrope_section": [4, 6, 6],
                    },
                },
                "vision_config": {
                    "depth": 2,
                    "hidden_size": 64,
                    "intermediate_size": 128,
                    "num_heads": 2,
                    "patch_size": 8,
                    "out_hidden_size": 128,
                    "fullatt_block_indexes": [1],
                    "window_size": 32,
                },
                "image_token_id": 250,
                "video_token_id": 251,
                "vision_start_token_id": 248,
                "vision_end_token_id": 249,
            },
            "bfloat16",
        ),
        "bert-headless-skip": Case(
            "BertModel", "BertConfig", MHA, options={"skip": ["layer.0"]}, read="hidden"
        ),
        "roberta-headless-skip": Case(
            "RobertaModel", "RobertaConfig", MHA, options={"skip": ["layer.0"]}, read="hidden"
        ),
        "xlm-roberta-headless-skip": Case(
            "XLMRobertaModel", "XLMRobertaConfig", MHA, options={"skip": ["layer.0"]}, read="hidden"
        ),
        "distilbert-headless-skip": Case(
            "DistilBertModel",
            "DistilBertConfig",
            {
                "dim": 128,
                "hidden_dim": 256,
                "n_layers": 2,
                "n_heads": 4,
                "vocab_size": 256,
                "max_position_embeddings": 256,
            },
            options={"skip": ["layer.0.attention.q_lin"]},
            read="hidden",
        ),
        "modernbert-headless-skip": Case(
            "ModernBertModel",
            "ModernBertConfig",
            {**MHA, "cls_token_id": 1, "sep_token_id": 2},
            options={"skip": ["layers.0"]},
            read="hidden",
        ),
    }


CASES: Mapping[str, Case] = _cases()
