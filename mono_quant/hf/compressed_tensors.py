"""The `int-quantized` format of compressed-tensors: the block that describes a model in it, and blocks of others."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mono_quant.convert.int8_layers import Int8Module
from mono_quant.errors import UnsupportedModelError

STANDARD = "compressed-tensors"

_CT_ARGS = {"num_bits": 8, "type": "int", "symmetric": True}


def ct_block(core: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the `quantization_config` of a compressed-tensors `int-quantized` checkpoint."""
    group = {
        "targets": ["Linear"],
        "format": "int-quantized",
        "weights": {**_CT_ARGS, "strategy": "channel", "dynamic": False},
        "input_activations": {**_CT_ARGS, "strategy": "token", "dynamic": True},
    }
    return {
        "quant_method": STANDARD,
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignored(core, state),
    }


def ignored(core: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Name every module that a reader could take for a quantized linear layer and that is not, under both of its names."""
    names = {
        name
        for name, module in core.named_modules()
        if any(c.__name__ == "Linear" for c in type(module).mro()) and not isinstance(module, Int8Module)
    }
    names |= {name for name, module in core.named_modules() if _has_float_matrix(module)}
    for key, tensor in state.items():
        if key.endswith(".weight") and tensor.is_floating_point() and tensor.dim() == 2:
            names.add(key.removesuffix(".weight"))
    return sorted(names)


def _has_float_matrix(module: nn.Module) -> bool:
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return weight is not None and weight.dim() == 2 and weight.is_floating_point()


def check_ct(folder: Path, block: Mapping[str, Any]) -> None:
    """Refuse compressed-tensors checkpoints that are not int8 W8A8 with dynamic activations.

    Raises:
        UnsupportedModelError: naming everything that is different.
    """
    problems = []
    if block.get("quant_method") != STANDARD:
        problems.append(f"quant_method is {block.get('quant_method')!r}")
    if block.get("quantization_status") != "compressed":
        problems.append(f"quantization_status is {block.get('quantization_status')!r}")
    if block.get("transform_config"):
        problems.append("it uses transforms")
    sparse = block.get("sparsity_config")
    if isinstance(sparse, Mapping) and sparse.get("format") not in (None, "dense"):
        problems.append(f"sparsity_config is {sparse.get('format')!r}")
    groups = block.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        problems.append(f"config_groups is {groups!r}")
    else:
        for name, group in groups.items():
            problems += [f"{name}: {problem}" for problem in _group_problems(group, block.get("format"))]
    if problems:
        raise UnsupportedModelError(
            f"{folder} cannot be kept in int8 here: {'; '.join(problems)}. Load it with transformers instead"
        )


def _group_problems(group: Any, default_format: Any) -> list[str]:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    inputs = group.get("input_activations") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping) or not isinstance(inputs, (Mapping, type(None))):
        return [f"its description is {group!r}"]
    problems = []
    if any(weights.get(k) != v for k, v in _CT_ARGS.items()) or weights.get("strategy") != "channel":
        problems.append("weights are not symmetric int8 per channel")
    form = group.get("format") or default_format
    if form not in ("int-quantized", "naive-quantized"):
        problems.append(f"format is {form!r}")
    dynamic = inputs is None or (inputs.get("dynamic") is True and inputs.get("strategy") == "token")
    if not dynamic or (inputs and any(inputs.get(k) != v for k, v in _CT_ARGS.items())):
        problems.append("activations are not symmetric int8 per token")
    return problems
