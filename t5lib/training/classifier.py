"""What a classifier learns from: images and labels, cross-entropy, soft labels of a teacher."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from t5lib.data.images import AugmentConfig
from t5lib.families.inputs import Inputs
from t5lib.training.recipe import LoopConfig
from t5lib.training.trainer import Objective, Trainer
from t5lib.utils.config import Share, settings
from t5lib.utils.errors import T5Error

Strength = Annotated[float, Field(ge=0, le=100)]  # alpha of the beta distribution that mixes two images
Example = tuple[Inputs, Tensor]  # images, labels (B,)


@settings
class TrainConfig(LoopConfig):
    """A recipe for classifiers. The defaults are the paper's for ViTs (section 6 of the method), epochs aside.

    Attributes:
        epochs: passes over the training images; may be a fraction.
        label_smoothing, mixup, cutmix, augment: what makes images and labels harder.
        distill: weight from 0 to 1 of the teacher's soft labels beside the true ones; 0 needs no teacher.
        Others: see LoopConfig.
    """

    epochs: Annotated[float, Field(gt=0, le=100_000)] = 30.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    mixup: Strength = 0.0
    cutmix: Strength = 0.0
    distill: Share = 0.0
    augment: AugmentConfig = Field(default_factory=AugmentConfig)

    def __post_init__(self):
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise T5Error(f"mixup and cutmix pair images; batch_size {self.batch_size} must be even")

    def steps(self, num_images: int) -> int:
        """Optimizer steps for `epochs` passes over `num_images`."""
        return max(1, round(self.epochs * num_images / (self.batch_size * self.accumulate)))


def _turned(batch: Tensor) -> Tensor:
    """With the second half in reverse order."""
    half = len(batch) // 2
    return torch.cat([batch[:half], batch[half:].flip(0)])


class Classification(Objective[Example]):
    """Batches are (images (B, 3, H, W), labels (B,)).

    Args:
        config: of the recipe: label smoothing, mixup, cutmix, distill.
        num_classes: of the labels, for mixup.
        teacher: softmax model whose logits are learned from when config.distill is set.

    Raises:
        T5Error: config.distill without a teacher.
    """

    def __init__(self, config: TrainConfig, num_classes: int, teacher: nn.Module | None = None):
        if config.distill and teacher is None:
            raise T5Error("train: distill is set but no teacher was given; pass the softmax model as teacher=")
        self.config, self.teacher = config, teacher if config.distill else None
        self.mixup = None
        if config.mixup or config.cutmix:
            from timm.data import Mixup

            smoothing = {"label_smoothing": config.label_smoothing, "num_classes": num_classes}
            self.mixup = Mixup(config.mixup, config.cutmix, **smoothing)

    def begin(self, trainer: Trainer) -> None:
        if self.mixup and self.config.batch_size % (2 * trainer.part.rows):
            raise T5Error(
                f"mixup and cutmix pair images, and {trainer.part.rows} processes cannot share batches of "
                f"{self.config.batch_size} in pairs; expected a multiple of {2 * trainer.part.rows}, or start fewer"
            )
        if self.teacher is not None:
            self.teacher = trainer.beside(self.teacher).eval()

    def example(self, batch: tuple[Tensor, Tensor], number: int, trainer: Trainer) -> Example:
        images, labels = (part.to(trainer.device, non_blocking=True) for part in batch)
        return trainer.adapter.inputs(images), labels

    def inputs(self, example: Example) -> Inputs:
        return example[0]

    def loss(self, example: Example, trainer: Trainer) -> Tensor:
        inputs, targets = example
        if self.mixup:
            [(name, images)] = inputs.items()
            # timm pairs first and last, and so on. Here image i meets image i + batch_size/2, so that processes which
            # share the batch have both or none; drawn is the same in each of them.
            images, targets = map(_turned, self.mixup(_turned(images), _turned(targets)))  # the inner one in place
            inputs = {name: images}
        logits = trainer.output(inputs).float()
        if self.mixup:
            loss = F.cross_entropy(logits, targets)  # targets are shares of classes
        else:
            loss = F.cross_entropy(logits, targets, label_smoothing=self.config.label_smoothing)
        if self.teacher is None:
            return loss
        with torch.no_grad():
            soft = trainer.output(inputs, self.teacher).float().softmax(-1)
        return torch.lerp(loss, F.cross_entropy(logits, soft), self.config.distill)
