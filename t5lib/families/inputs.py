"""What a model is called with: its keyword arguments, whatever its family, and what is done with them everywhere."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from t5lib.utils.config import shown
from t5lib.utils.errors import T5Error

PREPARE = "timm.data.create_transform(**timm.data.resolve_model_data_config(model))"

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


def images_of(batch: Any) -> Tensor:
    """The images (B, C, H, W), or latents, in what a loader gives: themselves, a tuple or list that begins with them,
    or a list of single ones (C, H, W); as tensors or as arrays of NumPy.

    Raises:
        T5Error: it is something else, there are none, or they are whole numbers.
    """
    if isinstance(batch, tuple | list) and batch:
        single = all(isinstance(each, Tensor | np.ndarray) and each.ndim == 3 for each in batch)
        batch = _stacked(batch) if single else batch[0]
    images = _tensor(batch) if isinstance(batch, np.ndarray) else batch
    if not isinstance(images, Tensor) or images.ndim != 4:
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise T5Error(f"a batch must hold images (B, 3, H, W), got {shape}; {PREPARE} makes tensors of image files")
    if not len(images):
        raise T5Error("a batch holds no image; leave empty batches out")
    if images.layout != torch.strided:
        raise T5Error(f"images are laid out as {images.layout}; pass dense tensors: images.to_dense()")
    if not images.is_floating_point():
        raise T5Error(
            f"images are {images.dtype}; expected floating-point numbers, normalized as the model's weights want them: "
            f"{PREPARE}"
        )
    return images


def _stacked(images: Sequence[Any]) -> Tensor:
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise T5Error(f"a batch holds images of different shapes, {sorted(shapes)[:4]}; resize or crop them to one")
    return torch.stack([_tensor(image) if isinstance(image, np.ndarray) else image for image in images])


def _tensor(array: np.ndarray) -> Tensor:
    """Of the same numbers, however they lie in memory. Raises T5Error where they are none."""
    try:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))
    except TypeError:
        raise T5Error(f"a batch holds an array of {array.dtype}; expected numbers, such as float32") from None


def rows_of(batch: Mapping[str, Any], images: int) -> Inputs:
    """Keyword arguments besides the images, as tensors; those that are None are left out.

    Raises:
        T5Error: one is something else than a tensor or array with a row for every one of the `images`.
    """
    inputs = {name: _tensor(v) if isinstance(v, np.ndarray) else v for name, v in batch.items()}
    for name, value in inputs.items():
        shape = tuple(value.shape) if isinstance(value, Tensor) else None
        if value is not None and (not shape or shape[0] != images):
            came = shown(value) if shape is None else f"a tensor {shape}"
            raise T5Error(
                f"'{name}' of a batch is {came}; expected a tensor with a row for each of its {images} images"
            )
    return {name: value for name, value in inputs.items() if value is not None}


def check_finite(inputs: Inputs) -> None:
    """Raises T5Error naming the first input, and the place in the batch, that holds NaN, infinite or no numbers."""
    for name, tensor in inputs.items():
        if tensor.is_meta:
            raise T5Error(f"'{name}' is on the meta device and holds no numbers; make it on another")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            broken = [index for index, each in enumerate(tensor) if not each.isfinite().all()]
            raise T5Error(
                f"'{name}' holds numbers that are not finite, first at place {broken[0]} of a batch of {len(tensor)}; "
                "look for a damaged file, or a division by zero in the normalization"
            )


def count(inputs: Inputs) -> int:
    """Images in the batch."""
    return len(next(iter(inputs.values())))


def placed(inputs: Inputs, *where: torch.device | torch.dtype | str) -> Inputs:
    """Inputs moved to a device, and cast to another precision unless they are numbers of steps or classes."""
    for each in where:
        if isinstance(each, torch.dtype):
            inputs = {name: t.to(each) if t.is_floating_point() else t for name, t in inputs.items()}
        else:
            inputs = {name: _moved(tensor, torch.device(each)) for name, tensor in inputs.items()}
    return inputs


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """To CUDA by way of pinned memory: from other memory, a copy would wait until the device has done all its work."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda")


def first(inputs: Inputs, number: int) -> Inputs:
    """The inputs of the first `number` images."""
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
