"""Weights once more in the order in which kernels read them, kept from the second use on.

Interleaving a weight costs as much as a product with a few tokens, so it pays to keep it; it takes as much memory as the
weight again, so it is bounded. An entry belongs to the memory of one weight: it is found by the storage object itself, never
by an address alone, and is dropped when that memory is given back, written to (the tensor's version), replaced (`.data =`),
or moved, to shared memory or another device. Packed words never change once they are there.

What versions cannot show is a write through something that shares the memory but not the version: `weight.data.copy_(...)`, a
numpy view, another process. Therefore a few codes are compared at each use, which notices a weight that was replaced as a whole,
but not every change of single values: call `forget()` after such a write, or write under `torch.no_grad()` without `.data`.
"""

import os
import threading
import weakref
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from mono_quant.io.memory import free_bytes, let_go
from mono_quant.kernels.activations import ActivationScheme
from mono_quant.kernels.cpu import Cpu, Packed, Samples

# The address, rows and columns of a weight.
Key: TypeAlias = tuple[int, int, int]


class _Entry:
    """What is known of one weight.

    Attributes:
        storage: the memory of the codes, as long as it is there.
        version: of the tensor when it was used first.
        packed: by path; None where a path reads the weight as it is, or there was no room.
    """

    __slots__ = ("_samples", "_seen", "packed", "storage", "version")

    def __init__(self, storage: "weakref.ref[torch.UntypedStorage]", version: int, samples: Samples) -> None:
        self.storage, self.version = storage, version
        self.packed: dict[str, Packed | None] = {}
        self._samples, self._seen = samples, samples.read()

    def unchanged(self) -> bool:
        """Say whether some codes are what they were; the storage has to be alive."""
        return self._samples.read() == self._seen


# Single operations on a dict are atomic: a thread finds an entry or does without.
_entries: dict[Key, _Entry] = {}
_packing = threading.Lock()
_MISSING = Packed(torch.empty(0, dtype=torch.int32), "", False)


class _Budget:
    """How many bytes packed weights may take: a quarter of the memory that is free when this is first asked."""

    def __init__(self) -> None:
        self._bytes: int | None = None

    def __call__(self) -> int:
        if self._bytes is None:
            self._bytes = 0 if os.environ.get("MONO_QUANT_PACK") == "0" else free_bytes() // 4
        return self._bytes


_budget = _Budget()


def find(cpu: Cpu, weight: Tensor, key: Key, scheme: ActivationScheme) -> Packed | None:
    """Return the packed form of a weight, or None where there is none (yet).

    Args:
        cpu: the path that reads it.
        weight: int8 [N, K], dense, on CPU.
        key: its address, N and K, which the caller knows.
        scheme: what becomes of the activations; one for which packing `pays`.

    Returns:
        What `cpu.pack` made; hold it as long as a kernel reads it.
    """
    entry = _entry(weight, key)
    if entry is None:
        _remember(key, weight.untyped_storage(), weight)
        return None
    packed = entry.packed.get(cpu.path, _MISSING)
    return _pack(cpu, weight, scheme, entry) if packed is _MISSING else packed


def settled(path: str, weight: Tensor, key: Key) -> Packed | None:
    """Return what `find` would return, where it has nothing to do for that.

    Args:
        path: the name of the instruction set.
        weight: any view of the memory of the codes.
        key: see `find`.

    Raises:
        LookupError: the weight is not known, was written to, or would be packed now.
    """
    entry = _entry(weight, key)
    if entry is None:
        if _is_remembered(weight):
            raise LookupError(path)
        return None
    return entry.packed[path]


def _entry(weight: Tensor, key: Key) -> _Entry | None:
    """Return what is known of a weight, if that is still true."""
    entry = _entries.get(key)
    if (
        entry is None
        or entry.storage() is not weight.untyped_storage()
        or entry.version != weight._version
        or not entry.unchanged()
    ):
        return None
    return entry


def pays(cpu: Cpu, scheme: ActivationScheme) -> bool:
    """Say whether weights are worth packing for codes of a scheme."""
    # as pairs of 16 bits they take twice their memory, and bring many tokens a twentieth of the time and few ones none
    return not cpu.is_wide(scheme.qmax)


def bytes_held() -> int:
    """Return how many bytes packed weights take now."""
    held = [packed for entry in list(_entries.values()) for packed in list(entry.packed.values())]
    return sum(packed.words.nbytes for packed in held if packed is not None)


def forget() -> None:
    """Give all packed weights back; those that are used again are packed anew."""
    _entries.clear()


def _remember(key: Key, storage: torch.UntypedStorage, weight: Tensor) -> None:
    if _is_remembered(weight):
        # the callback runs wherever the last tensor goes away, so it takes no lock
        _entries[key] = _Entry(
            weakref.ref(storage, partial(_drop, key)), weight._version, Samples(key[0], weight.nbytes)
        )


def _is_remembered(weight: Tensor) -> bool:
    # an inference tensor has no version: a change could not be seen
    return _budget() > 0 and not weight.is_inference()


def _drop(key: Key, storage: "weakref.ref[torch.UntypedStorage]") -> None:
    entry = _entries.get(key)
    if entry is not None and entry.storage is storage:
        _entries.pop(key, None)


def _pack(cpu: Cpu, weight: Tensor, scheme: ActivationScheme, entry: _Entry) -> Packed | None:
    # a thread that would have to wait is faster without
    if not _packing.acquire(blocking=False):
        return None
    try:
        _drop_moved()
        if cpu.path in entry.packed:
            return entry.packed[cpu.path]
        # rows and columns are padded besides
        has_room = bytes_held() + weight.nbytes <= _budget()
        packed = cpu.pack(weight, scheme) if has_room else None
        # written to meanwhile
        if weight._version != entry.version:
            return None
        entry.packed[cpu.path] = packed
        # from now on kernels read the packed ones; what torch can resize is memory of its own, and no file's
        if packed is not None and not weight.untyped_storage().resizable():
            let_go([(weight.data_ptr(), weight.nbytes)])
        return packed
    finally:
        _packing.release()


def _drop_moved() -> None:
    """Drop the entries whose storage has its memory elsewhere now, as after `share_memory_`."""
    for key, entry in list(_entries.items()):
        storage = entry.storage()
        if storage is None or not 0 <= key[0] - storage.data_ptr() < max(1, storage.nbytes()):
            _entries.pop(key, None)


def _start_anew() -> None:
    """Let a forked process pack although another thread was at it."""
    global _packing
    _packing = threading.Lock()


os.register_at_fork(after_in_child=_start_anew)
