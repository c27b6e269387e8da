"""What the fields of configs count, by their names, and how much of it a small model has."""

import re

# How large a field may be, by what it counts.
LIMITS = {
    "width": 64,
    "inner": 128,
    "head": 16,
    "heads": 4,
    "keys": 2,
    "layers": 2,
    "tokens": 160,
    "image": 32,
    "window": 4,
    "as it is": 1 << 40,
}
LAYERS, TOKENS = LIMITS["layers"], LIMITS["tokens"]
# The first expression that matches a whole name says what a field counts, or how large it may be.
RULES: tuple[tuple[str, str | int], ...] = (
    (r"type_vocab_size|.*num_labels|qk_head_dim|.*_loss_.*|num_channels|num_time_features", "as it is"),
    (r"num_feat_extract_layers|num_adapter_layers|keypoint_decoder_dim|encode_proj_layers", "as it is"),
    (r"(.*_)?vocab_size(_.*)?|n_vocab|additional_vocab_size|num_embeddings|head_out_channels", "tokens"),
    (r".*codebook_size", 64),
    (r"entity_vocab_size|num_(object|attr|qa|bpe|wordpiece|character)_labels", 48),
    (
        r".*num_hidden_layers.*|n_layers?|(.*_)?num_layers(_.*)?|(en|de)coder_layers|.*_(num_)?layers|depth",
        "layers",
    ),
    (r"[lrx]_layers|num_blocks|layers|.*_depth|num_self_attends_per_block|num_hidden_groups", "layers"),
    (r".*(num_key_value_heads|num_kv_heads|n_head_kv).*", "keys"),
    (r".*(attention|attn|num|n|mamba|key|value|resampler|index)_heads(_.*)?|n_head", "heads"),
    (r".*head_dim|d_kv|d_head|dim_head|kv_channels|mamba_d_head|.*_head_size", "head"),
    (r".*lora_rank|laurel_rank", 32),
    (r"rotary_dim|num_filters|n_filters", 8),
    (r"base_channels", 32),
    (r".*(time_step|dt)_rank", 8),
    (
        r"(.*_)?(hidden_size|hidden_dim|embed(ding)?_dim|embedding_size|emb_dim|d_model|n_embd|dim|width)",
        "width",
    ),
    (
        r".*(hidden|projection|projector|embed(ding)?|proj|latent|codevector|output|feature)_(size|dim|dims|dimension)",
        "width",
    ),
    (
        r".*(intermediate|ffn|feed_?forward|inner|mlp|linear)_(size|dim|hidden_size|units).*|d_ff|n_inner",
        "inner",
    ),
    (r"d_inner|.*dim_feedforward|ffn_hidden_size|.*_ffn_hidden_size|mamba_d_ssm", "inner"),
    (r".*num_(local_|routed_|total_)?experts|n_routed_experts|moe_num_experts|zero_expert_num", 4),
    (r"num_experts_per_tok(en)?|moe_(top)?k|num_selected_experts", 2),
    (r"n_group|num_expert_group", 2),
    (r"topk_group|n_shared_experts|num_shared_experts|moe_num_shared_experts|first_k_dense_replace", 1),
    (r"(.*_)?max_(.*_)?position(s|_embeddings)|n_positions|max_seq_len|seq_len|model_max_length", 128),
    (r"(.*_)?(sliding_window|window_size|attention_window|local_attention|attention_chunk_size).*", "window"),
    (r".*image_size", "image"),
    (r"stem_.*channels|reassemble_hidden_size|fusion_hidden_size", "width"),
    (r"patch_size", 8),
    (r"(mamba_)?(d_)?state_size|mamba_d_state|ssm_state_size", 8),
    (r"(mamba_)?chunk_size|mamba_chunk_size", 16),
    (r"num_conv_pos_embeddings", 16),
    (r"num_conv_pos_embedding_groups", 4),
    (r"num_(queries|query_tokens|latents)|(resampler_n|resampler_num|num)_latents|latent_query_num", 8),
)
TOKEN = re.compile(
    r".*(token|_tok)_(id|index|ids)(_.*)?|(mask|unk|pad|bos|eos)_index|.*_(bos|eos|start|end|newline|patch|pad)_id"
)
# Lists that name layers by number, and those that hold the width of each stage of a pyramid.
PLACES = re.compile(
    r".*(_indexes|_indices|_idxs|_layer_ids|_indx|intermediate_hook_ids)|(cross_attention|extract|moe|spatial_target|mlp_only|"
    r"sparse|rope_scaling|full_attention|global_attention|look_ahead|look_backward)_layers|.*_attention_blocks"
)
NAMED = re.compile(rf"{PLACES.pattern}|neck_hidden_sizes")
STAGE_WIDTHS = re.compile(
    r".*hidden_sizes|(.*_)?embed_dims?(_per_stage)?|.*_channels|conv_dim|tdnn_dim|out_features|.*_dims|.*channel_list|.*_sizes_dim"
)
STAGE_DEPTHS = re.compile(
    r"depths?|layer_depths|.*num_blocks|num_block_repeats|blocks_per_stage|block_sizes|n_attn_blocks"
)
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers", "num_layer")
# What some models need and their configs leave open.
MISSING = {"head_dim": LIMITS["head"], "num_key_value_heads": LIMITS["heads"], "num_experts_per_tok": 2}
# Stages halve the image, and each needs a window of it.
PYRAMID = {"width": 0, "image": 64, "window": 2}
# How much narrower and shallower the stages become.
NARROWER, SHALLOW = 4, 2
# A config in which one of these is a list describes the stages of a pyramid.
STAGED = (
    "depths",
    "embed_dim",
    "embed_dim_per_stage",
    "hidden_sizes",
    "num_attention_heads",
    "num_heads",
    "strides",
)
