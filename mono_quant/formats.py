"""The three layouts of a saved model, as pure functions: which one a model needs, and what goes into it.

`compressed-tensors`: int8 linear layers of a transformers model, in the `int-quantized` format that transformers and vLLM read.
`mono_quant`: everything else in int8. The codes lie flat (1-D) under the original names, so that every other loader stops at the
shape instead of taking codes for weights. `plain`: float16.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mono_quant.errors import CorruptCheckpointError, UnsupportedModelError
from mono_quant.layers import PORTABLE_KINDS
from mono_quant.manifest import FORMAT, MANIFEST
from mono_quant.modules import Int8Module
from mono_quant.report import QuantReport

STANDARD = "compressed-tensors"
PLAIN = "plain"
LAYOUTS = (STANDARD, FORMAT, PLAIN)

_CT_ARGS = {"num_bits": 8, "type": "int", "symmetric": True}


def layout_of(kind: str, report: QuantReport, state: Mapping[str, Tensor], obstacle: str = "") -> str:
    """Return the layout that a converted model needs.

    Args:
        kind: of the source: `module`, `transformers` or `sentence_transformer`.
        report: of the conversion.
        state: the tensors by the names they have in the file.
        obstacle: why transformers cannot load the standard layout of this model; empty when it can.

    Raises:
        UnsupportedModelError: a SentenceTransformer holds layers that its format cannot.
    """
    if report.dtype == "fp16":
        return PLAIN
    portable = not obstacle and all(row.kind in PORTABLE_KINDS for row in report.quantized)
    # experts that lie in one tensor in the file, too, have no standard form
    portable = portable and all(t.dim() == 2 for t in state.values() if t.dtype == torch.int8)
    if kind == "module" or not portable:
        if kind == "sentence_transformer":
            kinds = sorted({row.kind for row in report.quantized} - PORTABLE_KINDS) or [
                f"layers here: {obstacle}"
            ]
            raise UnsupportedModelError(
                f"a SentenceTransformer is saved in the standard format, which cannot hold int8 {', '.join(kinds)}; "
                f"leave them in float (skip_types=[...], embeddings=False), or quantize model[0].auto_model by itself"
            )
        return FORMAT
    return STANDARD


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


def float_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of the float part: what a quantized weight would read as, or of the other tensors."""
    for module in model.modules():
        if isinstance(module, Int8Module):
            return module.float_dtype
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


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


def shaped_codes(folder: Path, name: str, stored: Tensor | None, facts: Any, flat: bool) -> Tensor:
    """Return int8 codes in the shape of the float weight.

    Args:
        folder: for errors.
        name: of the tensor.
        stored: as in the file.
        facts: what the manifest says: `shape`, whether the rows are the columns (`transposed`), and the shape of the
            scales (`scale`).
        flat: the codes lie flat in the file.

    Raises:
        CorruptCheckpointError: the file does not hold what the manifest promises.
    """
    try:
        shape, transposed = tuple(int(d) for d in facts["shape"]), facts["transposed"] is True
        tuple(int(d) for d in facts["scale"])
    except (TypeError, KeyError, ValueError) as e:
        raise CorruptCheckpointError(
            f"{folder}: {MANIFEST} describes {name} in an unknown way ({facts!r})"
        ) from e
    if stored is None:
        raise CorruptCheckpointError(
            f"{folder}: {name} is missing from the weights, though {MANIFEST} lists it"
        )
    expected = (math.prod(shape),) if flat else shape
    if stored.dtype != torch.int8 or tuple(stored.shape) != expected:
        promised = f"{expected[0]} flat int8 codes" if flat else f"int8 codes of shape {expected}"
        raise CorruptCheckpointError(
            f"{folder}: {name} is {stored.dtype} {tuple(stored.shape)}, but {MANIFEST} promises {promised}"
        )
    if not flat:
        return stored
    return stored.view(shape[1], shape[0]).t() if transposed else stored.view(shape)


def checked_scale(folder: Path, name: str, scale: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Return the scales of int8 rows as fp32 of `shape` [..., 1].

    Raises:
        CorruptCheckpointError: they are missing, of another shape, or not finite and positive.
    """
    if scale is None:
        raise CorruptCheckpointError(
            f"{folder}: {name} is missing, so its int8 codes mean nothing; the checkpoint is incomplete"
        )
    if not scale.is_floating_point() or tuple(scale.shape) not in (shape, shape[:-1]):
        raise CorruptCheckpointError(
            f"{folder}: {name} is {scale.dtype} {tuple(scale.shape)}, expected float {shape}"
        )
    value = scale.float().view(shape)
    if not bool(torch.isfinite(value).all()) or not bool((value > 0).all()):
        raise CorruptCheckpointError(
            f"{folder}: {name} holds a scale that is not finite and positive; the file is damaged"
        )
    return value


def dtype_of(raw: Mapping[str, Any]) -> torch.dtype:
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise CorruptCheckpointError(f"config.json: dtype is {name!r}, not a float type of torch")
    return dtype
