"""What the files of a sentence-transformers model say: which encoder it is and of which modules it is made.

Everything here is read and checked before the library is imported: a repository chooses among its classes, and brings no code.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from mono_quant.errors import (
    AdapterAttachedError,
    CorruptCheckpointError,
    PickleOnlyError,
    RemoteCodeError,
    UnsafeInputError,
    UnsupportedModelError,
)
from mono_quant.io.disk.json_text import read_json, read_json_object
from mono_quant.io.disk.reading import open_regular
from mono_quant.io.text import printable

MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"
ENCODERS = ("SentenceTransformer", "CrossEncoder", "SparseEncoder", "MultiVectorEncoder")
# Modules that hold a model of transformers, and those that hold modules of their own.
TRANSFORMERS = ("Transformer", "MLMTransformer", "CLIPModel")
ROUTERS = ("Router", "Asym")
_CLASS = re.compile(r"sentence_transformers(\.[A-Za-z_]\w*)+")
_FOLDER = re.compile(r"\d+_[A-Za-z]\w*")
_ROUTE = re.compile(r"(\w+_)?\d+_[A-Za-z]\w*")
_ACTIVATION = re.compile(r"torch\.nn\.(modules\.\w+\.)?[A-Z]\w*")
_ARGUMENTS = re.compile(r"(model|tokenizer|config)_args|(model|processor|config)_kwargs")
# Of config_args: neither changes what the weights are.
_HARMLESS = ("use_cache", "dtype", "torch_dtype", "trust_remote_code", "attn_implementation")
_OBJECT = "quantize({}(...)) takes the object, once you have loaded it yourself"


@dataclass(frozen=True)
class Part:
    """One module of an encoder.

    Attributes:
        name: in the encoder.
        path: of its folder, empty for the one that all lies in.
        reference: its class, by module and name.
        inner: classes of the modules that it chooses between.
    """

    name: str
    path: str
    reference: str = "sentence_transformers.base.modules.transformer.Transformer"
    inner: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """Name of its class."""
        return self.reference.rpartition(".")[2]


@dataclass(frozen=True)
class Encoder:
    """What `modules.json` and the files beside it describe.

    Attributes:
        kind: class of sentence-transformers.
        task: what its transformer is made for, in the words of sentence-transformers.
        parts: the modules in order; the transformer is the first.
        listed: there is a `modules.json`.
    """

    kind: str
    task: str
    parts: tuple[Part, ...]
    listed: bool = True

    @property
    def core_name(self) -> str:
        """Name of the transformer in the encoder."""
        return f"{self.parts[0].name}.model"


def is_encoder_file(name: str) -> bool:
    """Tell whether a small file of a repository says what encoder it is, so that a plan needs it."""
    below, _, last = name.rpartition("/")
    if not below:
        return last in (MODULES, SETTINGS) or re.fullmatch(r"sentence_[\w-]+_config\.json", last) is not None
    return last.endswith("config.json") and _FOLDER.fullmatch(below.partition("/")[0]) is not None


def encoder_of(folder: Path, raw: Mapping[str, Any]) -> Encoder | None:
    """Read what encoder a folder holds; None for a model of transformers alone.

    Args:
        folder: of a model; its small files are read.
        raw: its `config.json`; empty when it has none.

    Raises:
        UnsafeInputError: its files name something outside the folder, or a pickle.
        RemoteCodeError: a module is none of sentence-transformers'.
        UnsupportedModelError: no transformer of it can be converted here.
    """
    if not os.path.lexists(folder / MODULES):
        return _reranker(folder, raw)
    settings = read_json_object(folder / SETTINGS) if (folder / SETTINGS).exists() else {}
    kind = settings.get("model_type", ENCODERS[0])
    if kind not in ENCODERS:
        raise UnsupportedModelError(
            f"{folder / SETTINGS}: model_type is {printable(kind)}, which is none of {', '.join(ENCODERS)}; load the model "
            f"yourself, and pass the transformer in it"
        )
    parts = _parts(folder, kind)
    _check_activation(folder / SETTINGS, settings.get("activation_fn"))
    return Encoder(kind, _task(folder, parts[0]), parts)


def _reranker(folder: Path, raw: Mapping[str, Any]) -> Encoder | None:
    """Return what is a CrossEncoder by its config alone, as releases before 6 saved it."""
    names, said = raw.get("architectures"), raw.get("sentence_transformers")
    older = raw.get("sbert_ce_default_activation_function")
    is_classifier = isinstance(names, list) and names and str(names[0]).endswith("ForSequenceClassification")
    if not is_classifier or not (isinstance(said, Mapping) or isinstance(older, str)):
        return None
    _check_activation(
        folder / "config.json", said.get("activation_fn") if isinstance(said, Mapping) else older
    )
    return Encoder("CrossEncoder", "sequence-classification", (Part("0", ""),), listed=False)


def _parts(folder: Path, kind: str) -> tuple[Part, ...]:
    entries = read_json(folder / MODULES)
    if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) for e in entries):
        raise CorruptCheckpointError(
            f"{folder / MODULES} is no list of modules; fetch it again, or remove it to convert the transformer alone"
        )
    parts = tuple(_part(folder, entry, kind) for entry in entries)
    names = [part.name for part in parts]
    if len(set(names)) < len(names) or not all(re.fullmatch(r"\w+", name) for name in names):
        raise CorruptCheckpointError(
            f"{folder / MODULES}: the modules are called {printable(names)}; give each a name of its own, of letters and digits"
        )
    _check_first(folder, parts[0], kind)
    inner = [_check_behind(folder / part.path, part.path, part.kind, kind) for part in parts[1:]]
    return (parts[0], *(replace(part, inner=found) for part, found in zip(parts[1:], inner, strict=True)))


def _part(folder: Path, entry: Mapping[str, Any], kind: str) -> Part:
    name, path, reference = entry.get("name", ""), entry.get("path"), entry.get("type")
    _check_class(folder / MODULES, reference, kind)
    if not isinstance(path, str) or path and not _FOLDER.fullmatch(path):
        raise UnsafeInputError(
            f"{folder / MODULES}: the path of module {printable(name)} is {printable(path)}; it has to be a folder beside it "
            f"that is called like 1_Pooling. If you trust the files, {_OBJECT.format(kind)}"
        )
    if path and (folder / path).is_symlink():
        raise UnsafeInputError(
            f"{folder / path} is a symbolic link to another folder; put a copy of the folder there"
        )
    return Part(str(name), path, str(reference))


def _check_class(file: Path, reference: Any, kind: str) -> None:
    if not isinstance(reference, str) or not _CLASS.fullmatch(reference):
        raise RemoteCodeError(
            f"{file} names the module {printable(reference)}, which is none of sentence-transformers'. Nothing of it was "
            f"imported. Read its code; {_OBJECT.format(kind)}"
        )


def _check_first(folder: Path, first: Part, kind: str) -> None:
    if first.kind in ROUTERS:
        raise UnsupportedModelError(
            f"{folder}: the first module is a {first.kind}, which chooses between transformers; load the {kind} and convert each in "
            f"its place, such as dynamic_quantize(model[0].sub_modules['query'][0].model)"
        )
    if first.kind not in TRANSFORMERS:
        raise UnsupportedModelError(
            f"{folder}: the first module is a {first.kind}, so this {kind} holds no transformer to convert; load it, and convert the "
            f"module that has the weights by itself, such as dynamic_quantize(model[1])"
        )
    if first.path:
        raise UnsupportedModelError(
            f"{folder}: its transformer lies in {first.path}, not beside {MODULES}; {_OBJECT.format(kind)}, or a folder that "
            f"its save_pretrained wrote"
        )
    if (folder / "adapter_config.json").exists():
        raise AdapterAttachedError(
            f"{folder} holds a PEFT adapter; load the {kind}, call model.transformers_model.merge_and_unload() and pass the result"
        )


def _check_behind(inner: Path, path: str, kind: str, encoder: str) -> tuple[str, ...]:
    """Refuse a module behind the transformer that cannot be kept as it is, or that reads what it should not.

    Returns:
        The classes of the modules in it.
    """
    if kind in TRANSFORMERS:
        raise UnsupportedModelError(
            f"{inner}: a second transformer ({kind}), of which a folder keeps one; {_OBJECT.format(encoder)}, for use in memory"
        )
    if not path or not inner.is_dir():
        # a module without settings and weights has no file, and git keeps no empty folder
        return ()
    names = _check_files(inner)
    if "pytorch_model.bin" in names and "model.safetensors" not in names:
        raise PickleOnlyError(
            f"{inner} has only pickle weights (pytorch_model.bin), which can run code when read; load the {encoder} yourself, and "
            f"pass the object or the folder that its save_pretrained wrote"
        )
    settings = module_settings(inner)
    _check_activation(inner / "config.json", settings.get("activation_function"))
    return _check_routes(inner, settings, encoder) if kind in ROUTERS else ()


def _check_files(inner: Path) -> set[str]:
    """Open every file of a module's folder, so that none is a link that leaves it."""
    names = {path.name for path in inner.iterdir() if not path.is_dir()}
    for name in names:
        os.close(open_regular(inner / name))
    return names


