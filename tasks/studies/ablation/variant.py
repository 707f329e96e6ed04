"""One variant with one seed: convert → calibrate → {freeze protocol, fine-tune}, each scored on the same images."""

import copy
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

import t5lib
from t5lib.conversion import new_parameters
from t5lib.layers.config import TTTConfig
from t5lib.report.models import OF_STAGE
from t5lib.training.calibration import CalibrateConfig
from t5lib.training.classifier import TrainConfig
from t5lib.utils.config import from_dict
from t5lib.utils.errors import T5Error
from t5lib.utils.files import write_json
from tasks.studies.ablation.context import Context
from tasks.studies.ablation.definition import Plan, Unit, merged
from tasks.studies.common import clean_up, machine, with_seed


@dataclass(frozen=True, kw_only=True)
class VariantJob:
    """One variant with some seeds; `shared_card` says whether others run beside it, `commit` which code it is."""

    plan: Plan
    work: Path
    variant: str
    seeds: tuple[int, ...]
    commit: str
    shared_card: bool


def make_variant(job: VariantJob) -> None:
    """Run the variant with each seed, and write the record of each to its `Unit.result_file`."""
    unit, about = job.plan.unit(job.variant), {"git_commit": job.commit, "shared_card": job.shared_card}
    try:
        for seed in job.seeds:
            record = run(unit, seed, Context.of(job.plan, job.work))
            write_json(unit.result_file(job.work, seed), record | about)
            print(f"{job.variant}, seed {seed}: done", flush=True)
    finally:
        clean_up()  # the next variant is other code; seeds of one share theirs


def run(unit: Unit, seed: int, context: Context) -> dict[str, Any]:
    """Everything that is shown of the variant with that seed, as plain values.

    What cannot be trained (a loss that is not finite, layers that do not fit the model) is a result too: it stands
    under "stopped" with the error's message, by the section it stopped in.
    """
    return _Run(unit, seed, context).all()


class _Run:
    def __init__(self, unit: Unit, seed: int, context: Context):
        self.unit, self.seed, self.context = unit, seed, context
        self.settings = with_seed(unit.settings, seed)
        self.source = context.source(seed)
        self.seconds: dict[str, float] = {}
        self.stopped: dict[str, str] = {}
        self.models: dict[str, Any] = {"source": self.source.score}
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
            **machine(),
            "started": started,
            "ended": time.time(),
        }

    def _begin(self) -> nn.Module | None:
        """The model that the trainings start from, None where there is none."""
        if self.settings["convert"] is None:
            return self.source.model
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
        return t5lib.convert(self.source.model, from_dict(TTTConfig, self.settings["convert"], "convert"))

    def _calibrated(self) -> nn.Module:
        """Calibrated with the best rates of the pilot; with the next best where these break on the way."""
        with self._part("pilot"):
            self.calibration["pilot"] = self._pilot()
        tried = sorted(self.calibration["pilot"], key=lambda entry: _or_infinite(entry["error"]))
        choices = [entry["settings"] for entry in tried] or [{}]
        for index, choice in enumerate(choices):
            model = self._converted()
            try:
                report = self.context.calibrate(model, self.seed, self._recipe(choice))
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
                error = _mean(self.context.calibrate(self._converted(), self.seed, recipe).error_after)
            except T5Error:
                error = None
            results.append({"settings": choice, "error": error})
        return results or [{"settings": choice, "error": None} for choice in pilot["grid"]]

    def _recipe(self, choice: dict[str, Any]) -> CalibrateConfig:
        return from_dict(CalibrateConfig, merged(self.settings["calibrate"], choice), "calibrate")

    def _train(self, model: nn.Module, protocol: str) -> None:
        config = from_dict(TrainConfig, self.settings[protocol], protocol)
        self.context.train(model, config, self.source.model if config.distill else None)
        self._score("control" if self.settings["convert"] is None else OF_STAGE[protocol].key, model)

    def _score(self, name: str, model: nn.Module) -> None:
        result = self.context.score(model, self.seed)
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
