"""Stage `finetune` of denoisers: all weights of the calibrated model, trained a little."""

import t5lib
from t5lib.training.denoiser import DenoiserTrainConfig
from tasks.denoisers.data import LatentsConfig
from tasks.denoisers.training import fit, loss_of, outcome
from tasks.runtime.stage import Stage
from tasks.targets.denoiser import load

SECTIONS = {"finetune": DenoiserTrainConfig, "data": LatentsConfig}


def run(stage: Stage) -> dict[str, float]:
    """Start from the calibrated model, once the freeze gate is passed (dvc.yaml makes that a dependency)."""
    return finetune(stage, "calibrate")


def finetune(stage: Stage, start: str) -> dict[str, float]:
    """Train the model of stage `start` by the section `finetune`."""
    config, data = stage.params(DenoiserTrainConfig, "finetune"), stage.params(LatentsConfig, "data")
    source, shards = stage.input("source"), stage.input("shards")
    model = load(stage.input(start))
    teacher = load(source) if config.align and config.teacher == "source" else None
    report = fit(stage, model, config, data, shards, source, teacher)
    loss = loss_of(model, data, shards, source)
    t5lib.save(model, stage.out)
    return outcome(report, loss)
