"""Stage `source`: the softmax classifier that is converted: the fetched model, with a head for the target's classes."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import t5lib
from t5lib.data.images import Batch, DataConfig, ShardSet, eval_batches, transform
from t5lib.training.classifier import TrainConfig
from t5lib.utils.errors import T5Error
from t5lib.utils.progress import progress
from tasks.runtime.stage import Stage, main
from tasks.targets.classifier import device, evaluate_one, fit


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """How the classifier comes about.

    Attributes:
        head: "keep" the fetched one, or "fit" a linear head on the frozen features (logistic regression).
        l2: weight of the head's squared norm, on standardized features.
        finetune: recipe to train the whole softmax model with afterwards; null for none.
    """

    head: Literal["keep", "fit"] = "fit"
    l2: float = 1e-3
    finetune: TrainConfig | None = None


SECTIONS = {"source": SourceConfig, "data": DataConfig}


def run(stage: Stage) -> dict:
    config, data = stage.params(SourceConfig), stage.params(DataConfig, "data")
    model = t5lib.load(stage.input("fetch"), device())
    shards = stage.input("shards")
    begun, steps = time.monotonic(), 0
    if config.head == "fit":
        fit_head(model, ShardSet.read(shards / "train.json"), data, config.l2)
    if config.finetune:
        steps = fit(stage, model, config.finetune, data, shards).steps
    seconds = time.monotonic() - begun
    score = evaluate_one(model, data, shards)
    t5lib.save(model, stage.out)
    return {"top1": score.top1, "loss": score.loss, "seconds": seconds, "steps": steps}


def fit_head(model: nn.Module, shards: ShardSet, data: DataConfig, l2: float) -> None:
    """Fit `model.head` by logistic regression on the frozen features of all training images; deterministic.

    Raises:
        T5Error: the model's head is not one linear layer.
    """
    _check_head(model)
    batches = eval_batches(shards, transform(data), batch_size=data.eval_batch_size, workers=data.workers)
    fit_head_on(model, batches, shards.count, l2)


def _check_head(model: nn.Module) -> None:
    if not isinstance(model.head, nn.Linear) or hasattr(model, "head_dist"):
        found = "a pair, one for the distillation token" if hasattr(model, "head_dist") else type(model.head).__name__
        raise T5Error(f"the head is {found}, not one linear layer; use source.head: keep")


def fit_head_on(model: nn.Module, batches: Iterable[Batch], count: int, l2: float) -> None:
    """`fit_head` on the `count` images of `batches` (images (B, 3, H, W), labels (B,)), each once."""
    _check_head(model)
    features, labels = _features(model, batches, count)
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


if __name__ == "__main__":
    main(run)
