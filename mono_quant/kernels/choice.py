"""Which path runs here: the one place that chooses, and says what it chose."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mono_quant.kernels import cpu, reference

loaded = cpu.load()


class _Active:
    """The path in use on the CPU, None for the reference; and why it is that, for people."""

    def __init__(self) -> None:
        # each is replaced as a whole, so that a thread sees the old choice or the new one
        self.cpu, self.reason = cpu.from_environment(loaded)


active = _Active()


def activation_bits(device: torch.device | str = "cpu") -> int:
    """Return the width of the activation codes that the chosen path uses on `device`.

    Rows too long for exact int32 sums at that width (more than 8192 values at 12 bits) get narrower codes.
    """
    return (
        active.cpu.bits if active.cpu is not None and torch.device(device).type == "cpu" else reference.BITS
    )


def describe(device: torch.device | str = "cpu") -> str:
    """Name the path that runs int8 products on `device`, for reports."""
    if active.cpu is not None and torch.device(device).type == "cpu":
        return f"native {active.cpu.path} (exact, {active.cpu.bits}-bit activations)"
    return "reference (plain torch, exact)"


def describe_half(device: torch.device | str = "cpu") -> str:
    """Name the path that runs float16 products on `device`, for reports."""
    if torch.device(device).type != "cpu":
        return "torch float16"
    if active.cpu is None or active.cpu.path == "portable":
        return "torch float32 arithmetic"
    return f"native {active.cpu.path} (float32 arithmetic)"


def environment() -> dict[str, str | int | bool | list[str] | None]:
    """Say what runs int8 products on this machine's CPU, and why: for `mono-quant env`.

    Returns:
        `library` (is the native library there), `reason` (why not, or what was refused), `compiler`, `isa_paths`
        (instruction sets that work here), `path` (the one in use), `activation_bits`, `threads`, and `cost` (what
        the missing library costs, or None).
    """
    cost = None
    if active.cpu is None:
        cost = "int8 layers compute in float and are slower than float ones; results stay exact"
    return {
        "library": loaded.library is not None,
        "reason": active.reason,
        "compiler": loaded.compiler,
        "isa_paths": list(loaded.paths),
        "path": "reference" if active.cpu is None else active.cpu.path,
        "activation_bits": activation_bits(),
        "threads": torch.get_num_threads(),
        "cost": cost,
    }


@contextmanager
def using(path: str | None = None, bits: int | None = None) -> Iterator[None]:
    """Run int8 products on CPU on another path while the context lasts, in the whole process.

    Args:
        path: "reference", "portable", "avx2", "avx512" or "avx512vnni"; the best one here when not given.
        bits: width of the activation codes, 8 to 12; when not given, the widest that costs no speed: 8 with VNNI, else 12.
            8 bits give the bits of the reference.

    Raises:
        ValueError: the path or the width is unknown, or this machine does not have the path.
    """
    before = active.cpu, active.reason
    active.cpu, active.reason = cpu.choose(loaded, path, bits)
    try:
        yield
    finally:
        active.cpu, active.reason = before
