"""What this machine can do at best, measured: the units that kernels are held against."""

import ctypes
import functools
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from bench.timing import Calls, measure

# Floats in a vector, and how to compile for that width, by kernel path.
WIDTHS = {
    "avx2": (8, ["-mavx2", "-mfma"]),
    "avx512": (16, ["-mavx512f"]),
    "avx512vnni": (16, ["-mavx512f"]),
}
STEPS = 200_000


@dataclass(frozen=True)
class Limits:
    """Calls that run the machine at its limit, to be timed beside the kernels.

    Attributes:
        multiply_add: does `flops` floating-point operations.
        flops: of one call of it.
        read: reads `nbytes` of memory once.
        nbytes: of one call of it.
        how: says what is measured.
    """

    multiply_add: Callable[[], object]
    flops: float
    read: Callable[[], object]
    nbytes: int
    how: str


def last_level_cache() -> int:
    """Return its size in bytes; 32 MiB where the system does not say."""
    sizes = [32 << 20]
    levels = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    if levels:
        text = levels[-1].read_text(encoding="ascii").strip()
        sizes = [int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]]] if text[-1] in "KMG" else sizes
    return sizes[0]


@functools.cache
def machine_limits(path: str) -> Limits:
    """Return the limits for the vector width of a kernel path.

    The products come from a few lines of C, the read from those or from a torch reduction, whichever is faster here.
    Without a compiler the best float product stands in, somewhat below the true limit.
    """
    data = torch.ones(max(512 << 20, 4 * last_level_cache()) // 4)
    threads = torch.get_num_threads()
    lanes, flags = WIDTHS.get(path, (4, []))
    whole = data.view(torch.int64)
    reads: Calls = {"sum": data.sum, "int64 sum": whole.sum, "int64 max": whole.max, "norm": data.norm}
    try:
        library = _compiled(lanes, flags)
    except (OSError, subprocess.CalledProcessError):
        x, w = torch.randn(1024, 1024), torch.randn(1024, 1024)
        flops, how = 2.0 * 1024**3, "the best float product, below the true limit for lack of a C compiler"

        def multiply_add() -> object:
            return F.linear(x, w)

    else:
        count = data.nbytes // (4 * lanes)
        flops, how = 2.0 * threads * STEPS * 12 * lanes, f"multiply-adds in registers, {32 * lanes} bits wide"
        reads["plain loop"] = lambda: library.read_all(threads, data.data_ptr(), count)

        def multiply_add() -> object:
            return library.multiply_add(threads, STEPS)

    times = measure(reads, 0.3, best=True)
    fastest = min(times, key=lambda name: times[name])
    how += f"; read of {data.nbytes >> 20} MiB by the fastest of {', '.join(reads)}: {fastest}; {threads} threads"
    return Limits(multiply_add, flops, reads[fastest], data.nbytes, how)


def _compiled(lanes: int, flags: list[str]) -> ctypes.CDLL:
    source = Path(__file__).with_name("limits.c")
    with tempfile.TemporaryDirectory() as folder:
        target = f"{folder}/limits.so"
        command = [os.environ.get("CC", "cc"), "-O3", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC"]
        command += [f"-DLANES={lanes}", *flags, str(source), "-o", target]
        subprocess.run(command, check=True, capture_output=True)
        library = ctypes.CDLL(target)
    library.multiply_add.argtypes = [ctypes.c_int, ctypes.c_int64]
    library.multiply_add.restype = ctypes.c_float
    library.read_all.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int64]
    library.read_all.restype = ctypes.c_int64
    return library


def processor() -> str:
    """Name the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
