"""Stage `calibrate`: attention transfer from the softmax model, without labels."""

from torch import nn

import t5lib
from t5lib.data.images import AugmentConfig, DataConfig
from t5lib.training.calibration import CalibrateConfig, CalibrationReport
from tasks.runtime.stage import Stage, main
from tasks.targets.classifier import device, stream

SECTIONS = {"calibrate": CalibrateConfig, "data": DataConfig}


def run(stage: Stage) -> dict:
    config, data = stage.params(CalibrateConfig), stage.params(DataConfig, "data")
    model = t5lib.load(stage.input("convert"), device())
    teacher = t5lib.load(stage.input("source"), device())
    batches = stream(stage.input("shards"), data, AugmentConfig(hflip=0.5), config.batch_size, config.seed)
    report = t5lib.calibrate(
        model, teacher=teacher, batches=batches, config=config, resume_dir=stage.resume_dir(), log=stage.log
    )
    return write(stage, model, report)


def write(stage: Stage, model: nn.Module, report: CalibrationReport) -> dict[str, float]:
    """Save the model; returns the metrics."""
    t5lib.save(model, stage.out)
    metrics = {"steps": report.steps, "seconds": report.seconds}
    for moment, errors in (("before", report.error_before), ("after", report.error_after)):
        metrics[f"error_{moment}"] = sum(errors.values()) / len(errors)
        metrics |= {f"error_{moment}.{layer}": error for layer, error in errors.items()}
    return metrics


if __name__ == "__main__":
    main(run)
