"""Which path a device has: our Triton kernels, else torch's int8 product, else the reference; found once for each device.

`gpu` is imported here alone, and by name: Triton decides at import whether kernels are compiled, takes its time, and need not be
there. What is kept is one answer for each device, and what was asked for.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from mono_quant.errors import SettingError
from mono_quant.kernels import reference, weight_only
from mono_quant.kernels.activations import ActivationScheme
from mono_quant.kernels.cpu import EncodedRows
from mono_quant.kernels.steps import Steps

# What MONO_QUANT_GPU and `choice.using` take: the best there is, or not beyond one of the others.
TRITON, INT_MM, REFERENCE = "triton", "int_mm", "reference"
ROADS = (TRITON, INT_MM, REFERENCE)
# What Triton is published as: by itself, by torch for each kind of device, and for Windows.
_PACKAGES = (
    "triton",
    "pytorch-triton",
    "triton-rocm",
    "pytorch-triton-rocm",
    "triton-xpu",
    "pytorch-triton-xpu",
    "triton-windows",
)
# Kinds of devices that Triton has a backend for.
_TRITON_KINDS = frozenset({"cuda", "xpu"})


class DeviceKernels(Protocol):
    """Kernels of ours on one device. Each method returns None where they have no answer, as those of `Cpu` do.

    Attributes:
        failure: why no method has an answer any more; None while all is well.
        note: what nobody has tried.
    """

    failure: str | None
    note: str

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        scheme: ActivationScheme,
    ) -> Tensor | None: ...

    def chain(
        self, x: Tensor, added: Tensor | None, steps: Steps, keep_sum: bool, keep_normed: bool
    ) -> tuple[Tensor, ...] | None: ...

    def embedding(
        self, indices: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype
    ) -> Tensor | None: ...

    def conv(
        self,
        x: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        scheme: ActivationScheme,
    ) -> Tensor | None: ...

    def experts(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        gate_up: Tensor,
        gate_up_scale: Tensor,
        down: Tensor,
        down_scale: Tensor,
        act: str,
        scheme: ActivationScheme,
    ) -> Tensor | None: ...

    def encode_rows(self, matrix: Tensor, into: tuple[Tensor, Tensor] | None) -> EncodedRows | None: ...


@dataclass(frozen=True)
class Found:
    """Our kernels for a device, or None and why there are none."""

    kernels: DeviceKernels | None
    reason: str | None


class _Wanted:
    """What was asked for: how far to go on devices, and kernels in the interpreter for tensors on the CPU.

    Each attribute is replaced as a whole, so that a thread sees the old choice or the new one.
    """

    def __init__(self) -> None:
        self.road = road_from_environment()
        self.interpreted: DeviceKernels | None = None


def road_from_environment() -> str:
    """Return the best road that MONO_QUANT_GPU allows on devices.

    Raises:
        SettingError: it names none.
    """
    try:
        return check_road(os.environ.get("MONO_QUANT_GPU") or TRITON, "MONO_QUANT_GPU is")
    except ValueError as e:
        raise SettingError(str(e)) from e


def check_road(name: str, what: str = "there is no road") -> str:
    """Return `name` if it is one of `ROADS`.

    Raises:
        ValueError: it is not.
    """
    if name not in ROADS:
        raise ValueError(f"{what} {name!r}; choose from {', '.join(ROADS)}")
    return name


wanted = _Wanted()
_found: dict[torch.device, Found] = {}
_finding = threading.Lock()


def path_of(x: Tensor) -> DeviceKernels | None:
    """Return our kernels for where `x` lies, which may stand for a tensor; None where there are none."""
    if x.is_cpu:
        return wanted.interpreted
    return found_on(x.device).kernels if wanted.road == TRITON else None


def found_on(device: torch.device) -> Found:
    """Return what there is for a device. The first call for it compiles two kernels and tries them."""
    known = _found.get(device)
    if known is not None:
        return known
    with _finding:
        known = _found.get(device)
        if known is None:
            known = _found[device] = _find(device)
    return known


def _find(device: torch.device) -> Found:
    if device.type not in _TRITON_KINDS:
        return Found(None, f"Triton has no backend for {device.type}")
    if not _is_here(device):
        return Found(None, "there is no such device here")
    try:
        gpu = import_module("mono_quant.kernels.gpu.path")
    except ImportError as error:
        return Found(None, f"Triton cannot be imported: {error}")
    with unwatched():
        return Found(*gpu.kernels_for(device))


def _is_here(device: torch.device) -> bool:
    module = torch.get_device_module(device.type)
    return bool(module.is_available()) and (device.index or 0) < module.device_count()


def interpreter() -> DeviceKernels:
    """Return kernels that run on the CPU in Triton's interpreter.

    Raises:
        ValueError: Triton is not there, or compiles.
    """
    try:
        gpu = import_module("mono_quant.kernels.gpu.path")
    except ImportError as error:
        raise ValueError(
            f"kernel path {TRITON!r} is not available: Triton cannot be imported: {error}"
        ) from error
    kernels, reason = gpu.interpreted()
    if kernels is None:
        raise ValueError(f"kernel path {TRITON!r} is not available: {reason}")
    found: DeviceKernels = kernels
    return found


@contextmanager
def unwatched() -> Iterator[None]:
    """Compute with real tensors whoever looks on: the first call may come while a compiler runs the model on fake ones."""
    with _disable_current_modes(), torch.inference_mode():
        yield


_int_mm: dict[torch.device, bool] = {}


def has_int_mm(device: torch.device) -> bool:
    """Say whether torch's int8 product runs on a device, and is exact there."""
    if device.type in ("cpu", "meta") or wanted.road == REFERENCE:
        return False
    known = _int_mm.get(device)
    if known is None:
        with unwatched():
            known = _int_mm[device] = _is_here(device) and int_mm_is_exact(device)
    return known


