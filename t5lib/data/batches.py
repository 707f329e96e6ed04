"""What training and calibration are fed with."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from t5lib.utils.errors import T5Error

# An iterable of batches (repeated when it ends), or a function from a batch number to an iterator from there on.
# Only the function resumes without reading again what was used.
Batches = Iterable[Any] | Callable[[int], Iterator[Any]]
# What a model is called with; a dictionary holds keyword arguments.
Inputs = Tensor | dict[str, Tensor]


def open_batches(batches: Batches, start: int) -> Iterator[Any]:
    """An endless iterator that begins with batch number `start`."""
    if callable(batches):
        return _endless(batches(start), start)
    return _skipped(_repeated(batches), start)


def images_of(batch: Tensor | tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    """The images (B, 3, H, W) of a batch that may carry labels too."""
    images = batch[0] if isinstance(batch, tuple | list) else batch
    if not isinstance(images, torch.Tensor) or images.ndim != 4:
        shape = tuple(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
        raise T5Error(f"a batch must hold images (B, 3, H, W), got {shape}")
    return images


def run_on(model: nn.Module, inputs: Inputs) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator for this combination of numbers (seed, process, batch …) and no other."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def _endless(batches: Iterator[Any], start: int) -> Iterator[Any]:
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
