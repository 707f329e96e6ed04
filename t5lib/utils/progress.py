"""One progress display for every long step: a live bar in a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from t5lib.utils.processes import leads

LOG_EVERY_SECONDS = 15.0


class StepReporter:
    """Tells how far a step of the work is; `advance` takes the count done and values worth showing."""

    def __init__(self, title: str, total: int, start: int, bar: Progress | None):
        self.title, self.total, self.bar = title, total, bar
        self.start, self.begun, self.spoken = start, time.monotonic(), time.monotonic()
        self.task = bar.add_task(title, total=total, completed=start, values="") if bar else None

    def advance(self, done: int, **values: float) -> None:
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self.bar and self.task is not None:
            fields: dict[str, Any] = {"values": shown} if shown else {}
            self.bar.update(self.task, completed=done, **fields)
            return
        now = time.monotonic()
        if done == self.total or now - self.spoken > LOG_EVERY_SECONDS:
            self.spoken = now
            left = (now - self.begun) / max(done - self.start, 1) * (self.total - done)
            remaining = f"about {left:.0f} s left" if done < self.total else ""
            print("  ".join(filter(None, (f"{self.title}: {done}/{self.total}", shown, remaining))), flush=True)


class Silent(StepReporter):
    """Progress that is not shown."""

    def __init__(self) -> None:
        pass

    def advance(self, done: int, **values: float) -> None:
        pass


@contextmanager
def progress(title: str, total: int, start: int = 0) -> Iterator[StepReporter]:
    """Show `title` with a bar of `total` steps, `start` of them done before; a log names that start.

    Of several processes that work together the first shows it.
    """
    if not leads():
        yield Silent()
        return
    if not sys.stderr.isatty():
        if start:
            print(f"{title}: resumed at step {start} of {total}", flush=True)
        yield StepReporter(title, total, start, None)
        return
    columns = (
        TextColumn("{task.description}", markup=False),  # it may hold a name from a file
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[values]}"),
    )
    with Progress(*columns) as bar:
        yield StepReporter(title, total, start, bar)
