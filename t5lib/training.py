"""One training loop for every protocol: freeze (new parameters only), adapters, fine-tune and control (everything)."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

from t5lib import lora
from t5lib.batches import Batches, open_batches
from t5lib.config import one_of
from t5lib.conversion import new_parameters
from t5lib.data import AugmentConfig
from t5lib.errors import T5Error
from t5lib.health import explain_blow_up
from t5lib.progress import progress
from t5lib.training_state import Done, deferred_interrupt, load_checkpoint, save_checkpoint

Log = Callable[[dict[str, float], int], None]
KINDS_OF_BLOCKS = 256  # that one process may compile


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training recipe. The defaults are the paper's for ViTs (section 6 of the method), epochs aside.

    Attributes:
        epochs: passes over the training images; may be a fraction.
        batch_size: images a process and forward pass; times `accumulate` and the number of processes for a step.
        lr, lr_new: peak learning rates of inherited and of new parameters (adapters count as new).
        min_lr: the cosine's end, as a part of the peak.
        warmup: part of all steps with linearly rising learning rate.
        weight_decay: AdamW's, for matrices; vectors, biases and what timm spares (position tables) get none.
        clip_norm: bound of the gradient's norm; null for none.
        trainable: "all"; "new" for the freeze protocol; "lora" for low-rank adapters of the projections around the
            new layers, merged at the end, everything else frozen (t5lib.lora).
        lora_rank, lora_alpha: width of the adapters, and their factor times lora_rank.
        distill: weight from 0 to 1 of the teacher's soft labels beside the true ones; 0 needs no teacher.
        ema: decay of the averaged weights, which are then the result; null for none.
        precision: "fp32" or "bf16" (autocast).
        compile: torch.compile the transformer blocks, each by itself; one compilation serves all that are alike.
        checkpoint_every: steps between checkpoints.
    """

    epochs: float = 30.0
    batch_size: int = 64
    accumulate: int = 1
    lr: float = 2e-5
    lr_new: float = 4e-4
    min_lr: float = 0.01
    warmup: float = 0.1
    weight_decay: float = 0.05
    clip_norm: float | None = 1.0
    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    distill: float = 0.0
    ema: float | None = None
    trainable: str = "all"
    lora_rank: int = 8
    lora_alpha: float = 16.0
    precision: str = "fp32"
    compile: bool = False
    checkpoint_every: int = 100
    seed: int = 0
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self):
        one_of(self.trainable, ("all", "new", "lora"), "train.trainable")
        one_of(self.precision, ("fp32", "bf16"), "train.precision")
        for names, holds, expected in (
            (("epochs", "batch_size", "accumulate", "checkpoint_every"), lambda v: v > 0, "more than 0"),
            (("lora_rank", "lora_alpha"), lambda v: v > 0, "more than 0"),
            (("lr", "lr_new", "weight_decay", "mixup", "cutmix"), lambda v: v >= 0, "0 or more"),
            (("min_lr", "warmup", "distill"), lambda v: 0 <= v <= 1, "a part, from 0 to 1"),
            (("label_smoothing",), lambda v: 0 <= v < 1, "0 or more, below 1"),
            (("ema",), lambda v: v is None or 0 < v < 1, "a decay between 0 and 1, or null"),
            (("clip_norm",), lambda v: v is None or v > 0, "more than 0, or null for no bound"),
        ):
            for name in names:
                if not holds(getattr(self, name)):
                    raise T5Error(f"train: {name} is {getattr(self, name)}; expected {expected}")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise T5Error(f"train: mixup and cutmix pair images; batch_size {self.batch_size} must be even")

    def steps(self, num_images: int, num_processes: int = 1) -> int:
        """Optimizer steps for `epochs` passes over `num_images`."""
        return max(1, round(self.epochs * num_images / (self.batch_size * self.accumulate * num_processes)))


