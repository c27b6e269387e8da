"""Packages for a machine that reaches no registry: fetched here into `.wheels/`, installed there from it.

Versions are those of scripts/constraints.txt. Of bitsandbytes one library is kept, for one release of CUDA: all of them are
43 MB.
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".wheels"
CONSTRAINTS = ROOT / "scripts/constraints.txt"
# What a model of transformers needs beside torch: the releases that ours are tested with, and what older ones do not bring along.
MODELS = (
    "transformers", "huggingface_hub", "accelerate", "safetensors", "tokenizers",
    "httpx2", "httpcore2", "h11", "truststore", "anyio", "idna", "hf-xet", "click",
)  # fmt: skip
PEERS = ("bitsandbytes", "torchao")
# What those need in turn, and the tests: for a machine that has torch and Triton alone.
BARE = (
    "numpy", "packaging", "psutil", "pyyaml", "regex", "tqdm", "filelock", "fsspec", "typing-extensions",
    "typer", "annotated-doc", "rich", "markdown-it-py", "mdurl", "pygments", "shellingham",
    "pytest", "iniconfig", "pluggy", "hypothesis", "sortedcontainers",
)  # fmt: skip
_PLATFORMS = tuple(f"manylinux_2_{n}_x86_64" for n in (34, 28, 27, 24, 17, 12, 5)) + (
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
)
_LIBRARY = re.compile(r"bitsandbytes/libbitsandbytes_(?!cpu\.)(\w+)\.so$")


def pinned(names: tuple[str, ...], constraints: str) -> list[str]:
    """Return what to ask for: `name==version` where the constraints have one."""
    versions = dict(re.findall(r"^([\w.-]+)==([\w.]+)$", constraints, re.MULTILINE))
    return [f"{name}=={versions[name]}" if name in versions else name for name in names]


def download(folder: Path, python: str, cuda: str, *, bare: bool) -> list[Path]:
    """Fetch the wheels and return them.

    Args:
        folder: is made anew.
        python: version of the machine's, such as 3.12.
        cuda: of the machine's torch, such as 130: the library of bitsandbytes that stays.
        bare: with what models and tests need in turn.
    """
    folder.mkdir(exist_ok=True)
    for wheel in folder.glob("*.whl"):
        wheel.unlink()
    wanted = pinned(MODELS + PEERS + (BARE if bare else ()), CONSTRAINTS.read_text(encoding="utf-8"))
    platforms = [option for name in _PLATFORMS for option in ("--platform", name)]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    target = ["--python-version", python, "--implementation", "cp", *platforms, "-d", str(folder)]
    subprocess.run([*pip, *target, *wanted], check=True)
    for wheel in folder.glob("bitsandbytes-*.whl"):
        slim(wheel, f"cuda{cuda}")
    return sorted(folder.glob("*.whl"))


def slim(wheel: Path, kept: str) -> None:
    """Take the libraries for other devices out of a wheel of bitsandbytes, and out of its record.

    Raises:
        ValueError: the one that is to stay is not there.
    """
    beside = wheel.with_suffix(".part")
    with zipfile.ZipFile(wheel) as before:
        names = before.namelist()
        devices = {found[1] for name in names if (found := _LIBRARY.search(name))}
        if kept not in devices:
            raise ValueError(
                f"{wheel.name} has no library for {kept}, but for {', '.join(sorted(devices))}; name one of those as --cuda"
            )
        dropped = {name for name in names if (found := _LIBRARY.search(name)) and found[1] != kept}
        with zipfile.ZipFile(beside, "w", zipfile.ZIP_DEFLATED) as after:
            for name in names:
                if name in dropped:
                    continue
                data = before.read(name)
                if name.endswith(".dist-info/RECORD"):
                    lines = data.decode().splitlines(keepends=True)
                    data = "".join(line for line in lines if line.split(",")[0] not in dropped).encode()
                after.writestr(name, data)
    beside.replace(wheel)


def install(folder: Path) -> Path | None:
    """Install the wheels of a folder beside what is there, and return where, or None if there are none."""
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        return None
    target = Path(tempfile.mkdtemp(prefix="mono-quant-wheels-"))
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-compile",
        "--no-cache-dir",
    ]
    subprocess.run([*pip, "--target", str(target), *map(str, wheels)], check=True)
    return target
