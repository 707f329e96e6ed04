"""Stage `diagnose`: shift ratio of every layer and head on real images, with a random-init control, and its picture."""

import t5lib
from t5lib.report import plots
from tasks.targets.base import Target
from tasks.targets.run import main

READS = ("diagnose", "data")


def run(target: Target) -> dict[str, float]:
    """On training images of one size; a denoiser sees each at one level of noise."""
    config, stage = target.section(), target.stage
    model = target.load("source")
    diagnosis = t5lib.diagnose(model, target.some_batch("train", config.images, config.seed), seed=config.seed)
    stage.write_json("shift_ratio.json", diagnosis.as_dict())
    plots.save(plots.shift_ratio_map(**diagnosis.as_dict()), stage.out / "shift_ratio.png")
    stage.artifact(stage.out / "shift_ratio.png")
    return diagnosis.summary() | {"images": config.images}


if __name__ == "__main__":
    main(run)
