"""The public surface: few names, sorted, complete, and cheap to import."""

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mono_quant

REQUIRED = {
    "QuantizationConfig",
    "QuantizedModel",
    "__version__",
    "dynamic_quantize",
    "inspect",
    "load",
    "plan",
    "push_to_hub",
    "quantize",
    "quantize_from_hub",
    "verify",
}


def test_all_is_sorted_short_and_has_the_promised_names():
    names = mono_quant.__all__
    assert names == sorted(names) and len(names) == len(set(names))
    assert len(names) <= 14
    assert set(names) >= REQUIRED


def test_all_is_what_the_package_imports():
    tree = ast.parse(Path(mono_quant.__file__).read_text(encoding="utf-8"))
    imported = {a.asname or a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert imported == set(mono_quant.__all__)


def test_every_name_is_there_documented_and_from_here():
    for name in mono_quant.__all__:
        thing = getattr(mono_quant, name)
        if name != "__version__":
            assert thing.__doc__ and thing.__module__.startswith("mono_quant."), name


def test_star_import_gives_exactly_these_names():
    space = {}
    exec("from mono_quant import *", space)
    assert space.keys() - {"__builtins__"} == set(mono_quant.__all__)


def test_importing_loads_no_heavy_package():
    code = (
        "import sys, json, warnings; warnings.simplefilter('error'); import mono_quant; "
        "print(json.dumps(sorted({n.partition('.')[0] for n in sys.modules})))"
    )
    root = Path(mono_quant.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    loaded = set(json.loads(done.stdout))
    heavy = {"transformers", "sentence_transformers", "diffusers", "accelerate", "peft", "compressed_tensors"}
    assert "mono_quant" in loaded and "torch" in loaded
    assert loaded & heavy == set()
    assert done.stderr == ""


def test_the_version_is_a_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc|\.dev)\d+)?", mono_quant.__version__)


def test_the_version_is_the_one_of_the_installed_package():
    try:
        installed = importlib.metadata.version("mono-quant")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("mono_quant is on the path without being installed")
    assert mono_quant.__version__ == installed
