"""Stage `evaluate` of denoisers: every model draws the same prompts from the same noise, scored side by side."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t5lib import plots
from t5lib.diffusion import features, scores
from t5lib.diffusion.generation import GenerateConfig, generate, read_images
from t5lib.diffusion.grids import sample_grid
from t5lib.diffusion.prompts import Job, seed_of
from t5lib.diffusion.training import validation_loss
from t5lib.errors import T5Error
from t5lib.files import read_json
from t5lib.pipelines import load_pipeline
from tasks.common import device, precision
from tasks.denoisers import pipeline, real
from tasks.denoisers.data import LatentsConfig
from tasks.denoisers.latents import latents, load, objective
from tasks.denoisers.real import RealImage
from tasks.evaluate import MODELS
from tasks.stage import Stage

REAL = "real images"  # the row of the table that says what can be reached
REFERENCES = 20  # pictures of each name that generated ones are compared with


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is drawn.

    Attributes:
        samples: images of each model, with the captions or classes of the validation images, taken evenly; as many
            real images as there are, up to this number, stand beside them.
        shown: how many of them the picture of samples shows.
        sampling: steps, guidance, size (default: the pipeline's).
    """

    samples: int = 1000
    shown: int = 8
    sampling: GenerateConfig = field(default_factory=GenerateConfig)

    def __post_init__(self) -> None:
        if self.samples < scores.LEAST or not 1 <= self.shown <= self.samples:
            raise T5Error(
                f"evaluate: samples {self.samples}, shown {self.shown}; expected at least {scores.LEAST} samples, and "
                "1 or more of them shown"
            )


SECTIONS = {"evaluate": EvaluateConfig, "data": LatentsConfig}


def run(stage: Stage) -> dict[str, Any]:
    """Write every image and a picture of some; returns each model's scores (t5lib.diffusion.scores.METRICS)."""
    config, data = stage.params(EvaluateConfig), stage.params(LatentsConfig, "data")
    fetched, shards, source = stage.input("fetch"), stage.input("shards"), stage.input("source")
    folders = {name: stage.input(made_by) for name, made_by in MODELS.items()}
    folder = pipeline.folder_of(fetched, stage.root)
    size = config.sampling.size or pipeline.image_size(folder)
    images = {"size": size, "channels": pipeline.image_channels(folder)}
    asked = _evenly(real.read(shards / "images-val.json", **images), config.samples)
    known = real.references(shards / "images-train.json", **images, most=REFERENCES)
    drawn, found = {}, {}
    measure = _held_out(data, shards, source)
    for name, pipe in _pipelines(folder, folders):
        found[name] = {"loss": measure(pipe.transformer)}
        jobs = _jobs(asked, stage.resume_dir() / "images" / name)
        generate(pipe, jobs, config.sampling, model=name)
        drawn[name] = read_images([job.path for job in jobs], channels=images["channels"])
    _score(found, drawn, asked, known, fetched)
    os.replace(stage.resume_dir() / "images", stage.out / "images")
    few = {name: pictures[: config.shown] for name, pictures in drawn.items()}
    prompts = [image.name if isinstance(image.prompt, int) else image.prompt for image in asked[: config.shown]]
    plots.save(sample_grid(few, prompts), stage.out / "samples.png")
    stage.artifact(stage.out / "samples.png")
    return {"models": found}


def _pipelines(folder: Path, folders: dict[str, Path]) -> Iterator[tuple[str, Any]]:
    """The pipeline with each model in turn, one at a time on the device, in bf16 on CUDA."""
    dtype, pipe = torch.bfloat16 if device().type == "cuda" else torch.float32, None
    for name, made in folders.items():
        model = load(made).to(dtype)
        if pipe is None:
            pipe = load_pipeline(folder, transformer=model, torch_dtype=dtype).to(device())
        else:
            pipe.register_modules(transformer=model)
        yield name, pipe


def _held_out(data: LatentsConfig, shards: Path, source: Path) -> Callable[[nn.Module], float]:
    """A model's loss on all validation images; the same noise for every model."""
    val, aim = latents(shards, "val", data), objective(source, data)

    def measure(model: nn.Module) -> float:
        batches = val.eval_batches(data.eval_batch_size)
        return validation_loss({"model": model}, batches, objective=aim, precision=precision())["model"]

    return measure


def _evenly(images: list[RealImage], number: int) -> list[RealImage]:
    """`number` of them, spread over all; each several times where there are fewer."""
    count = len(images)
    return [images[i * count // number if number <= count else i % count] for i in range(number)]


def _jobs(asked: list[RealImage], folder: Path) -> list[Job]:
    return [
        Job(path=folder / f"{number:05}.png", prompt=image.prompt, seeds=(seed_of(0, number, 0),))
        for number, image in enumerate(asked)
    ]


def _score(
    found: dict[str, dict], drawn: dict[str, Tensor], asked: list[RealImage], known: dict[str, Tensor], fetched: Path
) -> None:
    """Add to each model's scores, and to those of real images, what applies."""
    scorers = read_json(fetched / pipeline.SCORERS)
    inception = scorers["inception"] and Path(scorers["inception"])
    extractor = features.choose(inception, fetched / "features")
    dinov2 = features.Dinov2.load(fetched / "features", device())
    references = scores.tokens_of(known, dinov2)
    held_out = list({id(image): image for image in asked}.values())
    compared = scores.fidelity(drawn, real.stacked(held_out), extractor, device=device())
    everything = {**drawn, REAL: real.stacked(asked)}
    for name, pictures in everything.items():
        own = found.setdefault(name, {})
        own |= compared.get(name, {}) | _following(pictures, asked, references, dinov2)
        if name not in (REAL, "source"):
            own |= scores.distance_to(pictures, drawn["source"], dinov2)
        if scorers["clip"] and isinstance(asked[0].prompt, str):
            own |= scores.clip_score(pictures, [image.prompt for image in asked], scorers["clip"], device=device())


def _following(
    pictures: Tensor, asked: list[RealImage], references: dict[str, Tensor], dinov2: features.Dinov2
) -> dict[str, float]:
    """Whether pictures show what was asked for, where the real images say what that is."""
    result: dict[str, float] = {}
    named = [number for number, image in enumerate(asked) if image.name in references]
    if named:
        result |= scores.retrieval(pictures[named], [asked[number].name for number in named], references, dinov2)
    scenes = [image.scene for image in asked]
    if all(scenes):
        result |= scores.follow_scenes(pictures, scenes, scores.colours_of(real.stacked(asked), scenes))
    return result
