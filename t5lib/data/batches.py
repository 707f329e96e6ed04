"""What training and calibration are fed with: batches from any number on, and the seeds of what is random in them."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from t5lib.utils.errors import T5Error
from t5lib.utils.seeds import derived_seed

# An iterable of batches (repeated when it ends), or a function from a batch number to an iterator from there on.
# Only the function resumes without reading again what was used.
Batches = Iterable[Any] | Callable[[int], Iterator[Any]]


def open_batches(batches: Batches, start: int) -> Iterator[Any]:
    """An endless iterator that begins with batch number `start`.

    Raises:
        T5Error: it is neither of what Batches may be, or holds no batch.
    """
    if callable(batches):
        return _endless(_iterable(_called(batches, start)), start)
    return _skipped(_repeated(_iterable(batches)), start)


def _called(batches: Callable[[int], Any], start: int) -> Any:
    try:
        inspect.signature(batches).bind(start)
    except ValueError:  # a function of C, which tells no signature
        pass
    except TypeError as error:
        raise T5Error(f"batches, a function, is called with the number of the first batch: {error}") from None
    return batches(start)


def _iterable(batches: Any) -> Iterable[Any]:
    if isinstance(batches, str | bytes) or not hasattr(batches, "__iter__"):
        raise T5Error(
            f"batches are {batches!r:.60}, of {type(batches).__name__}; expected a loader or list of batches, or a "
            "function from a batch number to an iterator from there on"
        )
    return batches


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator of its own for these numbers (`derived_seed`)."""
    return torch.Generator().manual_seed(derived_seed(*numbers) >> 1)


def _endless(batches: Iterable[Any], start: int) -> Iterator[Any]:
    done = start
    for batch in batches:
        done += 1
        yield batch
    raise T5Error(f"the batches ended after number {done}; a function from a batch number must give them without end")


def _repeated(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise T5Error("the loader gave no batch; an iterator that is used up cannot be repeated: pass a loader")


def _skipped(batches: Iterator[Any], count: int) -> Iterator[Any]:
    for _ in range(count):
        next(batches)
    return batches
