"""Model classes, skeletons and loading.

Models are always built from a config and a mapping of tensors that our own reader has checked; transformers never opens
a file of the checkpoint itself. transformers is imported when a function here is first called.
"""

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mono_quant.convert.arrival import Arrival
from mono_quant.errors import (
    CorruptCheckpointError,
    MonoQuantError,
    Option,
    RemoteCodeError,
    UnsupportedModelError,
)
from mono_quant.hf.computed import computed_on
from mono_quant.hf.configs import BUILD_ERRORS, clean_config, refuse_own_files
from mono_quant.hf.dtypes import loaded_dtypes
from mono_quant.hf.names import fit, floats_of, grouped
from mono_quant.hf.quantizer import loading_method, register, unmark_
from mono_quant.io.tensors.checkpoint import StoredTensor
from mono_quant.io.text import one_line
from mono_quant.planning.layers import declared_float32
from mono_quant.planning.walk import is_transformers_model


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
    config_class = _config_class(cls, raw.get("model_type")) if _is_model_class(cls) else None
    if config_class is None:
        if auto_map:
            raise RemoteCodeError(
                f"{folder}: {names[0]} is not part of transformers {transformers.__version__} and its repository brings "
                "its own code. Read that code, then pass ",
                Option("trust_remote_code", True),
                " to run it",
            )
        raise UnsupportedModelError(
            f"{folder}: transformers {transformers.__version__} has no model class {names[0]} "
            f"(model_type {raw.get('model_type')!r}). Update transformers, or load the model yourself and pass the object"
        )
    clean, _ = clean_config(raw)
    try:
        config = config_class.from_dict(config_class._decode_special_floats(clean))  # noqa: SLF001
    except BUILD_ERRORS as e:
        raise CorruptCheckpointError(
            f"{folder / 'config.json'}: transformers cannot use it ({one_line(e, 300)})"
        ) from e
    refuse_own_files(cls, config, str(folder))
    return cls, config


def builds_itself(model: Any) -> bool:
    """True when `load` finds the class of a transformers model by its name; others need the code that has them."""
    import transformers

    cls = type(model)
    return (
        getattr(transformers, cls.__name__, None) is cls
        and _config_class(cls, model.config.model_type) is type(model.config)
        # made by `post_init`, without which transformers cannot load a class
        and hasattr(model, "all_tied_weights_keys")
    )


def _config_class(cls: Any, kind: Any) -> Any:
    """Return the config class of a `model_type`; parts of some models are known to their model class alone."""
    import transformers

    if isinstance(kind, str) and kind in transformers.CONFIG_MAPPING:
        return transformers.CONFIG_MAPPING[kind]
    own = cls.config_class
    return own if kind and own is not None and own.model_type == kind else None


def _is_model_class(cls: Any) -> bool:
    import transformers

    # the base of all is none; built once, transformers would take what it notes on it for a fact of every class
    base = transformers.PreTrainedModel
    return isinstance(cls, type) and issubclass(cls, base) and cls is not base


def _remote_class(auto_map: Mapping[str, Any], name: str, folder: Path) -> tuple[type[Any], Any]:
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    references = [r for r in auto_map.values() if isinstance(r, str) and r.rpartition(".")[2] == name]
    if not references:
        raise RemoteCodeError(f"{folder}: auto_map of config.json names no class {name}; correct auto_map")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    return get_class_from_dynamic_module(references[0], str(folder)), config


def load_as_stored(
    cls: type[Any],
    config: Any,
    tensors: Mapping[str, Tensor | StoredTensor],
    subject: str,
    dtype: torch.dtype,
    built: torch.dtype | None = None,
    arrival: Arrival | None = None,
) -> nn.Module:
    """Build a model and fill it from a checkpoint, every weight accounted for and in the dtype that it has there.

    Args:
        cls: the model class.
        config: its config object.
        tensors: by checkpoint name, held or still in their files; int8 codes in the shape of the float weight, scales fp32
            [N, 1].
        subject: what to call the checkpoint in errors.
        dtype: of most float tensors, and what int8 weights read as.
        built: dtype that the class is built in, which decides what it computes by itself; `dtype` when None.
        arrival: the layers that become int8 while the weights are read, one after the other.

    Raises:
        CorruptCheckpointError: weights are missing, left over, or have other shapes than the config says.
    """
    method = loading_method(_headers(tensors), dtype, arrival)
    return _load_with(cls, config, tensors, subject, method, built or dtype)


def load_int8(
    cls: type[Any],
    config: Any,
    tensors: Mapping[str, Tensor | StoredTensor],
    subject: str,
    dtype: torch.dtype,
) -> nn.Module:
    """Build a model with int8 layers where somebody's checkpoint has int8 weights, the rest as transformers loads it.

    Args:
        cls: the model class.
        config: its config object.
        tensors: by checkpoint name; int8 codes in the shape of the float weight, scales fp32 [N, 1].
        subject: what to call the checkpoint in errors.
        dtype: that is asked of transformers.

    Raises:
        CorruptCheckpointError: weights are missing, left over, or have other shapes than the config says.
    """
    return _load_with(cls, config, tensors, subject, loading_method(_headers(tensors)), dtype)


