"""Which weights a checkpoint has and where each lies, from its index and headers alone: for folders and for repositories."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from mono_quant.errors import CorruptCheckpointError, UnsafeInputError
from mono_quant.io.tensors.headers import Span, collisions
from mono_quant.io.tensors.shards import index_name
from mono_quant.io.text import SHOWN, listed, printable

STEMS = ("model", "diffusion_pytorch_model")
# The index of the largest known model has 9 MB, so it gets more room than other JSON.
MAX_INDEX_BYTES = 64 << 20
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@-]{0,199}\.safetensors")


class TensorHeader(NamedTuple):
    """What a checkpoint says about a tensor before its data is read.

    Attributes:
        dtype, shape: of the tensor.
        nbytes: in the file.
        file: that holds it.
        start: of its first byte, counted from the beginning of the file.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    file: str
    start: int


class FileHeader(NamedTuple):
    """What a weight file says about itself.

    Attributes:
        name: of the file.
        size: in bytes.
        spans: its tensors.
        data_start: where their data begins.
    """

    name: str
    size: int
    spans: Mapping[str, Span]
    data_start: int

    def tensors(self) -> dict[str, TensorHeader]:
        """Return its tensors, each with its place in the file."""
        return {
            name: TensorHeader(
                span.dtype, span.shape, span.end - span.start, self.name, self.data_start + span.start
            )
            for name, span in self.spans.items()
        }


@dataclass(frozen=True)
class Listing:
    """The tensors of a checkpoint, none of which was read.

    Attributes:
        tensors: by name, file by file, in the order of their data.
        files: size in bytes of every weight file, by name.
    """

    tensors: Mapping[str, TensorHeader]
    files: Mapping[str, int]

    @classmethod
    def of(cls, headers: Sequence[FileHeader]) -> "Listing":
        """Put the headers of all files together; `check_headers` proves them first."""
        tensors = {name: tensor for header in headers for name, tensor in header.tensors().items()}
        return cls(tensors, {header.name: header.size for header in headers})


def find_stem(has: Callable[[str], bool], where: str) -> str | None:
    """Return how the weight files are called; None where there are none that loaders look for.

    Args:
        has: tells whether there is a file of a name.
        where: how to call the place in an error.

    Raises:
        CorruptCheckpointError: there are two models.
    """
    stems = [stem for stem in STEMS if has(f"{stem}.safetensors") or has(index_name(stem))]
    if len(stems) > 1:
        raise CorruptCheckpointError(
            f"{where} holds the weights of two models, {' and '.join(stems)}; keep one of them"
        )
    return stems[0] if stems else None


def weight_files(stem: str, weight_map: Mapping[str, str]) -> list[str]:
    """Return the names of the weight files, sorted."""
    return sorted(set(weight_map.values())) or [f"{stem}.safetensors"]


def read_weight_map(index: Any, stem: str, has_single: bool, where: str) -> dict[str, str]:
    """Return which file holds which tensor, as an index says.

    Args:
        index: the content of the file.
        stem: how the weight files are called.
        has_single: whether there is a file with all weights too.
        where: how to call the place in an error.

    Raises:
        CorruptCheckpointError: it is no index, or it is unclear whether it counts.
        UnsafeInputError: it names what is no plain file.
    """
    index_file, single = index_name(stem), f"{stem}.safetensors"
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CorruptCheckpointError(f"{index_file}: 'weight_map' must map names to files; fetch it again")
    if not isinstance(index.get("metadata", {}), dict):
        raise CorruptCheckpointError(f"{index_file}: 'metadata' must be an object; fetch it again")
    # Judged by the name alone, so that the answer tells nothing about what lies outside.
    unsafe = sorted({name for name in weight_map.values() if not _SHARD_NAME.fullmatch(name)})
    if unsafe:
        raise UnsafeInputError(
            f"{index_file} names {listed(unsafe)}, which is no plain name of a safetensors file; "
            "do not use this checkpoint"
        )
    if not weight_map:
        raise CorruptCheckpointError(f"{index_file}: 'weight_map' is empty; fetch it again")
    if has_single and set(weight_map.values()) != {single}:
        raise CorruptCheckpointError(
            f"{where} holds both {single} and {index_file}, and other programs disagree on which "
            f"counts; delete {single} if the shards are newer, or the index and its shards if they are older"
        )
    return weight_map


def check_headers(headers: Sequence[FileHeader], weight_map: Mapping[str, str]) -> None:
    """Prove that index and headers say the same, in both directions, and that no two names could be taken for one.

    Args:
        headers: of every weight file.
        weight_map: of the index; empty where there is none.

    Raises:
        CorruptCheckpointError: they do not.
    """
    holders: dict[str, list[str]] = {}
    for header in headers:
        for name in header.spans:
            holders.setdefault(name, []).append(header.name)
    problems = [
        f"{printable(name)} is in {' and '.join(files)}" for name, files in holders.items() if len(files) > 1
    ]
    if weight_map:
        problems += [f"{printable(name)} is not in the index" for name in holders.keys() - weight_map.keys()]
    problems += [
        f"{printable(name)} is not in {file}"
        for name, file in weight_map.items()
        if file not in holders.get(name, [])
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:SHOWN])
        raise CorruptCheckpointError(
            f"index and shards disagree on {len(problems)} tensors: {shown}; fetch the checkpoint again"
        )
    colliding = collisions(holders)
    if colliding:
        raise CorruptCheckpointError(
            f"tensor names differ only by case or Unicode form: {listed(colliding)}; rename them"
        )