def int_mm_is_exact(device: torch.device | str) -> bool:
    """Hold torch's int8 product against the definition, on sums that are as large as they get."""
    codes = torch.full((32, 256), reference.QMAX, dtype=torch.int8, device=device)
    rows = torch.tensor([127, -128, -127, 1, 0, -1, 64, -64], dtype=torch.int8, device=device)
    weight = rows.view(8, 1).expand(8, 256).contiguous()
    try:
        return torch.equal(torch._int_mm(codes, weight.t()), reference.int_matmul(codes, weight))
    except RuntimeError:
        return False


def describe(device: torch.device) -> str:
    """Name what multiplies int8 on a device, the current one of its kind where it has no number; for reports."""
    if weight_only.serves(device):
        return weight_only.DESCRIPTION
    if device.index is None and _is_here(device):
        device = torch.device(device.type, torch.accelerator.current_device_index())
    road = road_on(device)
    if road == TRITON:
        return "Triton kernels (exact)"
    return "torch._int_mm (exact)" if road == INT_MM else "reference (plain torch, exact)"


def road_on(device: torch.device) -> str:
    """Return what products take on a device: one of `ROADS`."""
    if wanted.road == TRITON:
        kernels = found_on(device).kernels
        if kernels is not None and kernels.failure is None:
            return TRITON
    return INT_MM if has_int_mm(device) else REFERENCE


def triton_version() -> str | None:
    """Return the version of Triton, or None where it is not installed; it is not imported."""
    for name in _PACKAGES:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def listing() -> list[dict[str, str | None]]:
    """Say of each device what runs int8 products there, and why: see `choice.environment`.

    Returns:
        `device`, `name`, `path` (one of `ROADS`, or "weight_only"), `reason` (why no better one), `note` (what nobody has tried).
    """
    return [_line(device) for device in devices()]


def devices() -> list[torch.device]:
    """Return the accelerators of this machine."""
    current = torch.accelerator.current_accelerator(check_available=True)
    if current is None:
        return []
    return [torch.device(current.type, index) for index in range(torch.accelerator.device_count())]


def _line(device: torch.device) -> dict[str, str | None]:
    found, road = found_on(device), "weight_only" if weight_only.serves(device) else road_on(device)
    failure = found.reason if found.kernels is None else found.kernels.failure
    if wanted.road != TRITON:
        failure = f"{wanted.road} was asked for"
    note = "unverified: nobody has run it on such a device" if found.kernels is None else found.kernels.note
    return {"device": str(device), "name": _name(device), "path": road, "reason": failure, "note": note}


def _name(device: torch.device) -> str | None:
    module: Any = torch.get_device_module(device.type)
    # MPS has no properties
    properties = getattr(module, "get_device_properties", None)
    return None if properties is None else str(properties(device).name)