@dataclass(kw_only=True)
class TrainReport:
    """`steps` done in all, wall-clock `seconds` of training (earlier runs included), images a second, last loss."""

    steps: int
    seconds: float
    samples_per_second: float
    loss: float


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
        batches: (images (B, 3, H, W), labels (B,)); see t5lib.batches. Every process passes its own part.
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
    run, loss = _Run(model, config, teacher, num_classes, steps), math.nan
    try:
        run.restore(resume_dir)
        source = open_batches(batches, run.done.step * config.accumulate)
        with progress(f"train ({config.trainable})", steps, run.done.step) as bar, deferred_interrupt() as interrupted:
            stop = False
            while run.done.step < steps and not stop:
                begun = time.monotonic()
                taken = _take(source, config.accumulate, interrupted)
                if taken:
                    values = run.step(taken)
                    run.done.seconds += time.monotonic() - begun
                    loss = values["loss"]
                    bar.advance(run.done.step, loss=loss)
                    if log and run.accelerator.is_main_process:
                        log(values, run.done.step)
                stop = run.any_process(interrupted())
                if resume_dir and (stop or run.done.step % config.checkpoint_every == 0):
                    run.save(resume_dir)
            if stop:
                raise KeyboardInterrupt
        run.take_average()
    finally:
        run.close()
    images = steps * config.batch_size * config.accumulate * run.accelerator.num_processes
    return TrainReport(
        steps=steps, seconds=run.done.seconds, samples_per_second=images / max(run.done.seconds, 1e-9), loss=loss
    )


def _take(source: Iterator[Any], count: int, interrupted: Callable[[], bool]) -> list[Any] | None:
    """Batches for one step; None once Ctrl-C, which reaches the processes of a loader too, has ended them."""
    try:
        return [next(source) for _ in range(count)]
    except RuntimeError:
        if interrupted():
            return None
        raise


