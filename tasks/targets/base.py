"""What the stages have to know about a kind of target, all of it: one subclass of Target a kind, one file each."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from pydantic import Field
from torch import nn

import t5lib
from t5lib.benchmarks.resolution_sweep import BenchmarkConfig
from t5lib.data.batches import Batches
from t5lib.families import family_of
from t5lib.families.base import Adapter
from t5lib.families.inputs import Inputs
from t5lib.families.replacement import chosen_layers
from t5lib.layers.attention import TTTLayer
from t5lib.layers.config import TTTConfig
from t5lib.layers.mixers import Mixer
from t5lib.report.common import Quality
from t5lib.report.data import ReportData
from t5lib.training.alignment import AlignConfig
from t5lib.training.layer_groups import CalibrateConfig, check_fit
from t5lib.training.recipe import LoopConfig
from t5lib.training.recorder import check_features
from t5lib.training.trainer import TrainReport
from t5lib.utils import processes
from t5lib.utils.config import AtLeastOne, WholeNumber, settings
from t5lib.utils.errors import T5Error
from t5lib.utils.files import MODEL_FILES
from tasks.runtime.needs import Needs
from tasks.runtime.stage import Stage
from tasks.runtime.tracking.registry.product import Product

Images = Annotated[int, Field(ge=1, le=2**16)]  # looked at together, in memory
Recipe = TypeVar("Recipe", bound=LoopConfig)  # of the training of one kind


@settings
class DiagnoseConfig:
    """`images`: how many training images the shift ratio is averaged over."""

    images: Images = 64
    seed: WholeNumber = 0


@settings
class ExplainConfig:
    """What is measured on.

    Attributes:
        images: validation images for errors, CKA and shift ratios; a denoiser's are noised once each.
        map_images: how many of them for attention distances and maps, which cost more (of classifiers).
        queries: patches whose attention distance is taken.
        probes: precision of a converted layer's attention map (t5lib.implicit_attention).
        seed: of the noise.
    """

    images: Images = 64
    map_images: Images = 4
    queries: AtLeastOne = 49
    probes: AtLeastOne = 2
    seed: WholeNumber = 0


class Target(ABC, Generic[Recipe]):
    """A target as one of its stages sees it.

    Attributes:
        SECTIONS: the sections of params.yaml that targets of this kind have, and what each is.
        stage: the stage that runs: its settings, its inputs, and the places for what it makes.
    """

    SECTIONS: ClassVar[dict[str, type]] = {
        "diagnose": DiagnoseConfig,
        "convert": TTTConfig,
        "calibrate": CalibrateConfig,
        "align": AlignConfig,
        "explain": ExplainConfig,
        "benchmark": BenchmarkConfig,
    }

    def __init__(self, stage: Stage):
        self.stage = stage

    def section(self, name: str | None = None) -> Any:
        """A section of the target's settings, by default the one of the stage's own name."""
        name = name or self.stage.name
        return self.stage.params(self.SECTIONS[name], name)

    def load(self, made_by: str) -> nn.Module:
        """The model that another stage made, on the device of this process."""
        return t5lib.load(self.stage.input(made_by), device())

    def save(self, model: nn.Module) -> None:
        """Make `model` the result of the stage; of several processes the first does it."""
        processes.by_first(lambda: t5lib.save(model, self.stage.out))

    @classmethod
    @abstractmethod
    def check(cls, sections: dict[str, Any], root: Path) -> None:
        """Raises T5Error for settings, each good by itself, that do not go together. Loads no weights.

        Args:
            sections: all of SECTIONS, as settings.
            root: of the repository.
        """

    @classmethod
    @abstractmethod
    def needs(cls, sections: dict[str, Any], root: Path, target: str, *, online: bool, pieces: int) -> Needs:
        """What building the target needs of a machine, from settings and configs alone.

        Args:
            sections, root: see `check`.
            target: its name; what its stages have made already is not counted.
            online: fetch the configs of what lies on a hub and is not here yet.
            pieces: number of cards that a training is spread over; 1 if each holds all of it.
        """

    # Stages that differ altogether; each returns the stage's metrics.

    @abstractmethod
    def fetch(self) -> dict[str, Any]:
        """Fetch the softmax model, checked."""

    @abstractmethod
    def shards(self) -> dict[str, Any]:
        """Open and check the training and validation images."""

    @abstractmethod
    def source(self) -> dict[str, Any]:
        """Make the softmax model that is converted."""

    @abstractmethod
    def evaluate(self, models: dict[str, str]) -> dict[str, dict[str, Any]]:
        """The scores of models, by name; `models` says which stage made each."""

    # What other stages are made of.

    @abstractmethod
    def unlabelled_batches(self, batch_size: int, seed: int) -> Batches:
        """What t5lib.calibrate and t5lib.align are fed with."""

    @abstractmethod
    def some_batch(self, split: str, images: int, seed: int) -> Any:
        """A batch of so many images of "train" or "val", to look at models with (t5lib.diagnose, t5lib.explain)."""

    @abstractmethod
    def pictures(self, batch: Any) -> np.ndarray | None:
        """The images of `some_batch` as pictures to draw over; None where they cannot be shown."""

    @abstractmethod
    def fit(self, model: nn.Module, recipe: Recipe) -> TrainReport:
        """Train `model` in place by `recipe`, resuming where the stage stopped before."""

    @abstractmethod
    def held_out(self, model: nn.Module) -> dict[str, float]:
        """How good `model` is on the validation images: "loss", and what else tells it at a glance."""

    @abstractmethod
    def check_gate(self, measured: dict[str, float], config: Any) -> dict[str, float]:
        """Whether a model with these held-out measures is worth a fine-tune, by the section `freeze`.

        Returns:
            More metrics, where the check made some.

        Raises:
            T5Error: it is not, with what to do.
        """

    def nothing_to_tune_on(self) -> str | None:
        """Why the stages finetune and control have no images to learn from, in words; None where they have some."""
        return None

    @abstractmethod
    def product(self, scores: dict[str, Any]) -> Product:
        """The fine-tuned model as MLflow registers it, with the `scores` that `evaluate` found for it."""

    @abstractmethod
    def quality(self, data: ReportData) -> Quality:
        """The part of the report that depends on the kind of model."""

    def model_files(self) -> dict[str, Path]:
        """The files of the fine-tuned model that t5lib.load reads, by their place in a Product."""
        made = self.stage.input("finetune")
        return {f"model/{name}": made / name for name in MODEL_FILES[0]}

    def samples(self) -> Path | None:
        """A picture of what the models draw, where they draw."""
        return None


def check_model(model: nn.Module, sections: dict[str, Any], inputs: Inputs) -> None:
    """Raises T5Error unless this softmax model, which needs no weights, suits the sections that all kinds have.

    Args:
        inputs: what it is called with in training, of any numbers.
    """
    adapter = family_of(model)
    with named("convert"):
        chosen = chosen_layers(adapter, model, sections["convert"])
        layers = _new_layers(adapter, model, chosen)
    with named("benchmark.resolutions"):
        for resolution in sections["benchmark"].resolutions:
            adapter.check_resolution(model, sections["benchmark"].at(resolution))
    _check_fits(sections, [layer.mixer for layer in layers])
    narrowest, probes = min(layer.head_dim for layer in layers), sections["explain"].probes
    if adapter.has_attention_maps and probes > narrowest:
        raise T5Error(f"explain.probes is {probes}; expected at most {narrowest}, the width of a head")
    features = sections["align"].features_of(adapter)
    if features is not None and features not in [name for name, _ in model.named_modules() if name]:
        raise T5Error(f"align.features '{features}' is not a part of a {type(model).__name__}; name one such as 'norm'")
    if features is not None:
        _check_features(model, features, tuple((name, each.shape, each.dtype) for name, each in inputs.items()))


def _new_layers(adapter: Adapter, model: nn.Module, chosen: dict[str, TTTConfig]) -> list[TTTLayer]:
    """A new layer of each kind, without weights."""
    kinds = {config: name for name, config in chosen.items()}
    with torch.device("meta"):
        return [adapter.new_layer(model, model.get_submodule(name), config) for config, name in kinds.items()]


def _check_fits(sections: dict[str, Any], mixers: list[Mixer]) -> None:
    """Raises T5Error unless the recipes can fit the new layers."""
    calibrate = sections["calibrate"]
    if calibrate.steps:
        with named("calibrate"):
            check_fit(calibrate, mixers)
        if calibrate.warmup > calibrate.steps:
            raise T5Error(
                f"calibrate.warmup is {calibrate.warmup} of {calibrate.steps} steps, so lr would never be reached; "
                f"expected fewer than the steps, such as {max(1, calibrate.steps // 10)}"
            )


@functools.lru_cache
def _check_features(model: nn.Module, features: str, inputs: tuple[tuple[str, torch.Size, torch.dtype], ...]) -> None:
    check_features(model, features, {name: torch.empty(*shape, dtype=d, device="meta") for name, shape, d in inputs})


@contextmanager
def named(section: str) -> Iterator[None]:
    """Within, errors begin with the section that they are about."""
    try:
        yield
    except T5Error as error:
        raise T5Error(f"{section}: {error}") from None


def device() -> torch.device:
    """The device of this process, as Accelerate assigns it."""
    place = processes.state().device
    return torch.device("cpu") if place.type == "cpu" else place  # it numbers CPUs, which safetensors does not know


def precision(wanted: str = "auto") -> str:
    """What models are run in when they are only looked at: "auto" is bf16 on CUDA, else fp32."""
    return ("bf16" if device().type == "cuda" else "fp32") if wanted == "auto" else wanted
