"""Configs of transformers as plain data, without what must not travel."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from mono_quant.errors import (
    CorruptCheckpointError,
)
from mono_quant.io.disk.json_text import read_json_object
from mono_quant.io.text import looks_like_token, one_line

# What transformers raises for a config or a state that it cannot use.
BUILD_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    StrictDataclassError,
)

# Fields of a config that choose code, kernels or files at load time, or tell about the machine it was made on.
_DENIED = re.compile(
    r"_name_or_path|name_or_path|auto_map|trust_remote_code|.*attn_implementation.*|.*experts_implementation.*|"
    r"transformers_weights|custom_pipelines|custom_generate|quantization_config|_commit_hash|distributed_config|"
    r"kernel_config|fusion_config"
)


# A file or folder of somebody's machine.
_LOCAL_PATH = re.compile(r"(file://|~[\\/]|[A-Za-z]:[\\/]|/)[^\s/\\]+[\\/].*", re.DOTALL)


def clean_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Drop the fields of a `config.json` that must not travel, and values that are access tokens or local paths.

    Returns:
        The clean copy, sub-configs included, and the names of the dropped fields.
    """
    dropped: list[str] = []

    def denied(key: object, value: object) -> bool:
        if isinstance(value, str) and (looks_like_token(value) or _LOCAL_PATH.fullmatch(value)):
            return True
        return _DENIED.fullmatch(str(key)) is not None

    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            dropped.extend(k for k, v in value.items() if denied(k, v))
            return {k: clean(v) for k, v in value.items() if not denied(k, v)}
        return [clean(v) for v in value] if isinstance(value, (list, tuple)) else value

    return clean(config), sorted({str(k) for k in dropped})


def plain_config(config: Any) -> dict[str, Any]:
    """Return a config as data for JSON; infinities (Mamba 2) in the form that transformers gives them."""
    return config._encode_special_floats(config.to_diff_dict())  # type: ignore[no-any-return] # noqa: SLF001


def dtype_of(raw: Mapping[str, Any]) -> torch.dtype:
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise CorruptCheckpointError(f"config.json: dtype is {name!r}, not a float type of torch")
    return dtype


def set_generation_(model: nn.Module, folder: Path) -> None:
    """Give a model the generation config of its folder, where there is one.

    Raises:
        CorruptCheckpointError: transformers cannot use it.
    """
    path = folder / "generation_config.json"
    current = getattr(model, "generation_config", None)
    if not path.exists() or current is None:
        return
    clean, _ = clean_config(read_json_object(path))
    try:
        model.generation_config = type(current).from_dict(clean)
    except BUILD_ERRORS as e:
        raise CorruptCheckpointError(
            f"{path}: transformers cannot use it ({one_line(e, 300)}); correct the file, or remove it"
        ) from e
