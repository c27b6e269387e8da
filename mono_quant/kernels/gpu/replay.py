"""Calls written down: what a function launches for tensors of some kind is launched again for the next ones of that kind.

A call of a layer is two or three launches, and the Python that finds out which costs several times what they do. What it finds
depends on shapes, strides, dtypes, devices and alignments alone. So it is written down at the second call of a kind: the compiled
kernels, their grids, and which of their arguments are addresses of what. From then on a call allocates, fills in addresses and
starts. A script holds no memory and no address: inputs are those of the call, scratch and results come from torch's allocator.

Written down is what launches kernels and does nothing else: a dispatch mode looks on, and a function that calls operations of torch
(a copy of what is not contiguous) is left as it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.tools.tensor_descriptor import TensorDescriptor

from mono_quant.kernels.gpu.features import INTERPRETED
from mono_quant.kernels.gpu.launch import Started, current_stream, is_observed, launch, on_device, started_by

# Kinds that are remembered; then all are forgotten, as those of sequences of ever other lengths.
_MOST = 4096
# Where parts of the scratch memory begin, in bytes, as torch's allocator begins them.
_STEP = 512
_ATEN = torch.ops.aten
_MAKING = frozenset({
    _ATEN.empty.memory_format,
    _ATEN.empty_like.default,
    _ATEN.empty_strided.default,
    _ATEN.new_empty.default,
    _ATEN.new_empty_strided.default,
})
Results = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class _Place:
    """An argument that is an address.

    Attributes:
        at: its position among the arguments.
        base: what it counts from: the number of an input, of the scratch memory behind them, or of a result behind that.
        offset: bytes behind the beginning of the base.
        form: dtype, shape and strides of the tensor.
        tiles: the attributes of a descriptor of that tensor, or None.
    """

    at: int
    base: int
    offset: int
    form: tuple[torch.dtype, torch.Size, tuple[int, ...]]
    tiles: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class _Step:
    """A launch: the arguments are those that are no addresses, and None in the place of these."""

    started: Started
    args: tuple[Any, ...]
    places: tuple[_Place, ...]


@dataclass(frozen=True, slots=True)
class _Script:
    """What a call does. Its bases are the inputs, the scratch memory, and the results.

    Attributes:
        scratch: bytes.
        results: shape, strides and dtype of each.
        steps: launches, in their order.
        is_single: the function returns a tensor, and no tuple.
    """

    scratch: int
    results: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]
    steps: tuple[_Step, ...]
    is_single: bool


class Replays:
    """What is written down of calls on one device. Threads share it: an entry is replaced as a whole.

    Args:
        device: where kernels are started; results lie where the first input does, which is there.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # a script; None after one call; False for what cannot be written down
        self._known: dict[tuple[Any, ...], _Script | bool | None] = {}

    def run(
        self, what: tuple[Any, ...], call: Callable[[], Results | None], first: Tensor, *others: Tensor | None
    ) -> Results | None:
        """Return what `call()` gives.

        Args:
            what: names the function, and all that it is told beside tensors.
            call: computes with `first` and `others`, and with no other tensors.
            first: an input, other ones at each call.
            others: likewise.
        """
        inputs = (first, *others)
        kinds: list[Any] = [*what]
        for tensor in inputs:
            if tensor is None:
                kinds.append(None)
            else:
                kinds += (
                    tensor.dtype,
                    tensor.shape,
                    tensor.stride(),
                    tensor.data_ptr() & 15,
                    tensor.device,
                    tensor.is_neg(),
                )
        key = tuple(kinds)
        known = self._known.get(key, True)
        if type(known) is _Script and not is_observed():
            with on_device(self._device):
                return _played(known, inputs, first.device, self._device)
        if known is True:
            if len(self._known) >= _MOST:
                self._known.clear()
            self._known[key] = None
        elif known is None:
            results, script = _written_down(call, inputs)
            self._known[key] = script or False
            return results
        return call()


def _played(
    script: _Script, inputs: Sequence[Tensor | None], memory: torch.device, device: torch.device
) -> Results:
    results = [
        torch.empty_strided(shape, strides, dtype=dtype, device=memory)
        for shape, strides, dtype in script.results
    ]
    bases: list[Tensor | None] = [*inputs, None, *results]
    if script.scratch:
        bases[len(inputs)] = torch.empty(script.scratch, dtype=torch.uint8, device=memory)
    if INTERPRETED:
        _interpret(script, bases)
    else:
        _start(script, [0 if base is None else base.data_ptr() for base in bases], device)
    return results[0] if script.is_single else tuple(results)


def _start(script: _Script, addresses: list[int], device: torch.device) -> None:
    stream = current_stream(device)
    for step in script.steps:
        values = list(step.args)
        for place in step.places:
            address = addresses[place.base] + place.offset
            tiles = place.tiles
            values[place.at] = address if tiles is None else _descriptor(tiles, _Base(address, place.form[0]))
        # of interpreted kernels alone there is none
        if step.started.compiled is not None:
            step.started.compiled.start(step.started.grid, stream, values)


