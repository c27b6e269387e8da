"""Compile every kernel that can be asked for, for kinds of GPUs that are not here, and say what fits.

`mono_quant.kernels.gpu` is made to believe in a device: features are those of a compute capability, and what would be launched is
compiled instead. So what is compiled is what the package would ask for, in the shapes and schemes below, and each row of its table
of products. No result is looked at: that is for the interpreter, and for a device.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.gpu.tables import table

ROOT = Path(__file__).parents[2]
JSON, TABLE = "offline.json", "offline.md"


@dataclass(frozen=True)
class Kind:
    """GPUs of one compute capability.

    Attributes:
        capability: 90 for sm_90.
        shared: bytes that one program may take, by CUDA's documentation (technical specifications per compute capability).
        registers: that one thread may have.
        what: examples.
    """

    capability: int
    shared: int
    what: str
    registers: int = 255


KINDS = (
    Kind(75, 64 << 10, "T4, RTX 20"),
    Kind(80, 163 << 10, "A100"),
    Kind(86, 99 << 10, "RTX 30, A10"),
    Kind(89, 99 << 10, "RTX 40, L4"),
    Kind(90, 227 << 10, "H100, H200"),
    Kind(100, 227 << 10, "B200"),
    Kind(120, 99 << 10, "RTX 50"),
)


@dataclass(frozen=True)
class Made:
    """One kernel for one kind of GPU.

    Attributes:
        capability: of the device.
        kernel: its name.
        what: its constants, warps and stages.
        shared: bytes that a program takes; None where it did not compile, as the rest.
        registers: of a thread.
        spilled: bytes of a thread that lie in memory for want of registers.
        problem: why it did not compile.
    """

    capability: int
    kernel: str
    what: str
    shared: int | None = None
    registers: int | None = None
    spilled: int | None = None
    problem: str = ""

    def fits(self, kind: Kind) -> bool:
        """Say whether a device of this kind can run it."""
        return self.shared is not None and self.shared <= kind.shared


def compile_all(folder: Path, kinds: Sequence[Kind] = KINDS) -> int:
    """Compile for every kind, a process each, as many at once as there are processors; return 0 only if all of it fits."""
    start, made = time.monotonic(), []
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for done in as_completed([pool.submit(_in_process, kind) for kind in kinds]):
            made = sorted([*made, *done.result()], key=_order)
            there = [kind for kind in kinds if any(one.capability == kind.capability for one in made)]
            rows = json.dumps([asdict(one) for one in made], indent=1)
            (folder / JSON).write_text(f"{rows}\n", encoding="utf-8")
            (folder / TABLE).write_text(markdown(made, there), encoding="utf-8")
    print((folder / TABLE).read_text(encoding="utf-8"))
    print(f"{len(made)} kernels in {time.monotonic() - start:.0f} s, written to {folder}")
    by_capability = {kind.capability: kind for kind in kinds}
    return 0 if made and all(one.fits(by_capability[one.capability]) for one in made) else 1


def _in_process(kind: Kind) -> list[Made]:
    """Compile for one kind in a new process: what a Triton has compiled for once it compiles for."""
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "made.jsonl"
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {
            "PYTHONPATH": os.pathsep.join([
                str(ROOT),
                str(ROOT / "scripts"),
                environment.get("PYTHONPATH", ""),
            ]),
            "TRITON_CACHE_DIR": str(Path(scratch) / "cache"),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "gpu.believing", str(kind.capability), str(kind.shared), str(result)]
        code = subprocess.run(command, env=environment, check=False).returncode
        lines = result.read_text(encoding="utf-8").splitlines() if result.exists() else []
    made = [Made(kind.capability, **json.loads(line)) for line in lines]
    if code != 0:
        made.append(Made(kind.capability, "(all of them)", "", problem=f"the process ended with code {code}"))
    return made


def markdown(made: Sequence[Made], kinds: Sequence[Kind]) -> str:
    """Return a table of the kinds, one of the kernels by their largest, and one of what does not fit."""
    overview = []
    for kind in kinds:
        own = [one for one in made if one.capability == kind.capability]
        done = [one for one in own if one.shared is not None]
        overview.append({
            "kind": f"sm_{kind.capability} ({kind.what})",
            "kernels": len(own),
            "fit": sum(one.fits(kind) for one in own),
            "spill": sum(bool(one.spilled) for one in done),
            "shared": f"{max((one.shared or 0 for one in done), default=0) / 1024:.0f} of {kind.shared / 1024:.0f} KiB",
            "registers": max((one.registers or 0 for one in done), default=0),
        })
    by_kind = {kind.capability: kind for kind in kinds}
    bad = [asdict(one) for one in made if not one.fits(by_kind[one.capability])]
    spilling = [asdict(one) for one in made if one.spilled]
    parts = [
        "# Kernels compiled for GPUs that are not here",
        table(overview, [(name, lambda r, name=name: r[name]) for name in overview[0]]),
        "## By kernel",
        table(
            _by_kernel(made),
            [
                (name, lambda r, name=name: r[name])
                for name in ("kernel", "sm", "forms", "shared KiB", "registers")
            ],
        ),
    ]
    for title, rows in (("Does not compile or fit", bad), ("Spills registers", spilling)):
        if rows:
            keys = ("capability", "kernel", "what", "shared", "registers", "spilled", "problem")
            parts += [f"## {title}", table(rows, [(key, lambda r, key=key: r[key]) for key in keys])]
    return "\n\n".join(parts) + "\n"


def _by_kernel(made: Sequence[Made]) -> list[dict[str, object]]:
    rows = []
    for name, capability in dict.fromkeys((one.kernel, one.capability) for one in sorted(made, key=_order)):
        own = [
            one
            for one in made
            if (one.kernel, one.capability) == (name, capability) and one.shared is not None
        ]
        if own:
            shared, registers = [one.shared or 0 for one in own], [one.registers or 0 for one in own]
            rows.append({
                "kernel": name,
                "sm": capability,
                "forms": len(own),
                "shared KiB": f"{min(shared) / 1024:.0f} to {max(shared) / 1024:.0f}",
                "registers": f"{min(registers)} to {max(registers)}",
            })
    return rows


def _order(one: Made) -> tuple[str, int]:
    return one.kernel, one.capability
