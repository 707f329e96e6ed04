"""Ctrl-C without damage: it waits until the work can be stopped."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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
