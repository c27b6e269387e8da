"""Everything that knows the inside of transformers: model classes, skeletons, loading and checkpoint names.

Models are always built from a config and a mapping of tensors that our own reader has checked; transformers never opens
a file of the checkpoint itself. transformers is imported when a function here is first called.
"""

import copy
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from mono_quant.errors import (
    CorruptCheckpointError,
    MonoQuantError,
    RemoteCodeError,
    UnsupportedModelError,
)
from mono_quant.hub_client import looks_like_token
from mono_quant.names import renamer
from mono_quant.quantizer import METHOD, classes, mark_int8_

# What transformers raises for a config or a state that it cannot use.
_BUILD_ERRORS = (
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


def model_class(raw: Mapping[str, Any], folder: Path, trust_remote_code: bool) -> tuple[type[Any], Any]:
    """Return the class that `config.architectures` names, and the config object.

    Args:
        raw: the parsed `config.json`.
        folder: where it came from, for remote code.
        trust_remote_code: run the repository's own code where its config asks for it.

    Raises:
        RemoteCodeError: the class is not part of transformers and remote code was not allowed.
        UnsupportedModelError: no architecture is named, or it is unknown.
    """
    import transformers

    names = raw.get("architectures")
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise UnsupportedModelError(
            f"{folder}: config.json names no architecture (architectures is {names!r}), so the model class is unknown. "
            f"Load it with the class you want and pass the object: quantize(TheClass.from_pretrained(...))"
        )
    auto_map = raw.get("auto_map") or {}
    if trust_remote_code and auto_map:
        return _remote_class(auto_map, names[0], folder)
    cls: Any = getattr(transformers, names[0], None)
    kind = raw.get("model_type")
    if not _is_model_class(cls) or not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        if auto_map:
            raise RemoteCodeError(
                f"{folder}: {names[0]} is not part of transformers {transformers.__version__} and its repository brings "
                f"its own code. Read that code, then pass trust_remote_code=True to run it"
            )
        raise UnsupportedModelError(
            f"{folder}: transformers {transformers.__version__} has no model class {names[0]} "
            f"(model_type {raw.get('model_type')!r}). Update transformers, or load the model yourself and pass the object"
        )
    clean, _ = clean_config(raw)
    try:
        config_class = transformers.CONFIG_MAPPING[raw["model_type"]]
        config = config_class.from_dict(config_class._decode_special_floats(clean))  # noqa: SLF001
    except _BUILD_ERRORS as e:
        raise CorruptCheckpointError(
            f"{folder / 'config.json'}: transformers cannot use it ({_line(e)})"
        ) from e
    return cls, config


def _is_model_class(cls: Any) -> bool:
    import transformers

    return isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)


def _remote_class(auto_map: Mapping[str, Any], name: str, folder: Path) -> tuple[type[Any], Any]:
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    references = [r for r in auto_map.values() if isinstance(r, str) and r.rpartition(".")[2] == name]
    if not references:
        raise RemoteCodeError(f"{folder}: auto_map of config.json names no class {name}; correct auto_map")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    return get_class_from_dynamic_module(references[0], str(folder)), config


def load_float(
    cls: type[Any],
    config: Any,
    tensors: Mapping[str, Tensor],
    subject: str,
    dtype: torch.dtype | str = "auto",
) -> nn.Module:
    """Build a model and fill it from a checkpoint, every weight accounted for.

    Args:
        cls: the model class.
        config: its config object.
        tensors: by checkpoint name.
        subject: what to call the checkpoint in errors.
        dtype: of the model; `auto` takes it from the config, else from the tensors.

    Raises:
        CorruptCheckpointError: weights are missing or have other shapes than the config says.
    """
    return _load(cls, config, dict(tensors), subject, dtype=dtype)


def load_int8(
    cls: type[Any], config: Any, tensors: Mapping[str, Tensor], subject: str, dtype: torch.dtype
) -> nn.Module:
    """Build a model with int8 layers where the checkpoint has int8 weights, and fill it.

    Args:
        cls: the model class.
        config: its config object.
        tensors: by checkpoint name; int8 codes in the shape of the float weight, scales fp32 [N, 1].
        subject: what to call the checkpoint in errors.
        dtype: of the float part of the model.

    Raises:
        CorruptCheckpointError: weights are missing, left over, or have other shapes than the config says.
    """
    classes()
    config = copy.deepcopy(config)
    codes = sorted(name for name, tensor in tensors.items() if tensor.dtype == torch.int8)
    named = dict(tensors)
    # of what the file holds in one tensor per matrix, transformers renames the scales as well
    stacked = [key for key in codes if tensors[key].dim() > 2]
    if stacked:
        rename = renamer(skeleton(cls, config, dtype, subject))
        for key in stacked:
            name, merged = rename(key)
            if not merged and f"{key}_scale" in named and rename(f"{key}_scale")[0] != f"{name}_scale":
                named[f"{name}_scale"] = named.pop(f"{key}_scale")
    config.quantization_config = {"quant_method": METHOD, "codes": codes}
    model = _load(cls, config, named, subject, dtype=dtype)
    mark_int8_(model)
    return model


