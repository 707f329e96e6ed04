"""ViTMAE hides patches at random, which leaves holes in the grid, and shuffles those that it shows.

Models that hide none (`mask_ratio` 0) are converted. Softmax does not care about the order of patches, a convolution
does: they are kept in order by noise that grows from patch to patch, since transformers sorts patches by their noise.
"""

from typing import Any

import torch
from torch import Tensor, nn

from t5lib.utils.errors import T5Error


def masks(tower: nn.Module) -> bool:
    """Whether `tower` is of the kind that hides and shuffles patches."""
    return hasattr(tower.embeddings, "random_masking")


def check_unmasked(embeddings: nn.Module) -> None:
    """Raises T5Error if patches are hidden."""
    if share := embeddings.config.mask_ratio:
        raise T5Error(
            f"config.mask_ratio is {share}: the patches that are left lie on no grid, which a TTT layer needs; set "
            "model.config.mask_ratio = 0 for a model that sees whole images. To pretrain, use the softmax model and "
            "convert it afterwards"
        )


def ordered_noise(images: int, patches: int, device: torch.device) -> Tensor:
    """(images, patches), by which the patches stay in order."""
    return torch.arange(patches, dtype=torch.float32, device=device).expand(images, -1)


def keep_order(embeddings: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A forward hook before the embeddings of a converted model.

    Raises:
        T5Error: patches are hidden, or noise is given that shuffles them.
    """
    check_unmasked(embeddings)
    images, noise = arguments[0], named.get("noise")
    if noise is None:
        rows, columns = (
            side // patch for side, patch in zip(images.shape[-2:], embeddings.patch_embeddings.patch_size, strict=True)
        )
        return arguments, named | {"noise": ordered_noise(len(images), rows * columns, images.device)}
    if not (noise.diff(dim=-1) > 0).all():
        raise T5Error("noise shuffles the patches, and a TTT layer needs them in order; call the model without it")
    return arguments, named
