"""Training and held-out loss of denoisers, as several stages do it."""

from pathlib import Path

from torch import nn

from t5lib.training.denoiser import DenoiserTrainConfig, train_diffusion, validation_loss
from t5lib.training.trainer import TrainReport
from tasks.denoisers.data import LatentsConfig
from tasks.runtime.stage import Stage
from tasks.targets.classifier import precision
from tasks.targets.denoiser import latents, objective, stream


def fit(
    stage: Stage,
    model: nn.Module,
    config: DenoiserTrainConfig,
    data: LatentsConfig,
    shards: Path,
    source: Path,
    teacher: nn.Module | None = None,
) -> TrainReport:
    """Train `model` in place on the target's encoded images, resuming where the stage stopped before."""
    return train_diffusion(
        model,
        stream(shards, data, config.batch_size, config.seed),
        config,
        objective=objective(source, data),
        teacher=teacher,
        resume_dir=stage.resume_dir(),
        log=stage.log,
    )


def loss_of(model: nn.Module, data: LatentsConfig, shards: Path, source: Path) -> float:
    """On all validation images, each at one noise level; the same noise and levels for every model."""
    batches = latents(shards, "val", data).eval_batches(data.eval_batch_size)
    found = validation_loss({"model": model}, batches, objective=objective(source, data), precision=precision())
    return found["model"]


def outcome(report: TrainReport, loss: float) -> dict[str, float]:
    """The metrics of a training stage."""
    return {
        "loss": loss,
        "steps": report.steps,
        "seconds": report.seconds,
        "samples_per_second": report.samples_per_second,
    }
