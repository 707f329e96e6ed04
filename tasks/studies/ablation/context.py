"""Where variants are tried: the images on the device, and the softmax source of each seed, made once."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import t5lib
from t5lib.data.images import DataConfig
from t5lib.data.in_memory import InMemoryImages, decode
from t5lib.data.shards import ShardSet
from t5lib.evaluation.classifier import Score, predict, score
from t5lib.training.calibration import CalibrateConfig
from t5lib.training.classifier import TrainConfig, train
from t5lib.utils.config import from_dict
from t5lib.utils.files import read_json, write_json
from tasks.runtime.stage import run_stage
from tasks.source import SourceConfig, fit_head_on
from tasks.studies.ablation.definition import Plan
from tasks.studies.seeds import with_seed, workspace
from tasks.targets.classifier import device, precision

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


class Lab:
    """Images and sources on this process's device, and what is done with them.

    Attributes:
        train_images, val_images: the ablation's images.
        compile: whether calibration and training are compiled.
    """

    def __init__(self, plan: Plan, work: Path):
        self.plan, self.work, self.device = plan, work, device()
        self.data = from_dict(DataConfig, plan.settings["data"], "data")
        self.train_images, self.val_images = (
            InMemoryImages.load(_images(plan, work, split), self.data, self.device) for split in ("train", "val")
        )
        self.on_gpu = self.device.type == "cuda"
        self._sources: dict[int, tuple[nn.Module, Tensor, dict[str, Any]]] = {}
        torch._dynamo.config.recompile_limit = COMPILED_VERSIONS

    def source(self, seed: int) -> nn.Module:
        """The softmax model of that seed, shared: not to be changed."""
        return self._source(seed)[0]

    def source_score(self, seed: int) -> dict[str, Any]:
        return self._source(seed)[2]["score"]

    def make_source(self, seed: int) -> dict[str, Any]:
        """Make the source of that seed, unless it is there, and return its score."""
        if not self._made(seed):
            begun, config = time.monotonic(), from_dict(SourceConfig, self._settings(seed)["source"], "source")
            model = t5lib.load(self.work / f"data/out/{self.plan.target}/fetch", self.device)
            if config.head == "fit":
                images = self.train_images.eval_batches(self.data.eval_batch_size)
                fit_head_on(model, images, len(self.train_images), config.l2)
            if config.finetune:
                self.train(model, config.finetune)
            seconds = time.monotonic() - begun
            logits, labels = self.logits(model)
            folder = self._folder(seed)
            t5lib.save(model, folder / "model")
            save_file({"classes": logits.argmax(-1)}, folder / "predicted.safetensors")
            told = {"key": self.plan.source_key, "score": score(logits, labels).as_dict(), "seconds": seconds}
            write_json(folder / "source.json", told)  # last: it says that the others are whole
        return self.source_score(seed)

    def train(self, model: nn.Module, config: TrainConfig, teacher: nn.Module | None = None) -> TrainConfig:
        """Train `model` in place; returns the recipe as it was used here."""
        config = replace(config, compile=config.compile and self.on_gpu)
        batches = self.train_images.batches(config.batch_size, seed=config.seed, hflip=config.augment.hflip)
        steps, classes = config.steps(len(self.train_images)), self.data.num_classes
        train(model, batches, config, steps=steps, num_classes=classes, teacher=teacher)
        return config

    def calibrate(self, model: nn.Module, seed: int, config: CalibrateConfig):
        """Fit `model`'s new layers, in place, to the source of that seed; returns the CalibrationReport."""
        config = replace(config, compile=config.compile and self.on_gpu)
        batches = self.train_images.batches(config.batch_size, seed=config.seed, hflip=0.5)
        return t5lib.calibrate(model, teacher=self.source(seed), batches=batches, config=config)

    def logits(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Logits (n, classes) and labels (n,) of all validation images, on the CPU."""
        batches = self.val_images.eval_batches(self.data.eval_batch_size)
        logits, labels = predict({"model": model}, batches, precision=precision())
        return logits["model"], labels

    def score(self, model: nn.Module, seed: int) -> Score:
        """How good `model` is, and how far it agrees with the source of that seed."""
        return score(*self.logits(model), self._source(seed)[1])

    def _source(self, seed: int) -> tuple[nn.Module, Tensor, dict[str, Any]]:
        if seed not in self._sources:
            folder = self._folder(seed)
            model = t5lib.load(folder / "model", self.device)
            predicted = load_file(folder / "predicted.safetensors")["classes"]
            self._sources[seed] = model, predicted, read_json(folder / "source.json")
        return self._sources[seed]

    def _made(self, seed: int) -> bool:
        told = self._folder(seed) / "source.json"
        return told.is_file() and read_json(told)["key"] == self.plan.source_key

    def _folder(self, seed: int) -> Path:
        return self.work / f"sources/seed-{seed}"

    def _settings(self, seed: int) -> dict[str, Any]:
        return with_seed(self.plan.settings, seed)


def _images(plan: Plan, work: Path, split: str) -> Path:
    """The file with a split's images, decoded when it is not there."""
    shards = ShardSet.read(work / f"data/out/{plan.target}/shards/{split}.json")
    data = from_dict(DataConfig, plan.settings["data"], "data")
    return decode(shards, data, work / "images", limit=getattr(plan.images, split))
