"""What a saved folder says about itself: manifest, report, the facts of its card, its tensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mono_quant.allowed import is_allowed
from mono_quant.cards import INPUTS, CardFacts
from mono_quant.checkpoint import open_checkpoint
from mono_quant.config import QuantizationConfig
from mono_quant.errors import (
    CorruptCheckpointError,
    MissingFileError,
)
from mono_quant.formats import (
    checked_scale,
    shaped_codes,
)
from mono_quant.json_reader import read_json_object
from mono_quant.manifest import FORMAT, MANIFEST, read_manifest, verify_manifest
from mono_quant.origin import Origin
from mono_quant.report import QuantReport

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


def read_tensors(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read all tensors, give flat codes their shape back, and check codes and scales.

    Args:
        folder: to read.
        manifest: of the folder; empty for a foreign checkpoint, whose codes are those with scales beside them.
    """
    with open_checkpoint(folder) as checkpoint:
        tensors = {name: checkpoint[name] for name in checkpoint}
    table = manifest.get("tensors", {})
    if not manifest:
        codes = {name: tensor for name, tensor in tensors.items() if _is_code(name, tensor, tensors)}
        table = {
            n: {"shape": t.shape, "transposed": False, "scale": (t.shape[0], 1)} for n, t in codes.items()
        }
    for name, facts in table.items():
        tensors[name] = shaped_codes(folder, name, tensors.get(name), facts, manifest.get("layout") == FORMAT)
        scale = f"{name}_scale"
        tensors[scale] = checked_scale(folder, scale, tensors.get(scale), tuple(facts["scale"]))
    return tensors


def _is_code(name: str, tensor: Tensor, tensors: Mapping[str, Tensor]) -> bool:
    return name.endswith(".weight") and (tensor.dtype == torch.int8 or f"{name}_scale" in tensors)


def is_result_file(name: str) -> bool:
    """Tell whether a file of a repository belongs to a saved model."""
    return is_allowed(name)
