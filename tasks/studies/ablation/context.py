"""Where variants are tried: the images on the device, and the softmax source of each seed, made once."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import t5lib
from t5lib.data.images import DataConfig
from t5lib.data.in_memory import InMemoryImages, decode
from t5lib.data.shards import ShardSet
from t5lib.evaluation.classifier import Score, predict, score
from t5lib.training.calibration import CalibrateConfig, CalibrationReport
from t5lib.training.classifier import Classification, TrainConfig
from t5lib.training.trainer import train
from t5lib.utils.config import from_dict
from t5lib.utils.files import read_json, write_json
from tasks.studies.ablation.definition import Plan
from tasks.studies.common import with_seed, workspace
from tasks.targets.base import device, precision
from tasks.targets.classifier import SourceConfig
from tasks.targets.linear_head import fit_head
from tasks.targets.run import run_stage

COMPILED_VERSIONS = 64  # of one function, before torch gives up and runs eager: several models share a layer's code


def prepare(plan: Plan, work: Path) -> None:
    """Fetch the weights, check the shards, decode the images; what was done with the same settings is left alone."""
    workspace(work)
    for stage in ("fetch", "shards"):
        done, metrics = work / f"{stage}-settings.json", work / f"data/out/{plan.target}/{stage}.json"
        if not (done.is_file() and metrics.is_file() and read_json(done) == plan.settings[stage]):
            run_stage(stage, plan.target, params=plan.settings, root=work)
            write_json(done, plan.settings[stage])
    for split in ("train", "val"):
        _images(plan, work, split)


@dataclass(frozen=True)
class SourceJob:
    """The softmax source of one seed."""

    plan: Plan
    work: Path
    seed: int

    @property
    def folder(self) -> Path:
        return self.work / f"sources/seed-{self.seed}"

    @property
    def done(self) -> bool:
        note = self.folder / "source.json"
        return note.is_file() and read_json(note)["key"] == self.plan.source_key


def make_source(job: SourceJob) -> dict[str, Any]:
    """Make the source unless it is there; returns its score."""
    return Context.of(job.plan, job.work).make_source(job.seed)


@dataclass(frozen=True)
class Source:
    """A softmax model, the classes (n,) that it gives to the validation images, and its score."""

    model: nn.Module
    classes: Tensor
    score: dict[str, Any]


class Context:
    """Images and sources on this process's device, and what is done with them.

    Attributes:
        train_images, val_images: the ablation's images.
        on_gpu: whether calibration and training are compiled, where their settings say so.
    """

    _present: ClassVar["Context | None"] = None

    @classmethod
    def of(cls, plan: Plan, work: Path) -> "Context":
        """The context of this process; setting up another one takes seconds and the memory of all images."""
        present = cls._present
        if present is None or (present.plan, present.work) != (plan, work):
            cls._present = None  # frees its memory first
            present = cls._present = cls(plan, work)
        return present

    def __init__(self, plan: Plan, work: Path):
        self.plan, self.work, self.device = plan, work, device()
        self.data = from_dict(DataConfig, plan.settings["data"], "data")
        self.train_images, self.val_images = (
            InMemoryImages.load(_images(plan, work, split), self.data, self.device) for split in ("train", "val")
        )
        self.on_gpu = self.device.type == "cuda"
        self._sources: dict[int, Source] = {}
        torch._dynamo.config.recompile_limit = COMPILED_VERSIONS

    def source(self, seed: int) -> Source:
        """The source of the seed, which is shared and must not be changed."""
        if seed not in self._sources:
            folder = SourceJob(self.plan, self.work, seed).folder
            classes = load_file(folder / "predicted.safetensors")["classes"]
            known = read_json(folder / "source.json")
            self._sources[seed] = Source(t5lib.load(folder / "model", self.device), classes, known["score"])
        return self._sources[seed]

    def make_source(self, seed: int) -> dict[str, Any]:
        """Make the source of that seed, unless it is there, and return its score."""
        job = SourceJob(self.plan, self.work, seed)
        if not job.done:
            begun, settings = time.monotonic(), with_seed(self.plan.settings, seed)
            config = from_dict(SourceConfig, settings["source"], "source")
            model = t5lib.load(self.work / f"data/out/{self.plan.target}/fetch", self.device)
            if config.head == "fit":
                images = self.train_images.eval_batches(self.data.eval_batch_size)
                fit_head(model, images, len(self.train_images), config.l2)
            if config.finetune:
                self.train(model, config.finetune)
            seconds = time.monotonic() - begun
            logits, labels = self.logits(model)
            t5lib.save(model, job.folder / "model")
            save_file({"classes": logits.argmax(-1)}, job.folder / "predicted.safetensors")
            content = {"key": self.plan.source_key, "score": score(logits, labels).as_dict(), "seconds": seconds}
            write_json(job.folder / "source.json", content)  # last: it says that the others are whole
        return self.source(seed).score

    def train(self, model: nn.Module, config: TrainConfig, teacher: nn.Module | None = None) -> None:
        """Train `model` in place."""
        config = replace(config, compile=config.compile and self.on_gpu)
        batches = self.train_images.batches(config.batch_size, seed=config.seed, hflip=config.augment.hflip)
        objective = Classification(config, self.data.num_classes, teacher)
        train(model, batches, objective, config, steps=config.steps(len(self.train_images)))

    def calibrate(self, model: nn.Module, seed: int, config: CalibrateConfig) -> CalibrationReport:
        """Fit `model`'s new layers, in place, to the source of that seed."""
        config = replace(config, compile=config.compile and self.on_gpu)
        batches = self.train_images.batches(config.batch_size, seed=config.seed, hflip=0.5)
        return t5lib.calibrate(model, teacher=self.source(seed).model, batches=batches, config=config)

    def logits(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Logits (n, classes) and labels (n,) of all validation images, on the CPU."""
        batches = self.val_images.eval_batches(self.data.eval_batch_size)
        logits, labels = predict({"model": model}, batches, precision=precision())
        return logits["model"], labels

    def score(self, model: nn.Module, seed: int) -> Score:
        """How good `model` is, and how far it agrees with the source of that seed."""
        return score(*self.logits(model), self.source(seed).classes)


def _images(plan: Plan, work: Path, split: str) -> Path:
    """The file with a split's images, decoded when it is not there."""
    shards = ShardSet.read(work / f"data/out/{plan.target}/shards/{split}.json")
    data = from_dict(DataConfig, plan.settings["data"], "data")
    return decode(shards, data, work / "images", limit=getattr(plan.images, split))
