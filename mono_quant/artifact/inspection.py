"""What a saved folder says about itself, from its files alone, and whether that is true."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mono_quant.artifact import loading
from mono_quant.artifact.facts import Manifest, read_report
from mono_quant.artifact.tensors import read_tensors
from mono_quant.convert.int8_layers import layers_with_schemes
from mono_quant.errors import CorruptCheckpointError, MissingFileError, SourceNotFoundError, Words
from mono_quant.hf.diffusion import CLASS
from mono_quant.io.disk.json_text import read_json_object
from mono_quant.io.disk.manifest import MANIFEST, REPORT
from mono_quant.io.hub.fetching import download
from mono_quant.io.hub.repo import resolve
from mono_quant.io.phases import phase
from mono_quant.io.tensors.checkpoint import open_checkpoint
from mono_quant.kernels import AUTO
from mono_quant.planning.report import QuantReport, dtype_name, human_bytes
from mono_quant.planning.rules import reread
from mono_quant.planning.tables import Columns, Part, plain
from mono_quant.sources.guards import Shapes
from mono_quant.sources.opening import looked_up, place_of
from mono_quant.sources.remote import remote_headers
from mono_quant.sources.source import ACCESS, Access


@dataclass(frozen=True)
class Inspection:
    """What the headers of a folder's weight files hold.

    Attributes:
        folder: that was read.
        facts: kind, layout, class, source and versions, as far as the files say.
        quantized: shape of every tensor held as int8 codes, by name.
        kept: dtype and shape of every other tensor that is no scale, by name.
        reasons: why a tensor was kept, where the folder says so, by name.
        weight_bytes: size of all tensors.
    """

    folder: Path
    facts: Mapping[str, Any]
    quantized: Mapping[str, tuple[int, ...]]
    kept: Mapping[str, tuple[str, tuple[int, ...]]]
    reasons: Mapping[str, str]
    weight_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        kept = {
            n: {"dtype": d, "shape": list(s), "reason": self.reasons.get(n, "")}
            for n, (d, s) in self.kept.items()
        }
        return {
            **self.facts,
            "quantized": {n: {"dtype": "int8", "shape": list(s)} for n, s in self.quantized.items()},
            "kept": kept,
            "weight_bytes": self.weight_bytes,
        }

    def table(self) -> str:
        """Return the inspection as text for a terminal."""
        return plain(self.parts())

    def parts(self) -> Iterator[Part]:
        """Yield the same in parts, for a front end that lays out its tables itself."""
        yield from (f"{key:<9} {value}" for key, value in self.facts.items() if value not in (None, ""))
        yield f"{'weights':<9} {human_bytes(self.weight_bytes)} in the files"
        yield ""
        yield f"int8      {len(self.quantized)} tensors"
        if self.quantized:
            yield Columns([[f"  {n}", _shape(shape)] for n, shape in self.quantized.items()], aligned=False)
        yield ""
        yield f"float     {len(self.kept)} tensors"
        if self.kept:
            reasons = ((name, self.reasons.get(name, "")) for name in self.kept)
            told = {name: Words("(", reason, ")") if reason else "" for name, reason in reasons}
            rows = (
                [f"  {n}", f"{_shape(shape)} {dtype}", told[n]] for n, (dtype, shape) in self.kept.items()
            )
            yield Columns(list(rows), aligned=False)


def inspect(folder: str | Path) -> Inspection:
    """Read what is quantized and what is not from the headers of a folder, ours or anybody's.

    Args:
        folder: a saved model, or any model folder with safetensors weights.

    Raises:
        MonoQuantError: a typed error for a folder that is missing or broken.
    """
    path = Path(folder)
    if not path.is_dir():
        raise SourceNotFoundError(f"{path} is no folder; give the folder of a model")
    manifest = Manifest.read(path) if (path / MANIFEST).exists() else None
    with open_checkpoint(path) as checkpoint:
        headers = {name: (header.dtype, header.shape) for name, header in checkpoint.headers.items()}
        return _inspection(path, manifest, headers, checkpoint.total_bytes, {})


def _inspection(
    path: Path, manifest: Manifest | None, headers: Shapes, size: int, facts: Mapping[str, Any]
) -> Inspection:
    table = {} if manifest is None else manifest.tensors
    quantized, kept = {}, {}
    for name, (dtype, shape) in sorted(headers.items()):
        if dtype == torch.int8 and f"{name}_scale" in headers:
            quantized[name] = table[name].shape if name in table else shape
        elif not (name.endswith("_scale") and name.removesuffix("_scale") in headers):
            kept[name] = (dtype_name(dtype), shape)
    return Inspection(path, {**_facts(path, manifest), **facts}, quantized, kept, _reasons(path), size)


def inspect_any(place: str | Path, access: Access = ACCESS) -> Inspection:
    """Inspect a folder, or a repository by its small files and headers.

    Args:
        place: a folder or a Hub id.
        access: how to reach it.

    Raises:
        MonoQuantError: a typed error for a place that is missing or broken.
    """
    if place_of(place, access) == "local":
        return inspect(place)
    client = access.client
    with looked_up(str(place), access):
        facts = resolve(str(place), revision=access.revision, hub=client)
    small = ("config.json", MANIFEST, REPORT)
    folder = download(facts, wanted=lambda name: name in small, hub=client)
    manifest = Manifest.read(folder) if (folder / MANIFEST).exists() else None
    headers, size = remote_headers(facts, client)
    if not headers:
        raise MissingFileError(
            f"{facts.repo_id!r} has no safetensors weights at commit {facts.sha}; give a repository that has"
        )
    return _inspection(
        folder, manifest, headers, size, {"folder": None, "repository": f"{facts.repo_id}@{facts.sha}"}
    )


def verify(folder: str | Path, *, extras: bool = False) -> list[str]:
    """Check a saved folder: every file against the manifest, the report against the weights, and that it loads.

    Args:
        folder: that mono_quant saved.
        extras: accept further files, as repositories gather them, unless loading would read them.

    Returns:
        One line for each check that passed.

    Raises:
        MonoQuantError: the first check that failed.
    """
    path = Path(folder)
    with phase("Checking the files"):
        manifest = Manifest.read(path, hashes=True, extras=extras)
    passed = [f"{len(manifest.files)} files have the size and sha256 of the manifest"]
    report, seen = read_report(path), inspect(path)
    # by values: fused experts are one parameter in memory and one matrix per expert in the file
    found = sum(math.prod(shape) for shape in seen.quantized.values())
    expected = sum(row.numel for row in report.quantized) if report.dtype == "int8" else 0
    if found != expected:
        raise CorruptCheckpointError(
            f"{path}: the report lists {expected:,} int8 values, the weight files hold {found:,}; save the model again"
        )
    codes = len(seen.quantized)
    passed.append(
        f"{codes} int8 tensors, {len(seen.kept)} others, as the report says"
        if codes
        else "no int8 tensors, as the report says"
    )
    if manifest.kind == "module":
        with open_checkpoint(path) as checkpoint:
            read_tensors(checkpoint, manifest)
        passed.append(
            f"codes and scales are sound; {manifest.class_name} itself can only be built by your code"
        )
    else:
        model = loading.load(path, verify=False)[0]
        _check_schemes(path, report, model)
        passed.append(f"loads as {type(model).__name__}")
    return passed


def _check_schemes(path: Path, report: QuantReport, model: nn.Module) -> None:
    """Refuse a report that gives activations other schemes than the manifest, which a loaded model has."""
    layers = layers_with_schemes(model)
    wrong = [
        row
        for row in report.quantized
        if row.module in layers and layers[row.module].activations != row.activations
    ]
    if wrong:
        raise CorruptCheckpointError(
            f"{path}: the report gives {wrong[0].module} {wrong[0].activations} activations, and {MANIFEST} "
            f"{layers[wrong[0].module].activations}; save the model again"
        )


def _facts(path: Path, manifest: Manifest | None) -> dict[str, Any]:
    config = read_json_object(path / "config.json") if (path / "config.json").exists() else {}
    block, classes = config.get("quantization_config"), config.get("architectures")
    facts: dict[str, Any] = {
        "folder": path.name,
        "class": ", ".join(map(str, classes)) if isinstance(classes, list) else str(config.get(CLASS, "")),
        "kind": None,
        "dtype": None,
        "layout": block.get("quant_method") if isinstance(block, dict) else None,
        "source": None,
        "made by": None,
    }
    if manifest is None:
        return facts
    source = manifest.source
    return facts | {
        "class": manifest.class_name,
        "kind": manifest.kind,
        **({"encoder": manifest.encoder} if manifest.encoder else {}),
        "dtype": manifest.dtype,
        "layout": manifest.layout,
        **({} if manifest.activations == AUTO else {"inputs": _told(manifest.activations)}),
        "source": f"{source.repo_id}@{source.sha}" if source.repo_id else None,
        "made by": f"mono_quant {manifest.mono_quant_version}",
    }


def _told(schemes: str | Mapping[str, str]) -> str:
    return schemes if isinstance(schemes, str) else f"{', '.join(sorted(set(schemes.values())))}, by layer"


def _reasons(path: Path) -> dict[str, str]:
    if not (path / REPORT).exists():
        return {}
    return {row.name: reread(row.reason) for row in read_report(path).rows if row.action == "kept"}


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(str(d) for d in shape) or "scalar"
