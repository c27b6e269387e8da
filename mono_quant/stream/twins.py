"""Whether two tensors of a source have the same bytes."""

import os

from mono_quant.io.disk.reading import open_regular, read_into
from mono_quant.io.tensors.checkpoint import check_unchanged
from mono_quant.stream.spec import Piece
from mono_quant.stream.supply import Supply

_WINDOW = 1 << 20


def are_equal(one: Piece, other: Piece, supply: Supply) -> bool:
    """Compare two tensors byte by byte, with the scales of those that have some.

    Args:
        one, other: where they lie.
        supply: of their files, which are released.

    Raises:
        CorruptCheckpointError: a file is not as it was.
    """
    if (one.dtype, one.shape, one.nbytes) != (other.dtype, other.shape, other.nbytes):
        return False
    if (one.inverse is None) != (other.inverse is None):
        return False
    if (
        one.inverse is not None
        and other.inverse is not None
        and not are_equal(one.inverse, other.inverse, supply)
    ):
        return False
    files = dict.fromkeys((one.file, other.file))
    opened: dict[str, int] = {}
    try:
        for name in files:
            file = supply.fetch(name)
            opened[name] = open_regular(file.path)
            check_unchanged(opened[name], file)
        return _same_bytes(one, opened[one.file], other, opened[other.file])
    finally:
        for name, descriptor in opened.items():
            os.close(descriptor)
            supply.release(name)


def _same_bytes(one: Piece, first: int, other: Piece, second: int) -> bool:
    held = memoryview(bytearray(2 * _WINDOW))
    for reached in range(0, one.nbytes, _WINDOW):
        count = min(_WINDOW, one.nbytes - reached)
        a, b = held[:count], held[_WINDOW:][:count]
        read_into(a, first, one.start + reached, one.file)
        read_into(b, second, other.start + reached, other.file)
        if a != b:
            return False
    return True
