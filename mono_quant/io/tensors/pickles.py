"""Pickled weights, turned into safetensors by a process of limited memory that builds plain tensors only."""

import json
import os
import re
import resource
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from mono_quant import errors
from mono_quant.errors import (
    CorruptCheckpointError,
    LimitExceededError,
    MissingFileError,
    MonoQuantError,
    Option,
    PickleOnlyError,
    UnsafeInputError,
)
from mono_quant.io.disk.output import new_folder, temporary_folder
from mono_quant.io.disk.reading import open_regular
from mono_quant.io.tensors.shards import write_index, write_tensors
from mono_quant.io.text import listed, printable

# Pickled weights by all the names they go by; only those of transformers and diffusers are converted.
PICKLES = re.compile(r"(pytorch_model|model|adapter_model)[^/]*\.(bin|pt|pth|ckpt)|.*\.(pt|pth|ckpt|pkl)")
_PICKLE_NAME = re.compile(r"(?:pytorch_model|diffusion_pytorch_model)(?:-(\d{5})-of-(\d{5}))?\.bin")
_GIB = 1 << 30
# Runs in a process of its own: whatever goes wrong is told to the parent as one line of JSON.
_WORKER = """
import json, sys
task = json.loads(sys.argv[1])
sys.path[:] = task.pop("modules")
sys.excepthook = lambda kind, error, trace: sys.stdout.write(json.dumps([kind.__name__, str(error)]))
from mono_quant.io.tensors.pickles import convert_pickles
convert_pickles(**task)
"""


def converted(folder: Path, allow_pickle: bool, resources: ExitStack) -> Path:
    """Convert pickle files into a temporary folder; without permission, or without pickles, refuse."""
    pickles = sorted(path.name for path in folder.iterdir() if _PICKLE_NAME.fullmatch(path.name))
    if not pickles:
        raise MissingFileError(
            f"{printable(folder, 400)} holds no model.safetensors and no model.safetensors.index.json; "
            "give the folder of a checkpoint in safetensors format"
        )
    if not allow_pickle:
        raise PickleOnlyError(
            f"{printable(folder, 400)} holds only pickle weights ({listed(pickles)}), which can run code when read; "
            "convert it with https://huggingface.co/spaces/safetensors/convert, or pass ",
            Option("allow_pickle", True),
            " to read plain tensors from it in a process of limited memory",
        )
    _check_pickle_set(folder, pickles)
    out = resources.enter_context(temporary_folder()) / "converted"
    task = {
        "modules": sys.path,
        "paths": [str((folder / name).absolute()) for name in pickles],
        "out": str(out),
    }
    command = [sys.executable, "-c", _WORKER, json.dumps(task)]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        raise _worker_error(folder, done)
    return out


def _check_pickle_set(folder: Path, pickles: Sequence[str]) -> None:
    numbers = [match.groups() for name in pickles if (match := _PICKLE_NAME.fullmatch(name))]
    total = numbers[0][1]
    expected = {(None, None)} if total is None else {(f"{n:05d}", total) for n in range(1, int(total) + 1)}
    if set(numbers) != expected or len(numbers) != len(expected):
        raise CorruptCheckpointError(
            f"{printable(folder, 400)}: {listed(pickles)} is not one complete set of files; fetch it again"
        )


def _worker_error(folder: Path, done: subprocess.CompletedProcess[str]) -> MonoQuantError:
    where = printable(folder, 400)
    if done.returncode < 0:
        return LimitExceededError(
            f"{where}: reading the pickle files was stopped by signal {-done.returncode}, "
            "most likely for lack of memory; convert them on a larger machine"
        )
    try:
        kind, message = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        kind, message = "", done.stderr.strip()[-200:]
    own = getattr(errors, kind, None)
    if isinstance(own, type) and issubclass(own, MonoQuantError):
        return own(message)
    if kind == "MemoryError" or "DefaultCPUAllocator" in message:
        return LimitExceededError(
            f"{where}: the pickle files ask for far more memory than their size; do not use them"
        )
    if kind == "UnpicklingError":
        return UnsafeInputError(
            f"{where}: a pickle file holds more than plain tensors ({printable(message)}); do not use it"
        )
    return CorruptCheckpointError(
        f"{where}: the pickle files cannot be read ({printable(f'{kind}: {message}')}); fetch them again"
    )


def convert_pickles(paths: Sequence[str], out: str) -> None:
    """Rewrite pickle files as safetensors; meant for a process of its own, whose memory it limits.

    Args:
        paths: the files of one checkpoint.
        out: the folder to make.

    Raises:
        UnsafeInputError: something else than plain dense tensors, or compressed records.
        CorruptCheckpointError: a tensor is there twice.
    """
    weight_map: dict[str, str] = {}
    total = 0
    _limit_memory(4 * max(Path(path).stat().st_size for path in paths) + 4 * _GIB)
    with new_folder(out) as folder:
        for number, path in enumerate(paths, 1):
            tensors = _load_pickle(Path(path))
            twice = sorted(tensors.keys() & weight_map.keys())
            if twice:
                raise CorruptCheckpointError(
                    f"{listed(twice)} is in two pickle files; fetch the checkpoint again"
                )
            name = (
                f"model-{number:05d}-of-{len(paths):05d}.safetensors"
                if len(paths) > 1
                else "model.safetensors"
            )
            write_tensors(folder, name, tensors)
            weight_map |= dict.fromkeys(tensors, name)
            total += sum(tensor.nbytes for tensor in tensors.values())
        if len(paths) > 1:
            write_index(folder, weight_map, total)


def _limit_memory(extra: int) -> None:
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except OSError:  # not Linux
        pages = 0
    limit = pages * resource.getpagesize() + extra
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        is_zip = file.read(4) == b"PK\x03\x04"
        if is_zip:
            with zipfile.ZipFile(file) as archive:
                records = archive.infolist()
            packed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
            if packed or sum(record.file_size for record in records) > size:
                raise UnsafeInputError(f"{printable(path, 400)} holds compressed records; do not use it")
        file.seek(0)
        value = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    return _plain_tensors(value, path, size)


def _plain_tensors(value: Any, path: Path, size: int) -> dict[str, torch.Tensor]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise UnsafeInputError(
            f"{printable(path, 400)} is not a dict of names to tensors; save model.state_dict() instead"
        )
    strange = [name for name, tensor in value.items() if not _is_plain(tensor)]
    if strange:
        raise UnsafeInputError(
            f"{printable(path, 400)} holds {listed(strange)}, which is no dense tensor with data of its own; "
            "save model.state_dict() with plain tensors instead"
        )
    if sum(tensor.nbytes for tensor in value.values()) > 2 * size + (1 << 20):
        raise LimitExceededError(
            f"{printable(path, 400)} describes tensors of more than twice its size; do not use it"
        )
    return {name: tensor.detach() for name, tensor in value.items()}


def _is_plain(tensor: Any) -> bool:
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and not any(
            step == 0 and count > 1 for step, count in zip(tensor.stride(), tensor.shape, strict=True)
        )
    )
