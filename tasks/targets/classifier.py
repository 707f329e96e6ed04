"""Targets that are classifiers: timm models, labelled image shards, top-1."""

import math
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import t5lib
from t5lib.data.batches import Batches
from t5lib.data.images import AugmentConfig, DataConfig, eval_batches, size_of, train_batches, transform
from t5lib.data.shards import ShardSet
from t5lib.evaluation.classifier import predict, score
from t5lib.families.timm_base import check_plain_vit
from t5lib.report.common import Quality
from t5lib.report.data import ReportData
from t5lib.training.classifier import Classification, TrainConfig
from t5lib.training.trainer import TrainReport, train
from t5lib.utils import processes
from t5lib.utils.config import AtLeastOne, Rate, settings, to_dict
from t5lib.utils.errors import T5Error
from t5lib.utils.files import atomic_file, sha256
from t5lib.utils.processes import WHOLE, Part
from t5lib.utils.progress import progress
from tasks.runtime.needs import Needs
from tasks.runtime.tracking.registry.product import Product
from tasks.targets import classifier_needs
from tasks.targets.base import Target, check_model, precision
from tasks.targets.image_shards import ImagesConfig, listed, open_labelled, refuse_overlap, taken
from tasks.targets.linear_head import fit_head
from tasks.targets.timm_model import FetchConfig, blank, fetched_model

KEPT = "validation.safetensors"  # what a stage's model predicts on the validation images


@settings
class ShardsConfig(ImagesConfig):
    """Images whose tar files hold `<key>.jpg` and `<key>.cls`, the layout of img2dataset and webdataset."""


@settings
class SourceConfig:
    """How the classifier comes about.

    Attributes:
        head: "keep" the fetched one, or "fit" a linear head on the frozen features (logistic regression).
        l2: weight of the head's squared norm, on standardized features.
        images: how many training images the head is fitted on, the first ones; null for all.
        finetune: recipe to train the whole softmax model with afterwards; null for none.
    """

    head: Literal["keep", "fit"] = "fit"
    l2: Rate = 1e-3
    images: AtLeastOne | None = None
    finetune: TrainConfig | None = None

    def __post_init__(self):
        if self.finetune and (self.finetune.trainable != "all" or self.finetune.distill):
            raise T5Error(
                f"finetune has trainable '{self.finetune.trainable}' and distill {self.finetune.distill:g}, but the "
                "source has no new layers and is the teacher itself; expected trainable 'all' and distill 0"
            )


@settings
class FreezeConfig:
    """`floor`: top-1 in percent below which the flow stops here; `train`: the recipe (trainable: new)."""

    floor: Annotated[float, Field(ge=0, le=100)]
    train: TrainConfig = Field(default_factory=lambda: TrainConfig(trainable="new"))

    def __post_init__(self):
        if self.train.trainable != "new":
            raise T5Error(f"train.trainable is '{self.train.trainable}'; this protocol needs 'trainable: new'")


