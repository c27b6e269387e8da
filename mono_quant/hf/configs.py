"""Configs of transformers as plain data, without what must not travel."""

import copy
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from mono_quant.errors import (
    CorruptCheckpointError,
    UnsupportedModelError,
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


# Names of the dtype in a config, in transformers 5 and 4.
_DTYPE_KEYS = ("dtype", "torch_dtype")
# Where transformers 4 has what `rope_parameters` holds in 5: the base frequency and the rotated share of each head; and for models
# with two kinds of attention the frequencies of global and local layers.
_OLDER_ROPE = (("rope_theta", "partial_rotary_factor"), ("rotary_emb_base", "rotary_pct"))
_OLDER_LAYERED_ROPE = (("rope_theta", "rope_local_base_freq"), ("global_rope_theta", "local_rope_theta"))
_OLDER_KEYS = {
    "rope_parameters": (
        "rope_scaling",
        *(name for pair in _OLDER_ROPE + _OLDER_LAYERED_ROPE for name in pair),
    ),
    "num_local_experts": ("num_experts",),
}

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
            # keys are text in JSON, and sorted as such
            return {str(k): clean(v) for k, v in value.items() if not denied(k, v)}
        return [clean(v) for v in value] if isinstance(value, (list, tuple)) else value

    return clean(config), sorted({str(k) for k in dropped})


# Functions that the `from_pretrained` of a class calls to read more than config and weights.
_READERS = {"cached_file", "checkpoint_config"}


def refuse_own_files(cls: type[Any], config: Any, subject: str) -> None:
    """Refuse a class that reads files of its own when transformers loads it: decision models, and Qwen2.5-Omni that speaks.

    Raises:
        UnsupportedModelError: it does.
    """
    owner = next(c for c in cls.mro() if "from_pretrained" in vars(c))
    names = inspect.unwrap(cls.from_pretrained).__code__.co_names
    is_silent = getattr(config, "enable_audio_output", True) is False
    if owner.__name__ != "PreTrainedModel" and not is_silent and not _READERS.isdisjoint(names):
        raise UnsupportedModelError(
            f"{subject}: {cls.__name__} reads files of its own beside config.json and weights, which a saved folder does "
            f"not keep; convert it in memory, dynamic_quantize({cls.__name__}.from_pretrained(...)), or a part of it that "
            f"does not"
        )


def plain_config(config: Any) -> dict[str, Any]:
    """Return a config as data for JSON; infinities (Mamba 2) in the form that transformers gives them."""
    return config._encode_special_floats(config.to_diff_dict())  # type: ignore[no-any-return] # noqa: SLF001


def config_to_write(config: Any, raw: Mapping[str, Any] | None, dtype: str) -> dict[str, Any]:
    """Return the fields of `config.json` for a model, in words that older releases of transformers know too.

    Args:
        config: of the model, as it is now.
        raw: the `config.json` it was read from, whose own keys are kept, but for what has changed since; None for a model
            made in memory.
        dtype: of the float tensors in the file.
    """
    data = _in_memory(config) if raw is None else _updated(clean_config(raw)[0], config)
    names = [key for key in _DTYPE_KEYS if raw is None or key in data] or ["dtype"]
    return _with_dtype(data, dtype) | dict.fromkeys(names, dtype)


def _in_memory(config: Any) -> dict[str, Any]:
    return _with_older_keys(config, clean_config(plain_config(config))[0])


def _updated(raw: dict[str, Any], config: Any) -> dict[str, Any]:
    """Return `raw` with the values that are others in `config`; the config alone where that would be read as another."""
    before, now = _read(config, raw), _values(config)
    if before == now:
        return raw
    written = _in_memory(config)
    data = _merged(raw, before or {}, now, written)
    return data if _read(config, data) == _read(config, written) else written


def _merged(raw: Any, before: Any, now: Any, written: Any) -> dict[str, Any]:
    """Put into `raw` what is another value `now`, in the words of `written`, and take out older words for the same."""
    data = dict(raw)
    for key in sorted(before.keys() | now.keys()):
        old, new, own = before.get(key), now.get(key), raw.get(key)
        if key in before and key in now and old == new:
            continue
        if all(isinstance(part, dict) for part in (old, new, own)) and "model_type" in new:
            data[key] = _merged(own, old, new, written.get(key, {}))
            continue
        names = (key, *_OLDER_KEYS.get(key, ()))
        data = {k: v for k, v in data.items() if k not in names}
        data |= {k: written[k] for k in names if k in written} or ({key: new} if key in now else {})
    return data


def _with_older_keys(config: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """Add what transformers 4 looks for, where transformers 5 reads the same config from it."""
    result = dict(data)
    for key, value in data.items():
        # not getattr: a field that differs between layers is no attribute of the whole
        inner = vars(config).get(key)
        if isinstance(value, Mapping) and hasattr(inner, "to_diff_dict"):
            result[key] = _with_older_keys(inner, value)
    if "dtype" in data:
        result["torch_dtype"] = data["dtype"]
    if "num_local_experts" in data and config.attribute_map.get("num_experts") == "num_local_experts":
        result["num_experts"] = data["num_local_experts"]
    rope = data.get("rope_parameters")
    meant = _read(config, data) if isinstance(rope, Mapping) else None
    for names in _older_rope(rope) if isinstance(rope, Mapping) else ():
        alone = {k: v for k, v in data.items() if k != "rope_parameters"}
        if _read(config, alone | names) == _read(config, {**data, **names}) == meant:
            return result | names
    return result


def _older_rope(rope: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the ways in which transformers 4 could have said what `rope_parameters` holds."""
    layered = "full_attention" in rope
    whole, local = rope.get("full_attention", rope) or {}, rope.get("sliding_attention") or {}
    rest = {k: v for k, v in whole.items() if k not in ("rope_theta", "partial_rotary_factor")}
    scaling = {"rope_scaling": rest} if rest.keys() - {"rope_type"} else {}
    for theta, other in _OLDER_LAYERED_ROPE if layered else _OLDER_ROPE:
        names = {theta: whole.get("rope_theta")} | scaling
        yield names
        if layered:
            yield names | {other: local.get("rope_theta")}
        elif "partial_rotary_factor" in whole:
            yield names | {other: whole["partial_rotary_factor"]}


def _read(config: Any, data: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the values that transformers reads from data for a config of this class; None when it cannot."""
    cls = type(config)
    try:
        return _values(cls.from_dict(cls._decode_special_floats(copy.deepcopy(dict(data)))))
    except BUILD_ERRORS:
        return None


def _values(config: Any) -> dict[str, Any]:
    """Return every value of a config, but for what differs from one reading to the next."""
    return _without_dtypes(clean_config(config._encode_special_floats(config.to_dict()))[0])  # noqa: SLF001


def _without_dtypes(data: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_dtypes(value) if isinstance(value, Mapping) else value
        for key, value in data.items()
        if key not in (*_DTYPE_KEYS, "architectures", "transformers_version")
    }


def _with_dtype(data: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Give every part of a config that names its dtype the one in the file."""
    return {
        key: _with_dtype(value, dtype)
        if isinstance(value, Mapping)
        else dtype
        if key in _DTYPE_KEYS and isinstance(value, str)
        else value
        for key, value in data.items()
    }


def dtype_of(raw: Mapping[str, Any], folder: Path) -> torch.dtype:
    """Give the float dtype that the `config.json` of a saved folder states; float32 where it states none.

    Raises:
        CorruptCheckpointError: it is not a float type of torch.
    """
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise CorruptCheckpointError(
            f"{folder / 'config.json'}: dtype is {name!r}, not a float type of torch such as 'float32'; save the model again"
        )
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
