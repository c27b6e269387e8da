"""Running a kernel: always in arithmetic that rounds every operation, compiled for a device or interpreted on a CPU.

Triton's own launcher asks anew at each call what the arguments are, in 13 to 37 us of host time (H200, the prototype). Here the
first call of a kind goes through it, and the compiled kernel that it answers with is kept and started directly from then on.
What makes two calls of one kind are Triton's rules of specialization (`native_specialize_impl`, the same in 3.6 to 3.9): the type
of an argument, whether a pointer or an integer is a multiple of 16, an integer of 1, None, and the values of constants.
"""

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy
import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.tools.tensor_descriptor import TensorDescriptor

from mono_quant.kernels.gpu.features import INTERPRETED, features_of

_TENSORS = (Tensor, torch.nn.Parameter)
# What a compiled kernel is started with, before its own arguments; Triton 3.6 takes those of the second line with the rest.
_FIRST = ("gridX", "gridY", "gridZ", "stream", "function")
_SECOND = ("kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook")


class Compiled(NamedTuple):
    """A kernel that Triton compiled for arguments of one kind.

    Attributes:
        run: starts it.
        function: its handle on the device.
        packed: what `run` wants to know of it.
        rest: places of the constants behind the arguments.
        kernel: Triton's object, which owns the code on the device.
    """

    run: Callable[..., None]
    function: int
    packed: Any
    rest: tuple[None, ...]
    kernel: Any

    def start(self, grid: tuple[int, int, int], stream: int, values: Sequence[Any]) -> None:
        """Start it on the current device, with arguments as `kinds_of` returns them."""
        self.run(*grid, stream, self.function, self.packed, None, None, None, *values, *self.rest)


class Started(NamedTuple):
    """A launch that was made; `compiled` is None where Triton has to make it."""

    kernel: Any
    grid: tuple[int, int, int]
    args: Sequence[Any]
    constants: Mapping[str, Any]
    compiled: Compiled | None


class _Tape(threading.local):
    """The launches of this thread while somebody writes them down, else None."""

    launches: list[Started] | None = None


# By function, device, options, constants and the kinds of the arguments. Operations on a dict are atomic: two threads that
# meet at the first call compile twice at worst, as they do in Triton's own cache.
_compiled: dict[tuple[Any, ...], Compiled] = {}
_tape = _Tape()
_NOTHING = nullcontext()


def launch(
    kernel: Any,
    grid: Sequence[int],
    args: Sequence[Any],
    constants: Mapping[str, Any],
    *,
    device: torch.device,
    warps: int = 4,
    stages: int = 1,
    overlap: bool = False,
) -> None:
    """Run a Triton kernel on the current stream of `device`; it waits for nothing and allocates nothing.

    Args:
        kernel: a function under `triton.jit`.
        grid: one to three numbers of programs, none of them 0.
        args: tensors, numbers, descriptors or None, for the parameters of the kernel in their order.
        constants: its `tl.constexpr` parameters.
        device: where the tensors lie, with its index.
        warps: of a program.
        stages: of the loads in its loop.
        overlap: let it start before the kernel in front of it has ended, where the device can (`Features.overlap`): it must call
            `gdc_wait` before it reads what that one wrote.
    """
    x, y, z = (*grid, 1, 1)[:3]
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    if _tape.launches is not None:
        with _disable_current_modes():
            compiled = _started(kernel, (x, y, z), args, constants, options, device, overlap)
        _tape.launches.append(Started(kernel, (x, y, z), args, constants, compiled))
    else:
        _started(kernel, (x, y, z), args, constants, options, device, overlap)


def _started(
    kernel: Any,
    grid: tuple[int, int, int],
    args: Sequence[Any],
    constants: Mapping[str, Any],
    options: dict[str, Any],
    device: torch.device,
    overlap: bool,
) -> Compiled | None:
    """Run a kernel; return it if it can be started directly the next time."""
    if INTERPRETED:
        # it computes with NumPy, which warns where a GPU gives NaN or infinity
        with numpy.errstate(all="ignore"):
            kernel[grid](*args, **constants)
        return None
    if overlap and features_of(device).overlap:
        options["launch_pdl"] = True
    with on_device(device):
        return _start(kernel, grid, args, constants, options, device)


