"""What a device can do, asked of Triton and torch once per device: by feature, never by the name of a card."""

import functools
import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

# Triton reads it when a kernel is defined, too.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# The smallest for which kernels are compiled: Triton's own limit, and below it tensor cores do not multiply int8.
OLDEST = (7, 5)


@dataclass(frozen=True, slots=True)
class Features:
    """What kernels may use on a device.

    Attributes:
        backend: of Triton: "nvidia", "amd" or "xpu"; "interpreter" on the CPU.
        capability: of NVIDIA's devices, else (0, 0).
        shared: bytes of fast memory that one program may take.
        processors: programs that run beside each other at least.
        tma: tiles are loaded through descriptors.
        dp4a: four products of int8 are one instruction.
        int8_dot: Triton multiplies tiles of int8; for 7.5 of NVIDIA it does not compile that (3.7), and other tiles without tensor
            cores.
        overlap: a kernel may start before the one in front of it has ended, and wait inside for its results.
        bf16: arithmetic and stores in bfloat16; elsewhere results are rounded to it by torch.
    """

    backend: str
    capability: tuple[int, int]
    shared: int
    processors: int
    tma: bool
    dp4a: bool
    int8_dot: bool
    overlap: bool
    bf16: bool


# Triton's interpreter cuts the end of a bfloat16 off where it should round.
INTERPRETER = Features(
    "interpreter", (0, 0), 1 << 30, 1, tma=False, dp4a=False, int8_dot=True, overlap=False, bf16=False
)


@functools.cache
def features_of(device: torch.device) -> Features:
    """Return what `device`, with its index, can do; that of the interpreter where kernels are interpreted.

    Raises:
        RuntimeError: Triton has no driver for it.
    """
    if INTERPRETED:
        return INTERPRETER
    shared = triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]
    known = torch.get_device_module(device.type).get_device_properties(device)
    if device.type == "xpu":
        # units that may hold several programs
        return of_others("xpu", shared, known.gpu_subslice_count)
    if torch.version.hip is not None:
        return of_others("amd", shared, known.multi_processor_count)
    return of_nvidia((known.major, known.minor), shared, known.multi_processor_count, _launches_overlap())


def of_nvidia(capability: tuple[int, int], shared: int, processors: int, overlap: bool) -> Features:
    """Return the features of a compute capability.

    Args:
        capability: major and minor.
        shared: bytes per program.
        processors: streaming multiprocessors.
        overlap: this Triton can launch kernels dependently.
    """
    return Features(
        "nvidia",
        capability,
        shared,
        processors,
        tma=capability >= (9, 0),
        dp4a=capability >= (6, 1),
        int8_dot=capability >= (8, 0),
        overlap=overlap and capability >= (9, 0),
        bf16=capability >= (8, 0),
    )


def of_others(backend: str, shared: int, processors: int) -> Features:
    """Return what Triton offers on every device: pointers and dot products. Nobody has run these kernels there."""
    return Features(
        backend,
        (0, 0),
        shared,
        processors,
        tma=False,
        dp4a=False,
        int8_dot=True,
        overlap=False,
        bf16=True,
    )


def refusal(features: Features) -> str | None:
    """Say why no kernels are compiled for a device; None where they are."""
    if features.backend == "nvidia" and features.capability < OLDEST:
        have, least = (".".join(map(str, pair)) for pair in (features.capability, OLDEST))
        return f"compute capability {have} is below {least}"
    return None


def _launches_overlap() -> bool:
    """Say whether this Triton knows programmatic dependent launches; with the instructions came the option."""
    return hasattr(getattr(tl.extra, "cuda", None), "gdc_wait")
