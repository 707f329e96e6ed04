"""Stage `evaluate` of denoisers: every model draws the same prompts from the same noise, scored side by side."""

import os
from typing import Any

from t5lib.report import plots
from t5lib.report.sample_grid import sample_grid
from tasks.denoisers.data import LatentsConfig
from tasks.evaluate import MODELS
from tasks.runtime.stage import Stage
from tasks.targets.sample_evaluator import EvaluateConfig, Judge

SECTIONS = {"evaluate": EvaluateConfig, "data": LatentsConfig}


def run(stage: Stage) -> dict[str, Any]:
    """Write every image and a picture of some; returns each model's scores (t5lib.evaluation.scores.METRICS)."""
    config, data = stage.params(EvaluateConfig), stage.params(LatentsConfig, "data")
    made = {"fetched": stage.input("fetch"), "shards": stage.input("shards"), "source": stage.input("source")}
    folders = {name: stage.input(made_by) for name, made_by in MODELS.items()}
    judge, images = Judge(config, data, **made, root=stage.root), stage.resume_dir() / "images"
    drawn = {name: judge.draw(name, folder, images / name) for name, folder in folders.items()}
    found = judge.scores(drawn)
    os.replace(images, stage.out / "images")
    few = {name: each.pictures[: config.shown] for name, each in drawn.items()}
    plots.save(sample_grid(few, judge.prompts[: config.shown]), stage.out / "samples.png")
    stage.artifact(stage.out / "samples.png")
    return {"models": found}
