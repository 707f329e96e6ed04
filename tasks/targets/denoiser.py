"""What the stages of denoisers are given: encoded images, the objective, models."""

from pathlib import Path

from accelerate import PartialState
from torch import nn

import t5lib
from t5lib.data.batches import Batches
from t5lib.data.latents import LatentSet, LatentShards
from t5lib.data.latents import MANIFEST
from t5lib.training.objectives import Batch, Objective, objective_of
from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json
from tasks.denoisers.data import LatentsConfig
from tasks.targets.classifier import device

SCHEDULER = "scheduler"  # its folder in what the stage `source` made


def latents(shards: Path, split: str, data: LatentsConfig) -> LatentSet:
    """The encoded images of "train" or "val" in what the stage `shards` made."""
    found = LatentShards(shards / split / MANIFEST)
    return found.resident(device()) if data.resident else found


def stream(shards: Path, data: LatentsConfig, batch_size: int, seed: int) -> Batches:
    """Endless training batches of this process, from any batch number on."""
    state = PartialState()
    return latents(shards, "train", data).batches(
        batch_size,
        seed=seed,
        drop=data.drop,
        workers=0 if data.resident else data.workers,
        rank=state.process_index,
        world_size=state.num_processes,
    )


def some(shards: Path, split: str, data: LatentsConfig, images: int, seed: int, setting: str) -> Batch:
    """So many encoded images of one size. `setting`: what asks for them, for the error where they are not there."""
    found = latents(shards, split, data)
    if images > len(found):
        raise T5Error(f"{setting} is {images}; there are {len(found)} {split} images")
    return next(found.batches(images, seed=seed)(0))


def objective(source: Path, data: LatentsConfig) -> Objective:
    """Of the scheduler that the stage `source` kept, with the changes in `data`."""
    import diffusers

    config = read_json(source / SCHEDULER / "scheduler_config.json")
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    return objective_of(scheduler, **data.objective)


def load(folder: Path) -> nn.Module:
    """A model on the device of this process."""
    return t5lib.load(folder, device())
