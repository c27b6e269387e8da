"""Reading the code of a forward: what it writes into, moves or replaces, from its module on.

Reading follows a module's own methods, `super()`, and plain functions that weights are passed to. What it cannot see, it does
not report, and what is done in training only does not count.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary

from torch import Tensor, nn

# Attribute names from a module on; `*` stands for one name, `**` for one or more.
Path = tuple[str, ...]
Paths = frozenset[Path]
_NONE: Paths = frozenset()
_SELF: Paths = frozenset({()})

# Attributes and methods of a tensor that give the same memory, or may.
_VIEWS = frozenset({"data", "T", "mT", "real"})
_SAME = frozenset({
    "bfloat16", "chunk", "contiguous", "detach", "diagonal", "double", "expand", "flatten", "float", "half", "movedim",
    "narrow", "permute", "requires_grad_", "reshape", "select", "split", "squeeze", "t", "to", "transpose", "type_as",
    "unbind", "unsqueeze", "view", "view_as",
})  # fmt: skip
# Methods of a module that give what lies below it, and functions that hand on what they get.
_BELOW = {
    "parameters": "**", "named_parameters": "**", "buffers": "**", "named_buffers": "**", "modules": "**",
    "named_modules": "**", "children": "*", "named_children": "*", "values": "*", "items": "*",
}  # fmt: skip
_THROUGH = frozenset({"enumerate", "iter", "list", "reversed", "sorted", "tuple", "zip"})
# Methods of a module that change the memory of everything in it.
_CASTS = frozenset({"bfloat16", "cpu", "cuda", "double", "float", "half", "to", "type"})
_NO_WRITE = frozenset({"requires_grad_", "share_memory_"})
# Calls that are followed for one class: a bound on what foreign code can cost.
_MOST_CALLS = 100
# What was read, by class and code: a function would keep alive what it closes over.
_READ: WeakKeyDictionary[type, dict[CodeType, Paths]] = WeakKeyDictionary()


def written_paths(function: Any, cls: type[nn.Module]) -> Paths:
    """Return what a function writes into that gets a module of the class `cls` as its first argument.

    Args:
        function: a forward or a hook; what has no code in Python, or no source, writes into nothing.
        cls: the class whose methods `self` and `super()` mean.
    """
    function = _plain(function)
    if function is None:
        return _NONE
    read = _READ.setdefault(cls, {})
    if function.__code__ not in read:
        reader = _Reader(cls)
        reader.follow(function, reader.definer(function), [_SELF], {})
        read[function.__code__] = frozenset(reader.written)
    return read[function.__code__]


def dtypes_asked_for(module: nn.Module) -> list[nn.Module]:
    """Return the modules whose `dtype` the forward of `module` asks for, where that is computed: transformers looks at one parameter."""
    function = _plain(type(module).forward)
    node = None if function is None else _definition(function.__code__)
    asked = [part.value for part in ast.walk(node) if _is_dtype(part)] if node is not None else []
    parts = [_below(module, ast.unparse(value)) for value in asked]
    return [p for p in parts if p is not None and isinstance(getattr(type(p), "dtype", None), property)]


def _is_dtype(part: ast.AST) -> TypeGuard[ast.Attribute]:
    return isinstance(part, ast.Attribute) and part.attr == "dtype"


def _below(module: nn.Module, text: str) -> nn.Module | None:
    """Return what `self.a.b` means in a method of `module`; None where that is no module."""
    own, *names = text.split(".")
    found: nn.Module | None = module if own == "self" else None
    for name in names:
        found = None if found is None else dict(found.named_children()).get(name)
    return found


@lru_cache(maxsize=256)
def _definition(code: CodeType) -> ast.FunctionDef | None:
    try:
        node = ast.parse(textwrap.dedent(inspect.getsource(code))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    return node if isinstance(node, ast.FunctionDef) else None


class _Reader(ast.NodeVisitor):
    """Collects in `written` the paths that functions write into, from the module on whose `forward` is read."""

    def __init__(self, cls: type[nn.Module]) -> None:
        self.written: set[Path] = set()
        self._cls = cls
        self._done: set[Any] = set()
        # of the function that is being read: what its variables stand for, its globals, and the class that defines it
        self._known: dict[str, Paths] = {}
        self._globals: dict[str, Any] = {}
        self._owner: type = cls

    def definer(self, function: FunctionType) -> type:
        """Return the class that defines a method."""
        classes = (c for c in self._cls.__mro__ if _plain(vars(c).get(function.__name__)) is function)
        return next(classes, self._cls)

    def follow(
        self, function: FunctionType, owner: type, given: Sequence[Paths], named: Mapping[str, Paths]
    ) -> None:
        """Read a function of the class `owner` that is called with what `given` and `named` say."""
        node = _definition(function.__code__)
        key = (function.__code__, tuple(given), tuple(named.items()))
        if node is None or key in self._done or len(self._done) > _MOST_CALLS:
            return
        self._done.add(key)
        before = self._known, self._globals, self._owner
        names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
        self._known = dict(zip(names, given, strict=False)) | dict(named)
        self._globals, self._owner = function.__globals__, owner
        self._visit_all(node.body)
        self._known, self._globals, self._owner = before

    def _visit_all(self, nodes: Iterable[ast.AST]) -> None:
        for node in nodes:
            self.visit(node)

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        self._visit_all(() if _is_training(node.test) else node.body)
        opposite = isinstance(node.test, ast.UnaryOp) and _is_training(node.test.operand)
        self._visit_all(() if opposite else node.orelse)

    def visit_For(self, node: ast.For) -> None:
        self.visit(node.iter)
        self._bind(node.target, self._elements(node.iter))
        self._visit_all((*node.body, *node.orelse))

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self.visit(node.iter)
        self._bind(node.target, self._elements(node.iter))
        self._visit_all(node.ifs)

    def _visit_generators_first(self, node: Any) -> None:
        self._visit_all(node.generators)
        self._visit_all([node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt])

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _visit_generators_first

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            self._assign(target, node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)
            self._assign(node.target, node.value)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.visit(node.value)
        self._assign(node.target, node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.visit(node.value)
        self.written |= self._paths(node.target)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        given = [self._paths(argument) for argument in node.args]
        named = {k.arg: self._paths(k.value) for k in node.keywords if k.arg}
        self.written |= named.get("out", _NONE)
        match node.func:
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr=name):
                above = self._cls.__mro__[self._cls.__mro__.index(self._owner) + 1 :]
                self._follow_method(above, name, given, named)
            case ast.Attribute(value=value, attr=name):
                base = self._paths(value)
                if () in base:
                    self._follow_method(self._cls.__mro__, name, given, named)
                self._note_method(base, name)
                if self._is_library(value):
                    self._note_function(name, given)
            case ast.Name(id="setattr") if len(node.args) == 3:
                self.written |= self._attribute(node.args[0], node.args[1])
            case ast.Name(id=name):
                self._note_function(name, given)
                function = self._globals.get(name)
                if any((*given, *named.values())):
                    self._follow(function, self._owner, given, named)

    def _follow_method(
        self, classes: Iterable[type], name: str, given: Sequence[Paths], named: Mapping[str, Paths]
    ) -> None:
        owner = next((cls for cls in classes if name in vars(cls)), object)
        method = vars(owner).get(name)
        if isinstance(method, staticmethod):
            self._follow(method, owner, given, named)
        else:
            self._follow(method, owner, [_SELF, *given], named)

    def _follow(self, function: Any, owner: type, given: Sequence[Paths], named: Mapping[str, Paths]) -> None:
        function = _plain(function)
        # what torch itself does to weights depends on arguments (max_norm), and is known
        if function is not None and not function.__module__.startswith("torch."):
            self.follow(function, owner, given, named)

    def _note_method(self, base: Paths, name: str) -> None:
        if _is_in_place(name) and hasattr(Tensor, name):
            self.written |= base
        elif name in _CASTS:
            # of a tensor these make another one
            self.written |= {(*path, "**") for path in base}

    def _note_function(self, name: str, given: Sequence[Paths]) -> None:
        if _is_in_place(name) and given:
            self.written |= given[0]

    def _is_library(self, node: ast.AST) -> bool:
        while isinstance(node, ast.Attribute):
            node = node.value
        return isinstance(node, ast.Name) and isinstance(self._globals.get(node.id), ModuleType)

    def _assign(self, target: ast.AST, value: ast.AST) -> None:
        match target, value:
            case ast.Tuple(elts=targets), ast.Tuple(elts=values) if len(targets) == len(values):
                for one, other in zip(targets, values, strict=True):
                    self._assign(one, other)
            case _:
                self._bind(target, self._paths(value))

    def _bind(self, target: ast.AST, paths: Paths) -> None:
        match target:
            case ast.Name(id=name):
                self._known[name] = paths
            case ast.Tuple(elts=targets) | ast.List(elts=targets):
                for one in targets:
                    self._bind(one, paths)
            case ast.Starred(value=value):
                self._bind(value, paths)
            case ast.Attribute(value=value, attr=name):
                base = self._paths(value)
                self.written |= base if name == "data" else {(*path, name) for path in base}
            case ast.Subscript():
                self.written |= self._paths(target)

    def _paths(self, node: ast.AST) -> Paths:
        """Return what an expression may stand for, as far as it is part of the module."""
        match node:
            case ast.Name(id=name):
                return self._known.get(name, _NONE)
            case ast.Attribute(value=value, attr=name):
                base = self._paths(value)
                return base if name in _VIEWS else _append(base, name)
            case ast.Subscript(value=value):
                # a row of a tensor, or a module of a list
                base = self._paths(value)
                return base | _append(base, "*")
            case ast.Call(func=ast.Attribute(value=value, attr=name)):
                base = self._paths(value)
                return base if name in _SAME else _append(base, _BELOW[name]) if name in _BELOW else _NONE
            case ast.Call(func=ast.Name(id="getattr"), args=[value, name, *_]):
                return self._attribute(value, name)
            case ast.Call(func=ast.Name(id=name), args=values) if name in _THROUGH:
                return self._union(values)
            case ast.IfExp(body=one, orelse=other):
                return self._union((one, other))
            case ast.BoolOp(values=values) | ast.Tuple(elts=values) | ast.List(elts=values):
                return self._union(values)
            case ast.NamedExpr(value=value) | ast.Starred(value=value):
                return self._paths(value)
        return _NONE

    def _elements(self, node: ast.AST) -> Paths:
        """Return what a loop over an expression may give."""
        match node:
            case ast.Call(func=ast.Name(id=name), args=values) if name in _THROUGH:
                return frozenset().union(*(self._elements(value) for value in values))
            case ast.Call(func=ast.Attribute(attr=name)) if name in _BELOW:
                return self._paths(node)
            case ast.Tuple() | ast.List():
                return self._paths(node)
        base = self._paths(node)
        return base | _append(base, "*")

    def _union(self, nodes: Iterable[ast.AST]) -> Paths:
        return frozenset().union(*(self._paths(node) for node in nodes))

    def _attribute(self, value: ast.AST, name: ast.AST) -> Paths:
        known = name.value if isinstance(name, ast.Constant) else None
        return _append(self._paths(value), known) if isinstance(known, str) else _NONE


def _plain(thing: Any) -> FunctionType | None:
    """Return the function in decorators, a method or a static method; None for what has no code in Python."""
    thing = thing.__func__ if isinstance(thing, (staticmethod, MethodType)) else thing
    thing = inspect.unwrap(thing) if callable(thing) else None
    return thing if isinstance(thing, FunctionType) else None


def _append(paths: Paths, name: str) -> Paths:
    return frozenset((*path, name) for path in paths)


def _is_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__") and name not in _NO_WRITE


def _is_training(test: ast.AST) -> bool:
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
        return any(_is_training(value) for value in test.values)
    return isinstance(test, ast.Attribute) and test.attr == "training"
