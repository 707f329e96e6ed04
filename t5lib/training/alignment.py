"""Alignment: train the whole converted model on the whole softmax model, without labels.

Calibration (t5lib.training.calibration) fits every new layer alone, on the inputs that the softmax model gives it. What
each layer leaves then adds up on the way through the model. Here the student runs on its own, and what its blocks and
its output differ from the teacher's is the loss. It runs in t5lib.training.trainer, as every training does.

Shapes: B images, N image tokens, C channels.

Sources: matching a network's final features after its attentions have been fitted is published in ViT-AdaLA (arXiv
2603.16063); "Linearizing Vision Transformer with Test-Time Training" (arXiv 2605.02772) aligns SD3.5 to an average of
its own weights. The weights, rates and the damping here are our own (data/scenes/study.py tries them; docs/results).
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from t5lib.conversion import ttt_layers
from t5lib.data.batches import Batches, open_batches
from t5lib.families import family_of
from t5lib.families.base import Adapter
from t5lib.families.inputs import Inputs, check_finite, placed
from t5lib.layers.grid import TokenGrid
from t5lib.training.loop import Log
from t5lib.training.pair import check_pair, dtypes
from t5lib.training.recipe import LoopConfig, RecordableConfig
from t5lib.training.recorder import Recorder, output_error, token_errors, token_variance
from t5lib.training.trainer import Objective, Trainer, TrainReport, train
from t5lib.utils.config import BatchSize, Rate, Share, Weight, WholeNumber, checked, settings
from t5lib.utils.errors import T5Error
from t5lib.utils.modes import evaluating
from t5lib.utils.processes import Part
from t5lib.utils.seeds import own_random_states
from t5lib.utils.weights import digest

AUTO = "auto"


@settings
class AlignConfig(RecordableConfig):
    """A recipe for alignment.

    Every error is the squared error over the variance of what the teacher gives.

    Attributes:
        steps: optimizer steps; 0 skips alignment.
        trainable: "blocks"; "attention" for the converted layers with the projections that they inherit; "new" for
            their new parameters alone; "lora" as in LoopConfig; "all" for everything. Around its blocks the student
            is what the teacher is, and its patch embedding bears far smaller steps than the blocks do: hence "blocks".
        blocks: weight of the blocks' errors together.
        block_growth: weight of a block's error over that of the block before it; 1 for all alike.
        features: name of a part of the model, called once in a forward, whose tokens are matched too. "auto" is the
            part from which dense features are read, such as "norm" of timm's models, and nothing in denoisers, whose
            output says it all. Null for none.
        features_weight: weight of the error of `features`.
        output: weight of the error of the model's output (logits, pooled features, a denoiser's prediction).
        cosine: weight of 1 minus the cosine of `features`, beside their squared error; without them it is nothing.
        damping: part of the gradient that does not reach a block from the block after it; 0 lets all of it through, 1
            leaves every block to its own error. The first blocks of a calibrated model are nearly right already; the
            errors of all later ones together would drive them away from that. More of it bears higher rates.
        prefix: weight of class and register tokens beside that of the image's, in blocks and features.
        Others: see RecordableConfig and LoopConfig.
    """

    steps: WholeNumber = 2000
    batch_size: BatchSize = 16
    lr: Rate = 2e-4
    lr_new: Rate = 2e-3
    min_lr: Share = 0.0
    warmup: Share = 0.1
    weight_decay: Rate = 0.0
    trainable: Literal["blocks", "attention", "new", "lora", "all"] = "blocks"  # type: ignore[assignment]  # more
    blocks: Weight = 1.0
    block_growth: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    features: str | None = AUTO
    features_weight: Weight = 2.0
    output: Weight = 1.0
    cosine: Weight = 2.0
    damping: Share = 0.75
    prefix: Weight = 0.1

    def __post_init__(self):
        super().__post_init__()
        if not (self.blocks or self.output or (self.features and (self.features_weight or self.cosine))):
            raise T5Error("align: blocks, features and output all have weight 0; there is nothing to learn from")

    def features_of(self, family: Adapter) -> str | None:
        """The name of the part whose tokens are matched in models of a family."""
        return family.features if self.features == AUTO else self.features


@dataclass(kw_only=True)
class AlignReport(TrainReport):
    """Cost, and errors on the first batch, which the fit leaves out (a loader that repeats gives it again).

    Attributes:
        error_before, error_after: of every block by name (its image tokens), of "features" (likewise) and of "output".
    """

    error_before: dict[str, float]
    error_after: dict[str, float] = field(default_factory=dict)


@own_random_states()
@torch.enable_grad()
def align(
    model: nn.Module,
    *,
    teacher: nn.Module,
    batches: Batches,
    config: AlignConfig | None = None,
    resume_dir: Path | str | None = None,
    log: Log | None = None,
) -> AlignReport:
    """Train `model`, in place, to do what `teacher` does.

    Args:
        model: a converted model (t5lib.convert), in float32; best after t5lib.calibrate.
        teacher: the softmax model it was converted from; it is not changed. With precision "bf16" its weights may be
            bfloat16, at half the memory.
        batches: as in t5lib.calibrate: images, or the keyword arguments of a denoiser. Sizes may change between them.
            Several processes pass the same.
        config: the recipe.
        resume_dir: checkpoints; a second call with the same folder continues and, on a CPU, ends with the same bits.
        log: called in the main process with loss, learning rates, gradient norm, and the step.

    Raises:
        T5Error: the models do not match, a part does not exist, or the loss is not finite.
        KeyboardInterrupt: Ctrl-C, at the end of the step and after a checkpoint has been written.
    """
    config = checked(config, AlignConfig)
    objective = Alignment(config, model, teacher)
    with evaluating(teacher):
        return _aligned(model, objective, batches, resume_dir, log)


def _aligned(
    model: nn.Module, objective: "Alignment", batches: Batches, resume_dir: Path | str | None, log: Log | None
) -> AlignReport:
    config, probe = objective.config, _probe(model, objective, batches)
    before = _measured(model, objective, probe)
    if not config.steps:
        return AlignReport(
            steps=0, seconds=0.0, samples_per_second=0.0, loss=0.0, error_before=before, error_after=before
        )
    with _trainable(model, config) as recipe:
        try:
            report = train(
                model,
                lambda start, part: open_batches(batches, start + 1, part),  # the first is measured on
                objective,
                recipe,
                steps=config.steps,
                resume_dir=resume_dir,
                log=log,
            )
        finally:
            objective.end()
    return AlignReport(**vars(report), error_before=before, error_after=_measured(model, objective, probe))


class Alignment(Objective[Inputs]):
    """Batches are what the models are called with (Adapter.inputs).

    Args:
        config: of the recipe: weights of the errors.
        model: the student.
        teacher: the softmax model.

    Raises:
        T5Error: the models do not match, or what config.features names is no part of them.
    """

    def __init__(self, config: AlignConfig, model: nn.Module, teacher: nn.Module):
        self.config, self.family, self.teacher = config, family_of(model), teacher
        self.in_graphs = config.graphs
        self.features = config.features_of(self.family)
        _check(model, teacher, config, self.features)
        names = self.family.attention_names(teacher)
        count = len(list(self.family.blocks(model)))
        # Blocks of some denoisers hold two attentions.
        self.names = list(dict.fromkeys(self.family.block_name(name) for name in names))
        if len(self.names) != count:
            self.names = [f"block {index}" for index in range(count)]
        growth = [config.block_growth**index for index in range(count)]
        self.weights = [config.blocks * each / sum(growth) for each in growth]
        self.errors: Callable[..., dict[str, Tensor]] = token_errors
        self.recorders: list[Recorder] = []

    def begin(self, trainer: Trainer) -> None:
        trainer.plain.eval()  # what is dropped at random in training would only blur what is to be matched
        self.placed = trainer.beside(self.teacher).eval()
        trainer.compile_blocks(self.placed)
        if trainer.compiled:
            self.errors = torch.compile(token_errors, dynamic=False)
        self.recorders = [
            Recorder(self.family, trainer.plain, self.features, self.config.damping),
            Recorder(self.family, self.placed, self.features),
        ]

    def made_of(self) -> dict[str, Any]:
        return {"teacher": digest(self.teacher)}

    def end(self) -> None:
        """Leave nothing in the models."""
        for recorder in self.recorders:
            recorder.remove()
        self.recorders, self.errors = [], token_errors

    def example(self, batch: Any, number: int, trainer: Trainer) -> Inputs:
        inputs = self.family.inputs(batch)
        self.family.check_inputs(self.teacher, inputs)
        return placed(inputs, trainer.device, torch.float32)

    def inputs(self, example: Inputs) -> Inputs:
        return example

    def loss(self, example: Inputs, trainer: Trainer) -> Tensor:
        ours, theirs = self.recorders
        with torch.no_grad(), theirs.recording():
            wanted = trainer.output(example, self.placed)
        with ours.recording():
            output = trainer.output(example)
        grid = self.family.grid(trainer.plain, example)
        loss = self.weighed(ours, theirs, output, wanted, grid, trainer.part)
        for recorder in self.recorders:
            recorder.forget()  # what the backward pass needs, autograd keeps; the rest is free, in a graph's memory too
        return loss

    def weighed(
        self, ours: "Recorder", theirs: "Recorder", output: Tensor, wanted: Tensor, grid: TokenGrid, part: Part
    ) -> Tensor:
        """The sum of all errors by their weights, a scalar; `part`: of the images, that are here."""
        config = self.config
        # also with weight 0: several processes wait for a gradient of all that the output follows from
        loss = config.output * output_error(output, wanted, part)
        for weight, our_block, their_block in zip(self.weights, ours.blocks, theirs.blocks, strict=True):
            if weight:
                variance = token_variance(their_block, grid, part)
                errors = self.errors(our_block, their_block, grid, variance=variance)
                loss = loss + weight * self._with_prefix(errors)
        if self.features:
            variance = token_variance(theirs.features, grid, part)
            errors = self.errors(ours.features, theirs.features, grid, cosine=bool(config.cosine), variance=variance)
            loss = loss + config.features_weight * self._with_prefix(errors)
            if config.cosine:
                loss = loss + config.cosine * errors["cosine"]
        return loss

    def _with_prefix(self, errors: dict[str, Tensor]) -> Tensor:
        return errors["image"] + self.config.prefix * errors["prefix"] if "prefix" in errors else errors["image"]

    @torch.no_grad()
    def measure(self, model: nn.Module, inputs: Inputs) -> dict[str, float]:
        """The errors of `model` on a batch, by name."""
        device = next(model.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            seen = []
            for each in (model, self.teacher):
                recorder = Recorder(self.family, each, self.features)
                try:
                    with recorder.recording():
                        seen.append((recorder, self.family.call(each, inputs)))
                finally:
                    recorder.remove()
        (ours, output), (theirs, wanted) = seen
        grid = self.family.grid(model, inputs)
        if self.features:
            theirs.check_features(self.features, grid)
        errors = {
            name: token_errors(block, target, grid)["image"]
            for name, block, target in zip(self.names, ours.blocks, theirs.blocks, strict=True)
        }
        if self.features:
            errors["features"] = token_errors(ours.features, theirs.features, grid)["image"]
        errors["output"] = output_error(output, wanted)
        return {name: error.item() for name, error in errors.items()}


def _check(model: nn.Module, teacher: nn.Module, config: AlignConfig, features: str | None) -> None:
    check_pair(model, teacher)
    ours, theirs = (dtypes(each) - {torch.float32} for each in (model, teacher))
    if ours:
        raise T5Error(f"align: the model has weights in {ours.pop()}, not in float32; call model.float()")
    if config.precision == "fp32" and theirs:
        raise T5Error(
            f"align: the teacher has weights in {theirs.pop()} and precision is fp32; call teacher.float(), or set "
            "precision: bf16"
        )
    if features:
        try:
            model.get_submodule(features)
        except AttributeError:
            raise T5Error(
                f"align: features '{features}' is not a part of a {type(model).__name__}; name one of "
                f"{', '.join(name for name, _ in model.named_children())}, or null"
            ) from None


@contextmanager
def _trainable(model: nn.Module, config: AlignConfig) -> Iterator[LoopConfig]:
    """Within, only what config.trainable names has a gradient; yields the recipe for the trainer, which does not know
    "blocks" and "attention"."""
    if config.trainable == "blocks":
        parts = list(family_of(model).blocks(model))
    elif config.trainable == "attention":
        parts = list(ttt_layers(model).values())
    else:
        yield config
        return
    kept = {parameter for part in parts for parameter in part.parameters()}
    frozen = [p for p in model.parameters() if p.requires_grad and p not in kept]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield dataclasses.replace(config, trainable="all")
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def _probe(model: nn.Module, objective: Alignment, batches: Batches) -> Inputs:
    """The first batch, checked."""
    inputs = objective.family.inputs(next(open_batches(batches, 0)))
    objective.family.check_inputs(model, inputs)
    check_finite(inputs)
    return inputs


def _measured(model: nn.Module, objective: Alignment, inputs: Inputs) -> dict[str, float]:
    """The errors on `inputs`; leaves the models in the modes that they were in."""
    device = next(model.parameters()).device
    objective.teacher.to(device)
    with evaluating(model, objective.teacher):
        return objective.measure(model, placed(inputs, device, torch.float32))
