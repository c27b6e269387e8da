"""Imports point down the layers; terminal, network, disk and private torch ops are each touched in few rooms."""

import ast
from pathlib import Path

import pytest

import mono_quant

PACKAGE = Path(mono_quant.__file__).parent
# A room imports only from lines above its own: from folders further up, and in its folder from rooms further up.
# A new room has to be given a line here.
ROOMS = {
    "": [["errors", "version"]],
    "io": [["text", "phases", "memory"]],
    "io/disk": [
        ["reading", "allowed"],
        ["json_text", "disk"],
        ["manifest", "staging"],
        ["targets"],
        ["output"],
    ],
    "io/tensors": [
        ["headers"],
        ["tensor_file"],
        ["shards"],
        ["pickles", "listing"],
        ["checkpoint"],
        ["blockwise"],
    ],
    "io/hub": [
        ["patience", "metadata", "xet"],
        ["client"],
        ["repo"],
        ["ranges", "fetching", "uploads"],
        ["target"],
        ["push"],
        ["branch"],
    ],
    "kernels": [
        ["activations", "steps"],
        ["reference", "weights", "build", "inputs", "pool", "starvation", "watching"],
        ["cpu", "weight_only"],
        ["accelerators"],
        ["choice", "packs"],
        ["encoding", "paths", "attention"],
        ["library"],
        ["transforms"],
        ["ops", "experts"],
        ["composed"],
        ["device_chains"],
        ["captured", "fused", "fused_conv", "recurrent", "program"],
        ["recording"],
    ],
    "kernels/gpu": [
        ["codes", "features", "geometry", "overlap", "tiles"],
        ["numerics", "launch", "tables"],
        ["replay"],
        ["pointwise", "fields", "depthwise", "embedding", "encoding", "large", "few"],
        ["quantize", "patches", "products", "routed"],
        ["prologues", "convolution", "experts"],
        ["chains"],
        ["path"],
    ],
    "graphs": [
        ["matching"],
        ["layouts", "parts"],
        ["cleaning", "activations", "norms", "rotary", "attention"],
        ["products", "convolutions"],
        ["prologues"],
        ["runs"],
        ["backend"],
    ],
    "planning": [
        ["rules", "tables", "forward_code"],
        ["schemes"],
        ["config", "kinds", "writes", "report"],
        ["walk"],
        ["layers", "rows", "suggestion"],
    ],
    "stream": [
        ["spec", "supply", "members"],
        ["layout", "blocks", "crew", "ledger", "stages", "twins", "hub_supply", "hub_delivery"],
        ["bench", "workspace", "work"],
        ["shard"],
    ],
    "convert": [
        ["computed", "snapshot", "elsewhere"],
        ["stored", "untouched"],
        ["forwards", "recurrent", "probes", "filling"],
        ["int8_layers", "half_layers", "fidelity", "surgery", "diffusion_probes"],
        ["int8_recurrent", "savers", "crest", "offloaded"],
        ["contract"],
        ["halves"],
        ["kept"],
        ["int8", "half"],
        ["arrival"],
        ["schemes"],
    ],
    "hf": [
        ["making", "stacking"],
        ["configs", "names", "methods", "processors", "computed", "late", "encoders"],
        ["dtypes", "compressed_tensors", "adapters", "attention", "fp8", "padding"],
        ["quantizer"],
        ["models"],
        ["state", "sentence", "around", "apart", "described", "placing"],
        ["remedies", "diffusion"],
        ["floats", "ties", "arithmetic"],
        ["marks"],
    ],
    "sources": [["origin", "guards"], ["source"], ["folder"], ["remote"], ["opening"], ["streamed"]],
    "artifact": [
        ["layouts", "card_text", "buffers", "changes"],
        ["cards"],
        ["facts", "merging", "proposal"],
        ["tensors"],
        ["saving", "loading"],
        ["inspection", "publishing"],
        ["keeping"],
    ],
    "api": [
        ["measuring"],
        ["result"],
        ["recipe", "origins", "apart"],
        ["stream_plan"],
        ["delivery", "on_load", "streaming"],
        ["verbs", "diffusion_on_load", "enabled"],
    ],
    "apps": [
        ["interrupt", "late"],
        ["colours"],
        ["screen"],
        ["progress"],
        ["commands"],
        ["usage"],
        ["cli"],
    ],
}
# From outside, arithmetic is one room: only its definitions may be named beside it.
KERNELS_SEEN = {"__init__", "weights"}
# What only these rooms may name.
EFFECTS = {
    "print": {"apps/interrupt", "apps/usage", "apps/screen", "apps/colours", "apps/progress"},
    "breakpoint": set(),
    "HfApi": {"io/hub/repo", "io/hub/client", "io/hub/ranges", "io/hub/fetching"},
    "hf_hub_download": {"io/hub/fetching"},
    "snapshot_download": {"io/hub/repo"},
    "upload_folder": set(),
    "get_session": {"io/hub/ranges", "io/hub/patience"},
    "httpx": set(),
    "requests": set(),
    "socket": set(),
    "urlopen": set(),
    "create_commit": {"io/hub/push", "io/hub/branch"},
    "O_CREAT": {"io/disk/disk"},
    "fsync": {"io/disk/disk"},
    "mkdir": {"io/disk/disk"},
    "posix_fallocate": {"io/disk/disk"},
    "rmtree": {"io/disk/disk"},
    "chmod": set(),
    "pwrite": {"io/disk/disk"},
    "save_file": set(),
    "symlink": set(),
    "truncate": set(),
    "unlink": {"io/disk/disk"},
    "ctypes": {
        "kernels/cpu",
        "kernels/pool",
        "kernels/packs",
        "kernels/fused",
        "kernels/attention",
        "io/disk/disk",
        "io/memory",
    },
    # torch takes a second: names of the package, and rooms of the command line, come when they are asked for; and so do the
    # kernels for devices, because Triton need not be there
    "import_module": {"__init__", "apps/late", "kernels/accelerators"},
    "__import__": set(),
    "exec": set(),
    "eval": set(),
}
# `eval` is also a method of every torch module.
METHODS = {"eval"}