def module_settings(inner: Path) -> dict[str, Any]:
    """Return the settings of a module from its folder; none where it has no file for them."""
    for name in ("router_config.json", "config.json"):
        if (inner / name).exists():
            return read_json_object(inner / name)
    return {}


def _check_routes(inner: Path, settings: Mapping[str, Any], encoder: str) -> tuple[str, ...]:
    types = settings.get("types")
    if not isinstance(types, Mapping):
        raise CorruptCheckpointError(f"{inner}: its settings name no modules (types); fetch the folder again")
    for path, reference in types.items():
        _check_class(inner, reference, encoder)
        if not _ROUTE.fullmatch(path) or (inner / path).is_symlink():
            raise UnsafeInputError(
                f"{inner}: {printable(path)} is no folder of a module in it; {_OBJECT.format(encoder)}, if you trust it"
            )
        _check_behind(inner / path, path, reference.rpartition(".")[2], encoder)
    return tuple(types.values())


def _task(folder: Path, first: Part) -> str:
    """Return what the transformer of an encoder is made for."""
    default = "fill-mask" if first.kind == "MLMTransformer" else "feature-extraction"
    for path in sorted(folder.glob("sentence_*_config.json")):
        settings = read_json_object(path)
        _check_settings(path, settings)
        return str(settings.get("transformer_task", default))
    return default


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Refuse settings of a transformer that name files or repositories, or that make another model than config.json says."""
    if settings.get("tokenizer_name_or_path") is not None:
        _refuse_setting(path, "tokenizer_name_or_path", settings["tokenizer_name_or_path"])
    for key, values in settings.items():
        for inner, value in (
            values.items() if _ARGUMENTS.fullmatch(key) and isinstance(values, Mapping) else ()
        ):
            is_place = isinstance(value, str) and re.search(r"[/\\~]|\.\.", value) is not None
            if is_place or inner.endswith(("_file", "_dir", "subfolder", "revision")):
                _refuse_setting(path, f"{key}.{inner}", value)
            if key.startswith("config") and inner not in _HARMLESS:
                raise UnsupportedModelError(
                    f"{path}: {key}.{inner} is {printable(value)}, which makes another model than config.json says; write it into "
                    f"config.json, or load the model yourself and pass the object"
                )


def _refuse_setting(path: Path, key: str, value: Any) -> NoReturn:
    raise UnsafeInputError(
        f"{path}: {key} is {printable(value)}, which names something outside the folder; take it out, or load the model yourself "
        f"and pass the object"
    )


def _check_activation(file: Path, name: Any) -> None:
    """Refuse a function of torch that is no activation: sentence-transformers calls whatever stands there."""
    if isinstance(name, str) and name.startswith("torch") and not _ACTIVATION.fullmatch(name):
        raise UnsafeInputError(
            f"{file}: the activation is {printable(name)}, which is none of torch.nn; correct it, such as "
            f"torch.nn.modules.activation.Sigmoid"
        )
