"""A folder that transformers wrote (save_pretrained): the softmax model in it, and how it wants images."""

from pathlib import Path
from typing import Any

import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor

from t5lib.cli.images import ImageReader
from t5lib.utils.errors import T5Error


def outline(folder: Path) -> nn.Module:
    """The model without its weights, on whichever device torch now makes tensors.

    Raises:
        T5Error: transformers does not know it.
    """
    kind, config = _described(folder)
    return kind(config)


def load(folder: Path) -> nn.Module:
    """The model with its weights, in eval mode.

    Raises:
        T5Error: transformers does not know it, or weights are missing or of other shapes.
    """
    kind, _ = _described(folder)
    try:
        model, info = kind.from_pretrained(folder, output_loading_info=True)
    except OSError as error:
        raise T5Error(f"{folder} holds no weights that can be read ({_first_line(error)}); save it again") from error
    if info["missing_keys"]:
        raise T5Error(
            f"{folder} lacks weights of its {kind.__name__}, such as {min(info['missing_keys'])}; save it again with "
            "save_pretrained"
        )
    return model.eval()


def reader(folder: Path) -> ImageReader:
    """Reads images as the image processor in `folder` prepares them.

    Raises:
        T5Error: there is none, or it makes images of several sizes.
    """
    try:
        processor: Any = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise T5Error(
            f"{folder} does not say how to prepare its model's images ({_first_line(error)}); save the image processor "
            f"there, too: AutoImageProcessor.from_pretrained(NAME).save_pretrained({str(folder)!r})"
        ) from error
    sizes: set[tuple[int, ...]] = set()

    def transform(image: Image.Image) -> Tensor:
        pixels = processor(image, return_tensors="pt")["pixel_values"][0]
        sizes.add(tuple(pixels.shape))
        if len(sizes) > 1:
            raise T5Error(
                f"the image processor in {folder} makes images of several sizes, {sorted(sizes)}; give it one size "
                "(keep_aspect_ratio false), or crop your images alike"
            )
        return pixels

    return ImageReader(transform, f"as the {type(processor).__name__} of the folder prepares them")


def _described(folder: Path) -> tuple[Any, Any]:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        raise T5Error(f"{folder} is not a model that transformers can build: {_first_line(error)}") from error
    [name, *_] = config.architectures or [""]
    if not hasattr(transformers, name):
        raise T5Error(
            f"{folder}/config.json names the class '{name}', which transformers {transformers.__version__} does not "
            "know; save the model again with save_pretrained, or update transformers"
        )
    return getattr(transformers, name), config


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
