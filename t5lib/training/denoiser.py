"""What a denoiser learns from: noised latents, the noise's own loss, the distance to a teacher; and a held-out loss.

Shapes: B images, C latent channels of h × w; a batch is what t5lib.training.objectives says.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn
from torch.nn import functional as F

from t5lib.data.batches import seeded
from t5lib.families import family_of
from t5lib.families.inputs import Inputs
from t5lib.training.objectives import Batch, Noised, Noising
from t5lib.training.recipe import Decay, RecordableConfig
from t5lib.training.trainer import Objective, Trainer
from t5lib.utils import processes
from t5lib.utils.config import AtLeastOne, BatchSize, Rate, Share, Weight, settings
from t5lib.utils.errors import T5Error
from t5lib.utils.processes import WHOLE, Part

TRAINING, VALIDATION = range(2)  # what tells the noise of one from that of the other with the same seed


@settings
class DenoiserTrainConfig(RecordableConfig):
    """A recipe for denoisers. The defaults are for SD3.5 (section 6 of the method says what is published).

    Attributes:
        steps: optimizer steps.
        align: weight of the squared distance to a teacher's prediction on the same noised latents; 0 for none.
        teacher: "ema" (the averaged weights of this training, as the paper does for SD3.5), or "source" (the frozen
            softmax original).
        Others: see RecordableConfig and LoopConfig.
    """

    steps: AtLeastOne = 3000
    batch_size: BatchSize = 4
    lr: Rate = 1e-5
    lr_new: Rate = 2e-4
    warmup: Share = 0.03
    weight_decay: Rate = 0.0
    ema: Decay | None = 0.999
    align: Weight = 0.0
    teacher: Literal["ema", "source"] = "ema"

    def __post_init__(self):
        super().__post_init__()
        if self.align and self.teacher == "ema" and self.ema is None:
            raise T5Error("teacher 'ema' needs averaged weights; set ema, such as 0.999, or teacher 'source'")


class Denoising(Objective[Noised]):
    """Batches are latents and conditions, as t5lib.training.objectives says.

    Args:
        config: of the recipe: align and teacher; noise follows from its seed and the batch's number.
        noising: how latents are noised, and the loss.
        teacher: the softmax original, when config.align is set and config.teacher is "source". With precision "bf16"
            its weights may be bfloat16, at half the memory.

    Raises:
        T5Error: a missing teacher, or one that is narrower than the training's precision.
    """

    def __init__(self, config: DenoiserTrainConfig, noising: Noising, teacher: nn.Module | None = None):
        if config.align and config.teacher == "source" and teacher is None:
            raise T5Error("train: teacher is 'source' but no teacher was given; pass the softmax original as teacher=")
        if teacher and config.precision == "fp32" and next(teacher.parameters()).dtype != torch.float32:
            raise T5Error(
                f"train: the teacher's weights are {next(teacher.parameters()).dtype} and precision is fp32; call "
                "teacher.float(), or set precision: bf16"
            )
        self.config, self.noising, self.teacher = config, noising, teacher
        self.in_graphs = config.graphs

    def begin(self, trainer: Trainer) -> None:
        for module in trainer.plain.modules():  # batches come with labels dropped; every block would drop others
            if isinstance(module, LabelEmbedding):
                module.eval()
        if not self.config.align:
            self.teacher = None
            return
        if self.config.teacher == "ema" and trainer.ema:
            self.teacher = trainer.ema.module
        elif self.teacher is not None:
            self.teacher = trainer.beside(self.teacher).eval()
        trainer.compile_blocks(self.teacher)

    def example(self, batch: Batch, number: int, trainer: Trainer) -> Noised:
        noised = self.noising.noised(batch, seeded(self.config.seed, TRAINING, number), trainer.part)
        trainer.adapter.check_inputs(trainer.plain, noised.inputs)
        return noised.to(trainer.device)

    def inputs(self, example: Noised) -> Inputs:
        return example.inputs

    def tensors(self, example: Noised) -> dict[str, Tensor]:
        return example.tensors()

    def loss(self, example: Noised, trainer: Trainer) -> Tensor:
        if self.teacher is None:
            return self.noising.loss(trainer.output(example.inputs), example)
        with torch.no_grad():  # first, before there are activations beside its own
            wanted = trainer.output(example.inputs, self.teacher)
        output = trainer.output(example.inputs)
        ours, theirs = (self.noising.prediction(each, example) for each in (output, wanted))
        return self.noising.loss(output, example) + self.config.align * F.mse_loss(ours, theirs)


@torch.no_grad()
def validation_loss(
    models: dict[str, nn.Module],
    batches: Iterable[Batch],
    *,
    noising: Noising,
    seed: int = 0,
    precision: str = "fp32",
    part: Part = WHOLE,
) -> dict[str, float]:
    """The noising's loss of each model, on the same latents, noise and noise levels: those of `seed`.

    Args:
        models: by name, all on one device; left in eval mode.
        batches: finite; where several processes take the batches in turn, this one's.
        precision: "fp32" or "bf16" (autocast).
        part: of the batches, that `batches` are.

    Raises:
        T5Error: no batch.
    """
    device = next(next(iter(models.values())).parameters()).device
    sums, count = torch.zeros(len(models), dtype=torch.float64), 0
    for number, batch in zip(part.numbers(0), batches, strict=False):
        noised = noising.noised(batch, seeded(seed, VALIDATION, number)).to(device)
        for index, model in enumerate(models.values()):
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                output = family_of(model).call(model.eval(), noised.inputs)
            sums[index] += noising.loss(output, noised).item() * len(noised.clean)
        count += len(noised.clean)
    of_all = processes.gathered((sums, count)) if part.turns > 1 else [(sums, count)]
    sums, count = torch.stack([each for each, _ in of_all]).sum(0), sum(each for _, each in of_all)
    if not count:
        raise T5Error("the validation batches are empty; expected at least one batch of latents")
    return dict(zip(models, (sums / count).tolist(), strict=True))
