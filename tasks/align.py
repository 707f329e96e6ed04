"""Stage `align`: the whole converted model trained on the whole softmax model, without labels."""

import t5lib
from tasks.targets.base import Target
from tasks.targets.run import main

READS = ("align", "data")
TOGETHER = True


def run(target: Target) -> dict[str, float]:
    """With 0 steps the calibrated model is passed on as it is."""
    config, stage = target.section(), target.stage
    model = target.load("calibrate")
    if not config.steps:
        target.save(model)
        return {"steps": 0, "seconds": 0.0}
    report = t5lib.align(
        model,
        teacher=target.load("source"),
        batches=target.unlabelled_batches(config.batch_size, config.seed),
        config=config,
        resume_dir=stage.resume_dir(),
        log=stage.log,
    )
    target.save(model)
    metrics = {"steps": report.steps, "seconds": report.seconds}
    for moment, errors in (("before", report.error_before), ("after", report.error_after)):
        metrics |= {f"error_{moment}.{part}": error for part, error in errors.items()}
    return metrics


if __name__ == "__main__":
    main(run)