def _start(
    kernel: Any,
    grid: tuple[int, int, int],
    args: Sequence[Any],
    constants: Mapping[str, Any],
    options: dict[str, Any],
    device: torch.device,
) -> Compiled | None:
    values, kinds = kinds_of(args)
    if kinds is None or is_observed():
        kernel[grid](*args, **constants, **options)
        return None
    key = (kernel.fn, device.index, *options.values(), *_kind_of_constants(constants), *kinds)
    known = _compiled.get(key)
    if known is not None:
        known.start(grid, current_stream(device), values)
        return known
    found = kernel[grid](*args, **constants, **options)
    if not _is_startable(found):
        return None
    rest = (None,) * (len(kernel.params) - len(args))
    return _compiled.setdefault(key, Compiled(found.run, found.function, found.packed_metadata, rest, found))


@contextmanager
def started_by() -> Iterator[list[Started]]:
    """Write down what this thread launches while the context lasts."""
    before, _tape.launches = _tape.launches, []
    try:
        yield _tape.launches
    finally:
        _tape.launches = before


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a device the current one; nothing is done where it is that, or the interpreter runs."""
    if INTERPRETED or triton.runtime.driver.active.get_current_device() == device.index:
        return _NOTHING
    found: AbstractContextManager[object] = torch.get_device_module(device.type).device(device)
    return found


def current_stream(device: torch.device) -> int:
    """Return the handle of the current stream of a device."""
    stream: int = triton.runtime.driver.active.get_current_stream(device.index)
    return stream


def kinds_of(args: Sequence[Any]) -> tuple[list[Any], list[Any] | None]:
    """Return arguments as a compiled kernel takes them, and what of them Triton specializes on.

    Two calls with equal kinds (and constants and options) share a compiled kernel; there may be more kinds than Triton tells apart.
    The kinds are None where an argument is of a type for which no rule is known.
    """
    values: list[Any] = []
    kinds: list[Any] = []
    put, tell = values.append, kinds.append
    for arg in args:
        what = type(arg)
        if what in _TENSORS:
            place = arg.data_ptr()
            put(place)
            tell(arg.dtype)
            tell(place & 15 == 0)
        elif what is int:
            put(arg)
            if arg == 1:
                tell("one")
            elif -0x80000000 <= arg <= 0x7FFFFFFF:
                tell("i32" if arg & 15 else "i32 of 16")
            elif -0x8000000000000000 <= arg <= 0x7FFFFFFFFFFFFFFF:
                tell("i64" if arg & 15 else "i64 of 16")
            else:
                return values, None
        elif what is TensorDescriptor:
            put(arg)
            kinds += ("tiles", arg.base.dtype, *arg.block_shape)
        elif arg is None or what is float or what is bool:
            put(arg)
            tell(what)
        else:
            return values, None
    return values, kinds


def _kind_of_constants(constants: Mapping[str, Any]) -> tuple[Any, ...]:
    types = tuple(map(type, constants.values()))
    # True, 1 and 1.0 are equal, and so are 0.0 and -0.0
    return (str(constants) if float in types else tuple(constants.items()), types)


def is_observed() -> bool:
    """Say whether somebody, a profiler, wants to be told of every launch."""
    enter, leave = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _is_startable(found: Any) -> bool:
    """Say whether a compiled kernel is of NVIDIA's backend and is started as known from Triton 3.6 to 3.9."""
    target = getattr(getattr(found, "metadata", None), "target", None)
    if getattr(target, "backend", None) != "cuda" or not hasattr(found, "packed_metadata"):
        return False
    taken = tuple(inspect.signature(found.run).parameters)
    return taken in ((*_FIRST, "args"), (*_FIRST, *_SECOND, "args"))
