"""What becomes of one block of a tensor: read, made, written; in buffers that are used again and again."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from mono_quant import kernels
from mono_quant.errors import CorruptCheckpointError, NonFiniteWeightError
from mono_quant.io.disk.reading import read_into
from mono_quant.io.tensors.blockwise import check_scales, values_of
from mono_quant.io.text import printable
from mono_quant.stream.blocks import Block, dtype_of, own_dtype
from mono_quant.stream.spec import Job, Piece, Place, Seen

_HALVES = (torch.float16, torch.bfloat16)


class Tally(NamedTuple):
    """What a block saw; see `Seen`. `is_wide`: its scales do not fit their place."""

    signal: float = 0.0
    noise: float = 0.0
    overflowed: int = 0
    clamped: int = 0
    flushed: int = 0
    unfinite: int = 0
    largest: float = 0.0
    nan: int = 0
    is_wide: bool = False


def seen_by(job: Job, tallies: Iterable[Tally]) -> Seen:
    """Return what the blocks of a job saw together."""
    seen = Seen(job.weight, job.part)
    for tally in tallies:
        seen = seen.joined(Seen(job.weight, job.part, *tally[:-1]))
    return seen


class Bench:
    """The buffers of one thread.

    Args:
        opened: returns the descriptor of a file of the source.
        write: takes bytes, and where they belong.
    """

    def __init__(self, opened: Callable[[str], int], write: Callable[[memoryview, int], None]) -> None:
        self._opened, self._write = opened, write
        self._held: dict[str, Tensor] = {}

    def work(self, job: Job, block: Block) -> Tally:
        """Make what a job makes of a block, and write it.

        Raises:
            CorruptCheckpointError: the source ends early, or holds what is no boolean.
            OutputError: the result cannot be written.
        """
        values = self._values(job.source, block)
        if job.action == "int8":
            return self._encode(job, block, values)
        return Tally() if job.value is None else self._convert(job, job.value, block, values)

    def _encode(self, job: Job, block: Block, values: Tensor) -> Tally:
        count, depth = block.rows, block.grid.depth
        codes = self._take("codes", torch.int8, count * depth).view(count, depth)
        scale = self._take("scale", torch.float32, count).view(count, 1)
        matrix = values.view(count, depth)
        try:
            made = kernels.encode_rows(matrix, into=(codes, scale), threads=1)
        except NonFiniteWeightError:
            # in fp32, as codes are made from that
            return _unfinite(matrix.float())
        is_wide = False
        if job.scale is not None:
            stored = scale.to(dtype_of(job.scale.dtype))
            is_wide = not torch.equal(stored.float(), scale)
            self._put(stored, job.scale.start + block.first * stored.itemsize)
        if job.value is not None:
            self._put(codes, job.value.start + block.first * depth)
        return Tally(made.signal, made.noise, is_wide=is_wide)

    def _convert(self, job: Job, place: Place, block: Block, values: Tensor) -> Tally:
        dtype, tally = dtype_of(place.dtype), Tally()
        if job.action == "cast" and dtype in _HALVES:
            into = self._take("cast", dtype, values.numel())
            try:
                made = kernels.cast_half(values, dtype, into=into, threads=1)
            except NonFiniteWeightError:
                return _unfinite(values)
            largest = float(values.abs().max()) if made.overflowed else 0.0
            tally = Tally(0, 0, made.overflowed, made.clamped, made.flushed, largest=largest)
            values = into
        else:
            tally = _beyond(values, dtype_of(job.fits)) if job.fits else _unfinite(values)
            if dtype != values.dtype:
                values = self._take("cast", dtype, values.numel()).copy_(values)
        self._put(values, place.start + block.first * block.grid.depth * dtype.itemsize)
        return tally

    def _values(self, piece: Piece, block: Block) -> Tensor:
        """Read a block as a vector, row after row, in the dtype that the weight has."""
        if block.grid.is_transposed:
            return self._as_read(piece, self._panel(piece, block))
        dtype, depth = dtype_of(piece.dtype), block.grid.depth
        raw = self._take("raw", dtype, block.rows * depth)
        self._read(raw, piece, block.first * depth)
        if piece.inverse is not None:
            return self._dequantized(piece, piece.inverse, block, raw.view(block.rows, depth))
        if dtype == torch.bool and raw.numel() and int(raw.view(torch.uint8).max()) > 1:
            raise CorruptCheckpointError(
                f"{piece.file}: the boolean tensor {printable(piece.name)} holds another byte than 0 and 1; "
                "fetch the file again"
            )
        return self._as_read(piece, raw)

    def _as_read(self, piece: Piece, values: Tensor) -> Tensor:
        """Return values in the dtype that their weight has in the model, where the file has another one."""
        dtype = own_dtype(piece)
        return values if values.dtype == dtype else self._take("read", dtype, values.numel()).copy_(values)

    def _panel(self, piece: Piece, block: Block) -> Tensor:
        """Read some columns of a matrix, and return them one after another."""
        dtype, depth, width = dtype_of(piece.dtype), block.grid.depth, block.rows
        raw = self._take("raw", dtype, depth * width)
        data, descriptor = _bytes_of(raw), self._opened(piece.file)
        size, stride = width * dtype.itemsize, block.grid.rows * dtype.itemsize
        start = piece.start + block.first * dtype.itemsize
        for row in range(depth):
            read_into(data[row * size :][:size], descriptor, start + row * stride, piece.file)
        turned = self._take("turned", dtype, depth * width)
        turned.view(width, depth).copy_(raw.view(depth, width).t())
        return turned

    def _dequantized(self, piece: Piece, inverse: Piece, block: Block, raw: Tensor) -> Tensor:
        """Return float8 values times the scales of their blocks, rounded once."""
        height, width = piece.block
        rows, across = piece.shape[-2], inverse.shape[-1]
        # the number of each row's row of scales; those of one tensor of several follow each other
        number = torch.arange(block.first, block.first + block.rows)
        number = number // rows * inverse.shape[-2] + number % rows // height
        first = int(number[0])
        stored = self._take("inverse", dtype_of(inverse.dtype), (int(number[-1]) - first + 1) * across)
        self._read(stored, inverse, first * across)
        found = stored.float()
        check_scales(found, inverse.name, inverse.file)
        into = self._take("float", torch.float32, raw.numel()).view(raw.shape)
        values = values_of(raw, found.view(-1, across)[number - first], width, into)
        return self._take("read", own_dtype(piece), raw.numel()).copy_(values.view(-1))

    def _read(self, into: Tensor, piece: Piece, first: int) -> None:
        start = piece.start + first * into.itemsize
        read_into(_bytes_of(into), self._opened(piece.file), start, piece.file)

    def _put(self, values: Tensor, offset: int) -> None:
        self._write(_bytes_of(values.view(-1)), offset)

    def _take(self, name: str, dtype: torch.dtype, count: int) -> Tensor:
        """Return a vector in the buffer of this name; what it held is lost."""
        size = dtype.itemsize * count
        if name not in self._held or self._held[name].numel() < size:
            self._held[name] = torch.empty(size, dtype=torch.uint8)
        return self._held[name][:size].view(dtype)


def _bytes_of(values: Tensor) -> memoryview:
    data: memoryview = values.view(torch.uint8).numpy().data
    return data


def _beyond(values: Tensor, dtype: torch.dtype) -> Tally:
    """Tell what a cast that is not carried out would find."""
    try:
        made = kernels.cast_half(values, dtype, threads=1)
    except NonFiniteWeightError:
        return _unfinite(values)
    return Tally(overflowed=made.overflowed, largest=float(values.abs().max()) if made.overflowed else 0.0)


def _unfinite(values: Tensor) -> Tally:
    if not values.is_floating_point():
        return Tally()
    if values.itemsize == 1:
        values = values.float()
    # one pass, and no copy, where all is well; a sum of finite values may be infinite, so then it is looked at closely
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    if bool(values.sum(dtype=wide).isfinite()):
        return Tally()
    return Tally(unfinite=int((~values.isfinite()).sum()), nan=int(values.isnan().sum()))
