"""Running a model whose weights stay in their files: each is read when it is used, and let go when another module needs memory.

What makes that exact is that a forward gets plain parameters with the values and the form that they would have in memory. A
module reads them when somebody asks it for one by its name, in its own forward or in another's; whoever goes through all
parameters meets stand-ins (`elsewhere`), which say what there is to know, and are read when they are computed with.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mono_quant.convert.elsewhere import Elsewhere
from mono_quant.convert.probes import ProbeError
from mono_quant.convert.snapshot import Snapshot, place
from mono_quant.convert.stored import StoredModule
from mono_quant.convert.surgery import relink_
from mono_quant.convert.untouched import WriteWatch

# Rows that are compared at once.
_COMPARED = 1024


class Tensors(Protocol):
    """The tensors of a model by name, read anew each time that they are asked for."""

    def __contains__(self, name: object, /) -> bool:
        """Tell whether there is such a tensor."""

    def __getitem__(self, name: str, /) -> Tensor:
        """Read one."""

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Read a part of one along its first dimension."""

    def is_cheap_in_parts(self, name: str) -> bool:
        """Tell whether `part` reads no more than it returns."""

    def is_same(self, a: str, b: str) -> bool:
        """Tell whether two names mean the same values, as far as that is known without reading them."""


class Reads:
    """What was read, and what of it is in memory.

    Attributes:
        held: bytes that are in memory now.
        peak: the most that `held` was.
        count: of what was read.
    """

    def __init__(self) -> None:
        self.held = self.peak = self.count = 0
        self._live: dict[int, Callable[[torch.UntypedStorage], None]] = {}

    def note(self, value: Tensor, write: Callable[[torch.UntypedStorage], None]) -> None:
        """Take notice of a tensor that was read.

        Args:
            value: with memory of its own.
            write: is called before something is written into it.
        """
        storage = value.untyped_storage()
        size, address = storage.nbytes(), storage.data_ptr()
        self.count += 1
        if size and address not in self._live:
            self.held += size
            self.peak = max(self.peak, self.held)
            self._live[address] = write
            weakref.finalize(storage, self._gone, address, size).atexit = False

    def writes(self, target: Tensor) -> None:
        """Take notice that a tensor is about to be written into."""
        storage = target.untyped_storage()
        write = self._live.get(storage.data_ptr())
        if write is not None:
            write(storage)

    def _gone(self, address: int, size: int) -> None:
        del self._live[address]
        self.held -= size


@contextmanager
def offloaded(model: nn.Module, tensors: Tensors) -> Iterator[Reads]:
    """Let a model run for the block whose parameters and saved buffers are on meta; it is as it was afterwards.

    The parameters of one module are kept, beside those that are in use; of stacks of matrices and of tables, no more than the parts
    that are asked for. A parameter that the forward writes into stays in memory, with what was written, until `untouched` puts
    everything back. Buffers are small, and in memory from the start.

    Args:
        model: every tensor in the dtype, and with the strides, that it is to have. Buffers that are not saved have values.
        tensors: by name in the model.

    Raises:
        ProbeError: something is neither in memory nor among the tensors, or the forward did what cannot be followed.
    """
    before, reads = Snapshot(model), Reads()
    desk = _Desk()
    try:
        _stand_in_(model, tensors, reads, desk)
        with WriteWatch(reads.writes):
            yield reads
        desk.turn_to(None)
    finally:
        before.restore()


def _stand_in_(model: nn.Module, tensors: Tensors, reads: Reads, desk: "_Desk") -> None:
    loans: dict[str, _Loan] = {}
    renewed: dict[Any, Any] = {}
    for names, tensor in _on_meta(model):
        stored = [name for name in names if name in tensors]
        if not stored:
            raise ProbeError(
                f"{names[0]} is not in the checkpoint, and is not known without loading the model"
            )
        if not isinstance(tensor, nn.Parameter):
            renewed[tensor] = tensors[stored[0]].to(tensor.dtype)
            continue
        for name in names:
            # what a class ties is tied where the checkpoint has it once, or twice the same
            own = (
                name if name in tensors and not _is_one(tensors, stored[0], name, tensor.shape) else stored[0]
            )
            loans[name] = loans[own] if own in loans else _Loan(own, tensor, tensors, reads, desk)
        renewed[tensor] = loans[names[0]].stand
    relink_(model, renewed)
    for path, module in model.named_modules(remove_duplicate=False):
        named = {own: loans.get(f"{path}.{own}".lstrip(".")) for own in module._parameters}
        mine = {own: loan for own, loan in named.items() if loan is not None}
        if mine and not isinstance(module._parameters, _Shelf):
            _shelve_(module, mine)


def _on_meta(model: nn.Module) -> Iterator[tuple[list[str], Tensor]]:
    """Yield every tensor that has no memory, with all its names."""
    found: dict[int, tuple[list[str], Tensor]] = {}
    named = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    for name, tensor in named:
        if tensor.is_meta:
            found.setdefault(id(tensor), ([], tensor))[0].append(name)
    yield from found.values()


def _is_one(tensors: Tensors, a: str, b: str, shape: torch.Size) -> bool:
    """Tell whether two names have the same values."""
    if a == b or tensors.is_same(a, b):
        return True
    if not shape:
        return torch.equal(tensors[a], tensors[b])
    rows = shape[0]
    ends = ((start, min(rows, start + _COMPARED)) for start in range(0, rows, _COMPARED))
    return all(torch.equal(tensors.part(a, *end), tensors.part(b, *end)) for end in ends)


