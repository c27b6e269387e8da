"""What cannot be converted as it is given: one typed error each, saying what to do instead."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mono_quant.convert.stored import StoredModule
from mono_quant.errors import (
    AdapterAttachedError,
    AlreadyQuantizedError,
    CorruptCheckpointError,
    LimitExceededError,
    MetaTensorError,
    MissingFileError,
    Option,
    PickleOnlyError,
    SourceNotFoundError,
    StateDictError,
    TorchScriptError,
    UnsupportedModelError,
    WrappedModelError,
)
from mono_quant.hf.adapters import is_adapter
from mono_quant.hf.compressed_tensors import STANDARD, ct_problems
from mono_quant.hf.fp8 import METHOD as FP8
from mono_quant.hf.methods import method_of, way_out
from mono_quant.io.disk.json_text import read_json_object
from mono_quant.io.disk.manifest import FORMAT, MANIFEST
from mono_quant.io.tensors.pickles import PICKLES
from mono_quant.planning.kinds import kind_of
from mono_quant.planning.walk import is_transformers_model

Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

# The file that lists the parts of a diffusers pipeline.
PIPELINE = "model_index.json"

_SIZES = re.compile(
    r"hidden_size|intermediate_size|vocab_size|d_model|d_ff|d_kv|n_embd|n_inner|.*ffn_dim|dim|embed_dim|head_dim|"
    r"n_head|num_(.*_)?heads|num_labels|.*_head_dim|.*_channels|sample_size|.*_embed_dim"
)
_DEPTHS = re.compile(
    r"num_hidden_layers|num_layers|n_layers?|.*_layers|num_experts|num_local_experts|n_routed_experts|.*layers_per_block"
)


def check_module(model: nn.Module) -> None:
    """Refuse modules that cannot be converted as they are, each with its remedy."""
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise TorchScriptError(
            f"{name} is TorchScript, whose layers are frozen; convert the Python module before scripting it"
        )
    if name == "OptimizedModule" and hasattr(model, "_orig_mod"):
        raise TorchScriptError(
            f"{name} is compiled; convert the model inside it (._orig_mod) and compile the result"
        )
    if isinstance(model, nn.DataParallel) or name in ("DistributedDataParallel", "FullyShardedDataParallel"):
        raise WrappedModelError(f"{name} wraps the model; pass the model inside it (.module)")
    if any("DTensor" in type(p.data).__name__ for p in model.parameters()) or name.startswith("FSDP"):
        raise WrappedModelError(
            f"{name} is sharded over processes (FSDP); gather it into one plain model first"
        )
    for path, module in model.named_modules():
        _check_part(path or name, module)
    if kind_of(model):
        raise UnsupportedModelError(
            f"{name} is a single layer, which cannot be replaced inside itself; wrap it: nn.Sequential(layer)"
        )
    if (
        is_transformers_model(model)
        and getattr(getattr(model, "config", None), "quantization_config", None) is not None
    ):
        raise AlreadyQuantizedError(
            f"{name} was loaded quantized (config.quantization_config); pass the float model"
        )


def _check_part(path: str, module: nn.Module) -> None:
    home = type(module).__module__
    if isinstance(module, torch.jit.ScriptModule):
        raise TorchScriptError(
            f"{path} ({type(module).__name__}) is TorchScript, whose layers are frozen; put the Python module there"
        )
    if is_adapter(module):
        raise AdapterAttachedError(
            f"{path}: PEFT adapters are attached; call merge_and_unload() first and pass the result"
        )
    if isinstance(module, StoredModule) or getattr(module, "hf_quantizer", None) is not None:
        raise AlreadyQuantizedError(
            f"{path} ({type(module).__name__}) is quantized already; pass the float model"
        )
    if home.startswith((
        "torchao.",
        "bitsandbytes.",
        "optimum.quanto",
        "gptqmodel.",
        "torch.ao.nn.quantized",
        "auto_gptq.",
    )):
        raise AlreadyQuantizedError(
            f"{path} ({home}.{type(module).__name__}) is quantized already; pass the float model"
        )
    for name, tensor in module.named_parameters(recurse=False):
        if isinstance(tensor, nn.parameter.UninitializedParameter):
            raise MetaTensorError(
                f"{path}.{name} has no weights yet; run the model once before converting it"
            )
        if type(tensor.data) is not torch.Tensor or tensor.is_quantized or tensor.layout != torch.strided:
            raise AlreadyQuantizedError(
                f"{path}.{name} is of type {type(tensor.data).__name__} ({tensor.layout}), not a plain float tensor; pass the "
                f"float model"
            )
        if tensor.device.type == "meta":
            raise MetaTensorError(
                f"{path}.{name} is on the meta device and has no data; load the weights first, without offloading"
            )
    if getattr(module, "_hf_hook", None) is not None:
        raise WrappedModelError(
            f"{path} carries an accelerate hook (device_map or offload); load the model onto one device, or remove the hooks "
            f"with accelerate.hooks.remove_hook_from_module(model, recurse=True)"
        )


def read_config(folder: Path) -> dict[str, Any]:
    if not folder.exists():
        raise SourceNotFoundError(
            f"{folder} does not exist; check the path, or give a Hub id like 'org/model'"
        )
    if not folder.is_dir():
        _refuse_file(folder)
    names = {p.name for p in folder.iterdir()}
    if MANIFEST in names:
        raise AlreadyQuantizedError(
            f"{folder} was written by mono_quant; use load({str(folder)!r}) to run it"
        )
    if "adapter_config.json" in names and "config.json" not in names:
        raise AdapterAttachedError(
            f"{folder} holds a PEFT adapter; merge it into its base model first and pass the result"
        )
    if PIPELINE in names:
        raise UnsupportedModelError(
            pipeline_text(str(folder), sorted(p.parent.name for p in folder.glob("*/config.json")))
            + " The folder of one model in it can be given, too"
        )
    if "config.json" not in names:
        if not any(n.endswith(".safetensors") for n in names):
            refuse_pickles(sorted(names), str(folder))
        raise MissingFileError(
            f"{folder} has no config.json, so its architecture is unknown; give a folder written by save_pretrained, or "
            f"load the model yourself and pass the object"
        )
    raw = read_json_object(folder / "config.json")
    method = method_of(raw, names)
    # what is fp8 in a known way becomes float as it is read, and the headers tell which way it is
    if method and method != FP8:
        ours = method == FORMAT or method == STANDARD and not ct_problems(raw["quantization_config"])
        remedy = f"use load({str(folder)!r}) to run it" if ours else way_out(method)
        raise AlreadyQuantizedError(f"{folder} is quantized already (quant_method {method!r}); {remedy}")
    return raw


def pipeline_text(subject: str, parts: Sequence[str]) -> str:
    """Say what to do with a pipeline of diffusers, which is several models.

    Args:
        subject: what it is called.
        parts: names of the models in it.
    """
    part = next((p for p in ("transformer", "unet", "prior", *parts) if p in parts), "transformer")
    return (
        f"{subject} is a diffusers pipeline of several models ({', '.join(parts) or 'none'}). Convert those that do the work, and run "
        f"it with them: result = quantize(pipe.{part}); pipe.{part} = result.model. Each is saved by itself: result.save(folder), and "
        f"comes back with pipe.{part} = load(folder)."
    )


def _refuse_file(path: Path) -> None:
    if path.suffix == ".safetensors":
        raise StateDictError(
            f"{path} is weights without an architecture; pass the folder that also holds config.json"
        )
    if PICKLES.fullmatch(path.name) or path.suffix == ".bin":
        raise PickleOnlyError(
            f"{path} is a pickle, which can run code when read; load it yourself if you trust it and pass the model object"
        )
    raise UnsupportedModelError(f"{path} is a file of a kind that cannot be quantized; pass a model folder")


def refuse_pickles(names: list[str], subject: str) -> None:
    pickles = [n for n in names if PICKLES.fullmatch(n)]
    if pickles:
        raise PickleOnlyError(
            f"{subject} has only pickle weights ({pickles[0]}), which can run code when read; convert them to safetensors, "
            "or pass ",
            Option("allow_pickle", True),
            " to read plain tensors from them in a guarded process",
        )


def packed_weights(shapes: Shapes) -> list[str]:
    """Name the matrices of a checkpoint that are no float weights, but codes of some method."""
    return [
        n
        for n, (d, s) in shapes.items()
        if len(s) > 1 and (d in (torch.int8, torch.uint8) or d.itemsize == 1 and d.is_floating_point)
    ]


def check_float(folder: Path, shapes: Shapes) -> None:
    packed = packed_weights(shapes)
    if packed:
        raise AlreadyQuantizedError(
            f"{folder}: {packed[0]} is {shapes[packed[0]][0]}: the weights are quantized already; pass the original model"
        )


def check_proportion(folder: Path, raw: Mapping[str, Any], shapes: Shapes) -> None:
    """Refuse a config that asks for a model out of all proportion to the checkpoint, before building it."""
    widest = max((d for _, shape in shapes.values() for d in shape), default=0)
    for key, value in _integers(raw):
        if value < 0 and (_SIZES.fullmatch(key) or _DEPTHS.fullmatch(key)):
            raise CorruptCheckpointError(
                f"{folder / 'config.json'}: {key} is {value}; a size cannot be negative"
            )
        too_wide = _SIZES.fullmatch(key) and value > 16 * max(widest, 4096)
        too_deep = _DEPTHS.fullmatch(key) and value > 16 * max(len(shapes), 64)
        if too_wide or too_deep:
            raise LimitExceededError(
                f"{folder / 'config.json'}: {key} is {value}, but the checkpoint has {len(shapes)} tensors with no dimension "
                f"above {widest}; the config does not belong to these weights"
            )


def _integers(value: Any, key: str = "") -> list[tuple[str, int]]:
    if isinstance(value, Mapping):
        return [found for k, v in value.items() for found in _integers(v, str(k))]
    if isinstance(value, (list, tuple)):
        # in a list, a number below zero counts from the end
        return [(k, n) for v in value for k, n in _integers(v, key) if n >= 0]
    return [(key, value)] if isinstance(value, int) and not isinstance(value, bool) else []
