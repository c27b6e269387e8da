"""Checkpoints in fp8 as transformers' finegrained_fp8 reads them, DeepSeek-V3's first of all: what their config says of the weights."""

from collections.abc import Mapping
from typing import Any

import torch

from mono_quant.errors import AlreadyQuantizedError, CorruptCheckpointError
from mono_quant.hf.methods import way_out
from mono_quant.io.tensors.blockwise import CODES, Block, Blockwise, Shapes, inverse_of
from mono_quant.planning.walk import common_dtype

METHOD = "fp8"
# What transformers takes where a config names none.
_BLOCK = (128, 128)
# What the floats beside the codes may be; DeepSeek's own reader gives bfloat16.
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def fp8_weights(raw: Mapping[str, Any], shapes: Shapes, subject: str) -> Blockwise | None:
    """Return which tensors of a checkpoint are fp8 and how they are read; None where the config does not say that some are.

    The values get the dtype of most of what stayed in float, as they had it before.

    Args:
        raw: the parsed `config.json`.
        shapes: dtype and shape of every tensor in the files.
        subject: what to call the checkpoint in errors.

    Raises:
        AlreadyQuantizedError: it is a kind of fp8 that is not read here.
        CorruptCheckpointError: config and tensors contradict each other.
    """
    block = _block_of(raw)
    if block is None:
        return None
    problem = _other_kind(block, shapes)
    if problem:
        raise AlreadyQuantizedError(
            f"{subject} is quantized already (quant_method {METHOD!r}; {problem}); {way_out(METHOD)}"
        )
    size = block.get("weight_block_size", _BLOCK)
    found = Blockwise.of(shapes, _rows_and_columns(size, subject), torch.bfloat16, subject)
    plain = [
        (own, torch.Size(shape).numel())
        for name, (own, shape) in shapes.items()
        if name not in found.scaled and name not in found.hidden and own in _FLOATS
    ]
    return Blockwise(common_dtype(plain), found.scaled, found.hidden) if plain else found


def kind_of_fp8(found: Blockwise | None) -> str:
    """Return what the weights of a source were, in a few words; nothing for floats."""
    if found is None:
        return ""
    blocks = sorted({scaled.block for scaled in found.scaled.values()})
    sizes = f"blocks of {blocks[0][0]} x {blocks[0][1]}" if len(blocks) == 1 else "one scale per matrix"
    return f"{METHOD} (e4m3, {sizes})"


def told(found: Blockwise) -> str:
    """Say what a source was, for its report."""
    dtype = str(found.dtype).removeprefix("torch.")
    return (
        f"the source holds {len(found.scaled):,} weights in {kind_of_fp8(found)}, which were dequantized to {dtype} before they were "
        f"converted; sizes before are those in {dtype}"
    )


def _block_of(raw: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the block of a config that says so; of a model with several parts, that of its text, where transformers looks too."""
    text = raw.get("text_config")
    for config in (raw, text if isinstance(text, Mapping) else {}):
        block = config.get("quantization_config")
        if block is not None:
            return block if isinstance(block, Mapping) and block.get("quant_method") == METHOD else None
    return None


def _other_kind(block: Mapping[str, Any], shapes: Shapes) -> str:
    """Return what makes it a checkpoint that is not read here; empty for nothing."""
    for key, read in (("fmt", "e4m3"), ("expert_dtype", "fp8")):
        if block.get(key, read) != read:
            return f"{key} is {block[key]!r}, and {read!r} alone is read here"
    if block.get("modules_to_convert"):
        return f"tables are fp8, too: {block['modules_to_convert']!r}"
    codes = [name for name, (own, _) in shapes.items() if own is CODES]
    if not codes:
        return "but no tensor is float8_e4m3fn"
    if not any(inverse_of(name, shapes) for name in codes):
        beside = sorted(n for n in shapes if n.startswith(codes[0].rpartition(".")[0] + ".") and "scale" in n)
        return f"{codes[0]} has no scales that transformers reads, {codes[0]}_scale_inv, but {beside}"
    return ""


def _rows_and_columns(size: Any, subject: str) -> Block:
    if size is None:
        return None
    if isinstance(size, (list, tuple)) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
        return size[0], size[1]
    raise CorruptCheckpointError(
        f"{subject}: weight_block_size of config.json is {size!r}, not two numbers above 0 such as [128, 128]; correct it"
    )
