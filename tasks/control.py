"""Stage `control`: the softmax source fine-tuned with the very recipe of `finetune`: what T5 must be compared with."""

from t5lib.data.images import DataConfig
from t5lib.training.classifier import TrainConfig
from tasks.finetune import finetune
from tasks.runtime.stage import Stage, main

SECTIONS = {"finetune": TrainConfig, "data": DataConfig}


def run(stage: Stage) -> dict:
    return finetune(stage, "source")


if __name__ == "__main__":
    main(run)
