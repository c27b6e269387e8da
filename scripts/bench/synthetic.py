"""A sharded bfloat16 Llama with random weights, written in bounded memory: no more than a block of rows is ever there."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

BLOCK = 1 << 22
SHARD = 10**9


class Sizes(NamedTuple):
    """The sizes of a Llama; the defaults are those of Llama 3 8B, but for the number of layers."""

    layers: int
    hidden: int = 4096
    between: int = 14336
    vocabulary: int = 128256
    heads: int = 32
    key_heads: int = 8

    @classmethod
    def of(cls, gigabytes: float) -> "Sizes":
        """Return those of a checkpoint of at least this size, which one layer has if it is under 3 GB."""
        one = _bytes(cls(1))
        return cls(max(1, 1 + math.ceil((gigabytes * 1e9 - one) / (_bytes(cls(2)) - one))))


# Single tensors of 1.1 GB that become int8, and of 2.1 GB that stay.
WIDE = Sizes(layers=1, hidden=8192, between=65536, vocabulary=131072, heads=64)


def shapes_of(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors, in the order of the layers."""
    width, between = sizes.hidden, sizes.between
    keys = width // sizes.heads * sizes.key_heads
    layer = {
        "input_layernorm": (width,),
        "mlp.down_proj": (width, between),
        "mlp.gate_proj": (between, width),
        "mlp.up_proj": (between, width),
        "post_attention_layernorm": (width,),
        "self_attn.k_proj": (keys, width),
        "self_attn.o_proj": (width, width),
        "self_attn.q_proj": (width, width),
        "self_attn.v_proj": (keys, width),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (sizes.vocabulary, width)}
    for number in range(sizes.layers):
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    return {**shapes, "model.norm.weight": (width,), "lm_head.weight": (sizes.vocabulary, width)}


def write_llama(folder: Path, sizes: Sizes) -> int:
    """Write a checkpoint.

    Args:
        folder: which is made.
        sizes: of the model.

    Returns:
        The bytes of its weights.
    """
    folder.mkdir(parents=True)
    shapes = shapes_of(sizes)
    shards = _shards(shapes)
    generator = torch.Generator().manual_seed(0)
    where = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write(folder / file, {name: shapes[name] for name in names}, generator)
        where |= dict.fromkeys(names, file)
    total = _bytes(sizes)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(_config(sizes)), encoding="utf-8")
    return total


def _bytes(sizes: Sizes) -> int:
    return 2 * sum(math.prod(shape) for shape in shapes_of(sizes).values())


def _shards(shapes: Mapping[str, tuple[int, ...]]) -> list[list[str]]:
    shards: list[list[str]] = []
    reached = SHARD
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        if reached + size > SHARD:
            shards.append([])
            reached = 0
        shards[-1].append(name)
        reached += size
    return shards


def _write(path: Path, shapes: Mapping[str, tuple[int, ...]], generator: torch.Generator) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    reached = 0
    for name, shape in sorted(shapes.items()):
        end = reached + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [reached, end]}
        reached = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, shape in sorted(shapes.items()):
            for block in _blocks(shape, generator):
                file.write(block.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _blocks(shape: tuple[int, ...], generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yield Gaussian rows, each with a width of its own, as those of trained models have."""
    if len(shape) == 1:
        yield (1 + 0.1 * torch.randn(shape, generator=generator)).bfloat16()
        return
    rows, depth = shape
    step = max(1, BLOCK // depth)
    values = torch.empty(step * depth)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        block = values[: count * depth].view(count, depth).normal_(0, depth**-0.5, generator=generator)
        width = torch.empty(count, 1).log_normal_(0, 0.4, generator=generator)
        yield block.mul_(width).bfloat16().view(-1)


def _config(sizes: Sizes) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.between,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.key_heads,
        "vocab_size": sizes.vocabulary,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
