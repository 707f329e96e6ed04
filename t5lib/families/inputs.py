"""What a model is called with: its keyword arguments, whatever its family, and what is done with them everywhere."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Inputs = dict[str, Tensor]  # the first dimension of each is the batch


@dataclass(frozen=True)
class ExampleSize:
    """How large made-up inputs are.

    Attributes:
        resolution: side of a square image in pixels.
        batch: images.
        pixels_per_latent: of a denoiser: pixels that one latent is wide; 1 where pixels are the latents.
        text_tokens: of a denoiser that takes text.
    """

    resolution: int
    batch: int = 1
    pixels_per_latent: int = 8
    text_tokens: int = 333


def count(inputs: Inputs) -> int:
    """Images in the batch."""
    return len(next(iter(inputs.values())))


def placed(inputs: Inputs, *where: torch.device | torch.dtype | str) -> Inputs:
    """Moved to a device, and in another precision where they are no numbers of steps or classes."""
    for each in where:
        inputs = {
            name: tensor.to(each, non_blocking=True)
            if tensor.is_floating_point() or not isinstance(each, torch.dtype)
            else tensor
            for name, tensor in inputs.items()
        }
    return inputs


def first(inputs: Inputs, number: int) -> Inputs:
    """Of the first `number` images."""
    return {name: tensor[:number] for name, tensor in inputs.items()}


def parts(inputs: Inputs, at_once: int) -> Iterator[Inputs]:
    """The batch in pieces of at most `at_once` images."""
    for start in range(0, count(inputs), at_once):
        yield {name: tensor[start : start + at_once] for name, tensor in inputs.items()}


def joined(batches: Sequence[Inputs]) -> Inputs:
    """Several batches of one size as one."""
    return {name: torch.cat([inputs[name] for inputs in batches]) for name in batches[0]}


def joined_by_size(batches: Sequence[Inputs]) -> list[Inputs]:
    """Batches that fit together as one batch each, in the order in which their sizes come first."""
    sizes: dict[tuple[torch.Size, ...], list[Inputs]] = {}
    for inputs in batches:
        sizes.setdefault(tuple(tensor.shape[1:] for tensor in inputs.values()), []).append(inputs)
    return [joined(alike) for alike in sizes.values()]
