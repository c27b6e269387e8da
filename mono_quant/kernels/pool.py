"""Memory for large outputs, used again when nobody holds it any more.

The system hands out large memory as fresh pages and takes it back when it is freed, so that every large output pays for
page faults: half of the time of a product of 4096 tokens. A block from here is a tensor of bytes that the pool holds; an
output is a view of it that torch keeps alive as long as its storage lives (`torch.frombuffer`), and whose end brings the
block back. So a block is never in two hands, whatever views, arrays or other threads do with it.
"""

import ctypes
import threading
import weakref
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

# Smaller outputs come from memory that the allocator keeps by itself.
SMALLEST = 1 << 20
# Idle bytes that are kept at most.
LIMIT = 512 << 20
# Sizes are rounded up to this, so that texts of nearly the same length share blocks.
_GRAIN = 1 << 18
# A block that was of no use for so many outputs is given back to the system.
_PATIENCE = 256
_POINTS = {torch.float32: 4, torch.float16: 2, torch.bfloat16: 2}

_lock = threading.Lock()
# Idle blocks by size, each with the number of the output it served last.
_idle: dict[int, list[tuple[int, Tensor]]] = {}
# What came back since; finalizers run wherever Python drops an object and may not wait for a lock.
_returned: deque[Tensor] = deque()
_served = 0


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return an uninitialised dense tensor of `shape`, in the dtype and on the device of `like`.

    Large ones on the CPU come from the pool. Their storage cannot be resized.
    """
    size = _POINTS.get(like.dtype, 0)
    for extent in shape:
        size *= extent
    if size < SMALLEST or not like.is_cpu:
        return like.new_empty(tuple(shape))
    rounded = -(-size // _GRAIN) * _GRAIN
    block = _take(rounded)
    view = (ctypes.c_char * rounded).from_address(block.data_ptr())
    weakref.finalize(view, _returned.append, block).atexit = False
    return torch.frombuffer(view, dtype=like.dtype, count=size // like.element_size()).view(tuple(shape))


def idle_bytes() -> int:
    """Return how many bytes are held for outputs to come."""
    with _lock:
        _put_back()
        return sum(size * len(blocks) for size, blocks in _idle.items())


def clear() -> None:
    """Give back to the system what no output holds."""
    with _lock:
        _put_back()
        _idle.clear()


def _take(size: int) -> Tensor:
    global _served
    with _lock:
        _served += 1
        _put_back()
        blocks = _idle.get(size)
        if blocks:
            return blocks.pop()[1]
    # outside of inference mode, whose tensors no one else may write
    with torch.inference_mode(False):
        return torch.empty(size, dtype=torch.uint8)


def _put_back() -> None:
    while _returned:
        block = _returned.popleft()
        _idle.setdefault(block.numel(), []).append((_served, block))
    for size, blocks in list(_idle.items()):
        # the one that came back last is used first, so the oldest are at the front
        while blocks and blocks[0][0] < _served - _PATIENCE:
            blocks.pop(0)
        if not blocks:
            del _idle[size]
    held = sum(size * len(blocks) for size, blocks in _idle.items())
    while held > LIMIT:
        size = min(_idle, key=lambda size: _idle[size][0][0])
        _idle[size].pop(0)
        held -= size
        if not _idle[size]:
            del _idle[size]
