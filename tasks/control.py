"""Stage `control`: the softmax source fine-tuned with the very recipe of `finetune`: what T5 must be compared with."""

from typing import Any

from tasks.finetune import tune_stage
from tasks.targets.base import Target
from tasks.targets.run import main

READS = ("finetune", "data")
TOGETHER = True


def run(target: Target) -> dict[str, Any]:
    return tune_stage(target, "source")


if __name__ == "__main__":
    main(run)
