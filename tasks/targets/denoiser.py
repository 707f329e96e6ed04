"""Targets that are denoisers: diffusers pipelines, encoded images with captions or classes, generated pictures."""

import functools
import math
import re
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import nn

import t5lib
from t5lib.data.batches import Batches
from t5lib.data.encoding import encode
from t5lib.data.latents import MANIFEST, LatentSet, LatentShards
from t5lib.download import check, kept, resolve
from t5lib.families.inputs import Inputs
from t5lib.report.common import Quality
from t5lib.report.data import ReportData
from t5lib.training.denoiser import DenoiserTrainConfig, Denoising, validation_loss
from t5lib.training.objectives import Noising, noised_batch, noised_inputs, noising_of
from t5lib.training.trainer import TrainReport, train
from t5lib.utils import processes
from t5lib.utils.config import BatchSize, Share, Workers, settings, to_dict
from t5lib.utils.errors import T5Error
from t5lib.utils.files import read_json, sha256, write_json
from tasks.runtime.needs import Needs
from tasks.runtime.tracking.registry.product import Product
from tasks.targets import denoiser_needs, diffusers_folder, timm_model
from tasks.targets.base import Target, device, precision
from tasks.targets.denoiser_checks import check_numbers, check_pipeline, check_samples
from tasks.targets.denoiser_images import ORIGINS, ShardsConfig, encoders, gathered, only_samples, origins
from tasks.targets.image_shards import listed, taken
from tasks.targets.pipeline_checks import check_parts, check_weights, described, differences
from tasks.targets.sample_evaluator import Drawn, EvaluateConfig, SampleEvaluator

SCHEDULER = "scheduler"  # its folder in what the stage `source` made
DISTANCES = ("fid", "fd_dinov2")  # to real images: the score of a denoiser
KEPT = "held-out.json"  # the loss of a stage's model on the validation images


@settings
class FetchConfig:
    """Where the pipeline comes from, and what its images are scored with.

    Attributes:
        source: a folder as diffusers saves it, file:FOLDER or hf:OWNER/REPO@COMMIT (t5lib.download).
        features: a DINOv2 of timm's, as classifiers are fetched: for FD-DINOv2, retrieval, and distances to the source.
        inception: torch-fidelity's weights, as a source of t5lib.download: then FID, KID and IS are the standard ones.
        clip: transformers' CLIP, as a source of t5lib.download, for the CLIP score.
    """

    format: Literal["pipeline"]
    source: str
    features: timm_model.FetchConfig
    inception: str | None = None
    clip: str | None = None

    def __post_init__(self):
        if not re.match(r"file:.|hf:(?!datasets/)", self.source):
            raise T5Error(f"source is '{self.source[:200]}'; expected a pipeline: file:FOLDER or hf:OWNER/REPO@COMMIT")
        for source in (self.source, self.inception, self.clip):
            if source is not None:
                check(source)


@settings
class LatentsConfig:
    """How encoded images are read, and what a denoiser learns from them.

    Attributes:
        drop: part of the captions or labels that is left out in training, for guidance.
        in_memory: hold all latents in the memory of the device; for small sets.
        workers: processes that read ahead; 0 reads when needed.
        eval_batch_size: images at once where nothing is learned.
        objective: changes to what the pipeline's scheduler stands for, such as {weighting: mode}
            (t5lib.training.objectives).
    """

    drop: Share = 0.1
    in_memory: bool = False
    workers: Workers = 2
    eval_batch_size: BatchSize = 16
    objective: dict[str, Any] = Field(default_factory=dict)


@settings
class SourceConfig:
    """Nothing is to be chosen: the denoiser is converted as it was fetched."""


@settings
class FreezeConfig:
    """`ceiling`: times the source's held-out loss above which the flow stops here; `train`: the recipe."""

    ceiling: Annotated[float, Field(gt=0, le=1e6)]
    train: DenoiserTrainConfig = Field(default_factory=lambda: DenoiserTrainConfig(trainable="new"))

    def __post_init__(self):
        if self.train.trainable != "new":
            raise T5Error(f"train.trainable is '{self.train.trainable}'; this protocol needs 'trainable: new'")


