"""What the patterns ask of a captured graph, and how they change it.

A replaced node is computed where another one stood. That is the same only if nothing was written in between, so each pattern asks
`undisturbed`; and nodes without users are erased one by one, as a method that writes (`index_copy_`) has none either.
"""

import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from mono_quant import kernels

_IN_PLACE = (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
)
_WRITERS = {operator.setitem, operator.delitem, *(getattr(operator, f"i{name}") for name in _IN_PLACE)}
# which say "_" at the end or the beginning of their name and write nothing
_HARMLESS = {operator.and_, operator.or_, operator.not_, operator.is_}


def value(node: Any) -> Tensor | None:
    """Return the fake tensor that was seen at a node; None where it is no tensor."""
    seen = node.meta.get("example_value") if isinstance(node, Node) else None
    return seen if isinstance(seen, Tensor) else None


def is_fusable(*nodes: Any) -> bool:
    """Say whether all of them are tensors that fused calls take: of one dtype, on one device."""
    seen = [value(node) for node in nodes]
    kinds = {None if t is None else (t.dtype, t.device) for t in seen}
    return len(kinds) == 1 and all(t is not None and kernels.is_fusable(t) for t in seen)


def is_call(node: Any, *functions: Any) -> bool:
    """Say whether a node calls one of these functions."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in functions


def is_method(node: Any, *names: str) -> bool:
    """Say whether a node calls a method of one of these names."""
    return isinstance(node, Node) and node.op == "call_method" and node.target in names


def is_cast(node: Any) -> bool:
    """Say whether a node gives its first argument in another dtype and nothing else."""
    if not is_method(node, "to", "float", "half", "bfloat16", "type_as") or node.kwargs.keys() - {"dtype"}:
        return False
    before, after = value(node.args[0]), value(node)
    return before is not None and after is not None and before.device == after.device


def has_one_user(node: Node) -> bool:
    """Say whether one node alone uses this one."""
    return len(node.users) == 1


def only_user(node: Node) -> Node | None:
    """Return the one node that uses this one; None where there are more, or none."""
    return next(iter(node.users)) if has_one_user(node) else None


def same_size(one: Any, other: Any) -> bool:
    """Say whether two sizes are the same for every input of the graph; asks nothing that would narrow it."""
    if isinstance(one, int) and isinstance(other, int):
        return one == other
    # takes a second, which a process that compiles nothing has no use for
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(one == other))


def same_shape(one: Any, other: Any) -> bool:
    """Say whether two nodes have the same shape for every input of the graph."""
    a, b = value(one), value(other)
    return a is not None and b is not None and a.dim() == b.dim() and all(map(same_size, a.shape, b.shape))


def last_size(node: Any) -> int | None:
    """Return the size of the last dimension where it is a constant."""
    seen = value(node)
    size = seen.shape[-1] if seen is not None and seen.dim() else None
    return size if isinstance(size, int) else None


def named(node: Node, names: Iterable[str], defaults: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the arguments of a call by name; None where it has some that are not known.

    Args:
        node: of a call.
        names: of the parameters, in order.
        defaults: of those that may be missing.
    """
    names = list(names)
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    known = len(node.args) <= len(names) and given.keys() <= set(names)
    everything = {**defaults, **given}
    return everything if known and set(names) == everything.keys() else None


def pair(node: Node) -> tuple[Node, Node] | None:
    """Return the two tensors that a sum or product is made of; None where it is made of something else."""
    if len(node.args) != 2 or node.kwargs:
        return None
    one, other = node.args
    return (one, other) if isinstance(one, Node) and isinstance(other, Node) else None


def with_number(node: Any, functions: Iterable[Any], number: float) -> Node | None:
    """Return the node that a call combines with a number; None where it is another number or call."""
    if not is_call(node, *functions) or len(node.args) != 2 or node.kwargs:
        return None
    for one, other in (node.args, node.args[::-1]):
        if (
            isinstance(one, Node)
            and isinstance(other, int | float)
            and abs(other - number) <= 1e-6 * abs(number)
        ):
            return one
    return None


def undisturbed(*nodes: Node) -> bool:
    """Say whether nothing is written, and no mode changes, between the first and the last of some nodes."""
    first, last = min(nodes), max(nodes)
    node = first.next
    while node is not last and first is not last:
        if node not in nodes and is_barrier(node):
            return False
        node = node.next
    return True


def is_barrier(node: Node) -> bool:
    """Say whether a node may write into a tensor or change how the following ones run."""
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or name.startswith(("__i", "__set"))
    if node.op != "call_function":
        return bool(node.op == "call_module")
    target: Any = node.target
    if target in _HARMLESS:
        return False
    name = getattr(target, "__name__", "")
    return (
        target in _WRITERS
        or "out" in node.kwargs
        # functions that run whole graphs; functions of torch that switch modes have private names, those that write end in "_"
        or getattr(target, "namespace", None) == "higher_order"
        or (name.startswith("_") and not name.startswith("__"))
        or (name.endswith("_") and not name.endswith("__"))
        or _has_written_argument(node)
        or _schema_writes(target)
    )


def _has_written_argument(node: Node) -> bool:
    target: Any = node.target
    if target is F.batch_norm:
        return _argument(node, 5, "training", False) is not False
    if target is F.embedding:
        return _argument(node, 3, "max_norm", None) is not None
    place = _place_of_inplace(target)
    return place is not None and _argument(node, place, "inplace", False) is not False


def _argument(node: Node, place: int, name: str, default: Any) -> Any:
    return node.kwargs.get(name, node.args[place] if len(node.args) > place else default)


@functools.cache
def _place_of_inplace(function: Callable[..., Any]) -> int | None:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        # written in C, where names tell
        return None
    return names.index("inplace") if "inplace" in names else None


@functools.cache
def _schema_writes(target: Any) -> bool:
    packet = (
        [getattr(target, name) for name in target.overloads()] if hasattr(target, "overloads") else [target]
    )
    schemas = [schema for one in packet if (schema := getattr(one, "_schema", None)) is not None]
    return any(schema.is_mutable for schema in schemas)


def replace(
    old: Node, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> Node:
    """Put a call in the place of a node; what only the old one used is erased."""
    with old.graph.inserting_before(old):
        new = old.graph.call_function(function, args, kwargs or {})
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
    erase(old)
    return new


def insert(
    before: Node,
    function: Callable[..., Any] | str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
) -> Node:
    """Put a call of a function, or of a method by its name, in front of a node."""
    graph = before.graph
    make: Any = graph.call_method if isinstance(function, str) else graph.call_function
    with graph.inserting_before(before):
        made: Node = make(function, args, kwargs or {})
    return made


def skip(node: Node, instead: Node) -> None:
    """Let the users of a node use another one, and erase it."""
    node.replace_all_uses_with(instead)
    erase(node)


def erase(node: Node) -> None:
    """Erase a node whose work is done elsewhere, and what only it used; what writes is no concern of its users, and stays."""
    inputs = list(node.all_input_nodes)
    node.graph.erase_node(node)
    for one in inputs:
        if not one.users and one.op != "placeholder" and not is_barrier(one):
            erase(one)
