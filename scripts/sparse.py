"""Write checkpoints of the largest open models without their weights: config, index and headers are real, the data is a hole.

    python scripts/sparse.py deepseek_v3 /tmp/deepseek
    python scripts/sparse.py deepseek_v3 /tmp/deepseek --plan    # and says what a plan of it takes

What reads headers alone cannot tell them from the published ones; what reads weights sees zeros, and in fp8 is told that scales are 0.
"""

import argparse
import importlib
import json
import math
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

SIZES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
# As many bytes as a shard of DeepSeek-V3 has, which comes in 163.
SHARD = 4_302_000_000


class Stub(NamedTuple):
    """A tensor of which the header is written.

    Attributes:
        name: in the checkpoint.
        dtype: as safetensors calls it.
        shape: of the tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of its data."""
        return math.prod(self.shape) * SIZES[self.dtype]


def linear(name: str, rows: int, columns: int, fp8: bool = False) -> Iterator[Stub]:
    """Yield the weight of a linear layer, with the scales of its blocks where it is fp8."""
    yield Stub(f"{name}.weight", "F8_E4M3" if fp8 else "BF16", (rows, columns))
    if fp8:
        yield Stub(f"{name}.weight_scale_inv", "F32", (math.ceil(rows / 128), math.ceil(columns / 128)))


def norm(name: str, size: int) -> Stub:
    """Return the weight of a norm."""
    return Stub(f"{name}.weight", "BF16", (size,))


def gated(name: str, hidden: int, inner: int, fp8: bool = False) -> Iterator[Stub]:
    """Yield a gated MLP."""
    yield from linear(f"{name}.gate_proj", inner, hidden, fp8)
    yield from linear(f"{name}.up_proj", inner, hidden, fp8)
    yield from linear(f"{name}.down_proj", hidden, inner, fp8)


def attention(name: str, config: dict[str, Any], head: int) -> Iterator[Stub]:
    """Yield grouped attention as in Llama."""
    hidden, heads, pairs = (
        config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads")
    )
    yield from linear(f"{name}.q_proj", heads * head, hidden)
    yield from linear(f"{name}.k_proj", pairs * head, hidden)
    yield from linear(f"{name}.v_proj", pairs * head, hidden)
    yield from linear(f"{name}.o_proj", hidden, heads * head)


def ends(config: dict[str, Any]) -> Iterator[Stub]:
    """Yield what stands before and behind the layers."""
    yield from linear("model.embed_tokens", config["vocab_size"], config["hidden_size"])
    yield norm("model.norm", config["hidden_size"])
    yield from linear("lm_head", config["vocab_size"], config["hidden_size"])


def norms(layer: str, config: dict[str, Any]) -> Iterator[Stub]:
    """Yield the two norms of a layer."""
    yield norm(f"{layer}.input_layernorm", config["hidden_size"])
    yield norm(f"{layer}.post_attention_layernorm", config["hidden_size"])


DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
    "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000, "routed_scaling_factor": 2.5,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
    "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
}  # fmt: skip


