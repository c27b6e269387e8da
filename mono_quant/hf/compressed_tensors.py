"""The `int-quantized` format of compressed-tensors: the block that describes a model in it, and blocks of others."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mono_quant.convert.int8_layers import Int8Embedding, Int8Module
from mono_quant.errors import UnsupportedModelError
from mono_quant.hf.methods import way_out

STANDARD = "compressed-tensors"

_CT_ARGS = {"num_bits": 8, "type": "int", "symmetric": True}
# Makes transformers turn the codes into floats while it loads. By itself it does so before the first call of the outermost model,
# which generate() of T5, BART and Whisper, get_text_features and SentenceTransformer never make: they would multiply with codes.
# It looks for the first up to version 5.14 and for the second from 5.15 on; compressed-tensors and vLLM read neither.
_WHILE_LOADING = {"run_compressed": False, "dequantize": True}


def ct_block(core: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the `quantization_config` of a compressed-tensors `int-quantized` checkpoint."""
    group = {
        "targets": ["Linear", *_int8_heads(core, state)],
        "format": "int-quantized",
        "weights": {**_CT_ARGS, "strategy": "channel", "dynamic": False},
        "input_activations": {**_CT_ARGS, "strategy": "token", "dynamic": True},
    }
    groups = {"group_0": group}
    tables = _int8_tables(core, state)
    if tables:
        # indices are no activations; vLLM stops at such a group, whatever class it builds
        groups["group_1"] = {k: v for k, v in group.items() if k != "input_activations"} | {"targets": tables}
    return {
        "quant_method": STANDARD,
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored(core, state),
        **({} if _has_buffer_of_weights(core) else _WHILE_LOADING),
    }


def _has_buffer_of_weights(core: nn.Module) -> bool:
    """Tell whether transformers' conversion while loading would fail: it takes each saved name with `weight` for a parameter's."""
    buffers = dict(core.named_buffers())
    return any(name in buffers and re.search(r"weight(?!\w)", name) for name in core.state_dict())