class _Shelf(dict[str, Any]):
    """The parameters of a module, of which one that is asked for by its name is read.

    Attributes:
        read: returns what the module gets for a stand-in.
    """

    read: Callable[[Elsewhere], Tensor]

    def __getitem__(self, name: str) -> Any:
        held = super().__getitem__(name)
        return self.read(held) if isinstance(held, Elsewhere) else held

    def get(self, name: str, default: Any = None) -> Any:
        """Return what `[name]` does, where there is such a parameter."""
        held = super().get(name, default)
        return self.read(held) if isinstance(held, Elsewhere) else held


def _shelve_(module: nn.Module, loans: Mapping[str, "_Loan"]) -> None:
    """Let a module have its parameters read."""
    shelf, by_stand = _Shelf(module._parameters), {id(loan.stand): loan for loan in loans.values()}
    for name, loan in loans.items():
        dict.__setitem__(shelf, name, loan.stand)
        loan.homes.append((shelf, name))
    owner, is_table = id(module), isinstance(module, nn.Embedding) and not isinstance(module, StoredModule)

    def read(stand: Elsewhere) -> Tensor:
        # a part of these may be all that is needed
        if stand.rows is not None and (stand.dim() > 2 or is_table):
            return stand
        return by_stand[id(stand)].borrow(owner)

    # a function: what puts models back does not look through one
    shelf.read = read
    module.__dict__["_parameters"] = shelf


class _Desk:
    """What the module that asked last has read, so that asking again costs nothing."""

    def __init__(self) -> None:
        self._owner: int | None = None
        self._kept: dict[int, tuple[nn.Parameter, tuple[Any, ...], str]] = {}

    def turn_to(self, owner: int | None) -> None:
        """Let go what another module had.

        Raises:
            ProbeError: it gave one of its parameters other memory.
        """
        if owner != self._owner or owner is None:
            for parameter, before, name in self._kept.values():
                if place(parameter) != before:
                    raise ProbeError(f"the forward replaces {name}, which is not in memory")
            self._kept.clear()
            self._owner = owner

    def keep(self, parameter: nn.Parameter, name: str) -> None:
        """Keep what the module at work has read."""
        self._kept.setdefault(id(parameter), (parameter, place(parameter), name))


class _Loan:
    """One parameter of a model that is read when somebody asks for it.

    Attributes:
        stand: for it.
        homes: the shelves that it is on, and its names there.
    """

    def __init__(self, name: str, like: Tensor, tensors: Tensors, reads: Reads, desk: _Desk) -> None:
        self._name, self._tensors, self._reads, self._desk = name, tensors, reads, desk
        self._alive: weakref.ref[nn.Parameter] | None = None
        self.homes: list[tuple[_Shelf, str]] = []
        in_parts = like.dim() > 1 and like.is_contiguous() and tensors.is_cheap_in_parts(name)
        rows = self._part if in_parts else None
        self.stand = Elsewhere.like(like, self._parameter, rows)

    def borrow(self, owner: int) -> nn.Parameter:
        """Return the parameter to a module, for as long as that is at work."""
        self._desk.turn_to(owner)
        parameter = self._parameter()
        self._desk.keep(parameter, self._name)
        return parameter

    def _parameter(self) -> nn.Parameter:
        written = self._written()
        if written is not None:
            return written
        parameter = None if self._alive is None else self._alive()
        return self._known(self._read()) if parameter is None else parameter

    def _part(self, start: int, stop: int) -> Tensor:
        written = self._written()
        if written is not None:
            return written.detach()[start:stop]
        value = self._tensors.part(self._name, start, stop).to(self.stand.dtype)
        self._reads.note(value, self._refuse)
        return value

    def _written(self) -> nn.Parameter | None:
        """Return the parameter where the forward wrote into it, so that it is in memory."""
        for shelf, name in self.homes:
            held = dict.__getitem__(shelf, name)
            if not isinstance(held, Elsewhere):
                return held  # type: ignore[no-any-return]
        return None

    def _read(self) -> Tensor:
        value, stand = self._tensors[self._name].to(self.stand.dtype), self.stand
        if value.shape != stand.shape:
            raise ProbeError(
                f"{self._name} is {tuple(value.shape)} in its file and {tuple(stand.shape)} in the model"
            )
        if not stand.is_contiguous() and value.stride() != stand.stride():
            value = torch.empty_strided(stand.shape, stand.stride(), dtype=stand.dtype).copy_(value)
        form = value.dtype, value.storage_offset(), value.shape, value.stride()
        self._reads.note(value, lambda storage: self._pin(storage, form))
        return value

    def _known(self, value: Tensor) -> nn.Parameter:
        parameter = nn.Parameter(value, requires_grad=self.stand.requires_grad)
        vars(parameter).update({k: v for k, v in vars(self.stand).items() if k not in ("whole", "rows")})
        self._alive = weakref.ref(parameter)
        return parameter

    def _pin(self, storage: torch.UntypedStorage, form: tuple[Any, ...]) -> None:
        """Keep the parameter in memory: something is about to be written into it."""
        alive = None if self._alive is None else self._alive()
        dtype, *rest = form
        parameter = self._known(torch.empty(0, dtype=dtype).set_(storage, *rest)) if alive is None else alive
        for shelf, name in self.homes:
            dict.__setitem__(shelf, name, parameter)

    def _refuse(self, storage: torch.UntypedStorage) -> None:
        raise ProbeError(f"the forward writes into a part of {self._name}, which is not in memory")