def _headers(tensors: Mapping[str, Tensor | StoredTensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def _load_with(
    cls: type[Any],
    config: Any,
    tensors: Mapping[str, Tensor | StoredTensor],
    subject: str,
    method: Mapping[str, Any],
    dtype: torch.dtype,
) -> nn.Module:
    register()
    config = copy.deepcopy(config)
    config.quantization_config = method
    model = _load(cls, config, dict(tensors), subject, dtype=dtype)
    unmark_(model)
    return model


def computed_buffers(model: nn.Module, dtype: torch.dtype, left: Collection[str] = ()) -> dict[str, Tensor]:
    """Return the buffers that are not in a checkpoint, as they are computed when the class of `model` is loaded.

    Args:
        model: a transformers model.
        dtype: that the class is built in.
        left: names of tensors that checkpoints may have, and one did not: they are returned too.

    Raises:
        CorruptCheckpointError: the class cannot be built from the config.
    """
    subject = type(model).__name__
    bare = skeleton(type(model), model.config, dtype, subject)
    try:
        with quiet():
            return computed_on(bare, left)
    except BUILD_ERRORS as e:
        raise CorruptCheckpointError(
            f"{subject}: transformers cannot initialise it ({one_line(e, 300)})"
        ) from e


def built_buffers(model: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """Return buffers as the class of a transformers model makes them; without those that it does not have.

    Args:
        model: on any device.
        names: of the buffers.

    Raises:
        CorruptCheckpointError: the class cannot be built from the config.
    """
    from accelerate import init_empty_weights

    cls: Any = type(model)
    subject = cls.__name__
    try:
        with init_empty_weights(include_buffers=False), quiet(), torch.random.fork_rng(devices=[]):
            built: nn.Module = cls._from_config(copy.deepcopy(model.config))
    except BUILD_ERRORS as e:
        raise CorruptCheckpointError(f"{subject}: transformers cannot build it ({one_line(e, 300)})") from e
    return {name: buffer for name, buffer in built.named_buffers() if name in names and not buffer.is_meta}


def given_dtypes(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtype of the float tensors that transformers would not give `dtype` when loading `model` in it.

    What cannot be built from a config (modules of other libraries) has only its declarations.

    Args:
        model: any module, meta included.
        dtype: that is asked for.
    """
    declared = dict.fromkeys(declared_float32(model, dtype), torch.float32)
    if not is_transformers_model(model):
        return declared
    try:
        bare = skeleton(type(model), model.config, dtype, type(model).__name__)
    except CorruptCheckpointError:
        return declared
    return {name: own for name, own in loaded_dtypes(bare, dtype).items() if own != dtype}


def skeleton(cls: type[Any], config: Any, dtype: torch.dtype, subject: str) -> nn.Module:
    """Build a model without data, on the meta device, as a checkpoint in `dtype` would fill it.

    Raises:
        CorruptCheckpointError: the config describes no model.
    """
    try:
        with torch.device("meta"), quiet(), torch.random.fork_rng(devices=[]):
            model: nn.Module = cls._from_config(copy.deepcopy(config), dtype=dtype)
    except BUILD_ERRORS as e:
        raise CorruptCheckpointError(
            f"{subject}: its config.json describes no {cls.__name__} ({one_line(e, 300)})"
        ) from e
    _to_meta_(model)
    return model


def _to_meta_(model: nn.Module) -> None:
    """Take the data from parameters that a class makes on the CPU whatever the device is, as `torch.Tensor(...)` does."""
    bare: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if not parameter.is_meta:
                twin = bare.setdefault(parameter, nn.Parameter(parameter.detach().to("meta")))
                vars(twin).update(vars(parameter))
                module.register_parameter(name, twin)


def tie_(skeleton: Any) -> None:
    """Tie the weights of a skeleton that was built while transformers ties none, as it does when it loads."""
    for target, source in skeleton.all_tied_weights_keys.items():
        owner, _, name = target.rpartition(".")
        setattr(skeleton.get_submodule(owner), name, skeleton.get_parameter(source))


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


def _load(
    cls: type[Any], config: Any, tensors: dict[str, Tensor | StoredTensor], subject: str, **options: Any
) -> nn.Module:
    try:
        # transformers draws random numbers for weights that it then overwrites
        with quiet(), torch.random.fork_rng(devices=[]):
            model, info = cls.from_pretrained(
                None, config=config, state_dict=tensors, output_loading_info=True, **options
            )
    except MonoQuantError:
        raise
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, AssertionError) as e:
        # transformers tells in its log, which is silenced, what is wrong
        problem = _problem(cls, config, tensors, subject)
        raise CorruptCheckpointError(
            f"{subject}: {problem or f'transformers cannot fill {cls.__name__} from it ({one_line(e, 300)})'}"
        ) from e
    missing = sorted(info["missing_keys"])
    left = sorted(n for n in info["unexpected_keys"] if tensors.get(n, torch.empty(0)).dtype == torch.int8)
    for names, what in ((missing, "are missing"), (left, "are int8 but belong to no layer")):
        if names:
            raise CorruptCheckpointError(
                f"{subject}: {len(names)} weights of {cls.__name__} {what}: {grouped(names)}. "
                f"If that is intended, load the model yourself and pass the object"
            )
    return model.eval()  # type: ignore[no-any-return]


def _problem(cls: type[Any], config: Any, tensors: Mapping[str, Tensor | StoredTensor], subject: str) -> str:
    """Say which tensors do not fit the model of a config; empty when it is something else."""
    plain = copy.deepcopy(config)
    plain.__dict__.pop("quantization_config", None)
    codes = [name for name, tensor in tensors.items() if tensor.dtype == torch.int8]
    return fit(skeleton(cls, plain, torch.float32, subject), floats_of(tensors, codes)).problem(cls.__name__)