RANK = {
    "/".join(filter(None, (folder, room))): (floor, line)
    for floor, (folder, lines) in enumerate(ROOMS.items())
    for line, rooms in enumerate(lines)
    for room in rooms
}
# what hands on names stands above its rooms; `__main__` runs the command line
RANK |= {"kernels/__init__": (list(ROOMS).index("kernels"), 99), "__init__": (98, 0), "__main__": (99, 0)}
TREES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
}
FILES = pytest.mark.parametrize("file", sorted(TREES))


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


def room_of(target):
    """Return the room that a dotted name below the package lies in: a file, or the names that a folder hands on."""
    for end in range(len(target), 0, -1):
        for room in ("/".join(target[:end]), "/".join((*target[:end], "__init__"))):
            if room in TREES:
                return room
    return "__init__"


def folder_of(room):
    return room.rpartition("/")[0]


def test_every_room_has_a_place():
    silent = {
        room for room, tree in TREES.items() if room.endswith("/__init__") and not list(own_imports(tree))
    }
    assert TREES.keys() - silent - RANK.keys() == set(), (
        "give the new rooms a line in ROOMS, by what they import"
    )
    assert RANK.keys() - TREES.keys() == set(), "these rooms are gone: take them out of ROOMS"
    assert sum(len(line) for lines in ROOMS.values() for line in lines) == len(RANK) - 3, (
        "a room is listed twice"
    )


def test_a_folder_hands_on_names_and_holds_no_code():
    # but the package itself: it hands its names on when they are asked for, see tests/test_exports.py
    for room, tree in TREES.items():
        if room.endswith("/__init__"):
            assert isinstance(tree.body[0], ast.Expr), f"{room} has no charter"
            rest = [node for node in tree.body[1:] if not isinstance(node, ast.ImportFrom)]
            assert all(isinstance(n, ast.Assign) and n.targets[0].id == "__all__" for n in rest), room


@FILES
def test_imports_point_down(file):
    wrong = []
    for target, node in own_imports(TREES[file]):
        room = room_of(target)
        seen = (
            not room.startswith("kernels/")
            or file.startswith("kernels/")
            or room.removeprefix("kernels/") in KERNELS_SEEN
        )
        if not (seen and RANK[room] < RANK[file]):
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
        if name in EFFECTS and file not in EFFECTS[name] and not (is_attribute and name in METHODS)
    }
    if file == "kernels/build":
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
    # the one way to see an operation before it writes
    # and what torch's documentation names for a backend
    seen = {
        "convert/untouched": {"torch.utils._python_dispatch.TorchDispatchMode"},
        # by the name that torch's functions call it
        "convert/elsewhere": {"torch._grouped_mm"},
        "graphs/backend": {
            "torch._dynamo",
            "torch._dynamo.lookup_backend",
            "torch._dynamo.register_backend",
            "torch._inductor",
            "torch._inductor.list_mode_options",
        },
    }
    assert private <= seen.get(file, set()) or file.startswith("kernels/")


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
    assert any("ops" in chain for chain in torch_chains(TREES["kernels/transforms"]))
    assert any(target[:1] == ("errors",) for target, _ in own_imports(TREES["kernels/weights"]))
