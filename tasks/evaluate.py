"""Stage `evaluate`: every model of the target on the same validation images or prompts, side by side."""

from typing import Any

from t5lib.report.models import MODELS
from tasks.targets.base import Target
from tasks.targets.run import main

READS = ("evaluate", "align", "data")


def run(target: Target) -> dict[str, Any]:
    """Where nothing was aligned, the calibrated model stands for both."""
    skipped = () if target.section("align").steps else ("aligned",)
    scores = target.evaluate({model.key: model.made_by for model in MODELS if model.key not in skipped})
    target.stage.product = target.product(scores["finetuned"])
    return {"models": scores}


if __name__ == "__main__":
    main(run)
