"""Calls that a graph makes again and again, written down once: all of them are one call of the library then.

A program holds the records of its steps as `csrc/program.h` reads them. Sizes and strides stand in them, and no address: the
places of all memory are counted from bases, which are the inputs of this run, the packed weights as `packs` knows them now, the
outputs that are given away, and one piece of memory for what lies between, where steps that do not need each other's results
take turns. So a program keeps no tensor of a model alive, notices what every call would notice, and can run in any number of
threads at once.
"""

import math
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mono_quant.kernels import packs, pool
from mono_quant.kernels.choice import active
from mono_quant.kernels.cpu import Cpu, Packed

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64)
_LIKE = {dtype: torch.empty(0, dtype=dtype, device="cpu") for dtype in _DTYPES}
# What the library returns for an index that is out of range.
_BAD_INDEX = 3
_ALIGNMENT = 64
_NO_MEMORY = "there is no memory for what lies between products; use a smaller batch"


class Place(NamedTuple):
    """A word of a record that holds an address: `offset` bytes behind the beginning of a home.

    Homes count the inputs from 0, and what steps make from -1 down; a packed weight has the home None, and its number for the
    offset.
    """

    word: int
    home: int | None
    offset: int


class Step(NamedTuple):
    """One call: its number in the library, its record, and the words in it that depend on the run."""

    kind: int
    record: bytes
    places: tuple[Place, ...]


class Given(NamedTuple):
    """An output: a view of a home, or the input itself where there is no shape. Strides and offset count elements."""

    home: int
    shape: tuple[int, ...] | None = None
    stride: tuple[int, ...] = ()
    offset: int = 0


