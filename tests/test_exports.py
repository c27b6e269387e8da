"""The public surface: few names, sorted, complete, and cheap to import."""

import ast
import importlib.metadata
import json
import pickle
import pydoc
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
    assert len(names) <= 16
    assert set(names) >= REQUIRED


def test_what_type_checkers_see_is_what_is_handed_on_when_it_is_asked_for():
    # the one `__init__` with code: torch takes a second, and `mono-quant --version` must not wait for it
    tree = ast.parse(Path(mono_quant.__file__).read_text(encoding="utf-8"))
    seen = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    imported = {a.name: n.module for n in ast.walk(seen) if isinstance(n, ast.ImportFrom) for a in n.names}
    homes = {name: f"mono_quant.{home}" for home, names in mono_quant._HOMES.items() for name in names}
    assert imported == homes
    assert homes.keys() == set(mono_quant.__all__)


def test_every_folder_is_an_attribute():
    package = Path(mono_quant.__file__).parent
    rooms = {
        path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert set(mono_quant._FOLDERS) == {room for room in rooms if not room.startswith("_")}
    for name in mono_quant._FOLDERS:
        assert getattr(mono_quant, name) is sys.modules[f"mono_quant.{name}"]


def test_the_names_can_be_listed_and_others_are_refused():
    assert set(dir(mono_quant)) >= {*mono_quant.__all__, "errors", "__doc__"}
    with pytest.raises(AttributeError, match="module 'mono_quant' has no attribute 'quantise'"):
        _ = mono_quant.quantise
    with pytest.raises(ImportError, match="quantise"):
        exec("from mono_quant import quantise")


def test_help_shows_every_name():
    shown = pydoc.plaintext.document(mono_quant)
    assert [n for n in mono_quant.__all__ if n != "__version__" and not re.search(rf"\b{n}\b", shown)] == []
    assert f"VERSION\n    {mono_quant.__version__}\n" in shown
    assert "Convert a model to INT8 or FP16." in shown


def test_names_can_be_pickled():
    for name in set(mono_quant.__all__) - {"__version__"}:
        thing = getattr(mono_quant, name)
        assert pickle.loads(pickle.dumps(thing)) is thing


def test_every_name_is_there_documented_and_from_here():
    for name in mono_quant.__all__:
        thing = getattr(mono_quant, name)
        if name != "__version__":
            assert thing.__doc__ and thing.__module__.startswith("mono_quant."), name


def test_star_import_gives_exactly_these_names():
    space = {}
    exec("from mono_quant import *", space)
    assert space.keys() - {"__builtins__"} == set(mono_quant.__all__)


HEAVY = {"transformers", "sentence_transformers", "diffusers", "accelerate", "peft", "compressed_tensors"}


def loaded_by(statement):
    """Return the packages that a new process holds after a statement, which must not warn."""
    code = (
        f"import sys, json, warnings; warnings.simplefilter('error'); {statement}; "
        "print(json.dumps(sorted({n.partition('.')[0] for n in sys.modules})))"
    )
    root = Path(mono_quant.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stderr == ""
    return set(json.loads(done.stdout))


def test_importing_loads_nothing_but_the_standard_library():
    loaded = loaded_by(
        "before = set(sys.modules); import mono_quant; mono_quant.__version__; mono_quant.MonoQuantError"
    )
    third = loaded - sys.stdlib_module_names - {"mono_quant", "__main__", "sitecustomize", "_distutils_hack"}
    assert [name for name in third if not name.startswith("__editable__")] == []


def test_a_verb_loads_torch_and_no_heavy_package():
    loaded = loaded_by("import mono_quant; mono_quant.quantize")
    assert loaded >= {"mono_quant", "torch"}
    assert loaded & HEAVY == set()


def test_the_version_is_a_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc|\.dev)\d+)?", mono_quant.__version__)


def test_the_version_is_the_one_of_the_installed_package():
    try:
        installed = importlib.metadata.version("mono-quant")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("mono_quant is on the path without being installed")
    assert mono_quant.__version__ == installed
