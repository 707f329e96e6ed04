"""What training and calibration are fed with: batches from any number on, and the seeds of what is random in them."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from t5lib.utils.errors import T5Error
from t5lib.utils.processes import WHOLE, Part
from t5lib.utils.seeds import derived_seed

# An iterable of batches (repeated when it ends), or a function from a batch number to an iterator from there on.
# Only the function resumes without reading again what was used. Where several processes work together, all are given
# the same batches, and each takes its part of them; a function with an argument `part` gives that alone.
Batches = Iterable[Any] | Callable[..., Iterator[Any]]


def open_batches(batches: Batches, start: int, part: Part = WHOLE) -> Iterator[Any]:
    """An endless iterator that begins with batch number `start`, of what this process takes.

    Raises:
        T5Error: it is neither of what Batches may be, or holds no batch; while iterating, a batch that the processes
            cannot share evenly.
    """
    if callable(batches):
        if _knows_parts(batches):
            return _endless(_iterable(batches(start, part=part)), start)
        whole = _endless(_iterable(_called(batches, start)), start)
    else:
        whole = _skipped(_repeated(_iterable(batches)), start)
    if part == WHOLE:
        return whole
    return (_rows(batch, part) for batch in islice(whole, part.turn, None, part.turns))


def _rows(batch: Any, part: Part) -> Any:
    """Those of a batch, whatever a loader makes of one (t5lib.families.inputs), that are of this part."""
    if isinstance(batch, Mapping):
        return {name: _rows(value, part) for name, value in batch.items()}
    if isinstance(batch, Tensor | np.ndarray):
        return batch[part.of(len(batch))]
    if isinstance(batch, tuple | list) and batch:
        single = all(isinstance(each, Tensor | np.ndarray) and each.ndim == 3 for each in batch)
        return batch[part.of(len(batch))] if single else tuple(_rows(each, part) for each in batch)
    return batch


def _knows_parts(batches: Callable[..., Any]) -> bool:
    try:
        return "part" in inspect.signature(batches).parameters
    except ValueError:  # a function of C, which tells no signature
        return False


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
