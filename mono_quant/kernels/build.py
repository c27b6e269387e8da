"""Compile the kernels with the C++ compiler at hand; without one, say why and go on.

setuptools loads this file by itself while building a wheel, so it imports nothing of this package. The result is a
plain C library for ctypes: it depends on the platform but not on the version of Python or torch.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

FOLDER = Path(__file__).resolve().parent
LIBRARY = "libmono_quant.so"
# What the build did, for `mono-quant env`: {"built": bool, "reason": str | null, "compiler": str | null}.
RECORD = "libmono_quant.json"
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fopenmp",
    # the reference rounds after every operation
    "-ffp-contract=off",
    # summing several products before they meet the accumulator needs more registers than there are
    "-fno-tree-reassoc",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
]
LINK_FLAGS = ["-shared", "-fopenmp", "-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL"]


def build(target: Path, extra_flags: tuple[str, ...] = ()) -> str | None:
    """Compile the library into the folder `target` and record the outcome beside it.

    Args:
        target: an existing folder.
        extra_flags: for the compiler and the linker, such as `-fsanitize=address`.

    Returns:
        None, or the reason why there is no library.
    """
    compiler, reason = _find_compiler()
    if compiler is not None:
        reason = _compile(compiler, target / LIBRARY, extra_flags)
    if reason is not None:
        # one from an earlier build would be taken for this one's
        (target / LIBRARY).unlink(missing_ok=True)
    record = {"built": reason is None, "reason": reason, "compiler": compiler}
    (target / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return reason


def _find_compiler() -> tuple[str | None, str | None]:
    if os.environ.get("MONO_QUANT_BUILD") == "0":
        return None, "the build was switched off by MONO_QUANT_BUILD=0"
    if sys.platform != "linux":
        return None, f"no kernels for {sys.platform} yet, only for Linux"
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        path = shutil.which(name) if name else None
        if path is not None:
            return path, None
    return None, "no C++ compiler was found at install time (looked for $CXX, g++, clang++, c++)"


def _compile(compiler: str, library: Path, extra_flags: tuple[str, ...]) -> str | None:
    sources = sorted((FOLDER / "csrc").glob("*.cpp"))
    if not sources:
        return f"no C++ sources in {FOLDER / 'csrc'}"
    with tempfile.TemporaryDirectory() as folder:
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]
        commands = [
            [compiler, *FLAGS, *extra_flags, "-c", str(source), "-o", str(target)]
            for source, target in zip(sources, objects, strict=True)
        ]
        # a new file, then a rename: a process that has the old library loaded keeps it whole
        fresh = library.with_suffix(f".{os.getpid()}.tmp")
        commands.append([compiler, *LINK_FLAGS, *extra_flags, "-o", str(fresh), *map(str, objects)])
        for command in commands:
            try:
                done = subprocess.run(command, capture_output=True, text=True, check=False)
            except OSError as e:
                return f"{compiler} could not be run: {e}"
            if done.returncode != 0:
                return f"{compiler} failed: {_last_lines(done.stderr)}"
        fresh.replace(library)
    return None


def _last_lines(text: str) -> str:
    errors = [line for line in text.splitlines() if "error" in line] or text.splitlines()
    return "; ".join(errors[:3]) or "no message"


class BuildPy(build_py):  # type: ignore[misc]
    """Copies the Python files and compiles the kernels beside them."""

    def run(self) -> None:
        super().run()
        target = FOLDER if self.editable_mode else Path(self.build_lib) / "mono_quant" / "kernels"
        reason = build(target)
        if reason is not None:
            self.announce(f"mono_quant: built without native kernels: {reason}", level=3)


class BdistWheel(bdist_wheel):  # type: ignore[misc]
    """Tags a wheel with kernels as py3-none-<platform>, and one without as py3-none-any."""

    def run(self) -> None:
        self.run_command("build")
        has_library = self._has_library()
        self.root_is_pure = not has_library
        # puts the files in the platform's folder, where auditwheel wants libraries to be
        self.distribution.has_ext_modules = lambda: has_library
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, name = super().get_tag()
        return ("py3", "none", name) if self._has_library() else (python, abi, name)

    def _has_library(self) -> bool:
        folder = Path(self.get_finalized_command("build").build_lib)
        return (folder / "mono_quant" / "kernels" / LIBRARY).exists()


def main() -> int:
    """Compile in place, beside this file; arguments are extra compiler flags."""
    reason = build(FOLDER, tuple(sys.argv[1:]))
    message = f"{platform.machine()}: {FOLDER / LIBRARY}" if reason is None else f"not built: {reason}"
    sys.stdout.write(message + "\n")
    return int(reason is not None)


if __name__ == "__main__":
    sys.exit(main())
