"""What the package would launch on a GPU that is not here, compiled for it: `python -m gpu.believing CAPABILITY SHARED RESULT`."""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import torch
import triton
from bench.gpu import ours
from bench.gpu.experts import new_experts, routed
from bench.gpu.llama import new_llama, prefill
from bench.gpu.sizes import FULL, Decoder, Experts
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget

from gpu.variants import largest_product
from mono_quant import kernels
from mono_quant.kernels import SCHEMES
from mono_quant.kernels import gpu as package
from mono_quant.kernels.gpu import features, tables
from mono_quant.kernels.gpu import launch as launching

# Of an H100: how many programs run beside each other changes no kernel.
_PROCESSORS = 132
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LARGE, _SMALL = Decoder(4096, 14336, 32, 8, 64), Decoder(1024, 3584, 8, 2, 64)
_ODD = (70, 90)
# Tokens, outputs and K where a row of the table leaves them open.
_MOST = (1024, 8192, 4096)
_EXPERTS = (Experts("Mixtral", 1024, 1536, 4, 2), Experts("Qwen3-MoE", 2048, 768, 8, 4))


class Driver:
    """What Triton asks of the device before it compiles."""

    def __init__(self, capability: int, shared: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        self.shared = shared

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cpu

    @property
    def utils(self) -> "Driver":
        return self

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.shared}


