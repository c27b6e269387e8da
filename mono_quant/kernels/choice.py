"""Which path runs here, and what "auto" means on it: the one place that chooses, and says what it chose."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mono_quant.kernels import accelerators, cpu
from mono_quant.kernels.activations import AUTO, SCHEMES, ActivationScheme, check_activations

loaded = cpu.load()
# What the reference takes, on any device: schemes cost it alike, and this one is the simplest.
_PLAIN = "int8"
# Texts whose next tokens are so few that wide codes cost little (measured: 8 % of a step of GPT-2 at four, 20 % at eight).
_FEW_TEXTS = 4


class _Active:
    """The path in use on the CPU, None for the reference; why it is that, for people; and what "auto" means.

    Each attribute is replaced as a whole, so that a thread sees the old choice or the new one.
    """

    def __init__(self) -> None:
        self.cpu, self.reason = cpu.from_environment(loaded)
        # the scheme that was asked for in the place of the path's own, or "auto"
        self.wanted = cpu.activations_from_environment()


active = _Active()


def scheme_on(requested: str, on_cpu: bool) -> ActivationScheme:
    """Return the scheme that `requested` names, "auto" resolved where an input lies."""
    found = SCHEMES.get(requested)
    if found is not None:
        return found
    check_activations(requested)
    if active.wanted != AUTO:
        return SCHEMES[active.wanted]
    return SCHEMES[active.cpu.activations if active.cpu is not None and on_cpu else _PLAIN]


def scheme_of(requested: str, x: torch.Tensor) -> ActivationScheme:
    """Return the scheme of a product with `x` [..., T, K]: that of `scheme_on`, but for "auto" and the next tokens of few texts.

    A decode step of a few texts waits for weights, whatever the width of its codes is, so that there "auto" is the widest scheme
    on every path. With more texts it is the scheme that their prompts had.
    """
    scheme = scheme_on(requested, x.is_cpu)
    if (
        requested != AUTO
        or x.dim() < 3
        or x.shape[-2] != 1
        or not x.is_cpu
        or math.prod(x.shape[:-1]) > _FEW_TEXTS
    ):
        return scheme
    return scheme if active.cpu is None or active.wanted != AUTO else SCHEMES[cpu.WIDE]


def activation_scheme(requested: str = AUTO, device: torch.device | str = "cpu") -> str:
    """Return the name of the activation scheme that runs on `device` where `requested` is asked for.

    Args:
        requested: one of `ACTIVATIONS`; "auto" is what `using` or MONO_QUANT_ACTIVATIONS name, else what suits the path:
            int12 on AVX2 and on AVX-512 without VNNI, int8-g128 with VNNI (int12 for the next tokens of up to four texts:
            there more bits cost little), int8 on the reference and other devices.
        device: where the input lies.

    Raises:
        ValueError: there is no such scheme.
    """
    return scheme_on(requested, torch.device(device).type == "cpu").name


def describe(device: torch.device | str = "cpu") -> str:
    """Name the path that runs int8 products on `device`, for reports."""
    place = torch.device(device)
    if place.type not in ("cpu", "meta"):
        return accelerators.describe(place)
    if accelerators.wanted.interpreted is not None:
        return "Triton's interpreter (exact)"
    return "reference (plain torch, exact)" if active.cpu is None else f"native {active.cpu.path} (exact)"


def describe_half(device: torch.device | str = "cpu") -> str:
    """Name the path that runs float16 products on `device`, for reports."""
    if torch.device(device).type != "cpu":
        return "torch float16"
    if active.cpu is None or active.cpu.path == "portable":
        return "torch float32 arithmetic"
    return f"native {active.cpu.path} (float32 arithmetic)"


def environment() -> dict[str, str | int | bool | list[str] | list[dict[str, str | None]] | None]:
    """Say what runs int8 products on this machine, and why: for `mono-quant env`.

    Returns:
        Of its CPU: `library` (is the native library there), `reason` (why not, or what was refused), `compiler`, `isa_paths`
        (instruction sets that work here), `path` (the one in use), `activations` (what "auto" means on it), `threads`, and
        `cost` (what the missing library costs, or None). Of devices, `triton` (its version, or None) and `accelerators`, of each
        `device`, `name`, `path`, `reason` (why it is not a better one) and `note` (what nobody has tried).
    """
    cost = None
    if _path_name() == accelerators.REFERENCE:
        cost = "int8 layers compute in float and are slower than float ones; results stay exact"
    return {
        "library": loaded.library is not None,
        "reason": active.reason,
        "compiler": loaded.compiler,
        "isa_paths": list(loaded.paths),
        "path": _path_name(),
        "activations": activation_scheme(),
        "threads": torch.get_num_threads(),
        "cost": cost,
        "triton": accelerators.triton_version(),
        "accelerators": accelerators.listing(),
    }


def _path_name() -> str:
    if accelerators.wanted.interpreted is not None:
        return accelerators.TRITON
    return accelerators.REFERENCE if active.cpu is None else active.cpu.path


@contextmanager
def using(path: str | None = None, activations: str | None = None, gpu: str | None = None) -> Iterator[None]:
    """Run int8 products on another path, or give "auto" another meaning, while the context lasts, in the whole process.

    Args:
        path: of the CPU: "reference", "portable", "avx2", "avxvnni", "avx512" or "avx512vnni"; "triton" for the kernels of GPUs in
            Triton's interpreter, which is for tests; when not given, it stays as it is.
        activations: the scheme of layers whose own is "auto", on every path and device; "auto" for what suits the path;
            when not given, it stays as it is.
        gpu: of other devices: "triton" for the best there is, "int_mm" for torch's int8 product, "reference"; when not given, it
            stays as it is.

    Raises:
        ValueError: a path or the scheme is unknown, or this machine does not have the path.
    """
    devices = accelerators.wanted
    before = active.cpu, active.reason, active.wanted, devices.interpreted, devices.road
    wanted = active.wanted if activations is None else check_activations(activations)
    road = devices.road if gpu is None else accelerators.check_road(gpu)
    if path == accelerators.TRITON:
        devices.interpreted = accelerators.interpreter()
        active.cpu, active.reason = None, "Triton's interpreter was asked for"
    elif path is not None:
        active.cpu, active.reason = cpu.choose(loaded, path)
        devices.interpreted = None
    active.wanted, devices.road = wanted, road
    try:
        yield
    finally:
        active.cpu, active.reason, active.wanted, devices.interpreted, devices.road = before
