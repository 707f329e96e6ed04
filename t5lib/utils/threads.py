"""What one thread records of a model must not hold what other threads, which may share the model, do with it."""

import functools
import threading
from collections.abc import Callable
from typing import Any


def of_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """`hook`, for a module's calls by the thread that calls this; those of others pass it by."""
    thread = threading.get_ident()

    @functools.wraps(hook)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs) if threading.get_ident() == thread else None

    return guarded