def deepseek_v3(config: dict[str, Any]) -> Iterator[Stub]:
    """Yield the tensors of DeepSeek-V3, fp8 in blocks, with the layer that predicts a token more."""
    hidden, depth = config["hidden_size"], config["num_hidden_layers"]
    heads, ranks = config["num_attention_heads"], (config["q_lora_rank"], config["kv_lora_rank"])
    own, turned, value = (config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    yield from ends(config)
    for number in range(depth + config["num_nextn_predict_layers"]):
        layer = f"model.layers.{number}"
        yield from norms(layer, config)
        yield from linear(f"{layer}.self_attn.q_a_proj", ranks[0], hidden, fp8=True)
        yield norm(f"{layer}.self_attn.q_a_layernorm", ranks[0])
        yield from linear(f"{layer}.self_attn.q_b_proj", heads * (own + turned), ranks[0], fp8=True)
        yield from linear(f"{layer}.self_attn.kv_a_proj_with_mqa", ranks[1] + turned, hidden, fp8=True)
        yield norm(f"{layer}.self_attn.kv_a_layernorm", ranks[1])
        yield from linear(f"{layer}.self_attn.kv_b_proj", heads * (own + value), ranks[1], fp8=True)
        yield from linear(f"{layer}.self_attn.o_proj", hidden, heads * value, fp8=True)
        if number < config["first_k_dense_replace"]:
            yield from gated(f"{layer}.mlp", hidden, config["intermediate_size"], fp8=True)
            continue
        experts, inner = config["n_routed_experts"], config["moe_intermediate_size"]
        yield from linear(f"{layer}.mlp.gate", experts, hidden)
        yield Stub(f"{layer}.mlp.gate.e_score_correction_bias", "F32", (experts,))
        for expert in range(experts):
            yield from gated(f"{layer}.mlp.experts.{expert}", hidden, inner, fp8=True)
        yield from gated(f"{layer}.mlp.shared_experts", hidden, inner * config["n_shared_experts"], fp8=True)
    for number in range(depth, depth + config["num_nextn_predict_layers"]):
        layer = f"model.layers.{number}"
        yield from linear(f"{layer}.embed_tokens", config["vocab_size"], hidden)
        yield from (norm(f"{layer}.{name}", hidden) for name in ("enorm", "hnorm", "shared_head.norm"))
        yield from linear(f"{layer}.eh_proj", hidden, 2 * hidden)
        yield from linear(f"{layer}.shared_head.head", config["vocab_size"], hidden)


QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 12288, "max_position_embeddings": 40960,
    "max_window_layers": 94, "mlp_only_layers": [], "moe_intermediate_size": 1536, "norm_topk_prob": True,
    "num_attention_heads": 64, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 94,
    "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip


def qwen3_moe(config: dict[str, Any]) -> Iterator[Stub]:
    """Yield the tensors of Qwen3-235B-A22B."""
    hidden, head = config["hidden_size"], config["head_dim"]
    yield from ends(config)
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        yield from norms(layer, config)
        yield from attention(f"{layer}.self_attn", config, head)
        yield norm(f"{layer}.self_attn.q_norm", head)
        yield norm(f"{layer}.self_attn.k_norm", head)
        yield from linear(f"{layer}.mlp.gate", config["num_experts"], hidden)
        for expert in range(config["num_experts"]):
            yield from gated(f"{layer}.mlp.experts.{expert}", hidden, config["moe_intermediate_size"])


MIXTRAL = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 6144, "initializer_range": 0.02, "intermediate_size": 16384,
    "max_position_embeddings": 65536, "num_attention_heads": 48, "num_experts_per_tok": 2, "num_hidden_layers": 56,
    "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip


def mixtral(config: dict[str, Any]) -> Iterator[Stub]:
    """Yield the tensors of Mixtral-8x22B."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    yield from ends(config)
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        yield from norms(layer, config)
        yield from attention(f"{layer}.self_attn", config, hidden // config["num_attention_heads"])
        experts = config["num_local_experts"]
        yield from linear(f"{layer}.block_sparse_moe.gate", experts, hidden)
        for expert in range(experts):
            name = f"{layer}.block_sparse_moe.experts.{expert}"
            yield from linear(f"{name}.w1", inner, hidden)
            yield from linear(f"{name}.w2", hidden, inner)
            yield from linear(f"{name}.w3", inner, hidden)


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": 128001, "hidden_act": "silu", "hidden_size": 16384, "initializer_range": 0.02,
    "intermediate_size": 53248, "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 128,
    "num_hidden_layers": 126, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip


def llama(config: dict[str, Any]) -> Iterator[Stub]:
    """Yield the tensors of Llama-3.1-405B."""
    hidden = config["hidden_size"]
    yield from ends(config)
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        yield from norms(layer, config)
        yield from attention(f"{layer}.self_attn", config, hidden // config["num_attention_heads"])
        yield from gated(f"{layer}.mlp", hidden, config["intermediate_size"])


MODELS = {
    "deepseek_v3": (DEEPSEEK_V3, deepseek_v3),
    "qwen3_moe_235b": (QWEN3_MOE, qwen3_moe),
    "mixtral_8x22b": (MIXTRAL, mixtral),
    "llama_405b": (LLAMA, llama),
}


def shards(stubs: Iterator[Stub], limit: int) -> Iterator[list[Stub]]:
    """Yield the tensors of one file after the other, in their order."""
    part: list[Stub] = []
    size = 0
    for stub in stubs:
        if part and size + stub.nbytes > limit:
            yield part
            part, size = [], 0
        part.append(stub)
        size += stub.nbytes
    yield part


def write_shard(path: Path, stubs: list[Stub]) -> int:
    """Write a file with a header and a hole behind it; return the size of the data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for stub in stubs:
        header[stub.name] = {
            "dtype": stub.dtype,
            "shape": stub.shape,
            "data_offsets": [end, end + stub.nbytes],
        }
        end += stub.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)
    return end


def write(name: str, folder: Path, limit: int = SHARD, **changes: Any) -> Path:
    """Write the checkpoint of a model.

    Args:
        name: of `MODELS`.
        folder: to make.
        limit: bytes of data in a shard, at most, where one tensor has not more.
        **changes: fields of its config, for a smaller one.
    """
    config, stubs = MODELS[name]
    config = config | changes
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    parts = list(shards(stubs(config), limit))
    weight_map, size = {}, 0
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        size += write_shard(folder / file, part)
        weight_map |= {stub.name: file for stub in part}
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def plan(folder: Path) -> str:
    """Plan a conversion in this process, which has imported nothing yet, and say what it took."""
    begin = time.monotonic()
    package, library = (importlib.import_module(name) for name in ("mono_quant", "transformers"))
    # both hand their names on when they are asked for
    plan_of, _ = (
        package.plan,
        getattr(library, json.loads((folder / "config.json").read_text())["architectures"][0]),
    )
    imported, cpu = time.monotonic(), time.process_time()
    report = plan_of(folder)
    wall, used = time.monotonic() - imported, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (
        f"{report.summary}\nplanned in {wall:.1f} s ({used:.1f} s of a processor) after {imported - begin:.1f} s of imports; peak "
        f"{peak / 1e6:.2f} GB"
    )


def main() -> None:
    """Write the model that the command line names, and say how large it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--plan", action="store_true", help="plan its conversion, and say what that takes")
    given = parser.parse_args()
    folder = write(given.model, given.folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    held = sum(file.stat().st_blocks * 512 for file in files)
    print(
        f"{folder}: {len(index['weight_map']):,} tensors in {len(files)} files, {index['metadata']['total_size'] / 1e9:.1f} GB, "
        f"of which {held / 1e6:.1f} MB are on the disk"
    )
    if given.plan:
        print(plan(folder))


if __name__ == "__main__":
    main()
