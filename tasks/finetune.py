"""Stage `finetune`: all weights of the aligned model, trained a little."""

import t5lib
from t5lib.training.trainer import LoopConfig
from tasks.targets.base import Target
from tasks.targets.run import main

READS = ("finetune", "data")


def run(target: Target) -> dict[str, float]:
    """Start from the aligned model, once the freeze gate is passed (dvc.yaml makes that a dependency)."""
    return train_stage(target, "align", target.section("finetune"))


def train_stage(target: Target, start: str, recipe: LoopConfig, gate: object | None = None) -> dict[str, float]:
    """Train the model of stage `start` by `recipe` and save it; returns the metrics of a training stage.

    Args:
        gate: the section `freeze`, whose check the result has to pass, or the stage fails and leaves nothing.
    """
    model = target.load(start)
    report = target.fit(model, recipe)
    t5lib.save(model, target.stage.out)
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
