"""Checkpoints in fp8, as DeepSeek-V3 is published, and the floats that they stand for, computed block by block."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS, SCALES = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CODES = torch.float8_e4m3fn
# what published checkpoints leave in bfloat16
PLAIN = ("embed_tokens", "lm_head", "mlp.gate.", "norm")
Block = tuple[int, int] | None


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def encode(weight: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Codes [N, K] and their scales [N / rows, K / columns], rounded up."""
    rows, columns = block or weight.shape
    grid = math.ceil(weight.shape[0] / rows), math.ceil(weight.shape[1] / columns)
    codes, scales = torch.empty(weight.shape, dtype=CODES), torch.empty(grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            part = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scales[i, j] = weight[part].float().abs().max() / 448
            codes[part] = (weight[part].float() / scales[i, j]).to(CODES)
    return codes, scales


def decode(codes: Tensor, scales: Tensor, block: Block, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """What DeepSeek's `weight_dequant` makes of them: a tile of 1 x 1 block in float32, stored in bfloat16."""
    rows, columns = block or codes.shape
    scales = scales if block else scales.reshape(1, 1)
    out = torch.empty(codes.shape, dtype=dtype)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            out[part] = (codes[part].float() * scales[i, j].float()).to(dtype)
    return out


def write_fp8(model: nn.Module, folder: Path, block: Block = (128, 128), **fields: Any) -> Path:
    """Write a model in bfloat16 as its publisher would, the scales in a shard of their own.

    Args:
        model: of transformers.
        folder: to write to.
        block: rows and columns of a scale; None for one per matrix.
        **fields: of the `quantization_config`.
    """
    model.to(torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    scales = {}
    for name, tensor in list(tensors.items()):
        if tensor.dim() == 2 and not any(word in name for word in PLAIN):
            tensors[name], scale = encode(tensor, block)
            scales[f"{name}_scale_inv"] = scale if block else scale.reshape(())
    write_shards(folder, tensors, scales)
    config = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(block) if block else None,
    }
    write_json(
        folder / "config.json",
        read_json(folder / "config.json") | {"quantization_config": config | fields},
    )
    return folder


def write_shards(folder: Path, tensors: dict[str, Tensor], scales: dict[str, Tensor]) -> None:
    """Write two shards with their index."""
    parts = {WEIGHTS: tensors, SCALES: scales}
    for file, part in parts.items():
        save_file(part, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in parts.items() for name in part}
    write_json(folder / INDEX, {"metadata": {"total_size": 1}, "weight_map": weight_map})


def read_shards(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return load_file(folder / WEIGHTS), load_file(folder / SCALES)


def write_bf16(folder: Path, target: Path, block: Block = (128, 128)) -> Path:
    """Write the checkpoint in floats that one in fp8 stands for, as DeepSeek's `fp8_cast_bf16.py` would."""
    target.mkdir()
    tensors, scales = read_shards(folder)
    for name, tensor in tensors.items():
        if tensor.dtype is CODES:
            tensors[name] = decode(tensor, scales[f"{name}_scale_inv"], block)
    save_file(tensors, target / SINGLE, metadata={"format": "pt"})
    config = read_json(folder / "config.json")
    del config["quantization_config"]
    write_json(target / "config.json", config)
    generation = folder / "generation_config.json"
    if generation.exists():
        (target / generation.name).write_bytes(generation.read_bytes())
    return target
