"""Building an encoder of sentence-transformers around a transformer that is here already."""

import inspect
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mono_quant.errors import (
    CorruptCheckpointError,
    MissingDependencyError,
    MonoQuantError,
    UnsafeInputError,
    UnsupportedModelError,
)
from mono_quant.hf.configs import BUILD_ERRORS
from mono_quant.hf.encoders import MODULES, ROUTERS, Encoder, Part, module_settings
from mono_quant.hf.models import quiet
from mono_quant.io.tensors.checkpoint import open_checkpoint
from mono_quant.io.text import one_line

# Tensors of the modules around a transformer, by the folder they lie in and by name: dtype and shape.
Around = Mapping[str, Mapping[str, tuple[torch.dtype, Sequence[int]]]]

# What it hands on to `from_pretrained` that says where the files are, or what they say themselves.
_PLACES = {"subfolder", "token", "cache_dir", "revision", "local_files_only", "trust_remote_code"}
_DTYPES = {"dtype", "torch_dtype"}
# What it raises for files that it cannot use.
_LOAD_ERRORS = (*BUILD_ERRORS, OSError, ImportError)


def held_around(folder: Path, encoder: Encoder) -> dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """Read the headers of the weights that lie around the transformer, by folder."""
    found = {}
    for part in encoder.parts[1:]:
        for file in sorted((folder / part.path).rglob("model.safetensors")) if part.path else ():
            with open_checkpoint(file.parent) as checkpoint:
                found[file.parent.relative_to(folder).as_posix()] = {
                    name: (header.dtype, header.shape) for name, header in checkpoint.headers.items()
                }
    return found


def first_dtype(core: nn.Module) -> torch.dtype:
    """Return the dtype that sentence-transformers gives the modules behind a transformer: that of its first weight."""
    return next((p.dtype for p in core.parameters()), torch.float32)


