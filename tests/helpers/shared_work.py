"""What several processes do together, and one alone, to be compared: each returns the losses and the weights."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from tiny import random_images, tiny_vit
from tiny_denoisers import sd3_batch, tiny_sd3
from torch import nn
from torch.distributed.tensor import DTensor
from training_job import batch, run

import t5lib
from t5lib.layers.config import TTTConfig
from t5lib.training.alignment import AlignConfig
from t5lib.training.classifier import TrainConfig
from t5lib.training.denoiser import DenoiserTrainConfig, Denoising, validation_loss
from t5lib.training.layer_groups import CalibrateConfig
from t5lib.training.objectives import RectifiedFlow, noised_inputs
from t5lib.training.trainer import Trainer, train
from t5lib.utils import processes

CLASSIFY = TrainConfig(
    batch_size=8, lr=1e-3, lr_new=1e-2, warmup=0.25, mixup=0.8, cutmix=1.0, ema=0.9, checkpoint_every=2
)
ALIGN = AlignConfig(steps=3, batch_size=8, lr=1e-3, lr_new=3e-3)
DENOISE = DenoiserTrainConfig(steps=3, batch_size=4, lr=1e-4, lr_new=1e-3, align=0.5, teacher="source")
CALIBRATE = CalibrateConfig(steps=11, batch_size=8, pool=2, warmup=2, checkpoint_every=4)
Work = tuple[list[float], dict[str, np.ndarray]]


def classify(changes: dict[str, Any], folder: Path | None = None, stop: int = 1000, drop: float = 0.0) -> Work:
    """Four steps. `stop`: break off in all processes at the batch of this number."""
    model = _converted(tiny_vit("average_pool", drop_path_rate=drop, proj_drop_rate=drop / 2))
    config, losses = dataclasses.replace(CLASSIFY, **changes), list[float]()
    source = _numbered(lambda number: batch(number, size=config.batch_size), stop)
    run(model, config, source=source, steps=4, resume_dir=folder, log=lambda values, _: losses.append(values["loss"]))
    return losses, _weights(model)


def break_down(rank: int) -> None:
    """A loss that is not finite in one process alone."""
    model = _converted(tiny_vit("average_pool"))
    if processes.state().process_index == rank:
        model.blocks[1].register_forward_hook(lambda _module, _inputs, output: output * math.inf)
    run(model, CLASSIFY, source=[batch(0, size=8)], steps=2)


def denoise(changes: dict[str, Any]) -> Work:
    """The last of the losses is that on held-out latents."""
    teacher, losses = tiny_sd3(), list[float]()
    model, config = _converted(teacher), dataclasses.replace(DENOISE, **changes)
    latents = [sd3_batch(number, size=config.batch_size) for number in range(3)]
    objective = Denoising(config, RectifiedFlow(), teacher)
    train(model, latents, objective, config, steps=3, log=lambda values, _: losses.append(values["loss"]))
    part = processes.turns()
    ours = latents[part.turn :: part.turns]
    held_out = validation_loss({"model": model}, ours, noising=RectifiedFlow(), seed=3, part=part)
    return [*losses, held_out["model"]], _weights(model)


def align(changes: dict[str, Any]) -> Work:
    """The last of the losses are the errors of the report."""
    teacher, losses = tiny_vit("deit"), list[float]()
    model, config = _converted(teacher), dataclasses.replace(ALIGN, **changes)
    images = [random_images(config.batch_size, seed=number) for number in range(3)]
    log = {"log": lambda values, _: losses.append(values["loss"])}
    report = t5lib.align(model, teacher=teacher, batches=images, config=config, **log)
    return [*losses, *report.error_after.values()], _weights(model)


def calibrate(changes: dict[str, Any], folder: Path | None = None, stop: int = 1000) -> Work:
    """The last of the losses are the errors of the report. `stop`: break off at the batch of this number."""
    teacher, losses = tiny_sd3(), list[float]()
    model, config = _converted(teacher), dataclasses.replace(CALIBRATE, **changes)
    latents = _numbered(lambda number: sd3_batch(number, size=8), stop)
    options = {"resume_dir": folder, "log": lambda values, _: losses.append(values["loss"])}
    batches = noised_inputs(latents, RectifiedFlow(), 5)
    report = t5lib.calibrate(model, teacher=teacher, batches=batches, config=config, **options)
    return [*losses, *report.error_after.values()], _weights(model)


def in_pieces(work: Callable[..., Work], *arguments: Any) -> Work:
    """With FSDP2, and all weights that are trained, their gradients and what AdamW keeps of them in pieces."""
    step, seen = Trainer.step, set[bool]()

    def watched(trainer: Trainer) -> dict[str, float]:
        told = step(trainer)
        of_adam = [each["exp_avg"] for each in trainer.optimizer.optimizer.state.values()]
        averaged = [*trainer.ema.module.parameters()] if trainer.ema else []
        every = [*trainer.plain.parameters(), *of_adam, *averaged]
        seen.add(all(isinstance(tensor, DTensor) for tensor in every))
        seen.add(sum(tensor.to_local().numel() for tensor in every) < 0.7 * sum(tensor.numel() for tensor in every))
        return told

    os.environ[processes.STRATEGY] = "fsdp2"
    try:
        with patch.object(Trainer, "step", watched):
            done = work(*arguments)
    finally:
        del os.environ[processes.STRATEGY]
    assert seen == {True}
    return done


def stages(names: Sequence[str], root: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The metrics of these stages of the target `tiny`."""
    from tasks.targets.run import run_stage

    return {name: run_stage(name, "tiny", params=settings, root=root) for name in names}


def _converted(model: nn.Module) -> nn.Module:
    """No gradient of it is pure rounding noise, which Adam would blow up. Its new weights follow from the process, and
    nothing of the result may."""
    torch.manual_seed(processes.state().process_index)
    return t5lib.convert(model, TTTConfig(key_norm="rms"))


def _numbered(make: Callable[[int], Any], stop: int) -> Callable[[int], Iterator[Any]]:
    """Batches by their number, for every process the same; without a part: t5lib has to take it."""

    def from_batch(start: int) -> Iterator[Any]:
        for number in count(start):
            if number == stop:
                raise ZeroDivisionError("stop")
            yield make(number)

    return from_batch


def _weights(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
