"""Whether a folder that is streamed is the one that is saved, byte for byte."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import mono_quant
from sweeping import checks
from sweeping.building import build
from sweeping.findings import Findings

# Small, so that most models have several shards; not so small that a file holds one tensor.
_SHARD = 200_000


def travel_in_files(kind: str, name: str, dtype: str, source: str, home: Path) -> Findings:
    """Save a class once from memory and once from file to file.

    Args:
        kind: model type.
        name: of the class.
        dtype: `int8` or `fp16`.
        source: dtype of the float folder.
        home: an empty folder to work in.
    """
    found = Findings()
    model: Any = build(kind, name)
    try:
        model.to(getattr(torch, source)).save_pretrained(home / "float")
    except Exception as e:  # noqa: BLE001 - whatever transformers raises says that this road is closed
        found.notes.append(f"save_pretrained: {type(e).__name__}: {' '.join(str(e).split())[:200]}")
        return found
    result = found.attempt("quantize the folder", mono_quant.quantize, home / "float", dtype)
    follow(found, result, home / "float", dtype, home)
    return found


def follow(found: Findings, result: Any, float_folder: Path, dtype: str, home: Path) -> None:
    """Hold the streamed folder against the saved one.

    Args:
        found: gets what is wrong.
        result: of the conversion in memory; None where it was refused.
        float_folder: the source.
        dtype: `int8` or `fp16`.
        home: to work in.
    """
    saved = None
    if result is not None:
        saved = found.attempt("save from memory", result.save, home / "kept", max_shard_size=_SHARD)
    streamed = found.attempt(
        "stream",
        mono_quant.quantize_checkpoint,
        float_folder,
        dtype,
        output=home / "streamed",
        max_shard_size=_SHARD,
    )
    found.check("stream and memory refuse the same", _refusals(saved, streamed))
    if saved is not None and streamed is not None:
        other = checks.other_files(checks.files(saved), checks.files(streamed.folder))
        found.check("the streamed folder is the saved one", other)
    for folder in ("kept", "streamed"):
        shutil.rmtree(home / folder, ignore_errors=True)


def _refusals(saved: Path | None, streamed: Any) -> Iterator[str]:
    if (saved is None) != (streamed is None):
        yield f"only {'memory' if saved is None else 'the stream'} refuses"
