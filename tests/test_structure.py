"""Imports point down the layers; terminal, network, disk and private torch ops are each touched in few rooms."""

import ast
from pathlib import Path

import pytest

import mono_quant

PACKAGE = Path(mono_quant.__file__).parent
# A room imports only from rooms above its own line; a new room has to be given a line here.
LAYERS = [
    {"errors", "version", "allowed"},
    {"kernels", "reading", "selection", "numerics", "hub_client", "origin"},
    {"report", "config", "layers", "hub", "json_reader", "disk", "forwards"},
    {"modules", "half_modules", "cards", "fidelity", "hub_push", "headers", "manifest", "staging"},
    {"account", "encoding"},
    {"convert", "formats", "guards", "targets", "tensor_file", "names"},
    {"quantizer", "files", "half", "widen"},
    {"bridge"},
    {"sentence", "shards"},
    {"pickles"},
    {"checkpoint"},
    {"adapters"},
    {"saved"},
    {"saving", "loading"},
    {"inspection", "publishing"},
    {"result"},
    {"api"},
    {"cli", "__init__"},
    {"__main__"},
]
INSIDE_KERNELS = [{"reference", "build"}, {"cpu"}, {"__init__"}]
# What only these rooms may name.
EFFECTS = {
    "print": {"cli"},
    "breakpoint": set(),
    "HfApi": {"hub", "hub_client", "hub_push"},
    "hf_hub_download": set(),
    "snapshot_download": {"hub"},
    "upload_folder": set(),
    "get_session": {"hub", "hub_client"},
    "httpx": set(),
    "requests": set(),
    "socket": set(),
    "urlopen": set(),
    "create_commit": {"hub_push"},
    "O_CREAT": {"disk"},
    "fsync": {"disk"},
    "mkdir": {"disk"},
    "posix_fallocate": {"disk"},
    "rmtree": {"disk"},
    "chmod": set(),
    "pwrite": set(),
    "save_file": set(),
    "symlink": set(),
    "truncate": set(),
    "unlink": set(),
    "ctypes": {"kernels", "disk"},
    "import_module": set(),
    "__import__": set(),
    "exec": set(),
    "eval": set(),
}
# `eval` is also a method of every torch module.
METHODS = {"eval"}

LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
KERNEL_LEVEL = {part: level for level, parts in enumerate(INSIDE_KERNELS) for part in parts}
TREES = {
    path.relative_to(PACKAGE).with_suffix("").parts: ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
}
FILES = pytest.mark.parametrize("file", sorted(TREES), ids="/".join)


def own_imports(tree):
    """Yield (dotted parts below the package, node) for each own name a tree imports; () is the package itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}".split(".") for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        else:
            continue
        yield from ((tuple(rest), node) for package, *rest in names if package == "mono_quant")


def identifiers(tree):
    """Yield every name, attribute and import of a tree, with True for attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id, False
        elif isinstance(node, ast.Attribute):
            yield node.attr, True
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                for part in f"{getattr(node, 'module', '') or ''}.{alias.name}".split("."):
                    yield part, False


def torch_chains(tree):
    """Yield dotted names that start at torch, as in `torch._C.thing`, imports included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            parts = []
            while isinstance(node, ast.Attribute):
                parts.append(node.attr)
                node = node.value
            if isinstance(node, ast.Name) and node.id == "torch":
                yield ["torch", *reversed(parts)]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            yield from ([*node.module.split("."), alias.name] for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (n.split(".") for n in (a.name for a in node.names) if n.split(".")[0] == "torch")


def test_every_room_has_a_layer():
    rooms = {file[0] for file in TREES}
    assert rooms - LEVEL.keys() == set(), "give the new rooms a line in LAYERS, by what they import"
    assert LEVEL.keys() - rooms == set(), "these rooms are gone: take them out of LAYERS"
    parts = {file[1] for file in TREES if file[0] == "kernels"}
    assert parts == KERNEL_LEVEL.keys(), "INSIDE_KERNELS is out of date"
    assert sum(map(len, LAYERS)) == len(LEVEL), "a room is listed twice"


@FILES
def test_imports_point_down(file):
    wrong = []
    for target, node in own_imports(TREES[file]):
        room = target[0] if target and target[0] in LEVEL else "__init__"
        if file[0] == room == "kernels":
            part = target[1] if target[1:] and target[1] in KERNEL_LEVEL else "__init__"
            down = KERNEL_LEVEL[part] < KERNEL_LEVEL[file[1]]
        else:
            # from outside, kernels is one room: its parts are its own affair
            inner = room == "kernels" and target[1:] and target[1] in KERNEL_LEVEL
            down = LEVEL[room] < LEVEL.get(file[0], -1) and not inner
        if not down:
            wrong.append(f"line {node.lineno}: {'.'.join(target)}")
    assert wrong == []


@FILES
def test_no_function_imports_an_own_module(file):
    functions = [
        n for n in ast.walk(TREES[file]) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    ]
    assert [f"line {node.lineno}" for f in functions for _, node in own_imports(f)] == []


@FILES
def test_each_effect_stays_in_its_rooms(file):
    wrong = {
        name
        for name, is_attribute in identifiers(TREES[file])
        if name in EFFECTS and file[0] not in EFFECTS[name] and not (is_attribute and name in METHODS)
    }
    if file == ("kernels", "build"):
        pytest.skip("runs when the package is installed")
    assert wrong == set()


@FILES
def test_no_file_is_opened_for_writing_by_mode(file):
    calls = [n for n in ast.walk(TREES[file]) if isinstance(n, ast.Call)]
    opens = [c for c in calls if getattr(c.func, "id", getattr(c.func, "attr", "")) in ("open", "fdopen")]
    given = [
        a.value
        for c in opens
        for a in (*c.args, *(k.value for k in c.keywords))
        if isinstance(a, ast.Constant)
    ]
    assert [m for m in given if isinstance(m, str) and len(m) < 4 and set(m) & set("wax+")] == []


@FILES
def test_private_torch_and_compiled_ops_are_used_in_kernels_alone(file):
    private = {
        ".".join(chain)
        for chain in torch_chains(TREES[file])
        if any(part.startswith("_") and not part.startswith("__") for part in chain) or "ops" in chain
    }
    assert private == set() or file[0] == "kernels"


@FILES
def test_heavy_packages_are_imported_where_they_are_used(file):
    heavy = {"transformers", "sentence_transformers", "diffusers", "accelerate", "peft", "compressed_tensors"}
    at_top = set()
    for node in TREES[file].body:
        if isinstance(node, ast.Import):
            at_top |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            at_top.add(node.module.split(".")[0])
    assert at_top & heavy == set()


def test_an_upward_import_and_a_hidden_one_would_be_seen():
    tree = ast.parse("def f():\n    from mono_quant import api\n    import mono_quant.kernels.cpu\n")
    assert [target for target, _ in own_imports(tree)] == [("api",), ("kernels", "cpu")]
    chains = ast.parse("import torch\nfrom torch import _C\ntorch._int_mm(1)\ntorch.ops.x.y(2)\n")
    assert [".".join(c) for c in torch_chains(chains)][1:3] == ["torch._C", "torch._int_mm"]


def test_each_check_has_something_to_find():
    everything = {name for tree in TREES.values() for name, _ in identifiers(tree)}
    assert {n for n, rooms in EFFECTS.items() if rooms} - everything == set(), (
        "an allowance that nobody needs"
    )
    assert any("ops" in chain for chain in torch_chains(TREES["kernels", "__init__"]))
    assert any(target[:1] == ("errors",) for target, _ in own_imports(TREES[("numerics",)]))