def skeleton(cls: type[Any], config: Any, dtype: torch.dtype, subject: str) -> nn.Module:
    """Build a model without data, on the meta device, as a checkpoint in `dtype` would fill it.

    Raises:
        CorruptCheckpointError: the config describes no model.
    """
    try:
        with torch.device("meta"), quiet():
            model: nn.Module = cls._from_config(config, dtype=dtype)
    except _BUILD_ERRORS as e:
        raise CorruptCheckpointError(
            f"{subject}: its config.json describes no {cls.__name__} ({_line(e)})"
        ) from e
    return model


def checkpoint_state(model: nn.Module, halves: Collection[str] = ()) -> dict[str, Tensor]:
    """Return the model's tensors under their checkpoint names: ties once, fused experts one by one.

    int8 codes have the shape of the float weight they stand for; scales are fp32 [N, 1].

    Args:
        model: a transformers model.
        halves: names in the model of tensors to return as float16.
    """
    from transformers.core_model_loading import revert_weight_conversion

    state = model.state_dict()
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        state.pop(name, None)
    for target, origin in getattr(model, "all_tied_weights_keys", {}).items():
        if target in state and origin in state and _same_memory(state[target], state[origin]):
            del state[target]
    state = {name: tensor.half() if name in halves else tensor for name, tensor in state.items()}
    with quiet():
        reverted = dict(revert_weight_conversion(_with_scale_conversions(model), state))
    return _with_renamed_scales(state, reverted)


def _with_renamed_scales(state: Mapping[str, Tensor], reverted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give scales the name of their codes where transformers renamed the codes alone."""
    now = {id(tensor): name for name, tensor in reverted.items()}
    for name, codes in state.items():
        new = now.get(id(codes))
        if f"{name}_scale" in state and new not in (None, name) and f"{name}_scale" in reverted:
            reverted[f"{new}_scale"] = reverted.pop(f"{name}_scale")
    return reverted


def pipeline(task: str, model: nn.Module, processor: Any) -> Any:
    """Return a transformers pipeline around the model.

    Args:
        task: a transformers pipeline task, e.g. `text-classification`.
        model: a transformers model.
        processor: tokenizer, image processor, feature extractor or processor; None for tasks that need none.
    """
    import transformers
    from transformers.image_processing_base import ImageProcessingMixin

    kinds = {
        "tokenizer": transformers.PreTrainedTokenizerBase,
        "image_processor": ImageProcessingMixin,
        "feature_extractor": transformers.FeatureExtractionMixin,
        "processor": transformers.ProcessorMixin,
    }
    parts = {name: processor for name, kind in kinds.items() if isinstance(processor, kind)}
    if "processor" in parts:
        for name in ("tokenizer", "image_processor", "feature_extractor"):
            if getattr(processor, name, None) is not None:
                parts[name] = getattr(processor, name)
    return transformers.pipeline(task, model=model, **parts)


def load_processor(folder: Path) -> Any:
    """Load the tokenizer or processor of a folder; None when it has none."""
    import transformers

    names = {p.name for p in folder.iterdir()}
    if not names & {"tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json",
                    "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model"}:  # fmt: skip
        return None
    try:
        return transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError):
        return None


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and load reports for the block; what matters is raised instead."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _load(cls: type[Any], config: Any, tensors: dict[str, Tensor], subject: str, **options: Any) -> nn.Module:
    try:
        # transformers draws random numbers for weights that it then overwrites
        with quiet(), torch.random.fork_rng(devices=[]):
            model, info = cls.from_pretrained(
                None, config=config, state_dict=tensors, output_loading_info=True, **options
            )
    except MonoQuantError:
        raise
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, AssertionError) as e:
        raise CorruptCheckpointError(
            f"{subject}: transformers cannot fill {cls.__name__} from it ({_line(e)})"
        ) from e
    missing = sorted(info["missing_keys"])
    wrong = sorted(str(entry[0]) for entry in info["mismatched_keys"])
    left = sorted(n for n in info["unexpected_keys"] if tensors.get(n, torch.empty(0)).dtype == torch.int8)
    for names, what in ((missing, "are missing"), (wrong, "have another shape than config.json says"),
                        (left, "are int8 but belong to no layer")):  # fmt: skip
        if names:
            raise CorruptCheckpointError(
                f"{subject}: {len(names)} weights of {cls.__name__} {what}: {', '.join(names[:5])}"
                f"{' ...' if len(names) > 5 else ''}. If that is intended, load the model yourself and pass the object"
            )
    return model.eval()  # type: ignore[no-any-return]


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape


def _with_scale_conversions(model: nn.Module) -> nn.Module:
    """Return a shallow twin of `model` whose conversions also split fused scales."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [c for c in conversions if not isinstance(c, PrefixChange)]
    plain = [c for c in conversions if not all(t.endswith("_scale") for t in c.target_patterns)]
    config_class, quantizer_class = classes()
    twin = copy.copy(model)
    twin.__dict__["_weight_conversions"] = quantizer_class(config_class()).update_weight_conversions(
        plain, model
    )
    return twin


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