class DenoiserTarget(Target[DenoiserTrainConfig]):
    """See Target."""

    SECTIONS = Target.SECTIONS | {
        "fetch": FetchConfig,
        "shards": ShardsConfig,
        "data": LatentsConfig,
        "source": SourceConfig,
        "freeze": FreezeConfig,
        "finetune": DenoiserTrainConfig,
        "evaluate": EvaluateConfig,
    }

    @classmethod
    def check(cls, sections: dict[str, Any], root: Path) -> None:
        """See Target. What a pipeline must be known for is checked as soon as it lies on this machine."""
        fetch = sections["fetch"]
        timm_model.blank(fetch.features)
        folder = diffusers_folder.known(fetch.source, root)
        images = listed(sections["shards"], root)
        check_numbers(sections, *images)
        check_samples(sections["shards"], root, folder)
        if folder is not None:
            check_pipeline(folder, sections, images)

    @classmethod
    def needs(cls, sections: dict[str, Any], root: Path, target: str, *, online: bool, pieces: int) -> Needs:
        """See Target."""
        return denoiser_needs.needs(sections, root, target, online=online, pieces=pieces)

    def fetch(self) -> dict[str, Any]:
        """Fetch and check pipeline and scorers. Large files stay where they were downloaded to or lie already."""
        config, out, models = self.section("fetch"), self.stage.out, self.stage.root / "data/models"
        source = resolve(config.source)
        if configs := described(source, models):
            _check_configs(configs, source)
        folder = kept(diffusers_folder.whole(source), models)
        _check_configs(folder, source)
        check_weights(folder)
        noted = diffusers_folder.note(folder, config.source, out, self.stage.root)
        features, origin = timm_model.fetched_model(config.features, self.stage.resume_dir() / "features")
        t5lib.save(features, out / "features")
        scorers = {"inception": config.inception, "clip": config.clip}
        places = {name: source and _kept_file(source, models) for name, source in scorers.items()}
        write_json(out / diffusers_folder.SCORERS, places)
        size = sum(file["bytes"] for file in noted["files"].values())
        return {"source": config.source, "files": len(noted["files"]), "bytes": size, "features": origin}

    def shards(self) -> dict[str, int]:
        """Write train/ and val/ (t5lib.data.encoding); images-*.json, the manifests of what was encoded; samples/, what
        the softmax model drew of it; and origins.json."""
        config, stage = self.section("shards"), self.stage
        self.section("data")
        folder = diffusers_folder.folder_of(stage.input("fetch"), stage.root)
        sets = gathered(config, stage, folder)
        images, text = encoders(folder, config)
        work = stage.resume_dir()
        for split, shards in sets.items():
            encode(shards, work / split, images=images, text=text, config=config.encode)
        made_of = origins(config, sets)
        for split, shards in sets.items():
            stage.publish(split)
            if processes.leads():
                shards.write(stage.out / f"images-{split}.json", root=stage.root)
        if processes.leads():
            write_json(stage.out / ORIGINS, made_of)
        samples = {f"{split}_samples": each["samples"] for split, each in made_of.items() if each["samples"]}
        return taken(sets, config) | samples

    def source(self) -> dict[str, float]:
        """The pipeline's transformer in single precision, and its noise schedule beside it."""
        self.section("source")
        fetched, out = self.stage.input("fetch"), self.stage.out
        model = diffusers_folder.transformer(fetched, self.stage.root)
        self.save(model)
        schedule = diffusers_folder.folder_of(fetched, self.stage.root) / "scheduler"
        processes.by_first(lambda: shutil.copytree(schedule, out / SCHEDULER))
        measured = self.held_out(model.to(device()), source=out)
        return measured | {"parameters": sum(parameter.numel() for parameter in model.parameters())}

    def evaluate(self, models: dict[str, str]) -> dict[str, dict[str, Any]]:
        """Every model draws the same prompts from the same noise; writes every image and a picture of some."""
        config, stage = self.section("evaluate"), self.stage
        self.section("data")  # asked for before resume_dir, which depends on it
        folders = {name: stage.input(made_by) for name, made_by in models.items()}
        evaluator = self.sample_evaluator(config)
        images = stage.resume_dir() / "images"
        drawn = {name: evaluator.draw(name, folder, images / name) for name, folder in folders.items()}
        scores = processes.by_first(lambda: self._scored(evaluator, drawn, config.shown))
        stage.publish("images")
        return scores

    def _scored(self, evaluator: SampleEvaluator, drawn: dict[str, Drawn], shown: int) -> dict[str, dict[str, Any]]:
        from t5lib.report import plots  # Matplotlib takes a second
        from t5lib.report.sample_grid import sample_grid

        scores = evaluator.scores(drawn)
        few = {name: each.pixels[:shown] for name, each in drawn.items()}
        plots.save(sample_grid(few, evaluator.prompts[:shown]), self.stage.out / "samples.png")
        self.stage.artifact(self.stage.out / "samples.png")
        return scores

    def nothing_to_tune_on(self) -> str | None:
        """See Target."""
        if not only_samples(self.stage.input("shards"), "train"):
            return None
        return (
            "shards.train names no images, and a model would learn nothing new from a fine-tune on samples of its own "
            "teacher"
        )

    def sample_evaluator(self, config: EvaluateConfig) -> SampleEvaluator:
        """What draws and scores, the same for all models of the target."""
        stage = self.stage
        return SampleEvaluator(
            config,
            fetched=stage.input("fetch"),
            shards=stage.input("shards"),
            root=stage.root,
            held_out=self._known_loss,
        )

    def unlabelled_batches(self, batch_size: int, seed: int) -> Batches:
        return noised_inputs(self._stream(batch_size, seed), self._noising(), seed)

    def some_batch(self, split: str, images: int, seed: int) -> Inputs:
        latents = self._latents(split)
        if images > len(latents):
            raise T5Error(f"{self.stage.name}.images is {images}; there are {len(latents)} {split} images")
        return noised_batch(next(latents.batches(images, seed=seed)(0)), self._noising(), seed)

    def pictures(self, batch: Inputs) -> None:
        """Noised latents are no pictures."""

    def fit(self, model: nn.Module, recipe: DenoiserTrainConfig) -> TrainReport:
        """See Target; the source is the teacher, where the recipe asks for it."""
        teacher = self.load("source") if recipe.align and recipe.teacher == "source" else None
        return train(
            model,
            self._stream(recipe.batch_size, recipe.seed),
            Denoising(recipe, self._noising(), teacher),
            recipe,
            steps=recipe.steps,
            resume_dir=self.stage.resume_dir(),
            log=self.stage.log,
        )

    def held_out(self, model: nn.Module, source: Path | None = None) -> dict[str, float]:
        """See Target; the loss is kept beside what the stage made, for the stages that compare with it.

        Args:
            source: what the stage `source` made; None where it is that of another stage.
        """
        loss = self._loss(model, source)
        if processes.leads():
            write_json(self.stage.out / KEPT, {"loss": loss, "precision": precision()})
        return {"loss": loss}

    def check_gate(self, measured: dict[str, float], config: FreezeConfig) -> dict[str, float]:
        loss, source = measured["loss"], self._known_loss(self.stage.input("source"))
        if not (math.isfinite(loss) and loss <= config.ceiling * source):
            raise T5Error(
                f"freeze gate: before the fine-tune the held-out loss is {loss:.4g}, more than "
                f"{config.ceiling:g} times the source's {source:.4g}. The new layers do not stand in for attention "
                "yet, and a fine-tune would overwrite pretrained weights to make up for it. Calibrate longer "
                "(calibrate.steps), use inner 'swiglu' with key_norm 'instance' and locality 'dwc_qk', convert fewer "
                "layers (layers: paper), or raise freeze.ceiling if this is good enough for your task"
            )
        return {"of_source": loss / source}

    def _known_loss(self, made: Path, model: nn.Module | None = None) -> float:
        """What `held_out` found for the model in the folder `made`, if it ran in this precision, or finds now."""
        known = read_json(made / KEPT) if (made / KEPT).is_file() else {}
        if known.get("precision") == precision():
            return known["loss"]
        return self._loss(model or t5lib.load(made, device()))

    def _loss(self, model: nn.Module, source: Path | None = None) -> float:
        """On all validation images, each at one noise level; the same noise and levels for every model."""
        part, noising = processes.turns(), self._noising(source)
        batches = self._latents("val").eval_batches(self.section("data").eval_batch_size, part)
        return validation_loss({"model": model}, batches, noising=noising, precision=precision(), part=part)["model"]

    def product(self, scores: dict[str, Any]) -> Product:
        """See Target. A pipeline of the hub is fetched from there again; another one goes along."""
        config, fetched = self.section("evaluate"), self.stage.input("fetch")
        folder, hub = diffusers_folder.folder_of(fetched, self.stage.root), diffusers_folder.hub_of(fetched)
        text = diffusers_folder.takes_text(folder)
        parts = {} if hub else diffusers_folder.other_parts(fetched, self.stage.root)
        return Product(
            kind="denoiser",
            files=self.model_files() | {f"pipeline/{name}": file for name, file in parts.items()},
            settings={
                "hub": hub,
                "takes": "prompt" if text else "class",
                "channels": diffusers_folder.image_channels(folder),
                "sampling": to_dict(config.sampling),
            },
            scores={name: value for name, value in scores.items() if isinstance(value, int | float)},
            measure=next(name for name in DISTANCES if name in scores),
            better="lower",
            scored_by=[
                sha256(self.stage.input("shards") / "images-val.json"),
                to_dict(config),
                scores["extractor"],
            ],
        )

    def quality(self, data: ReportData) -> Quality:
        from t5lib.report import denoiser as report  # Matplotlib takes a second

        return report.quality(data)

    def samples(self) -> Path:
        return self.stage.input("evaluate") / "samples.png"

    @functools.cache  # noqa: B019 (a target lives as long as its stage)
    def _latents(self, split: str) -> LatentSet:
        """The encoded images of "train" or "val" in what the stage `shards` made."""
        latents = LatentShards(self.stage.input("shards") / split / MANIFEST)
        return latents.in_memory(device()) if self.section("data").in_memory else latents

    def _stream(self, batch_size: int, seed: int) -> Batches:
        """Endless training batches, from any batch number on."""
        data = self.section("data")
        workers = 0 if data.in_memory else data.workers
        return self._latents("train").batches(batch_size, seed=seed, drop=data.drop, workers=workers)

    def _noising(self, source: Path | None = None) -> Noising:
        """Of the scheduler that the stage `source` kept, with the changes in the section `data`."""
        return _noising((source or self.stage.input("source")) / SCHEDULER, self.section("data").objective)


def _noising(folder: Path, changes: dict[str, Any]) -> Noising:
    """Of the scheduler in `folder`."""
    return noising_of(diffusers_folder.scheduler(folder), **changes)


def _check_configs(folder: Path, source: str) -> None:
    """Raises T5Error where a pipeline cannot be converted; tells what is other than expected of its repository."""
    diffusers_folder.transformer_class(folder)
    check_parts(folder)
    for difference in differences(folder, source):
        print(f"fetch: not as expected: {difference}", flush=True)


def _kept_file(source: str, models: Path) -> str:
    """The file, or the folder of several."""
    place = kept(source, models)
    files = [path for path in place.rglob("*") if path.is_file()] if place.is_dir() else [place]
    return str((files[0] if len(files) == 1 else place).resolve())
