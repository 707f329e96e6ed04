"""Stage `finetune`: all weights of the aligned model, trained a little; skipped where there are no real images."""

from typing import Any

from torch import nn

from t5lib.training.recipe import LoopConfig
from tasks.targets.base import Target
from tasks.targets.run import main

READS = ("finetune", "data")
TOGETHER = True


def run(target: Target) -> dict[str, Any]:
    """Start from the aligned model, once the freeze gate is passed (dvc.yaml makes that a dependency)."""
    return tune_stage(target, "align")


def tune_stage(target: Target, start: str) -> dict[str, Any]:
    """Train the model of stage `start` by the section `finetune`, or pass it on as it is where there are no images to
    learn from; the metrics then hold the reason as "skipped"."""
    if reason := target.nothing_to_tune_on():
        return pass_on(target, start, reason)
    return train_stage(target, target.load(start), target.section("finetune"))


def pass_on(target: Target, start: str, reason: str) -> dict[str, Any]:
    """Save the model of stage `start` as it is, and say why."""
    print(f"{target.stage.name} is skipped: {reason}; the model of {start} is passed on as it is", flush=True)
    target.save(target.load(start))
    return {"steps": 0, "seconds": 0.0, "skipped": reason}


def train_stage(target: Target, model: nn.Module, recipe: LoopConfig) -> dict[str, float]:
    """Train `model` by `recipe` and save it; returns the metrics of a training stage."""
    report = target.fit(model, recipe)
    target.save(model)
    return target.held_out(model) | {
        "steps": report.steps,
        "seconds": report.seconds,
        "samples_per_second": report.samples_per_second,
    }


if __name__ == "__main__":
    main(run)
