"""One variant with one seed: convert → calibrate → {freeze protocol, fine-tune}, each scored on the same images."""

import copy
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import t5lib
from t5lib.benchmarks.resolution_sweep import describe_device
from t5lib.conversion import new_parameters
from t5lib.evaluation.classifier import Score
from t5lib.layers.config import TTTConfig
from t5lib.training.calibration import CalibrateConfig
from t5lib.training.classifier import TrainConfig
from t5lib.utils.config import from_dict
from t5lib.utils.errors import T5Error
from tasks.studies.ablation.context import Lab
from tasks.studies.ablation.definition import Unit, merged
from tasks.studies.seeds import with_seed

RESULT_OF = {"freeze": "frozen", "finetune": "finetuned"}  # the names that stage `evaluate` gives to models


def run(unit: Unit, seed: int, lab: Lab, *, commit: str, shared_card: bool) -> dict[str, Any]:
    """Everything that is shown of the variant with that seed, as plain values.

    What cannot be trained (a loss that is not finite, layers that do not fit the model) is a result too: it stands
    under "stopped" with the error's message, by the section it stopped in.
    """
    return _Run(unit, seed, lab).all() | {"git_commit": commit, "shared_card": shared_card}


class _Run:
    def __init__(self, unit: Unit, seed: int, lab: Lab):
        self.unit, self.seed, self.lab = unit, seed, lab
        self.settings = with_seed(unit.settings, seed)
        self.seconds: dict[str, float] = {}
        self.stopped: dict[str, str] = {}
        self.models: dict[str, Any] = {"source": lab.source_score(seed)}
        self.calibration: dict[str, Any] = {}
        self.new = 0

    def all(self) -> dict[str, Any]:
        started = time.time()
        model = self._begin()
        for protocol in self.unit.protocols if model is not None else ():
            with self._part(protocol):
                self._train(copy.deepcopy(model), protocol)
        if "pilot" in self.seconds:
            self.seconds["calibrate"] -= self.seconds["pilot"]  # it is a part of that part
        return {
            "variant": self.unit.variant,
            "seed": self.seed,
            "key": self.unit.key,
            "settings": self.settings,
            "models": self.models,
            "calibration": self.calibration,
            "new_parameters": self.new,
            "stopped": self.stopped,
            "seconds": self.seconds,
            "device": describe_device(self.lab.device),
            "torch": torch.__version__,
            "started": started,
            "ended": time.time(),
        }

    def _begin(self) -> nn.Module | None:
        """The model that the trainings start from, None where there is none."""
        if self.settings["convert"] is None:
            return self.lab.source(self.seed)
        model = None
        with self._part("convert"):
            model = self._converted()
            self.new = sum(parameter.numel() for parameter in new_parameters(model).values())
        if model is None:
            return None
        if self.settings["calibrate"] is None:
            self._score("converted", model)
            return model
        calibrated = None
        with self._part("calibrate"):
            calibrated = self._calibrated()
        if calibrated is not None:
            self._score("calibrated", calibrated)
        return calibrated

    def _converted(self) -> nn.Module:
        return t5lib.convert(self.lab.source(self.seed), from_dict(TTTConfig, self.settings["convert"], "convert"))

    def _calibrated(self) -> nn.Module:
        """Calibrated with the best rates of the pilot; with the next best where these break on the way."""
        with self._part("pilot"):
            self.calibration["pilot"] = self._pilot()
        tried = sorted(self.calibration["pilot"], key=lambda entry: _or_infinite(entry["error"]))
        choices = [entry["settings"] for entry in tried] or [{}]
        for index, choice in enumerate(choices):
            model = self._converted()
            try:
                report = self.lab.calibrate(model, self.seed, self._recipe(choice))
            except T5Error:
                if index == len(choices) - 1:
                    raise
                continue
            self.calibration |= {
                "chosen": choice,
                "error_before": _mean(report.error_before),
                "error_after": _mean(report.error_after),
                "error_of_layers": {name: _finite(error) for name, error in report.error_after.items()},
            }
            return model
        raise AssertionError("the last choice returns or raises")

    def _pilot(self) -> list[dict[str, Any]]:
        """The held-out error after the pilot's few steps, for each entry of its grid; None where it broke."""
        pilot, results = self.settings["pilot"], []
        for choice in pilot["grid"] if len(pilot["grid"]) > 1 else ():
            try:
                recipe = replace(self._recipe(choice), steps=pilot["steps"])
                error = _mean(self.lab.calibrate(self._converted(), self.seed, recipe).error_after)
            except T5Error:
                error = None
            results.append({"settings": choice, "error": error})
        return results or [{"settings": choice, "error": None} for choice in pilot["grid"]]

    def _recipe(self, choice: dict[str, Any]) -> CalibrateConfig:
        return from_dict(CalibrateConfig, merged(self.settings["calibrate"], choice), "calibrate")

    def _train(self, model: nn.Module, protocol: str) -> None:
        config = from_dict(TrainConfig, self.settings[protocol], protocol)
        teacher = self.lab.source(self.seed) if config.distill else None
        self.lab.train(model, config, teacher)
        name = "control" if self.settings["convert"] is None else RESULT_OF[protocol]
        self._score(name, model)

    def _score(self, name: str, model: nn.Module) -> None:
        result: Score = self.lab.score(model, self.seed)
        self.models[name] = result.as_dict() | {"loss": _finite(result.loss)}

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        """Times a part of the work; a T5Error ends the part, not the run."""
        begun = time.monotonic()
        try:
            yield
        except T5Error as error:
            self.stopped[name] = str(error)
        finally:
            self.seconds[name] = time.monotonic() - begun


def _mean(errors: dict[str, float]) -> float | None:
    return _finite(sum(errors.values()) / len(errors))


def _finite(value: float) -> float | None:
    """JSON knows neither NaN nor infinity."""
    return value if math.isfinite(value) else None


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else value