@settings
class EvaluateConfig:
    """`precision`: "fp32", "bf16", or "auto", which is bf16 on CUDA and fp32 elsewhere."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"


class ClassifierTarget(Target[TrainConfig]):
    """See Target."""

    SECTIONS = Target.SECTIONS | {
        "fetch": FetchConfig,
        "shards": ShardsConfig,
        "data": DataConfig,
        "source": SourceConfig,
        "freeze": FreezeConfig,
        "finetune": TrainConfig,
        "evaluate": EvaluateConfig,
    }

    @classmethod
    def check(cls, sections: dict[str, Any], root: Path) -> None:
        """See Target."""
        data, model = sections["data"], blank(sections["fetch"])
        height, width = size_of(data)
        check_plain_vit(model)
        _check_images(model.patch_embed, data)
        check_model(model, sections, {"x": torch.empty(1, model.in_chans, height, width, device="meta")})
        if model.num_classes != data.num_classes:
            raise T5Error(
                f"data.num_classes is {data.num_classes}, but the model has {model.num_classes} classes; correct it, "
                "or fetch.model_args.num_classes"
            )
        recipes = (sections["source"].finetune, sections["freeze"].train, sections["finetune"])
        for recipe in recipes:
            if recipe:
                transform(data, recipe.augment)  # refuses what timm does not understand
        train, val = listed(sections["shards"], root)
        for each in (train, val):
            if each:
                _refuse_classes(each, data.num_classes)
        if train and val:
            _refuse_mismatch(train, val, data.num_classes)
        if train and data.workers > train.count:
            raise T5Error(f"data.workers is {data.workers}; expected at most one for each of {train.count} images")

    @classmethod
    def needs(cls, sections: dict[str, Any], root: Path, target: str, *, online: bool, pieces: int) -> Needs:
        """See Target."""
        return classifier_needs.needs(sections, blank(sections["fetch"]), root, target, pieces)

    def fetch(self) -> dict[str, Any]:
        model, origin = fetched_model(self.section("fetch"), self.stage.resume_dir() / "source")
        t5lib.save(model, self.stage.out)
        return origin | {"parameters": sum(parameter.numel() for parameter in model.parameters())}

    def shards(self) -> dict[str, int]:
        """Check the shards and write train.json and val.json."""
        config, classes = self.section("shards"), self.section("data").num_classes
        return processes.by_first(lambda: self._checked(config, classes))

    def _checked(self, config: ShardsConfig, classes: int) -> dict[str, int]:
        sets = {split: open_labelled(config, split, classes, self.stage) for split in ("train", "val")}
        _refuse_mismatch(sets["train"], sets["val"], classes)
        for split, shards in sets.items():
            shards.write(self.stage.out / f"{split}.json", root=self.stage.root)
            self.stage.artifact(self.stage.out / f"{split}.json")
        files = {f"{split}_shards": len(shards.shards) for split, shards in sets.items()}
        return taken(sets, config) | files | {"classes": classes}

    def source(self) -> dict[str, float]:
        """The fetched model, with a head for the target's classes."""
        config, model, steps, begun = self.section("source"), self.load("fetch"), 0, time.monotonic()
        if config.head == "fit":
            data, images = self.section("data"), self._shards("train")
            count = min(config.images or images.count, images.count)
            options = {"limit": count, "workers": data.workers, **_ours()}
            batches = eval_batches(images, transform(data), batch_size=data.eval_batch_size, **options)
            fit_head(model, batches, count, config.l2)
        if config.finetune:
            steps = self.fit(model, config.finetune).steps
        seconds = time.monotonic() - begun
        self.save(model)
        return self.held_out(model) | {"seconds": seconds, "steps": steps}

    def evaluate(self, models: dict[str, str]) -> dict[str, dict[str, Any]]:
        """Where a stage has kept what its model predicts, in this precision, the model is not run again."""
        mode = precision(self.section("evaluate").precision)
        folders = {name: self.stage.input(made_by) for name, made_by in models.items()}
        logits = {name: kept for name, folder in folders.items() if (kept := _kept_logits(folder, mode)) is not None}
        missing = {name: self.load(made_by) for name, made_by in models.items() if name not in logits}
        new, labels = self._predict(missing or {"source": self.load("source")}, mode)
        logits |= new
        expected = logits["source"].argmax(-1)
        return {name: score(logits[name], labels, expected).as_dict() for name in models}

    def unlabelled_batches(self, batch_size: int, seed: int) -> Batches:
        return self._stream(AugmentConfig(hflip=0.5), batch_size, seed)

    def some_batch(self, split: str, images: int, seed: int) -> Tensor:
        data = self.section("data")
        batches = eval_batches(self._shards(split), transform(data), batch_size=data.eval_batch_size, limit=images)
        return torch.cat([images for images, _ in batches])

    def pictures(self, batch: Tensor) -> np.ndarray:
        from t5lib.report.explanation_plots import as_pictures  # Matplotlib takes a second

        data = self.section("data")
        return as_pictures(batch, data.mean, data.std)

    def fit(self, model: nn.Module, recipe: TrainConfig) -> TrainReport:
        """See Target; the source is the teacher, where the recipe has one."""
        data, teacher = self.section("data"), self.load("source") if recipe.distill else None
        count = self._shards("train").count
        return train(
            model,
            self._stream(recipe.augment, recipe.batch_size, recipe.seed),
            Classification(recipe, data.num_classes, teacher),
            recipe,
            steps=recipe.steps(count),
            resume_dir=self.stage.resume_dir(),
            log=self.stage.log,
        )

    def held_out(self, model: nn.Module) -> dict[str, float]:
        """See Target; the predictions are kept beside what the stage made, for the stage `evaluate`."""
        logits, labels = self._predict({"model": model}, precision())
        if processes.leads():
            with atomic_file(self.stage.out / KEPT) as file:
                save_file(logits, file, metadata={"precision": precision()})
        measured = score(logits["model"], labels)
        return {"top1": measured.top1, "loss": measured.loss}

    def check_gate(self, measured: dict[str, float], config: FreezeConfig) -> dict[str, float]:
        if not math.isfinite(measured["loss"]):
            raise T5Error(
                f"freeze gate: the validation loss is {measured['loss']}, so a converted layer overflows on images it "
                "was not trained on; a fine-tune would diverge. Use key_norm 'instance', calibrate with a lower lr, or "
                "evaluate in fp32"
            )
        if not measured["top1"] >= config.floor:
            raise T5Error(
                f"freeze gate: top-1 is {measured['top1']:.1f} % before the fine-tune, below the floor "
                f"of {config.floor:g} %. The new layers do not stand in for attention yet, and a fine-tune would "
                "overwrite pretrained weights to make up for it. Calibrate longer (calibrate.steps), use inner "
                "'swiglu' with key_norm 'instance' and locality 'dwc_qk', or lower freeze.floor if this is good enough "
                "for your task"
            )
        return {}

    def product(self, scores: dict[str, Any]) -> Product:
        config, images = self.section("evaluate"), self._shards("val")
        settings = {"data": to_dict(self.section("data")), "classes": list(images.classes)}
        return Product(
            kind="classifier",
            files=self.model_files(),
            settings=settings | {"precision": config.precision},
            scores=scores,
            measure="top1",
            better="higher",
            scored_by=[sha256(self.stage.input("shards") / "val.json"), to_dict(config)],
        )

    def quality(self, data: ReportData) -> Quality:
        from t5lib.report import classifier as report  # Matplotlib takes a second

        return report.quality(data, self.section("data"))

    def _shards(self, split: str) -> ShardSet:
        return ShardSet.read(self.stage.input("shards") / f"{split}.json")

    def _stream(self, augment: AugmentConfig, batch_size: int, seed: int) -> Batches:
        """Endless training batches, from any batch number on."""
        images, data = self._shards("train"), self.section("data")

        def from_batch(start: int, part: Part = WHOLE):
            return train_batches(
                images,
                transform(data, augment),
                batch_size=batch_size,
                seed=seed,
                start=start,
                workers=data.workers,
                part=part,
            )

        return from_batch

    def _predict(self, models: dict[str, nn.Module], mode: str) -> tuple[dict[str, Tensor], Tensor]:
        """The logits of models on all validation images, and the labels."""
        data, images = self.section("data"), self._shards("val")
        options, ours = {"batch_size": data.eval_batch_size, "workers": data.workers}, _ours()
        batches = eval_batches(images, transform(data), **options, **ours)
        with progress("evaluate", images.count // ours["world_size"]) as bar:
            logits, labels = predict(models, batches, precision=mode, on_batch=bar.advance)
        return {name: processes.in_order(each) for name, each in logits.items()}, processes.in_order(labels)


def _check_images(embedding: nn.Module, data: DataConfig) -> None:
    """Raises T5Error unless the model takes images of that size."""
    size = size_of(data)
    if not embedding.dynamic_img_pad and any(
        side % patch for side, patch in zip(size, embedding.patch_size, strict=True)
    ):
        raise T5Error(f"data.img_size is {data.img_size}; expected multiples of the patch, {embedding.patch_size[0]}")
    if embedding.strict_img_size and size != tuple(embedding.img_size):
        raise T5Error(
            f"data.img_size is {data.img_size}, but the model takes {embedding.img_size}; correct it, or "
            "fetch.model_args.img_size"
        )


def _kept_logits(folder: Path, mode: str) -> Tensor | None:
    """What `held_out` kept of the model in `folder`, if it ran in this precision."""
    if not (folder / KEPT).is_file():
        return None
    with safe_open(folder / KEPT, "pt") as file:
        return file.get_tensor("model") if file.metadata()["precision"] == mode else None


def _ours() -> dict[str, int]:
    """Which of the images this process runs a model on, for eval_batches."""
    return {"rank": processes.state().process_index, "world_size": processes.state().num_processes}


def _refuse_classes(shards: ShardSet, num_classes: int) -> None:
    if len(shards.classes) != num_classes:
        raise T5Error(
            f"the shards have {len(shards.classes)} classes, but data.num_classes is {num_classes}; correct it"
        )


def _refuse_mismatch(train: ShardSet, val: ShardSet, num_classes: int) -> None:
    if train.classes != val.classes:
        raise T5Error(
            f"the classes of train ({len(train.classes)}) and val ({len(val.classes)}) differ in number, names "
            "or order; both must come from the same data set"
        )
    _refuse_classes(train, num_classes)
    refuse_overlap(train, val)