def _interpret(script: _Script, bases: Sequence[Any]) -> None:
    for step in script.steps:
        args = list(step.args)
        for place in step.places:
            base, (dtype, shape, strides) = bases[place.base], place.form
            memory = base.untyped_storage()
            start = (base.data_ptr() - memory.data_ptr() + place.offset) // dtype.itemsize
            view = torch.empty(0, dtype=dtype).set_(memory, start, shape, strides)
            args[place.at] = view if place.tiles is None else _descriptor(place.tiles, view)
        started = step.started
        launch(started.kernel, started.grid, args, started.constants, device=torch.device("cpu"))


class _Base:
    """What a launcher asks of the base of a descriptor: where it lies."""

    __slots__ = ("dtype", "place")

    def __init__(self, place: int, dtype: torch.dtype) -> None:
        self.place, self.dtype = place, dtype

    def data_ptr(self) -> int:
        return self.place


def _descriptor(attributes: dict[str, Any], base: Any) -> TensorDescriptor:
    """Return a descriptor like one that was checked when it was made."""
    tiles = object.__new__(TensorDescriptor)
    tiles.__dict__.update(attributes)
    tiles.base = base
    return tiles


def _written_down(
    call: Callable[[], Results | None], inputs: Sequence[Tensor | None]
) -> tuple[Results | None, _Script | None]:
    """Run a call; return what it gives, and its script if it can be written down."""
    watch = _Watch()
    with watch, started_by() as launches:
        results = call()
    if results is None or not watch.only_makes:
        return results, None
    given = (results,) if isinstance(results, Tensor) else results
    return results, _script(launches, given, inputs, watch.made, isinstance(results, Tensor))


class _Watch(TorchDispatchMode):
    """Sees operations of torch.

    Attributes:
        made: tensors with memory of their own that were made; they are held, so that none gets the address of another.
        only_makes: nothing else was done than making tensors and looking at them in other shapes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []
        self.only_makes = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _MAKING:
            self.made.append(out)
        elif not func.is_view:
            self.only_makes = False
        return out


def _script(
    launches: Sequence[Started],
    results: Sequence[Tensor],
    inputs: Sequence[Tensor | None],
    made: Sequence[Tensor],
    is_single: bool,
) -> _Script | None:
    """Return what was launched, with every address as a distance from a base; None where one is of something else."""
    # whatever the addresses of bases are, by the memory they lie in
    bases: dict[int, list[tuple[int, int]]] = {}
    for number, tensor in enumerate(inputs):
        if tensor is not None and tensor.data_ptr():
            bases.setdefault(_memory(tensor), []).append((number, tensor.data_ptr()))
    of_results = [_memory(result) for result in results]
    wholes = {_memory(tensor): tensor for tensor in made if tensor.numel()}
    if any(not _is_whole(result, wholes) for result in results) or len({*of_results}) < len(results):
        return None
    scratch = 0
    for memory, tensor in wholes.items():
        if memory in of_results:
            bases[memory] = [(len(inputs) + 1 + of_results.index(memory), tensor.data_ptr())]
        else:
            bases[memory] = [(len(inputs), tensor.data_ptr() - scratch)]
            scratch += -(-tensor.untyped_storage().nbytes() // _STEP) * _STEP
    steps = [_step(started, bases) for started in launches]
    if any(step is None for step in steps):
        return None
    forms = tuple((result.shape, result.stride(), result.dtype) for result in results)
    return _Script(scratch, forms, tuple(step for step in steps if step is not None), is_single)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_whole(result: Tensor, wholes: dict[int, Tensor]) -> bool:
    """Say whether a result is all of a tensor that was made for it."""
    if not result.numel():
        return True
    own = wholes.get(_memory(result))
    return (
        own is not None
        and result.storage_offset() == 0
        and result.numel() == own.numel()
        and result.dtype == own.dtype
    )


def _step(started: Started, bases: dict[int, list[tuple[int, int]]]) -> _Step | None:
    if started.compiled is None and not INTERPRETED:
        return None
    args: list[Any] = []
    places: list[_Place] = []
    for at, arg in enumerate(started.args):
        tensor = arg.base if isinstance(arg, TensorDescriptor) else arg
        if not isinstance(tensor, Tensor):
            args.append(arg)
            continue
        args.append(None)
        found = bases.get(_memory(tensor), [])
        if len(found) > 1:
            # inputs that share their memory: this is the one that begins where the argument does, or nobody knows
            found = [base for base in found if base[1] == tensor.data_ptr()]
        if len(found) != 1:
            return None
        number, address = found[0]
        tiles = {**vars(arg), "base": None} if isinstance(arg, TensorDescriptor) else None
        form = tensor.dtype, tensor.shape, tensor.stride()
        places.append(_Place(at, number, tensor.data_ptr() - address, form, tiles))
    return _Step(started._replace(args=()), tuple(args), tuple(places))