class Compiler:
    """Takes launches, and compiles each kind of them once."""

    def __init__(self, result: Path) -> None:
        self.count = 0
        self._result = result
        self._seen: set[str] = set()

    def _write(self, row: Mapping[str, Any]) -> None:
        self.count += 1
        with self._result.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def launch(
        self,
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
        """Compile what `mono_quant.kernels.gpu.launch.launch` would run, with the same options."""
        given = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
        if overlap and features.features_of(device).overlap:
            given["launch_pdl"] = True
        kinds = launching.kinds_of(args)[1]
        key = f"{kernel.fn.__name__} {constants} {given} {kinds}"
        if key in self._seen:
            return
        self._seen.add(key)
        dtypes = [str(arg.dtype)[6:] for arg in args if isinstance(arg, Tensor) and arg.is_floating_point()]
        shown = {k: v for k, v in constants.items() if v is not None}
        what = f"{_said(shown)}; {warps} warps, {stages} stages; {', '.join(dict.fromkeys(dtypes))}"
        row: dict[str, Any] = {"kernel": kernel.fn.__name__, "what": what}
        try:
            made = kernel.warmup(*args, grid=tuple(grid), **constants, **given)
        except Exception as e:  # noqa: BLE001 - whatever a compiler says
            lines = [line.strip() for line in str(e).splitlines() if line.strip()] or [""]
            self._write({**row, "problem": f"{type(e).__name__}: {lines[-1]}"[:300]})
            return
        if made.hash in self._seen:
            # kinds of arguments that Triton does not tell apart
            return
        self._seen.add(made.hash)
        registers, spilled = resources(made.asm["cubin"])
        self._write({**row, "shared": made.metadata.shared, "registers": registers, "spilled": spilled})


def resources(cubin: bytes) -> tuple[int, int]:
    """Return the registers and the spilled bytes of a thread, as cuobjdump reads them."""
    binary = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [str(binary), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = dict(re.findall(r"(REG|STACK):(\d+)", said))
    return int(found["REG"]), int(found["STACK"])


@contextmanager
def believing(capability: int, shared: int, result: Path) -> Iterator[tuple[Compiler, features.Features]]:
    """Let the package believe that tensors on the CPU are on a device, whose kernels are compiled and not run.

    It takes the road of the interpreter (`kernels.using(path="triton")`), with the features of the device in the place of the
    interpreter's, and with a launch that compiles.
    """
    compiler = Compiler(result)
    triton.runtime.driver.set_active(Driver(capability, shared))
    numbers = capability // 10, capability % 10
    known = features.of_nvidia(numbers, shared, _PROCESSORS, features._launches_overlap())  # noqa: SLF001
    instead: dict[str, Any] = {
        "launch": compiler.launch,
        "features_of": lambda device: known,
        "INTERPRETED": True,
        "INTERPRETER": known,
    }
    modules = [import_module(f"{package.__name__}.{found.name}") for found in iter_modules(package.__path__)]
    changes = [
        (module, name, value) for module in modules for name, value in instead.items() if name in vars(module)
    ]
    gpu = import_module(f"{package.__name__}.path").Gpu
    changes.append((gpu, "encode_rows", _without_answer(gpu.encode_rows)))
    before = [(owner, name, vars(owner)[name]) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        with ours.path("triton"), torch.no_grad():
            yield compiler, known
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _without_answer(method: Callable[..., Any]) -> Callable[..., None]:
    """Let a method ask for its kernels, and leave the answer to the CPU: a conversion looks at the codes that it gets."""

    def run(*args: Any) -> None:
        method(*args)

    return run


def ask_for_everything(compiler: Compiler, known: features.Features) -> None:
    """Ask for every row of the table, and for what layers and models ask for, on the CPU; their results are what memory held."""
    for row in tables.TABLE:
        _ask_for_row(compiler, row, _DTYPES[0], known)
    for dtype in _DTYPES:
        # dtypes differ at the ends of a kernel alone
        schemes = list(SCHEMES) if dtype == _DTYPES[0] else ["int8"]
        _ask_for_layers(dtype, schemes)
        _ask_for_tables_and_convolutions(dtype, schemes)
        _ask_for_model(_LARGE if dtype == _DTYPES[0] else _SMALL, dtype, schemes)
        _ask_for_experts(dtype, schemes)


def _ask_for_layers(dtype: torch.dtype, schemes: Sequence[str]) -> None:
    """Ask for every shape in one dtype, for some in the others."""
    is_first = dtype == _DTYPES[0]
    for rows, depth in (*FULL.shapes, _ODD) if is_first else (FULL.shapes[0], _ODD):
        weight, scale = torch.empty(rows, depth, dtype=torch.int8), torch.empty(rows, 1)
        for count in FULL.tokens if is_first else (1, 16, 256):
            x, bias = torch.empty(count, depth, dtype=dtype), torch.empty(rows, dtype=dtype)
            for scheme in schemes:
                kernels.int8_linear(x, weight, scale, bias, scheme)


def _ask_for_model(decoder: Decoder, dtype: torch.dtype, schemes: Sequence[str]) -> None:
    """Ask for norms, activations and products in one, as the backend of `torch.compile` does."""
    sizes = replace(FULL, decoder=decoder, dtype=dtype)
    model = ours.quantized(new_llama(sizes, 1, torch.device("cpu")), inplace=True).model
    for scheme in schemes:
        ours.put_scheme_(model, scheme)
        torch._dynamo.reset()  # noqa: SLF001
        forward = torch.compile(model.forward, backend="mono_quant", dynamic=False)
        for count in (1, 16, 300):
            prefill(model, forward, count)()


def _ask_for_experts(dtype: torch.dtype, schemes: Sequence[str]) -> None:
    for shape in _EXPERTS:
        floats = nn.ModuleDict({"experts": new_experts(shape, torch.device("cpu"), dtype)})
        model = ours.quantized(floats, inplace=True).model
        for scheme in schemes:
            ours.put_scheme_(model, scheme)
            # a kernel for every mean number of tokens of an expert
            for count in (1, 16, 32, 64, 128, 512):
                model["experts"](*routed(shape, count, torch.device("cpu"), dtype))


def _ask_for_row(compiler: Compiler, row: tables.Row, dtype: torch.dtype, known: features.Features) -> None:
    """Compile the kernel of a row for the largest product that it covers, as far as the device has what it takes."""
    group = 128 if row.grouped else 0
    call = largest_product(row, _MOST, known, dtype, group=group, device="cpu")
    if call is None:
        return
    how = {"warps": call.warps, "stages": call.stages, "overlap": known.overlap}
    compiler.launch(call.kernel, call.grid, call.args, call.constants, device=torch.device("cpu"), **how)


def _ask_for_tables_and_convolutions(dtype: torch.dtype, schemes: Sequence[str]) -> None:
    """Ask for convolutions that are plain, grouped, and of each channel by itself, too."""
    table = ours.quantized(nn.ModuleList([nn.Embedding(500, 768, dtype=dtype)]), embeddings=True).model[0]
    table(torch.zeros(3, 7, dtype=torch.int64))
    for channels, groups, side in ((64, 1, 20), (64, 4, 20), (64, 64, 20), (3, 1, 224)):
        for scheme in schemes:
            layer = nn.Conv2d(channels, 64, 3, padding=1, groups=groups, dtype=dtype)
            converted = ours.quantized(nn.Sequential(layer), scheme, inplace=True).model
            converted(torch.randn(1, channels, side, side, dtype=dtype))


def _said(constants: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in constants.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("capability", type=int)
    parser.add_argument("shared", type=int)
    parser.add_argument("result", type=Path)
    given = parser.parse_args()
    with believing(given.capability, given.shared, given.result) as (compiler, known):
        ask_for_everything(compiler, known)
    print(f"sm_{given.capability}: {compiler.count} kernels", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
