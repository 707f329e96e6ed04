"""Stage `finetune`: all weights of the aligned model, trained a little; skipped where there are no real images."""

from typing import Any

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
    recipe = target.section("finetune")
    if reason := target.nothing_to_tune_on():
        print(f"{target.stage.name} is skipped: {reason}; the model of {start} is passed on as it is", flush=True)
        target.save(target.load(start))
        return {"steps": 0, "seconds": 0.0, "skipped": reason}
    return train_stage(target, start, recipe)


def train_stage(target: Target, start: str, recipe: LoopConfig, gate: object | None = None) -> dict[str, float]:
    """Train the model of stage `start` by `recipe` and save it; returns the metrics of a training stage.

    Args:
        gate: the section `freeze`, whose check the result has to pass, or the stage fails and leaves nothing.
    """
    model = target.load(start)
    report = target.fit(model, recipe)
    target.save(model)
    metrics = target.held_out(model)
    if gate is not None:
        metrics |= target.check_gate(metrics, gate)
    return metrics | {
        "steps": report.steps,
        "seconds": report.seconds,
        "samples_per_second": report.samples_per_second,
    }


if __name__ == "__main__":
    main(run)
