"""Stage `evaluate`: every model of the target on the same validation images, side by side."""

import t5lib
from t5lib.data import DataConfig
from tasks.common import device, evaluate_all
from tasks.stage import Stage, main

SECTIONS = {"data": DataConfig}
MODELS = {
    "source": "source",
    "converted": "convert",
    "calibrated": "calibrate",
    "frozen": "freeze",
    "finetuned": "finetune",
    "control": "control",
}


def run(stage: Stage) -> dict:
    data = stage.params(DataConfig, "data")
    models = {name: t5lib.load(stage.input(made_by), device()) for name, made_by in MODELS.items()}
    scores = evaluate_all(models, data, stage.input("shards"), reference="source")
    return {"models": {name: score.as_dict() for name, score in scores.items()}}


if __name__ == "__main__":
    main(run)
