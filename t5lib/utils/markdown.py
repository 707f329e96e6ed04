"""Tables in Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, numbers: bool = False) -> list[str]:
    """The lines of a table; a cell that is None stays empty.

    Args:
        numbers: align all columns but the first to the right.
    """
    rule = ["---", *(["--:" if numbers else "---"] * (len(columns) - 1))]
    lines = [columns, rule, *rows]
    return [f"| {' | '.join('' if cell is None else str(cell) for cell in line)} |" for line in lines]
