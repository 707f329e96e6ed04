"""How good a model's dense features are: a linear probe on every patch, read on a model and on the source it came from.

A probe is fitted on the source's features and never changed after that. Two questions are kept apart:

    fidelity     does the student predict what the source predicts? Mean intersection over union (mIoU) and agreement of
                 its predictions with the *source's predictions*, through the source's probe, and the cosine between
                 features of the same patch. 100 is a perfect copy; nothing can be above its source.
    usefulness   does it predict the truth? mIoU against the labels, through the source's probe and through a probe that
                 is fitted on the student's own features.

Every patch shows one entity (an object, or a background), and every entity has one class. Sums are kept by entity, so
that spread can be told from a bootstrap over entities: patches of one object are alike and no independent samples.

Shapes: B images, R × Q patches of an image, P patches of any number of images, C channels, K classes, E entities.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from t5lib.families import family_of
from t5lib.utils.config import AtLeastOne, NotNegative, settings
from t5lib.utils.errors import T5Error
from t5lib.utils.modes import evaluating

Batch = tuple[Tensor, Tensor]  # images (B, 3, H, W), and the entity that each patch shows (B, R, Q)
LEAST_SPREAD = 1e-6


@settings
class ProbeConfig:
    """Logistic regression on standardized features.

    Attributes:
        l2: weight of half the squared weights, beside the mean cross-entropy.
        balance: 0 counts every patch alike, 1 every class alike, and values between weigh a class by a power of its
            frequency.
        iterations: of L-BFGS at most.
    """

    l2: NotNegative = 1e-3
    balance: Annotated[float, Field(ge=0, le=1)] = 0.0
    iterations: AtLeastOne = 100


@dataclass(frozen=True)
class Probe:
    """A linear map from features to classes.

    Attributes:
        mean, deviation: (C,), with which features are standardized.
        weight: (K, C).
        bias: (K,).
    """

    mean: Tensor
    deviation: Tensor
    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """(…, C) to (…, K)."""
        return F.linear((features - self.mean) / self.deviation, self.weight, self.bias)

    def predict(self, features: Tensor) -> Tensor:
        """(…, C) to classes (…)."""
        return self.logits(features).argmax(-1)


def fit_probe(features: Tensor, labels: Tensor, num_classes: int, config: ProbeConfig | None = None) -> Probe:
    """Fit a probe; it starts at zero and sees all patches in every iteration, so that nothing in it is random.

    Args:
        features: (P, C), float32.
        labels: (P,) int64, below `num_classes`.

    Raises:
        T5Error: not a label for each patch, or no patch.
    """
    config = config or ProbeConfig()
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
        raise T5Error(
            f"a probe is fitted on features (P, C) with labels (P,), got {tuple(features.shape)} and "
            f"{tuple(labels.shape)}"
        )
    mean, deviation = features.mean(0), features.std(0, correction=0).clamp_min(LEAST_SPREAD)
    standardized = (features - mean) / deviation
    weight = torch.zeros(num_classes, features.shape[1], device=features.device, requires_grad=True)
    bias = torch.zeros(num_classes, device=features.device, requires_grad=True)
    class_weights = _class_weights(labels, num_classes, config.balance)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=config.iterations, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(standardized, weight, bias), labels, weight=class_weights)
        loss = loss + 0.5 * config.l2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return Probe(mean, deviation, weight.detach(), bias.detach())


def _class_weights(labels: Tensor, num_classes: int, balance: float) -> Tensor | None:
    if not balance:
        return None
    frequency = torch.bincount(labels, minlength=num_classes).float().clamp_min(1)
    return (frequency.sum() / frequency) ** balance


@torch.no_grad()
def patch_features(model: nn.Module, images: Tensor, precision: str = "fp32") -> Tensor:
    """What a timm model's last norm gives for every patch, (B, R, Q, C) in float32; `precision` "fp32" or "bf16"."""
    family = family_of(model)
    grid = family.grid(model, family.inputs(images))
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        tokens = model.forward_features(images)
    return tokens[:, grid.patches].float().unflatten(1, (grid.rows, grid.columns))


def gather_features(model: nn.Module, batches: Iterable[Batch], precision: str = "fp32") -> tuple[Tensor, Tensor]:
    """The features of all patches in all batches (P, C), and the entities that they show (P,), to fit a probe on.

    Raises:
        T5Error: there is no batch.
    """
    features, entities = [], []
    device = next(model.parameters()).device
    for images, shown in batches:
        features.append(patch_features(model, images.to(device), precision).flatten(0, 2))
        entities.append(shown.to(device).long().flatten())
    if not features:
        raise T5Error("there is no batch to fit a probe on; pass a loader that is not used up")
    return torch.cat(features), torch.cat(entities)


