"""Checkpoints that another method quantized: which one it was, and what runs them."""

from collections.abc import Collection, Mapping
from typing import Any

# What transformers needs for a method whose package has a name of its own, as its quantizers say.
_PACKAGES = {
    "aqlm": "aqlm",
    "auto-round": "auto-round",
    "awq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "gptq": "gptqmodel",
    "higgs": "flute-kernel",
    "hqq": "hqq",
    "torchao": "torchao",
    "vptq": "vptq",
}
_QUANTO = "quanto"
# optimum-quanto writes no quantization_config, but this file
_QUANTO_MAP = "quanto_qmap.json"


def method_of(raw: Mapping[str, Any], files: Collection[str]) -> str:
    """Return the method that quantized a checkpoint; empty when nothing says that one did.

    Args:
        raw: the parsed `config.json`.
        files: names in the folder.
    """
    block = raw.get("quantization_config")
    if block is None:
        return _QUANTO if _QUANTO_MAP in files else ""
    if not isinstance(block, Mapping):
        return f"unknown: {block!r}"
    if block.get("quant_method") is None and (block.get("load_in_8bit") or block.get("load_in_4bit")):
        # as bitsandbytes was named before methods were
        return "bitsandbytes"
    return str(block.get("quant_method", "unknown"))


def way_out(method: str) -> str:
    """Say what runs a checkpoint of this method, and how its model is converted."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    known = {name.removesuffix("_4bit").removesuffix("_8bit") for name in AUTO_QUANTIZER_MAPPING}
    if method == _QUANTO:
        # transformers quantizes with it, but does not read what it saved
        run = "run it with optimum-quanto (QuantizedModelForCausalLM.from_pretrained)"
    elif method in known:
        package = f" and the package {_PACKAGES[method]}" if method in _PACKAGES else ""
        run = f"run it with transformers{package}"
    else:
        run = "run it with the library that wrote it"
    return f"{run}; to convert the model, quantize the original model in float"
