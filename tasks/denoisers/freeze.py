"""Stage `freeze` of denoisers: only new parameters trained, a cheap gate before the fine-tune."""

import math
from dataclasses import dataclass, field

import t5lib
from t5lib.training.denoiser import DenoiserTrainConfig
from t5lib.utils.errors import T5Error
from tasks.denoisers.data import LatentsConfig
from tasks.denoisers.training import fit, loss_of, outcome
from tasks.runtime.stage import Stage
from tasks.targets.denoiser import load


@dataclass(frozen=True, kw_only=True)
class FreezeConfig:
    """`ceiling`: times the source's held-out loss above which the flow stops here; `train`: the recipe."""

    ceiling: float
    train: DenoiserTrainConfig = field(default_factory=lambda: DenoiserTrainConfig(trainable="new"))

    def __post_init__(self):
        if self.train.trainable != "new":
            raise T5Error(f"freeze: train.trainable is '{self.train.trainable}'; this protocol needs 'trainable: new'")


SECTIONS = {"freeze": FreezeConfig, "data": LatentsConfig}


def run(stage: Stage) -> dict[str, float]:
    config, data = stage.params(FreezeConfig), stage.params(LatentsConfig, "data")
    source, shards = stage.input("source"), stage.input("shards")
    model = load(stage.input("calibrate"))
    report = fit(stage, model, config.train, data, shards, source)
    loss, before = (loss_of(each, data, shards, source) for each in (model, load(source)))
    check_gate(loss, before, config.ceiling)
    t5lib.save(model, stage.out)
    return outcome(report, loss) | {"of_source": loss / before}


def check_gate(loss: float, source: float, ceiling: float) -> None:
    """Raises T5Error when the converted model is not worth a fine-tune."""
    if not math.isfinite(loss) or loss > ceiling * source:
        raise T5Error(
            f"freeze gate: with only the new parameters trained the held-out loss is {loss:.4g}, more than {ceiling:g} "
            f"times the source's {source:.4g}. The new layers do not stand in for attention yet, and a fine-tune would "
            "overwrite pretrained weights to make up for it. Calibrate longer (calibrate.steps), use inner 'swiglu' "
            "with key_norm 'instance' and locality 'dwc_qk', convert fewer layers (layers: paper), or raise "
            "freeze.ceiling if this is good enough for your task"
        )
