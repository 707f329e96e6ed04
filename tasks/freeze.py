"""Stage `freeze`: the freeze protocol (only new parameters), a cheap gate before the fine-tune."""

import math
from dataclasses import dataclass, field

import t5lib
from t5lib.data.images import DataConfig
from t5lib.training.classifier import TrainConfig
from t5lib.utils.errors import T5Error
from tasks.runtime.stage import Stage, main
from tasks.targets.classifier import device, evaluate_one, fit, outcome


@dataclass(frozen=True, kw_only=True)
class FreezeConfig:
    """`floor`: top-1 in percent below which the flow stops here; `train`: the recipe (trainable: new)."""

    floor: float
    train: TrainConfig = field(default_factory=lambda: TrainConfig(trainable="new"))

    def __post_init__(self):
        if self.train.trainable != "new":
            raise T5Error(f"freeze: train.trainable is '{self.train.trainable}'; this protocol needs 'trainable: new'")


SECTIONS = {"freeze": FreezeConfig, "data": DataConfig}


def run(stage: Stage) -> dict:
    config, data = stage.params(FreezeConfig), stage.params(DataConfig, "data")
    model = t5lib.load(stage.input("calibrate"), device())
    shards = stage.input("shards")
    report = fit(stage, model, config.train, data, shards)
    score = evaluate_one(model, data, shards)
    check_gate(score.top1, score.loss, config.floor)
    t5lib.save(model, stage.out)
    return outcome(report, score)


def check_gate(top1: float, loss: float, floor: float) -> None:
    """Raises T5Error when the converted model is not worth a fine-tune."""
    if not math.isfinite(loss):
        raise T5Error(
            f"freeze gate: the validation loss is {loss}, so a converted layer overflows on images it was not trained "
            "on; a fine-tune would diverge. Use key_norm 'instance', calibrate with a lower lr, or evaluate in fp32"
        )
    if top1 < floor:
        raise T5Error(
            f"freeze gate: top-1 is {top1:.1f} % with only the new parameters trained, below the floor of {floor:g} %. "
            "The new layers do not stand in for attention yet, and a fine-tune would overwrite pretrained weights to "
            "make up for it. Calibrate longer (calibrate.steps), use inner 'swiglu' with key_norm 'instance' and "
            "locality 'dwc_qk', or lower freeze.floor if this is good enough for your task"
        )


if __name__ == "__main__":
    main(run)
