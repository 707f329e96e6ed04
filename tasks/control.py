"""Stage `control`: the softmax source fine-tuned with the very recipe of `finetune`: what T5 must be compared with."""

from tasks.finetune import train_stage
from tasks.targets.base import Target
from tasks.targets.run import main

READS = ("finetune", "data")


def run(target: Target) -> dict[str, float]:
    return train_stage(target, "source", target.section("finetune"))


if __name__ == "__main__":
    main(run)
