"""Stage `evaluate`: every model of the target on the same validation images or prompts, side by side."""

from typing import Any

from t5lib.report.models import MODELS, final
from tasks.targets.base import Target
from tasks.targets.run import main

READS = ("evaluate", "align", "data")
TOGETHER = True


def run(target: Target) -> dict[str, Any]:
    """Where nothing was aligned, the calibrated model stands for both; where nothing was fine-tuned, the result is the
    last one before that, which the stage finetune passed on."""
    skipped: tuple[str, ...] = () if target.section("align").steps else ("aligned",)
    skipped += ("finetuned", "control") if target.nothing_to_tune_on() else ()
    models = {model.key: model.made_by for model in MODELS if model.key not in skipped}
    result = final(models)
    scores = target.evaluate(models | {result: "finetune"})
    target.stage.product = target.product(scores[result])
    return {"models": scores}


if __name__ == "__main__":
    main(run)
