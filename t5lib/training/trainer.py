"""What every training shares: what is trained and how fast, averaged weights, checkpoints, a look at every loss.

t5lib.training.classifier (classifiers) and t5lib.training.denoiser (denoisers) add what a batch is and what its loss is.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from t5lib.conversion import new_parameters
from t5lib.data.batches import Batches, Inputs, open_batches
from t5lib.training import lora
from t5lib.training.checkpoints import Done, deferred_interrupt, load_checkpoint, save_checkpoint
from t5lib.training.nonfinite import explain_blow_up
from t5lib.utils.config import one_of
from t5lib.utils.errors import T5Error
from t5lib.utils.progress import progress

Log = Callable[[dict[str, float], int], None]
Rules = tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...]
KINDS_OF_BLOCKS = 256  # that one process may compile


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """The part of a training recipe that does not depend on the loss.

    Attributes:
        batch_size: examples a process and forward pass; times `accumulate` and the number of processes for a step.
        lr, lr_new: peak learning rates of inherited and of new parameters (adapters count as new).
        min_lr: the cosine's end, as a part of the peak; 1 for a constant rate.
        warmup: part of all steps with linearly rising learning rate.
        weight_decay: AdamW's, for matrices; vectors, biases and what timm spares (position tables) get none.
        clip_norm: bound of the gradient's norm; null for none.
        ema: decay of the averaged weights, which are then the result; null for none.
        trainable: "all"; "new" for the freeze protocol; "lora" for low-rank adapters of the projections around the
            new layers, merged at the end, everything else frozen (t5lib.training.lora).
        lora_rank, lora_alpha: width of the adapters, and their factor times lora_rank.
        precision: "fp32" or "bf16" (autocast).
        compile: torch.compile the transformer blocks, each by itself; one compilation serves all that are alike.
        checkpoint_every: steps between checkpoints.
    """

    batch_size: int = 64
    accumulate: int = 1
    lr: float = 2e-5
    lr_new: float = 4e-4
    min_lr: float = 0.01
    warmup: float = 0.1
    weight_decay: float = 0.05
    clip_norm: float | None = 1.0
    ema: float | None = None
    trainable: str = "all"
    lora_rank: int = 8
    lora_alpha: float = 16.0
    precision: str = "fp32"
    compile: bool = False
    checkpoint_every: int = 100
    seed: int = 0

    def __post_init__(self):
        one_of(self.trainable, ("all", "new", "lora"), "train.trainable")
        one_of(self.precision, ("fp32", "bf16"), "train.precision")
        self.check(
            (
                (("batch_size", "accumulate", "checkpoint_every"), lambda v: v > 0, "more than 0"),
                (("lora_rank", "lora_alpha"), lambda v: v > 0, "more than 0"),
                (("lr", "lr_new", "weight_decay"), lambda v: v >= 0, "0 or more"),
                (("min_lr", "warmup"), lambda v: 0 <= v <= 1, "a part, from 0 to 1"),
                (("ema",), lambda v: v is None or 0 < v < 1, "a decay between 0 and 1, or null"),
                (("clip_norm",), lambda v: v is None or v > 0, "more than 0, or null for no bound"),
            )
        )

    def check(self, rules: Rules) -> None:
        """Raise T5Error for the first of the named settings that its rule does not hold for."""
        for names, holds, expected in rules:
            for name in names:
                if not holds(getattr(self, name)):
                    raise T5Error(f"train: {name} is {getattr(self, name)}; expected {expected}")


@dataclass(kw_only=True)
class TrainReport:
    """`steps` done in all, wall-clock `seconds` of training (earlier runs included), examples a second, last loss."""

    steps: int
    seconds: float
    samples_per_second: float
    loss: float


class Trainer:
    """Model, optimizer, averaged weights and counters of one training; Accelerate places them.

    A subclass says what a batch is to the model (`example`), what its loss is, and what the model itself takes.
    """

    def __init__(self, model: nn.Module, config: LoopConfig, steps: int):
        # Not Accelerate's mixed precision: it would leave its autocast on the model for good. `cpu`: or else several
        # processes on a machine without accelerator would each train on their own.
        self.accelerator = Accelerator(mixed_precision="no", cpu=not torch.accelerator.is_available())
        self.config, self.total, self.plain = config, steps, model
        model.to(self.device).train()
        model.zero_grad(set_to_none=True)
        set_seed(config.seed)  # adapters start alike in all processes
        self.frozen = freeze(model, config)
        set_seed(config.seed, device_specific=True)  # Python, NumPy (mixup) and torch
        self.ema = ModelEmaV3(model, decay=config.ema, use_warmup=True) if config.ema else None
        self.model, self.optimizer = self.accelerator.prepare(model, self.make_optimizer(_groups(model, config)))
        self.compiled = contextlib.ExitStack()
        if config.compile:
            self.compiled.enter_context(compiled_blocks(model))
        self.done = Done()

    def example(self, batch: Any, number: int) -> Any:
        """A batch as `loss` wants it, on the device. `number` counts the batches of this process from the start."""
        raise NotImplementedError

    def loss(self, example: Any) -> Tensor:
        """A scalar."""
        raise NotImplementedError

    def inputs(self, example: Any) -> Inputs:
        """What the model is called with, for the search after a loss that is not finite."""
        raise NotImplementedError

    def make_optimizer(self, groups: list[dict]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, fused=self.device.type == "cuda")

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def run(self, batches: Batches, resume_dir: Path | None, log: Log | None) -> TrainReport:
        """All steps that are not done yet; see t5lib.training.classifier.train."""
        config, loss = self.config, math.nan
        try:
            if resume_dir:
                load_checkpoint(self.accelerator, resume_dir, self.done, self.ema)
            source = open_batches(batches, self.done.step * config.accumulate)
            title = f"train ({config.trainable})"
            with progress(title, self.total, self.done.step) as bar, deferred_interrupt() as interrupted:
                stop = False
                while self.done.step < self.total and not stop:
                    begun = time.monotonic()
                    taken = _take(source, config.accumulate, interrupted)
                    if taken:
                        values = self.step(taken)
                        self.done.seconds += time.monotonic() - begun
                        loss = values["loss"]
                        bar.advance(self.done.step, loss=loss)
                        if log and self.accelerator.is_main_process:
                            log(values, self.done.step)
                    stop = self.any_process(interrupted())
                    if resume_dir and (stop or self.done.step % config.checkpoint_every == 0):
                        save_checkpoint(self.accelerator, resume_dir, self.done, self.ema)
                if stop:
                    raise KeyboardInterrupt
            if self.ema:
                self.plain.load_state_dict(self.ema.module.state_dict())
        finally:
            self.close()
        seconds = self.done.seconds
        count = self.total * config.batch_size * config.accumulate * self.accelerator.num_processes
        return TrainReport(steps=self.total, seconds=seconds, samples_per_second=count / max(seconds, 1e-9), loss=loss)

    def step(self, batches: list[Any]) -> dict[str, float]:
        """One optimizer step over the given forward passes; returns what is worth a curve."""
        rates = self._set_rates()
        losses = []
        for index, batch in enumerate(batches):
            example = self.example(batch, self.done.step * len(batches) + index)
            last = index == len(batches) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                loss = self.loss(example)
                self.accelerator.backward(loss / len(batches))
            losses.append(loss.detach())
        norm = self.accelerator.clip_grad_norm_(self.plain.parameters(), self.config.clip_norm or math.inf)
        value, norm = torch.stack([torch.stack(losses).mean(), norm]).tolist()  # the only wait for the device in a step
        if not (math.isfinite(value) and math.isfinite(norm)):
            self.compiled.close()  # what looks for the cause hooks into every module
            inputs = self.inputs(example)
            raise T5Error(explain_blow_up(self.plain, inputs, self.config, self.done.step + 1, value, norm))
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

    def close(self) -> None:
        """The model is a plain one again, in eval mode, with a gradient for everything that had one."""
        self.compiled.close()
        if self.config.trainable == "lora":
            lora.merge(self.plain)
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        self.plain.eval()
        self.accelerator.free_memory()

    def _set_rates(self) -> dict[str, float]:
        factor = rate_factor(self.done.step, self.total, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        return {"lr_inherited": self.config.lr * factor, "lr_new": self.config.lr_new * factor}


def rate_factor(step: int, total: int, config: LoopConfig) -> float:
    """Learning rate at `step` (from 0) as a part of the peak: linear warm-up, then cosine to `min_lr`."""
    warm = round(config.warmup * total)
    if step < warm:
        return (step + 1) / warm
    through = (step - warm) / max(total - warm, 1)
    return config.min_lr + (1 - config.min_lr) * 0.5 * (1 + math.cos(math.pi * through))


@contextlib.contextmanager
def compiled_blocks(model: nn.Module) -> Iterator[None]:
    """Within, each transformer block of a timm or diffusers model is compiled by itself; one serves all of its kind.

    Blocks that differ in more than their weights (kind of attention, rate of stochastic depth) are compiled anew, more
    often than torch allows by default, past which it would quietly run the rest uncompiled. At the end the model is a
    plain one. What was compiled serves the next model of the same kind in this process.
    """
    blocks = model.blocks if hasattr(model, "blocks") else model.transformer_blocks
    with torch._dynamo.config.patch(recompile_limit=KINDS_OF_BLOCKS):
        try:
            for block in blocks:
                block.compile(dynamic=False)
            yield
        finally:
            for block in blocks:
                block._compiled_call_impl = None


def freeze(model: nn.Module, config: LoopConfig) -> list[nn.Parameter]:
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


def _groups(model: nn.Module, config: LoopConfig) -> list[dict]:
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


def _take(source: Iterator[Any], count: int, interrupted: Callable[[], bool]) -> list[Any] | None:
    """Batches for one step; None once Ctrl-C, which reaches the processes of a loader too, has ended them."""
    try:
        return [next(source) for _ in range(count)]
    except RuntimeError:
        if interrupted():
            return None
        raise
