"""Stage `calibrate`: attention transfer from the softmax model, without labels."""

import t5lib
from tasks.targets.base import Target
from tasks.targets.run import main

READS = ("calibrate", "data")
TOGETHER = True


def run(target: Target) -> dict[str, float]:
    config, stage = target.section(), target.stage
    model, teacher = target.load("convert"), target.load("source")
    batches = target.unlabelled_batches(config.batch_size, config.seed)
    report = t5lib.calibrate(
        model, teacher=teacher, batches=batches, config=config, resume_dir=stage.resume_dir(), log=stage.log
    )
    target.save(model)
    metrics = {"steps": report.steps, "seconds": report.seconds}
    for moment, errors in (("before", report.error_before), ("after", report.error_after)):
        metrics[f"error_{moment}"] = sum(errors.values()) / len(errors)
        metrics |= {f"error_{moment}.{layer}": error for layer, error in errors.items()}
    if choice := report.softmax:  # where convert.layers is "auto"
        metrics["model_error"] = choice.error
        metrics |= {f"model_error_with_softmax.{layer}": error for layer, error in choice.error_with[0].items()}
        metrics |= {f"softmax.{layer}": number for number, layer in enumerate(choice.layers, 1)}
        metrics["model_error_chosen"] = choice.error_with[-1][choice.layers[-1]]
    return metrics


if __name__ == "__main__":
    main(run)
