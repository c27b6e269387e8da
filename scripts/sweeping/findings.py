"""What one journey found: faults, and refusals that say what they should."""

import os
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from mono_quant import MonoQuantError

WORKS, REFUSED, FAULT, NOT_BUILT = "works", "typed refusal", "fault", "not built"


@dataclass
class Findings:
    """The findings of one class in one dtype.

    Attributes:
        entries: (verdict, check, text) in the order in which they were found.
        notes: what the reader of a fault may want to know.
    """

    entries: list[tuple[str, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def attempt(
        self, step: str, do: Callable[..., Any], *args: Any, may_refuse: bool = True, **kwargs: Any
    ) -> Any:
        """Do one step of the journey; what it raises is found, and gives None.

        Args:
            step: its name.
            do: the public function.
            *args, **kwargs: its arguments.
            may_refuse: a typed error is an answer here, and no fault.
        """
        try:
            return do(*args, **kwargs)
        except MonoQuantError as e:
            self.entries.append((REFUSED if may_refuse else FAULT, step, f"{type(e).__name__}: {_line(e)}"))
        except Exception as e:  # noqa: BLE001 - an untyped error of any kind is a fault
            self.entries.append((FAULT, step, f"{type(e).__name__}: {_line(e)} [{_place(e)}]"))
        return None

    def check(self, name: str, problems: Iterable[str]) -> None:
        """Note a check that found problems."""
        found = list(problems)
        if found:
            more = f" ... ({len(found)} in all)" if len(found) > 3 else ""
            self.entries.append((FAULT, name, "; ".join(found[:3]) + more))

    @property
    def verdict(self) -> str:
        """The worst of the entries."""
        found = {verdict for verdict, _, _ in self.entries}
        return FAULT if FAULT in found else REFUSED if REFUSED in found else WORKS


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]


def _place(error: BaseException) -> str:
    """Name the last place in mono_quant, and the last of all."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if f"{os.sep}mono_quant{os.sep}" in f.filename]
    shown = [*ours[-1:], frames[-1]]
    return " > ".join(dict.fromkeys(f"{os.path.basename(f.filename)}:{f.lineno}" for f in shown))  # noqa: PTH119
