"""A run that gathers a model on a work branch and publishes it, as a process of its own may do it."""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.utils._http
from huggingface_hub import constants
from pushes import ANN, safetensors

from mono_quant.io.hub import branch as branches
from mono_quant.io.hub import client, push
from mono_quant.io.hub.branch import WorkBranch
from mono_quant.io.hub.client import Hub
from mono_quant.io.hub.push import PushResult
from mono_quant.io.hub.target import PushOptions, Restricted, open_target
from mono_quant.io.hub.uploads import LocalFile, gather

IDENTITY = "0123456789abcdef" * 4
BRANCH = "mono-quant-0123456789ab"
SHARDS = {f"model-{i:05d}-of-00003.safetensors": safetensors((i, 5), fill=bytes([i])) for i in range(1, 4)}
SMALL = {
    "README.md": b"---\nlicense: mit\n---\n# Streamed\n",
    "config.json": b'{"streamed": true}',
    "model.safetensors.index.json": b'{"weight_map": {"w": "model-00001-of-00003.safetensors"}}',
}
SMALL["mono_quant.json"] = json.dumps({
    "format": "mono_quant",
    "files": {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in (SMALL | SHARDS).items()
    },
}).encode()
COMPLETE = SMALL | SHARDS


def record_of(name: str, data: bytes) -> dict[str, Any]:
    return {"file": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "seen": [1.5]}


def write(folder: Path, files: Mapping[str, bytes]) -> dict[str, LocalFile]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return gather(folder, list(files))


def gather_on(branch: WorkBranch, folder: Path, shards: Mapping[str, bytes] = SHARDS) -> list[str]:
    """Put what the branch does not hold; return its names."""
    held = branch.held()
    made = [
        name
        for name, data in shards.items()
        if name not in held or held[name].record != record_of(name, data)
    ]
    for name in made:
        branch.put(name, write(folder, {name: shards[name]})[name], record_of(name, shards[name]))
        (folder / name).unlink()
    return made


def run(
    hub: Hub,
    folder: Path,
    repo_id: str = "ann/out",
    *,
    source: Restricted | None = None,
    identity: str = IDENTITY,
    shards: Iterable[str] = tuple(SHARDS),
    **options: Any,
) -> PushResult:
    """Do all of it, or what is left of it."""
    how = PushOptions.of(options)
    target = open_target(repo_id, how, source=source, hub=hub)
    branch = WorkBranch.open(target, identity)
    gather_on(branch, folder, {name: SHARDS[name] for name in shards})
    target = open_target(repo_id, how, source=source, hub=hub)
    small = write(folder, SMALL)
    return branch.publish(target, small, shards, how, source=source, message="Push the streamed model")


def run_apart(endpoint: str, folder: str, shards: Iterable[str]) -> None:
    """Do all of it in this process, which somebody may kill."""
    logging.disable()
    constants.HF_HUB_DISABLE_XET = True
    for module in (huggingface_hub.utils._http, client, push, branches):
        module.time = SimpleNamespace(sleep=lambda seconds: None)
    run(Hub(token=ANN, endpoint=endpoint, cache_dir=Path(folder) / "cache"), Path(folder), shards=shards)
