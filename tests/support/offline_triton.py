"""Compiling kernels for GPUs that are not here, in a process where Triton compiles instead of interpreting."""

import os
import pickle
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Job:
    """One kernel for one device.

    Attributes:
        kernel: a function under `triton.jit` in a module that can be imported.
        signature: the types of its parameters that are no constants, as Triton writes them: "*fp16", "i32", "fp32".
        constants: its `tl.constexpr` parameters, and others that are None or 1.
        capability: of the device: 90 for sm_90.
        options: of Triton's compiler: num_warps, num_stages; `aligned` names parameters that 16 divides.
    """

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    capability: int
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Compiled:
    """What came of a job: its PTX, how many bytes of shared memory a program takes, the length of the cubin."""

    ptx: str
    shared: int
    cubin: int


def compile_all(jobs: list[Job]) -> list[Compiled]:
    """Compile kernels in one new process, fused multiply-adds off as `launch` has them, ptxas included."""
    named = [
        (j.kernel.fn.__module__, j.kernel.fn.__name__, j.signature, j.constants, j.capability, j.options)
        for j in jobs
    ]
    with tempfile.TemporaryDirectory() as cache:
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        env |= {
            "TRITON_CACHE_DIR": cache,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
        }
        done = subprocess.run(
            [sys.executable, __file__], input=pickle.dumps(named), capture_output=True, env=env, check=False
        )
    assert done.returncode == 0, done.stderr.decode()
    return [Compiled(*parts) for parts in pickle.loads(done.stdout)]


def _compile(
    module: str,
    name: str,
    signature: dict[str, str],
    constants: dict[str, Any],
    capability: int,
    options: Any,
) -> tuple[str, int, int]:
    kernel = getattr(import_module(module), name)
    options = {"enable_fp_fusion": False, **options}
    aligned = options.pop("aligned", ())
    places = kernel.arg_names
    types = {at: "constexpr" if at in constants else signature[at] for at in places}
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs=constants,
        attrs={(places.index(at),): [["tt.divisibility", 16]] for at in aligned},
    )
    made = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return made.asm["ptx"], made.metadata.shared, len(made.asm["cubin"])


if __name__ == "__main__":
    results = [_compile(*job) for job in pickle.loads(sys.stdin.buffer.read())]
    sys.stdout.buffer.write(pickle.dumps(results))
