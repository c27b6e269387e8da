"""Test and measure the package on this machine's GPU in under five minutes, or prepare for one that is elsewhere.

    scripts/check_gpu                   tests, then the benchmark; results in $OUT or ./gpu-results, written after each section
    scripts/check_gpu --dry             all of it on a CPU, tiny, in Triton's interpreter: nothing runs for the first time there
    scripts/check_gpu --offline         compile every configuration for every kind of GPU, without one
    scripts/check_gpu --wheels          fetch what the machine may lack into .wheels/, which it is installed from there

On a machine that reaches no registry, a checkout with .wheels/ and mono_quant/kernels/libmono_quant.* beside the sources is enough.
PYTHON names the interpreter that has torch, where it is not .venv/bin/python or python3.
"""

import argparse
import atexit
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from gpu import wheels


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="scripts/check_gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-results")))
    top.add_argument("--seconds", type=float, default=285, help="for everything")
    top.add_argument("--layers", type=int, help="of the Llama-3-8B shape; 32 are all of them")
    top.add_argument("--sections", nargs="+", help="some alone; see scripts/bench/gpu/sections.py")
    top.add_argument("--no-tests", action="store_true")
    top.add_argument("--no-warming", action="store_true", help="compile kernels when they are met")
    top.add_argument(
        "--dry",
        nargs="?",
        const="triton",
        default="",
        metavar="PATH",
        help="on a CPU, on this path of its kernels",
    )
    top.add_argument("--offline", action="store_true")
    top.add_argument(
        "--kinds", type=int, nargs="+", help="--offline: compute capabilities, such as 90; all when not given"
    )
    top.add_argument("--wheels", action="store_true")
    top.add_argument(
        "--bare", action="store_true", help="--wheels: for a machine with torch and Triton alone"
    )
    top.add_argument("--python", default="3.12", help="--wheels: version of the machine's")
    top.add_argument("--cuda", default="130", help="--wheels: release of its torch")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    if given.wheels:
        return _fetch(given)
    given.out.mkdir(parents=True, exist_ok=True)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if not given.dry and not given.offline:
        _add_wheels()
    # what follows needs torch and transformers, which may have come just now
    if given.offline:
        from gpu.offline import KINDS, compile_all  # noqa: PLC0415

        return compile_all(
            given.out, [kind for kind in KINDS if not given.kinds or kind.capability in given.kinds]
        )
    from gpu.checking import check  # noqa: PLC0415

    return check(given)


def _add_wheels() -> None:
    """Install what was carried along, for this process and those that it starts."""
    try:
        target = wheels.install(wheels.FOLDER)
    except subprocess.CalledProcessError as error:
        # for another Python, say: what is here may do
        print(
            f"the wheels of {wheels.FOLDER} cannot be installed, this goes on without them: {error}",
            flush=True,
        )
        return
    if target is not None:
        atexit.register(shutil.rmtree, target, ignore_errors=True)
        os.environ["PYTHONPATH"] = os.pathsep.join([str(target), os.environ.get("PYTHONPATH", "")])
        sys.path.insert(0, str(target))


def _fetch(given: argparse.Namespace) -> int:
    found = wheels.download(wheels.FOLDER, given.python, given.cuda, bare=given.bare)
    for wheel in found:
        print(f"{wheel.stat().st_size / 1e6:6.1f} MB {wheel.name}")
    print(f"{sum(w.stat().st_size for w in found) / 1e6:6.1f} MB in {wheels.FOLDER}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
