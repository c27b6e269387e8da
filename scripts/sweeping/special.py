"""What the rules of `shrinking` and `inputs` do not get right, by model type or class."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sweeping.inputs import Inputs

Fields = Mapping[str, Any] | Callable[[], Mapping[str, Any]]


def _mrope(*sections: int, **more: Any) -> dict[str, Any]:
    """Return rotary parameters for heads of 16, split over time, height and width."""
    return {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": list(sections), **more}


def _no_timm() -> dict[str, Any]:
    """Return the fields of a DETR whose backbone needs no timm."""
    from transformers import ResNetConfig  # noqa: PLC0415

    sizes = {"embedding_size": 16, "hidden_sizes": [16, 24, 32, 64], "depths": [1, 1, 2, 1]}
    backbone = ResNetConfig(**sizes, layer_type="basic", out_features=["stage4"])
    return {"backbone_config": backbone}


_TEXT_MROPE = {"text_config.rope_parameters": _mrope(2, 3, 3)}
_MROPE = {"rope_parameters": _mrope(2, 3, 3)}
_SMALL_MROPE = _mrope(1, 1, 2, partial_rotary_factor=0.5)
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_expand": 2}
_SERIES = {"prediction_length": 4, "context_length": 8, "num_time_features": 0}
_EFFICIENT = {
    "in_channels": [32, 16, 24, 40, 80, 112, 192],
    "out_channels": [16, 24, 40, 80, 112, 192, 320],
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
    "hidden_dim": 1280,
}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
_FOUR_DEPTHS = {"backbone_config.num_hidden_layers": 4, "backbone_config.out_indices": [1, 2, 3, 4]}
_HYBRID = {
    "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    "num_hidden_layers": 4,
}

# A dotted name is a field of a sub-config; what needs transformers is made when it is asked for.
FIELDS: dict[str, Fields] = {
    "align": {f"vision_config.{k}": v for k, v in _EFFICIENT.items()},
    "autoformer": _SERIES,
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "bit": {"num_groups": 4},
    "blt": {"encoder_hash_byte_group_vocab": 500},
    "chameleon": {"vocabulary_map": {"<image>": 150}},
    "colqwen2": {"vlm_config.text_config.rope_parameters": _mrope(2, 3, 3)},
    "conditional_detr": _no_timm,
    "cosmos3_edge": _TEXT_MROPE,
    "cosmos3_edge_text": _MROPE,
    "cpmant": {"dim_ff": 128},
    "csm": {"codec_config.upsample_groups": 64},
    "cvt": {"depth": [1, 2, 2], "drop_path_rate": [0.0, 0.0, 0.1], "num_stages": 3},
    "d_fine": {"decoder_layers": 3},
    "dab-detr": _no_timm,
    "dbrx": {"attn_config.rope_theta": 10_000.0},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"]},
    "deformable_detr": _no_timm,
    "deimv2": {"decoder_layers": 3},
    "depth_anything": _FOUR_DEPTHS,
    "detr": _no_timm,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "efficientnet": _EFFICIENT,
    "ernie4_5_vl_moe": {"text_config.rope_parameters": _mrope(3, 3, 2)},
    "esm": {"vocab_size": 33, "mask_token_id": 32, "pad_token_id": 1},
    "exaone4_5_vision": {"window_size": 32},
    "falcon_h1": _MAMBA,
    "fun_asr_nano": {"adaptor_config.intermediate_size": 16},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": [128] * 4,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
    },
    "glm46v": _TEXT_MROPE,
    "glm4v": _TEXT_MROPE,
    "glm4v_moe": {"text_config.rope_parameters": _SMALL_MROPE},
    "glm4v_moe_text": {"rope_parameters": _SMALL_MROPE},
    "glm4v_text": _MROPE,
    "glm_image": _TEXT_MROPE,
    "glm_image_text": _MROPE,
    "glm_ocr": _TEXT_MROPE,
    "glm_ocr_text": _MROPE,
    "granitemoehybrid": {
        **_MAMBA,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "hrm_text": {"num_layers_per_stack": 2},
    "informer": _SERIES,
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "kyutai_speech_to_text": {"codec_config.upsample_groups": 64},
    "layoutlmv3": {"coordinate_size": 10, "shape_size": 12},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lilt": {"hidden_size": 48},
    "longcat_flash": {"qk_head_dim": 32},
    "lw_detr": {"backbone_config.image_size": 128},
    "lw_detr_vit": {"image_size": 128},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "maskformer": {"backbone_config.embed_dim": 24},
    "mimi": {"upsample_groups": 64},
    "mimi_decoder": {"upsample_groups": 64},
    "mistral4": {"qk_rope_head_dim": 16, "qk_head_dim": 32, "head_dim": 32},
    "mobilebert": {"embedding_size": 32, "intra_bottleneck_size": 64, "true_hidden_size": 64},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "nemo_speechlm": {"text_config.n_groups": 2},
    "nemotron_h": {"n_groups": 2},
    "nemotron_h_omni": {"text_config.n_groups": 2},
    "paddleocr_vl": _TEXT_MROPE,
    "pocket_tts_audio_tokenizer": {"upsample_groups": 64},
    "pocket_tts_audio_tokenizer_decoder": {"upsample_groups": 64},
    "pp_lcnet_v4": {"stem_channels": (3, 48, 96)},
    "pp_ocrv6_small_det": {"backbone_config.stem_channels": (3, 48, 96)},
    "pp_ocrv6_small_rec": {"backbone_config.stem_channels": (3, 48, 96)},
    "pp_ocrv6_tiny_rec": {"backbone_config.stem_channels": (3, 48, 96)},
    "prompt_depth_anything": _FOUR_DEPTHS,
    "qwen2_5_omni_thinker": _TEXT_MROPE,
    "qwen2_5_vl": _TEXT_MROPE,
    "qwen2_5_vl_text": _MROPE,
    "qwen2_5_vl_vision": {"window_size": 32},
    "qwen2_vl": _TEXT_MROPE,
    "qwen2_vl_text": _MROPE,
    "qwen3_omni_moe": {"talker_config.text_config.shared_expert_intermediate_size": 64},
    "qwen4_exp": _INDEXER,
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 64},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [4, 16],
        "axial_pos_embds_dim": [16, 48],
    },
    "rt_detr_v2": {"decoder_layers": 3},
    "rwkv": {"rescale_every": 1},
    "seggpt": {"num_hidden_layers": 6, "intermediate_hidden_state_indices": [2, 3, 4, 5], "merge_index": 1},
    "step3p7": {"text_config.sliding_window": 4},
    "swin2sr": {"embed_dim": 48, "num_heads": [2, 2], "depths": [2, 2]},
    "table-transformer": _no_timm,
    "time_series_transformer": _SERIES,
    "tipsv2_dpt": _FOUR_DEPTHS,
    "wav2vec2-bert": {"vocab_size": 32, "feature_projection_input_dim": 80},
    "wav2vec2-conformer": {"vocab_size": 32},
    "zamba": {**_HYBRID, "attention_hidden_size": 128, "attention_head_dim": 32},
}


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


def _tokens(*shape: int) -> Tensor:
    return torch.randint(5, 40, shape, generator=torch.Generator().manual_seed(5))


def _naflex(config: Any) -> Inputs:
    patch = getattr(config, "vision_config", config).patch_size
    grid = torch.tensor([[4, 4], [4, 4]])
    mask = torch.ones(2, 16, dtype=torch.long)
    return {
        "pixel_values": _noise(2, 16, 3 * patch * patch),
        "pixel_attention_mask": mask,
        "spatial_shapes": grid,
    }


# What makes the inputs of an architecture from its config.
INPUTS: dict[str, Callable[[Any], Inputs]] = {
    "lxmert": lambda config: {
        "input_ids": _tokens(2, 12),
        "visual_feats": _noise(2, 4, config.visual_feat_dim),
        "visual_pos": _noise(2, 4, config.visual_pos_dim),
    },
    "musicgen": lambda config: {"input_ids": _tokens(2 * config.num_codebooks, 12)},
    "musicgen_melody": lambda config: {"input_ids": _tokens(2 * config.num_codebooks, 12)},
    "pix2struct": lambda config: {
        "flattened_patches": _noise(2, 16, 2 + config.vision_config.patch_embed_hidden_size),
        "decoder_input_ids": _tokens(2, 6),
    },
    "siglip2": _naflex,
    "siglip2_vision_model": _naflex,
}
