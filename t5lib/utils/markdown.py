"""Tables in Markdown, and pages that hold some between words of people."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from t5lib.utils.files import write_text

MADE = re.compile(r"(?<=<!-- made -->\n).*(?=<!-- /made -->)", re.DOTALL)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, numbers: bool = False) -> list[str]:
    """The lines of a table; a cell that is None stays empty.

    Args:
        numbers: align all columns but the first to the right.
    """
    rule = ["---", *(["--:" if numbers else "---"] * (len(columns) - 1))]
    lines = [columns, rule, *rows]
    return [f"| {' | '.join('' if cell is None else str(cell) for cell in line)} |" for line in lines]


def write_page(path: Path, text: str) -> None:
    """Write `text`, whose first line is its title, to `path`.

    Where a page with the marks `<!-- made -->` and `<!-- /made -->` is there, only what is between them is replaced, by
    the text without its title: people wrote the rest.
    """
    page = path.read_text(encoding="utf-8") if path.is_file() else ""
    if MADE.search(page):
        body = text.partition("\n")[2].strip()
        text = MADE.sub(lambda _: f"\n{body}\n\n", page)
    write_text(path, text)
