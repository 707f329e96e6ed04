"""Training of denoisers (SD3, DiT) by every protocol, converted or, as the control, not; and a loss to compare them by.

Shapes: B images, C latent channels of h × w; a batch is what t5lib.training.objectives says.
"""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn
from torch.nn import functional as F

from t5lib.data.batches import Batches, seeded
from t5lib.training.objectives import Batch, Noised, Objective
from t5lib.training.trainer import Log, LoopConfig, Trainer, TrainReport, compiled_blocks
from t5lib.utils.config import one_of
from t5lib.utils.errors import T5Error

TEACHERS = ("ema", "source")
VALIDATION = 1  # what tells the noise of a validation from that of a training with the same seed


@dataclass(frozen=True, kw_only=True)
class DenoiserTrainConfig(LoopConfig):
    """A recipe for denoisers. The defaults are for SD3.5 (section 6 of the method says what is published).

    Attributes:
        steps: optimizer steps.
        align: weight of the squared distance to a teacher's prediction on the same noised latents; 0 for none.
        teacher: "ema" (the averaged weights of this training, as the paper does for SD3.5), or "source" (the frozen
            softmax original).
        gradient_checkpointing: compute a block's activations again in the backward pass instead of keeping them.
        optimizer: "adamw", or "adamw8bit", whose state takes a quarter of the memory (needs bitsandbytes).
        Others: see LoopConfig.
    """

    steps: int = 3000
    batch_size: int = 4
    lr: float = 1e-5
    lr_new: float = 2e-4
    warmup: float = 0.03
    weight_decay: float = 0.0
    ema: float | None = 0.999
    align: float = 0.0
    teacher: str = "ema"
    gradient_checkpointing: bool = False
    optimizer: str = "adamw"

    def __post_init__(self):
        super().__post_init__()
        one_of(self.teacher, TEACHERS, "train.teacher")
        one_of(self.optimizer, ("adamw", "adamw8bit"), "train.optimizer")
        self.check(
            (
                (("steps",), lambda v: v > 0, "more than 0"),
                (("align",), lambda v: v >= 0, "0 or more"),
            )
        )
        if self.align and self.teacher == "ema" and self.ema is None:
            raise T5Error("train: teacher 'ema' needs averaged weights; set ema, such as 0.999, or teacher 'source'")


def train_diffusion(
    model: nn.Module,
    batches: Batches,
    config: DenoiserTrainConfig,
    *,
    objective: Objective,
    teacher: nn.Module | None = None,
    resume_dir: Path | None = None,
    log: Log | None = None,
) -> TrainReport:
    """Train the denoiser `model` in place.

    Args:
        model: a diffusers SD3Transformer2DModel or DiTTransformer2DModel in float32, converted or not.
        batches: see t5lib.training.objectives and t5lib.data.batches. Every process passes its own part.
        objective: how latents are noised, and the loss; noise follows from config.seed, process and batch number.
        teacher: the softmax original, when config.align is set and config.teacher is "source". With precision "bf16"
            its weights may be bfloat16, at half the memory.
        resume_dir: checkpoints; a second call with the same folder continues and, on a CPU, ends with the same bits.
        log: called in the main process with loss, learning rates, gradient norm, and the step.

    Raises:
        T5Error: nothing to train, weights in half precision, a missing teacher or bitsandbytes, or a loss that is not
            finite (step, layers and advice named).
        KeyboardInterrupt: Ctrl-C, at the end of the step and after a checkpoint has been written.
    """
    if config.align and config.teacher == "source" and teacher is None:
        raise T5Error("train: teacher is 'source' but there is none; pass the softmax original as teacher=")
    narrow = {str(p.dtype) for p in model.parameters() if p.dtype.itemsize < 4}
    if narrow:
        raise T5Error(
            f"train: the model's weights are {', '.join(narrow)}, in which small steps are lost; load it with "
            "torch_dtype=torch.float32 and set precision: bf16"
        )
    if teacher and config.precision == "fp32" and next(teacher.parameters()).dtype != torch.float32:
        raise T5Error(
            f"train: the teacher's weights are {next(teacher.parameters()).dtype} and precision is fp32; call "
            "teacher.float(), or set precision: bf16"
        )
    return _Denoising(model, config, objective, teacher).run(batches, resume_dir, log)


@torch.no_grad()
def validation_loss(
    models: dict[str, nn.Module], batches: Iterable[Batch], *, objective: Objective, seed: int = 0, precision="fp32"
) -> dict[str, float]:
    """The objective's loss of each model, on the same latents, noise and noise levels: those of `seed`.

    Args:
        models: by name, all on one device; left in eval mode.
        batches: finite.
        precision: "fp32" or "bf16" (autocast).

    Raises:
        T5Error: no batch.
    """
    device = next(next(iter(models.values())).parameters()).device
    sums, count = torch.zeros(len(models), dtype=torch.float64), 0
    for number, batch in enumerate(batches):
        noised = objective.noised(batch, seeded(seed, VALIDATION, number)).to(device)
        for index, model in enumerate(models.values()):
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                output = model.eval()(**noised.inputs, return_dict=False)[0]
            sums[index] += objective.loss(output, noised).item() * len(noised.clean)
        count += len(noised.clean)
    if not count:
        raise T5Error("the validation batches are empty; expected at least one batch of latents")
    return dict(zip(models, (sums / count).tolist(), strict=True))


class _Denoising(Trainer):
    """Noised latents, the objective's loss, and the distance to a teacher."""

    config: DenoiserTrainConfig

    def __init__(self, model: nn.Module, config: DenoiserTrainConfig, objective: Objective, teacher: nn.Module | None):
        self.optimizer_class = _adamw8bit() if config.optimizer == "adamw8bit" else None
        super().__init__(model, config, config.steps)
        self.objective = objective
        for module in model.modules():  # batches come with labels dropped; every block would drop others
            if isinstance(module, LabelEmbedding):
                module.eval()
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        self.teacher = None
        if config.align:
            self.teacher = self.ema.module if config.teacher == "ema" else teacher.to(self.device).eval()
            if config.compile:
                self.compiled.enter_context(compiled_blocks(self.teacher))

    def make_optimizer(self, groups: list[dict]) -> torch.optim.Optimizer:
        return self.optimizer_class(groups) if self.optimizer_class else super().make_optimizer(groups)

    def example(self, batch: Batch, number: int) -> Noised:
        generator = seeded(self.config.seed, 0, number, self.accelerator.process_index)
        return self.objective.noised(batch, generator).to(self.device)

    def inputs(self, example: Noised) -> dict[str, Tensor]:
        return example.inputs

    def loss(self, example: Noised) -> Tensor:
        with self.autocast():
            output = self.model(**example.inputs, return_dict=False)[0]
        loss = self.objective.loss(output, example)
        if self.teacher is None:
            return loss
        with torch.no_grad(), self.autocast():
            wanted = self.teacher(**example.inputs, return_dict=False)[0]
        given, wanted = (self.objective.prediction(each, example) for each in (output, wanted))
        return loss + self.config.align * F.mse_loss(given, wanted)

    def close(self) -> None:
        if self.config.gradient_checkpointing:
            self.plain.disable_gradient_checkpointing()
        super().close()


def _adamw8bit() -> type[torch.optim.Optimizer]:
    with contextlib.suppress(ImportError):
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit
    raise T5Error("train: optimizer 'adamw8bit' needs bitsandbytes; install it (pip install bitsandbytes), or 'adamw'")
