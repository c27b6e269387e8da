"""Doing something when a neighbour is imported: we know it, and nobody who does not use it pays for that.

Imports nothing but the standard library, as it runs with every `import mono_quant`.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_waiting: dict[str, list[Callable[[], None]]] = defaultdict(list)


def when_imported(name: str, then: Callable[[], None]) -> None:
    """Run `then` as soon as a module has been imported: now, where it has been already.

    Args:
        name: full name of the module.
        then: takes nothing; what it raises comes out of the import.
    """
    module = sys.modules.get(name)
    if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
        then()
        return
    _waiting[name].append(then)
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


class _Finder(MetaPathFinder):
    """Lets the others find a module, and has its loader tell when it is there."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _waiting:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if find is None else find(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    _tell_when_executed_(spec.loader, name)
                return spec
        return None


def _tell_when_executed_(loader: Any, name: str) -> None:
    # an attribute of this one loader: its class, and what others ask of it, stay as they are
    loader.exec_module = partial(_execute, loader, name)


def _execute(loader: Any, name: str, module: ModuleType) -> None:
    del loader.exec_module
    loader.exec_module(module)
    for then in _waiting.pop(name, ()):
        then()


_FINDER = _Finder()