def around(
    folder: Path, core: nn.Module, encoder: Encoder, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> nn.Module:
    """Build an encoder around a transformer that is here already.

    Args:
        folder: with everything but the weights of the transformer, checked by `encoder_of`.
        core: the transformer; one on meta stays there.
        encoder: what the files say.
        dtype: for the other modules.
        trust_remote_code: the config may need code of the repository.

    Returns:
        The encoder on the CPU, in evaluation mode.

    Raises:
        MissingDependencyError: sentence-transformers is not installed.
        UnsupportedModelError: it cannot build the encoder from these files.
    """
    library = _library(folder, encoder)
    base = getattr(library, encoder.kind)
    # what our reader refuses, no other one is to read
    held_around(folder, encoder)
    options = {"device": "cpu", "local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        with quiet(), _staying(core):
            if encoder.listed:
                model = _holding(base, core, dtype)(str(folder), **options)
                model.__class__ = base
            else:
                places = {"local_files_only": True, "trust_remote_code": trust_remote_code}
                first = _given(_modules().Transformer, core, dtype)(
                    str(folder),
                    transformer_task=encoder.task,
                    model_kwargs=dict(places),
                    processor_kwargs=dict(places),
                    config_kwargs=dict(places),
                )
                first.__class__ = _modules().Transformer
                model = base(modules=[first], device="cpu")
    except MonoQuantError:
        raise
    except _LOAD_ERRORS as e:
        raise UnsupportedModelError(
            f"{folder}: sentence-transformers {library.__version__} cannot make a {encoder.kind} of it ({one_line(e, 300)}); load "
            f"it yourself and pass the object"
        ) from e
    built: nn.Module = model.eval()
    return built


@contextmanager
def _staying(core: nn.Module) -> Iterator[None]:
    """Keep a transformer on meta where it is: sentence-transformers moves what it holds to a device, which takes data."""
    if not any(parameter.is_meta for parameter in core.parameters()):
        yield
        return
    core.__dict__["_apply"] = lambda function, recurse=True: core
    try:
        yield
    finally:
        del core.__dict__["_apply"]


def fill_around_(model: nn.Module, folder: Path, encoder: Encoder) -> None:
    """Give the modules behind the transformer what their files hold: they were cast to the dtype of its first weight."""
    for path, _, module in _pieces_of(model, encoder):
        if (folder / path / "model.safetensors").exists():
            with open_checkpoint(folder / path) as checkpoint:
                for name, tensor in module.state_dict(keep_vars=True).items():
                    if name in checkpoint:
                        tensor.data = checkpoint[name]


def is_as_filed(model: nn.Module, folder: Path, encoder: Encoder) -> bool:
    """Tell whether the modules around the transformer hold what their files hold, bit for bit."""
    for path, _, module in _pieces_of(model, encoder):
        if (folder / path / "model.safetensors").exists():
            with open_checkpoint(folder / path) as checkpoint:
                for name, tensor in module.state_dict().items():
                    stored = checkpoint.get(name, tensor)
                    if tensor.dtype != stored.dtype or not torch.equal(tensor.cpu(), stored):
                        return False
    return True


def skeleton_around(folder: Path, core: nn.Module, encoder: Encoder, held: Around) -> nn.Module:
    """Stand in for an encoder in a plan: its transformer, and what its other modules hold, without data.

    Args:
        folder: with the small files.
        core: the transformer, on meta.
        encoder: what the files say.
        held: tensors of the other modules.
    """
    _library(folder, encoder)
    first = nn.Module()
    first.model = core
    dtype = first_dtype(core)
    rest = {part.name: _bare(folder, part, encoder, held).to(dtype) for part in encoder.parts[1:]}
    stand_in = type(encoder.kind, (nn.Sequential,), {})
    built: nn.Module = stand_in(OrderedDict([(encoder.parts[0].name, first), *rest.items()]))
    return built.eval()


def _bare(folder: Path, part: Part, encoder: Encoder, held: Around) -> nn.Module:
    """Build a module without data that has the tensors of its file."""
    if not any(path == part.path or path.startswith(f"{part.path}/") for path in held):
        return nn.Identity()
    if part.kind in ROUTERS:
        settings = module_settings(folder / part.path)
        inner = {
            key: _bare(folder, Part(key, f"{part.path}/{key}", reference), encoder, held)
            for key, reference in settings["types"].items()
        }
        router = nn.Module()
        router.sub_modules = nn.ModuleDict({
            route: nn.Sequential(*(inner[key] for key in keys))
            for route, keys in settings["structure"].items()
        })
        return router
    cls = _checked_class(part.reference, folder)
    asked = inspect.signature(cls).parameters
    # it knows the older names of settings
    settings = cls.load_config(str(folder), subfolder=part.path, local_files_only=True)
    values = {k: v for k, v in settings.items() if k in asked and k != "activation_function"}
    try:
        with torch.device("meta"):
            module: nn.Module = cls(**values)
    except _LOAD_ERRORS as e:
        raise UnsupportedModelError(
            f"{folder / part.path}: its settings describe no {part.kind} ({one_line(e, 300)})"
        ) from e
    tensors = module.state_dict(keep_vars=True)
    shapes = {name: tuple(shape) for name, (_, shape) in held[part.path].items()}
    # a file has a tensor once that the module has under two names
    known = {id(tensors[name]) for name in shapes if name in tensors}
    own = {n: tuple(t.shape) for n, t in tensors.items() if n in shapes or id(t) not in known}
    if own != shapes:
        raise CorruptCheckpointError(
            f"{folder / part.path}: its weights ({shapes}) are not those of the {part.kind} that its settings describe ({own}); "
            f"fetch the folder again"
        )
    return module


def _pieces_of(model: nn.Module, encoder: Encoder) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield folder, name and module of everything around the transformer that may have weights."""
    for part in encoder.parts[1:]:
        module = model.get_submodule(part.name)
        routes: Any = getattr(module, "sub_modules", None)
        if not isinstance(routes, nn.ModuleDict):
            yield part.path, part.name, module
            continue
        seen: set[int] = set()
        for route, inner in routes.items():
            for index, piece in enumerate(inner.children()):
                if id(piece) not in seen:
                    seen.add(id(piece))
                    key = f"{route}_{index}_{type(piece).__name__}"
                    yield f"{part.path}/{key}", f"{part.name}.sub_modules.{route}.{index}", piece


def _library(folder: Path, encoder: Encoder) -> Any:
    """Return sentence-transformers, which has every class that the files name."""
    try:
        import sentence_transformers
    except ImportError as e:
        raise MissingDependencyError(
            f"{folder} is a {encoder.kind}; install it with: pip install sentence-transformers"
        ) from e
    for part in encoder.parts:
        for reference in (part.reference, *part.inner):
            _checked_class(reference, folder)
    return sentence_transformers


def _modules() -> Any:
    from sentence_transformers.base import modules

    return modules


def _checked_class(reference: str, folder: Path) -> Any:
    """Return a class of sentence-transformers by its name, which may be one of an older release.

    Raises:
        UnsafeInputError: it is something else, whose `load` would be called.
    """
    from sentence_transformers.util import import_module_class

    try:
        found: Any = import_module_class(reference)
    except (ImportError, AttributeError) as e:
        raise UnsupportedModelError(
            f"{folder}: this version of sentence-transformers has no module {reference} ({one_line(e)}); update it"
        ) from e
    if not isinstance(found, type) or not issubclass(found, _modules().Module):
        raise UnsafeInputError(
            f"{folder}: {reference} is no module of sentence-transformers; correct {MODULES}"
        )
    return found


def _holding(base: Any, core: nn.Module, dtype: torch.dtype) -> Any:
    """Return an encoder's class whose loading takes `core` for its transformer."""

    class Holding(base):  # type: ignore[misc]
        def _load_module_class_from_ref(self, class_ref: str, *args: Any, **kwargs: Any) -> Any:
            found = super()._load_module_class_from_ref(class_ref, *args, **kwargs)
            return _given(found, core, dtype) if issubclass(found, _modules().Transformer) else found

        def _post_init(self) -> None:
            first = self[0]
            first.__class__ = type(first).__base__
            super()._post_init()

    return Holding


def _given(base: Any, core: Any, dtype: torch.dtype) -> Any:
    """Return the class of a transformer's module that takes `core` instead of loading one."""

    class Given(base):  # type: ignore[misc]
        def _load_model(self, path: str, task: str, config: Any, *args: Any, **kwargs: Any) -> Any:
            del path, task, args
            asked = kwargs.keys() - _PLACES - _DTYPES - {"attn_implementation"}
            if asked:
                raise UnsupportedModelError(
                    f"the settings of the transformer ask for {', '.join(sorted(asked))}; load the model yourself and pass the object"
                )
            if kwargs.get("attn_implementation"):
                core.set_attn_implementation(kwargs["attn_implementation"])
            _use_caches_(core.config, config)
            return core

        def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
            # the first says what the other modules are cast to, and int8 codes are parameters too
            del recurse
            yield nn.Parameter(torch.empty(0, dtype=dtype))

    return Given


def _use_caches_(config: Any, asked: Any) -> None:
    """Take over that an encoder keeps no cache of keys and values, which sentence-transformers sets."""
    if hasattr(config, "use_cache"):
        config.use_cache = asked.use_cache
    for name in config.sub_configs:
        inner, other = getattr(config, name, None), getattr(asked, name, None)
        if inner is not None and other is not None:
            _use_caches_(inner, other)
