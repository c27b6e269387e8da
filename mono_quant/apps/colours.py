"""Lines and tables on a terminal, as wide as it is and in its colours."""

import re
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mono_quant.planning.tables import Columns, Part

# a line that begins with what it is about, in a column of its own
LABELLED = re.compile(r"((made by|[a-z][a-z0-9_]*|) *)(?<= )(\S.*)")
LABEL_WIDTHS = (8, 10, 17)
STYLES = {"note": "yellow", "warning": "bold red", "ok": "green", "quantized": "green", "shared": "dim"}


def draw(parts: Iterable[Part]) -> None:
    """Print on stdout.

    Args:
        parts: lines and tables.
    """
    console = Console(highlight=False)
    for part in parts:
        shown = _table(part) if isinstance(part, Columns) else _line(part)
        # the terminal wraps what has no columns: it can be copied as one line
        console.print(shown, soft_wrap=isinstance(shown, Text))


def _table(columns: Columns) -> Table:
    table = Table(box=None, show_header=bool(columns.head), header_style="bold", pad_edge=False)
    for i in range(len(columns.rows[0])):
        head = columns.head[i] if columns.head else ""
        if i in columns.right:
            table.add_column(head, justify="right", no_wrap=True)
        else:
            table.add_column(head, overflow="fold")
    for row in columns.rows:
        table.add_row(*(_cell(cell) for cell in row))
    return table


def _cell(cell: str) -> Text:
    return Text(cell, style=STYLES.get(cell, "dim" if cell.startswith("(") else ""))


def _line(text: str) -> Table | Text:
    label = LABELLED.fullmatch(text)
    if label is None or len(label[1]) not in LABEL_WIDTHS:
        return Text(text)
    grid = Table.grid()
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(Text(label[1], style=STYLES.get(label[2], "bold")), Text(label[3]))
    return grid
