"""How a file is cut into blocks that fit a bounded buffer, and what a plan has to promise before one is written."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from mono_quant.errors import LimitExceededError, OutputError
from mono_quant.io.tensors.headers import DTYPES, Span, parse_header_bytes
from mono_quant.io.text import printable
from mono_quant.planning.kinds import rows_of
from mono_quant.stream.spec import Job, Piece, Place, ShardPlan

# Values of a block: it stays in the caches from reading to writing, and a call costs little beside it.
BLOCK = 1 << 19
# Bytes for each of them where rows are columns of the source: a block is then read in pieces, which have to be long.
_PANEL = 16
# Bytes of the longest row that a block grows for.
MAX_ROW_BYTES = 64 << 20

_TORCH = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


class Grid(NamedTuple):
    """The matrix that the values of a job are, whose rows are independent of each other.

    Attributes:
        rows, depth: its shape.
        is_transposed: the source has its columns one after another.
    """

    rows: int
    depth: int
    is_transposed: bool = False


class Block(NamedTuple):
    """Some rows of the matrix of a job.

    Attributes:
        job: its number in the plan.
        grid: the matrix.
        first, rows: the number of the first, and how many.
    """

    job: int
    grid: Grid
    first: int
    rows: int


def dtype_of(name: str) -> torch.dtype:
    """Return a dtype by the name that a plan has."""
    return _TORCH[name]


def own_dtype(piece: Piece) -> torch.dtype:
    """Return the dtype of the values of a source, after dequantization where that is needed."""
    return dtype_of(piece.read_as or piece.dtype)


def grid_of(job: Job) -> Grid:
    """Return the matrix that a job works on."""
    shape = torch.Size(job.source.shape)
    if job.action == "int8":
        rows = rows_of(shape, job.kind).numel()
        # of an empty tensor, the depth is what it would have
        depth = shape.numel() // rows if rows else 0
        return Grid(rows, depth, job.kind == "transposed_linear")
    if job.source.inverse is not None:
        return Grid(math.prod(shape[:-1]), shape[-1])
    return Grid(shape.numel(), 1)


def blocks_of(plan: ShardPlan, size: int) -> Iterator[Block]:
    """Yield the blocks of all jobs, in the order in which their sources lie.

    Args:
        plan: of the file.
        size: values of a block, more where rows are columns of the source; a longer row is one by itself.
    """
    for number, job in enumerate(plan.jobs):
        grid = grid_of(job)
        most = size * _PANEL // own_dtype(job.source).itemsize if grid.is_transposed else size
        step = max(1, most // max(1, grid.depth))
        for first in range(0, grid.rows, step):
            yield Block(number, grid, first, min(step, grid.rows - first))


def check_plan(plan: ShardPlan) -> None:
    """Prove that a plan writes every byte of its file once, as its header says.

    Raises:
        OutputError: it does not.
        CorruptCheckpointError: the header is none.
        LimitExceededError: a row is too long to be held.
    """
    spans, begin = parse_header_bytes(plan.header, plan.size, plan.file)
    problems = [
        f"{printable(job.source.name)} {problem}" for job in plan.jobs if (problem := _job_problem(job))
    ]
    problems += [
        f"{printable(place.name)} has {len(data)} bytes, not {place.nbytes}"
        for place, data in plan.constants
        if len(data) != place.nbytes
    ]
    problems += _gaps(_places(plan), spans, begin)
    if begin != len(plan.header):
        problems.append(f"the header is followed by {len(plan.header) - begin} bytes")
    if problems:
        raise OutputError(f"the plan of {printable(plan.file)} is no good: {'; '.join(problems[:5])}")
    for job in plan.jobs:
        _check_row(job)


def _places(plan: ShardPlan) -> list[Place]:
    made = [place for job in plan.jobs for place in (job.value, job.scale) if place is not None]
    return made + [constant.place for constant in plan.constants]


def _gaps(places: Sequence[Place], spans: dict[str, Span], begin: int) -> Iterator[str]:
    """Yield what is promised in the header and not written, or written and not promised.

    A tensor may be written in parts, one after another.
    """
    reached = {name: begin + span.start for name, span in spans.items()}
    for place in sorted(places, key=lambda place: (place.start, place.nbytes)):
        span, shown = spans.get(place.name), printable(place.name)
        if span is None:
            yield f"{shown} is not in the header"
            continue
        if span.dtype != dtype_of(place.dtype):
            yield f"{shown} is {place.dtype}, in the header {span.dtype}"
        if place.nbytes != _nbytes(place.dtype, place.shape):
            yield f"{shown} has {place.nbytes} bytes, not those of its shape"
        if place.start != reached[place.name]:
            yield f"{shown} is written from byte {place.start}, not from {reached[place.name]}"
        reached[place.name] = place.start + place.nbytes
    for name, span in spans.items():
        if reached[name] != begin + span.end:
            yield f"{printable(name)} is written up to byte {reached[name]}, not to {begin + span.end}"


def _job_problem(job: Job) -> str:
    for piece in (job.source, job.source.inverse):
        if piece is not None and piece.nbytes != _nbytes(piece.dtype, piece.shape):
            return f"has {piece.nbytes} bytes in {printable(piece.file)}, not those of its shape"
    source, value, scale = job.source, job.value, job.scale
    if source.inverse is not None and _inverse_shape(source) != source.inverse.shape:
        return f"has scales {list(source.inverse.shape)}, not {list(_inverse_shape(source))}"
    grid = grid_of(job)
    if value is not None and math.prod(value.shape) != math.prod(source.shape):
        return f"has another number of values in {printable(value.name)}"
    if job.action != "int8":
        if scale is not None or value is None:
            return "is no codes, and cannot be split from its scale"
        wanted = own_dtype(source) if job.action == "copy" else dtype_of(value.dtype)
        return "" if dtype_of(value.dtype) == wanted else f"is copied as {value.dtype}"
    if value is not None and value.dtype != "int8":
        return f"has codes in {value.dtype}"
    if value is not None and grid.is_transposed and len(value.shape) > 1:
        return "has codes in the shape of its weight, though they lie row after row"
    if source.inverse is not None and (grid.is_transposed or grid.depth != source.shape[-1]):
        return f"is block-quantized, as no {job.kind} is"
    if scale is not None and (
        math.prod(scale.shape) != grid.rows or not dtype_of(scale.dtype).is_floating_point
    ):
        return f"has scales {scale.dtype} {list(scale.shape)} for {grid.rows} rows"
    return ""


def _nbytes(dtype: str, shape: Sequence[int]) -> int:
    return dtype_of(dtype).itemsize * math.prod(shape)


def _inverse_shape(piece: Piece) -> tuple[int, ...]:
    """Return the shape of the scales of a block-quantized weight."""
    *outer, rows, columns = piece.shape
    height, width = piece.block
    return (*outer, -(-rows // height), -(-columns // width))


def _check_row(job: Job) -> None:
    size = grid_of(job).depth * max(own_dtype(job.source).itemsize, dtype_of(job.source.dtype).itemsize)
    if size > MAX_ROW_BYTES:
        raise LimitExceededError(
            f"{job.source.file}: a row of {printable(job.source.name)} has {size} bytes, more than {MAX_ROW_BYTES}; "
            "convert this model in memory"
        )
