"""A downstream task as people have it: a decoder trained on a model's features is given those of the converted model.

Its heat maps tell what a photograph is about (`t5lib.weights.focus_decoder`). Nothing is fitted.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from t5lib.evaluation.dense import Batch, patch_features
from t5lib.utils.errors import T5Error
from t5lib.utils.modes import evaluating

NEAR = 0.05  # of the diagonal: focus points this close count as the same


@torch.no_grad()
def compare_focus(
    source: nn.Module, student: nn.Module, decoder: nn.Module, batches: Iterable[Batch], precision: str = "fp32"
) -> dict[str, float]:
    """How far the decoder's answers on the student are from those on the source, over all images.

    Args:
        decoder: patch features (B, R, Q, C) to heat (B, H, W).

    Returns:
        "correlation": mean correlation of the two heat maps of an image, at best 1; "distance": mean distance between
        their focus points (the hottest pixels), in percent of the diagonal; "same_focus": percent of images in which
        they are no farther than 5 % of it apart.

    Raises:
        T5Error: there is no batch.
    """
    device, correlations, distances = next(source.parameters()).device, [], []
    with evaluating(source, student, decoder):
        for images, _ in batches:
            images = images.to(device)
            theirs, ours = (decoder(patch_features(model, images, precision)) for model in (source, student))
            correlations.append(_correlation(theirs, ours))
            distances.append(_distance(theirs, ours))
    if not correlations:
        raise T5Error("there is no batch to compare the heat maps on; pass a loader that is not used up")
    correlation, distance = torch.cat(correlations), torch.cat(distances)
    return {
        "correlation": correlation.mean().item(),
        "distance": 100 * distance.mean().item(),
        "same_focus": 100 * (distance <= NEAR).double().mean().item(),
    }


def _correlation(theirs: Tensor, ours: Tensor) -> Tensor:
    """Of the pixels of each pair of maps (B, H, W); (B,) float64 on the CPU."""
    first, second = ((heat - heat.mean((1, 2), keepdim=True)).flatten(1).double() for heat in (theirs, ours))
    return F.cosine_similarity(first, second).cpu()


def _distance(theirs: Tensor, ours: Tensor) -> Tensor:
    """Between the hottest pixels of each pair of maps (B, H, W), as a share of the diagonal; (B,) float64."""
    height, width = theirs.shape[1:]
    first, second = (heat.flatten(1).argmax(1).cpu() for heat in (theirs, ours))
    rows, columns = first // width - second // width, first % width - second % width
    return torch.hypot(rows.double(), columns.double()) / math.hypot(height, width)
