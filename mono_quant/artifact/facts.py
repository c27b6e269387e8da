"""What a saved folder, or a model about to be saved, says about itself: manifest, report, the facts of its card."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mono_quant.artifact.cards import INPUTS, CardFacts
from mono_quant.artifact.layouts import KINDS, LAYOUTS
from mono_quant.errors import (
    CorruptCheckpointError,
    FormatVersionError,
    MissingFileError,
)
from mono_quant.hf.encoders import ENCODERS
from mono_quant.io.disk.json_text import read_json_object
from mono_quant.io.disk.manifest import FORMAT, FORMAT_VERSION, MANIFEST, REPORT, read_manifest, verify_files
from mono_quant.kernels import ACTIVATIONS, AUTO
from mono_quant.planning.config import QuantizationConfig
from mono_quant.planning.report import QuantReport, dtype_name
from mono_quant.planning.schemes import spelled
from mono_quant.sources.origin import Origin
from mono_quant.sources.source import Subject
from mono_quant.version import __version__


class StoredCodes(NamedTuple):
    """How the int8 codes of one weight lie in the file.

    Attributes:
        shape: of the float weight.
        transposed: the rows are the columns of the weight.
        scale: shape of the scales, [..., 1].
    """

    shape: tuple[int, ...]
    transposed: bool
    scale: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"shape": list(self.shape), "transposed": self.transposed, "scale": list(self.scale)}


@dataclass(frozen=True)
class Manifest:
    """What `save` says about a folder; one that was read has been checked.

    Attributes:
        class_name: of the converted model.
        kind: `module`, `transformers`, `diffusers` or `sentence_transformer`.
        layout: `compressed-tensors`, `mono_quant` or `plain`.
        dtype: `int8` or `fp16`.
        tensors: the int8 codes, by name in the file.
        buffers: dtype of the buffers that were cast after they were computed, by name; see `buffers`.
        source: where the model came from.
        settings: the request, as plain data.
        versions: of the packages that made it.
        inputs: what the model's forward takes.
        generates: it has `generate`.
        encoder: class of sentence-transformers; empty for other models, and in folders of older versions.
        built: dtype that the class was built in; None in older folders, where it is that of the weights.
        files: size and sha256 of every file.
        mono_quant_version: that wrote the folder.
        narrowed: the dtype that a forward sees of what is stored in half precision on request, by name in the model.
        activations: scheme of the activations of all int8 layers, or of each by name in the model; `auto` in older folders.
    """

    class_name: str
    kind: str
    layout: str
    dtype: str
    tensors: Mapping[str, StoredCodes]
    buffers: Mapping[str, torch.dtype]
    source: Origin
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    inputs: tuple[str, ...] = ()
    generates: bool = False
    encoder: str = ""
    built: torch.dtype | None = None
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    mono_quant_version: str = __version__
    narrowed: Mapping[str, torch.dtype] = field(default_factory=dict)
    activations: str | Mapping[str, str] = AUTO

    @classmethod
    def read(cls, folder: Path, *, hashes: bool | None = None, extras: bool = False) -> "Manifest":
        """Read and check the manifest of a folder that mono_quant wrote.

        Args:
            folder: to read.
            hashes: compare the files with it, by size alone (False) or by sha256 too (True); not at all when None.
            extras: accept further files, unless loading would read them.

        Raises:
            MonoQuantError: a typed error for a missing, damaged, foreign or newer folder.
        """
        raw = read_manifest(folder)
        if hashes is not None:
            verify_files(folder, raw["files"], hashes=hashes, extras=extras)
        return cls.parse(raw, folder)

    @classmethod
    def parse(cls, raw: Mapping[str, Any], folder: Path) -> "Manifest":
        """Check a manifest that was read; see `read`."""
        raw = {"narrowed": {}, **raw}
        for key in ("tensors", "buffers", "source", "settings", "versions", "narrowed"):
            if not isinstance(raw.get(key), Mapping):
                raise CorruptCheckpointError(
                    f"{folder}: {key} of {MANIFEST} is {raw.get(key)!r}, not an object; save the model again"
                )
        words = {key: raw.get(key) for key in ("class", "kind", "layout", "dtype")}
        for key, value in words.items():
            if not isinstance(value, str):
                raise CorruptCheckpointError(
                    f"{folder}: {key} of {MANIFEST} is {value!r}, not a text; save the model again"
                )
        if words["kind"] not in KINDS or words["layout"] not in LAYOUTS:
            raise FormatVersionError(
                f"{folder}: {MANIFEST} names kind {words['kind']!r} and layout {words['layout']!r}, which this version "
                f"({__version__}) does not know; update mono_quant"
            )
        inputs = raw.get("inputs")
        return cls(
            str(words["class"]),
            str(words["kind"]),
            str(words["layout"]),
            str(words["dtype"]),
            {name: _stored(folder, name, facts) for name, facts in raw["tensors"].items()},
            {name: _dtype(folder, name, dtype) for name, dtype in raw["buffers"].items()},
            Origin.from_dict(raw["source"]),
            raw["settings"],
            dict(raw["versions"]),
            tuple(n for n in inputs if n in INPUTS) if isinstance(inputs, list) else (),
            raw.get("generates") is True,
            raw["encoder"] if raw.get("encoder") in ENCODERS else "",
            _dtype(folder, "built", raw["built"]) if "built" in raw else None,
            raw.get("files", {}),
            str(raw.get("mono_quant_version", "")),
            {name: _dtype(folder, name, dtype) for name, dtype in raw["narrowed"].items()},
            _schemes(folder, raw.get("activations", AUTO)),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; `parse` gives back an equal manifest."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "mono_quant_version": self.mono_quant_version,
            "class": self.class_name,
            "kind": self.kind,
            "layout": self.layout,
            "dtype": self.dtype,
            "tensors": {name: codes.to_dict() for name, codes in self.tensors.items()},
            "buffers": {name: dtype_name(dtype) for name, dtype in self.buffers.items()},
            "source": self.source.to_dict(),
            "settings": dict(self.settings),
            "inputs": list(self.inputs),
            "generates": self.generates,
            **({"encoder": self.encoder} if self.encoder else {}),
            **({} if self.built is None else {"built": dtype_name(self.built)}),
            **({"narrowed": {n: dtype_name(d) for n, d in self.narrowed.items()}} if self.narrowed else {}),
            **self._activations(),
            "versions": dict(self.versions),
            "files": dict(self.files),
        }

    def _activations(self) -> dict[str, Any]:
        if isinstance(self.activations, str):
            return {"activations": self.activations} if self.dtype == "int8" else {}
        return {"activations": dict(self.activations)}


def _schemes(folder: Path, given: Any) -> str | dict[str, str]:
    """Check the schemes of activations that a manifest names."""
    named = {"": given} if isinstance(given, str) else given
    if not isinstance(named, Mapping):
        raise CorruptCheckpointError(
            f"{folder}: activations of {MANIFEST} is {given!r}, no scheme and no object of schemes; save the model again"
        )
    unknown = next((scheme for scheme in named.values() if scheme not in ACTIVATIONS), None)
    if unknown is not None:
        raise FormatVersionError(
            f"{folder}: {MANIFEST} names the activation scheme {unknown!r}, which this version ({__version__}) does not know; "
            f"update mono_quant"
        )
    return given if isinstance(given, str) else dict(named)


def _stored(folder: Path, name: str, facts: Any) -> StoredCodes:
    try:
        shape, scale = (tuple(int(size) for size in facts[key]) for key in ("shape", "scale"))
        return StoredCodes(shape, facts["transposed"] is True, scale)
    except (TypeError, KeyError, ValueError) as e:
        raise CorruptCheckpointError(
            f"{folder}: {MANIFEST} describes {name} in an unknown way ({facts!r}); save the model again"
        ) from e


def _dtype(folder: Path, name: str, dtype: Any) -> torch.dtype:
    if dtype not in ("float16", "bfloat16", "float32", "float64"):
        raise CorruptCheckpointError(
            f"{folder}: {MANIFEST} gives {name} the dtype {dtype!r}; save the model again"
        )
    found: torch.dtype = getattr(torch, dtype)
    return found


def read_report(folder: Path) -> QuantReport:
    """Return the report that a saved folder carries.

    Raises:
        MissingFileError: there is none.
    """
    if not (folder / REPORT).exists():
        raise MissingFileError(f"{folder} has no {REPORT}; it was not written by mono_quant")
    return QuantReport.from_dict(read_json_object(folder / REPORT, max_bytes=1 << 28))


def read_card_facts(folder: Path, repo_id: str | None = None) -> CardFacts:
    """Gather the same from a saved folder.

    Args:
        folder: that `save` wrote.
        repo_id: where it is, or will be, published.

    Raises:
        MonoQuantError: the folder is not a complete saved model.
    """
    manifest = Manifest.read(folder)
    return CardFacts(
        read_report(folder),
        manifest.source,
        manifest.layout,
        manifest.kind,
        given_options(QuantizationConfig.from_dict(manifest.settings)),
        manifest.versions,
        "tokenizer_config.json" in manifest.files,
        repo_id,
        manifest.inputs,
        manifest.generates,
        manifest.encoder,
    )


def given_options(config: QuantizationConfig) -> dict[str, Any]:
    """Return the options that differ from the defaults, without the dtype."""
    default = QuantizationConfig().to_dict()
    given = {k: v for k, v in config.to_dict().items() if v != default[k] and k != "dtype"}
    return given | ({"activations": spelled(config.asked_activations)} if "activations" in given else {})


def card_facts(
    subject: Subject, report: QuantReport, config: QuantizationConfig, layout: str, has_tokenizer: bool
) -> CardFacts:
    """Gather what the card of a converted model is made from."""
    library = {"module": (), "diffusers": ("diffusers",)}.get(subject.kind, ("transformers",))
    packages = ["torch", *library]
    versions = {"mono_quant": __version__} | {name: metadata.version(name) for name in packages}
    if subject.kind == "sentence_transformer":
        versions["sentence-transformers"] = metadata.version("sentence-transformers")
    facts: dict[str, Any] = {}
    if subject.kind == "sentence_transformer":
        names = [c.__name__ for c in type(subject.model).mro()]
        facts = {"encoder": next((name for name in names if name in ENCODERS), "")}
    if subject.kind == "transformers":
        core: Any = subject.core
        parameters = inspect.signature(type(core).forward).parameters
        facts = {
            "inputs": tuple(n for n in INPUTS if n in parameters),
            "generates": bool(core.can_generate()),
        }
    return CardFacts(
        report,
        subject.origin,
        layout,
        subject.kind,
        given_options(config),
        versions,
        has_tokenizer,
        **facts,
    )