class _Run:
    """Model, optimizer, averaged weights and counters of one training; Accelerate places them."""

    def __init__(self, model: nn.Module, config: TrainConfig, teacher: nn.Module | None, num_classes: int, steps: int):
        # Not Accelerate's mixed precision: it would leave its autocast on the model for good. `cpu`: or else several
        # processes on a machine without accelerator would each train on their own.
        self.accelerator = Accelerator(mixed_precision="no", cpu=not torch.accelerator.is_available())
        self.config, self.total, self.plain = config, steps, model
        device = self.accelerator.device
        model.to(device).train()
        model.zero_grad(set_to_none=True)
        set_seed(config.seed)  # adapters start alike in all processes
        self.frozen = freeze(model, config)
        set_seed(config.seed, device_specific=True)  # Python, NumPy (mixup) and torch
        self.ema = ModelEmaV3(model, decay=config.ema, use_warmup=True) if config.ema else None
        optimizer = torch.optim.AdamW(_groups(model, config), fused=device.type == "cuda")
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.compiled = contextlib.ExitStack()
        if config.compile:
            self.compiled.enter_context(compiled_blocks(model))
        self.teacher = teacher.to(device).eval() if config.distill else None
        self.mixup = _mixup(config, num_classes)
        self.done = Done()

    def step(self, batches: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """One optimizer step over the given forward passes; returns what is worth a curve."""
        rates = self._set_rates()
        losses = []
        for index, (images, labels) in enumerate(batches):
            images, labels = (t.to(self.accelerator.device, non_blocking=True) for t in (images, labels))
            last = index == len(batches) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                loss = self._loss(images, labels)
                self.accelerator.backward(loss / len(batches))
            losses.append(loss.detach())
        norm = self.accelerator.clip_grad_norm_(self.plain.parameters(), self.config.clip_norm or math.inf)
        value, norm = torch.stack([torch.stack(losses).mean(), norm]).tolist()  # the only wait for the device in a step
        if not (math.isfinite(value) and math.isfinite(norm)):
            self.compiled.close()  # what looks for the cause hooks into every module
            raise T5Error(explain_blow_up(self.plain, images, self.config, self.done.step + 1, value, norm))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done.step += 1
        if self.ema:
            self.ema.update(self.plain, step=self.done.step)
        return {"loss": value, **rates, "grad_norm": norm}

    def any_process(self, holds: bool) -> bool:
        """Whether it holds in any process: all must stop after the same step."""
        if self.accelerator.num_processes == 1:
            return holds
        if holds:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def restore(self, folder: Path | None) -> None:
        if folder:
            load_checkpoint(self.accelerator, folder, self.done, self.ema)

    def save(self, folder: Path) -> None:
        save_checkpoint(self.accelerator, folder, self.done, self.ema)

    def take_average(self) -> None:
        if self.ema:
            self.plain.load_state_dict(self.ema.module.state_dict())

    def close(self) -> None:
        self.compiled.close()
        if self.config.trainable == "lora":
            lora.merge(self.plain)
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        self.plain.eval()
        self.accelerator.free_memory()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
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

    def _set_rates(self) -> dict[str, float]:
        factor = rate_factor(self.done.step, self.total, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        return {"lr_inherited": self.config.lr * factor, "lr_new": self.config.lr_new * factor}


def rate_factor(step: int, total: int, config: TrainConfig) -> float:
    """Learning rate at `step` (from 0) as a part of the peak: linear warm-up, then cosine to `min_lr`."""
    warm = round(config.warmup * total)
    if step < warm:
        return (step + 1) / warm
    through = (step - warm) / max(total - warm, 1)
    return config.min_lr + (1 - config.min_lr) * 0.5 * (1 + math.cos(math.pi * through))


@contextlib.contextmanager
def compiled_blocks(model: nn.Module) -> Iterator[None]:
    """Within, each transformer block of a timm model is compiled by itself; the first of a kind compiles for all.

    Blocks that differ in more than their weights (kind of attention, rate of stochastic depth) are compiled anew, more
    often than torch allows by default, past which it would quietly run the rest uncompiled. At the end the model is a
    plain one. What was compiled serves the next model of the same kind in this process.
    """
    with torch._dynamo.config.patch(recompile_limit=KINDS_OF_BLOCKS):
        try:
            for block in model.blocks:
                block.compile(dynamic=False)
            yield
        finally:
            for block in model.blocks:
                block._compiled_call_impl = None


def freeze(model: nn.Module, config: TrainConfig) -> list[nn.Parameter]:
    """Leave only what `config.trainable` names with a gradient; returns the parameters it froze.

    Raises:
        T5Error: "new" or "lora" on a model without converted layers.
    """
    if config.trainable == "all":
        return []
    if config.trainable == "lora":
        before = [p for p in model.parameters() if p.requires_grad]
        lora.attach(model, config.lora_rank, config.lora_alpha)
        return before
    new = set(new_parameters(model).values())
    if not new:
        raise T5Error("the freeze protocol trains the new parameters, but this model has none; convert it first")
    frozen = [p for p in model.parameters() if p.requires_grad and p not in new]
    for parameter in frozen:
        parameter.requires_grad_(False)
    return frozen


def _groups(model: nn.Module, config: TrainConfig) -> list[dict]:
    """Parameters by (new or inherited, decayed or not): their learning rates and weight decay differ."""
    new = set(new_parameters(model)) | {name for name, _ in model.named_parameters() if "lora_" in name}
    spared = getattr(model, "no_weight_decay", set)()
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.ndim > 1 and name not in spared
            groups.setdefault((name in new, decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "peak": config.lr_new if is_new else config.lr,
            "weight_decay": config.weight_decay if decayed else 0.0,
        }
        for (is_new, decayed), parameters in groups.items()
    ]


def _mixup(config: TrainConfig, num_classes: int) -> Mixup | None:
    if not (config.mixup or config.cutmix):
        return None
    return Mixup(config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=num_classes)