@dataclass(frozen=True, kw_only=True)
class DenseSums:
    """Sums over test patches, by the entity that a patch shows. Those of several folds add.

    Attributes:
        source, student, own: (E, K, K) int64 counts of patches by (true class, predicted class). Source and student are
            read through the source's probe; `own` is the student read through its own.
        fidelity: (E, K, K) int64 counts of patches by (the source's prediction, the student's), both through the
            source's probe.
        cosine: (E,) float64 sum of cosines between the source's and the student's features.
    """

    source: Tensor
    student: Tensor
    own: Tensor
    fidelity: Tensor
    cosine: Tensor

    def __add__(self, other: "DenseSums") -> "DenseSums":
        return replace(self, **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def measures(self, weights: Tensor | None = None) -> dict[str, Tensor]:
        """All measures by name.

        Args:
            weights: (draws, E), how often each entity counts, of `resampled`; by default each counts once.

        Returns:
            Float64, () each, or (draws,) with weights: "source_miou", "miou", "own_probe_miou", "fidelity_miou",
            "agreement" and "lost_miou" (the source's mIoU less the student's) in percent; "cosine" from -1 to 1.
        """
        one = torch.ones(1, len(self.cosine), dtype=torch.float64) if weights is None else weights.double()
        source, student, own, fidelity = (
            torch.einsum("de,ekl->dkl", one, getattr(self, name).double())
            for name in ("source", "student", "own", "fidelity")
        )
        patches = fidelity.sum((1, 2))
        result = {
            "source_miou": 100 * mean_iou(source),
            "miou": 100 * mean_iou(student),
            "own_probe_miou": 100 * mean_iou(own),
            "fidelity_miou": 100 * mean_iou(fidelity),
            "agreement": 100 * fidelity.diagonal(dim1=1, dim2=2).sum(1) / patches,
            "cosine": one @ self.cosine / patches,
        }
        result["lost_miou"] = result["source_miou"] - result["miou"]
        return {name: values[0] if weights is None else values for name, values in result.items()}


def mean_iou(confusion: Tensor) -> Tensor:
    """Mean over classes of intersection over union, 0 to 1, without classes that are neither expected nor predicted.

    Args:
        confusion: (…, K, K), patches by (expected, predicted).

    Returns:
        (…).
    """
    both = confusion.diagonal(dim1=-2, dim2=-1)
    either = confusion.sum(-1) + confusion.sum(-2) - both
    return torch.where(either > 0, both / either.clamp_min(1e-12), torch.nan).nanmean(-1)


def compare(
    source: nn.Module,
    student: nn.Module,
    batches: Iterable[Batch],
    *,
    probe: Probe,
    own_probe: Probe | None = None,
    class_of_entity: Tensor,
    precision: str = "fp32",
) -> DenseSums:
    """Read a probe on both models, on the same batches.

    Args:
        probe: fitted on the source's features.
        own_probe: fitted on the student's; by default `probe` again.
        class_of_entity: (E,) int64.
        precision: "fp32" or "bf16" (autocast).

    Raises:
        T5Error: there is no batch.
    """
    device = next(source.parameters()).device
    kinds, classes = class_of_entity.to(device), len(probe.bias)
    sums = None
    with evaluating(source, student):
        for images, shown in batches:
            images, shown = images.to(device), shown.to(device).long().flatten()
            theirs, ours = (patch_features(m, images, precision).flatten(0, 2) for m in (source, student))
            predicted, student_predicted = probe.predict(theirs), probe.predict(ours)
            own = student_predicted if own_probe is None else own_probe.predict(ours)
            pairs = {
                "source": (kinds[shown], predicted),
                "student": (kinds[shown], student_predicted),
                "own": (kinds[shown], own),
                "fidelity": (predicted, student_predicted),
            }
            counts = {name: _counts(shown, *pair, len(kinds), classes) for name, pair in pairs.items()}
            cosines = F.cosine_similarity(theirs, ours, dim=-1).double()
            cosine = torch.zeros(len(kinds), dtype=torch.float64, device=device).index_add_(0, shown, cosines)
            batch = DenseSums(cosine=cosine.cpu(), **counts)
            sums = batch if sums is None else sums + batch
    if sums is None:
        raise T5Error("there is no batch to compare the models on; pass a loader that is not used up")
    return sums


def _counts(entities: Tensor, expected: Tensor, predicted: Tensor, number: int, classes: int) -> Tensor:
    """Patches by (entity, expected class, predicted class), (E, K, K) int64 on the CPU."""
    index = (entities * classes + expected) * classes + predicted
    return torch.bincount(index, minlength=number * classes * classes).view(number, classes, classes).cpu()


def resampled(sums: DenseSums, class_of_entity: Tensor, draws: int = 1000, seed: int = 0) -> Tensor:
    """How often each entity is drawn when the tested entities of every class are drawn anew, with replacement.

    They follow from which entities were tested, and from the seed: the draws of two students are the same, so that
    their differences can be taken draw by draw.

    Returns:
        (draws, E) int64.
    """
    generator = torch.Generator().manual_seed(seed)
    tested = sums.source.sum((1, 2)) > 0
    weights = torch.zeros(draws, len(tested), dtype=torch.int64)
    for kind in class_of_entity.unique():
        own = torch.nonzero(tested & (class_of_entity.cpu() == kind)).flatten()
        if len(own):
            drawn = own[torch.randint(len(own), (draws, len(own)), generator=generator)]
            weights.scatter_add_(1, drawn, torch.ones_like(drawn))
    return weights


def summary(sums: DenseSums, class_of_entity: Tensor, draws: int = 1000, seed: int = 0) -> dict[str, dict[str, float]]:
    """Every measure as "value", with a 95 % interval, "low" to "high", by a bootstrap over tested entities."""
    spread = sums.measures(resampled(sums, class_of_entity, draws, seed))
    bounds = torch.tensor([0.025, 0.975], dtype=torch.float64)
    result = {}
    for name, value in sums.measures().items():
        low, high = spread[name].quantile(bounds).tolist()
        result[name] = {"value": value.item(), "low": low, "high": high}
    return result