def ignored(core: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Name every module that a reader could take for a quantized linear layer and that is not, under all of its names."""
    names = {
        name
        for name, module in core.named_modules()
        if any(c.__name__ == "Linear" for c in type(module).mro()) and not isinstance(module, Int8Module)
    }
    names |= {name for name, module in core.named_modules() if _has_float_matrix(module)}
    for key, tensor in state.items():
        if key.endswith(".weight") and tensor.is_floating_point() and tensor.dim() == 2:
            names.add(key.removesuffix(".weight"))
    # engines run a model without head as the inner part of one that has it, and others load the inner part of one alone
    outer, prefix = _name_inside_a_head(core), f"{core.base_model_prefix}."
    inner = {name.removeprefix(prefix) for name in names} - _int8_modules(core)
    return sorted(names | inner | {f"{outer}.{name}" for name in names if outer})


def _int8_modules(core: nn.Module) -> set[str]:
    return {name for name, module in core.named_modules() if isinstance(module, Int8Module)}


def _name_inside_a_head(core: Any) -> str:
    """Return what a model without head is called inside the models of its family that have one; empty for those."""
    bare = core.base_model is core and core.get_output_embeddings() is None
    return str(core.base_model_prefix) if bare else ""


def _int8_heads(core: Any, state: Mapping[str, Tensor]) -> list[str]:
    """Name the output embeddings, where they are int8, under both of their names: vLLM's class for them is no `Linear`."""
    head = core.get_output_embeddings()
    here = {n for n, module in core.named_modules() if module is head and isinstance(head, Int8Module)}
    in_file = {key.removesuffix(".weight") for key, tensor in state.items() if tensor.dtype == torch.int8}
    return sorted(here | {key for key in in_file if any(key.endswith(f".{name}") for name in here)})


def _int8_tables(core: Any, state: Mapping[str, Tensor]) -> list[str]:
    """Name the int8 embeddings in the model and in the file, by expressions that find them in a model with or without head."""
    here = {n for n, module in core.named_modules() if isinstance(module, Int8Embedding)}
    in_file = {key.removesuffix(".weight") for key, tensor in state.items() if tensor.dtype == torch.int8}
    prefix = f"{core.base_model_prefix}."
    inner = {name.removeprefix(prefix) for name in here}
    names = inner | {key.removeprefix(prefix) for key in in_file if any(key.endswith(f".{n}") for n in inner)}
    return [f"re:.*{re.escape(name)}$" for name in sorted(names)]


def _has_float_matrix(module: nn.Module) -> bool:
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return weight is not None and weight.dim() == 2 and weight.is_floating_point()


def ct_problems(block: Mapping[str, Any]) -> list[str]:
    """Return what of a compressed-tensors checkpoint the int8 layers here cannot hold; nothing for W8A8 and W8A16."""
    problems = []
    if block.get("transform_config"):
        problems.append("it uses transforms")
    sparse = block.get("sparsity_config")
    if isinstance(sparse, Mapping) and sparse.get("format") not in (None, "dense"):
        problems.append(f"sparsity_config is {sparse.get('format')!r}")
    groups = block.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        return [*problems, f"config_groups is {groups!r}"]
    for name, group in groups.items():
        problems += [f"{name}: {problem}" for problem in _group_problems(group, block.get("format"))]
    return problems


def check_ct(folder: Path, block: Mapping[str, Any], dtypes: Mapping[str, torch.dtype]) -> None:
    """Refuse compressed-tensors checkpoints that are not int8 with dynamic activations, or none.

    What the weights are is told by the tensors: `quantization_status` is not, as checkpoints with codes come with any.

    Args:
        folder: for errors.
        block: the `quantization_config`.
        dtypes: of the tensors in the file, by name.

    Raises:
        UnsupportedModelError: naming everything that is different.
    """
    problems = ct_problems(block)
    if problems:
        # transformers reads no transforms: it would compute with weights that are turned
        remedy = "run it with vLLM" if block.get("transform_config") else way_out(STANDARD)
        raise UnsupportedModelError(f"{folder} cannot be kept in int8 here: {'; '.join(problems)}; {remedy}")
    loose = [n for n, dtype in dtypes.items() if f"{n}_scale" in dtypes and dtype != torch.int8]
    if loose or torch.int8 not in dtypes.values():
        what = f"{loose[0]} is {dtypes[loose[0]]} beside its scale" if loose else "it holds no int8 weights"
        raise UnsupportedModelError(
            f"{folder} cannot be kept in int8 here: {what} (quantization_status is {block.get('quantization_status')!r}), so its "
            f"weights are not compressed; quantize the original model in float"
        )


def ct_differences(block: Mapping[str, Any], model: nn.Module) -> Iterator[str]:
    """Yield what a checkpoint asks for and is computed in another way here, one sentence each.

    Args:
        block: its `quantization_config`, checked.
        model: that was loaded from it.
    """
    for name, group in block["config_groups"].items():
        if group.get("input_activations") is None and not _is_of_tables(group.get("targets") or (), model):
            yield f"{name} leaves activations in float (W8A16), but here they are quantized per token"
        if group.get("output_activations") is not None:
            yield f"{name} quantizes output_activations, but here they stay in float"
    if block.get("kv_cache_scheme"):
        yield "kv_cache_scheme quantizes the KV cache, but here it stays in float"


def _is_of_tables(targets: Iterable[str], model: nn.Module) -> bool:
    """Tell whether the targets of a group are embeddings alone, whose inputs are no activations."""
    modules = dict(model.named_modules())
    tables = {name for name, module in modules.items() if isinstance(module, Int8Embedding)}
    products = _int8_modules(model) - tables
    return all(
        any(re.match(target[3:], n) for n in tables) and not any(re.match(target[3:], n) for n in products)
        if target.startswith("re:")
        else target in tables or target == "Embedding"
        for target in targets
    )


def _group_problems(group: Any, default_format: Any) -> list[str]:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    inputs = group.get("input_activations") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping) or not isinstance(inputs, (Mapping, type(None))):
        return [f"its description is {group!r}"]
    problems = []
    if not _is_int8(weights) or weights.get("strategy") != "channel":
        problems.append("weights are not symmetric int8 per channel")
    form = group.get("format") or default_format
    if form not in ("int-quantized", "naive-quantized"):
        problems.append(f"format is {form!r}")
    dynamic = inputs is None or (inputs.get("dynamic") is True and inputs.get("strategy") == "token")
    if not dynamic or (inputs is not None and not _is_int8(inputs)):
        problems.append("activations are not symmetric int8 per token")
    return problems


def _is_int8(arguments: Mapping[str, Any]) -> bool:
    # what is left out has the value that compressed-tensors gives it, which is ours
    return all(arguments.get(name, value) == value for name, value in _CT_ARGS.items())
