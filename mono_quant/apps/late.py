"""Modules that are imported when they are needed: `--help` and completion must not wait for torch."""

from importlib import import_module
from typing import Any


class Late:
    """Stands for a module, which is imported when one of its names is asked for first.

    Args:
        name: of the module.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self._name), name)
