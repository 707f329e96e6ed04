"""Stage `finetune`: all weights of the calibrated model, trained a little."""

import t5lib
from t5lib.data.images import DataConfig
from t5lib.training.classifier import TrainConfig
from tasks.runtime.stage import Stage, main
from tasks.targets.classifier import device, evaluate_one, fit, outcome

SECTIONS = {"finetune": TrainConfig, "data": DataConfig}


def run(stage: Stage) -> dict:
    """Start from the calibrated model, once the freeze gate is passed (dvc.yaml makes that a dependency)."""
    return finetune(stage, "calibrate")


def finetune(stage: Stage, start: str) -> dict:
    """Train the model of stage `start` by the section `finetune`; the source is the teacher if the recipe has one."""
    config, data = stage.params(TrainConfig, "finetune"), stage.params(DataConfig, "data")
    model = t5lib.load(stage.input(start), device())
    teacher = t5lib.load(stage.input("source"), device()) if config.distill else None
    shards = stage.input("shards")
    report = fit(stage, model, config, data, shards, teacher)
    score = evaluate_one(model, data, shards)
    t5lib.save(model, stage.out)
    return outcome(report, score)


if __name__ == "__main__":
    main(run)
