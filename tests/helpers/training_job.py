"""A small training, to be run by tests in this process, or in others that are killed or that train together."""

import dataclasses
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import random_images, tiny_vit
from torch import Tensor, nn

import t5lib
from t5lib.layers.config import TTTConfig
from t5lib.training.classifier import Classification, TrainConfig
from t5lib.training.trainer import TrainReport, train

STEPS = 8
PLAIN = TrainConfig(batch_size=4, lr=1e-3, lr_new=1e-2, warmup=0.25, checkpoint_every=3)
# Everything that draws random numbers or carries a state from step to step.
ALL_ON = dataclasses.replace(PLAIN, accumulate=2, mixup=0.8, cutmix=1.0, ema=0.9)


def converted(**config) -> nn.Module:
    return t5lib.convert(tiny_vit("average_pool", drop_path_rate=0.3, proj_drop_rate=0.1), TTTConfig(**config))


def batch(number: int, size: int = 4) -> tuple[Tensor, Tensor]:
    labels = torch.randint(7, (size,), generator=torch.Generator().manual_seed(number))
    return random_images(size, seed=number), labels


def batches(start: int) -> Iterator[tuple[Tensor, Tensor]]:
    return (batch(number) for number in count(start))


def run(
    model: nn.Module, config: TrainConfig = PLAIN, *, source=batches, steps: int = STEPS, teacher=None, **options
) -> TrainReport:
    return train(model, source, Classification(config, 7, teacher), config, steps=steps, **options)


def job(out: Path, resume_dir: Path, pause_at: int | None = None) -> None:
    """Train with everything on, for another process; before batch `pause_at` it says so and waits to be killed."""
    torch.set_num_threads(1)

    def pausing(start: int) -> Iterator[tuple[Tensor, Tensor]]:
        for number in count(start):
            if number == pause_at:
                (resume_dir / "paused").touch()
                time.sleep(60)
            yield batch(number)

    model = converted()
    run(model, ALL_ON, source=pausing, resume_dir=resume_dir)
    save_file(model.state_dict(), out)


def deterministic() -> nn.Module:
    """A model without drop-out, and none of whose gradients are pure rounding noise that Adam would blow up."""
    return t5lib.convert(tiny_vit("average_pool"), TTTConfig(key_norm="rms"))


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
