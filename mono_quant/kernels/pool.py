"""Memory for large outputs, used again when nobody holds it any more.

The system hands out large memory as fresh pages and takes it back when it is freed, so that every large output pays for
page faults: half of the time of a product of 4096 tokens. A block from here is a tensor of bytes that the pool holds; an
output is a view of it that torch keeps alive as long as its storage lives (`torch.frombuffer`), and whose end brings the
block back. So a block is never in two hands, whatever views, arrays or other threads do with it.
"""

import ctypes
import math
import os
import threading
import time
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
# A block that was of no use for so long is given back to the system.
_SECONDS = 20.0
# Small outputs between two looks at the clock: whoever makes only those now may have made large ones before.
_PAUSE = 512
_POINTS = {torch.float32: 4, torch.float16: 2, torch.bfloat16: 2}


class _State:
    """What is idle, and the lock for it, which nobody waits for: an output that cannot have it is made anew.

    So neither a signal handler nor a finalizer that runs while it is held can stop a thread.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        # by size, each with the time at which it came back; the one that came last is used first
        self.idle: dict[int, list[tuple[float, Tensor]]] = {}
        self.small = 0


_state = _State()
# What came back since; finalizers run wherever Python drops an object and take no lock.
_returned: deque[Tensor] = deque()


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return an uninitialised dense tensor of `shape`, in the dtype and on the device of `like`.

    Large ones on the CPU come from the pool. Their storage cannot be resized.
    """
    size = _POINTS.get(like.dtype, 0)
    for extent in shape:
        size *= extent
    if size < SMALLEST or not like.is_cpu:
        _state.small += 1
        if _state.small > _PAUSE:
            _look()
        return like.new_empty(tuple(shape))
    rounded = -(-size // _GRAIN) * _GRAIN
    block = _take(rounded)
    view = (ctypes.c_char * rounded).from_address(block.data_ptr())
    weakref.finalize(view, _returned.append, block).atexit = False
    return torch.frombuffer(view, dtype=like.dtype, count=size // like.element_size()).view(tuple(shape))


def for_images(count: int, shape: Sequence[int], strides: Sequence[int], like: Tensor) -> Tensor:
    """Return an uninitialised tensor [count, *shape] of images one behind the other, in each of which elements are `strides` apart.

    Args:
        count: of images.
        shape: of one.
        strides: of one that is dense in some order of its dimensions.
        like: see `empty`.
    """
    size = math.prod(shape)
    memory = empty((count * size,), like)
    # no view, which a caller could not write into where gradients are on
    return like.new_empty(0).set_(
        memory.untyped_storage(), memory.storage_offset(), (count, *shape), (size, *strides)
    )


def idle_bytes() -> int:
    """Return how many bytes are held for outputs to come."""
    _look()
    return sum(size * len(blocks) for size, blocks in list(_state.idle.items()))


def clear() -> None:
    """Give back to the system what no output holds."""
    if _state.lock.acquire(blocking=False):
        try:
            _returned.clear()
            _state.idle.clear()
        finally:
            _state.lock.release()


def _look() -> None:
    """Drop what was of no use for long."""
    _state.small = 0
    if _state.lock.acquire(blocking=False):
        try:
            _put_back()
        finally:
            _state.lock.release()


def _take(size: int) -> Tensor:
    if _state.lock.acquire(blocking=False):
        try:
            _put_back()
            blocks = _state.idle.get(size)
            if blocks:
                return blocks.pop()[1]
        finally:
            _state.lock.release()
    # outside of inference mode, whose tensors no one else may write
    with torch.inference_mode(False):
        return torch.empty(size, dtype=torch.uint8)


def _put_back() -> None:
    idle, now = _state.idle, time.monotonic()
    while _returned:
        block = _returned.popleft()
        idle.setdefault(block.numel(), []).append((now, block))
    for size, blocks in list(idle.items()):
        while blocks and blocks[0][0] < now - _SECONDS:
            blocks.pop(0)
        if not blocks:
            del idle[size]
    held = sum(size * len(blocks) for size, blocks in idle.items())
    while held > LIMIT:
        size = min(idle, key=lambda size: idle[size][0][0])
        idle[size].pop(0)
        held -= size
        if not idle[size]:
            del idle[size]


def _start_anew() -> None:
    """Forget what a forked process cannot know to be whole: another thread may have held the lock."""
    global _state
    _state = _State()


os.register_at_fork(after_in_child=_start_anew)
