"""A small config of any architecture: sizes by the names of fields, layers by the kinds that a model mixes.

Everything that is a width becomes the same width, so that what has to agree still agrees; what a config computes from its
sizes is left to it.
"""

import re
from collections.abc import Mapping
from typing import Any

# How large a field may be, by what it counts.
_LIMITS = {
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
_LAYERS, _TOKENS = _LIMITS["layers"], _LIMITS["tokens"]
# The first expression that matches a whole name says what a field counts, or how large it may be.
_RULES: tuple[tuple[str, str | int], ...] = (
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
        r".*(hidden|projection|projector|embed(ding)?|proj|latent|codevector|output|feature)_(size|dim|dims)",
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
_TOKEN = re.compile(
    r".*(token|_tok)_(id|index|ids)(_.*)?|(mask|unk|pad|bos|eos)_index|.*_(bos|eos|start|end|newline|patch|pad)_id"
)
# Lists that name layers by number, and those that hold the width of each stage of a pyramid.
_PLACES = re.compile(
    r".*(_indexes|_indices|_idxs|_layer_ids|_indx|intermediate_hook_ids)|(cross_attention|extract|moe|spatial_target|mlp_only|"
    r"sparse|rope_scaling|full_attention|global_attention|look_ahead|look_backward)_layers|.*_attention_blocks"
)
_NAMED = re.compile(rf"{_PLACES.pattern}|neck_hidden_sizes")
_STAGE_WIDTHS = re.compile(
    r".*hidden_sizes|(.*_)?embed_dims?(_per_stage)?|.*_channels|conv_dim|tdnn_dim|out_features|.*_dims|.*channel_list|.*_sizes_dim"
)
_STAGE_DEPTHS = re.compile(
    r"depths?|layer_depths|.*num_blocks|num_block_repeats|blocks_per_stage|block_sizes|n_attn_blocks"
)
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers", "num_layer")
# What some models need and their configs leave open.
_MISSING = {"head_dim": _LIMITS["head"], "num_key_value_heads": _LIMITS["heads"], "num_experts_per_tok": 2}
# Stages halve the image, and each needs a window of it.
_PYRAMID = {"width": 0, "image": 64, "window": 2}
# How much narrower and shallower the stages become.
_NARROWER, _SHALLOW = 4, 2


def shrunk(config: Any, special: Mapping[str, Any]) -> Any:
    """Return a config of the same class with small sizes.

    Args:
        config: as its class makes it.
        special: fields of this architecture that the rules do not get right; a dotted name is a field of a sub-config.
    """
    return _shrunk(config, special, {})


def _shrunk(config: Any, special: Mapping[str, Any], tokens: dict[int, int]) -> Any:
    from transformers import PreTrainedConfig  # noqa: PLC0415

    fields = {k: v for k, v in vars(config).items() if not k.startswith("_")}
    shape = _Shape(fields)
    changes: dict[str, Any] = shape.outlets(getattr(config, "_out_indices", None))
    for name, value in fields.items():
        if isinstance(value, PreTrainedConfig):
            below = {k.removeprefix(f"{name}."): v for k, v in special.items() if k.startswith(f"{name}.")}
            changes[name] = _shrunk(value, below, tokens)
        elif _TOKEN.fullmatch(name):
            changes[name] = _token(value, tokens)
        else:
            changes[name] = shape.field(name, value)
    changes = {k: v for k, v in changes.items() if isinstance(v, PreTrainedConfig) or v != fields.get(k)}
    differing = config.to_diff_dict()
    kept = {k: v for k, v in fields.items() if k in differing and isinstance(v, (str, int, float))}
    own = {k: v for k, v in special.items() if "." not in k}
    return type(config)(**{**kept, **changes, **own})


class _Shape:
    """What the fields of one config say about its layers and stages, and what each becomes."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields = fields
        self.layers = next((v for k in _DEPTHS if isinstance(v := fields.get(k), int) and v > 0), 0)
        self.rows = self._rows()
        # widths of a pyramid are products of one number and the stage, and have to stay so
        self.is_pyramid = any(
            isinstance(fields.get(k), (list, tuple))
            for k in (
                "depths",
                "hidden_sizes",
                "embed_dim_per_stage",
                "num_heads",
                "embed_dim",
                "strides",
                "num_attention_heads",
            )
        )

    def field(self, name: str, value: Any) -> Any:
        """Return the small value of a field."""
        if value is None and self.fields.get("num_attention_heads"):
            return _MISSING.get(name)
        if isinstance(value, bool):
            return value
        if isinstance(value, int):
            return self._number(name, value)
        if isinstance(value, (list, tuple)) and value:
            return self._list(name, value)
        return value

    def outlets(self, indices: Any) -> dict[str, Any]:
        """Return the stages that a backbone hands out: those of a pyramid, or its last layers."""
        if not indices:
            return {}
        if self.is_pyramid or not self.layers:
            return {"out_indices": list(indices)}
        return {"out_indices": list(range(1, len(self.rows) + 1))[-len(indices) :]}

    def _number(self, name: str, value: int) -> int:
        kind = next((kind for names, kind in _RULES if re.fullmatch(names, name)), "as it is")
        if kind == "layers":
            return min(value, len(self.rows))
        if kind == "keys" and value == self.fields.get("num_attention_heads"):
            kind = "heads"
        if self.is_pyramid and kind in _PYRAMID:
            return max(1, value // _NARROWER) if kind == "width" else min(value, _PYRAMID[kind])
        return min(value, _LIMITS[kind] if isinstance(kind, str) else kind)

    def _list(self, name: str, value: Any) -> Any:
        numbers = all(isinstance(v, int) and not isinstance(v, bool) for v in value)
        if numbers and _PLACES.fullmatch(name) and not self.is_pyramid:
            return type(value)(range(len(self.rows)))[-len(value) :]
        if len(value) == self.layers and self.layers > _LAYERS:
            return type(value)(value[i] for i in self.rows)
        if numbers and _STAGE_DEPTHS.fullmatch(name):
            return type(value)(min(v, _SHALLOW) for v in value)
        if numbers and _STAGE_WIDTHS.fullmatch(name):
            return type(value)(v // _NARROWER if v > 16 else v for v in value)
        return value

    def _rows(self) -> list[int]:
        """Choose the layers to keep: at least two, one of each kind, and as many as are named one by one."""
        if not self.layers:
            return list(range(_LAYERS))
        lists = [v for v in self.fields.values() if isinstance(v, (list, tuple)) and len(v) == self.layers]
        kinds: dict[Any, int] = {}
        for i in range(self.layers):
            kinds.setdefault(tuple(str(v[i]) for v in lists), i)
        named = [
            len(v) for k, v in self.fields.items() if isinstance(v, (list, tuple)) and _NAMED.fullmatch(k)
        ]
        count = min(self.layers, max([_LAYERS, len(kinds), *(n for n in named if n <= 8)]))
        first = sorted(kinds.values())
        others = [i for i in range(self.layers) if i not in first]
        return sorted(first + others[: count - len(first)])


def _token(value: Any, tokens: dict[int, int]) -> Any:
    """Give large token ids small ones, the same for the same id."""
    if isinstance(value, (list, tuple)):
        return type(value)(_token(v, tokens) for v in value)
    if isinstance(value, int) and value >= _TOKENS // 2:
        return tokens.setdefault(value, _TOKENS - 1 - len(tokens))
    return value
