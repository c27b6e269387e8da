"""What people read, in parts: lines, and columns that a front end may lay out in its own way."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias


@dataclass(frozen=True)
class Columns:
    """Some rows whose cells stand below each other.

    Attributes:
        rows: of equally many cells.
        head: names of the columns; none for rows that need none.
        right: which columns hold numbers.
        aligned: False for text whose cells follow each other, each as wide as it is.
    """

    rows: Sequence[Sequence[str]]
    head: Sequence[str] = ()
    right: frozenset[int] = field(default=frozenset())
    aligned: bool = True

    def lines(self) -> Iterator[str]:
        """Yield the rows as text, with two spaces between columns."""
        table = [self.head, *self.rows] if self.head else self.rows
        widths = [max(map(len, cells)) if self.aligned else 0 for cells in zip(*table, strict=True)]
        for row in table:
            cells = (
                cell.rjust(width) if i in self.right else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            yield "  ".join(cells).rstrip()


Part: TypeAlias = str | Columns


def plain(parts: Iterable[Part]) -> str:
    """Return parts as text without colours, for a pipe or a file."""
    return "\n".join(
        line for part in parts for line in (part.lines() if isinstance(part, Columns) else (part,))
    )
