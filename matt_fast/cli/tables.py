"""Tables of figures, and what becomes of them where the terminal is too narrow."""

from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

WORDS = 13  # characters that a column of words can be wrapped to and still be read


def print_table(console: Console, table: Table) -> None:
    """Print a table; where its columns would be cut off, a few lines for each row in place of it.

    Args:
        console: where to.
        table: its first column names the rows. Columns that are not `no_wrap` hold words.
    """
    between = 2 * len(table.columns) if table.box is None else 3 * len(table.columns) + 1
    if sum(_needed(console, column) for column in table.columns) + between <= console.width:
        console.print(table)
        return
    if table.title:
        console.print(table.title, style=table.title_style or "")
    names = [" ".join(_text(column.header).plain.split()) for column in table.columns]
    for row in zip(*(column.cells for column in table.columns), strict=True):
        first, *cells = map(_text, row)
        console.print(first)
        parts = [f"{name}: {cell.plain}" for name, cell in zip(names[1:], cells, strict=True) if cell.plain]
        line = ""
        for part in parts:
            if line and cell_len(f"  {line}; {part}") > console.width:
                console.print(Text(f"  {line}"))
                line = ""
            line += f"{'; ' if line else ''}{part}"
        console.print(Text(f"  {line}"))


def _needed(console: Console, column: Column) -> int:
    widest = max(console.measure(_text(x)).maximum for x in (column.header, *column.cells))
    return widest if column.no_wrap else min(widest, WORDS)


def _text(cell: object) -> Text:
    return cell if isinstance(cell, Text) else Text(str(cell))
