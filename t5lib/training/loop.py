"""The loop that every fit runs in: steps, their progress and log, Ctrl-C between steps, checkpoints, what is done."""

import math
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from t5lib.utils.errors import T5Error
from t5lib.utils.progress import progress

Log = Callable[[dict[str, float], int], None]  # values worth a curve, and the step


@dataclass
class Done:
    """How far a fit is: steps done and seconds spent, in earlier runs too, and the last loss reported."""

    step: int = 0
    seconds: float = 0.0
    loss: float = math.nan


class Work(ABC):
    """What `run_steps` runs. A subclass holds model, optimizer and data."""

    done: Done

    @abstractmethod
    def step(self) -> dict[str, float]:
        """Do one step. Returns what is worth telling, "loss" first; nothing where reading it would cost time."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write a checkpoint that is whole or not there."""

    def over(self, total: int) -> bool:
        return self.done.step >= total

    def any_process(self, holds: bool) -> bool:
        """Whether it holds in any process: all must stop after the same step."""
        return holds


def run_steps(work: Work, *, title: str, total: int, resume_dir: Path | None, every: int, log: Log | None) -> None:
    """Run the steps that are not done yet.

    Args:
        total: steps in all, those done before included.
        resume_dir: where checkpoints go, every so many (`every`) steps, after the last, and when it is interrupted;
            None for none.

    Raises:
        KeyboardInterrupt: Ctrl-C, at the end of a step and after a checkpoint.
    """
    if log is not None and not callable(log):
        raise T5Error(f"log is {log!r:.60}; expected a function of values and step, or None")
    with progress(title, total, work.done.step) as bar, deferred_interrupt() as interrupted:
        while not work.over(total):
            begun = time.monotonic()
            try:
                told = work.step()
                work.done.step += 1
                work.done.seconds += time.monotonic() - begun
            except RuntimeError:
                if not interrupted():
                    raise
                told = {}  # Ctrl-C reached the processes of a loader too, and ended them: this step was not done
            if told:
                work.done.loss = told["loss"]
                bar.advance(work.done.step, loss=told["loss"])
                if log:
                    log(told, work.done.step)
            stop = work.any_process(interrupted())
            if resume_dir and (stop or work.done.step % every == 0 or work.over(total)):
                work.save(resume_dir)
            if stop:
                raise KeyboardInterrupt


def warmed_up(step: int, warmup: float) -> float:
    """The part of a peak rate at `step` (from 0) of a linear warm-up of `warmup` steps; 1 after it."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def cosine(part: float, end: float = 0.0) -> float:
    """A cosine from 1 at `part` 0 to `end` at `part` 1."""
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * part))


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether Ctrl-C was pressed; a second Ctrl-C raises KeyboardInterrupt at once.

    Covers the signals that would raise KeyboardInterrupt here (SIGINT, and SIGTERM where a program wants it so); none
    outside the main thread, which alone gets signals.
    """
    received: list[int] = []

    def remember(number: int, frame) -> None:
        if received:
            signal.default_int_handler(number, frame)
        received.append(number)

    main = threading.current_thread() is threading.main_thread()
    candidates = (signal.SIGINT, signal.SIGTERM) if main else ()
    covered = [number for number in candidates if signal.getsignal(number) is signal.default_int_handler]
    for number in covered:
        signal.signal(number, remember)
    try:
        yield lambda: bool(received)
    finally:
        for number in covered:
            signal.signal(number, signal.default_int_handler)
