"""Locks that name their holder."""

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def exclusive(lock: Path, what: str, say: Callable[[str], None] = print) -> Iterator[None]:
    """Within, no other process of this kind is: one that comes second says who is at work, and waits.

    The lock ends with its process, however that ends; the file stays and means nothing.

    Args:
        lock: the file, which also tells who holds it.
        what: is being made, such as "stage fetch of dinov2-fashion".
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(lock)
    try:
        held.acquire(timeout=0)
    except Timeout:
        say(f"{what} is in use by {_holder(lock)}; waiting until it ends")
        held.acquire()
    try:
        with suppress(OSError):  # on a full disk the work, not the lock, has to say so
            lock.write_text(f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}: {_command()}\n")
        yield
    finally:
        held.release()


def _holder(lock: Path, patience: float = 1.0) -> str:
    """What the holder wrote; one that has only just begun gets `patience` seconds to write it."""
    end = time.monotonic() + patience
    with suppress(OSError):
        while True:
            if name := lock.read_text(errors="replace").strip():
                return name
            if time.monotonic() > end:
                break
            time.sleep(0.01)
    return "another process"


def _command() -> str:
    return " ".join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]])[:200]
