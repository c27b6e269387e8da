"""Tensors of a result, and what each is made of, become the plans of its files."""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch

from mono_quant.errors import UnsupportedModelError
from mono_quant.io.tensors.headers import TORCH_NAMES
from mono_quant.io.tensors.shards import plan_shards
from mono_quant.io.tensors.tensor_file import Layout, TensorEntry, lay_out
from mono_quant.io.text import printable
from mono_quant.planning.kinds import rows_of
from mono_quant.stream.spec import Action, Constant, Job, Piece, Place, ShardPlan

SCALE = "_scale"


class Part(NamedTuple):
    """Some rows of a tensor of the source.

    Attributes:
        weight: the tensor in the model that they are in.
        number: among the parts of that tensor.
        piece: where they lie; its shape is theirs.
    """

    weight: str
    number: int
    piece: Piece


class Origin(NamedTuple):
    """What a tensor of the result is made of.

    Attributes:
        parts: one after the other; none for what the class computes.
        data: of what the class computes.
    """

    parts: tuple[Part, ...]
    data: bytes = b""


def shards_of(
    entries: Sequence[TensorEntry],
    origins: Mapping[str, Origin],
    kinds: Mapping[str, str],
    max_shard_size: int | str,
    stem: str,
    fits: Mapping[str, str] = MappingProxyType({}),
) -> tuple[ShardPlan, ...]:
    """Plan the files of a result.

    Args:
        entries: its tensors, in the order in which they fill files.
        origins: what each of them is made of, by name; scales are made of what their codes are made of.
        kinds: of layer, by the name in the model of weights that have one.
        max_shard_size, stem: see `plan_shards`.
        fits: see `Job`, by the name in the model.

    Raises:
        UnsupportedModelError: nothing in the source is what a tensor is made of.
        ConfigError: see `plan_shards`.
    """
    sizes = {entry.name: entry.nbytes for entry in entries}
    by_name = {entry.name: entry for entry in entries}
    codes = {e.name for e in entries if e.dtype == torch.int8 and f"{e.name}{SCALE}" in by_name}
    plan = plan_shards(sizes, max_shard_size, stem)
    return tuple(
        _shard(lay_out(file, [by_name[name] for name in names]), file, origins, kinds, codes, fits)
        for file, names in plan.items()
    )


def _shard(
    layout: Layout,
    file: str,
    origins: Mapping[str, Origin],
    kinds: Mapping[str, str],
    codes: set[str],
    fits: Mapping[str, str],
) -> ShardPlan:
    places = {e.name: _place(e, layout.starts[e.name]) for e in layout.entries}
    jobs: list[Job] = []
    constants = []
    for name, place in places.items():
        base = name.removesuffix(SCALE) if name not in origins else name
        if base != name and base in places:
            continue  # made with its codes
        origin = origins.get(base)
        if origin is None:
            raise UnsupportedModelError(
                f"{printable(name)}: no tensor of the source is what it is made of, so it cannot be streamed; convert the model in "
                f"memory (without stream)"
            )
        if not origin.parts:
            constants.append(Constant(place, origin.data))
        elif base in codes:
            scale = places.get(f"{base}{SCALE}")
            jobs += _codes(origin.parts, place if base == name else None, scale, kinds)
        else:
            jobs += _floats(origin.parts, place, fits)
    # in the order of the source: disks and downloads are read once, from front to back
    jobs.sort(key=lambda job: (job.source.file, job.source.start))
    return ShardPlan(file, layout.size, layout.header, tuple(jobs), tuple(constants))


def _place(entry: TensorEntry, start: int) -> Place:
    return Place(entry.name, TORCH_NAMES[entry.dtype], tuple(entry.shape), start, entry.nbytes)


def _codes(
    parts: Sequence[Part], value: Place | None, scale: Place | None, kinds: Mapping[str, str]
) -> Iterator[Job]:
    code = row = 0
    for part in parts:
        shape = torch.Size(part.piece.shape)
        kind = kinds[part.weight]
        # of experts that lie in tensors of their own, a row is a row
        kind = "linear" if kind == "experts" and len(shape) == 2 else kind
        rows = rows_of(shape, kind).numel()
        yield Job(
            part.weight,
            part.number,
            "int8",
            part.piece,
            kind,
            _within(value, code, shape.numel(), part, parts),
            _within(scale, row, rows, part, parts),
        )
        code, row = code + shape.numel(), row + rows


def _floats(parts: Sequence[Part], value: Place, fits: Mapping[str, str]) -> Iterator[Job]:
    reached = 0
    for part in parts:
        numel = torch.Size(part.piece.shape).numel()
        held = part.piece.read_as or part.piece.dtype
        action: Action = "copy" if held == value.dtype else "cast"
        place = _within(value, reached, numel, part, parts)
        limit = fits.get(part.weight, "") if action == "copy" else ""
        yield Job(part.weight, part.number, action, part.piece, "", place, fits=limit)
        reached += numel


def _within(place: Place | None, reached: int, count: int, part: Part, parts: Sequence[Part]) -> Place | None:
    """Return the place of the values of one part in that of all parts."""
    if place is None or len(parts) == 1:
        return place
    size = getattr(torch, place.dtype).itemsize
    shape = part.piece.shape if count == torch.Size(part.piece.shape).numel() else (count, 1)
    return Place(place.name, place.dtype, tuple(shape), place.start + reached * size, count * size)
