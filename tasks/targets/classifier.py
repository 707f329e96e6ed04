"""What several stages do alike: the device, the training stream, a run of the training loop, a first score."""

from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn

from t5lib.data.images import AugmentConfig, DataConfig, ShardSet, eval_batches, train_batches, transform
from t5lib.evaluation.classifier import Score, evaluate
from t5lib.training.classifier import TrainConfig, TrainReport, train
from t5lib.utils.progress import progress
from tasks.runtime.stage import Stage


def device() -> torch.device:
    """The device of this process, as Accelerate assigns it."""
    return PartialState().device


def precision(wanted: str = "auto") -> str:
    """What models are run in when they are only looked at: "auto" is bf16 on CUDA, else fp32."""
    return ("bf16" if device().type == "cuda" else "fp32") if wanted == "auto" else wanted


def stream(shards: Path, data: DataConfig, augment: AugmentConfig | None, batch_size: int, seed: int):
    """A function from a batch number to the endless training batches from there on (t5lib.data.batches)."""
    state, images = PartialState(), ShardSet.read(shards / "train.json")

    def from_batch(start: int):
        return train_batches(
            images,
            transform(data, augment),
            batch_size=batch_size,
            seed=seed,
            start=start,
            workers=data.workers,
            rank=state.process_index,
            world_size=state.num_processes,
        )

    return from_batch


def fit(
    stage: Stage,
    model: nn.Module,
    config: TrainConfig,
    data: DataConfig,
    shards: Path,
    teacher: nn.Module | None = None,
) -> TrainReport:
    """Train `model` in place by `config` on the target's training images, resuming where the stage stopped before."""
    count = ShardSet.read(shards / "train.json").count
    return train(
        model,
        stream(shards, data, config.augment, config.batch_size, config.seed),
        config,
        steps=config.steps(count, PartialState().num_processes),
        num_classes=data.num_classes,
        teacher=teacher,
        resume_dir=stage.resume_dir(),
        log=stage.log,
    )


def evaluate_all(
    models: dict[str, nn.Module],
    data: DataConfig,
    shards: Path,
    *,
    precision: str,
    reference: str | None = None,
) -> dict[str, Score]:
    """Scores of `models` on all validation images."""
    images = ShardSet.read(shards / "val.json")
    batches = eval_batches(images, transform(data), batch_size=data.eval_batch_size, workers=data.workers)
    with progress("evaluate", images.count) as bar:
        return evaluate(models, batches, reference=reference, precision=precision, on_batch=bar.advance)


def evaluate_one(model: nn.Module, data: DataConfig, shards: Path) -> Score:
    return evaluate_all({"model": model}, data, shards, precision=precision())["model"]


def outcome(report: TrainReport, score: Score) -> dict[str, float]:
    """The metrics of a training stage."""
    return {
        "top1": score.top1,
        "loss": score.loss,
        "steps": report.steps,
        "seconds": report.seconds,
        "samples_per_second": report.samples_per_second,
    }
