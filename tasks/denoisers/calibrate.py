"""Stage `calibrate` of denoisers: attention transfer over noise levels drawn as in training."""

import t5lib
from t5lib.training.calibration import CalibrateConfig
from tasks.calibrate import write
from tasks.denoisers.data import LatentsConfig
from tasks.runtime.stage import Stage
from tasks.targets.denoiser import load, objective, stream

SECTIONS = {"calibrate": CalibrateConfig, "data": LatentsConfig}


def run(stage: Stage) -> dict[str, float]:
    config, data = stage.params(CalibrateConfig), stage.params(LatentsConfig, "data")
    source, shards = stage.input("source"), stage.input("shards")
    model = load(stage.input("convert"))
    report = t5lib.calibrate(
        model,
        teacher=load(source),
        batches=stream(shards, data, config.batch_size, config.seed),
        config=config,
        objective=objective(source, data),
        resume_dir=stage.resume_dir(),
        log=stage.log,
    )
    return write(stage, model, report)
