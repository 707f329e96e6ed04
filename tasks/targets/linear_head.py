"""A linear head for a frozen classifier: logistic regression on its features, deterministic."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from t5lib.data.images import Batch
from t5lib.utils import processes
from t5lib.utils.errors import T5Error
from t5lib.utils.progress import progress


def fit_head(model: nn.Module, batches: Iterable[Batch], count: int, l2: float) -> None:
    """Fit `model.head` on the features of `batches` (images (B, 3, H, W), labels (B,)): `count` images, each once.

    Of several processes each has every so many of the images, and all end with the same head.

    Args:
        l2: weight of the head's squared norm, on standardized features.

    Raises:
        T5Error: the model's head is not one linear layer.
    """
    _check_head(model)
    features, labels = (processes.in_order(part) for part in _features(model, batches, count))
    mean, std = features.mean(0), features.std(0) + 1e-6
    features = (features - mean) / std
    weight = torch.zeros_like(model.head.weight, dtype=torch.float32, requires_grad=True)
    bias = torch.zeros(len(weight), device=weight.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(features @ weight.T + bias, labels) + l2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        model.head.weight.copy_(weight / std)
        model.head.bias.copy_(bias - (weight / std) @ mean)
    processes.alike([model.head.weight.data, model.head.bias.data])


def _check_head(model: nn.Module) -> None:
    if not isinstance(model.head, nn.Linear) or hasattr(model, "head_dist"):
        found = "a pair, one for the distillation token" if hasattr(model, "head_dist") else type(model.head).__name__
        raise T5Error(f"the head is {found}, not one linear layer; use source.head: keep")


@torch.no_grad()
def _features(model: nn.Module, batches: Iterable[Batch], count: int) -> tuple[Tensor, Tensor]:
    """What the head sees, (n, C) float32, and the labels (n,), on the model's device."""
    place = next(model.parameters()).device
    features, labels = [], []
    with progress("features", count) as bar:
        for images, batch_labels in batches:
            with torch.autocast(place.type, torch.bfloat16, enabled=place.type == "cuda"):
                hidden = model.forward_head(model.forward_features(images.to(place)), pre_logits=True)
            features.append(hidden.float())
            labels.append(batch_labels.to(place))
            bar.advance(sum(map(len, labels)))
    return torch.cat(features), torch.cat(labels)
