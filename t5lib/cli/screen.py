"""How the commands speak: results on stdout, notes and errors on stderr."""

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from t5lib.utils.errors import printable

console = Console(highlight=False)
notes = Console(stderr=True, highlight=False)
WIDE = 200


def note(text: str) -> None:
    """A remark that is not part of the result; it may quote names of files."""
    _print(notes, Text(printable(text), "dim"))


def error(text: str) -> None:
    _print(notes, Text.assemble(("error: ", "bold red"), (text, "red")))


def say(text: str) -> None:
    """A paragraph of the result."""
    _print(console, Text(text))


def facts(rows: Iterable[tuple[str, str]]) -> None:
    """Names and what there is to say about them, in two columns; never broken, so that paths can be copied."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        console.print(Text.assemble((f"{name:<{width}}   ", "bold"), value), soft_wrap=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """The first column is names, the others are numbers."""
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        drawn.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        drawn.add_row(*row)
    wide_enough = console if console.is_terminal else Console(file=console.file, width=WIDE)  # a file has room for all
    wide_enough.print(drawn)


def counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def ranges(numbers: Sequence[int]) -> str:
    """Increasing numbers, short: 0 1 2 5 is "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _print(where: Console, text: Text) -> None:
    """Wrapped at words in a terminal; left in one line for files and pipes."""
    where.print(text, soft_wrap=not where.is_terminal)