class Made(NamedTuple):
    """Memory that a step fills: bytes, and the dtype of what it holds."""

    size: int
    dtype: torch.dtype

    def empty(self, shape: tuple[int, ...] | None) -> Tensor:
        """Return a tensor for it: of a shape, or of one dimension."""
        like = _LIKE[self.dtype]
        return pool.empty((self.size // like.element_size(),) if shape is None else shape, like)


class Weight(NamedTuple):
    """A weight that is packed, or might be: the input that holds it, where in that, and its size."""

    home: int
    offset: int
    rows: int
    depth: int
    is_packed: bool


@dataclass(frozen=True)
class Conditions:
    """What has to be as it was when a program was written.

    Attributes:
        cpu: the path that ran.
        wanted: what "auto" meant, see `choice`.
        threads: of torch.
    """

    cpu: Cpu
    wanted: str
    threads: int

    @classmethod
    def now(cls, cpu: Cpu) -> "Conditions":
        return cls(cpu, active.wanted, torch.get_num_threads())

    def hold(self) -> bool:
        """Say whether it is all as it was."""
        return (
            active.cpu is self.cpu
            and active.wanted == self.wanted
            and torch.get_num_threads() == self.threads
        )


class Program:
    """Steps that run again with other inputs of the same shapes."""

    def __init__(
        self,
        conditions: Conditions,
        steps: Sequence[Step],
        made: Sequence[Made],
        outputs: Sequence[Given],
        weights: Sequence[Weight],
        written: Sequence[int],
        inputs: int,
        held: Sequence[Tensor],
    ) -> None:
        """Lay the memory out and write the records down.

        Args:
            conditions: under which `steps` were recorded.
            steps: in order.
            made: what the steps make, home -1 first.
            outputs: views of homes that are given away.
            weights: by their numbers.
            written: indices of inputs that steps write into.
            inputs: how many there are.
            held: constant tensors that records point to.
        """
        self._conditions, self._outputs, self._written = conditions, tuple(outputs), tuple(written)
        self._weights, self._held = tuple(weights), tuple(held)
        given = sorted({output.home for output in outputs if output.home < 0}, reverse=True)
        self._homes = {home: i for i, home in enumerate(given)}
        self._fresh = [(made[-1 - home], _only_output(home, made[-1 - home], outputs)) for home in given]
        arena, self._arena = _laid_out(steps, made, self._homes)
        # inputs, outputs that are made here, packed weights, the memory between steps
        first_weight = inputs + len(given)
        last = first_weight + len(weights)
        self._bases = struct.Struct(f"={last + 1}q")
        words: list[int] = []
        for kind, record, places in steps:
            words += (kind, len(record) // 8, len(places))
            for word, home, offset in places:
                if home is None:
                    words += (word, first_weight + offset, 0)
                elif home >= 0:
                    words += (word, home, offset)
                elif home in self._homes:
                    words += (word, inputs + self._homes[home], offset)
                else:
                    words += (word, last, arena[home] + offset)
            words += struct.unpack(f"={len(record) // 8}q", record)
        self._words = struct.pack(f"={len(words)}q", *words)
        self._steps, self._longest = len(steps), max(len(step.record) // 8 for step in steps)

    def run(
        self, inputs: Sequence[Tensor], places: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, ...] | None:
        """Run all steps; return None, and do nothing, where something is not as it was.

        Args:
            inputs: of the dtypes, shapes and strides with which the program was recorded, on CPU.
            places: memory for outputs, in their dtypes; one that is all that a step makes, and would lie like its place, is
                written there and given back as that place.

        Raises:
            IndexError: a row to be written is out of range.
            MemoryError: there was not enough; inputs may be written to already.
        """
        cpu = self._conditions.cpu
        if not self._conditions.hold():
            return None
        pointers = [tensor.data_ptr() for tensor in inputs]
        packed = self._packed(cpu, inputs, pointers)
        if packed is None:
            return None
        fresh = [self._memory(made, only, places) for made, only in self._fresh]
        arena = pool.empty((self._arena // 4,), _LIKE[torch.float32])
        words = [0 if one is None else one.words.data_ptr() for one in packed]
        bases = self._bases.pack(*pointers, *[one.data_ptr() for one in fresh], *words, arena.data_ptr())
        failed = cpu.run(self._words, self._steps, bases, self._longest)
        if self._written:
            torch.autograd.graph.increment_version([inputs[i] for i in self._written])
        if failed == _BAD_INDEX:
            raise IndexError("index_copy_(): an index is out of bounds")
        if failed:
            raise MemoryError(_NO_MEMORY)
        return tuple([self._output(output, inputs, fresh) for output in self._outputs])

    def run_apart(
        self, inputs: Sequence[Tensor], cut: Collection[int], count: int, size: int
    ) -> tuple[tuple[Tensor, ...], int] | None:
        """Run all steps once for each part of a batch, every part by one thread.

        Args:
            inputs: those with which the program was recorded, but for those of `cut`, which hold all images.
            cut: numbers of inputs.
            count: of images.
            size: of a part, as the program was recorded.

        Returns:
            Outputs with room for all images, and how many are there: as many as keep all threads busy, the first ones. None, and
            nothing is done, where something is not as it was, or outputs are not what steps make.

        Raises:
            MemoryError: there was not enough.
        """
        cpu, threads = self._conditions.cpu, self._conditions.threads
        parts = count // size // threads * threads
        if (
            parts == 0
            or not self._conditions.hold()
            or self._written
            or any(home >= 0 for home, *_ in self._outputs)
        ):
            return None
        pointers = [tensor.data_ptr() for tensor in inputs]
        packed = self._packed(cpu, inputs, pointers)
        fresh = [self._images(made, only, count) for made, only in self._fresh]
        if packed is None or len(fresh) < len(self._outputs) or any(one is None for one in fresh):
            return None
        outputs = [one for one in fresh if one is not None]
        arena = pool.empty((threads * self._arena // 4,), _LIKE[torch.float32])
        words = [0 if one is None else one.words.data_ptr() for one in packed]
        steps = [size * x.stride(0) * x.element_size() if i in cut else 0 for i, x in enumerate(inputs)]
        places = [(one.data_ptr(), size * one.stride(0) * one.element_size()) for one in outputs]
        rows = [
            self._bases.pack(
                *[pointer + part * step for pointer, step in zip(pointers, steps, strict=True)],
                *[start + part * step for start, step in places], *words, arena.data_ptr(),
            )
            for part in range(parts)
        ]  # fmt: skip
        width = self._bases.size // 8
        if cpu.run_apart(
            self._words, self._steps, b"".join(rows), parts, width, self._arena, self._longest, threads
        ):
            raise MemoryError(_NO_MEMORY)
        by_home = {home: outputs[at] for home, at in self._homes.items()}
        return tuple([by_home[output.home] for output in self._outputs]), parts * size

    def _images(self, made: Made, only: int | None, count: int) -> Tensor | None:
        """Return memory for an output of `count` images; None where it is not all that a step makes."""
        if only is None:
            return None
        _, shape, stride, _ = self._outputs[only]
        image = math.prod((shape or ())[1:])
        if not shape or (shape[0] > 1 and stride[0] != image):
            return None
        return pool.for_images(count, shape[1:], stride[1:], _LIKE[made.dtype])

    def _packed(
        self, cpu: Cpu, inputs: Sequence[Tensor], pointers: Sequence[int]
    ) -> list[Packed | None] | None:
        """Return the packed weights as they are now; None where they are packed in another way than they were."""
        found: list[Packed | None] = []
        try:
            for home, offset, rows, depth, is_packed in self._weights:
                packed = packs.settled(cpu.path, inputs[home], (pointers[home] + offset, rows, depth))
                if (packed is not None) is not is_packed:
                    return None
                found.append(packed)
        except LookupError:
            return None
        return found

    def _memory(self, made: Made, only: int | None, places: Sequence[Tensor] | None) -> Tensor:
        """Return where outputs go: the place of the only one that is all of it, if that fits, or fresh memory."""
        if only is None:
            return made.empty(None)
        _, shape, stride, _ = self._outputs[only]
        if places is not None and places[only].shape == shape and places[only].stride() == stride:
            return places[only]
        return made.empty(shape if _is_dense(shape or (), stride) else None)

    def _output(self, output: Given, inputs: Sequence[Tensor], fresh: Sequence[Tensor]) -> Tensor:
        home, shape, stride, offset = output
        if home >= 0:
            source = inputs[home]
            return (
                source
                if shape is None
                else source.as_strided(shape, stride, source.storage_offset() + offset)
            )
        memory = fresh[self._homes[home]]
        is_all = memory.shape == shape and memory.stride() == stride
        return memory if is_all else memory.as_strided(shape or (), stride, offset)


def _only_output(home: int, made: Made, outputs: Sequence[Given]) -> int | None:
    """Return the number of the output that reaches over all of a home, if that is the only one."""
    first, *others = [i for i, output in enumerate(outputs) if output.home == home]
    _, shape, stride, _ = outputs[first]
    reach = 1 + sum((size - 1) * step for size, step in zip(shape or (), stride, strict=True))
    return None if others or reach * _LIKE[made.dtype].element_size() != made.size else first


def _is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Say whether these are the strides of a contiguous tensor, in dimensions of size one as well."""
    return stride == tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _laid_out(
    steps: Sequence[Step], made: Sequence[Made], given: Collection[int]
) -> tuple[dict[int, int], int]:
    """Return where in one piece of memory things lie that are needed between steps, and its size."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for i, step in enumerate(steps):
        for place in step.places:
            home = place.home
            if home is not None and home < 0 and home not in given:
                first.setdefault(home, i)
                last[home] = i
    offsets: dict[int, int] = {}
    total = 0
    for home, begin in first.items():
        size = -(-made[-1 - home].size // _ALIGNMENT) * _ALIGNMENT
        # those that are there at the same time, by their place
        others = sorted((offsets[o], made[-1 - o].size) for o in offsets if last[o] >= begin)
        at = 0
        for start, length in others:
            if at + size <= start:
                break
            at = max(at, -(-(start + length) // _ALIGNMENT) * _ALIGNMENT)
        offsets[home] = at
        total = max(total, at + size)
    # one value at least: an address has to be there
    return offsets, max(total, 4)
