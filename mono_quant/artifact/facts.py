"""What a saved folder, or a model about to be saved, says about itself: manifest, report, the facts of its card."""

import inspect
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from mono_quant.artifact.cards import INPUTS, CardFacts
from mono_quant.errors import (
    CorruptCheckpointError,
    MissingFileError,
)
from mono_quant.io.disk.allowed import is_allowed
from mono_quant.io.disk.json_text import read_json_object
from mono_quant.io.disk.manifest import MANIFEST, read_manifest, verify_manifest
from mono_quant.planning.config import QuantizationConfig
from mono_quant.planning.report import QuantReport
from mono_quant.sources.origin import Origin
from mono_quant.sources.source import Source
from mono_quant.version import __version__

REPORT = "mono_quant_report.json"


def verified_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder after comparing every file with it."""
    manifest = read_manifest(folder)
    verify_manifest(folder, hashes=True)
    check_manifest(folder, manifest)
    return manifest


def check_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse a manifest whose entries have another form than `save` gives them."""
    for key in ("tensors", "kept", "buffers", "source", "settings", "versions", "files"):
        if not isinstance(manifest.get(key), Mapping):
            raise CorruptCheckpointError(
                f"{folder}: {key} of {MANIFEST} is {manifest.get(key)!r}, not an object; save the model again"
            )
    for name, facts in manifest["tensors"].items():
        if not isinstance(facts, Mapping) or not isinstance(facts.get("shape"), list):
            raise CorruptCheckpointError(
                f"{folder}: {MANIFEST} describes {name} in an unknown way ({facts!r}); save the model again"
            )
    for key in ("kept", "buffers"):
        for name, dtype in manifest[key].items():
            if dtype not in ("float16", "bfloat16", "float32", "float64"):
                raise CorruptCheckpointError(
                    f"{folder}: {MANIFEST} gives {name} the dtype {dtype!r}; save the model again"
                )


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
    manifest = read_manifest(folder)
    try:
        return CardFacts(
            read_report(folder),
            Origin.from_dict(manifest["source"]),
            manifest["layout"],
            manifest["kind"],
            given_options(QuantizationConfig.from_dict(manifest["settings"])),
            dict(manifest["versions"]),
            "tokenizer_config.json" in manifest["files"],
            repo_id,
            _inputs(manifest),
            manifest.get("generates") is True,
        )
    except KeyError as e:
        raise CorruptCheckpointError(f"{folder}: {MANIFEST} lacks {e}; save the model again") from e


def _inputs(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    found = manifest.get("inputs")
    return tuple(n for n in found if n in INPUTS) if isinstance(found, list) else ()


def given_options(config: QuantizationConfig) -> dict[str, Any]:
    """Return the options that differ from the defaults, without the dtype."""
    default = QuantizationConfig().to_dict()
    return {k: v for k, v in config.to_dict().items() if v != default[k] and k != "dtype"}


def is_result_file(name: str) -> bool:
    """Tell whether a file of a repository belongs to a saved model."""
    return is_allowed(name)


def card_facts(
    source: Source, report: QuantReport, config: QuantizationConfig, layout: str, has_tokenizer: bool
) -> CardFacts:
    """Gather what the card of a converted model is made from."""
    packages = ["torch"] if source.kind == "module" else ["torch", "transformers"]
    versions = {"mono_quant": __version__} | {name: metadata.version(name) for name in packages}
    if source.kind == "sentence_transformer":
        versions["sentence-transformers"] = metadata.version("sentence-transformers")
    facts: dict[str, Any] = {}
    if source.kind == "transformers":
        core: Any = source.core
        parameters = inspect.signature(type(core).forward).parameters
        facts = {
            "inputs": tuple(n for n in INPUTS if n in parameters),
            "generates": bool(core.can_generate()),
        }
    return CardFacts(
        report,
        source.origin,
        layout,
        source.kind,
        given_options(config),
        versions,
        has_tokenizer,
        **facts,
    )
