"""Running a model without leaving a trace in it.

A forward may write into whatever its module holds: weights that it rescales, buffers, counters, caches, random generators.
Weights are not copied beforehand: an operation that is about to write is seen, and what it would overwrite is saved first.
"""

import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mono_quant.convert.snapshot import Snapshot, has_memory, place
from mono_quant.planning.walk import tensor_names


@contextmanager
def untouched(*things: Any, written: set[str] | None = None) -> Iterator[None]:
    """Put everything that the things hold, and the random states, back after the block, also when it fails.

    Args:
        things: a model, and what else the block uses: inputs, a tokenizer.
        written: gets the names of the parameters and saved buffers of the first thing, a model, that the block wrote into,
            moved or replaced.
    """
    model = things[0] if written is not None else nn.Module()
    before = {name: tensor for name, tensor, _ in tensor_names(model)}
    snapshot = Snapshot(*things)
    guard = _WriteGuard(snapshot.tensors)
    with _random_states(snapshot.tensors), _uncompiled():
        try:
            with guard:
                yield
        finally:
            if written is not None:
                after = {name: tensor for name, tensor, _ in tensor_names(model)}
                written |= {n for n, t in before.items() if after.get(n) is not t or guard.changed(t)}
            snapshot.restore()
            guard.restore()


class WriteWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees, for the block, every operation that is about to write into a tensor.

    Writes that torch does not carry out (through numpy, by foreign code) are not seen.

    Args:
        told: gets each tensor before it is written into.
    """

    supports_higher_order_operators = True

    def __init__(self, told: Callable[[Tensor], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._told = told

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        for target in _targets(func, args, named):
            self._told(target)
        return func(*args, **named)


class _WriteGuard(WriteWatch):  # type: ignore[no-untyped-call]
    """Saves what operations are about to overwrite of some tensors."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__(self._save)
        self._memory = {id(tensor): tensor.detach() for tensor in tensors}
        self._by_storage: dict[int, list[int]] = defaultdict(list)
        for key, memory in self._memory.items():
            if memory.untyped_storage().data_ptr():
                self._by_storage[memory.untyped_storage().data_ptr()].append(key)
        self._saved: dict[int, tuple[Tensor, Tensor]] = {}

    def changed(self, tensor: Tensor) -> bool:
        """Tell whether a tensor was written into or has other memory now."""
        if id(tensor) not in self._memory:
            return False
        return id(tensor) in self._saved or place(tensor) != place(self._memory[id(tensor)])

    def restore(self) -> None:
        """Write back what was overwritten."""
        for region, values in self._saved.values():
            region.copy_(values)

    def _save(self, target: Tensor) -> None:
        start, stop = _range(target)
        for key in self._by_storage.get(target.untyped_storage().data_ptr(), ()):
            first, last = _range(self._memory[key])
            if key not in self._saved and first < stop and start < last:
                region = _bytes(self._memory[key])
                self._saved[key] = region, region.clone()


def _targets(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """Yield the tensors that an operation is about to write into."""
    written, running, flag = _roles(func)

    def values(roles: Iterable[tuple[int, str]]) -> Iterator[Any]:
        for position, name in roles:
            yield args[position] if position < len(args) else kwargs.get(name)

    found = list(values(written))
    if any(values(flag)):
        found += values(running)
    for value in found:
        several = value if isinstance(value, (list, tuple)) else [value]
        yield from (t for t in several if isinstance(t, Tensor) and has_memory(t))


@cache
def _roles(func: Any) -> tuple[list[tuple[int, str]], ...]:
    """Return the arguments (position, name) that an operation writes into, those that batch norms write into without
    saying so in their schema, and the flag with which they do.
    """
    schema = getattr(func, "_schema", None)
    arguments = (
        [(i, a.name, a.alias_info) for i, a in enumerate(schema.arguments)] if schema is not None else []
    )
    written = [(i, name) for i, name, alias in arguments if alias is not None and alias.is_write]
    running = [
        (i, name) for i, name, alias in arguments if name in ("running_mean", "running_var") and alias is None
    ]
    flag = [(i, name) for i, name, _ in arguments if name == "training" and running]
    return written, running, flag


def _range(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses of the first byte of a tensor and behind its last."""
    start = tensor.data_ptr()
    if not tensor.numel():
        return start, start
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def _bytes(tensor: Tensor) -> Tensor:
    """Return the memory of a tensor as uint8, whatever its strides."""
    start, stop = _range(tensor)
    offset = tensor.storage_offset() * tensor.element_size()
    plain = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return plain.set_(tensor.untyped_storage(), offset, (stop - start,), (1,))


def _uncompiled() -> AbstractContextManager[object]:
    """Run compiled parts as they were written: what a compiler made of them writes unseen."""
    # where the compiler was not imported, which takes seconds, nothing is compiled
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]


@contextmanager
def _random_states(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Keep the global generators of Python, NumPy and torch, on every device that the tensors are on."""
    numpy = sys.modules.get("numpy")
    states = random.getstate(), None if numpy is None else numpy.random.get_state()
    devices = {t.device for t in tensors} - {torch.device("cpu"), torch.device("meta")}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind in {d.type for d in devices}:
            stack.enter_context(
                torch.random.fork_rng([d for d in devices if d.type == kind], device_type=kind)
            )
        try:
            yield
        finally:
            random.setstate(states[0])
            if numpy is not None:
                numpy.random.set_state(states[1])
