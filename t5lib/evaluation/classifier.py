"""How good a classifier is, and how far it agrees with the model it came from."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from t5lib.utils.config import one_of
from t5lib.utils.errors import T5Error
from t5lib.utils.modes import evaluating


@dataclass(frozen=True, kw_only=True)
class Score:
    """top1, top5 and agreement in percent of `n` images; loss is the mean cross-entropy.

    top5 is None with five classes or fewer; agreement (same top class as the reference) is None without a reference.
    """

    top1: float
    top5: float | None
    loss: float
    agreement: float | None
    n: int

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def evaluate(
    models: dict[str, nn.Module],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    reference: str | None = None,
    precision: str = "fp32",
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, Score]:
    """Score every model on the same batches, read once.

    Args:
        models: by name, all on one device; calling one gives logits, or an output of transformers that holds them.
        batches: (images (B, 3, H, W), labels (B,)), each image once.
        reference: the name of the model that agreement is measured with.
        precision: "fp32" or "bf16" (autocast).
        on_batch: called with the images done so far.

    Raises:
        T5Error: no images, or an unknown `reference` or `precision`.
    """
    if reference is not None:
        one_of(reference, models, "reference")
    logits, labels = predict(models, batches, precision=precision, on_batch=on_batch)
    expected = logits[reference].argmax(-1) if reference else None
    return {name: score(values, labels, expected) for name, values in logits.items()}


@torch.no_grad()
def predict(
    models: dict[str, nn.Module],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    precision: str = "fp32",
    on_batch: Callable[[int], None] | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Logits (n, classes) of every model in float32, and the labels (n,), all on the CPU. Arguments as in `evaluate`.

    Raises:
        T5Error: no images, or an unknown `precision`.
    """
    one_of(precision, ("fp32", "bf16"), "precision")
    device = next(next(iter(models.values())).parameters()).device
    logits: dict[str, list[Tensor]] = {name: [] for name in models}
    labels: list[Tensor] = []
    with evaluating(*models.values()):
        for images, batch_labels in batches:
            labels.append(batch_labels.cpu())
            images = images.to(device, non_blocking=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                for name, model in models.items():
                    output = model(images)
                    logits[name].append(getattr(output, "logits", output).float().cpu())
            if on_batch:
                on_batch(sum(map(len, labels)))
    if not labels:
        raise T5Error("there is no batch to score the models on; pass a loader that is not used up")
    return {name: torch.cat(parts) for name, parts in logits.items()}, torch.cat(labels)


def score(logits: Tensor, labels: Tensor, expected: Tensor | None = None) -> Score:
    """The scores of logits (n, classes) for labels (n,); agreement is with `expected`, a reference's classes (n,)."""
    ranked = logits.topk(min(5, logits.shape[1]), dim=-1).indices == labels[:, None]
    percent = 100 / len(labels)
    return Score(
        top1=ranked[:, 0].sum().item() * percent,
        top5=ranked.sum().item() * percent if logits.shape[1] > 5 else None,
        loss=F.cross_entropy(logits, labels).item(),
        agreement=None if expected is None else (logits.argmax(-1) == expected).sum().item() * percent,
        n=len(labels),
    )
