"""Draws what validation images show, with any model of a target, and scores the pictures."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

import t5lib
from t5lib.evaluation import cutout_retrieval, features, scores
from t5lib.evaluation.generation import GenerateConfig, generate, read_images
from t5lib.evaluation.prompts import Job, seed_of
from t5lib.pipelines import load_pipeline
from t5lib.utils import processes
from t5lib.utils.config import settings
from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json
from tasks.targets import diffusers_folder, real_images
from tasks.targets.base import device
from tasks.targets.denoiser_images import only_samples

REAL = "real images"  # the row of a table that says what can be reached
SAMPLES = "samples of the source"  # what stands for them where there are none
REFERENCES = 20  # pictures of each name that generated ones are compared with


@settings
class EvaluateConfig:
    """What is drawn.

    Attributes:
        samples: images of each model, with the captions or classes of the validation images, taken evenly; as many
            real images as there are, up to this number, stand beside them.
        shown: how many of them the picture of samples shows.
        sampling: steps, guidance, size (default: the pipeline's).
        cutouts: file:MANIFEST.json of RGBA pictures of all that can be asked for, one a name; for things on plain
            backgrounds. Then they tell what a picture shows (t5lib.evaluation.cutout_retrieval), and not training
            images.
    """

    samples: Annotated[int, Field(ge=scores.LEAST, le=10**7)] = 1000
    shown: Annotated[int, Field(ge=1, le=1000)] = 8
    sampling: GenerateConfig = Field(default_factory=GenerateConfig)
    cutouts: Annotated[str, Field(pattern=r"^file:.+\.json$")] | None = None

    def __post_init__(self) -> None:
        if self.shown > self.samples:
            raise T5Error(f"shown is {self.shown} of {self.samples} samples; expected 1 or more of them")


@dataclass(frozen=True)
class Drawn:
    """What a model did: its held-out loss, and a file for each of `SampleEvaluator.asked`."""

    loss: float
    files: list[Path]
    channels: int

    @cached_property
    def pixels(self) -> Tensor:
        """(n, C, H, W) uint8."""
        return read_images(self.files, channels=self.channels)


class SampleEvaluator:
    """One for all models of a target: prompts, noise and real images are the same. Where the stage `shards` had the
    source draw the validation images, those stand for real ones, and the scores say so under "reference".

    Args:
        config: the section `evaluate`.
        fetched, shards: what these stages made.
        root: of the repository.
        held_out: the held-out loss of a model, given its folder and the model in single precision.

    Attributes:
        asked: the validation images whose captions or classes are drawn, in order.
    """

    def __init__(
        self,
        config: EvaluateConfig,
        *,
        fetched: Path,
        shards: Path,
        root: Path,
        held_out: Callable[[Path, nn.Module], float],
    ):
        self.config, self.fetched = config, fetched
        self.folder = diffusers_folder.folder_of(fetched, root)
        self.channels = diffusers_folder.image_channels(self.folder)
        size = config.sampling.size or diffusers_folder.image_size(self.folder)
        images: dict[str, Any] = {"size": size, "channels": self.channels}
        validation = real_images.read(shards / "images-val.json", **images, most=config.samples)
        self._reference = SAMPLES if only_samples(shards, "val") else REAL
        if len(validation) < scores.LEAST:
            raise T5Error(f"evaluate: shards.val holds {len(validation)} images; expected at least {scores.LEAST}")
        self.asked = [validation[number % len(validation)] for number in range(config.samples)]
        self._root = root
        self._known = lambda: real_images.references(shards / "images-train.json", **images, most=REFERENCES)
        self._held_out = held_out
        self._pipe: Any = None

    @property
    def prompts(self) -> list[str]:
        """Captions, or the names of classes."""
        return [image.prompt if isinstance(image.prompt, str) else str(image.name) for image in self.asked]

    def draw(self, name: str, model: Path, images: Path) -> Drawn:
        """Load the model (of t5lib.save), take its loss, and draw into `images` what is not there yet; bf16 on CUDA.

        Several processes take the batches of images in turn, so that each is drawn together with the same others.
        """
        dtype = torch.bfloat16 if device().type == "cuda" else torch.float32
        loaded = t5lib.load(model, device())
        loss = self._held_out(model, loaded)
        nn.Module.to(loaded, dtype)  # diffusers' own `to` warns of every cast
        if self._pipe is None:
            self._pipe = load_pipeline(self.folder, transformer=loaded, torch_dtype=dtype).to(device())
        else:
            self._pipe.register_modules(transformer=loaded)
        jobs = [
            Job(path=images / f"{number:05}.png", prompt=image.prompt, seeds=(seed_of(0, number, 0),))
            for number, image in enumerate(self.asked)
        ]
        state, size = processes.state(), self.config.sampling.batch_size
        first = range(state.process_index * size, len(jobs), state.num_processes * size)
        ours = [job for start in first for job in jobs[start : start + size]]
        generate(self._pipe, ours, self.config.sampling, model=name)
        processes.wait()
        return Drawn(loss, [job.path for job in jobs], self.channels)

    def scores(self, drawn: dict[str, Drawn]) -> dict[str, dict[str, Any]]:
        """What applies (t5lib.report.score_table.METRICS) to each model and to real images; "source" must be there."""
        held_out = real_images.stacked(list({id(image): image for image in self.asked}.values()))
        pictures = {name: each.pixels for name, each in drawn.items()}
        found = scores.fidelity(pictures, held_out, self._extractor, device=device())
        for name, each in drawn.items():
            found[name] = {"loss": each.loss, **found[name], **self._following(each.pixels)}
            if name != "source":
                found[name] |= scores.distance_to(each.pixels, drawn["source"].pixels, self._dinov2)
        if self._reference != REAL:
            found = {name: {**each, "reference": self._reference} for name, each in found.items()}
        found[self._reference] = self._following(real_images.stacked(self.asked))
        return found

    def _following(self, pictures: Tensor) -> dict[str, Any]:
        """Whether pictures show what was asked for, where the real images say what that is."""
        result: dict[str, Any] = {}
        names = self._cutouts.names if self._cutouts else self._references
        named = {number: image.name for number, image in enumerate(self.asked) if image.name and image.name in names}
        if named:
            shown, wanted = pictures[list(named)], list(named.values())
            if self._cutouts:
                result |= cutout_retrieval.retrieval(shown, wanted, self._cutouts)
            else:
                result |= scores.retrieval(shown, wanted, self._references, self._dinov2)
        scenes = [image.scene for image in self.asked if image.scene]
        if len(scenes) == len(self.asked):
            colours = scores.colours_of(real_images.stacked(self.asked), scenes)
            result |= scores.follow_scenes(pictures, scenes, colours)
        if self._scorers["clip"] and isinstance(self.asked[0].prompt, str):
            result |= scores.clip_score(pictures, self.prompts, self._scorers["clip"], device=device())
        return result

    @cached_property
    def _scorers(self) -> dict[str, str | None]:
        return read_json(self.fetched / diffusers_folder.SCORERS)

    @cached_property
    def _extractor(self) -> features.Extractor:
        inception = self._scorers["inception"]
        return features.choose(Path(inception) if inception else None, self.fetched / "features")

    @cached_property
    def _dinov2(self) -> features.Dinov2:
        return features.Dinov2.load(self.fetched / "features", device())

    @cached_property
    def _cutouts(self) -> cutout_retrieval.Cutouts | None:
        given = self.config.cutouts
        return (
            cutout_retrieval.cutouts_of(real_images.cutouts(self._root / given.removeprefix("file:")))
            if given
            else None
        )

    @cached_property
    def _references(self) -> dict[str, Tensor]:
        known = self._known()
        return scores.tokens_of(known, self._dinov2) if known else {}
