"""Stage `evaluate`: every model of the target on the same validation images, side by side."""

from dataclasses import dataclass
from typing import Literal

import t5lib
from t5lib.data.images import DataConfig
from tasks.runtime.stage import Stage, main
from tasks.targets.classifier import device, evaluate_all, precision


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """`precision`: "fp32", "bf16", or "auto", which is bf16 on CUDA and fp32 elsewhere."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"


SECTIONS = {"evaluate": EvaluateConfig, "data": DataConfig}
MODELS = {
    "source": "source",
    "converted": "convert",
    "calibrated": "calibrate",
    "frozen": "freeze",
    "finetuned": "finetune",
    "control": "control",
}


def run(stage: Stage) -> dict:
    config, data = stage.params(EvaluateConfig), stage.params(DataConfig, "data")
    models = {name: t5lib.load(stage.input(made_by), device()) for name, made_by in MODELS.items()}
    scores = evaluate_all(
        models, data, stage.input("shards"), reference="source", precision=precision(config.precision)
    )
    return {"models": {name: score.as_dict() for name, score in scores.items()}}


if __name__ == "__main__":
    main(run)
