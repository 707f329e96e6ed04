"""Training of classifiers by every protocol: freeze (new parameters only), adapters, fine-tune, control (all of it)."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

from t5lib.data.batches import Batches
from t5lib.data.images import AugmentConfig
from t5lib.training.trainer import Log, LoopConfig, Trainer, TrainReport
from t5lib.utils.errors import T5Error


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LoopConfig):
    """A recipe for classifiers. The defaults are the paper's for ViTs (section 6 of the method), epochs aside.

    Attributes:
        epochs: passes over the training images; may be a fraction.
        label_smoothing, mixup, cutmix, augment: what makes images and labels harder.
        distill: weight from 0 to 1 of the teacher's soft labels beside the true ones; 0 needs no teacher.
        Others: see LoopConfig.
    """

    epochs: float = 30.0
    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    distill: float = 0.0
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self):
        super().__post_init__()
        self.check(
            (
                (("epochs",), lambda v: v > 0, "more than 0"),
                (("mixup", "cutmix"), lambda v: v >= 0, "0 or more"),
                (("distill",), lambda v: 0 <= v <= 1, "a part, from 0 to 1"),
                (("label_smoothing",), lambda v: 0 <= v < 1, "0 or more, below 1"),
            )
        )
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise T5Error(f"train: mixup and cutmix pair images; batch_size {self.batch_size} must be even")

    def steps(self, num_images: int, num_processes: int = 1) -> int:
        """Optimizer steps for `epochs` passes over `num_images`."""
        return max(1, round(self.epochs * num_images / (self.batch_size * self.accumulate * num_processes)))


def train(
    model: nn.Module,
    batches: Batches,
    config: TrainConfig,
    *,
    steps: int,
    num_classes: int,
    teacher: nn.Module | None = None,
    resume_dir: Path | None = None,
    log: Log | None = None,
) -> TrainReport:
    """Train the classifier `model` in place.

    Args:
        batches: (images (B, 3, H, W), labels (B,)); see t5lib.data.batches. Every process passes its own part.
        steps: optimizer steps (TrainConfig.steps tells them from the epochs).
        teacher: softmax model whose logits are learned from when config.distill is set.
        resume_dir: checkpoints; a second call with the same folder continues and, on a CPU, ends with the same bits.
        log: called in the main process with loss, learning rates, gradient norm, and the step.

    Raises:
        T5Error: nothing to train, a missing teacher, or a loss that is not finite (step, layers and advice named).
        KeyboardInterrupt: Ctrl-C, at the end of the step and after a checkpoint has been written.
    """
    if config.distill and teacher is None:
        raise T5Error("train: distill is set but there is no teacher; pass the softmax model as teacher=")
    return _Classification(model, config, teacher, num_classes, steps).run(batches, resume_dir, log)


class _Classification(Trainer):
    """Images and labels, cross-entropy, soft labels of a teacher."""

    config: TrainConfig

    def __init__(self, model: nn.Module, config: TrainConfig, teacher: nn.Module | None, num_classes: int, steps: int):
        super().__init__(model, config, steps)
        self.teacher = teacher.to(self.device).eval() if config.distill else None
        self.mixup = _mixup(config, num_classes)

    def example(self, batch: tuple[Tensor, Tensor], number: int) -> tuple[Tensor, ...]:
        return tuple(part.to(self.device, non_blocking=True) for part in batch)

    def inputs(self, example: tuple[Tensor, ...]) -> Tensor:
        return example[0]

    def loss(self, example: tuple[Tensor, ...]) -> Tensor:
        images, labels = example
        smoothing, targets = self.config.label_smoothing, labels
        if self.mixup:
            images, targets = self.mixup(images.clone(), labels)  # it works in place
        with self.autocast():
            logits = self.model(images)
        if self.mixup:
            loss = SoftTargetCrossEntropy()(logits.float(), targets)
        else:
            loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
        if self.teacher is None:
            return loss
        with torch.no_grad(), self.autocast():
            soft = self.teacher(images).float().softmax(-1)
        return torch.lerp(loss, F.cross_entropy(logits.float(), soft), self.config.distill)


def _mixup(config: TrainConfig, num_classes: int) -> Mixup | None:
    if not (config.mixup or config.cutmix):
        return None
    return Mixup(config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=num_classes)
